"""Blocks that a leg reads, and their sums as chunks bring them: what is the same each time it is posted is kept.

A prepared transfer is posted again and again, and to look up which blocks its rows touch and cover costs as much event
loop as moving a chunk does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from xferd.daemon.storage.passing import WholeBlocks, covered
from xferd.plugins.base import BlockSums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from xferd.daemon.storage.touching import BlockSpan, ExtentIndex
    from xferd.plugins.base import Extent, IovTable


class _Part(NamedTuple):
    """Blocks that lie in a chunk as a whole: which of the leg's, and where they begin and end in the chunk."""

    blocks: slice
    begin: NDArray[np.int64]
    stop: NDArray[np.int64]


class ReadLeg:
    """What a leg reads of one slab: the blocks that it touches, and those that it covers, in the order of their bytes.

    Attributes:
        spans: the blocks that it touches.
        whole: those that it covers, by extent.
        order: which of ``whole``'s, taken together, come one after the other in the leg's bytes.
    """

    def __init__(self, file: IovTable, spans: Sequence[BlockSpan]) -> None:
        self.spans = tuple(spans)
        self._file = file
        self._parts: dict[tuple[int, int], _Part | None] = {}
        self._begin: NDArray[np.int64] | None = None

    def lay_out(self) -> None:
        """Find out which blocks are covered; again is free. Not before it is wanted: a write never does."""
        if self._begin is not None:
            return
        self.whole = covered(self.spans, self._file).whole
        begin = np.concatenate([each.begin for each in self.whole] or [np.empty(0, np.int64)])
        end = np.concatenate([each.end for each in self.whole] or [np.empty(0, np.int64)])
        self.order = np.argsort(begin, kind="stable")
        self._begin, self._end = begin[self.order], end[self.order]

    def part(self, start: int, stop: int) -> _Part | None:
        """Return the blocks that lie in a span of the leg's bytes; None where there are none. Once it is laid out."""
        if (start, stop) not in self._parts:
            assert self._begin is not None
            first = int(self._begin.searchsorted(start))
            last = int(self._end.searchsorted(stop, side="right"))
            blocks = slice(first, last)
            found = _Part(blocks, self._begin[blocks] - start, self._end[blocks] - start)
            self._parts[start, stop] = found if first < last else None
        return self._parts[start, stop]


class ReadLegs:
    """The legs of plans that are still held, by what they read. Used on the event loop."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Extent, tuple[ExtentIndex, int, ReadLeg]] = WeakKeyDictionary()

    def of(self, source: Extent, index: ExtentIndex) -> ReadLeg:
        """Return what ``source`` reads of the slab that ``index`` is of, as its extents are now."""
        known = self._known.get(source)
        if known is not None and known[0] is index and known[1] == index.version:
            return known[2]
        leg = ReadLeg(source.iov, index.touched(source.iov))
        self._known[source] = index, index.version, leg
        return leg


class Arriving:
    """The sums of blocks that one post of a leg reads whole, as far as they have arrived."""

    def __init__(self, leg: ReadLeg) -> None:
        leg.lay_out()
        self._leg = leg
        self._values = np.zeros(len(leg.order), np.uint64)
        self._is_known = np.zeros(len(leg.order), np.bool_)
        self._has_arrived = np.zeros(len(leg.order), np.bool_)

    def chunk(self, start: int, stop: int) -> ArrivingChunk | None:
        """Return the blocks within a span of the leg's bytes; None where there are none.

        One that comes twice counts as it comes last.
        """
        part = self._leg.part(start, stop)
        if part is None:
            return None
        is_known = self._is_known[part.blocks]
        is_known[:] = False
        return ArrivingChunk(self, part.blocks, BlockSums(part.begin, part.stop, self._values[part.blocks], is_known))

    def note(self, blocks: slice) -> None:
        """Be told that a chunk has arrived."""
        self._has_arrived[blocks] = True

    def by_extent(self) -> Iterator[tuple[WholeBlocks, NDArray[np.uint64]]]:
        """Yield the blocks that have arrived, with their sums."""
        values, has_arrived = np.empty_like(self._values), np.empty_like(self._has_arrived)
        values[self._leg.order], has_arrived[self._leg.order] = self._values, self._has_arrived
        at = 0
        for extent, *columns in self._leg.whole:
            part = slice(at, at + len(columns[0]))
            at = part.stop
            came = has_arrived[part]
            yield WholeBlocks(extent, *(column[came] for column in columns)), values[part][came]


@dataclass(frozen=True, slots=True)
class ArrivingChunk:
    """A chunk's share of ``Arriving``: which of its blocks; ``sums`` may be filled in by a backend."""

    leg: Arriving
    blocks: slice
    sums: BlockSums

    def note(self) -> None:
        """Be told that the chunk has arrived, and that all sums are known."""
        self.leg.note(self.blocks)
