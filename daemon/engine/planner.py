"""From two checked lists to a plan: group by spaces, coalesce, choose routes, cut into chunks.

The planner proposes; the machine decides when to go on to the next route. All column work is numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import coalesce, cut_points, pair
from xferd.api.errors import NoRoute
from xferd.api.types import Estimate, Explanation, Hop
from xferd.daemon.engine.plan import Leg, Plan, Route
from xferd.plugins.base import Extent, MappedSpace, RemoteSpace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xferd.daemon.engine.costs import CostModel
    from xferd.daemon.engine.lists import CheckedList
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
        self._staging_slots = staging_slots

    def plan(self, source: CheckedList, target: CheckedList, *, pin: str = "") -> Plan:
        """Plan a move between lists of equal totals.

        Args:
            source: where the bytes are.
            target: where they go.
            pin: name of a backend that must be part of every route; "" leaves the choice to the planner.

        Raises:
            NoRoute: nothing can move between two of the spaces; the message says why for each backend.
        """
        legs: list[Leg] = []
        considered: list[str] = []
        for left, right in _groups(source, target):
            nbytes, pieces = left.nbytes, len(left.iov) + len(right.iov)
            routes, weighed = self.routes(left.space, right.space, nbytes, pieces, pin=pin)
            considered.extend(line for line in weighed if line not in considered)
            if not routes:
                raise NoRoute(
                    f"nothing moves {left.space} to {right.space} on node {self._node}"
                    + (f" by backend {pin!r}" if pin else ""),
                    remedy="; ".join(weighed) or "configure a backend for this pair",
                )
            cuts = cut_points(
                left.iov[:, 1], right.iov[:, 1], chunk_nbytes=self._chunk_nbytes, max_pieces=self._max_pieces
            )
            if len(cuts) > 2:  # chunks are cut one by one, as they start
                left, right = left.indexed(), right.indexed()
            legs.append(Leg(left, right, tuple(cuts), routes))
        return Plan(
            tuple(legs),
            source.total_nbytes,
            len(source) + len(target),
            sum(len(leg.source.iov) + len(leg.target.iov) for leg in legs),
            tuple(considered),
            () if source.node else source.regions,
            () if target.node else target.regions,
            source.node or target.node,
        )

    def routes(
        self, source: Space, target: Space, nbytes: int, pieces: int, *, pin: str = ""
    ) -> tuple[tuple[Route, ...], list[str]]:
        """Return the routes between two spaces, cheapest first, and what was weighed."""
        found: list[Route] = []
        weighed: list[str] = []
        for route, why in self._candidates(source, target, nbytes, pieces):
            if route is not None and pin and pin not in route.backends:
                weighed.append(f"{route.name}: not the pinned backend {pin!r}")
            elif route is not None:
                found.append(route)
                weighed.append(f"{route.name}: {why}")
            else:
                weighed.append(why)
        return tuple(sorted(found, key=lambda route: route.cost_s)), weighed

    def explain(self, plan: Plan) -> Explanation:
        """Say what a plan would do."""
        hops = tuple(hop for leg in plan.legs for hop in leg.routes[0].hops)
        return Explanation(hops, plan.considered, plan.chunks, plan.pieces, plan.total_nbytes)

    def estimate(self, plan: Plan) -> Estimate:
        """Say how long a plan would take if nothing else moved."""
        duration_s = sum(leg.routes[0].cost_s for leg in plan.legs)
        measured = all(
            self._costs.is_measured(leg.routes[0].name, leg.source.space, leg.target.space) for leg in plan.legs
        )
        hops = tuple(hop for leg in plan.legs for hop in leg.routes[0].hops)
        return Estimate(duration_s, plan.total_nbytes / duration_s, "measured" if measured else "assumed", hops)

    # -------------------------------------------------------------------------------- candidates

    def _candidates(self, source: Space, target: Space, nbytes: int, pieces: int) -> Iterator[tuple[Route | None, str]]:
        is_direct = False
        for name, backend in self._backends.items():
            refusal = backend.refusal(source, target)
            if refusal:
                yield None, f"{name}: {refusal}"
                continue
            is_direct = True
            yield self._direct(name, backend, source, target, nbytes, pieces)
        if is_direct:
            return
        # No backend reaches both ends: go through staging memory of ours, which every backend can reach.
        staging = MappedSpace()
        for first_name, first in self._backends.items():
            if first.refusal(source, staging):
                continue
            for second_name, second in self._backends.items():
                if not second.refusal(staging, target):
                    yield self._staged((first_name, first), (second_name, second), source, target, nbytes, pieces)

    def _direct(
        self, name: str, backend: Backend, source: Space, target: Space, nbytes: int, pieces: int
    ) -> tuple[Route, str]:
        assumed_s = backend.estimate_s(source, target, nbytes, pieces)
        cost_s, basis = self._costs.estimate_s(name, source, target, nbytes, assumed_s)
        reason = f"{cost_s * 1e3:.3g} ms {basis} for {nbytes} bytes in {pieces} pieces"
        hop = Hop(name, self._place(source), self._place(target), reason)
        remote = source if isinstance(source, RemoteSpace) else target
        key = (name, remote.node if isinstance(remote, RemoteSpace) else "")
        route = Route((hop,), cost_s, key, max(backend.slots(source, target), 1), backend.is_restartable)
        return route, reason

    def _staged(
        self,
        first: tuple[str, Backend],
        second: tuple[str, Backend],
        source: Space,
        target: Space,
        nbytes: int,
        pieces: int,
    ) -> tuple[Route, str]:
        staging = MappedSpace()
        name = f"{first[0]}+{second[0]}"
        assumed_s = first[1].estimate_s(source, staging, nbytes, pieces) + second[1].estimate_s(
            staging, target, nbytes, pieces
        )
        cost_s, basis = self._costs.estimate_s(name, source, target, nbytes, assumed_s)
        hops = (
            Hop(first[0], self._place(source), f"staging@{self._node}", "no backend reaches both ends"),
            Hop(second[0], f"staging@{self._node}", self._place(target), f"{cost_s * 1e3:.3g} ms {basis} together"),
        )
        slots = min(first[1].slots(source, staging), second[1].slots(staging, target), self._staging_slots)
        restartable = first[1].is_restartable and second[1].is_restartable
        return Route(hops, cost_s, (name, ""), max(slots, 1), restartable), "through staging memory"

    def _place(self, space: Space) -> str:
        return str(space) if isinstance(space, RemoteSpace) else f"{space}@{self._node}"


def _groups(source: CheckedList, target: CheckedList) -> Iterator[tuple[Extent, Extent]]:
    """Split two lists into extents of one space each, with equal totals, neighbours merged.

    A transfer has no inner order, so rows are grouped by their pair of spaces and there are never more groups than
    pairs, however the rows alternate.
    """
    if source.space is None and target.space is None:
        yield _extent(source, slice(None), None, None), _extent(target, slice(None), None, None)
        return
    cut = pair(source.nbytes, target.nbytes)
    left_space = np.zeros(len(source), np.int32) if source.space is None else source.space
    right_space = np.zeros(len(target), np.int32) if target.space is None else target.space
    keys = left_space[cut.left].astype(np.int64) * len(target.spaces) + right_space[cut.right]
    for key in np.unique(keys):
        rows = np.flatnonzero(keys == key)
        nbytes = cut.nbytes[rows]
        yield (
            _extent(source, cut.left[rows], cut.left_skip[rows], nbytes, int(key) // len(target.spaces)),
            _extent(target, cut.right[rows], cut.right_skip[rows], nbytes, int(key) % len(target.spaces)),
        )


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
