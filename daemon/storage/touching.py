"""Which blocks of which extents a list of spans touches: columns in, block ranges out, and no loop over rows. Pure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from xferd.daemon.storage.catalogue import Extent
    from xferd.plugins.base import IovTable


class BlockSpan(NamedTuple):
    """Blocks ``first`` to ``stop - 1`` of an extent."""

    extent: Extent
    first: int
    stop: int


class ExtentIndex:
    """The extents of one slab by position. ``version`` is another one whenever they are."""

    def __init__(self) -> None:
        self.version = 0
        self._extents: dict[int, Extent] = {}
        self._columns: _Columns | None = None

    def __len__(self) -> int:
        return len(self._extents)

    def add(self, extents: Iterable[Extent]) -> None:
        """Take extents in."""
        self._extents.update((extent.offset, extent) for extent in extents)
        self._columns = None
        self.version += 1

    def remove(self, extents: Iterable[Extent]) -> None:
        """Take extents out."""
        for extent in extents:
            del self._extents[extent.offset]
        self._columns = None
        self.version += 1

    def touched(self, iov: IovTable) -> list[BlockSpan]:
        """Return the blocks that (position, nbytes) rows touch, merged and in order of position.

        A row may reach over several extents. Bytes of no extent are passed over.
        """
        if not self._extents or not len(iov):
            return []
        if self._columns is None:
            self._columns = _Columns([self._extents[offset] for offset in sorted(self._extents)])
        start, size = int(iov[0, 0]), int(iov[:, 1].sum())
        if is_one_run(iov):
            span = self._columns.within(start, start + size)
            if span is not None:
                return [span]
            iov = np.array([[start, size]], np.uint64)
        return self._columns.touched(iov)


def by_extent(spans: Iterable[BlockSpan]) -> Iterator[tuple[Extent, NDArray[np.int64]]]:
    """Yield each extent with the numbers of all of its blocks; spans of one extent follow each other.

    Scattered blocks are many spans, and each step of numpy has its price.
    """
    for extent, group in itertools.groupby(spans, key=lambda span: span.extent):
        numbers = [np.arange(first, stop, dtype=np.int64) for _, first, stop in group]
        yield extent, numbers[0] if len(numbers) == 1 else np.concatenate(numbers)


def spans_of(extent: Extent, numbers: NDArray[np.int64]) -> list[BlockSpan]:
    """Return the spans of blocks whose numbers follow each other, in the order given."""
    if not len(numbers):
        return []
    heads = np.flatnonzero(np.append(True, np.diff(numbers) != 1))
    tails = np.append(heads[1:], len(numbers)) - 1
    columns = zip(numbers[heads].tolist(), numbers[tails].tolist(), strict=True)
    return [BlockSpan(extent, first, last + 1) for first, last in columns]


def is_one_run(iov: IovTable) -> bool:
    """Return whether each row begins where the one before it ends, as where a region is read or written in order."""
    return len(iov) == 1 or bool((iov[1:, 0] == iov[:-1, 0] + iov[:-1, 1]).all())


class _Columns:
    """Extents as sorted columns. Blocks of all of them are numbered through, with a hole after each extent."""

    def __init__(self, extents: list[Extent]) -> None:
        self.extents = extents
        self.start = np.array([extent.offset for extent in extents], dtype=np.int64)
        self.end = np.array([extent.end for extent in extents], dtype=np.int64)
        self.block_nbytes = np.array([extent.block_nbytes for extent in extents], dtype=np.int64)
        blocks = np.array([extent.blocks + 1 for extent in extents], dtype=np.int64)
        self.base = np.cumsum(blocks) - blocks

    def within(self, start: int, end: int) -> BlockSpan | None:
        """Return the blocks of a span that lies in one extent: the usual case, at a tenth of the cost."""
        at = int(np.searchsorted(self.start, start, side="right")) - 1
        extent = self.extents[max(at, 0)]
        if not extent.offset <= start < end <= extent.end:
            return None
        size = extent.block_nbytes
        return BlockSpan(extent, (start - extent.offset) // size, (end - 1 - extent.offset) // size + 1)

    def touched(self, iov: IovTable) -> list[BlockSpan]:
        start = iov[:, 0].astype(np.int64)
        end = start + iov[:, 1].astype(np.int64)
        around = self.within(int(start.min()), int(end.max()))
        if around is not None:  # all in one extent: the usual case
            extent, size = around.extent, around.extent.block_nbytes
            start -= extent.offset
            end -= extent.offset + 1
            begin, stop = _merged(start // size, end // size + 1)
            return [BlockSpan(extent, *each) for each in zip(begin.tolist(), stop.tolist(), strict=True)]
        first = np.searchsorted(self.start, start, side="right") - 1
        first = np.maximum(first, 0)
        last = np.searchsorted(self.start, end - 1, side="right") - 1
        counts = np.maximum(last - first + 1, 0)
        row = np.repeat(np.arange(len(iov)), counts)
        at = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        low = np.maximum(start[row], self.start[at])
        high = np.minimum(end[row], self.end[at])
        inside = high > low
        at, low, high = at[inside], low[inside], high[inside]
        if not len(at):
            return []
        size, origin = self.block_nbytes[at], self.start[at]
        begin = self.base[at] + (low - origin) // size
        stop = self.base[at] + (high - 1 - origin) // size + 1
        return self._spans(*_merged(begin, stop))

    def _spans(self, begin: NDArray[np.int64], stop: NDArray[np.int64]) -> list[BlockSpan]:
        at = np.searchsorted(self.base, begin, side="right") - 1
        origin = self.base[at]
        columns = zip(at.tolist(), (begin - origin).tolist(), (stop - origin).tolist(), strict=True)
        return [BlockSpan(self.extents[i], first, end) for i, first, end in columns]


def _merged(begin: NDArray[np.int64], stop: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ranges in order, with those joined that touch."""
    order = np.argsort(begin, kind="stable")
    begin, stop = begin[order], np.maximum.accumulate(stop[order])
    is_new = np.empty(len(begin), dtype=np.bool_)
    is_new[0] = True
    np.greater(begin[1:], stop[:-1], out=is_new[1:])
    heads = np.flatnonzero(is_new)
    return begin[heads], stop[np.append(heads[1:], len(begin)) - 1]
