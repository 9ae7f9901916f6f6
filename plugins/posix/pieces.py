"""Which request moves what: spans of a file and rows of memory cut into pieces, each one contiguous in the file.

Pure column work: no file is touched here, and no loop looks at a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import pair
from xferd.plugins.vectored import IOV_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Requests to one file.

    Attributes:
        offset: u64 (n,) where each begins in the file.
        nbytes: u64 (n,) how long it is there.
        parts: (m, 2) the memory of all of them, in order: an array of ``struct iovec``.
        borders: i64 (n + 1,) piece i has the parts from borders[i] to borders[i + 1].
    """

    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]
    parts: IovTable
    borders: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def total_nbytes(self) -> int:
        """Sum of all pieces."""
        return int(self.nbytes.sum())

    def take(self, wanted: NDArray[np.bool_]) -> Pieces:
        """Return the pieces that are wanted, in order."""
        if wanted.all():
            return self
        counts = np.diff(self.borders)
        chosen = counts[wanted]
        parts = np.ascontiguousarray(self.parts[np.repeat(wanted, counts)])
        return Pieces(self.offset[wanted], self.nbytes[wanted], parts, _borders(chosen))

    def span(self, first: int, last: int) -> Pieces:
        """Return the pieces from ``first`` up to ``last``, sharing their memory table."""
        borders = self.borders[first : last + 1]
        parts = self.parts[int(borders[0]) : int(borders[-1])]
        return Pieces(self.offset[first:last], self.nbytes[first:last], parts, borders - borders[0])

    def bounded(self) -> Pieces:
        """Return the same bytes in pieces of at most ``IOV_MAX`` parts, which is what one request takes."""
        counts = np.diff(self.borders)
        if not len(counts) or int(counts.max()) <= IOV_MAX:
            return self
        times = (counts + IOV_MAX - 1) // IOV_MAX
        row = np.repeat(np.arange(len(counts)), times)
        number = np.arange(len(row)) - np.repeat(np.cumsum(times) - times, times)
        first = self.borders[row] + number * IOV_MAX
        borders = np.append(first, self.borders[-1])
        before = np.concatenate((np.zeros(1, np.uint64), np.cumsum(self.parts[:, 1])))
        offset = self.offset[row] + before[first] - before[self.borders[row]]
        return Pieces(offset, np.diff(before[borders]), self.parts, borders)

    def aligned(self, offset_unit: int, memory_unit: int) -> NDArray[np.bool_]:
        """Return which pieces O_DIRECT takes as they are: file offset, and address and length of each part."""
        lengths = self.parts[:, 1] & np.uint64(offset_unit - 1)
        loose = lengths | (self.parts[:, 0] & np.uint64(memory_unit - 1))
        worst = np.bitwise_or.reduceat(loose, self.borders[:-1])
        found: NDArray[np.bool_] = (worst | (self.offset & np.uint64(offset_unit - 1))) == 0
        return found


def pieces_of(spans: IovTable, memory: IovTable) -> Pieces:
    """Cut memory at the borders of file spans of the same total: one piece for each span."""
    if np.array_equal(spans[:, 1], memory[:, 1]):
        parts = np.ascontiguousarray(memory)
        return Pieces(spans[:, 0], spans[:, 1], parts, np.arange(len(spans) + 1))
    cuts = pair(spans[:, 1], memory[:, 1])
    parts = np.empty((len(cuts.nbytes), 2), dtype=np.uint64)
    parts[:, 0] = memory[cuts.right, 0] + cuts.right_skip
    parts[:, 1] = cuts.nbytes
    return Pieces(spans[:, 0], spans[:, 1], parts, np.searchsorted(cuts.left, np.arange(len(spans) + 1)))


def shortened(spans: IovTable, limit_nbytes: int) -> IovTable:
    """Return spans none of which is longer than the limit; cuts lie at multiples of the limit in the file.

    So only the ends of a long span are off a unit that divides the limit. Short spans stay whole wherever they lie.
    """
    limit = np.uint64(limit_nbytes)
    if not (spans[:, 1] > limit).any():
        return spans
    start, stop = spans[:, 0], spans[:, 0] + spans[:, 1]
    cells = (stop - np.uint64(1)) // limit - start // limit + np.uint64(1)
    times = np.where(spans[:, 1] > limit, cells, np.uint64(1)).astype(np.int64)
    row = np.repeat(np.arange(len(spans)), times)
    number = np.arange(len(row)) - np.repeat(np.cumsum(times) - times, times)
    floor = (start[row] // limit + number.astype(np.uint64)) * limit
    begin = np.where(number == 0, start[row], floor)
    end = np.where(number == times[row] - 1, stop[row], floor + limit)
    return _table(begin, end)


def without_edges(spans: IovTable, unit: int) -> IovTable:
    """Return spans cut at their first and last multiple of ``unit``: what lies between is aligned."""
    size = np.uint64(unit)
    start, stop = spans[:, 0], spans[:, 0] + spans[:, 1]
    low = np.minimum((start + size - np.uint64(1)) // size * size, stop)
    high = np.maximum(stop // size * size, low)
    if np.array_equal(start, low) and np.array_equal(stop, high):
        return spans
    begin = np.stack((start, low, high), axis=1).ravel()
    end = np.stack((low, high, stop), axis=1).ravel()
    kept = end > begin
    return _table(begin[kept], end[kept])


def _table(begin: NDArray[np.uint64], end: NDArray[np.uint64]) -> IovTable:
    table = np.empty((len(begin), 2), dtype=np.uint64)
    table[:, 0], table[:, 1] = begin, end - begin
    return table


def _borders(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
