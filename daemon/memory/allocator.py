"""Where in a pool the next extent goes: arithmetic over offsets, without any memory behind it.

Best fit, lowest offset first among equals. Free extents stand in bins by the bit length of their size, each bin a
sorted list of numbers ``size << 40 | offset`` (in units of ``align``): finding, taking and giving back cost a
bisection, and a short memmove in a list. Neighbours are merged as they are freed, so that two free extents never touch.

A group is placed in one piece where one is free: that costs one search however many members it has, and a paged
engine's blocks then lie side by side, which lets transfers coalesce. Otherwise the largest member goes first, and
members of equal size fill an extent together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument, PoolExhausted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_OFFSET_BITS = 40
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


@dataclass(frozen=True, slots=True)
class AllocatorStatistics:
    """State in bytes. ``fragmentation`` is 1 - largest free extent / free bytes, 0 when none is free."""

    nbytes: int
    used_nbytes: int
    free_nbytes: int
    largest_free_nbytes: int
    fragmentation: float
    allocations: int
    free_extents: int
    peak_used_nbytes: int
    failed_allocations: int


class ExtentAllocator:
    """Hands out extents of ``nbytes`` bytes. Not thread-safe.

    Args:
        nbytes: rounded down to ``align``.
        align: of every offset and size; sizes are rounded up to it.
    """

    def __init__(self, nbytes: int, align: int = 4096) -> None:
        if align < 1 or align & (align - 1) or nbytes < align or nbytes // align > _OFFSET_MASK:
            raise InvalidArgument(
                f"a pool of {nbytes} bytes in units of {align}",
                limit=f"1 to {_OFFSET_MASK} units of a power of two",
                remedy="give the pool at least one unit",
            )
        self.align = align
        self._units = nbytes // align
        self._bins: list[list[int]] = [[] for _ in range(_OFFSET_BITS + 1)]
        self._filled = 0  # bit i: bin i has an entry
        self._free_by_start: dict[int, int] = {}
        self._free_by_end: dict[int, int] = {}
        self._used: dict[int, int] = {}  # offset to size
        self._used_units = 0
        self._peak_units = 0
        self._failed = 0
        self._put(0, self._units)

    def allocate_group(self, sizes: Sequence[int]) -> list[int]:
        """Return an offset for each size, in order; all or none.

        Raises:
            InvalidArgument: no sizes, or one below 1.
            PoolExhausted: no room for the group; nothing changed but the count of failures.
        """
        if not sizes or min(sizes) < 1:
            raise InvalidArgument(
                f"a group of {len(sizes)} sizes" + (f", the smallest {min(sizes)}" if sizes else ""),
                limit="at least one size, each at least 1 byte",
                remedy="leave empty ones out",
            )
        units = [-(-size // self.align) for size in sizes]
        total = sum(units)
        if total > self._units - self._used_units:
            raise self._exhausted(units, total)
        whole = self._best_fit(total)
        offsets = self._split(whole, units, total) if whole else self._scatter(units, total)
        self._used.update(zip(offsets, units, strict=True))
        self._used_units += total
        self._peak_units = max(self._peak_units, self._used_units)
        return [offset * self.align for offset in offsets]

    def take_over(self, extents: Iterable[tuple[int, int]]) -> None:
        """Take given (offset, nbytes) extents, as an earlier allocator had placed them; only before any allocation.

        Raises:
            InvalidArgument: an offset off the grid, an extent outside, two that overlap, or something is allocated.
        """
        at, taken = 0, {}
        for offset, nbytes in sorted(extents):
            start, size = offset // self.align, -(-nbytes // self.align)
            if self._used or offset % self.align or size < 1 or start < at or start + size > self._units:
                raise InvalidArgument(
                    f"an extent of {nbytes} bytes at offset {offset} cannot be taken over",
                    limit=f"free bytes from {at * self.align} to {self._units * self.align}",
                    remedy="take extents over once, before anything is allocated",
                )
            taken[start] = size
            at = start + size
        self._take(0, self._units)
        at = 0
        for start, size in taken.items():
            if start > at:
                self._put(at, start - at)
            at = start + size
        if at < self._units:
            self._put(at, self._units - at)
        self._used = taken
        self._used_units = sum(taken.values())
        self._peak_units = max(self._peak_units, self._used_units)

    def gaps(self) -> list[tuple[int, int]]:
        """Return (offset, nbytes) of what is free, in order."""
        free = sorted(self._free_by_start.items())
        return [(start * self.align, size * self.align) for start, size in free]

    def free(self, offset: int) -> int:
        """Give an extent back and return its size in bytes.

        Raises:
            InvalidArgument: no extent starts there (freed twice, or never given).
        """
        self.check_allocated((offset,))
        start = offset // self.align
        size = self._used.pop(start)
        self._used_units -= size
        self._give(start, size)
        return size * self.align

    def free_group(self, offsets: Iterable[int]) -> None:
        """Give extents back, all or none; neighbours are merged before they are given.

        Raises:
            InvalidArgument: no extent starts at one of them, or one is named twice.
        """
        wanted = sorted(offsets)
        self.check_allocated(wanted)
        for start, size in self.runs(wanted):
            self._give(start // self.align, size // self.align)
        for offset in wanted:
            self._used_units -= self._used.pop(offset // self.align)

    def runs(self, offsets: Sequence[int]) -> list[tuple[int, int]]:
        """Return (offset, nbytes) of allocated extents, given in order, with neighbours joined."""
        joined: list[tuple[int, int]] = []
        end = -1
        for offset in offsets:
            nbytes = self._used[offset // self.align] * self.align
            if offset == end:
                start, before = joined[-1]
                joined[-1] = (start, before + nbytes)
            else:
                joined.append((offset, nbytes))
            end = offset + nbytes
        return joined

    def check_allocated(self, offsets: Sequence[int]) -> None:
        """Raise InvalidArgument unless an allocated extent starts at each offset, and none is named twice."""
        for offset in offsets:
            if offset % self.align or offset // self.align not in self._used:
                raise InvalidArgument(
                    f"no allocated extent starts at offset {offset}",
                    limit="an offset that was allocated and not freed yet",
                    remedy="free an extent once, by the offset that was returned for it",
                )
        if len(offsets) > 1 and len(set(offsets)) < len(offsets):
            raise InvalidArgument("an extent is freed twice in one group", limit="once", remedy="name each once")

    def size_of(self, offset: int) -> int:
        """Return the bytes of an allocated extent, rounded as it was."""
        self.check_allocated((offset,))
        return self._used[offset // self.align] * self.align

    def statistics(self) -> AllocatorStatistics:
        """Return the state now; constant time."""
        free = self._units - self._used_units
        largest = self._bins[self._filled.bit_length() - 1][-1] >> _OFFSET_BITS if self._filled else 0
        return AllocatorStatistics(
            nbytes=self._units * self.align,
            used_nbytes=self._used_units * self.align,
            free_nbytes=free * self.align,
            largest_free_nbytes=largest * self.align,
            fragmentation=1 - largest / free if free else 0.0,
            allocations=len(self._used),
            free_extents=len(self._free_by_start),
            peak_used_nbytes=self._peak_units * self.align,
            failed_allocations=self._failed,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError where extents overlap, leave gaps, touch while free, or bins are wrong."""
        free = self._free_by_start
        assert {start + size: start for start, size in free.items()} == self._free_by_end, "ends and starts differ"
        binned = [key for keys in self._bins for key in keys]
        assert sorted(binned) == sorted(size << _OFFSET_BITS | start for start, size in free.items()), "bins differ"
        for number, keys in enumerate(self._bins):
            assert keys == sorted(keys), "a bin is out of order"
            assert bool(keys) == bool(self._filled >> number & 1), "a bin's bit is wrong"
            assert all((key >> _OFFSET_BITS).bit_length() == number for key in keys), "an extent in the wrong bin"
        at, was_free = 0, False
        for start, size in sorted([*free.items(), *self._used.items()]):
            assert start == at, f"a gap or an overlap at unit {at}"
            assert size > 0, "an empty extent"
            assert not (was_free and start in free), "free neighbours were not merged"
            at, was_free = start + size, start in free
        assert at == self._units, "extents do not cover the pool"
        assert self._used_units == sum(self._used.values()), "used bytes do not add up"

    # ------------------------------------------------------------------------------------------ placing

    def _split(self, whole: tuple[int, int], units: Sequence[int], total: int) -> list[int]:
        start, size = whole
        self._take(start, size)
        if size > total:
            self._put(start + total, size - total)
        offsets = []
        for unit in units:
            offsets.append(start)
            start += unit
        return offsets

    def _scatter(self, units: Sequence[int], total: int) -> list[int]:
        """Place members one by one, largest first; on failure give back what was placed."""
        offsets = [0] * len(units)
        order = sorted(range(len(units)), key=units.__getitem__, reverse=True)
        done = 0
        while done < len(order):
            unit = units[order[done]]
            found = self._best_fit(unit)
            if found is None:
                for index in order[:done]:
                    self._give(offsets[index], units[index])
                raise self._exhausted(units, total)
            start, size = found
            self._take(start, size)
            end = start + size
            while done < len(order) and units[order[done]] == unit and start + unit <= end:
                offsets[order[done]] = start
                start += unit
                done += 1
            if start < end:
                self._put(start, end - start)
        return offsets

    def _exhausted(self, units: Sequence[int], total: int) -> PoolExhausted:
        self._failed += 1
        now = self.statistics()
        return PoolExhausted(
            f"no room for {len(units)} extents of {total * self.align} bytes together, the largest "
            f"{max(units) * self.align}: {now.free_nbytes} bytes are free, "
            f"at most {now.largest_free_nbytes} in one piece",
            limit=f"{now.nbytes} bytes",
            remedy="free regions, or raise the pool's nbytes",
        )

    # --------------------------------------------------------------------------------- free extents

    def _best_fit(self, size: int) -> tuple[int, int] | None:
        number = size.bit_length()
        keys = self._bins[number]
        index = bisect_left(keys, size << _OFFSET_BITS)
        if index < len(keys):
            key = keys[index]
        else:
            larger = self._filled >> number + 1
            if not larger:
                return None
            key = self._bins[number + (larger & -larger).bit_length()][0]
        return key & _OFFSET_MASK, key >> _OFFSET_BITS

    def _give(self, start: int, size: int) -> None:
        """Put an extent back, merged with its free neighbours."""
        before = self._free_by_end.get(start)
        if before is not None:
            length = start - before
            self._take(before, length)
            start, size = before, size + length
        after = self._free_by_start.get(start + size)
        if after is not None:
            self._take(start + size, after)
            size += after
        self._put(start, size)

    def _put(self, start: int, size: int) -> None:
        number = size.bit_length()
        insort(self._bins[number], size << _OFFSET_BITS | start)
        self._filled |= 1 << number
        self._free_by_start[start] = size
        self._free_by_end[start + size] = start

    def _take(self, start: int, size: int) -> None:
        number = size.bit_length()
        keys = self._bins[number]
        del keys[bisect_left(keys, size << _OFFSET_BITS | start)]
        if not keys:
            self._filled &= ~(1 << number)
        del self._free_by_start[start]
        del self._free_by_end[start + size]
