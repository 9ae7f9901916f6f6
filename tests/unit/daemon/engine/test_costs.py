"""The cost model learns from what moved, forgets slowly, backs off from failures, and tries what it does not know."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xferd.api.errors import Cancelled, MoveFailed, PeerLost, PermissionDenied, Stale, XferdError
from xferd.daemon.engine import costs as c
from xferd.daemon.engine.costs import CostModel, Expectation
from xferd.daemon.engine.plan import CostKey, Route

MIB = 1 << 20


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def costs(clock: Clock) -> CostModel:
    return CostModel(clock=clock, chance=random.Random(0))


def route(name: str = "tcp", peer: str = "b", assumed_s: float = 1.0, *, restartable: bool = True) -> Route:
    return Route((), assumed_s, (name, peer), 2, restartable, CostKey(name, "mapped", "remote", peer), assumed_s)


def move(
    costs: CostModel,
    clock: Clock,
    taken_s: float,
    *,
    by: Route | None = None,
    nbytes: int = MIB,
    leg_nbytes: int = 0,
    outcome: int | XferdError | None = -1,
) -> None:
    """Let one chunk take so long; by default it arrives whole."""
    metered = costs.begin(by or route(), nbytes, leg_nbytes or nbytes)
    clock.now += taken_s
    costs.end(metered, nbytes if outcome == -1 else outcome)


def expect(costs: CostModel, by: Route | None = None, nbytes: int = MIB) -> Expectation:
    chosen = by or route()
    assert chosen.cost_key is not None
    return costs.expect(chosen.cost_key, nbytes, chosen.assumed_s)


# ------------------------------------------------------------------------------------------- what is learned


def test_without_measurements_the_assumption_stands(costs: CostModel) -> None:
    expected = expect(costs)
    assert (expected.duration_s, expected.basis, expected.measurements) == (1.0, "assumed", 0)
    assert str(expected) == "1e+03 ms assumed"


def test_one_measurement_counts_and_many_outweigh_a_stray_one(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 3.0)
    expected = expect(costs)
    assert (expected.basis, expected.measurements, expected.age_s) == ("measured", 1, 0.0)
    assert expected.duration_s == pytest.approx(3.0)
    for _ in range(30):
        move(costs, clock, 3.0)
    move(costs, clock, 300.0)
    assert 3.0 < expect(costs).duration_s < 10.0
    for _ in range(30):
        move(costs, clock, 0.5)
    assert expect(costs).duration_s == pytest.approx(0.5, rel=0.1)
    assert "62 x, newest 0.0 s ago (assumed 1e+03 ms)" in str(expect(costs))


def test_the_assumptions_shape_is_kept(costs: CostModel, clock: Clock) -> None:
    """What is learned of 1 MiB in few pieces holds for 1 MiB in many: the backend knows what pieces cost."""
    key = route().cost_key
    assert key is not None
    move(costs, clock, 2.0)
    assert costs.expect(key, MIB, 5.0).duration_s == pytest.approx(10.0)


def test_a_peer_a_pair_and_a_route_learn_for_themselves(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 5.0)
    assert expect(costs, route(peer="other")).basis == "assumed"
    assert expect(costs, route("ucx")).basis == "assumed"
    assert costs.expect(CostKey("tcp", "remote", "mapped", "b"), MIB, 1.0).basis == "assumed"


def test_the_next_size_classes_learn_half(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 4.0)
    assert expect(costs, nbytes=16 * MIB).duration_s == pytest.approx(2.0)
    assert expect(costs, nbytes=16 * MIB).basis == "measured"
    assert expect(costs, nbytes=16 * MIB).measurements == 0
    assert expect(costs, nbytes=1 << 40).basis == "assumed"
    move(costs, clock, 1.0, nbytes=16 * MIB)
    assert expect(costs, nbytes=16 * MIB).duration_s == pytest.approx(1.0)
    assert expect(costs).duration_s == pytest.approx(4.0, rel=0.01)


def test_a_transfer_counts_once_however_many_chunks_it_has(costs: CostModel, clock: Clock) -> None:
    for _ in range(20):
        move(costs, clock, 1.0, nbytes=64 * MIB)
    for _ in range(64):
        move(costs, clock, 10.0 / 64, nbytes=MIB, leg_nbytes=64 * MIB)
    whole = CostModel(clock=clock)
    for _ in range(20):
        move(whole, clock, 1.0, nbytes=64 * MIB)
    move(whole, clock, 10.0, nbytes=64 * MIB)
    assert expect(costs, nbytes=64 * MIB).duration_s == pytest.approx(
        expect(whole, nbytes=64 * MIB).duration_s, rel=0.02
    )
    assert expect(costs, nbytes=64 * MIB).measurements == 21


def test_chunks_that_share_a_pipe_are_not_taken_for_slow(costs: CostModel, clock: Clock) -> None:
    """Four transfers at once take four times as long each; alone, each would have taken 1 s."""
    under_way = [costs.begin(route(), MIB, MIB) for _ in range(4)]
    clock.now += 4.0
    for metered in under_way:
        costs.end(metered, MIB)
    assert expect(costs).duration_s == pytest.approx(1.0)


def test_a_chunk_that_was_stopped_teaches_that_it_takes_at_least_so_long(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 0.5, outcome=None)  # cancelled before it could have arrived: says nothing
    assert expect(costs).basis == "assumed"
    move(costs, clock, 50.0, outcome=None)
    assert expect(costs).duration_s == pytest.approx(50.0)
    move(costs, clock, 2.0, outcome=None)
    assert expect(costs).duration_s == pytest.approx(50.0, rel=0.05)


def test_what_was_learned_fades(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 16.0)
    clock.now += c.HALF_LIFE_S
    assert expect(costs).duration_s == pytest.approx(4.0)
    clock.now += c.HALF_LIFE_S
    assert expect(costs).duration_s == pytest.approx(2.0)
    clock.now += c.HALF_LIFE_S
    assert expect(costs).basis == "assumed"
    move(costs, clock, 3.0)  # one new measurement outweighs five old ones
    assert expect(costs).duration_s == pytest.approx(3.0, rel=0.3)


# ------------------------------------------------------------------------------------------- failures


def test_a_failed_route_is_tried_last_for_a_time_that_doubles_and_a_success_heals_it(
    costs: CostModel, clock: Clock
) -> None:
    for count, wait_s in enumerate([1.0, 2.0, 4.0, 8.0], start=1):
        move(costs, clock, 0.1, outcome=MoveFailed("broken pipe"))
        expected = expect(costs)
        assert (expected.failures, expected.retry_in_s) == (count, pytest.approx(wait_s))
        assert expected.rank > expect(costs, route("slow", assumed_s=1e9)).rank
        assert costs.has_trouble()
        clock.now += wait_s
        assert expect(costs).rank < expect(costs, route("slow", assumed_s=1e9)).rank
        assert not costs.has_trouble()
    assert "failed 4 x, last: move_failed: broken pipe" in str(expect(costs))
    for _ in range(20):
        clock.now += c.MAX_BACKOFF_S
        move(costs, clock, 0.1, outcome=MoveFailed("broken pipe"))
    assert expect(costs).retry_in_s == c.MAX_BACKOFF_S
    clock.now += c.MAX_BACKOFF_S
    move(costs, clock, 1.0)
    assert (expect(costs).failures, expect(costs).retry_in_s, expect(costs).last_error) == (0, 0.0, "")


def test_chunks_that_fall_together_are_one_failure_and_their_survivors_no_cure(costs: CostModel, clock: Clock) -> None:
    under_way = [costs.begin(route(), MIB, MIB) for _ in range(8)]
    clock.now += 0.1
    for metered in under_way[:7]:
        costs.end(metered, PeerLost("reset"))
        clock.now += 0.001
    costs.end(under_way[7], MIB)
    assert expect(costs).failures == 1


def test_a_failure_long_ago_is_forgiven(costs: CostModel, clock: Clock) -> None:
    for _ in range(5):
        clock.now += 20.0
        move(costs, clock, 0.1, outcome=MoveFailed("x"))
    assert expect(costs).failures == 5
    clock.now += 16.0 + c.MAX_BACKOFF_S + 1.0
    move(costs, clock, 0.1, outcome=MoveFailed("x"))
    assert expect(costs).failures == 1


@pytest.mark.parametrize("error", [Stale("old"), PermissionDenied("no"), Cancelled("stop")])
def test_an_error_of_the_request_is_no_fault_of_the_route(costs: CostModel, clock: Clock, error: XferdError) -> None:
    move(costs, clock, 0.1, outcome=error)
    assert expect(costs).failures == 0
    assert costs.listing() == []


def test_a_wrong_count_is_a_failure(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 0.1, outcome=5)
    assert "moved 5 of 1048576 bytes" in expect(costs).last_error


def test_failures_are_a_peers_own(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 0.1, outcome=MoveFailed("x"))
    assert expect(costs, route(peer="other")).failures == 0


# ------------------------------------------------------------------------------------------- trials


def pairs(costs: CostModel, *routes: Route) -> list[tuple[Route, Expectation]]:
    return sorted(((r, expect(costs, r)) for r in routes), key=lambda pair: pair[1].rank)


def trials(costs: CostModel, clock: Clock, *routes: Route, times: int = 2000, every_s: float = 1.0) -> int:
    """Return how often something else than the best route was to be taken."""
    count = 0
    for _ in range(times):
        clock.now += every_s
        move(costs, clock, routes[0].assumed_s, by=routes[0])
        count += costs.trial(pairs(costs, *routes)) != 0
    return count


def test_a_route_that_was_never_measured_gets_a_trial_now_and_then(costs: CostModel, clock: Clock) -> None:
    used, unknown = route("used"), route("unknown", assumed_s=1.4)
    count = trials(costs, clock, used, unknown)
    assert 10 <= count <= 2000 / c.TRIAL_INTERVAL_S
    move(costs, clock, 0.2, by=unknown)  # the assumption was wrong, and does not lock in
    assert pairs(costs, used, unknown)[0][0] is unknown
    fresh = CostModel(clock=clock, chance=random.Random(0))
    assert count == trials(fresh, clock, used, unknown), "the same chance gives the same trials"


@pytest.mark.parametrize(
    "other",
    [
        route("far", assumed_s=4.1),  # beyond the factor
        route("brittle", assumed_s=1.1, restartable=False),  # its failure would be the transfer's
    ],
)
def test_what_gets_no_trial(costs: CostModel, clock: Clock, other: Route) -> None:
    assert trials(costs, clock, route("used"), other, times=500) == 0


def test_no_trial_that_costs_too_many_seconds(costs: CostModel, clock: Clock) -> None:
    used, unknown = route("used", assumed_s=100.0), route("unknown", assumed_s=101.0)
    assert trials(costs, clock, used, unknown, times=200) == 0


def test_no_trial_of_a_route_that_was_measured_lately_or_failed(costs: CostModel, clock: Clock) -> None:
    used, other = route("used"), route("other", assumed_s=1.2)
    move(costs, clock, 1.3, by=other)
    assert trials(costs, clock, used, other, times=200) == 0
    clock.now += c.TRIAL_AFTER_S
    assert trials(costs, clock, used, other, times=200) > 0
    for _ in range(9):
        clock.now += 300.0
        move(costs, clock, 0.1, by=other, outcome=MoveFailed("x"))
    assert trials(costs, clock, used, other, times=100) == 0


def test_no_trial_before_the_best_route_is_known(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 1.0, by=route("of another pair"))
    assert [costs.trial(pairs(costs, route("a"), route("b"))) for _ in range(100)] == [0] * 100
    assert costs.trial([]) == 0


# ------------------------------------------------------------------------------------------- bounds


def test_peers_are_bounded_and_the_one_unused_for_longest_goes(clock: Clock) -> None:
    costs = CostModel(clock=clock, max_peers=3)
    move(costs, clock, 2.0, by=route(peer=""))
    for number in range(10):
        move(costs, clock, 2.0, by=route(peer=f"p{number}"))
        move(costs, clock, 2.0, by=route(peer="often"))
        costs.check_invariants()
    rows = {row.peer: row.measurements for row in costs.listing()}
    assert rows == {"": 1, "often": 10, "p8": 1, "p9": 1}


def test_a_lost_peer_is_forgotten_with_its_failures(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 2.0)
    move(costs, clock, 2.0, by=route(peer="other"))
    move(costs, clock, 2.0, outcome=PeerLost("gone"))
    metered = costs.begin(route(), MIB, MIB)
    costs.forget("b")
    assert expect(costs) == Expectation(1.0, 1.0, "assumed")
    costs.end(metered, None)
    assert {row.peer for row in costs.listing()} == {"other"}
    costs.forget("nobody")


def test_the_listing_says_what_is_known(costs: CostModel, clock: Clock) -> None:
    move(costs, clock, 2.0)
    move(costs, clock, 0.5, by=route("bad"), outcome=MoveFailed("x"))
    clock.now += 0.25
    good, bad = sorted(costs.listing(), key=lambda row: row.failures)
    assert (good.route, good.source, good.target, good.peer) == ("tcp", "mapped", "remote", "b")
    assert (good.min_nbytes, good.max_nbytes) == (MIB, 16 * MIB - 1)
    assert good.bytes_per_s == pytest.approx(MIB / 2)
    assert good.factor == pytest.approx(2.0, rel=0.01)
    assert (good.measurements, good.age_s, good.failures) == (1, pytest.approx(0.75), 0)
    assert (bad.measurements, bad.failures, bad.retry_in_s) == (0, 1, pytest.approx(0.75))


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e4), st.integers(0, 40), st.floats(0.0, 2000.0)), max_size=30),
    st.integers(0, 40),
    st.lists(st.floats(1e-9, 1e6), min_size=2, max_size=6),
)
def test_what_is_assumed_to_take_longer_is_expected_to(
    history: list[tuple[float, int, float]], size: int, assumed: list[float]
) -> None:
    """Within a size class the expectation grows with the assumption, whatever was measured; and it is a duration."""
    clock = Clock()
    costs = CostModel(clock=clock)
    for taken_s, bits, pause_s in history:
        move(costs, clock, taken_s, nbytes=1 << bits)
        clock.now += pause_s
    key = route().cost_key
    assert key is not None
    expected = [costs.expect(key, 1 << size, assumed_s).duration_s for assumed_s in sorted(assumed)]
    assert all(0.0 < duration_s < math.inf for duration_s in expected)
    assert expected == sorted(expected)
    costs.check_invariants()


@given(st.lists(st.floats(1e-4, 1e3), max_size=12), st.floats(1e-4, 1e3), st.floats(1e-4, 1e3), st.floats(0.0, 5000.0))
def test_a_slower_measurement_never_makes_a_route_look_quicker(
    before: list[float], one: float, other: float, pause_s: float
) -> None:
    def after(last_s: float) -> float:
        clock = Clock()
        costs = CostModel(clock=clock)
        for taken_s in before:
            move(costs, clock, taken_s)
        clock.now = 1e6 - last_s  # the last one ends at the same time, whatever it takes
        move(costs, clock, last_s)
        clock.now += pause_s
        return expect(costs).duration_s

    assert after(min(one, other)) <= after(max(one, other)) * (1 + 1e-9)


class Life(RuleBasedStateMachine):
    """Whatever happens, the books are bounded and right, and nothing is left in a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.costs = CostModel(clock=self.clock, chance=random.Random(1), max_peers=3)
        self.under_way: list[object] = []
        self.sizes = itertools.cycle([1, 4096, MIB, 1 << 33])

    @rule(name=st.sampled_from("abc"), peer=st.sampled_from(["", "p", "q", "r", "s", "t"]), part=st.integers(1, 8))
    def begin(self, name: str, peer: str, part: int) -> None:
        nbytes = next(self.sizes)
        self.under_way.append((self.costs.begin(route(name, peer), nbytes, nbytes * part), nbytes))

    @rule(
        which=st.integers(0, 99),
        outcome=st.sampled_from(["done", "short", None, MoveFailed("x"), Stale("y"), PeerLost("z")]),
    )
    def end(self, which: int, outcome: object) -> None:
        if self.under_way:
            metered, nbytes = self.under_way.pop(which % len(self.under_way))
            self.costs.end(metered, nbytes if outcome == "done" else nbytes + 1 if outcome == "short" else outcome)

    @rule(seconds=st.floats(0.0, 1000.0))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(peer=st.sampled_from(["", "p", "q"]))
    def lose(self, peer: str) -> None:
        self.costs.forget(peer)

    @invariant()
    def bounded(self) -> None:
        self.costs.check_invariants()
        assert len({row.peer for row in self.costs.listing()} - {""}) <= 3

    def teardown(self) -> None:
        for metered, _ in self.under_way:
            self.costs.end(metered, None)
        assert len(self.costs._pipes) == 0


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestLife.pytestmark = [pytest.mark.slow]
