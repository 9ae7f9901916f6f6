"""Checksums of bytes as they pass: from the memory that a chunk was just moved from, or to, and not from the disk.

Saves reading back what was written, which with O_DIRECT would be the disk's own time. Only blocks that a chunk covers
whole, and whose bytes lie in mapped memory in pieces that are not too small, are summed here; the rest is read back
when the transfer ends. What the backend has summed as it moved the bytes (``BlockSums``) is not summed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xferd.daemon.storage.touching import by_extent, is_one_run
from xferd.plugins.base import BlockSums

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.touching import BlockSpan
    from xferd.plugins.base import IovTable

MIN_PIECE_NBYTES = 16 << 10
"""Mean size of the pieces of memory below which the interpreter would cost more than reading back."""


class WholeBlocks(NamedTuple):
    """Blocks of one extent that a chunk covers whole: their numbers, and where their bytes begin and end in it."""

    extent: Extent
    numbers: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Passed:
    """What a chunk has moved: blocks that it covers whole, and those that it touches without."""

    whole: tuple[WholeBlocks, ...]
    partial: tuple[tuple[Extent, tuple[int, ...]], ...]


def is_summable(memory: IovTable, nbytes: int) -> bool:
    """Return whether rows of memory are large enough for summing what passes to be worth it."""
    return len(memory) * MIN_PIECE_NBYTES <= max(nbytes, MIN_PIECE_NBYTES)


def passed(spans: Iterable[BlockSpan], file: IovTable, memory: IovTable) -> Passed:
    """Say which of the blocks that a chunk's file rows touch (``spans``) can be summed from its memory rows."""
    return covered(spans, file, usable=is_summable(memory, int(memory[:, 1].sum())))


def covered(spans: Iterable[BlockSpan], file: IovTable, *, usable: bool = True) -> Passed:
    """Say which of the blocks that file rows touch (``spans``) they cover whole; none of them if not ``usable``."""
    if usable and is_one_run(file):
        return _covered_in_order(spans, int(file[0, 0]), int(file[:, 1].sum()))
    runs = _runs(file)
    whole, partial = [], []
    for extent, numbers in by_extent(spans):
        start = extent.offset + numbers * extent.block_nbytes
        end = np.minimum(start + extent.block_nbytes, extent.end)
        if not usable or runs is None:
            partial.append((extent, tuple(numbers.tolist())))
            continue
        run = np.searchsorted(runs.start, start, side="right") - 1
        inside = (run >= 0) & (end <= runs.end[run])
        begin = runs.at[run] + start - runs.start[run]
        if inside.any():
            whole.append(WholeBlocks(extent, numbers[inside], begin[inside], (begin + end - start)[inside]))
        if not inside.all():
            partial.append((extent, tuple(numbers[~inside].tolist())))
    return Passed(tuple(whole), tuple(partial))


def _covered_in_order(spans: Iterable[BlockSpan], start: int, nbytes: int) -> Passed:
    """Do it for one run of the file, without columns of runs: most chunks, and each has to be quick."""
    whole: list[WholeBlocks] = []
    partial: list[tuple[Extent, tuple[int, ...]]] = []
    stop = start + nbytes
    for extent, first, end in spans:
        size, origin = extent.block_nbytes, extent.offset
        low = min(max(first, -(-(start - origin) // size)), end)
        high = end if min(origin + end * size, extent.end) <= stop else end - 1
        if low < high:
            numbers = np.arange(low, high, dtype=np.int64)
            begin = numbers * size + (origin - start)
            finish = begin + size
            finish[-1] = min(int(finish[-1]), extent.end - start)
            whole.append(WholeBlocks(extent, numbers, begin, finish))
        cut = (*range(first, low), *range(max(low, high), end))
        if cut:
            partial.append((extent, cut))
    return Passed(tuple(whole), tuple(partial))


def in_order(
    whole: tuple[WholeBlocks, ...],
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of blocks of several extents, taken together, and where they begin and end in that order."""
    begin = np.concatenate([each.begin for each in whole] or [np.empty(0, np.int64)])
    end = np.concatenate([each.end for each in whole] or [np.empty(0, np.int64)])
    order = np.argsort(begin, kind="stable")
    return order, begin[order], end[order]


class Awaited:
    """Blocks of a chunk that was written whose sums are wanted; ``sums`` are in the order of their bytes."""

    __slots__ = ("_order", "chunk", "sums")

    def __init__(self, chunk: Passed) -> None:
        self.chunk = chunk
        self._order: NDArray[np.intp] | None = None
        if len(chunk.whole) == 1 and (chunk.whole[0].begin[1:] > chunk.whole[0].begin[:-1]).all():
            self.sums = BlockSums.of(chunk.whole[0].begin, chunk.whole[0].end)
            return
        self._order, begin, end = in_order(chunk.whole)
        self.sums = BlockSums.of(begin, end)

    def by_extent(self) -> list[NDArray[np.uint64]]:
        """Return the sums of each of the chunk's ``whole``."""
        if self._order is None:
            return [self.sums.values]
        values = np.empty_like(self.sums.values)
        values[self._order] = self.sums.values
        borders = np.cumsum([len(each.numbers) for each in self.chunk.whole])[:-1]
        return np.split(values, borders) if self.chunk.whole else []


class _Runs(NamedTuple):
    """Spans of the file in order of position, neighbours joined; ``at`` is where a run begins in the chunk."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    at: NDArray[np.int64]


def _runs(file: IovTable) -> _Runs | None:
    """Join rows that follow each other in the list and in the file; None where rows overlap."""
    start = file[:, 0].astype(np.int64)
    nbytes = file[:, 1].astype(np.int64)
    at = np.cumsum(nbytes) - nbytes
    heads = np.flatnonzero(np.append(True, start[1:] != start[:-1] + nbytes[:-1]))
    tails = np.append(heads[1:], len(start)) - 1
    begin, end, at = start[heads], start[tails] + nbytes[tails], at[heads]
    order = np.argsort(begin, kind="stable")
    begin, end, at = begin[order], end[order], at[order]
    if (begin[1:] < end[:-1]).any():
        return None
    return _Runs(begin, end, at)
