"""Plans cover every byte once, in one space a leg, by the cheapest route that the pin allows."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument, MoveFailed, NoRoute
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.lists import CheckedList
from xferd.daemon.engine.planner import Planner
from xferd.plugins.base import (
    Backend,
    BackendStatistics,
    Chunk,
    FileSpace,
    MappedSpace,
    ObjectSpace,
    ObjectVersion,
    ProcessSpace,
    RemoteSpace,
    SlotClass,
    Space,
    SpaceKind,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.engine.plan import Route

M, P, F, R = SpaceKind.MAPPED, SpaceKind.PROCESS, SpaceKind.FILE, SpaceKind.REMOTE


class Mover(Backend):
    """Moves nothing; says what it could move and at which cost."""

    def __init__(self, pairs: set[tuple[SpaceKind, SpaceKind]], cost_s: float = 1.0) -> None:
        self._pairs, self._cost_s = frozenset(pairs), cost_s

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        return self._pairs

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        return self._cost_s

    def slots(self, source: Space, target: Space) -> int:
        return 3

    async def move(self, chunk: Chunk) -> int:
        raise NotImplementedError

    def statistics(self) -> BackendStatistics:
        return BackendStatistics()


LOCAL = Mover({(M, M), (M, P), (P, M)})
POSIX = Mover({(M, F), (F, M)})
TCP = Mover({(M, R), (R, M)})


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def took(costs: CostModel, clock: Clock, route: Route, seconds: float) -> None:
    metered = costs.begin(route, 1 << 20, 1 << 20)
    clock.now += seconds
    costs.end(metered, 1 << 20)


def planner(costs: CostModel | None = None, **backends: Backend) -> Planner:
    return Planner("n", backends, costs or CostModel(), chunk_nbytes=1 << 20, max_pieces=1024, staging_slots=2)


def checked(
    *rows: tuple[int, int], space: list[int] | None = None, spaces: tuple[Space, ...] = (MappedSpace(),), node: str = ""
) -> CheckedList:
    table = np.array(rows, dtype=np.uint64)
    region = np.full(len(rows), 7, dtype=np.uint64) if node else None
    return CheckedList(
        table[:, 0].copy(),
        table[:, 1].copy(),
        None if space is None else np.array(space, dtype=np.int32),
        spaces,
        region,
        (),
        node,
        1,
    )


def test_neighbours_are_merged_on_each_side_by_itself() -> None:
    plan = planner(local=LOCAL).plan(
        checked((4096, 100), (4196, 100), (9000, 56)), checked((0x10000, 128), (0x20000, 128))
    )
    (leg,) = plan.legs
    assert leg.source.iov.tolist() == [[4096, 200], [9000, 56]]
    assert leg.target.iov.tolist() == [[0x10000, 128], [0x20000, 128]]
    assert (plan.descriptors, plan.pieces, plan.total_nbytes, plan.chunks) == (5, 4, 256, 1)


def test_what_no_backend_reaches_goes_through_staging() -> None:
    made = planner(local=LOCAL, posix=POSIX, tcp=TCP)
    a_file = checked((0, 4096), spaces=(FileSpace(3, "/f"),))
    plan = made.plan(a_file, checked((0, 4096), spaces=(RemoteSpace("b", 1),), node="b"))
    (route,) = plan.legs[0].routes
    assert route.backends == ("posix", "tcp")
    assert route.slots == 2
    assert [(hop.source, hop.target) for hop in route.hops] == [("FILE@n", "staging@n"), ("staging@n", "regions@b")]
    assert made.plan(
        checked((4096, 10), spaces=(ProcessSpace(1, 2),)), checked((4096, 10), spaces=(ProcessSpace(3, 4),))
    ).legs[0].routes[0].backends == ("local", "local")


def test_classes_of_a_backend_have_slots_of_their_own_for_each_peer() -> None:
    class Sorting(Mover):
        def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
            return SlotClass("small", 1) if nbytes <= 4096 and pieces <= 2 else SlotClass("", 3)

    made = planner(tcp=Sorting({(M, R), (R, M)}))

    def route(node: str, *rows: tuple[int, int]) -> Route:
        there = checked(*rows, spaces=(RemoteSpace(node, 1),), node=node)
        return made.plan(checked((4096, there.total_nbytes)), there).legs[0].routes[0]

    small, bulk, scattered = route("b", (0, 4096)), route("b", (0, 4097)), route("b", (0, 8), (100, 8))
    assert (small.slot_key, small.slots) == (("tcp", "b/small"), 1)
    assert (bulk.slot_key, bulk.slots) == (("tcp", "b"), 3)
    assert (scattered.slot_key, scattered.slots) == (("tcp", "b"), 3)
    assert route("c", (0, 4096)).slot_key == ("tcp", "c/small")


def test_a_direct_route_is_never_staged_and_the_cheaper_one_is_first() -> None:
    clock = Clock()
    costs = CostModel(clock=clock)
    made = planner(costs, slow=Mover({(M, M)}, 2.0), quick=Mover({(M, M)}, 1.0))
    lists = checked((4096, 1 << 20)), checked((1 << 22, 1 << 20))
    assert [route.name for route in made.plan(*lists).legs[0].routes] == ["quick", "slow"]
    # What was measured beats what was assumed.
    took(costs, clock, made.plan(*lists).legs[0].routes[0], 3.0)
    plan = made.plan(*lists)
    assert [route.name for route in plan.legs[0].routes] == ["slow", "quick"]
    assert (made.estimate(plan).duration_s, made.estimate(plan).basis) == (pytest.approx(2.0), "assumed")
    took(costs, clock, plan.legs[0].routes[0], 2.5)
    assert made.estimate(made.plan(*lists)).basis == "measured"


def test_no_route_says_why_for_each_backend() -> None:
    with pytest.raises(NoRoute, match="cannot move file to remote") as caught:
        planner(tcp=TCP).plan(
            checked((0, 1), spaces=(FileSpace(3, "/f"),)), checked((0, 1), spaces=(RemoteSpace("b", 1),), node="b")
        )
    assert "tcp" in str(caught.value)


def test_a_pin_takes_one_route_that_has_it_or_says_why_not() -> None:
    made = planner(slow=Mover({(M, M)}, 2.0), quick=Mover({(M, M)}, 1.0), tcp=TCP)
    lists = checked((4096, 1 << 20)), checked((1 << 22, 1 << 20))
    plan = made.plan(*lists, pin="slow")
    assert [(route.name, route.pin) for route in plan.legs[0].routes] == [("slow", "slow")]
    assert plan.considered[0].startswith("slow: chosen, pinned: 2e+03 ms assumed")
    assert plan.considered[1] == "quick: not the pinned backend 'slow'"
    two_ways = planner(posix=POSIX, local=LOCAL, other=LOCAL)
    a_file, process = checked((0, 64), spaces=(FileSpace(3, "/f"),)), checked((4096, 64), spaces=(ProcessSpace(1, 2),))
    assert len(two_ways.plan(a_file, process).legs[0].routes) == 2
    plan = two_ways.plan(a_file, process, pin="posix")
    assert [route.name for route in plan.legs[0].routes] == ["posix+local"]
    assert "posix+other: not tried: the pin takes one route" in plan.considered
    with pytest.raises(InvalidArgument, match="no backend 'nonesuch'") as unknown:
        made.plan(*lists, pin="nonesuch")
    assert unknown.value.limit == "backends: slow, quick, tcp"
    with pytest.raises(NoRoute, match="by backend 'tcp'") as unable:
        made.plan(*lists, pin="tcp")
    assert "tcp: cannot move mapped to mapped" in str(unable.value)


def test_a_detour_is_offered_beside_a_direct_way_unless_they_share_a_backend_or_an_end_is_mapped() -> None:
    """As with a file that a device could read itself: the host's way is slower, and there when the other fails."""
    direct = Mover({(F, P)}, 1.0)
    lists = checked((0, 4096), spaces=(FileSpace(3, "/f"),)), checked((4096, 4096), spaces=(ProcessSpace(1, 2),))
    plan = planner(direct=direct, posix=POSIX, local=LOCAL).plan(*lists)
    assert [route.name for route in plan.legs[0].routes] == ["direct", "posix+local"]
    both = Mover({(F, P), (F, M)}, 1.0)
    plan = planner(both=both, local=LOCAL).plan(*lists)
    assert [route.name for route in plan.legs[0].routes] == ["both"]
    plan = planner(posix=POSIX, local=LOCAL).plan(checked((0, 64), spaces=(FileSpace(3, "/f"),)), checked((4096, 64)))
    assert [route.name for route in plan.legs[0].routes] == ["posix"]


def test_a_route_that_failed_is_last_in_the_next_plan_and_in_the_next_post_of_an_old_one() -> None:
    clock = Clock()
    costs = CostModel(clock=clock)
    made = planner(costs, slow=Mover({(M, M)}, 2.0), quick=Mover({(M, M)}, 1.0))
    lists = checked((4096, 1 << 20)), checked((1 << 22, 1 << 20))
    old = made.plan(*lists)
    assert made.reordered(old) is old
    costs.end(costs.begin(old.legs[0].routes[0], 1 << 20, 1 << 20), MoveFailed("broken"))
    assert [route.name for route in made.plan(*lists).legs[0].routes] == ["slow", "quick"]
    assert [route.name for route in made.reordered(old).legs[0].routes] == ["slow", "quick"]
    first, second = made.plan(*lists).considered
    assert first == "slow: chosen, quickest: 2e+03 ms assumed"
    assert second.startswith("quick: next if that fails: 1e+03 ms assumed; failed 1 x, last: move_failed: broken;")
    assert second.endswith("tried last for 1.0 s more")
    clock.now += 1.0
    assert [route.name for route in made.plan(*lists).legs[0].routes] == ["quick", "slow"]
    assert made.reordered(old) is old


def test_a_trial_is_made_only_where_bytes_will_move_and_keeps_the_others_to_fall_back_on() -> None:
    clock = Clock()
    costs = CostModel(clock=clock, chance=random.Random(0))
    made = planner(costs, used=Mover({(M, M)}, 1.0), unknown=Mover({(M, M)}, 1.5))
    lists = checked((4096, 1 << 20)), checked((1 << 22, 1 << 20))
    took(costs, clock, made.plan(*lists).legs[0].routes[0], 1.0)
    looks = [made.plan(*lists).legs[0].routes[0].name for _ in range(200)]
    assert set(looks) == {"used"}
    tries = [made.plan(*lists, explore=True) for _ in range(200)]
    trials = [plan for plan in tries if plan.legs[0].routes[0].name == "unknown"]
    assert len(trials) == 1, "one in an interval"
    assert [route.name for route in trials[0].legs[0].routes] == ["unknown", "used"]
    assert "not measured for long" in trials[0].considered[0]


class Broken(Mover):
    """A backend with a bug in what the planner asks of it."""

    def refusal(self, source: Space, target: Space) -> str:
        raise ZeroDivisionError("by zero")


def test_a_backend_that_cannot_even_be_asked_is_passed_over() -> None:
    made = planner(broken=Broken({(M, M)}), local=LOCAL, posix=POSIX)
    plan = made.plan(checked((4096, 64)), checked((1 << 22, 64)))
    assert [route.name for route in plan.legs[0].routes] == ["local"]
    assert "broken: cannot be asked: ZeroDivisionError: by zero" in plan.considered
    a_file = checked((0, 64), spaces=(FileSpace(3, "/f"),))
    process = checked((4096, 64), spaces=(ProcessSpace(1, 2),))
    assert [route.name for route in made.plan(a_file, process).legs[0].routes] == ["posix+local"]


@given(st.data())
def test_mixed_lists_become_at_most_one_leg_a_pair_of_spaces_and_no_byte_is_lost(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
    total = sum(sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=20)) & set(range(1, total)))
    other = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    spaces = (MappedSpace(), ProcessSpace(1, 2))

    def side(parts: list[int], base: int, n: int) -> CheckedList:
        rows = [(base + i * 10_000, size) for i, size in enumerate(parts)]
        which = data.draw(st.lists(st.integers(0, n - 1), min_size=len(parts), max_size=len(parts)))
        return checked(*rows, space=which, spaces=spaces[:n])

    source, target = side(sizes, 1 << 20, 2), side(other, 1 << 30, 1)
    plan = planner(local=LOCAL).plan(source, target)
    assert len(plan.legs) <= 2
    moved = 0
    seen: set[tuple[int, int]] = set()
    for leg in plan.legs:
        assert leg.source.nbytes == leg.target.nbytes == leg.cuts[-1]
        assert leg.cuts[0] == 0
        assert list(leg.cuts) == sorted(set(leg.cuts))
        moved += leg.cuts[-1]
        for position, nbytes in leg.target.iov.tolist():
            assert (position, nbytes) not in seen
            seen.add((position, nbytes))
    assert moved == total == plan.total_nbytes


OBJECTS = tuple(ObjectSpace("kv" if n < 5 else "other", f"k{n}", 100, ObjectVersion("e", 100)) for n in range(7))


class Counting(Mover):
    """Counts how often it is asked."""

    asked = 0

    def refusal(self, source: Space, target: Space) -> str:
        self.asked += 1
        return super().refusal(source, target)


@given(st.data())
def test_objects_of_a_store_are_read_in_one_leg_and_cut_between_objects(data: st.DataObject) -> None:
    """However rows alternate: every byte comes from its own object to its own place, a chunk cuts an object only where
    that object alone passes a limit, and routes are looked for once a store.
    """
    which = data.draw(st.lists(st.integers(0, len(OBJECTS) - 1), min_size=1, max_size=30))
    sizes = [data.draw(st.integers(1, 300)) for _ in which]
    rows = [(1000 * n, size) for n, size in enumerate(sizes)]
    source = checked(*rows, space=which, spaces=OBJECTS)
    total = sum(sizes)
    borders = sorted(data.draw(st.sets(st.integers(1, max(1, total - 1)), max_size=10)) & set(range(1, total)))
    places = [(1 << 20 | a * 8, b - a) for a, b in itertools.pairwise([0, *borders, total])]
    mover = Counting({(SpaceKind.OBJECT, M)})
    costs, chunk_nbytes, max_pieces = CostModel(), 256, 6
    made = Planner("here", {"object": mover}, costs, chunk_nbytes=chunk_nbytes, max_pieces=max_pieces, staging_slots=2)
    plan = made.plan(source, checked(*places))
    stores = {OBJECTS[n].store for n in which}
    assert len(plan.legs) == mover.asked == len(stores)
    expected = dict(zip(spread(rows, which), spread(places, [0] * len(places)), strict=True))
    found = {}
    for leg in plan.legs:
        members = [OBJECTS.index(m) for m in getattr(leg.source.space, "members", (leg.source.space,))]
        numbers = [0] * len(leg.source.iov) if leg.source.region is None else leg.source.region.tolist()
        from_ = spread(leg.source.iov.tolist(), [members[n] for n in numbers])
        found.update(zip(from_, spread(leg.target.iov.tolist(), [0] * len(leg.target.iov)), strict=True))
        runs = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        ends = np.cumsum(leg.source.iov[:, 1])
        for start, stop in itertools.pairwise(leg.cuts):
            chunk = leg.source.cut(start, stop), leg.target.cut(start, stop)
            assert stop - start <= chunk_nbytes
            assert max(len(extent.iov) for extent in chunk) <= max_pieces + 1
        if len(members) == 1:
            continue
        assert max(
            len(side.cut(*cut).iov) for cut in itertools.pairwise(leg.cuts) for side in (leg.source, leg.target)
        ) <= (max_pieces)
        for first, last in itertools.pairwise(runs):
            start, stop = int(ends[first - 1]) if first else 0, int(ends[last - 1])
            rows_of_it = max(last - first, len(leg.target.cut(start, stop).iov))
            if stop - start <= chunk_nbytes and rows_of_it < max_pieces:
                assert not [at for at in leg.cuts if start < at < stop], "an object that fits into a chunk was cut"
    assert found == expected


def test_a_chunk_has_as_many_whole_objects_as_fit() -> None:
    made = Planner(
        "here",
        {"object": Mover({(SpaceKind.OBJECT, M)})},
        CostModel(),
        chunk_nbytes=200,
        max_pieces=64,
        staging_slots=2,
    )
    (leg,) = made.plan(checked(*[(0, 100)] * 5, space=range(5), spaces=OBJECTS[:5]), checked((1 << 20, 500))).legs
    assert leg.cuts == (0, 200, 400, 500)


def test_objects_that_are_written_keep_a_leg_each_and_routes_are_weighed_once() -> None:
    """A write appears object by object; what it costs to plan does not grow with how many there are."""
    mover = Counting({(M, SpaceKind.OBJECT)})
    made = Planner("here", {"object": mover}, CostModel(), chunk_nbytes=4096, max_pieces=64, staging_slots=2)
    rows = [(0, 100)] * 5
    plan = made.plan(checked((1 << 20, 500)), checked(*rows, space=range(5), spaces=OBJECTS[:5]))
    assert [leg.target.space for leg in plan.legs] == list(OBJECTS[:5])
    assert mover.asked == 1
    assert len(plan.considered) == 1


def spread(rows: Sequence[Sequence[int]], which: Sequence[int]) -> list[tuple[int, int]]:
    """Return each byte of rows in order: of which space, and where in it."""
    return [(space, at + n) for (at, nbytes), space in zip(rows, which, strict=True) for n in range(nbytes)]


def test_a_backend_with_limits_of_its_own_gets_chunks_of_them_where_it_moves_alone() -> None:
    class Quick(Mover):
        def chunk_limits(self, source: Space, target: Space) -> tuple[int, int] | None:
            return 4 << 20, 1 << 20

    quick = Quick({(M, M), (M, R), (R, M)}, cost_s=0.5)
    (leg,) = planner(quick=quick).plan(checked((0, 10 << 20)), checked((1 << 30, 10 << 20))).legs
    assert leg.cuts == (0, 4 << 20, 8 << 20, 10 << 20)
    staged = planner(posix=POSIX, quick=quick).plan(
        checked((0, 4 << 20), spaces=(FileSpace(3, "/f"),)),
        checked((0, 4 << 20), spaces=(RemoteSpace("b", 1),), node="b"),
    )
    back = planner(posix=POSIX, quick=quick).plan(
        checked((0, 4 << 20), spaces=(RemoteSpace("b", 1),), node="b"),
        checked((0, 4 << 20), spaces=(FileSpace(3, "/f"),)),
    )
    assert [made.legs[0].routes[0].backends for made in (staged, back)] == [("posix", "quick"), ("quick", "posix")]
    assert back.legs[0].cuts == staged.legs[0].cuts
    assert staged.legs[0].routes[0].is_staged
    assert staged.legs[0].cuts == (0, 1 << 20, 2 << 20, 3 << 20, 4 << 20), "staging slots have the daemon's chunk size"
