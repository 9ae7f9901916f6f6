"""Two parts of ``gpu_worker_check.py`` that use the driver directly, in one process: what calls cost, and tuning."""

from __future__ import annotations

import ctypes
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_worker_check import CASES, GIB, KIB, MIB, case_starts, say

from xferd.api.mapping import map_shared
from xferd.plugins.cuda import calls
from xferd.plugins.cuda.driver import Pieces
from xferd.plugins.cuda.kernel import Tuning
from xferd.plugins.cuda.nvidia import NvidiaDriver

if TYPE_CHECKING:
    from collections.abc import Callable

ROOM = GIB


class Ground:
    """Memory to move between, and a driver whose settings can be changed."""

    def __init__(self) -> None:
        self.driver = NvidiaDriver(Tuning(timed=True))
        say(self.driver.start(0))
        self.one, self.two = self.driver.allocate(ROOM)[0], self.driver.allocate(ROOM)[0]
        self.host = map_shared(-1, ROOM)
        self.host[:] = 1
        self.address = int(self.host.ctypes.data)
        begun = time.perf_counter()
        self.driver.lock_host(self.address, ROOM, is_writable=True)
        say(f"locking 1 GiB: {(time.perf_counter() - begun) * 1e3:.1f} ms; {self.driver._processors} multiprocessors")
        self._functions: dict[tuple[int, bool], ctypes.c_void_p] = {}

    def use(self, tuning: Tuning) -> None:
        """Take other settings, with the kernel that they want."""
        key = tuning.unroll, tuning.streaming
        self.driver._tuning = tuning
        if key not in self._functions:
            self.driver._load()
            self._functions[key] = self.driver._function
        self.driver._function = self._functions[key]

    def pieces(self, way: str, size: int, count: int, skew: int = 0) -> Pieces:
        """Return a case's pieces; ``skew`` moves the source out of line."""
        rng = np.random.default_rng(1)
        source, target = {
            "VRAM->VRAM": (self.one, self.two),
            "DRAM->VRAM": (self.address, self.two),
            "VRAM->DRAM": (self.one, self.address),
        }[way]
        starts = case_starts(rng, size, count, ROOM), case_starts(rng, size, count, ROOM)
        table = np.stack(
            (
                starts[0] + np.uint64(source + skew),
                starts[1] + np.uint64(target),
                np.full(count, size - skew, np.uint64),
            ),
            axis=1,
        )
        return Pieces(table, int(table[:, 2].sum()), on_host="DRAM" in way)

    def time(self, pieces: Pieces, rounds: int = 15) -> tuple[float, float]:
        """Return medians (device us, host us) of a plan that is kept."""
        plan = self.driver.compile(pieces)
        device, host = [], []
        for _ in range(rounds):
            begun = time.perf_counter_ns()
            flight = self.driver.begin(plan, 0, 0)
            while not flight.is_done():
                pass
            host.append(time.perf_counter_ns() - begun)
            device.append(flight.device_ns())
        plan.drop()
        return float(np.median(device)) / 1e3, float(np.median(host)) / 1e3


def part_tuning() -> None:
    """Try shapes of the kernel, then find where copy engines are better."""
    ground = Ground()
    base = Tuning(timed=True, device_copies=0, host_copies=0, device_copy_nbytes=1 << 60, host_copy_nbytes=1 << 60)
    shapes: list[tuple[str, Tuning]] = [("as it is", base)]
    shapes += [(f"unroll {n}", replace(base, unroll=n)) for n in (1, 2, 8)]
    shapes += [(f"streaming, unroll {n}", replace(base, streaming=True, unroll=n)) for n in (2, 4, 8)]
    shapes += [(f"warps {n}", replace(base, warps_per_processor=n)) for n in (8, 16, 32, 128, 256)]
    shapes += [
        (f"max tile {n >> 10} KiB", replace(base, max_tile_nbytes=n)) for n in (4 * KIB, 8 * KIB, 16 * KIB, 128 * KIB)
    ]
    shapes += [(f"min tile {n}", replace(base, min_tile_nbytes=n)) for n in (512, 2048, 4096)]
    shapes += [(f"host blocks {n}", replace(base, host_blocks=n)) for n in (16, 32, 64, 256, 1024)]
    say("\nkernel only, table kept; device us for each case")
    cases = [(way, size, count) for way, size, count in CASES if count > 1 or size > MIB]
    heads = [f"{way[0]}>{way[6]} {size >> 10}Kx{count}" for way, size, count in cases]
    say(f"{'':>22} " + " ".join(f"{head:>13}" for head in heads))
    made = [ground.pieces(*case) for case in cases]
    for name, tuning in shapes:
        ground.use(tuning)
        say(f"{name:>22} " + " ".join(f"{ground.time(pieces, 9)[0]:13.1f}" for pieces in made))
    ground.use(base)
    say(
        "out of line by 1 byte  "
        + " ".join(f"{ground.time(ground.pieces(*case, skew=1), 9)[0]:13.1f}" for case in cases)
    )
    engines = replace(base, device_copies=1 << 20, host_copies=1 << 20)
    say("\ncopy engines beside the kernel: device us, host us")
    for way in ("VRAM->VRAM", "DRAM->VRAM", "VRAM->DRAM"):
        for size in (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
            for count in (1, 2, 4, 16, 64):
                if size * count > 256 * MIB:
                    continue
                pieces = ground.pieces(way, size, count)
                ground.use(base)
                kernel = ground.time(pieces, 7)
                ground.use(engines)
                copies = ground.time(pieces, 7)
                say(
                    f"{way} {size >> 10:>6} KiB x {count:<3} kernel {kernel[0]:8.1f} {kernel[1]:8.1f}"
                    f"   copies {copies[0]:8.1f} {copies[1]:8.1f}   {'copies' if copies[1] < kernel[1] else 'kernel'}"
                )


def part_calls() -> None:
    """Print what single calls cost, by each way there is of making them."""
    driver = NvidiaDriver()
    say(driver.start(0))
    cuda, lane, slots = driver._cuda, driver._service, driver._slots
    slot = slots.take(24 << 10)
    slot.nbytes.value = 24 << 10
    nothing = ctypes.c_void_p()
    event, timing, other = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    cuda.call("cuEventCreate", ctypes.byref(event), calls.EVENT_DISABLE_TIMING)
    cuda.call("cuEventCreate", ctypes.byref(timing), 0)
    cuda.call("cuEventCreate", ctypes.byref(other), 0)
    elapsed = ctypes.c_float()

    def launch() -> None:
        slot.arguments[0], slot.arguments[1], slot.arguments[2] = 0, 1, 1024
        cuda.cuLaunchKernel(driver._function, 1, 1, 1, 256, 1, 1, 0, lane.stream, slot.params, nothing)

    cost("cuLaunchKernel by ctypes", launch, cuda, lane)
    cost("cuEventRecord, no timing", lambda: cuda.cuEventRecord(event, lane.stream), cuda, lane)
    cost("cuEventRecord, timing", lambda: cuda.cuEventRecord(timing, lane.stream), cuda, lane)
    cost("cuEventQuery", lambda: cuda.cuEventQuery(event), cuda, lane)
    cuda.cuEventRecord(timing, lane.stream)
    cuda.cuEventRecord(other, lane.stream)
    cuda.cuStreamSynchronize(lane.stream)
    cost("cuEventElapsedTime", lambda: cuda.cuEventElapsedTime(ctypes.byref(elapsed), timing, other), cuda, lane)
    cost(
        "cuMemcpyHtoDAsync of 24 KiB, locked",
        lambda: cuda.cuMemcpyHtoDAsync_v2(slot.device, slot.staged, slot.nbytes, lane.stream),
        cuda,
        lane,
    )
    for name, part in (("cuda-bindings", by_bindings), ("cuda-core", by_core)):
        try:
            part(driver, slot, cuda, lane)
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as exc:  # versions differ
            say(f"FAILED: {name}: {type(exc).__name__}: {exc}")


def cost(name: str, call: Callable[[], Any], cuda: calls.Cuda, lane: Any) -> None:
    """Print the median of a call, with the stream drained now and then."""
    took = []
    for turn in range(2000):
        begun = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - begun)
        if turn % 50 == 0:
            cuda.cuStreamSynchronize(lane.stream)
    cuda.cuStreamSynchronize(lane.stream)
    say(f"{name:>40}: {np.median(took) / 1e3:6.2f} us")


def by_bindings(driver: NvidiaDriver, slot: Any, cuda: calls.Cuda, lane: Any) -> None:
    """Start the kernel through cuda-bindings, with arguments made beforehand."""
    from cuda.bindings import driver as bindings

    function, stream = bindings.CUfunction(driver._function.value), bindings.CUstream(lane.stream.value)
    params = ctypes.addressof(slot.params)
    cost(
        "cuLaunchKernel by cuda-bindings",
        lambda: bindings.cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, stream, params, 0),
        cuda,
        lane,
    )


def by_core(driver: NvidiaDriver, slot: Any, cuda: calls.Cuda, lane: Any) -> None:
    """Start the kernel through cuda-core."""
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

    from xferd.plugins.cuda.kernel import NAME, source

    device = Device(0)
    device.set_current()
    stream = device.create_stream()
    options = ProgramOptions(arch=f"sm_{device.arch}")
    kernel = Program(source(), "c++", options).compile("cubin").get_kernel(NAME)
    config = LaunchConfig(grid=1, block=256)
    none, one, tile = np.uint32(0), np.uint32(1), np.uint32(1024)
    cost(
        "launch by cuda-core",
        lambda: launch(stream, config, kernel, slot.device.value, none, one, tile),
        cuda,
        lane,
    )
    stream.sync()


if __name__ == "__main__":
    say(
        "see gpu_worker_check.py; settings now:",
        {field.name: getattr(Tuning(), field.name) for field in fields(Tuning)},
    )
