"""Checksums of bytes as they pass: from the memory that a chunk was just moved from, or to, and not from the disk.

Saves reading back what was written, which with O_DIRECT would be the disk's own time. Only blocks that a chunk covers
whole, and whose bytes lie in mapped memory in pieces that are not too small, are summed here; the rest is read back
when the transfer ends.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def passed(spans: Iterable[BlockSpan], file: IovTable, memory: IovTable) -> Passed:
    """Say which of the blocks that a chunk's file rows touch (``spans``) can be summed from its memory rows."""
    runs = _runs(file)
    nbytes = int(memory[:, 1].sum())
    usable = runs is not None and len(memory) * MIN_PIECE_NBYTES <= max(nbytes, MIN_PIECE_NBYTES)
    whole, partial = [], []
    for extent, first, stop in spans:
        numbers = np.arange(first, stop, dtype=np.int64)
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


def sums_of_memory(blocks: Sequence[WholeBlocks], memory: IovTable) -> list[list[int]]:
    """Return the xxh3 of each block, from memory rows of this process that stay in place meanwhile. For threads."""
    address = memory[:, 0].astype(np.int64)
    end = np.cumsum(memory[:, 1].astype(np.int64))
    start = end - memory[:, 1].astype(np.int64)
    low = int(address.min())
    span = int((address + (end - start)).max()) - low
    # One view over all of it, of which only the rows are ever touched: making one for each would cost more.
    view = memoryview((ctypes.c_char * span).from_address(low)).cast("B")
    found = []
    for each in blocks:
        first = np.searchsorted(end, each.begin, side="right").tolist()
        last = np.searchsorted(end, each.end, side="left").tolist()
        sums = []
        for begin, stop, i, j in zip(each.begin.tolist(), each.end.tolist(), first, last, strict=True):
            if i == j:
                at = int(address[i]) - low + begin - int(start[i])
                sums.append(int(xxhash.xxh3_64_intdigest(view[at : at + stop - begin])))
                continue
            state = xxhash.xxh3_64()
            for row in range(i, j + 1):
                here, there = max(begin, int(start[row])), min(stop, int(end[row]))
                at = int(address[row]) - low + here - int(start[row])
                state.update(view[at : at + there - here])
            sums.append(int(state.intdigest()))
        found.append(sums)
    return found


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
