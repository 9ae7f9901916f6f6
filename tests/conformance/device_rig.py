"""Memory of a simulated GPU for ``check_backend``, exported by this process and opened by real workers when missed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from arenas import FileArena, MappedArena
from check_backend import Arena, Rig

from xferd.api.mapping import map_shared
from xferd.api.simulated import SimulatedHandle, device_uuid, export_fd
from xferd.plugins.base import ALLOCATION_SHIFT, DeviceSpace, MappedSpace, SpaceKind
from xferd.plugins.cuda.backend import CudaBackend
from xferd.plugins.cuda.options import CudaOptions
from xferd.plugins.devices import DeviceExport
from xferd.plugins.gds import GdsBackend, GdsOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import numpy as np
    from check_backend import Maker, Pair


class DeviceArena(Arena):
    """A memfd that counts as GPU memory: what a simulated client has allocated."""

    space = DeviceSpace(0)

    def __init__(self, backend: CudaBackend, nbytes: int, *, is_gone: bool = False) -> None:
        self.nbytes = nbytes
        self._fd = os.memfd_create("vram", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, nbytes)
        self._bytes = map_shared(self._fd, nbytes)
        handle = _handle_of_the_dead(nbytes) if is_gone else export_fd(self._fd, nbytes)
        number = backend.manager.enter(0, "agent", DeviceExport(device_uuid(0), nbytes, handle)).number
        self.base = number << ALLOCATION_SHIFT

    def fill(self, data: np.ndarray) -> None:
        self._bytes[:] = data

    def read(self) -> np.ndarray:
        return self._bytes.copy()

    def close(self) -> None:
        """Close the fd: a worker that has opened the memory has it still, as with a GPU."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SharedArena(Arena):
    """Host memory that workers can map, as pools are."""

    space = MappedSpace()

    def __init__(self, backend: CudaBackend, nbytes: int) -> None:
        self.nbytes = nbytes
        fd = os.memfd_create("host", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self._bytes = map_shared(fd, nbytes)
        self.base = self._bytes.ctypes.data
        backend.add_host(self.base, nbytes, fd)
        os.close(fd)

    def fill(self, data: np.ndarray) -> None:
        self._bytes[:] = data

    def read(self) -> np.ndarray:
        return self._bytes.copy()

    def close(self) -> None:
        pass  # mapped until the test ends: another mapping at the same address would be another memory


class DeviceRig(Rig):
    """Simulated devices, and host memory that workers can map, or cannot; or files, for ``gds``."""

    def __init__(self, backend: CudaBackend | GdsBackend, *, shares_host: bool) -> None:
        self.backend = backend
        self._cuda = backend.cuda if isinstance(backend, GdsBackend) else backend
        self._shares_host = shares_host
        self._kept: list[Arena] = []

    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        if kind is SpaceKind.DEVICE:
            return DeviceArena(self._cuda, nbytes)
        if kind is SpaceKind.FILE:
            return FileArena(nbytes)
        made = SharedArena(self._cuda, nbytes) if self._shares_host else MappedArena(nbytes)
        self._kept.append(made)
        return made

    def broken(self, pair: Pair) -> tuple[Arena, Arena] | None:
        made = [self.arena(kind, 4096) for kind in pair]
        place = pair.index(SpaceKind.DEVICE)
        made[place] = DeviceArena(self._cuda, 4096, is_gone=True)
        return made[0], made[1]


def device_maker(*, shares_host: bool = True) -> Maker:
    """Return a maker for ``check_backend``."""

    @asynccontextmanager
    async def maker() -> AsyncIterator[DeviceRig]:
        yield DeviceRig(CudaBackend(CudaOptions(driver="simulated", spin=0.0)), shares_host=shares_host)

    return maker


def gds_maker() -> Maker:
    """Return a maker for ``gds`` over simulated devices."""

    @asynccontextmanager
    async def maker() -> AsyncIterator[DeviceRig]:
        cuda = CudaBackend(CudaOptions(driver="simulated", spin=0.0))
        yield DeviceRig(GdsBackend(GdsOptions(), cuda, owns_inner=True), shares_host=True)

    return maker


def _handle_of_the_dead(nbytes: int) -> bytes:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return SimulatedHandle(child.pid, 3, nbytes, 1).to_bytes()
