"""Where memory is in a device worker, and how a command's rows become pieces with addresses of this process.

All of it is numpy over whole columns. Positions of GPU memory are translated by one lookup in a dense table, daemon
addresses of host memory by one search over what is mapped; both tables hold what is added to a position, so that a
translation is an addition. Offsets in a file mean the same everywhere. Kept tables are ``kept.py``; moving is the
driver's.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import pair
from xferd.api.errors import OutOfBounds, SizeMismatch
from xferd.plugins.base import ALLOCATION_SHIFT
from xferd.plugins.cuda.layout import Side

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from xferd.api.descriptors import Column

U64 = np.dtype("<u8")
_SHIFT = np.uint64(ALLOCATION_SHIFT)
_WRAP = (1 << 64) - 1


class Missing(Exception):
    """A row lies in memory that is not mapped here: the daemon maps it and sends the command again."""


@dataclass(frozen=True, slots=True, eq=False)
class Translated:
    """Rows as addresses of this process; ``numbers`` are the allocations or segments that they lie in."""

    address: Column
    nbytes: Column
    numbers: NDArray[np.int64]


@dataclass(slots=True)
class _Segment:
    """Host memory as the daemon sees it and as it is mapped here."""

    number: int
    address: int
    nbytes: int
    own: int
    is_writable: bool = True
    is_locked: bool = False


class Places:
    """What is mapped in this process: allocations of GPU memory, and segments of host memory.

    ``lock`` is called with (own address, nbytes, whether writable) of a segment when a command first names it.
    """

    def __init__(self, lock: Callable[[int, int, bool], None]) -> None:
        self._lock = lock
        # By allocation; the last entry stands for all numbers past it, and is never mapped.
        self._shift = np.zeros(64, dtype=U64)
        self._end = np.zeros(64, dtype=U64)
        self._nbytes: dict[int, int] = {}
        self._segments: dict[int, _Segment] = {}
        self._sort()

    # -- GPU memory

    def add_allocation(self, number: int, address: int, nbytes: int) -> None:
        """Note where an allocation is."""
        if number >= len(self._shift) - 1:
            room = np.zeros(max(number + 2 - len(self._shift), len(self._shift)), dtype=U64)
            self._shift, self._end = np.concatenate((self._shift, room)), np.concatenate((self._end, room))
        start = number << ALLOCATION_SHIFT
        self._shift[number] = (address - start) & _WRAP
        self._end[number] = start + nbytes
        self._nbytes[number] = nbytes

    def drop_allocation(self, number: int) -> None:
        """Forget an allocation."""
        if self._nbytes.pop(number, None) is not None:
            self._shift[number] = self._end[number] = 0

    def span(self, number: int, offset: int, nbytes: int) -> int:
        """Return the address of a span of an allocation.

        Raises:
            OutOfBounds: it is not in one that is mapped.
        """
        room = self._nbytes.get(number, 0)
        if offset < 0 or nbytes < 0 or offset + nbytes > room:
            raise OutOfBounds(
                f"bytes {offset} to {offset + nbytes} of allocation {number}",
                limit=f"{room} bytes",
                remedy="ask for what lies within it",
            )
        return (int(self._shift[number]) + (number << ALLOCATION_SHIFT) + offset) & _WRAP

    # -- host memory

    @property
    def locked_nbytes(self) -> int:
        """Host memory that is locked now."""
        return sum(segment.nbytes for segment in self._segments.values() if segment.is_locked)

    def add_segment(self, number: int, address: int, nbytes: int, own: int, *, is_writable: bool = True) -> None:
        """Note host memory that the daemon has at ``address`` and this process at ``own``."""
        self._segments[number] = _Segment(number, address, nbytes, own, is_writable)
        self._sort()

    def drop_segment(self, number: int) -> bool:
        """Forget host memory; returns whether it is locked."""
        segment = self._segments.pop(number, None)
        self._sort()
        return segment is not None and segment.is_locked

    def _sort(self) -> None:
        # An empty segment comes first, so that an address below all others finds one that it is not in.
        nothing = _Segment(-1, 0, 0, 0)
        self._sorted = [nothing, *sorted(self._segments.values(), key=lambda segment: segment.address)]
        self._starts = [segment.address for segment in self._sorted]
        self._host_start = np.array(self._starts, dtype=U64)
        self._host_end = np.array([segment.address + segment.nbytes for segment in self._sorted], dtype=U64)
        shifts = [(segment.own - segment.address) & _WRAP for segment in self._sorted]
        self._host_shift = np.array(shifts, dtype=U64)

    # -- translation

    def translate(self, side: int, rows: NDArray[np.uint64]) -> Translated:
        """Return rows (position, nbytes), of which there is at least one, as addresses of this process or file offsets.

        Raises:
            Missing: a row begins in nothing that is mapped.
            OutOfBounds: a row ends past the end of GPU memory that is mapped.
            XferdError: host memory cannot be locked.
        """
        if side == Side.FILE:
            return Translated(rows[:, 0], np.ascontiguousarray(rows[:, 1]), np.empty(0, dtype=np.int64))
        return self._host(rows) if side == Side.HOST else self._device(rows)

    def _device(self, rows: NDArray[np.uint64]) -> Translated:
        position, nbytes = rows[:, 0], np.ascontiguousarray(rows[:, 1])
        number = (position >> _SHIFT).view(np.int64)
        stop = position + nbytes
        # Past the table: clipped to its last entry, which ends at 0 like all that is not mapped.
        is_inside = stop <= self._end.take(number, mode="clip")
        if not is_inside.all():
            self._explain(number, stop, is_inside)
        return Translated(position + self._shift.take(number, mode="clip"), nbytes, number)

    def _explain(self, number: NDArray[np.int64], stop: Column, is_inside: NDArray[np.bool_]) -> None:
        ends = self._end.take(number, mode="clip")
        if not ends.all():
            raise Missing
        row = int(np.argmin(is_inside))
        allocation = int(number[row])
        raise OutOfBounds(
            f"a span ends at byte {int(stop[row]) - (allocation << ALLOCATION_SHIFT)} of allocation {allocation}",
            limit=f"{self._nbytes[allocation]} bytes",
            remedy="register the whole memory that transfers name",
        )

    def _host(self, rows: NDArray[np.uint64]) -> Translated:
        address, nbytes = rows[:, 0], np.ascontiguousarray(rows[:, 1])
        stop = address + nbytes
        low, high = int(address.min()), int(stop.max())
        first = bisect_right(self._starts, low) - 1
        segment = self._sorted[first]
        if high <= segment.address + segment.nbytes:  # all in one, as a pool's are
            self._want(segment)
            return Translated(address + self._host_shift[first], nbytes, np.array([segment.number]))
        index = self._host_start.searchsorted(address, side="right") - 1
        if not (stop <= self._host_end.take(index)).all():
            raise Missing
        used = [self._sorted[i] for i in np.unique(index).tolist()]
        for one in used:
            self._want(one)
        return Translated(
            address + self._host_shift.take(index), nbytes, np.array([one.number for one in used], dtype=np.int64)
        )

    def _want(self, segment: _Segment) -> None:
        if not segment.is_locked:
            self._lock(segment.own, segment.nbytes, segment.is_writable)
            segment.is_locked = True


def pieces_of(source: Translated, target: Translated) -> NDArray[np.uint64]:
    """Return (source address, target address, nbytes) rows: both lists cut at each other's borders, and merged.

    Raises:
        SizeMismatch: the lists differ in total.
    """
    origin, goal, nbytes = source.address, target.address, source.nbytes
    if len(nbytes) != len(target.nbytes) or not np.array_equal(nbytes, target.nbytes):
        here, there = int(source.nbytes.sum()), int(target.nbytes.sum())
        if here != there:
            raise SizeMismatch(
                f"the source has {here} bytes and the target {there}",
                limit="equal totals",
                remedy="this is an error of the daemon's: please report it",
            )
        pairing = pair(source.nbytes, target.nbytes)
        origin = origin[pairing.left] + pairing.left_skip
        goal = goal[pairing.right] + pairing.right_skip
        nbytes = pairing.nbytes
    table = np.empty((len(nbytes), 3), dtype=U64)
    table[:, 0], table[:, 1], table[:, 2] = origin, goal, nbytes
    return _merged(table)


def _merged(table: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Merge each piece into the one before where it continues it on both sides."""
    continues = table[1:, 0] == table[:-1, 0] + table[:-1, 2]
    if not continues.any():
        return table
    continues &= table[1:, 1] == table[:-1, 1] + table[:-1, 2]
    starts = np.concatenate(([0], np.flatnonzero(~continues) + 1))
    merged = table[starts]
    merged[:, 2] = np.add.reduceat(table[:, 2], starts)
    return merged
