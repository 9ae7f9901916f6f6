"""Per-slot facts of regions as numpy columns, so that checks of whole lists are gathers.

Pure bookkeeping, not thread-safe: ``regions.py`` guards it with its lock and decides what is allowed.

An id is ``generation << 32 | slot``. Slots are used again, generations are not: the counter starts at a random
number, so that ids of an earlier start of the daemon are noticed too, and grows with every region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import NotFound, Stale
from xferd.api.types import Access, RegionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from xferd.api.descriptors import Column
    from xferd.api.errors import XferdError
    from xferd.plugins.base import Space

SLOT_MASK = 0xFFFF_FFFF
GENERATIONS = 1 << 32

_START_CAPACITY = 64
_COLUMNS = {
    "ids": np.uint64,
    "base": np.uint64,
    "nbytes": np.uint64,
    "space": np.int32,
    "owner": np.int32,
    "held": np.int32,
    "own_rights": np.uint8,
    "other_rights": np.uint8,
    "closing": np.bool_,
}


def slot_of(region: int) -> int:
    """Return the slot that a region id names."""
    return region & SLOT_MASK


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A copy of what resolving needs to know of slots ``first`` and up; good without the lock."""

    first: int
    ids: Column
    base: Column
    nbytes: Column
    space: NDArray[np.int32]
    first_space: int
    spaces: tuple[Space | None, ...]


class SlotTable:
    """Columns by slot. An id of 0 marks a free slot; slots from ``used`` up were never used."""

    def __init__(self, max_slots: int, first_generation: int) -> None:
        self.max_slots = max_slots
        self.used = 0
        self._generation = first_generation % GENERATIONS or 1
        self._free: list[int] = []
        self._spaces = _SpaceBook()
        self._grow_to(min(_START_CAPACITY, max_slots))

    def __len__(self) -> int:
        return self.used - len(self._free)

    def add_group(
        self, spans: Sequence[tuple[int, int, Space]], owner: int, access: Access, *, writable: bool
    ) -> list[RegionId]:
        """Give new regions, as (base, nbytes, space), their slots; the caller has checked that enough are left."""
        slots = [self._free.pop() if self._free else self._fresh() for _ in spans]
        ids = [RegionId(self._next_generation() << 32 | slot) for slot in slots]
        allowed = Access.READ_WRITE if writable else Access.READ
        self.ids[slots] = np.array(ids, dtype=np.uint64)
        self.base[slots] = np.array([base for base, _, _ in spans], dtype=np.uint64)
        self.nbytes[slots] = np.array([nbytes for _, nbytes, _ in spans], dtype=np.uint64)
        self.space[slots] = [self._spaces.take(space) for _, _, space in spans]
        self.owner[slots] = owner
        self.held[slots] = 0
        self.own_rights[slots] = allowed.value
        self.other_rights[slots] = (access & allowed).value
        self.closing[slots] = False
        return ids

    def remove(self, slot: int) -> None:
        """Free a slot; its id is stale from now on."""
        self._spaces.release(int(self.space[slot]))
        self.ids[slot] = 0
        self.owner[slot] = -1
        self._free.append(slot)

    def change_owner(self, slots: Sequence[int], owner: int, access: Access | None) -> None:
        """Give slots to another owner; ``access`` None leaves what others may do."""
        self.owner[slots] = owner
        if access is not None:
            self.other_rights[slots] = self.own_rights[slots] & access.value

    def is_alive(self, region: int) -> bool:
        """Whether the id names a region of now."""
        slot = slot_of(region)
        return slot < self.used and region > 0 and int(self.ids[slot]) == region

    def absence(self, region: int) -> XferdError:
        """Return the error that says why an id names nothing."""
        if region < 0 or region >> 32 == 0 or region >> 64 or slot_of(region) >= self.used:
            return NotFound(f"no region {region}", remedy="list the regions of this node for valid ids")
        return Stale(
            f"region {region} was removed, or is of an earlier start of this node",
            remedy="list the regions again and use their new ids",
        )

    def span_of(self, region: int) -> tuple[int, int, Space] | None:
        """Return base, nbytes and space of one region, or None where the id names nothing."""
        if not self.is_alive(region):
            return None
        slot = slot_of(region)
        (space,) = self._spaces.part(number := int(self.space[slot]), number + 1)
        assert space is not None
        return int(self.base[slot]), int(self.nbytes[slot]), space

    def window(self, first: int, last: int) -> Window:
        """Copy slots ``first`` to ``last``, those that were ever used; costs a memcpy of 28 bytes a slot."""
        part = slice(first, min(last + 1, self.used))
        space = self.space[part].copy()
        low, high = (int(space.min()), int(space.max())) if len(space) else (0, -1)
        return Window(
            first,
            self.ids[part].copy(),
            self.base[part].copy(),
            self.nbytes[part].copy(),
            space,
            low,
            self._spaces.part(low, high + 1),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError where slots, ids and spaces do not agree."""
        live = np.flatnonzero(self.ids[: self.used])
        assert len(live) == len(self), "live slots and free list do not add up"
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert not self.ids[self._free].any(), "a free slot has an id"
        assert (self.ids[live] & np.uint64(SLOT_MASK) == live.astype(np.uint64)).all(), "an id names another slot"
        assert (self.ids[live] >> np.uint64(32) != 0).all(), "generation 0 was given"
        assert (self.held[live] >= 0).all(), "a negative hold count"
        self._spaces.check_invariants(self.space[live])

    def _next_generation(self) -> int:
        given = self._generation
        self._generation = (given + 1) % GENERATIONS or 1
        return given

    def _fresh(self) -> int:
        if self.used == len(self.ids):
            self._grow_to(min(2 * len(self.ids), self.max_slots))
        self.used += 1
        return self.used - 1

    def _grow_to(self, capacity: int) -> None:
        for name, dtype in _COLUMNS.items():
            column: NDArray[np.generic] = np.zeros(capacity, dtype=dtype)
            if self.used:
                column[: self.used] = getattr(self, name)
            setattr(self, name, column)

    ids: Column
    base: Column
    nbytes: Column
    space: NDArray[np.int32]
    owner: NDArray[np.int32]
    held: NDArray[np.int32]
    own_rights: NDArray[np.uint8]
    other_rights: NDArray[np.uint8]
    closing: NDArray[np.bool_]


class _SpaceBook:
    """Gives each distinct space a small number for as long as a region is in it."""

    def __init__(self) -> None:
        self._spaces: list[Space | None] = []
        self._references: list[int] = []
        self._numbers: dict[Space, int] = {}
        self._free: list[int] = []

    def take(self, space: Space) -> int:
        number = self._numbers.get(space)
        if number is None:
            if self._free:
                number = self._free.pop()
            else:
                number = len(self._spaces)
                self._spaces.append(None)
                self._references.append(0)
            self._spaces[number] = space
            self._numbers[space] = number
        self._references[number] += 1
        return number

    def release(self, number: int) -> None:
        self._references[number] -= 1
        if self._references[number]:
            return
        space = self._spaces[number]
        assert space is not None
        del self._numbers[space]
        self._spaces[number] = None
        self._free.append(number)

    def part(self, first: int, stop: int) -> tuple[Space | None, ...]:
        return tuple(self._spaces[first:stop])

    def check_invariants(self, live: NDArray[np.int32]) -> None:
        counts = np.bincount(live, minlength=len(self._spaces)).tolist()
        assert counts == self._references, "references to spaces do not add up"
        assert len(self._numbers) == len(self._spaces) - len(self._free), "spaces and numbers do not add up"
