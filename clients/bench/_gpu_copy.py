"""Plain copies of a GPU: as many bytes as a case moves, in one piece, by the copy engine."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._probes import Probe, System
from xferd.clients.bench._vram import DeviceBuffer, has_driver

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_KINDS = {("DRAM", "VRAM"): 1, ("VRAM", "DRAM"): 2, ("VRAM", "VRAM"): 3}
"""cudaMemcpyKind."""


class GpuCopy(System):
    """One asynchronous copy and a wait for its stream, from this process; memory of the host is locked by the driver.

    Without a GPU the same with memory of the host, for what it is worth.
    """

    name: ClassVar[str] = "gpu-copy"

    def __init__(self, region_nbytes: int) -> None:
        self._region_nbytes = region_nbytes
        self._buffers: list[DeviceBuffer] = []
        self._host = [np.zeros(0, np.uint8)] * 2

    def refusal(self, case: Case) -> str:
        """Take what touches a GPU on one node, prepared as far as can be."""
        is_known = case.place is Place.LOCAL and (case.src, case.dst) in _KINDS and case.prepared == "transfer"
        if not is_known or case.op not in ("READ", "WRITE"):
            return "it copies within a GPU, and to and from it"
        return "cupy is not installed" if has_driver() and not find_spec("cupy") else ""

    def probe(self, case: Case) -> Probe:
        """Return the probe; memory is shared by all."""
        if not has_driver():
            if not len(self._host[0]):
                self._host = [np.ones(self._region_nbytes, np.uint8) for _ in range(2)]
            source, target = (array[: case.nbytes] for array in self._host)
            return CopyProbe(case, lambda: np.copyto(target, source))
        if not self._buffers:
            self._buffers = [DeviceBuffer(self._region_nbytes) for _ in range(2)]
        return CopyProbe(case, _device_copy(case, *self._buffers))

    def settings(self) -> dict[str, object]:
        """Say what it copies by."""
        return {"by": "copy engine" if has_driver() else "memcpy: there is no GPU"}

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._buffers.clear()


def _device_copy(case: Case, near: DeviceBuffer, far: DeviceBuffer) -> Callable[[], object]:
    """Return what copies the bytes of a case once."""
    cupy: Any = import_module("cupy")
    addresses = {"VRAM": (near.array.data.ptr, far.array.data.ptr), "DRAM": (near.copy.ctypes.data,) * 2}
    source, target = addresses[case.src][0], addresses[case.dst][1]
    kind, nbytes, stream = _KINDS[case.src, case.dst], case.nbytes, cupy.cuda.Stream(non_blocking=True)
    copy = cupy.cuda.runtime.memcpyAsync

    def request() -> None:
        copy(target, source, nbytes, kind, stream.ptr)
        stream.synchronize()

    return request


class CopyProbe(Probe):
    """Copies; there is no pattern to look at, because nothing is scattered."""

    system: ClassVar[str] = GpuCopy.name

    def __init__(self, case: Case, copy: Callable[[], object]) -> None:
        super().__init__(case)
        self._copy = copy

    def request(self) -> None:
        """Copy once."""
        self._copy()
