"""Scattered blocks of one size, copied by numpy: gathered by ``take`` and scattered by an indexed assignment.

Each is one loop of C over ``memmove`` with the interpreter lock released, and touches no page table, where
``process_vm_readv`` looks up and pins every page of the source. Where one side is contiguous, one of them does it all.
Where both are scattered, the bytes go through a tile that stays in the core's own cache.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.plugins.local import memory
from xferd.plugins.vectored import total_nbytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable

TILE_NBYTES = 512 << 10
"""Fits the second-level cache of one core beside what streams through it; measured flat from 128 KiB to 512 KiB."""

MIN_GATHERED = 32
MIN_SCATTERED = 128
"""Blocks below which the numpy calls around the copy, 30 us, cost more than they save: from scattered blocks into one
span, and into scattered blocks."""

MAX_NBYTES = 2 << 10
"""Size of blocks above which two passes cost more than the page lookups that they save; one pass always pays."""

_PUT_RELEASES = 500
"""Blocks above which ``put`` releases the interpreter lock (numpy holds it for fewer)."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """One side of a copy: a view of memory in rows of one block each, and the rows meant; None for all, in order."""

    rows: NDArray[np.uint8]
    index: NDArray[np.intp] | None


class BlockCopier:
    """Copies blocks; thread-safe. Keeps one tile for each thread that has used it."""

    def __init__(self) -> None:
        self._own = threading.local()

    def copy(self, source: IovTable, target: IovTable) -> int:
        """Copy if both sides are blocks of one size, and return the bytes copied; 0 where this is not the way.

        Blocks of a side lie at multiples of their size from each other, in any order; neighbours may be merged.
        """
        size = int(min(source[:, 1].min(), target[:, 1].min()))
        nbytes = total_nbytes(source)
        if size > MAX_NBYTES and len(source) > 1 and len(target) > 1:
            return 0
        if nbytes < size * (MIN_GATHERED if len(target) == 1 else MIN_SCATTERED):
            return 0
        left = blocks_of(source, size)
        right = blocks_of(target, size) if left is not None else None
        if left is None or right is None:
            return 0
        if right.index is None:
            _gather(left, right.rows)
        elif left.index is None:
            _scatter(left.rows, right.rows, right.index)
        else:
            self._through_tile(left.rows, left.index, right.rows, right.index)
        return nbytes

    def _through_tile(
        self, source: NDArray[np.uint8], left: NDArray[np.intp], target: NDArray[np.uint8], right: NDArray[np.intp]
    ) -> None:
        size = source.shape[1]
        step = max(1, TILE_NBYTES // size)
        tile = self._tile(step * size).reshape(step, size)
        for first in range(0, len(left), step):
            index = left[first : first + step]
            part = tile[: len(index)]
            source.take(index, 0, part, "clip")
            _scatter(part, target, right[first : first + step])

    def _tile(self, nbytes: int) -> NDArray[np.uint8]:
        tile: NDArray[np.uint8] | None = getattr(self._own, "tile", None)
        if tile is None or tile.nbytes < nbytes:
            self._own.tile = tile = np.empty(nbytes, dtype=np.uint8)
        return tile[:nbytes]


def blocks_of(iov: IovTable, size: int) -> Blocks | None:
    """Return a table as blocks of ``size`` bytes, or None where it is not made of such."""
    starts, sizes = iov[:, 0], iov[:, 1]
    base = int(starts.min())
    offsets = starts - np.uint64(base)
    index = offsets // np.uint64(size)
    if (index * np.uint64(size) != offsets).any():
        return None
    if (sizes != size).any():
        counts = sizes // np.uint64(size)
        if (counts * np.uint64(size) != sizes).any():
            return None
        if len(iov) == 1:
            return Blocks(memory.view(base, int(sizes[0])).reshape(-1, size), None)
        index = _expanded(index, counts.astype(np.intp))
    last = int(index.max())
    return Blocks(memory.view(base, (last + 1) * size).reshape(-1, size), index.view(np.intp))


def _expanded(index: NDArray[np.uint64], counts: NDArray[np.intp]) -> NDArray[np.uint64]:
    """Return the numbers of all blocks of rows that begin at ``index`` and have ``counts`` blocks."""
    ends = np.cumsum(counts)
    within = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
    return np.repeat(index, counts) + within.astype(np.uint64)


def _gather(source: Blocks, target: NDArray[np.uint8]) -> None:
    if source.index is None:
        np.copyto(target, source.rows)
    else:
        source.rows.take(source.index, 0, target, "clip")  # "raise", the default, would go through a copy of it all


def _scatter(source: NDArray[np.uint8], target: NDArray[np.uint8], index: NDArray[np.intp]) -> None:
    if len(index) > _PUT_RELEASES:
        block = np.dtype((np.void, source.shape[1]))
        target.reshape(-1).view(block).put(index, source.reshape(-1).view(block), "clip")
    else:
        target[index] = source
