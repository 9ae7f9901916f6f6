"""Plans that a device worker keeps by the table's number, so that a transfer posted again brings no table.

Bounded by count and by bytes of their tables; what was not used for longest goes first. A plan that is under way is
dropped when it has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.cuda.driver import Plan

MAX_COUNT = 1024
MAX_NBYTES = 64 << 20
"""Of tables: 24 bytes a piece in the device's memory."""


@dataclass(slots=True, eq=False)
class Kept:
    """A plan and what it names. ``flights`` counts those under way; one that is not kept goes at the last one's end."""

    plan: Plan
    table_nbytes: int
    allocations: frozenset[int] = frozenset()
    segments: frozenset[int] = frozenset()
    flights: int = 0
    is_kept: bool = False

    def end_flight(self) -> None:
        """Note that a flight has ended."""
        self.flights -= 1
        if not self.flights and not self.is_kept:
            self.plan.drop()


class KeptPlans:
    """The plans of one worker, by table number."""

    def __init__(self, max_count: int = MAX_COUNT, max_nbytes: int = MAX_NBYTES) -> None:
        self._max_count = max_count
        self._max_nbytes = max_nbytes
        self._plans: OrderedDict[int, Kept] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def nbytes(self) -> int:
        """Sum of the tables."""
        return self._nbytes

    def get(self, table_id: int) -> Kept | None:
        """Return a plan, and count it as used."""
        kept = self._plans.get(table_id)
        if kept is not None:
            self._plans.move_to_end(table_id)
        return kept

    def put(self, table_id: int, kept: Kept) -> None:
        """Keep a plan in the place of one of the same number, and let go of others if there are too many."""
        self._forget(table_id)
        if kept.table_nbytes > self._max_nbytes:
            return  # it ends with its flight
        kept.is_kept = True
        self._plans[table_id] = kept
        self._nbytes += kept.table_nbytes
        while len(self._plans) > self._max_count or self._nbytes > self._max_nbytes:
            self._forget(next(iter(self._plans)))

    def drop_allocation(self, number: int) -> None:
        """Let go of plans that name an allocation."""
        self._drop(lambda kept: number in kept.allocations)

    def drop_segment(self, number: int) -> None:
        """Let go of plans that name host memory."""
        self._drop(lambda kept: number in kept.segments)

    def _drop(self, is_named: Callable[[Kept], bool]) -> None:
        for table_id in [table_id for table_id, kept in self._plans.items() if is_named(kept)]:
            self._forget(table_id)

    def _forget(self, table_id: int) -> None:
        kept = self._plans.pop(table_id, None)
        if kept is None:
            return
        self._nbytes -= kept.table_nbytes
        kept.is_kept = False
        if not kept.flights:
            kept.plan.drop()
