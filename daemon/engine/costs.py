"""What moves have cost so far and which routes failed lately: what the planner knows beyond assumptions.

Learned is a factor on what a route's backends assume, for each route, pair of kinds, peer and size class: the
assumption keeps its shape (a start, so much a byte, so much a piece), and the factor puts it right. What is measured is
a chunk's share of the pipe that it went through (``pipes.py``), never the time that it waited.

What was learned fades: after ``HALF_LIFE_S`` half of a factor is left (on a logarithmic scale), so that a route that
was slow for a passing reason gets another chance. A route that fails is tried last for a time that doubles with each
failure, and the first success heals it. Now and then a route that was not measured for long is tried where its
assumption is not much worse than the best one's expectation, so that a wrong assumption cannot lock in.

Not here: which routes there are (``candidates.py``), what is done after a failure (``machine.py``).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from xferd.api.errors import ShortTransfer, XferdError
from xferd.api.types import RouteCost
from xferd.daemon.engine.machine import ROUTE_FAULTS
from xferd.daemon.engine.pipes import Pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.daemon.engine.pipes import Stay
    from xferd.daemon.engine.plan import CostKey, Route

SMOOTHING = 0.2
"""Weight of the newest transfer among many: five forget most of what was before."""

HALF_LIFE_S = 600.0
"""Of a measurement: loads and links change within minutes, and a wrong turn every ten minutes costs little."""

NEARBY = 0.5
"""What a measurement says of the next size class, a factor of 16 away: half of its factor."""

MEASURED = 0.25
"""An expectation counts as measured from this much evidence on: two half lives, or two classes away."""

BACKOFF_S, MAX_BACKOFF_S = 1.0, 300.0
"""A failed route is tried last for a second, then two, up to five minutes."""

TRIAL_AFTER_S = 600.0
"""A route that was not measured for so long may get a trial."""

TRIAL_INTERVAL_S = 10.0
"""Least time between two trials with one peer."""

TRIAL_ODDS = 8
"""Of the plans that could be a trial one in so many is, so that trials fall on different sizes and clients."""

TRIAL_FACTOR, TRIAL_COST_S = 4.0, 0.5
"""A trial is assumed to take at most so many times the best route's time, and so many seconds more."""

MAX_PEERS = 256
"""Peers of which something is kept; the one unused for longest goes first."""

MAX_FACTOR = 1e6
"""Measurements beyond it are clock trouble."""


class Expectation(NamedTuple):
    """What a route is expected to take, and what that rests on.

    Attributes:
        duration_s: for the whole leg, alone in its pipe.
        assumed_s: what the backends say without measurements.
        basis: "measured" or "assumed".
        measurements: transfers that were measured in this size class.
        age_s: of the newest of them; infinite where there is none.
        failures: in a row.
        retry_in_s: above 0.0 the route is tried last for so long.
        last_error: of the failures.
    """

    duration_s: float
    assumed_s: float
    basis: str
    measurements: int = 0
    age_s: float = math.inf
    failures: int = 0
    retry_in_s: float = 0.0
    last_error: str = ""

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts routes: those that failed lately last, the quicker ones first."""
        return self.retry_in_s > 0.0, self.duration_s

    def __str__(self) -> str:
        said = f"{self.duration_s * 1e3:.3g} ms {self.basis}"
        if self.measurements:
            said += f", {self.measurements} x, newest {self.age_s:.1f} s ago"
        if self.duration_s != self.assumed_s:
            said += f" (assumed {self.assumed_s * 1e3:.3g} ms)"
        if self.failures:
            said += f"; failed {self.failures} x, last: {self.last_error}"
        if self.retry_in_s > 0.0:
            said += f"; tried last for {self.retry_in_s:.1f} s more"
        return said


@dataclass(slots=True)
class _Learned:
    """One size class: the logarithm of measured over assumed, and how much evidence is behind it."""

    log_factor: float = 0.0
    weight: float = 0.0
    transfers: float = 0.0
    measured_at: float = 0.0
    seconds_a_byte: float = 0.0


@dataclass(slots=True)
class _Way:
    """What is known of one route with one peer between two kinds of space."""

    classes: dict[int, _Learned] = field(default_factory=dict)
    failures: int = 0
    failed_at: float = -math.inf
    retry_at: float = -math.inf
    last_error: str = ""


@dataclass(slots=True)
class _Peer:
    ways: dict[CostKey, _Way] = field(default_factory=dict)
    next_trial_at: float = -math.inf


@dataclass(slots=True)
class Metered:
    """A chunk on its way; from ``begin`` to ``end``."""

    key: CostKey
    nbytes: int
    leg_nbytes: int
    assumed_s: float
    started_at: float
    stay: Stay


class CostModel:
    """Learns from chunks; says what to expect. Thread-safe, because long lists are planned in a thread.

    Args:
        clock: monotonic seconds.
        chance: decides when a trial is made.
        max_peers: other nodes of which something is kept.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
        max_peers: int = MAX_PEERS,
    ) -> None:
        self._clock = clock
        self._chance = chance or random.Random()
        self._max_peers = max_peers
        self._lock = threading.Lock()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._pipes = Pipes()
        self._trouble_until = -math.inf

    # ------------------------------------------------------------------------------------ learn

    def begin(self, route: Route, nbytes: int, leg_nbytes: int) -> Metered | None:
        """Be told that ``nbytes`` of a leg start to move by a route; ``end`` must follow. None is fine for it."""
        if route.cost_key is None:
            return None
        with self._lock:
            now = self._clock()
            assumed_s = max(route.assumed_s * nbytes / leg_nbytes, 1e-9)
            return Metered(route.cost_key, nbytes, leg_nbytes, assumed_s, now, self._pipes.enter(route.slot_key, now))

    def end(self, metered: Metered | None, outcome: int | XferdError | None) -> None:
        """Be told how it went: bytes that moved, why not, or None for a chunk that was stopped from outside.

        Errors that are about the request, and not about the route, teach nothing. A chunk that was stopped teaches
        that it takes at least as long as it took.
        """
        if metered is None:
            return
        with self._lock:
            now = self._clock()
            share_s = self._pipes.leave(metered.stay, now)
            if isinstance(outcome, int) and outcome != metered.nbytes:
                outcome = ShortTransfer(f"moved {outcome} of {metered.nbytes} bytes")
            if isinstance(outcome, ROUTE_FAULTS):
                self._fail(self._way(metered.key), metered.started_at, outcome, now)
            elif isinstance(outcome, int):
                way = self._way(metered.key)
                if way.failures and metered.started_at >= way.failed_at:
                    way.failures, way.retry_at, way.last_error = 0, -math.inf, ""
                self._observe(way, metered, share_s, now)
            elif outcome is None and share_s > metered.assumed_s:
                self._observe(self._way(metered.key), metered, share_s, now, at_least=True)

    def forget(self, peer: str) -> None:
        """Forget what was learned of a peer: it was lost, and may come back as another machine."""
        with self._lock:
            self._peers.pop(peer, None)

    # ------------------------------------------------------------------------------------ tell

    def expect(self, key: CostKey, nbytes: int, assumed_s: float) -> Expectation:
        """Return what a leg of ``nbytes`` bytes is expected to take by a route; ``assumed_s`` without measurements."""
        with self._lock:
            peer = self._peers.get(key.peer)
            way = None if peer is None else peer.ways.get(key)
            if way is None:
                return Expectation(assumed_s, assumed_s, "assumed")
            return _expected(way, _class_of(nbytes), assumed_s, self._clock())

    def has_trouble(self) -> bool:
        """Whether some route is tried last now; False is quick and the rule."""
        return self._trouble_until > self._clock()

    def trial(self, choices: Sequence[tuple[Route, Expectation]]) -> int:
        """Return which of some routes, best first, is to be taken now: mostly 0, seldom one that needs measuring."""
        if len(choices) < 2:
            return 0
        best = choices[0][1]
        due = [
            (expected.age_s, -number)
            for number, (route, expected) in enumerate(choices)
            if number and route.is_restartable and _is_trial(expected, best)
        ]
        if not due or best.basis != "measured" or best.retry_in_s > 0.0:
            return 0
        key = choices[0][0].cost_key
        with self._lock:
            now = self._clock()
            peer = None if key is None else self._peers.get(key.peer)
            if peer is None or now < peer.next_trial_at or self._chance.randrange(TRIAL_ODDS):
                return 0
            peer.next_trial_at = now + TRIAL_INTERVAL_S
        return -max(due)[1]

    def listing(self) -> list[RouteCost]:
        """List all that was learned: by peer and route, a row for each size class."""
        with self._lock:
            now = self._clock()
            ways = [(key, way) for peer in self._peers.values() for key, way in peer.ways.items()]
            rows = [_row(key, way, number, now) for key, way in ways for number in sorted(way.classes or (-1,))]
        return sorted(rows, key=lambda row: (row.peer, row.source, row.target, row.route, row.min_nbytes))

    def check_invariants(self) -> None:
        """Assert what must always hold."""
        with self._lock:
            assert len(self._peers) <= self._max_peers + 1, "more peers than are kept"
            self._pipes.check_invariants()
            for name, peer in self._peers.items():
                for key, way in peer.ways.items():
                    assert key.peer == name
                    assert len(way.classes) <= 17, way
                    assert bool(way.failures) == (way.retry_at > -math.inf), way
                    for learned in way.classes.values():
                        assert 0.0 < learned.weight <= 1.0 / SMOOTHING + 1e-9, learned
                        assert math.isfinite(learned.log_factor), learned

    # ------------------------------------------------------------------------- below: with the lock held

    def _way(self, key: CostKey) -> _Way:
        peer = self._peers.get(key.peer)
        if peer is None:
            others = [name for name in self._peers if name]  # "" is this node, and stays
            if key.peer and len(others) >= self._max_peers:
                del self._peers[others[0]]
            peer = self._peers[key.peer] = _Peer()
        self._peers.move_to_end(key.peer)
        way = peer.ways.get(key)
        if way is None:
            way = peer.ways[key] = _Way()
        return way

    def _fail(self, way: _Way, started_at: float, error: XferdError, now: float) -> None:
        if started_at < way.failed_at:
            return  # it went down with others that were under way when the first of them failed
        if now - way.retry_at > MAX_BACKOFF_S:
            way.failures = 0
        way.failures += 1
        way.failed_at, way.last_error = now, f"{error.code}: {error.message}"
        way.retry_at = now + min(BACKOFF_S * 2.0 ** (way.failures - 1), MAX_BACKOFF_S)
        self._trouble_until = max(self._trouble_until, way.retry_at)

    def _observe(self, way: _Way, metered: Metered, share_s: float, now: float, *, at_least: bool = False) -> None:
        number = _class_of(metered.leg_nbytes)
        log_factor = math.log(min(max(share_s / metered.assumed_s, 1.0 / MAX_FACTOR), MAX_FACTOR))
        learned = way.classes.get(number)
        if learned is None:
            learned = way.classes[number] = _Learned(log_factor)
        elif at_least and log_factor <= learned.log_factor:
            return
        # A chunk counts as the part of its transfer that it is: many small ones do not outweigh transfers before.
        part = metered.nbytes / metered.leg_nbytes
        evidence = learned.weight * _kept(now - learned.measured_at)
        step = max(part / (evidence + part), 1.0 - (1.0 - SMOOTHING) ** part)
        learned.log_factor += step * (log_factor - learned.log_factor)
        learned.seconds_a_byte += step * (share_s / metered.nbytes - learned.seconds_a_byte)
        learned.weight = min(evidence + part, 1.0 / SMOOTHING)
        learned.transfers += part
        learned.measured_at = now


def _expected(way: _Way, number: int, assumed_s: float, now: float) -> Expectation:
    failures, retry_in_s = way.failures, max(way.retry_at - now, 0.0)
    if not way.classes:
        return Expectation(
            assumed_s, assumed_s, "assumed", failures=failures, retry_in_s=retry_in_s, last_error=way.last_error
        )
    own = way.classes.get(number)
    nearest = number if own is not None else min(way.classes, key=lambda other: (abs(other - number), other))
    learned = way.classes[nearest]
    sure = _kept(now - learned.measured_at) * NEARBY ** abs(nearest - number)
    return Expectation(
        assumed_s * math.exp(learned.log_factor * sure),
        assumed_s,
        "measured" if sure >= MEASURED else "assumed",
        0 if own is None else max(round(own.transfers), 1),
        math.inf if own is None else now - own.measured_at,
        failures,
        retry_in_s,
        way.last_error,
    )


def _is_trial(expected: Expectation, best: Expectation) -> bool:
    return (
        expected.age_s > TRIAL_AFTER_S
        and expected.retry_in_s <= 0.0
        and expected.assumed_s <= TRIAL_FACTOR * best.duration_s
        and expected.assumed_s - best.duration_s <= TRIAL_COST_S
    )


def _row(key: CostKey, way: _Way, number: int, now: float) -> RouteCost:
    learned = way.classes.get(number, _Learned(measured_at=now))
    return RouteCost(
        route=key.route,
        source=key.source,
        target=key.target,
        peer=key.peer,
        min_nbytes=16**number if number >= 0 else 0,
        max_nbytes=16 ** (number + 1) - 1 if number >= 0 else 0,
        bytes_per_s=1.0 / learned.seconds_a_byte if learned.seconds_a_byte else 0.0,
        factor=math.exp(learned.log_factor * _kept(now - learned.measured_at)),
        measurements=max(round(learned.transfers), 1) if learned.transfers else 0,
        age_s=now - learned.measured_at,
        failures=way.failures,
        retry_in_s=max(way.retry_at - now, 0.0),
        last_error=way.last_error,
    )


def _kept(age_s: float) -> float:
    """Return the part of a measurement that still counts."""
    return math.exp2(-max(age_s, 0.0) / HALF_LIFE_S)


def _class_of(nbytes: int) -> int:
    # Size classes by factors of 16: below 4 KiB overhead is all, above 16 MiB it is nothing.
    return max(nbytes.bit_length() - 1, 0) // 4
