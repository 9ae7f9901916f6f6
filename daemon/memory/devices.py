"""GPU memory of clients as regions, and what else sessions have of GPUs: exports and events.

Memory is opened by its owner's device worker, which a ``DeviceMemory`` runs (the ``cuda`` backend); the daemon itself
has no CUDA context, and sees numbers of allocations only. Pools of the daemon's own are in ``device_pool.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import (
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    Unsupported,
)
from xferd.api.timeouts import timeout
from xferd.api.types import Access, DeviceEvent, DeviceHandle, MemoryKind, RegionSource
from xferd.daemon.memory.backing import Backing, MemfdBacking, PoolBacking
from xferd.daemon.memory.device_pool import DevicePoolBacking
from xferd.daemon.sessions.caller import session_of
from xferd.plugins.base import ALLOCATION_SHIFT, DeviceSpace
from xferd.plugins.devices import DeviceExport, DeviceMemory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from xferd.api.types import (
        AllocateRequest,
        Caller,
        DeviceInfo,
        PoolInfo,
        RegionId,
        RegionInfo,
        RegisterDeviceRequest,
        SessionId,
    )
    from xferd.daemon.memory.device_pool import DevicePool
    from xferd.daemon.memory.regions import RegionTable

UUID_NBYTES = 16
HANDLE_NBYTES = 64
"""Of CUDA's IPC handles, of memory and of events alike."""

MAX_ALLOCATION_NBYTES = (1 << ALLOCATION_SHIFT) - 1
"""One byte less than the offset's bits can say, so that neighbours in two allocations never look like one span."""

MAX_EVENTS = 1024
"""Of one session: an event costs a handle of the driver in two processes."""


CUT_AFTER_S = 1.0
"""How long others may go on in the memory of a session that ends: half of what its memory may take to be free again."""

log = structlog.get_logger(__name__)


class DeviceBacking(Backing):
    """A span of a client's GPU memory, opened in its owner's worker. ``DeviceDesk.let_go`` gives it back."""

    kind = MemoryKind.VRAM
    source = RegionSource.DEVICE

    def __init__(self, device: int, allocation: int, offset: int, export: DeviceExport) -> None:
        self.space = DeviceSpace(device)
        self.device = device
        self.position = allocation << ALLOCATION_SHIFT | offset
        self.allocation = allocation
        self.offset = offset
        self.export = export

    def detach(self) -> bool:
        """Hand over what it owns, one count of the allocation; False where that was done before."""
        was_closed, self._closed = self._closed, True
        return not was_closed

    def _close(self) -> None:
        pass  # waits for workers: the desk does it


class DeviceDesk:
    """Registers GPU memory, and lets go of it with its session.

    Args:
        regions: the table that records go into.
        memory: of the GPUs; ``NoDevices`` where no backend has any.
        pools: the daemon's own GPU memory, by name; filled while the daemon starts.
    """

    def __init__(self, regions: RegionTable, memory: DeviceMemory, pools: Mapping[str, DevicePool]) -> None:
        self._regions = regions
        self._memory = memory
        self._pools = pools
        self._events: dict[SessionId, dict[int, int]] = {}

    # ------------------------------------------------------------------------------------ memory

    async def register(self, caller: Caller, request: RegisterDeviceRequest, fd: int = -1) -> RegionInfo:
        """Register a span of an allocation that the caller exported, by its handle or by ``fd``.

        The fd stays the caller's. Cancel-safe: a cancelled call leaves nothing open.
        """
        session = session_of(caller)
        nbytes = _checked_span(request)
        _check_export(request, fd)
        export = DeviceExport(request.device_uuid, request.allocation_nbytes, request.handle, fd)
        device, allocation = await self._memory.open(caller.agent, export)
        backing = DeviceBacking(
            device, allocation, request.offset, DeviceExport(export.device_uuid, export.nbytes, export.handle)
        )
        try:
            return self._regions.add(
                session,
                caller.agent,
                backing,
                nbytes,
                access=request.access,
                label=request.label,
                writable=request.writable,
            )
        except BaseException:
            await asyncio.shield(self.let_go((backing,)))
            raise

    async def register_fd(self, caller: Caller, fd: int, request: RegisterDeviceRequest) -> RegionInfo:
        """Register by a VMM allocation's file descriptor. Owns ``fd`` from the call on, also when it fails."""
        try:
            return await self.register(caller, request, fd)
        finally:
            os.close(fd)

    def export(self, caller: Caller, region: RegionId) -> DeviceHandle:
        """Say how another process opens the allocation of a region."""
        info = self._regions.info(region)
        backing = self._regions.backing(region)
        if info.agent != caller.agent and info.access is Access.NONE:
            raise PermissionDenied(
                f"region {region} of agent {info.agent} grants no access",
                limit="own regions, and those that grant access",
                remedy="its owner must register it with access READ or READ_WRITE",
            )
        if isinstance(backing, DevicePoolBacking):
            export, offset = backing.slab.export, backing.pool_offset
        elif isinstance(backing, DeviceBacking):
            export, offset = backing.export, backing.offset
        else:
            raise InvalidArgument(
                f"region {region} is {info.kind.value} memory", limit="VRAM", remedy="name a region of GPU memory"
            )
        if not export.handle:
            raise Unsupported(
                f"region {region} was registered by a file descriptor, which its owner keeps",
                limit="memory with an IPC handle",
                remedy="have its owner pass the file descriptor on, or move the bytes",
            )
        driver = next((facts.driver for facts in self._memory.facts() if facts.index == info.device), "")
        return DeviceHandle(export.device_uuid, export.handle, export.nbytes, offset, driver)

    # ------------------------------------------------------------------------------------ pools and host memory

    def has_pool(self, name: str) -> bool:
        """Whether a pool of GPU memory has the name."""
        return name in self._pools

    def pool_names(self) -> tuple[str, ...]:
        """Return the names of the pools of GPU memory."""
        return tuple(self._pools)

    def pool_infos(self) -> list[PoolInfo]:
        """Describe the pools of GPU memory."""
        return [pool.info() for pool in self._pools.values()]

    async def allocate(self, session: SessionId, agent: str, request: AllocateRequest) -> tuple[RegionInfo, ...]:
        """Allocate a group from a pool of GPU memory, all or none; the pool exists."""
        backings = await self._pools[request.pool].allocate_group(request.nbytes)
        try:
            return self._regions.add_group(
                session,
                agent,
                list(zip(backings, request.nbytes, strict=True)),
                access=request.access,
                label=request.label,
            )
        except BaseException:
            await asyncio.shield(self.let_go(backings))
            raise

    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        """Tell workers of host memory mapped here; returns its number for ``drop_host``. ``fd`` stays the caller's.

        Raises:
            Overloaded: no file descriptor is left: workers need one of their own for each.
        """
        try:
            return self._memory.add_host(address, nbytes, fd)
        except OSError as exc:
            raise Overloaded(
                f"no file descriptor to spare: {exc.strerror}",
                limit="RLIMIT_NOFILE",
                remedy="free regions, or raise LimitNOFILE=",
            ) from exc

    async def drop_host(self, number: int) -> None:
        """Let workers forget host memory. Does not raise."""
        await self._memory.drop_host(number)

    async def let_go(self, backings: Sequence[Backing]) -> None:
        """Take from workers what regions rested on, and give extents of pools back; no byte of it is moving.

        Host memory among it is unmapped by workers, and stays the caller's to close. To be shielded by whoever may be
        cancelled. Does not raise.
        """
        extents: dict[DevicePool, list[DevicePoolBacking]] = {}
        calls: list[Awaitable[None]] = []
        for backing in backings:
            if isinstance(backing, PoolBacking):  # nearly all, and often very many
                continue
            if isinstance(backing, DevicePoolBacking):
                extents.setdefault(backing.pool, []).append(backing)
            elif isinstance(backing, DeviceBacking):
                if backing.detach():
                    calls.append(self._memory.close(backing.allocation))
            elif isinstance(backing, MemfdBacking):
                calls.append(self._memory.drop_host(backing.host))
        calls.extend(pool.free_group(group) for pool, group in extents.items())
        if calls:
            await asyncio.gather(*calls)

    # ------------------------------------------------------------------------------------ GPUs and events

    def infos(self) -> list[DeviceInfo]:
        """List the GPUs."""
        return list(self._memory.facts())

    async def open_event(self, caller: Caller, device: int, handle: bytes) -> DeviceEvent:
        """Open a client's event, or make one."""
        session = session_of(caller)
        if handle and len(handle) != HANDLE_NBYTES:
            raise InvalidArgument(
                f"an event handle of {len(handle)} bytes",
                limit=f"{HANDLE_NBYTES} bytes",
                remedy="pass what cudaIpcGetEventHandle gave, or nothing to have an event made",
            )
        known = [facts.index for facts in self._memory.facts()]
        if device not in known:
            raise NotFound(
                f"no GPU {device}",
                limit=f"GPUs: {', '.join(map(str, known)) or 'none'}",
                remedy="see `xferctl devices`",
            )
        if len(self._events.get(session, ())) >= MAX_EVENTS:
            raise LimitExceeded(
                f"agent {caller.agent} has {MAX_EVENTS} events",
                limit=f"{MAX_EVENTS} events a session",
                remedy="use one event again and again: it stands for its last record",
            )
        if handle:
            number, made = await self._memory.open_event(caller.agent, device, handle), b""
        else:
            number, made = await self._memory.make_event(caller.agent, device)
        self._events.setdefault(session, {})[number] = device
        return DeviceEvent(number, made)

    def check_events(self, session: SessionId, events: Sequence[int], devices: frozenset[int]) -> None:
        """Check that events are a session's and of a GPU whose memory a transfer touches; 0 is none.

        Raises:
            InvalidArgument: they are not.
        """
        mine = self._events.get(session, {})
        for event in events:
            if not event:
                continue
            if event not in mine:
                raise InvalidArgument(
                    f"event {event} is not of this session", limit="its own", remedy="open it with OpenDeviceEvent"
                )
            if mine[event] not in devices:
                touched = ", ".join(map(str, sorted(devices))) or "no GPU of this node"
                raise InvalidArgument(
                    f"event {event} is of GPU {mine[event]}, and the transfer touches {touched}",
                    limit="events of a GPU whose memory the transfer reads or writes here",
                    remedy="leave the event out, or open one of that GPU",
                )

    # ------------------------------------------------------------------------------------ sessions

    async def end_owner(self, session: SessionId, agent: str) -> None:
        """Kill an agent's workers, so that the driver takes back what they had mapped, whatever hangs. Does not raise.

        Called when a session begins to end, and once more when it holds nothing: a registration that was under way may
        have started a worker meanwhile.
        """
        self._events.pop(session, None)
        await self._memory.end_owner(agent)

    async def end_memory(self, session: SessionId) -> None:
        """Let all workers go of a session's GPU memory as soon as nobody moves bytes of it. Does not raise.

        The driver takes a dead process's memory back only when no other process has it mapped, so this waits for
        nothing else that the session may have, and workers that go on for too long are killed. The session is retired.
        """
        mine = [info.id for info in self._regions.owned_by(session) if info.source is RegionSource.DEVICE]
        backings = [self._regions.backing(region) for region in mine]
        allocations = {backing.allocation for backing in backings if isinstance(backing, DeviceBacking)}
        if not allocations:
            return
        holders = await self._holders_after(session, CUT_AFTER_S)
        if holders:
            log.warning("device_memory_cut_off", session=session, holders=holders, after_s=CUT_AFTER_S)
            await asyncio.gather(*(self._memory.cut(allocation) for allocation in allocations))
            holders = await self._holders_after(session, CUT_AFTER_S)
        if not holders:  # else it goes with the session's other regions
            await self.let_go(backings)

    async def _holders_after(self, session: SessionId, timeout_s: float) -> list[str]:
        """Return who holds GPU memory of a session when nothing of it is held any more, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with timeout(timeout_s):
                await self._regions.wait_idle(session)
        return list(self._regions.holders_of(session, RegionSource.DEVICE))


class NoDevices(DeviceMemory):
    """Stands in where no backend has GPUs, so that nobody needs to ask whether one has."""

    def facts(self) -> tuple[DeviceInfo, ...]:
        """Return none."""
        return ()

    async def open(self, owner: str, export: DeviceExport) -> tuple[int, int]:
        """Refuse."""
        raise _no_devices()

    async def allocate(self, device: int, nbytes: int) -> tuple[int, DeviceExport]:
        """Refuse."""
        raise _no_devices()

    async def close(self, allocation: int) -> None:
        """Do nothing."""

    async def cut(self, allocation: int) -> None:
        """Do nothing."""

    async def wipe(self, allocation: int, offset: int, nbytes: int) -> None:
        """Do nothing."""

    async def end_owner(self, owner: str) -> None:
        """Do nothing."""

    async def open_event(self, owner: str, device: int, handle: bytes) -> int:
        """Refuse."""
        raise _no_devices()

    async def make_event(self, owner: str, device: int) -> tuple[int, bytes]:
        """Refuse."""
        raise _no_devices()

    def is_lost(self, allocation: int) -> bool:
        """Return that it is."""
        return True

    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        """Return a number that means nothing: nobody maps host memory."""
        return 0

    async def drop_host(self, number: int) -> None:
        """Do nothing."""


def _no_devices() -> Unsupported:
    return Unsupported("this node has no backend for GPUs", remedy="configure [backends.cuda]")


def _checked_span(request: RegisterDeviceRequest) -> int:
    """Return the region's size after checking that it lies in the allocation."""
    whole = request.allocation_nbytes
    if not 1 <= whole <= MAX_ALLOCATION_NBYTES:
        raise InvalidArgument(
            f"an allocation of {whole} bytes",
            limit=f"1 to {MAX_ALLOCATION_NBYTES} bytes",
            remedy="pass the size of the whole allocation, as cuMemGetAddressRange gives it",
        )
    nbytes = request.nbytes or whole - request.offset
    if nbytes <= 0 or request.offset + nbytes > whole:
        raise OutOfBounds(
            f"{max(nbytes, 0)} bytes at offset {request.offset} of an allocation of {whole}",
            limit=f"{whole} bytes",
            remedy="check offset and nbytes; they count from the allocation's first byte",
        )
    return nbytes


def _check_export(request: RegisterDeviceRequest, fd: int) -> None:
    if len(request.device_uuid) != UUID_NBYTES:
        raise InvalidArgument(
            f"a device UUID of {len(request.device_uuid)} bytes",
            limit=f"{UUID_NBYTES} bytes",
            remedy="pass the GPU's UUID as cuDeviceGetUuid gives it",
        )
    if fd < 0 and len(request.handle) != HANDLE_NBYTES:
        raise InvalidArgument(
            f"a memory handle of {len(request.handle)} bytes",
            limit=f"{HANDLE_NBYTES} bytes",
            remedy="pass what cudaIpcGetMemHandle gave; file descriptors go over the session socket",
        )
