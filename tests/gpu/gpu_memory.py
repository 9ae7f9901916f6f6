"""Memory of a GPU as engines have it, for tests: of cupy, of torch, or simulated; filled and looked at without xferd.

``XFERD_GPU_DRIVER=simulated`` runs all that can be run on a machine without a GPU, so that the tests themselves are
known to be right before they meet one.
"""

from __future__ import annotations

import abc
import ctypes
import os
import subprocess
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from xferd.clients.devices import SimulatedBuffer, SimulatedStream

DRIVER = os.environ.get("XFERD_GPU_DRIVER", "cuda")
MIB, GIB = 1 << 20, 1 << 30

SETTINGS = (
    f"backends.cuda.driver={DRIVER}",
    "backends.cuda.command_timeout=5s",
    'pools=[{name="host",nbytes="512MiB"},{name="gpu",kind="VRAM",device=0,nbytes="256MiB"}]',
)


def missing(library: str = "") -> str:
    """Return why tests cannot run here, "" if they can."""
    if DRIVER == "simulated":
        return ""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        return f"there is no GPU here: {exc}"
    if code := driver.cuInit(0):
        return f"the GPU cannot be used: cuInit says {code}"
    return "" if not library or find_spec(library) else f"{library} is not installed"


class Memory(abc.ABC):
    """A library that allocates memory of a GPU."""

    name: str

    @abc.abstractmethod
    def make(self, nbytes: int) -> Any:
        """Allocate bytes."""

    @abc.abstractmethod
    def put(self, array: Any, data: np.ndarray) -> None:
        """Write all bytes, and return when they are there."""

    @abc.abstractmethod
    def get(self, array: Any) -> np.ndarray:
        """Return all bytes."""

    @abc.abstractmethod
    def take(self, exported: Any) -> Any:
        """Take memory of xferd's by DLPack."""

    @abc.abstractmethod
    def fill_slowly(self, array: Any, value: int) -> tuple[Any, Any]:
        """Begin to fill an array, for longer than a transfer takes; returns (the stream, what ends the wait)."""

    @abc.abstractmethod
    def event(self) -> Any:
        """Return an event of the library's that other processes can open; None where it has none."""


class Simulated(Memory):
    name = "simulated"

    def make(self, nbytes: int) -> SimulatedBuffer:
        return SimulatedBuffer(nbytes)

    def put(self, array: Any, data: np.ndarray) -> None:
        np.asarray(getattr(array, "array", array))[:] = data

    def get(self, array: Any) -> np.ndarray:
        return np.array(getattr(array, "array", array))

    def take(self, exported: Any) -> Any:
        return np.from_dlpack(exported)

    def fill_slowly(self, array: Any, value: int) -> tuple[Any, Any]:
        stream = SimulatedStream()

        def end() -> None:
            array.array[:] = value
            stream.finish()

        return stream, end

    def event(self) -> None:
        return None


class Cupy(Memory):
    name = "cupy"

    def __init__(self) -> None:
        self.cupy: Any = import_module("cupy")
        self.spin = self.cupy.RawKernel(
            r"""extern "C" __global__ void spin(unsigned long long ns) {
                unsigned long long start, now;
                asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
                do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < ns);
            }""",
            "spin",
        )

    def make(self, nbytes: int) -> Any:
        return self.cupy.zeros(nbytes, np.uint8)

    def put(self, array: Any, data: np.ndarray) -> None:
        array.set(np.ascontiguousarray(data))
        self.cupy.cuda.Device().synchronize()

    def get(self, array: Any) -> np.ndarray:
        found: np.ndarray = array.get()
        return found

    def take(self, exported: Any) -> Any:
        return self.cupy.from_dlpack(exported)

    def fill_slowly(self, array: Any, value: int) -> tuple[Any, Any]:
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            array.fill(value - 1)  # its kernel is loaded now: to load one waits for those that run
            self.spin((1,), (1,), (np.uint64(0),))
            stream.synchronize()
            self.spin((1,), (1,), (np.uint64(300_000_000),))
            array.fill(value)
        return stream, stream.synchronize

    def event(self) -> Any:
        return self.cupy.cuda.Event(disable_timing=True, interprocess=True)


class Torch(Memory):
    name = "torch"

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")

    def make(self, nbytes: int) -> Any:
        return self.torch.zeros(nbytes, dtype=self.torch.uint8, device="cuda")

    def put(self, array: Any, data: np.ndarray) -> None:
        array.copy_(self.torch.from_numpy(np.array(data)))
        self.torch.cuda.synchronize()

    def get(self, array: Any) -> np.ndarray:
        found: np.ndarray = array.cpu().numpy()
        return found

    def take(self, exported: Any) -> Any:
        return self.torch.from_dlpack(exported)

    def fill_slowly(self, array: Any, value: int) -> tuple[Any, Any]:
        stream = self.torch.cuda.Stream()
        with self.torch.cuda.stream(stream):
            array.fill_(value - 1)  # its kernel is loaded now: to load one waits for those that run
            self.torch.cuda._sleep(1)
            stream.synchronize()
            self.torch.cuda._sleep(500_000_000)  # cycles: some 0.3 s
            array.fill_(value)
        return stream, stream.synchronize

    def event(self) -> Any:
        return self.torch.cuda.Event(interprocess=True)


LIBRARIES: dict[str, type[Memory]] = {"cupy": Cupy, "torch": Torch, "simulated": Simulated}


def libraries() -> list[str]:
    """Return the names of the libraries whose memory the tests go through."""
    return ["simulated"] if DRIVER == "simulated" else ["cupy", "torch"]


def free_nbytes() -> int:
    """Return the free memory of GPU 0 as ``nvidia-smi`` shows it, by the library that it uses where that can be had."""
    if find_spec("pynvml"):
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).free)
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * MIB
