"""Check and measure device workers on a machine with a GPU, without a daemon: every part by itself, 90 seconds in all.

    PYTHONPATH=.types python3 tools/gpu_worker_check.py [--simulated] [--only PART ...] [--seconds N]

Real workers, real queues; memory is exported by processes that use cupy and torch where these are installed. A part
that fails says so and leaves the others alone. The parts:

    calls    what single calls of CUDA cost from Python: ctypes, cuda-bindings, cuda-core
    bytes    10,000 odd blocks between GPU memories and to and from host memory, every byte compared
    events   a move waits for another process's event, and records one
    bad      rubbish handles, dead processes, spans past the end, a worker killed: what is said, what is free then
    times    a table: host time and device time of commands by real workers, with and without kept tables
    tuning   the kernel in many shapes, and where copy engines take over: what ``kernel.Tuning`` is chosen by
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/unit/plugins/cuda"))

from worker_rig import Host, Told, WorkerRig, at  # noqa: E402 - where it lies is known only now

from xferd.api import simulated  # noqa: E402
from xferd.api.errors import XferdError  # noqa: E402
from xferd.api.mapping import map_shared  # noqa: E402
from xferd.plugins.cuda import calls, control  # noqa: E402
from xferd.plugins.cuda.layout import Engine, Outcome, Side  # noqa: E402

PARTS = ("bytes", "events", "bad", "times", "calls", "tuning")
LIMITS_S = {"calls": 15, "bytes": 40, "events": 20, "bad": 25, "times": 30, "tuning": 60}

ACROSS = (Side.DEVICE, Side.DEVICE)
INWARDS = (Side.HOST, Side.DEVICE)
OUTWARDS = (Side.DEVICE, Side.HOST)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_PIDFD_GETFD = 438


def say(*words: object) -> None:
    """Print at once, so that what is seen before a time limit is kept."""
    print(*words, flush=True)


# ---------------------------------------------------------------------------------------- processes that export


class Exporter:
    """A process that holds memory and does as it is told; ``kind`` is "cupy", "torch", "vmm" or "memfd"."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--export", kind, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            handle, size, offset, fd = self._line().split()
        except ValueError:
            raise RuntimeError(f"the process that exports by {kind} said nothing of use") from None
        self.handle, self.size, self.offset = "" if handle == "-" else handle, int(size), int(offset)
        self.fd = self._fetch(int(fd)) if int(fd) >= 0 else -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()
        if self.fd >= 0:
            os.close(self.fd)

    def ask(self, line: str) -> str:
        """Let it do something; returns what it says when that is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._line()

    def open_in(self, rig: WorkerRig, number: int) -> None:
        """Let a worker open its memory."""
        rig.ask(control.Open(number, self.size, self.handle), self.fd).check()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the process that exports by {self.kind} has ended with {self.process.wait(10)}")
        return line

    def _fetch(self, fd: int) -> int:
        pidfd = os.pidfd_open(self.process.pid)
        try:
            got = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, fd, 0)
        finally:
            os.close(pidfd)
        if got < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(got)


def can_export(kind: str) -> bool:
    """Whether a kind works here."""
    try:
        with Exporter(kind, MIB):
            return True
    except (OSError, RuntimeError):
        return False


def export(kind: str, nbytes: int) -> None:
    """Be the process: say (handle, nbytes of the allocation, offset, fd), then answer lines."""
    memory = {"cupy": CupyMemory, "torch": TorchMemory, "vmm": VmmMemory, "memfd": MemfdMemory}[kind](nbytes)
    say(memory.facts())
    for line in sys.stdin:
        word, *rest = line.split()
        say(getattr(memory, word)(*rest) or "done")


class MemfdMemory:
    """What a simulated GPU has."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("exported")
        os.ftruncate(self.fd, nbytes)
        self.array = map_shared(self.fd, nbytes)
        self.event = os.memfd_create("event")
        os.ftruncate(self.event, simulated.EVENT_NBYTES)
        self.page = map_shared(self.event, simulated.EVENT_NBYTES)

    def facts(self) -> str:
        """Return what others need to open it."""
        return f"{simulated.export_fd(self.fd, len(self.array)).hex()} {len(self.array)} 0 -1"

    def load(self, path: str) -> None:
        """Fill it from a file."""
        self.array[:] = np.fromfile(path, dtype=np.uint8)

    def dump(self, path: str) -> None:
        """Write it to a file."""
        self.array.tofile(path)

    def hold(self, value: str) -> str:
        """Record an event behind work that takes a while and then fills the memory; returns the event's handle."""
        import threading

        simulated.EVENT.pack_into(self.page.data, 0, 1, 0)

        def work() -> None:
            time.sleep(0.3)
            self.array[:] = int(value)
            simulated.EVENT.pack_into(self.page.data, 0, 1, 1)

        threading.Thread(target=work).start()
        return simulated.export_fd(self.event, simulated.EVENT_NBYTES, simulated.EVENT_MAGIC).hex()

    def follow(self, handle: str) -> str:
        """Say whether an event has come."""
        fd, _ = simulated.open_handle(bytes.fromhex(handle), simulated.EVENT_MAGIC)
        recorded, done = simulated.EVENT.unpack_from(map_shared(fd, simulated.EVENT_NBYTES).data)
        os.close(fd)
        return f"recorded {recorded} done {done}"


class CudaMemory:
    """What memory on a GPU has in common; ``address`` lies somewhere in an allocation."""

    address: int
    nbytes: int

    def handle_of(self, address: int) -> tuple[str, int, int]:
        """Return (IPC handle, nbytes, offset) of the allocation that an address lies in."""
        cuda = calls.Cuda()
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), calls.Handle()
        cuda.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        cuda.call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.raw).hex(), size.value, address - base.value

    def facts(self) -> str:
        """Return what others need to open it."""
        handle, size, offset = self.handle_of(self.address)
        return f"{handle} {size} {offset} -1"

    def load(self, path: str) -> None:
        """Fill it from a file."""
        data = np.fromfile(path, dtype=np.uint8)
        cuda = calls.Cuda()
        cuda.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(self.address),
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_size_t(len(data)),
        )
        cuda.call("cuCtxSynchronize")

    def dump(self, path: str) -> None:
        """Write it to a file."""
        data = np.empty(self.nbytes, dtype=np.uint8)
        cuda = calls.Cuda()
        cuda.call("cuCtxSynchronize")
        cuda.call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_uint64(self.address),
            ctypes.c_size_t(len(data)),
        )
        data.tofile(path)


class CupyMemory(CudaMemory):
    """An array of cupy's pool, not at the start of its allocation."""

    def __init__(self, nbytes: int) -> None:
        import cupy

        self.array = cupy.zeros(nbytes + 1536, dtype=cupy.uint8)[1536:]
        cupy.cuda.Device().synchronize()
        self.address, self.nbytes = int(self.array.data.ptr), nbytes


class TorchMemory(CudaMemory):
    """A tensor of torch's caching allocator, behind another one."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self.torch = torch
        self.small = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
        self.tensor = torch.zeros(nbytes + 512, dtype=torch.uint8, device="cuda")[512:]
        torch.cuda.synchronize()
        self.address, self.nbytes = int(self.tensor.data_ptr()), nbytes
        self.event = torch.cuda.Event(interprocess=True)
        self.stream = torch.cuda.Stream()

    def hold(self, value: str) -> str:
        """Record an event behind work that takes a while and then fills the memory; returns the event's handle."""
        with self.torch.cuda.stream(self.stream):
            self.torch.cuda._sleep(600_000_000)  # a third of a second
            self.tensor.fill_(int(value))
            self.event.record(self.stream)
        return bytes(self.event.ipc_handle()).hex()

    def follow(self, handle: str) -> str:
        """Say whether an event has come."""
        cuda, event, raw = calls.Cuda(), ctypes.c_void_p(), calls.Handle.from_buffer_copy(bytes.fromhex(handle))
        cuda.call("cuIpcOpenEventHandle", ctypes.byref(event), raw)
        code = cuda.cuEventQuery(event)
        return "done" if code == 0 else cuda.name_of(code)


class VmmMemory(CudaMemory):
    """Memory made by the virtual memory calls, exported as a file descriptor."""

    def __init__(self, nbytes: int) -> None:
        cuda, context = calls.Cuda(), ctypes.c_void_p()
        cuda.call("cuInit", 0)
        cuda.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        cuda.call("cuCtxSetCurrent", context)
        place = calls.Location(calls.LOCATION_DEVICE, 0)
        properties = calls.Properties(calls.ALLOCATION_PINNED, calls.HANDLE_IS_FD, place)
        step, allocation, address, fd = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int()
        cuda.call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(properties), 0)
        room = ctypes.c_size_t(-(-nbytes // step.value) * step.value)
        none, zero = ctypes.c_uint64(0), ctypes.c_size_t(0)
        cuda.call("cuMemCreate", ctypes.byref(allocation), room, ctypes.byref(properties), none)
        cuda.call("cuMemAddressReserve", ctypes.byref(address), room, zero, none, none)
        cuda.call("cuMemMap", address, room, zero, allocation, none)
        access = calls.Access(place, calls.ACCESS_READ_WRITE)
        cuda.call("cuMemSetAccess", address, room, ctypes.byref(access), ctypes.c_size_t(1))
        cuda.call("cuMemExportToShareableHandle", ctypes.byref(fd), allocation, calls.HANDLE_IS_FD, none)
        self.address, self.nbytes, self.fd, self.room = address.value, nbytes, fd.value, room.value

    def facts(self) -> str:
        """Return what others need to open it."""
        return f"- {self.room} 0 {self.fd}"


# ---------------------------------------------------------------------------------------- what parts share


class Bench:
    """Where parts get workers and exporters from: those of a GPU, or of a simulated one."""

    def __init__(self, *, is_simulated: bool) -> None:
        self.is_simulated = is_simulated
        self.scale = 16 if is_simulated else 1  # of sizes: a simulated GPU is as slow as memory

    def worker(self, **how: Any) -> WorkerRig:
        """Start a worker."""
        rig = WorkerRig(driver="simulated" if self.is_simulated else "cuda", **how)
        if not isinstance(rig.ready, control.Ready):
            rig.close()
            raise RuntimeError(f"the worker did not start: {rig.ready}")
        return rig

    def exporters(self) -> tuple[str, ...]:
        """Return the kinds of processes that can export."""
        return ("memfd",) if self.is_simulated else ("cupy", "torch", "vmm")


def expect(told: Told, outcome: Outcome = Outcome.DONE) -> Told:
    """Return a completion, or raise if it is not as it should be."""
    if told.outcome is not outcome:
        raise RuntimeError(f"{told} where {outcome.name} was expected")
    return told


def odd_blocks(rng: np.random.Generator, room: int, count: int, sizes: np.ndarray) -> np.ndarray:
    """Return starts of blocks that do not overlap, at any alignment, in any order."""
    slot = room // count
    starts = np.arange(count, dtype=np.uint64) * np.uint64(slot)
    starts += rng.integers(0, slot - int(sizes.max()) + 1, count).astype(np.uint64)
    return rng.permutation(starts)


def columns(starts: np.ndarray, base: int, sizes: np.ndarray) -> np.ndarray:
    """Return rows of a table."""
    return np.stack((starts + np.uint64(base), sizes), axis=1)


# ---------------------------------------------------------------------------------------- bytes


def part_bytes(bench: Bench) -> None:
    """Compare every byte of 10,000 odd blocks on each way."""
    nbytes, count = 256 * MIB // bench.scale, 10_000
    rng = np.random.default_rng(int(time.time()))
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(bench.worker())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("worker:", rig.ready)
        sources = []
        for number, kind in enumerate(bench.exporters(), 1):
            try:
                exporter = stack.enter_context(Exporter(kind, nbytes))
                exporter.open_in(rig, number)
                say(f"opened {kind}: allocation {exporter.size} bytes, offset {exporter.offset}")
                sources.append((number, exporter))
            except (XferdError, OSError, RuntimeError) as exc:  # one kind may be missing
                say(f"FAILED to export by {kind}: {exc}")
        own = 9
        rig.ask(control.Allocate(own, nbytes)).check()
        host = stack.enter_context(Host(nbytes))
        host.map_in(rig, 1)
        want = rng.integers(0, 256, nbytes, dtype=np.uint8)
        for number, exporter in sources:
            check_exporter(rig, folder, host, want, (number, exporter), own, rng, count)


def check_exporter(
    rig: WorkerRig,
    folder: Path,
    host: Host,
    want: np.ndarray,
    source: tuple[int, Exporter],
    own: int,
    rng: np.random.Generator,
    count: int,
) -> None:
    """Send blocks: process to pool, pool to host, host to process; then the process's bytes are what it should have."""
    number, exporter = source
    nbytes = len(want)
    want.tofile(folder / "want")
    exporter.ask(f"load {folder / 'want'}")
    biggest = min(16 * KIB, nbytes // count // 2)
    sizes = rng.integers(1, biggest + 1, count).astype(np.uint64)
    first, second, third, fourth = (odd_blocks(rng, nbytes, count, sizes) for _ in range(4))
    base = at(number, exporter.offset)
    rig.ask(control.Wipe(own, 0, nbytes)).check()
    host.array[:] = 0
    begun = time.perf_counter()
    expect(rig.move(columns(first, base, sizes), columns(second, at(own), sizes), sides=ACROSS))
    expect(rig.move(columns(second, at(own), sizes), columns(third, host.address, sizes), sides=OUTWARDS))
    expect(rig.move(columns(third, host.address, sizes), columns(fourth, base, sizes), sides=INWARDS))
    took = time.perf_counter() - begun
    on_host, at_end = np.zeros(nbytes, dtype=np.uint8), want.copy()
    for a, c, size in zip(first.tolist(), third.tolist(), sizes.tolist(), strict=True):
        on_host[c : c + size] = want[a : a + size]
    for a, d, size in zip(first.tolist(), fourth.tolist(), sizes.tolist(), strict=True):
        at_end[d : d + size] = want[a : a + size]
    wrong_host = int((host.array != on_host).sum())
    exporter.ask(f"dump {folder / 'seen'}")
    wrong = int((np.fromfile(folder / "seen", dtype=np.uint8) != at_end).sum())
    verdict = "ok" if not wrong and not wrong_host else "FAILED"
    say(
        f"{verdict}: {exporter.kind}: {count} blocks of 1 to {biggest} bytes, three ways; {nbytes} compared twice,"
        f" {wrong_host} wrong on the host, {wrong} wrong in the process; {took * 1e3:.1f} ms"
    )


# ---------------------------------------------------------------------------------------- events


def part_events(bench: Bench) -> None:
    """Wait for work of another process by its event, and let it see ours."""
    kind = "memfd" if bench.is_simulated else "torch"
    nbytes = 16 * MIB
    with bench.worker() as rig, Exporter(kind, nbytes) as exporter, Host(nbytes) as host:
        exporter.open_in(rig, 1)
        rig.ask(control.Allocate(2, nbytes)).check()
        host.map_in(rig, 1)
        made = rig.ask(control.MakeEvent(8)).check().handle
        handle = exporter.ask("hold 77")
        rig.ask(control.OpenEvent(7, handle)).check()
        begun = time.perf_counter()
        rows = [[at(1, exporter.offset), nbytes]], [[host.address, nbytes]]
        rig.put(*rows, sides=OUTWARDS, wait=7, done=8)
        free = expect(rig.move([[at(2), 64]], [[at(2, 128), 64]], slot=1))
        before = time.perf_counter() - begun
        expect(rig.take())
        took = time.perf_counter() - begun
        good = bool((host.array == 77).all())
        say(f"{'ok' if good else 'FAILED'}: waited {took * 1e3:.1f} ms for the event; bytes are those after it: {good}")
        say(f"another move ended meanwhile after {before * 1e3:.2f} ms: {free}")
        say("the process sees our event:", exporter.ask(f"follow {made}"))


# ---------------------------------------------------------------------------------------- bad input, and ends


def part_bad(bench: Bench) -> None:
    """Say what becomes of bad input, and where memory goes when a worker is killed."""
    kind = next((kind for kind in bench.exporters() if can_export(kind)), "torch")
    nbytes = 64 * MIB
    with bench.worker() as rig:
        rig.ask(control.Allocate(2, nbytes)).check()
        with Exporter(kind, nbytes) as exporter:
            exporter.open_in(rig, 1)
            larger = control.Open(3, exporter.size + 1, exporter.handle)
            say("more than the allocation has:", short(rig.ask(larger, exporter.fd)))
            handle = exporter.handle
            expect(rig.move([[at(1), MIB]], [[at(2), MIB]]))
        say("its process is dead; the memory that was opened:", rig.move([[at(1), MIB]], [[at(2), MIB]]))
        say("opened anew:", short(rig.ask(control.Open(3, nbytes, handle))))
        for name, rubbish in (("rubbish", "ab" * 64), ("zeros", "00" * 64), ("short", "ab"), ("not hex", "zz" * 64)):
            say(f"{name}:", short(rig.ask(control.Open(4, nbytes, rubbish))))
            say(f"{name} as an event:", short(rig.ask(control.OpenEvent(4, rubbish))))
        say("past the end:", rig.move([[at(2, nbytes - 4), 8]], [[at(2), 8]]))
        say("unknown allocation:", rig.move([[at(99), 8]], [[at(2), 8]]))
        say("far too much:", short(rig.ask(control.Allocate(5, 1 << 42))))
        begun = time.perf_counter()
        say("closing:", short(rig.ask(control.Close(1))), f"{(time.perf_counter() - begun) * 1e3:.1f} ms")
        say("after all that:", expect(rig.move([[at(2), MIB]], [[at(2, 2 * MIB), MIB]])))
    if bench.is_simulated:
        return
    with bench.worker() as watch:
        say_free(watch, "free at first")
        victim = bench.worker()
        say_free(watch, "with another worker")
        victim.ask(control.Allocate(1, 4 * GIB)).check()
        say_free(watch, "with 4 GiB of its own")
        begun = time.perf_counter()
        victim.process.kill()
        victim.process.wait()
        say(f"killed and gone in {(time.perf_counter() - begun) * 1e3:.1f} ms")
        say_free(watch, "after that")
        victim.close()


def short(reply: Any) -> str:
    """Return what matters of a reply."""
    return f"{reply.code}: {reply.message}" if reply.code else f"accepted {reply}"


def say_free(rig: WorkerRig, when: str) -> None:
    """Print the free memory of the device."""
    say(f"{when}: {rig.ask(control.Ask()).check().free_nbytes / MIB:.0f} MiB")


# ---------------------------------------------------------------------------------------- times

CASES = (
    ("VRAM->VRAM", 4 * KIB, 1024),
    ("VRAM->VRAM", 16 * KIB, 1024),
    ("VRAM->VRAM", 64 * KIB, 1024),
    ("VRAM->VRAM", MIB, 128),
    ("VRAM->VRAM", 256 * MIB, 1),
    ("VRAM->VRAM", 4 * KIB, 1),
    ("DRAM->VRAM", 4 * KIB, 1024),
    ("DRAM->VRAM", 64 * KIB, 1024),
    ("DRAM->VRAM", 256 * MIB, 1),
    ("VRAM->DRAM", 4 * KIB, 1024),
    ("VRAM->DRAM", 64 * KIB, 1024),
    ("VRAM->DRAM", 256 * MIB, 1),
)


def case_starts(rng: np.random.Generator, size: int, count: int, room: int) -> np.ndarray:
    """Return scattered starts: every other block of a room, in random order."""
    stride = 2 * size if 2 * size * count <= room else size
    return rng.permutation(room // stride)[:count].astype(np.uint64) * np.uint64(stride)


def part_times(bench: Bench) -> None:
    """Print what commands take as the daemon sees them."""
    room, rounds = GIB // bench.scale, 5 if bench.is_simulated else 30
    rng = np.random.default_rng(1)
    with bench.worker() as rig, Host(room) as host:
        for number in (1, 2):
            rig.ask(control.Allocate(number, room)).check()
        host.map_in(rig, 1)
        host.array[:] = 1
        begun = time.perf_counter()
        expect(rig.move([[host.address, 8]], [[at(1), 8]], sides=INWARDS))
        took_ms = (time.perf_counter() - begun) * 1e3
        say(f"first use of {room // MIB} MiB of host memory, which locks it: {took_ms:.1f} ms")
        say(f"{'case':>28} | {'table along':>22} | {'table kept':>22} | {'device':>9} | engine")
        for table_id, (way, wanted, count) in enumerate(CASES, 1):
            size = wanted if wanted < MIB else wanted // bench.scale
            sides, bases = {
                "VRAM->VRAM": (ACROSS, (at(1), at(2))),
                "DRAM->VRAM": (INWARDS, (host.address, at(2))),
                "VRAM->DRAM": (OUTWARDS, (at(1), host.address)),
            }[way]
            sizes = np.full(count, size, dtype=np.uint64)
            source, target = (columns(case_starts(rng, size, count, room), base, sizes) for base in bases)
            along = timed(lambda: rig.put(source, target, sides=sides), rig, rounds)  # noqa: B023 - called at once
            expect(rig.move(source, target, sides=sides, table_id=table_id))
            kept = timed(lambda: rig.put_again(table_id), rig, rounds)  # noqa: B023
            total = size * count
            say(
                f"{way} {size // KIB:>8} KiB x {count:<5} | {along[0]:8.1f} us {total / along[0] / 1e3:7.1f} GB/s |"
                f" {kept[0]:8.1f} us {total / kept[0] / 1e3:7.1f} GB/s | {kept[1]:6.1f} us | {Engine(kept[2]).name}"
            )


def timed(put: Any, rig: WorkerRig, rounds: int) -> tuple[float, float, int]:
    """Return medians (host us, device us) of a command put and seen to end, and the engine."""
    took, device = [], []
    told = None
    for _ in range(rounds):
        begun = time.perf_counter_ns()
        put()
        told = rig.poll()
        took.append(time.perf_counter_ns() - begun)
        device.append(expect(told).device_ns)
    assert told is not None
    return float(np.median(took)) / 1e3, float(np.median(device)) / 1e3, told.engine


# ---------------------------------------------------------------------------------------- main


def run_parts(arguments: argparse.Namespace) -> int:
    """Run each part in a process of its own, within what is left of the time; returns how many went wrong."""
    deadline = time.monotonic() + arguments.seconds
    failed = []
    wanted = arguments.only or [part for part in PARTS if not arguments.simulated or part not in ("calls", "tuning")]
    for part in wanted:
        left = min(LIMITS_S[part], deadline - time.monotonic())
        say(f"\n===== {part} ({max(left, 0):.0f} s at most)")
        if left < 1:
            say("no time is left for it")
            failed.append(part)
            continue
        begun = time.monotonic()
        argv = [sys.executable, __file__, "--part", part, *(["--simulated"] if arguments.simulated else [])]
        try:
            status = subprocess.run(argv, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
            say("OUT OF TIME")
        if status:
            failed.append(part)
        say(f"===== {part}: status {status}, {time.monotonic() - begun:.1f} s")
    say("\nFAILED: " + ", ".join(failed) if failed else "\nall parts ended well")
    return len(failed)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true", help="on simulated devices")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--seconds", type=float, default=90.0, help="in all")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=2, metavar=("KIND", "NBYTES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.export[0], int(arguments.export[1]))
        return 0
    if not arguments.part:
        return run_parts(arguments)
    if arguments.part in ("calls", "tuning"):
        import gpu_kernel_tuning

        getattr(gpu_kernel_tuning, f"part_{arguments.part}")()
    else:
        globals()[f"part_{arguments.part}"](Bench(is_simulated=arguments.simulated))
    return 0


if __name__ == "__main__":
    sys.exit(main())
