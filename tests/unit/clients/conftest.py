"""A daemon for tests of the clients: the in-memory engine behind the real gRPC face and the real session socket.

Its pool is a real memfd and private memory is real memory (of this process), so that what a client sees through its
arrays is what the engine moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import mmap
import os
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from fake_engine import FakeEngine

from xferd.api import types as t
from xferd.api.errors import NotFound, PoolExhausted, Unsupported
from xferd.api.grpc.server import GrpcFace
from xferd.daemon.sessions.socket import SessionSocketServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from xferd.api.ring import RingSizes

POOL_NBYTES = 1 << 20


class MappedEngine(FakeEngine):
    """The in-memory engine with a pool that can be mapped, and the verbs of the session socket."""

    def __init__(self, grpc_target: str) -> None:
        super().__init__(pool_nbytes=POOL_NBYTES)
        self.grpc_target = grpc_target
        self.fd = os.memfd_create("pool")
        os.truncate(self.fd, POOL_NBYTES)
        self.pool = memoryview(mmap.mmap(self.fd, POOL_NBYTES))
        self.used = 0
        self.is_mappable = True
        self.maps = 0
        self.passed_nbytes = 0

    def close(self) -> None:
        os.close(self.fd)

    async def open_session(self, *args: object, **kwargs: object) -> t.SessionGrant:
        grant = await super().open_session(*args, **kwargs)  # type: ignore[arg-type]
        return replace(grant, grpc_target=self.grpc_target)

    async def allocate(self, caller: t.Caller, request: t.AllocateRequest) -> t.RegionListing:
        listing = await super().allocate(caller, request)
        placed = []
        for info in listing.regions:
            if self.used + info.nbytes > POOL_NBYTES:
                raise PoolExhausted("the pool is full")
            region = self._regions[info.id]
            region.info = replace(info, pool="host", pool_offset=self.used)
            region.data = cast(bytearray, self.pool[self.used : self.used + info.nbytes])
            self.used += info.nbytes
            placed.append(region.info)
        return replace(listing, regions=tuple(placed))

    async def register_private(self, caller: t.Caller, request: t.RegisterPrivateRequest) -> t.RegionInfo:
        info = await super().register_private(caller, request)
        memory = (ctypes.c_ubyte * request.nbytes).from_address(request.address)
        self._regions[info.id].data = cast(bytearray, memoryview(memory).cast("B"))
        return info

    async def register_memfd(
        self, caller: t.Caller, fd: int, nbytes: int, access: t.Access, label: str
    ) -> t.RegionInfo:
        try:
            memory = memoryview(mmap.mmap(fd, nbytes))
        finally:
            os.close(fd)
        return self._add(caller, cast(bytearray, memory), t.RegionSource.MEMFD, access, label)

    async def register_fd(
        self, caller: t.Caller, fd: int, nbytes: int, writable: bool, access: t.Access, label: str
    ) -> t.RegionInfo:
        try:
            data = bytearray(os.pread(fd, nbytes or os.fstat(fd).st_size, 0))
        finally:
            os.close(fd)
        kind = t.MemoryKind.FILE
        return self._add(caller, data, t.RegionSource.FD, access, label, kind=kind, writable=writable)

    async def register_device_fd(self, caller: t.Caller, fd: int, request: t.RegisterDeviceRequest) -> t.RegionInfo:
        self.passed_nbytes = os.fstat(fd).st_size
        os.close(fd)
        return await self.register_device(caller, request)

    def open_ring(self, caller: t.Caller, version: int, sizes: RingSizes) -> tuple[int, tuple[int, ...]]:
        raise Unsupported("this engine has no rings")

    def pool_fd(self, caller: t.Caller, pool: str) -> tuple[t.PoolInfo, int]:
        self.maps += 1
        if pool not in ("", "host"):
            raise NotFound(f"pool {pool!r}")
        if not self.is_mappable:
            raise Unsupported("the pool cannot be mapped")
        return self.pools()[0], self.fd


@dataclass
class Daemon:
    """Where the daemon is, and its engine, which lives on ``loop``."""

    engine: MappedEngine
    path: Path
    target: str
    loop: asyncio.AbstractEventLoop
    face: GrpcFace
    sockets: SessionSocketServer

    def run(self, work: Coroutine[object, object, object]) -> object:
        """Run something on the daemon's loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="xf") as folder:
        target = f"unix:{folder}/grpc.sock"
        engine = MappedEngine(target)
        path = Path(folder) / "session.sock"
        try:
            async with (
                GrpcFace(engine, socket_path=f"{folder}/grpc.sock") as face,
                SessionSocketServer(path, engine) as sockets,
            ):
                yield Daemon(engine, path, target, asyncio.get_running_loop(), face, sockets)
        finally:
            engine.close()


def _open_memfds() -> set[str]:
    gc.collect()
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(path.readlink())
            if "memfd" in target:
                found.add(f"{path.name} {target}")
    return found


@pytest.fixture
def open_fds():
    """A function that names the memfds that this process has open; what else is open, gRPC opens as it likes."""
    return _open_memfds


@pytest.fixture
async def daemon():
    """A daemon on the test's own loop, which must be left with nothing held."""
    async with running() as daemon:
        yield daemon
        assert daemon.engine.nothing_held()


@pytest.fixture
def threaded():
    """A daemon on a loop in another thread, for blocking clients."""
    started: Future[Daemon] = Future()
    stop = asyncio.Event()

    async def main() -> None:
        try:
            async with running() as daemon:
                started.set_result(daemon)
                await stop.wait()
        except BaseException as exc:
            if not started.done():
                started.set_exception(exc)
            raise

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="daemon")
    thread.start()
    daemon = started.result(20)
    yield daemon
    assert daemon.engine.nothing_held()
    daemon.loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    assert not thread.is_alive()
