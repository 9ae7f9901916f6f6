"""GPU memory of the daemon's own: one allocation on one device, handed out in extents.

A fresh extent reads as zeros, as in ``pool.py``: the allocation is wiped when it is made, and extents when they are
freed. A device that cannot be used, or has not the memory, does not keep the daemon from starting: the pool says why,
and tries again at the next allocation. A pool whose worker died has lost its bytes; it is made anew, under another
allocation number, at the next allocation, and what was handed out before never becomes memory again.

Used on the event loop. Not here: where extents go (``allocator.py``), whose they are (``regions.py``).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import Closed, PoolExhausted, XferdError
from xferd.api.types import MemoryKind, PoolInfo, RegionSource
from xferd.daemon.memory.allocator import ExtentAllocator
from xferd.daemon.memory.backing import Backing
from xferd.plugins.base import ALLOCATION_SHIFT, DeviceSpace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.plugins.devices import DeviceExport, DeviceMemory

ALIGN_NBYTES = 4096

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Slab:
    """One allocation of a pool's life, and its books. ``live`` extents keep its number from being given again."""

    allocation: int
    export: DeviceExport
    allocator: ExtentAllocator
    live: int = 0
    is_replaced: bool = False


class DevicePoolBacking(Backing):
    """An extent of a pool of GPU memory. ``DevicePool.free_group`` gives it back."""

    kind = MemoryKind.VRAM
    source = RegionSource.POOL
    outlives_client = True

    def __init__(self, pool: DevicePool, slab: Slab, offset: int) -> None:
        self.pool = pool
        self.slab = slab
        self.space = DeviceSpace(pool.device)
        self.device = pool.device
        self.position = slab.allocation << ALLOCATION_SHIFT | offset
        self.pool_name = pool.name
        self.pool_offset = offset

    def _close(self) -> None:
        pass  # wiping waits for a worker: the pool does it


class DevicePool:
    """A pool of GPU memory.

    Args:
        name: as configured.
        device: number of the GPU.
        nbytes: rounded up to whole units of ``ALIGN_NBYTES``.
        memory: allocates, wipes and lets go.
    """

    def __init__(self, name: str, device: int, nbytes: int, memory: DeviceMemory) -> None:
        self.name = name
        self.device = device
        self.nbytes = -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
        self._memory = memory
        self._slab: Slab | None = None
        self._reason = "not started"
        self._lock = asyncio.Lock()
        self._peak_nbytes = 0  # of slabs before this one, as is the next
        self._failed = 0
        self._is_closed = False

    @property
    def reason(self) -> str:
        """Why nothing can be allocated, or ""."""
        if self._slab is not None and self._memory.is_lost(self._slab.allocation):
            return "its worker ended, and its bytes with it; it is made anew at the next allocation"
        return self._reason

    async def start(self) -> None:
        """Take the memory; where that fails, say so and go on without it."""
        try:
            await self._ready()
        except XferdError as error:
            log.warning(
                "pool_degraded",
                pool=self.name,
                device=self.device,
                nbytes=self.nbytes,
                error=error.message,
                remedy=error.remedy,
            )

    async def allocate_group(self, sizes: Sequence[int]) -> list[DevicePoolBacking]:
        """Return an extent of zeros for each size, in order; all or none.

        Raises:
            PoolExhausted: no room for the group, or the device has not the pool's memory.
            Unavailable, DeviceLost, Unsupported, NotFound: the device cannot be used.
        """
        try:
            slab = await self._ready()
        except XferdError:
            self._failed += 1
            raise
        try:
            offsets = slab.allocator.allocate_group(sizes)
        except PoolExhausted as full:
            raise PoolExhausted(f"pool {self.name!r}: {full.message}", limit=full.limit, remedy=full.remedy) from full
        slab.live += len(offsets)
        return [DevicePoolBacking(self, slab, offset) for offset in offsets]

    async def free_group(self, backings: Sequence[DevicePoolBacking]) -> None:
        """Wipe extents and give them back. Does not raise; to be shielded by whoever may be cancelled.

        What cannot be wiped is not given out again.
        """
        by_slab: dict[Slab, list[int]] = {}
        for backing in backings:
            by_slab.setdefault(backing.slab, []).append(backing.pool_offset)
        for slab, offsets in by_slab.items():
            if not self._memory.is_lost(slab.allocation):
                await self._give_back(slab, sorted(offsets))
            slab.live -= len(offsets)
            if slab.is_replaced and not slab.live:
                await self._memory.close(slab.allocation)

    def info(self) -> PoolInfo:
        """Return statistics; cheap."""
        reason = self.reason
        now = None if self._slab is None or reason else self._slab.allocator.statistics()
        return PoolInfo(
            name=self.name,
            kind=MemoryKind.VRAM,
            nbytes=self.nbytes,
            used_nbytes=now.used_nbytes if now else 0,
            free_nbytes=now.free_nbytes if now else 0,
            largest_free_nbytes=now.largest_free_nbytes if now else 0,
            fragmentation=now.fragmentation if now else 0.0,
            allocations=now.allocations if now else 0,
            peak_used_nbytes=max(self._peak_nbytes, now.peak_used_nbytes if now else 0),
            failed_allocations=self._failed + (now.failed_allocations if now else 0),
            mappable=False,
            device=self.device,
            reason=reason,
        )

    async def aclose(self) -> None:
        """Give the memory back; all transfers have come to rest before. Twice is fine."""
        self._is_closed = True
        slab, self._slab = self._slab, None
        if slab is not None:
            await self._memory.close(slab.allocation)

    def check_invariants(self) -> None:
        """Raise AssertionError where the books are wrong."""
        if self._slab is not None:
            self._slab.allocator.check_invariants()
            assert not self._slab.is_replaced, "a slab that is in use was replaced"

    async def _ready(self) -> Slab:
        """Return the slab, after making one where there is none or it was lost."""
        async with self._lock:
            if self._is_closed:
                raise Closed(f"pool {self.name} was closed", remedy="the daemon is stopping")
            slab = self._slab
            if slab is not None and not self._memory.is_lost(slab.allocation):
                return slab
            try:
                made = await self._make()
            except XferdError as error:
                self._reason = f"{error.message} ({error.remedy})" if error.remedy else error.message
                raise type(error)(
                    f"pool {self.name!r}: {error.message}", limit=error.limit, remedy=error.remedy
                ) from error
            self._slab, self._reason = made, ""
            if slab is not None:
                log.warning("pool_made_anew", pool=self.name, device=self.device, lost_extents=slab.live)
                await self._retire(slab)
            return made

    async def _make(self) -> Slab:
        allocation, export = await self._memory.allocate(self.device, self.nbytes)
        try:
            await self._memory.wipe(allocation, 0, self.nbytes)
        except BaseException:
            await asyncio.shield(self._memory.close(allocation))
            raise
        return Slab(allocation, export, ExtentAllocator(self.nbytes, ALIGN_NBYTES))

    async def _retire(self, slab: Slab) -> None:
        """Let go of a lost slab once none of its extents is a region: its number must mean nothing else before."""
        before = slab.allocator.statistics()
        self._peak_nbytes = max(self._peak_nbytes, before.peak_used_nbytes)
        self._failed += before.failed_allocations
        slab.is_replaced = True
        if not slab.live:
            await self._memory.close(slab.allocation)

    async def _give_back(self, slab: Slab, offsets: list[int]) -> None:
        try:
            for offset, nbytes in slab.allocator.runs(offsets):
                await self._memory.wipe(slab.allocation, offset, nbytes)
        except XferdError as error:
            if not self._memory.is_lost(slab.allocation):
                log.warning("extents_not_wiped", pool=self.name, extents=len(offsets), error=error.message)
            return
        slab.allocator.free_group(offsets)
