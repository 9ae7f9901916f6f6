"""From two checked lists to a plan: group by spaces, coalesce, choose routes (``candidates.py``), cut into chunks.

The planner proposes; the machine decides when to go on to the next route. All column work is numpy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import coalesce, cut_points, pair
from xferd.api.errors import InvalidArgument, NoRoute
from xferd.api.types import Estimate, Explanation
from xferd.daemon.engine.candidates import Candidates
from xferd.daemon.engine.plan import Leg, Plan
from xferd.plugins.base import Extent, ObjectSpace, ObjectsSpace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from xferd.api.descriptors import Pairing
    from xferd.api.types import RouteCost
    from xferd.daemon.engine.candidates import Choice
    from xferd.daemon.engine.costs import CostModel
    from xferd.daemon.engine.lists import CheckedList
    from xferd.daemon.engine.plan import Route
    from xferd.plugins.base import Backend, Space


class Planner:
    """Makes plans with the backends that this node has."""

    def __init__(
        self,
        node: str,
        backends: Mapping[str, Backend],
        costs: CostModel,
        *,
        chunk_nbytes: int,
        max_pieces: int,
        staging_slots: int,
    ) -> None:
        self._node = node
        self._backends = backends
        self._costs = costs
        self._chunk_nbytes = chunk_nbytes
        self._max_pieces = max_pieces
        self._candidates = Candidates(node, backends, costs, staging_slots=staging_slots)

    def plan(self, source: CheckedList, target: CheckedList, *, pin: str = "", explore: bool = False) -> Plan:
        """Plan a move between lists of equal totals.

        Args:
            source: where the bytes are.
            target: where they go.
            pin: name of a backend that must be part of the route, which is then the only one; "" leaves the choice to
                the planner.
            explore: the plan will be posted, so that a route that was not measured for long may get a trial.

        Raises:
            InvalidArgument: no backend has the pinned name; or a part of what can only be written as a whole.
            NoRoute: nothing can move between two of the spaces; the message says why for each backend.
        """
        if pin and pin not in self._backends:
            raise InvalidArgument(
                f"no backend {pin!r} on node {self._node}",
                limit=f"backends: {', '.join(self._backends) or 'none'}",
                remedy="name one of them, or leave the choice to the planner",
            )
        legs: list[Leg] = []
        choices: list[Choice] = []
        alike: dict[tuple[object, ...], Choice] = {}
        for left, right in _groups(source, target):
            nbytes, pieces = left.nbytes, len(left.iov) + len(right.iov)
            kinds = _likeness(left.space), _likeness(right.space), nbytes, pieces.bit_length()
            choice = alike.get(kinds)
            if choice is None:
                choice = self._candidates.choose(left.space, right.space, nbytes, pieces, pin=pin, explore=explore)
                alike[kinds] = choice
                choices.append(choice)
            if not choice.routes:
                raise NoRoute(
                    f"nothing moves {left.space} to {right.space} on node {self._node}"
                    + (f" by backend {pin!r}" if pin else ""),
                    remedy="; ".join(choice.lines()) or "configure a backend for this pair",
                )
            left, right = self._backends[choice.routes[0].backends[-1]].arrange(left, right)
            chunk_nbytes, max_pieces = self._chunk_limits(choice.routes[0], left.space, right.space)
            cuts = cut_points(left.iov[:, 1], right.iov[:, 1], chunk_nbytes=chunk_nbytes, max_pieces=max_pieces)
            if len(cuts) > 2 and isinstance(left.space, ObjectsSpace):
                cuts = _cuts_between_objects(left, right, chunk_nbytes, max_pieces)
            if len(cuts) > 2:  # chunks are cut one by one, as they start
                left, right = left.indexed(), right.indexed()
            legs.append(Leg(left, right, tuple(cuts), choice.routes))
        return Plan(
            tuple(legs),
            source.total_nbytes,
            len(source) + len(target),
            sum(len(leg.source.iov) + len(leg.target.iov) for leg in legs),
            tuple(choices),
            () if source.node else source.regions,
            () if target.node else target.regions,
            source.node or target.node,
        )

    def _chunk_limits(self, route: Route, source: Space, target: Space) -> tuple[int, int]:
        """Return (nbytes, rows) of one chunk: the backend's own where it has an opinion and moves by itself."""
        own = None if route.is_staged else self._backends[route.backends[0]].chunk_limits(source, target)
        return own or (self._chunk_nbytes, self._max_pieces)

    def routes(self, source: Space, target: Space, nbytes: int, pieces: int) -> Choice:
        """Return the routes between two spaces, in the order in which they are tried, and what was weighed."""
        return self._candidates.choose(source, target, nbytes, pieces)

    def reordered(self, plan: Plan) -> Plan:
        """Return a plan with its routes in today's order, for another post: one that failed lately comes last.

        The same plan, at no cost, while no route is in trouble.
        """
        if not self._costs.has_trouble():
            return plan
        legs = tuple(replace(leg, routes=self._reordered(leg)) for leg in plan.legs)
        return (
            replace(plan, legs=legs)
            if any(a.routes != b.routes for a, b in zip(legs, plan.legs, strict=True))
            else plan
        )

    def _reordered(self, leg: Leg) -> tuple[Route, ...]:
        def rank(route: Route) -> tuple[bool, float]:
            if route.cost_key is None:
                return False, route.cost_s
            return self._costs.expect(route.cost_key, leg.cuts[-1], route.assumed_s).rank

        return tuple(sorted(leg.routes, key=rank))

    def learned(self) -> list[RouteCost]:
        """List what was learned of routes."""
        return self._costs.listing()

    def explain(self, plan: Plan) -> Explanation:
        """Say what a plan would do."""
        hops = tuple(hop for leg in plan.legs for hop in leg.routes[0].hops)
        return Explanation(hops, plan.considered, plan.chunks, plan.pieces, plan.total_nbytes)

    def estimate(self, plan: Plan) -> Estimate:
        """Say how long a plan would take if nothing else moved."""
        duration_s = sum(leg.routes[0].cost_s for leg in plan.legs)
        basis = "measured" if all(choice.basis == "measured" for choice in plan.choices) else "assumed"
        hops = tuple(hop for leg in plan.legs for hop in leg.routes[0].hops)
        return Estimate(duration_s, plan.total_nbytes / duration_s, basis, hops)


def _groups(source: CheckedList, target: CheckedList) -> Iterator[tuple[Extent, Extent]]:
    """Split two lists into extents of one space each, with equal totals, neighbours merged.

    A transfer has no inner order, so rows are grouped by their pair of spaces and there are never more groups than
    pairs, however the rows alternate. Objects of one store are one space as a source.
    """
    if source.space is None and target.space is None:
        yield _extent(source, slice(None), None, None), _extent(target, slice(None), None, None)
        return
    cut = pair(source.nbytes, target.nbytes)
    left_space = np.zeros(len(source), np.int32) if source.space is None else source.space
    right_space = np.zeros(len(target), np.int32) if target.space is None else target.space
    left_space, right_space = left_space[cut.left], right_space[cut.right]
    together = _read_together(source.spaces)
    left_key = left_space if together is None else together[left_space]
    keys = left_key.astype(np.int64) * len(target.spaces) + right_space
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    for rows in np.split(order, edges):
        nbytes, first = cut.nbytes[rows], rows[0]
        yield (
            _objects(source, cut, rows, left_space[rows])
            or _extent(source, cut.left[rows], cut.left_skip[rows], nbytes, int(left_space[first])),
            _extent(target, cut.right[rows], cut.right_skip[rows], nbytes, int(right_space[first])),
        )


def _read_together(spaces: tuple[Space, ...]) -> NDArray[np.int64] | None:
    """Return, for each space, the first of those that are read with it in one leg; None where all go by themselves.

    Objects of one store: a leg, and a chunk, for each of many small ones would cost more than to fetch it.
    """
    stores: dict[str, int] = {}
    firsts = [
        stores.setdefault(space.store, number) if isinstance(space, ObjectSpace) else number
        for number, space in enumerate(spaces)
    ]
    return None if firsts == list(range(len(spaces))) else np.array(firsts, dtype=np.int64)


def _objects(source: CheckedList, cut: Pairing, rows: NDArray[np.intp], space: NDArray[np.int32]) -> Extent | None:
    """Return rows of several objects as one extent; None where they are all of one space."""
    if (space == space[0]).all():
        return None
    numbers, number = np.unique(space, return_inverse=True)
    members = [source.spaces[each] for each in numbers.tolist()]
    objects = tuple(member for member in members if isinstance(member, ObjectSpace))
    position = source.position[cut.left[rows]] + cut.left_skip[rows]
    region, position, nbytes = coalesce(number.astype(np.uint64), position, cut.nbytes[rows])
    return Extent(ObjectsSpace(objects[0].store, objects), np.column_stack((position, nbytes)), region)


def _cuts_between_objects(left: Extent, right: Extent, chunk_nbytes: int, max_pieces: int) -> list[int]:
    """Return cuts as ``cut_points``, but between two objects wherever that is possible.

    Each object is then in as few chunks as if it were read alone, and is verified in the same way.
    """
    assert left.region is not None
    both_ends = np.cumsum(left.iov[:, 1]), np.cumsum(right.iov[:, 1])
    total = int(both_ends[0][-1])
    borders = np.append(both_ends[0][np.flatnonzero(left.region[1:] != left.region[:-1])], np.uint64(total))
    cuts = [0]
    while cuts[-1] < total:
        at = cuts[-1]
        rows = [(ends, int(np.searchsorted(ends, at, side="right")) + max_pieces) for ends in both_ends]
        reach = min(at + chunk_nbytes, total, *(int(ends[last - 1]) for ends, last in rows if last <= len(ends)))
        border = int(np.searchsorted(borders, reach, side="right")) - 1
        cuts.append(int(borders[border]) if border >= 0 and borders[border] > at else reach)
    return cuts


def _likeness(space: Space) -> object:
    """Return what routes depend on: of an object it is its store, so that many are weighed once."""
    return (space.kind, space.store) if isinstance(space, ObjectSpace | ObjectsSpace) else space


def _extent(
    checked: CheckedList,
    rows: slice | np.ndarray[tuple[int], np.dtype[np.intp]],
    skip: np.ndarray[tuple[int], np.dtype[np.uint64]] | None,
    nbytes: np.ndarray[tuple[int], np.dtype[np.uint64]] | None,
    space: int = 0,
) -> Extent:
    position = checked.position[rows]
    if skip is not None:
        position = position + skip
    sizes = checked.nbytes[rows] if nbytes is None else nbytes
    # Where positions are addresses or file offsets they are comparable by themselves; offsets in regions are not.
    key = np.zeros(len(position), np.uint64) if checked.region is None else checked.region[rows]
    region, position, sizes = coalesce(key, position, sizes)
    iov = np.empty((len(position), 2), dtype=np.uint64)
    iov[:, 0], iov[:, 1] = position, sizes
    return Extent(checked.spaces[space], iov, None if checked.region is None else region)
