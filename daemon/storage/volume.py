"""One directory of a pool while the daemon runs: extents given out and taken back, each step on the disk before told.

Bookkeeping is synchronous on the event loop; what blocks goes to mover threads. Whether the bytes of an extent are
proven is ``sealing.py``'s business.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import XferdError
from xferd.daemon.storage import records as r
from xferd.daemon.storage.catalogue import Extent
from xferd.daemon.storage.committing import Committer
from xferd.daemon.storage.touching import ExtentIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import Access
    from xferd.daemon.storage.directory import StorageDirectory
    from xferd.plugins.movers import MoverPool

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of an allocation, beside sizes."""

    agent: str
    label: str
    access: Access
    is_persistent: bool


class Volume:
    """An open directory with its extents. Used from one event loop.

    Args:
        directory: open; the volume owns it.
        weight: its share of what is allocated, against the pool's other directories.
        movers: threads for what blocks.
        block_nbytes: of blocks of extents that are made from now on.
    """

    def __init__(self, directory: StorageDirectory, weight: float, movers: MoverPool, *, block_nbytes: int) -> None:
        self.directory = directory
        self.weight = weight
        self.movers = movers
        self.committer = Committer(directory, movers)
        self._block_nbytes = block_nbytes
        self.indexes = [ExtentIndex() for _ in directory.slabs]
        for extent in directory.catalogue.extents.values():
            self.indexes[extent.slab].add((extent,))
        self.sealed_nbytes = sum(e.sealed_nbytes() for e in self.extents.values())
        self.persistent = len(self.extents)
        self.extents_nbytes = sum(e.nbytes for e in self.extents.values())
        self.damaged_blocks = 0
        self._unwiped = 0

    @property
    def extents(self) -> dict[int, Extent]:
        """All extents by id."""
        return self.directory.catalogue.extents

    @property
    def load(self) -> float:
        """Share of its room that is taken, weighed: the next extents go to the volume where it is lowest."""
        return self.directory.used_nbytes / self.directory.nbytes / self.weight

    async def allocate(self, sizes: Sequence[int], wanted: Wanted) -> list[Extent]:
        """Return extents that read as zeros, all or none; persistent ones are on the disk when this returns.

        Raises:
            PoolExhausted: no room for the group, or for the journal.
            MoveFailed: the disk failed.
        """
        places = self.directory.place(sizes)
        made = self._record(places, sizes, wanted)
        extents = [Extent(place, made, is_persistent=wanted.is_persistent) for place in made.extents]
        cancelled = None
        try:
            if wanted.is_persistent:
                await self.movers.run(self.directory.sync_wipes, [slab for slab, _ in places])
                cancelled = await self._committed(made)
        except BaseException:
            self.directory.give_back(places)
            raise
        self._enter(extents)
        if cancelled is not None:  # it is written down, and nobody will know of it
            await self.free(extents)
            raise cancelled
        return extents

    async def free(self, extents: Sequence[Extent]) -> None:
        """Take extents back: written down, wiped, and only then there for others. No byte of them is moving.

        When a call is cancelled, what it has begun goes on to its end.

        Raises:
            PoolExhausted, MoveFailed: it cannot be written down; persistent extents are as they were.
        """
        self._leave(extents)
        ids = tuple(extent.id for extent in extents if extent.is_persistent)
        cancelled = None
        if ids:
            try:
                cancelled = await self._committed(r.Free(ids))
            except XferdError:
                self._enter(extents)
                raise
        self._unwiped += 1
        is_wiped = False
        while not is_wiped:
            try:
                await self.movers.run(self.directory.wipe, tuple(extents))
                is_wiped = True
            except asyncio.CancelledError as exc:
                cancelled = exc  # a call that had begun has ended, and wiping twice does no harm
            except XferdError as error:
                log.error("storage_wipe_failed", directory=str(self.directory.path), error=str(error))
                return  # the room is lost until the next start, which wipes it
        self._unwiped -= 1
        self.directory.give_back((extent.slab, extent.offset) for extent in extents)
        if cancelled is not None:
            raise cancelled

    async def own(self, extents: Sequence[Extent], agent: str, access: Access) -> None:
        """Give persistent extents to another agent; raises as ``Committer.commit``, and they are as they were then."""
        await self.committer.commit([r.Own(tuple(extent.id for extent in extents), agent, access)])
        for extent in extents:
            extent.agent, extent.access = agent, access

    async def aclose(self) -> None:
        """Write down that all ended in order, where it did, and close the files. Twice is fine."""
        await self.committer.aclose()
        scratch = [extent for extent in self.extents.values() if not extent.is_persistent]
        try:
            await self.movers.run(self._close, not self._unwiped and not scratch)
        except XferdError as error:
            log.warning("storage_close_failed", directory=str(self.directory.path), error=str(error))

    def _close(self, is_clean: bool) -> None:
        self.directory.close(is_clean=is_clean)

    def check_invariants(self) -> None:
        """Raise AssertionError or IntegrityError where the books do not agree."""
        self.directory.check_invariants()
        extents = self.extents.values()
        assert sum(len(index) for index in self.indexes) == len(self.extents), "index and catalogue do not agree"
        assert self.sealed_nbytes == sum(e.sealed_nbytes() for e in extents), "sealed bytes do not add up"
        assert self.persistent == sum(e.is_persistent for e in extents), "persistent extents do not add up"
        assert self.extents_nbytes == sum(e.nbytes for e in extents), "bytes do not add up"
        assert all((e.writers >= 0).all() for e in extents), "a negative count of writers"

    def _record(self, places: Sequence[tuple[int, int]], sizes: Sequence[int], wanted: Wanted) -> r.Allocate:
        catalogue = self.directory.catalogue
        first = catalogue.next_id
        catalogue.next_id += len(sizes)
        placed = tuple(
            r.Placed(first + i, slab, offset, nbytes)
            for i, ((slab, offset), nbytes) in enumerate(zip(places, sizes, strict=True))
        )
        return r.Allocate(placed, wanted.agent, wanted.label, wanted.access, self._block_nbytes, time.time())

    async def _committed(self, record: r.Record) -> asyncio.CancelledError | None:
        """Write a record down and return, with the cancellation where there was one: the record is there then too."""
        try:
            await self.committer.commit([record])
        except asyncio.CancelledError as exc:
            return exc
        return None

    def _enter(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            self.extents[extent.id] = extent
            self.indexes[extent.slab].add((extent,))
            self._count(extent, 1)

    def _leave(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            del self.extents[extent.id]
            self.indexes[extent.slab].remove((extent,))
            self._count(extent, -1)

    def _count(self, extent: Extent, sign: int) -> None:
        self.sealed_nbytes += sign * extent.sealed_nbytes()
        self.extents_nbytes += sign * extent.nbytes
        self.persistent += sign * extent.is_persistent
        self.damaged_blocks += sign * len(extent.damaged)
