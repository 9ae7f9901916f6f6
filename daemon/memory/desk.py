"""Where regions are handed out and taken back: allocation, registration, freeing, and bytes by streaming calls.

Bookkeeping is synchronous on the event loop; what may block (opening files, mapping, wiping freed memory) goes to a
thread. Who may do what is the region table's business; moving bytes is the backends'.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import (
    InvalidArgument,
    LimitExceeded,
    NoRoute,
    NotFound,
    ShortTransfer,
    Unsupported,
)
from xferd.api.types import RegionListing, RegionSource
from xferd.daemon.memory.backing import (
    ClientProcess,
    FileBacking,
    PoolBacking,
    close_backings,
    open_memfd,
    open_passed_fd,
    open_private,
)
from xferd.daemon.memory.regions import LocalActor
from xferd.daemon.sessions.caller import session_of
from xferd.daemon.storage.backing import StorageBacking
from xferd.daemon.storage.desk import KEEPER
from xferd.plugins.base import Chunk, Extent, MappedSpace
from xferd.plugins.vectored import iov_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from xferd.api.types import (
        Access,
        AllocateRequest,
        Caller,
        PeerCredentials,
        PoolInfo,
        RegionId,
        RegionInfo,
        RegisterFileRequest,
        RegisterPrivateRequest,
        SessionId,
    )
    from xferd.daemon.engine.planner import Planner
    from xferd.daemon.memory.backing import Backing
    from xferd.daemon.memory.devices import DeviceDesk
    from xferd.daemon.memory.files import FileRoots
    from xferd.daemon.memory.pool import HostPool
    from xferd.daemon.memory.regions import RegionTable
    from xferd.daemon.storage.desk import StorageDesk
    from xferd.plugins.base import Backend

STREAM_NBYTES = 1 << 20
"""Bytes of one message of a streaming read: well under any message limit, and a short copy."""


class MemoryDesk:
    """Gives sessions their regions and takes them back.

    Owns nothing but the processes it watches: pools, the table, roots and backends are the composition root's.
    """

    def __init__(
        self,
        node: str,
        epoch: int,
        regions: RegionTable,
        pools: Mapping[str, HostPool],
        roots: FileRoots,
        planner: Planner,
        backends: Mapping[str, Backend],
        storage: StorageDesk,
        devices: DeviceDesk,
        *,
        max_group: int,
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._regions = regions
        self._pools = pools
        self._roots = roots
        self._planner = planner
        self._backends = backends
        self._storage = storage
        self._devices = devices
        self.max_group = max_group
        self._processes: dict[SessionId, ClientProcess] = {}

    # ------------------------------------------------------------------------------------ sessions

    def open_session(self, session: SessionId, credentials: PeerCredentials | None) -> None:
        """Pin the session's process, where the kernel named one, so that its private memory can be registered."""
        if credentials is not None:
            self._processes[session] = ClientProcess.open(credentials)

    async def close_session(self, session: SessionId) -> None:
        """Take all regions of a session back; its transfers have come to rest, and no peer holds any more."""
        self._regions.retire(session)
        await self._regions.wait_idle(session)
        await self._close(self._regions.remove_retired(session))
        process = self._processes.pop(session, None)
        if process is not None:
            process.close()

    # ------------------------------------------------------------------------------------ give

    async def allocate(self, caller: Caller, request: AllocateRequest) -> RegionListing:
        """Allocate a group, all or none."""
        session = session_of(caller)
        if not request.nbytes or min(request.nbytes) <= 0:
            raise InvalidArgument(
                f"sizes {list(request.nbytes[:4])}", limit="one or more sizes, each at least 1", remedy="name sizes"
            )
        if len(request.nbytes) > self.max_group:
            raise LimitExceeded(
                f"a group of {len(request.nbytes)} regions",
                limit=f"{self.max_group} regions (limits.max_group)",
                remedy="allocate one large region and address parts of it",
            )
        if self._storage.has(request.pool):
            infos = await self._storage.allocate(session, caller.agent, request)
            return RegionListing(self._node, self._epoch, infos)
        pool = None if self._devices.has_pool(request.pool) else self._pool(request.pool)
        if request.persistent:
            name = request.pool if pool is None else pool.name
            raise Unsupported(
                f"persistent regions of pool {name!r}, whose memory ends with the daemon",
                limit="pools of [[storage_pools]]",
                remedy="name a storage pool",
            )
        if pool is None:
            infos = await self._devices.allocate(session, caller.agent, request)
            return RegionListing(self._node, self._epoch, infos)
        offsets = pool.allocate_group(request.nbytes)
        backings = [PoolBacking(pool, offset, pool.address + offset) for offset in offsets]
        try:
            infos = self._regions.add_group(
                session,
                caller.agent,
                list(zip(backings, request.nbytes, strict=True)),
                access=request.access,
                label=request.label,
            )
        except BaseException:
            close_backings(backings)
            raise
        return RegionListing(self._node, self._epoch, infos)

    async def register_private(self, caller: Caller, request: RegisterPrivateRequest) -> RegionInfo:
        """Register memory of the caller's process."""
        process = self._processes.get(session_of(caller))
        if process is None:
            raise Unsupported(
                f"session of agent {caller.agent} has no process that the kernel vouches for",
                limit="sessions opened over the session socket",
                remedy="open the session over the session socket, or allocate from a pool",
            )
        backing = open_private(process, request.address, request.nbytes)
        return self._add(caller, backing, request.nbytes, request.access, request.label, writable=request.writable)

    async def register_file(self, caller: Caller, request: RegisterFileRequest) -> RegionInfo:
        """Register a file under a configured root."""
        session_of(caller)
        opened = await asyncio.to_thread(self._roots.open_path, request)
        backing = FileBacking(opened.fd, opened.path, RegionSource.PATH, opened.nbytes)
        return self._add(caller, backing, opened.nbytes, request.access, request.label, writable=request.writable)

    async def register_memfd(self, caller: Caller, fd: int, nbytes: int, access: Access, label: str) -> RegionInfo:
        """Register a client's memfd. Owns ``fd`` from the call on, also when it fails."""
        try:
            session_of(caller)
            backing = open_memfd(fd, nbytes)
            try:
                if backing.writable:  # workers map it to write, too
                    backing.host = self._devices.add_host(backing.position, backing.nbytes, fd)
            except BaseException:
                backing.close()
                raise
        finally:
            os.close(fd)
        try:
            return self._add(caller, backing, backing.nbytes, access, label, writable=backing.writable)
        except BaseException:
            await asyncio.shield(self._devices.drop_host(backing.host))
            raise

    async def register_fd(
        self, caller: Caller, fd: int, nbytes: int, writable: bool, access: Access, label: str
    ) -> RegionInfo:
        """Register an open file. Owns ``fd`` from the call on, also when it fails."""
        try:
            session_of(caller)
            backing = open_passed_fd(fd, nbytes, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        return self._add(caller, backing, backing.nbytes, access, label, writable=writable)

    async def free(self, caller: Caller, regions: Sequence[RegionId]) -> None:
        """Free regions of the caller, all or none; an operator's are the persistent ones whose agent is away."""
        owner = KEEPER if caller.admin and caller.session is None else session_of(caller)
        await self._close(self._regions.remove(owner, regions))

    def pool_fd(self, pool: str) -> tuple[PoolInfo, int]:
        """Return a pool and its memfd, which stays the pool's."""
        if self._storage.has(pool):
            raise Unsupported(f"pool {pool!r} cannot be mapped", remedy="read and write by streaming calls")
        if self._devices.has_pool(pool):
            raise Unsupported(
                f"pool {pool!r} is GPU memory and has no file descriptor",
                limit="pools of host memory",
                remedy="open a region's memory by its export (ExportDevice)",
            )
        found = self._pool(pool)
        info = found.info()
        return info, found.fd

    # ------------------------------------------------------------------------------------ streaming

    async def read_region(self, caller: Caller, region: RegionId, offset: int, nbytes: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a span in order; the region is held while it is read."""
        descriptors = DescriptorList.from_columns([region], [offset], [nbytes])
        with _Holding(self._regions, caller, region, "streaming read", write=False):
            self._regions.resolve(descriptors)
            for start in range(0, nbytes, STREAM_NBYTES):
                buffer = bytearray(min(STREAM_NBYTES, nbytes - start))
                part = DescriptorList.from_columns([region], [offset + start], [len(buffer)])
                here = Extent(MappedSpace(), iov_of(buffer))
                await self._move(self._extent(part), here, len(buffer), caller)
                yield bytes(buffer)

    async def write_region(self, caller: Caller, region: RegionId, offset: int, data: bytes) -> int:
        """Write bytes into a region, which is held meanwhile."""
        descriptors = DescriptorList.from_columns([region], [offset], [len(data)])
        with _Holding(self._regions, caller, region, "streaming write", write=True):
            here = Extent(MappedSpace(), iov_of(data))
            await self._move(here, self._extent(descriptors), len(data), caller)
        return len(data)

    def _extent(self, descriptors: DescriptorList) -> Extent:
        found = self._regions.resolve(descriptors)
        return Extent(found.spaces[0], np.stack((found.position, found.nbytes), axis=1))

    async def _move(self, source: Extent, target: Extent, nbytes: int, caller: Caller) -> None:
        choice = self._planner.routes(source.space, target.space, nbytes, 2)
        direct = next((route for route in choice.routes if not route.is_staged), None)
        if direct is None:
            raise NoRoute(f"nothing moves {source.space} to {target.space}", remedy="; ".join(choice.lines()))
        chunk = Chunk(source, target, nbytes, f"stream of {caller.agent}", "stream", caller.agent)
        sealer = self._storage.sealer
        ticket = await sealer.begin([target])
        try:
            moved = await self._backends[direct.backends[0]].move(chunk)
            if moved != nbytes:
                raise ShortTransfer(f"{direct.name} moved {moved} of {nbytes} bytes", remedy="see the node's log")
        except BaseException:
            sealer.abandon(ticket)
            raise
        await sealer.seal(ticket)
        await sealer.verify([source], is_asked=False)

    # ------------------------------------------------------------------------------------ internals

    def _add(
        self, caller: Caller, backing: Backing, nbytes: int, access: Access, label: str, *, writable: bool
    ) -> RegionInfo:
        try:
            return self._regions.add(
                session_of(caller), caller.agent, backing, nbytes, access=access, label=label, writable=writable
            )
        except BaseException:
            backing.close()
            raise

    def _pool(self, name: str) -> HostPool:
        if not name and self._pools:
            return next(iter(self._pools.values()))
        try:
            return self._pools[name]
        except KeyError:
            raise NotFound(
                f"no pool {name!r}",
                limit=f"pools: {', '.join([*self._pools, *self._devices.pool_names()]) or 'none'}",
                remedy="name one of them, or configure it under [[pools]]",
            ) from None

    async def _close(self, backings: Sequence[Backing]) -> None:
        """Close in a thread: wiping hundreds of MiB takes tens of milliseconds. Not to be left half done."""
        stored = [backing for backing in backings if isinstance(backing, StorageBacking)]
        others = [backing for backing in backings if not isinstance(backing, StorageBacking)]
        try:
            if others:
                await asyncio.shield(self._close_here(others))
        finally:
            await self._storage.free(stored)

    async def _close_here(self, backings: Sequence[Backing]) -> None:
        await self._devices.let_go(backings)  # before it is unmapped here: workers may have it mapped, and locked
        await asyncio.to_thread(close_backings, backings)


class _Holding:
    """Holds one region for the length of a ``with``."""

    def __init__(self, regions: RegionTable, caller: Caller, region: RegionId, reason: str, *, write: bool) -> None:
        self._regions = regions
        self._holder = f"stream {id(self):x} of agent {caller.agent}"
        self._args = ([region], self._holder, reason, LocalActor(session_of(caller)))
        self._write = write

    def __enter__(self) -> None:
        self._regions.hold(*self._args, write=self._write)

    def __exit__(self, *_: object) -> None:
        self._regions.release(self._holder)
