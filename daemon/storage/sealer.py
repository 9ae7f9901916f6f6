"""The engine's ``Sealer`` over all storage pools: finds the pool of a span by its slab, and hands it on."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from xferd.api.errors import XferdError
from xferd.daemon.storage.footprints import Footprints
from xferd.daemon.storage.passing import Awaited, is_summable, passed
from xferd.daemon.storage.reading import Arriving, ArrivingChunk
from xferd.plugins.base import FileSpace, MappedSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from xferd.daemon.engine.sealing import AwaitedSums, ReadTicket, WriteTicket
    from xferd.daemon.storage.catalogue import Extent as StoredExtent
    from xferd.daemon.storage.pool import StoragePool
    from xferd.daemon.storage.sealing import Sealing, Writing
    from xferd.daemon.storage.touching import BlockSpan, ExtentIndex
    from xferd.plugins.base import BlockSums, Extent


_T = TypeVar("_T")


class _SlabPlace(NamedTuple):
    pool: StoragePool
    sealing: Sealing
    extents: ExtentIndex


@dataclass(frozen=True, slots=True)
class StorageTicket:
    """Blocks that are being written, by volume."""

    writing: tuple[tuple[Sealing, Writing], ...]


@dataclass(frozen=True, slots=True)
class LeavingChunk:
    """Blocks of a chunk that is being written to a volume; ``sums`` of them, where the volume keeps any."""

    sealing: Sealing
    awaited: Awaited
    sums: BlockSums | None


@dataclass(frozen=True, slots=True)
class StorageReading:
    """Blocks that are being read, by volume, with how often each had been opened before; and what has arrived."""

    reading: tuple[tuple[Sealing, tuple[BlockSpan, ...]], ...]
    opens: dict[StoredExtent, NDArray[np.uint32]]
    is_asked: bool
    legs: dict[int, _ReadLeg] = field(default_factory=dict)


class _ReadLeg(NamedTuple):
    source: Extent  # by whose identity it is known
    sealing: Sealing
    blocks: Arriving


class StorageSealer:
    """Implements ``daemon.engine.sealing.Sealer``. ``add`` each pool once it is open."""

    def __init__(self) -> None:
        self._places: dict[int, _SlabPlace] = {}
        self._footprints = Footprints()

    def add(self, pool: StoragePool) -> None:
        """Take a pool in; its slabs stay open for as long as the daemon runs."""
        for volume, sealing in zip(pool.volumes, pool.sealings, strict=True):
            for slab, index in zip(volume.directory.slabs, volume.indexes, strict=True):
                self._places[slab.fd] = _SlabPlace(pool, sealing, index)

    def concerns(self, extents: Sequence[Extent]) -> bool:
        """Whether any extent lies in a storage pool."""
        return any(isinstance(extent.space, FileSpace) and extent.space.fd in self._places for extent in extents)

    async def begin(self, extents: Sequence[Extent]) -> StorageTicket:
        """See ``Sealer.begin``."""
        writing = [
            (sealing, tuple(span for span in spans if span.extent.is_persistent or pool.has_checksums))
            for (pool, sealing), spans in self._touched(extents).items()
        ]
        begun: list[tuple[Sealing, Writing]] = []
        try:
            for sealing, spans in writing:
                begun.append((sealing, await sealing.begin(spans)))
        except BaseException:
            self.abandon(StorageTicket(tuple(begun)))
            raise
        return StorageTicket(tuple(begun))

    async def seal(self, ticket: WriteTicket) -> None:
        """See ``Sealer.seal``."""
        assert isinstance(ticket, StorageTicket)
        self.abandon(ticket)  # for all volumes at once, so that a cancelled call leaves no writer behind
        await _each([(sealing.prove, writing) for sealing, writing in ticket.writing if writing.spans])

    def abandon(self, ticket: WriteTicket) -> None:
        """See ``Sealer.abandon``."""
        assert isinstance(ticket, StorageTicket)
        for sealing, writing in ticket.writing:
            sealing.abandon(writing)

    def leaving(self, ticket: WriteTicket, source: Extent, target: Extent) -> LeavingChunk | None:
        """See ``Sealer.leaving``."""
        place = self._place(target)
        if place is None or not isinstance(source.space, MappedSpace):
            return None
        assert isinstance(ticket, StorageTicket)
        chunk = Awaited(passed(self._footprints.of(target, place.extents).spans, target.iov, source.iov))
        return LeavingChunk(place.sealing, chunk, chunk.sums if place.sealing.has_checksums else None)

    async def left(self, ticket: WriteTicket, chunk: AwaitedSums, source: Extent) -> None:
        """See ``Sealer.left``."""
        assert isinstance(ticket, StorageTicket)
        assert isinstance(chunk, LeavingChunk)
        if chunk.sums is not None:
            await chunk.sealing.complete(chunk.sums, source.iov)
        for sealing, writing in ticket.writing:
            if sealing is chunk.sealing:
                writing.note(chunk.awaited.chunk, chunk.awaited.by_extent())

    def reading(self, extents: Sequence[Extent], *, is_asked: bool) -> StorageReading | None:
        """See ``Sealer.reading``."""
        found = self._compared(extents, is_asked=is_asked)
        if not found:
            return None
        touched = {span.extent for _, spans in found for span in spans}
        return StorageReading(tuple(found), {each: each.opens.copy() for each in touched}, is_asked)

    def arriving(
        self, ticket: ReadTicket, leg: Extent, start: int, nbytes: int, target: Extent
    ) -> ArrivingChunk | None:
        """See ``Sealer.arriving``."""
        assert isinstance(ticket, StorageReading)
        if not isinstance(target.space, MappedSpace) or not is_summable(target.iov, nbytes):
            return None
        known = ticket.legs.get(id(leg)) or self._read_leg(ticket, leg)
        return None if known is None else known.blocks.chunk(start, start + nbytes)

    def _read_leg(self, ticket: StorageReading, leg: Extent) -> _ReadLeg | None:
        place = self._place(leg)
        if place is None or not any(sealing is place.sealing for sealing, _ in ticket.reading):
            return None
        made = ticket.legs[id(leg)] = _ReadLeg(leg, place.sealing, Arriving(self._footprints.of(leg, place.extents)))
        return made

    async def arrived(self, ticket: ReadTicket, chunk: AwaitedSums, source: Extent, target: Extent) -> None:
        """See ``Sealer.arrived``."""
        assert isinstance(chunk, ArrivingChunk)
        place = self._place(source)
        assert place is not None
        await place.sealing.complete(chunk.sums, target.iov)
        chunk.note()

    async def finish(self, ticket: ReadTicket) -> None:
        """See ``Sealer.finish``."""
        assert isinstance(ticket, StorageReading)
        done: dict[StoredExtent, NDArray[np.bool_]] = {}
        for leg in ticket.legs.values():
            for extent, numbers in await leg.sealing.compare_arrived(leg.blocks, ticket.opens):
                done.setdefault(extent, np.zeros(extent.blocks, np.bool_))[numbers] = True
        await self._verify(ticket.reading, ticket.is_asked, done)

    async def verify(self, extents: Sequence[Extent], *, is_asked: bool) -> None:
        """See ``Sealer.verify``."""
        await self._verify(self._compared(extents, is_asked=is_asked), is_asked, {})

    async def _verify(
        self,
        reading: Iterable[tuple[Sealing, tuple[BlockSpan, ...]]],
        is_asked: bool,
        done: Mapping[StoredExtent, NDArray[np.bool_]],
    ) -> None:
        await _each([(functools.partial(each.verify, is_asked=is_asked, done=done), spans) for each, spans in reading])

    def _compared(self, extents: Sequence[Extent], *, is_asked: bool) -> list[tuple[Sealing, tuple[BlockSpan, ...]]]:
        """Return the blocks that extents touch where reads of them are compared."""
        return [
            (sealing, tuple(spans))
            for (pool, sealing), spans in self._touched(extents).items()
            if spans and pool.has_checksums and (is_asked or pool.verifies)
        ]

    def _place(self, extent: Extent) -> _SlabPlace | None:
        return self._places.get(extent.space.fd) if isinstance(extent.space, FileSpace) else None

    def _touched(self, extents: Sequence[Extent]) -> dict[tuple[StoragePool, Sealing], list[BlockSpan]]:
        """Return the blocks that extents touch, each once, by volume."""
        by_slab: dict[int, list[Extent]] = {}
        for extent in extents:
            if isinstance(extent.space, FileSpace) and extent.space.fd in self._places:
                by_slab.setdefault(extent.space.fd, []).append(extent)
        touched: dict[tuple[StoragePool, Sealing], list[BlockSpan]] = {}
        for fd, each in by_slab.items():
            pool, sealing, index = self._places[fd]
            spans: Sequence[BlockSpan]
            if len(each) == 1:
                spans = self._footprints.of(each[0], index).spans
            else:
                spans = index.touched(np.concatenate([extent.iov for extent in each]))
            touched.setdefault((pool, sealing), []).extend(spans)
        return touched


async def _each(calls: Sequence[tuple[Callable[[_T], Coroutine[None, None, None]], _T]]) -> None:
    """Do it for all volumes at a time; where one fails the others come to their end, and its error is raised."""
    if len(calls) == 1:
        [(call, argument)] = calls
        await call(argument)
        return
    errors: list[XferdError] = []

    async def attempt(call: Callable[[_T], Coroutine[None, None, None]], argument: _T) -> None:
        try:
            await call(argument)
        except XferdError as error:
            errors.append(error)

    async with asyncio.TaskGroup() as group:
        for call, argument in calls:
            group.create_task(attempt(call, argument), name="storage proof")
    if errors:
        raise errors[0]
