"""Which routes there are between two spaces, in the order in which they are tried, and what speaks against the others.

Backends say what they can do and what they assume it costs; the cost model says what it did cost and what failed.
Cutting a transfer into legs and chunks is the planner's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import structlog

from xferd.api.types import Hop
from xferd.daemon.engine.plan import CostKey, Route
from xferd.plugins.base import MappedSpace, RemoteSpace, SlotClass, SpaceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xferd.daemon.engine.costs import CostModel, Expectation
    from xferd.daemon.engine.scheduler import SlotKey
    from xferd.plugins.base import Backend, Space

log = structlog.get_logger(__name__)

_STAGING = MappedSpace()


class Candidate(NamedTuple):
    """A way that was considered: a route with what to expect of it, or why it is none.

    A named tuple, as several are made for each plan, and a frozen dataclass takes three times as long to make.
    """

    name: str
    route: Route | None = None
    expected: Expectation | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """All candidates between two spaces: routes in the order in which they are tried, then the others."""

    routes: tuple[Route, ...]
    candidates: tuple[Candidate, ...]
    is_trial: bool = False

    @property
    def basis(self) -> str:
        """What the first route's cost rests on: "measured" or "assumed"."""
        first = self.candidates[0].expected if self.candidates else None
        return "assumed" if first is None else first.basis

    def lines(self) -> list[str]:
        """Say of each candidate what is expected of it, and why it is where it is."""
        return [self._line(place, candidate) for place, candidate in enumerate(self.candidates)]

    def _line(self, place: int, candidate: Candidate) -> str:
        if candidate.route is None or candidate.expected is None:
            return f"{candidate.name}: {candidate.refusal}"
        via = " through staging memory" if candidate.route.is_staged else ""
        return f"{candidate.name}: {self._verdict(place)}{via}: {candidate.expected}"

    def _verdict(self, place: int) -> str:
        if place:
            return "next if that fails" if place == 1 else f"number {place + 1} of those to try"
        if self.is_trial:
            return "chosen for once, because it was not measured for long"
        if self.routes[0].pin:
            return "chosen, pinned"
        return "chosen, quickest" if len(self.routes) > 1 else "chosen, the only one"


class Candidates:
    """Finds routes with the backends that this node has."""

    def __init__(self, node: str, backends: Mapping[str, Backend], costs: CostModel, *, staging_slots: int) -> None:
        self._node = node
        self._backends = backends
        self._costs = costs
        self._staging_slots = staging_slots

    def choose(
        self, source: Space, target: Space, nbytes: int, pieces: int, *, pin: str = "", explore: bool = False
    ) -> Choice:
        """Return the routes between two spaces, and what else was weighed.

        Args:
            source: where the bytes are.
            target: where they go.
            nbytes: how many.
            pieces: rows of both sides.
            pin: name of a backend that must be part of the route; there is then at most one.
            explore: the bytes will move, so that now and then a route may be tried that needs measuring.
        """
        found: list[Candidate] = []
        others: list[Candidate] = []
        for candidate in self._considered(source, target, nbytes, pieces):
            if candidate.route is None:
                others.append(candidate)
            elif pin and pin not in candidate.route.backends:
                others.append(Candidate(candidate.name, refusal=f"not the pinned backend {pin!r}"))
            else:
                found.append(candidate)
        is_trial = False
        if len(found) > 1:
            found.sort(key=_rank)
            is_trial = explore and not pin and self._put_trial_first(found)
        if pin:
            # Whoever pins wants to know how that backend does, not to be served by another way.
            others[:0] = [Candidate(other.name, refusal="not tried: the pin takes one route") for other in found[1:]]
            found = [one._replace(route=replace(one.route, pin=pin)) for one in found[:1] if one.route is not None]
        routes = tuple([candidate.route for candidate in found if candidate.route is not None])
        return Choice(routes, (*found, *others), is_trial)

    # ------------------------------------------------------------------------------------ internals

    def _put_trial_first(self, found: list[Candidate]) -> bool:
        pairs = [(one.route, one.expected) for one in found if one.route is not None and one.expected is not None]
        tried = self._costs.trial(pairs)
        found.insert(0, found.pop(tried))
        return tried > 0

    def _considered(self, source: Space, target: Space, nbytes: int, pieces: int) -> Iterator[Candidate]:
        direct: list[str] = []
        for name, backend in self._backends.items():
            candidate = self._guarded(name, backend, source, target, nbytes, pieces)
            if candidate.route is not None:
                direct.append(name)
            yield candidate
        if SpaceKind.MAPPED in (source.kind, target.kind) and direct:
            return  # staging memory is mapped too: it would be the same way, and a copy
        # Through staging memory of ours, which every backend can reach. A detour by a backend that also goes direct
        # would fail with it.
        firsts = [
            item for item in self._backends.items() if item[0] not in direct and self._can(item, source, _STAGING)
        ]
        seconds = [
            item for item in self._backends.items() if item[0] not in direct and self._can(item, _STAGING, target)
        ]
        for first in firsts:
            for second in seconds:
                yield self._staged(first, second, source, target, nbytes, pieces)

    def _guarded(
        self, name: str, backend: Backend, source: Space, target: Space, nbytes: int, pieces: int
    ) -> Candidate:
        """Ask one backend. One with a bug is no candidate, and the others are asked still."""
        try:
            refusal = backend.refusal(source, target)
            if refusal:
                return Candidate(name, refusal=refusal)
            assumed_s = backend.estimate_s(source, target, nbytes, pieces)
            slot = backend.slot_class(source, target, nbytes, pieces)
            manner = backend.manner(source, target)
        except Exception as caught:
            log.exception("backend_bug", backend=name, source=str(source), target=str(target))
            return Candidate(name, refusal=f"cannot be asked: {type(caught).__name__}: {caught}")
        return self._direct(name, backend, slot, source, target, nbytes, pieces, assumed_s, manner)

    def _can(self, item: tuple[str, Backend], source: Space, target: Space) -> bool:
        name, backend = item
        try:
            return not backend.refusal(source, target)
        except Exception:
            log.exception("backend_bug", backend=name, source=str(source), target=str(target))
            return False

    def _direct(
        self,
        name: str,
        backend: Backend,
        slot: SlotClass,
        source: Space,
        target: Space,
        nbytes: int,
        pieces: int,
        assumed_s: float,
        manner: str,
    ) -> Candidate:
        peer = _peer_of(source, target)
        key = CostKey(name, source.kind.value, target.kind.value, peer)
        expected = self._costs.expect(key, nbytes, assumed_s)
        reason = f"{expected.duration_s * 1e3:.3g} ms {expected.basis} for {nbytes} bytes in {pieces} pieces"
        if manner:
            reason = f"{reason}, by {manner}"
        hop = Hop(name, self._place(source), self._place(target), reason)
        pipe: SlotKey = (name, f"{peer}/{slot.name}" if slot.name else peer)
        route = Route(
            (hop,), expected.duration_s, pipe, max(slot.slots, 1), backend.is_restartable, key, expected.assumed_s
        )
        return Candidate(name, route, expected)

    def _staged(
        self,
        first: tuple[str, Backend],
        second: tuple[str, Backend],
        source: Space,
        target: Space,
        nbytes: int,
        pieces: int,
    ) -> Candidate:
        name = f"{first[0]}+{second[0]}"
        try:
            assumed_s = first[1].estimate_s(source, _STAGING, nbytes, pieces)
            assumed_s += second[1].estimate_s(_STAGING, target, nbytes, pieces)
            slots = min(first[1].slots(source, _STAGING), second[1].slots(_STAGING, target), self._staging_slots)
        except Exception as caught:
            log.exception("backend_bug", backend=name, source=str(source), target=str(target))
            return Candidate(name, refusal=f"cannot be asked: {type(caught).__name__}: {caught}")
        key = CostKey(name, source.kind.value, target.kind.value, _peer_of(source, target))
        expected = self._costs.expect(key, nbytes, assumed_s)
        together = f"{expected.duration_s * 1e3:.3g} ms {expected.basis} together"
        hops = (
            Hop(first[0], self._place(source), f"staging@{self._node}", "through staging memory"),
            Hop(second[0], f"staging@{self._node}", self._place(target), together),
        )
        is_restartable = first[1].is_restartable and second[1].is_restartable
        route = Route(hops, expected.duration_s, (name, ""), max(slots, 1), is_restartable, key, expected.assumed_s)
        return Candidate(name, route, expected)

    def _place(self, space: Space) -> str:
        return str(space) if isinstance(space, RemoteSpace) else f"{space}@{self._node}"


def _rank(candidate: Candidate) -> tuple[bool, float]:
    assert candidate.expected is not None
    return candidate.expected.rank


def _peer_of(source: Space, target: Space) -> str:
    remote = source if isinstance(source, RemoteSpace) else target
    return remote.node if isinstance(remote, RemoteSpace) else ""
