"""Plans cover every byte once, in one space a leg, by the cheapest route that the pin allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xferd.api.errors import NoRoute
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.lists import CheckedList
from xferd.daemon.engine.planner import Planner
from xferd.plugins.base import (
    Backend,
    BackendStatistics,
    Chunk,
    FileSpace,
    MappedSpace,
    ProcessSpace,
    RemoteSpace,
    Space,
    SpaceKind,
)

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


def test_a_direct_route_is_never_staged_and_the_cheaper_one_is_first() -> None:
    costs = CostModel()
    made = planner(costs, slow=Mover({(M, M)}, 2.0), quick=Mover({(M, M)}, 1.0))
    lists = checked((4096, 1 << 20)), checked((1 << 22, 1 << 20))
    assert [route.name for route in made.plan(*lists).legs[0].routes] == ["quick", "slow"]
    # What was measured beats what was assumed.
    costs.observe("quick", MappedSpace(), MappedSpace(), 1 << 20, 3.0)
    plan = made.plan(*lists)
    assert [route.name for route in plan.legs[0].routes] == ["slow", "quick"]
    assert made.estimate(plan).duration_s == pytest.approx(2.0)
    assert [route.name for route in made.plan(*lists, pin="quick").legs[0].routes] == ["quick"]


def test_no_route_says_why_for_each_backend() -> None:
    with pytest.raises(NoRoute, match="cannot move file to remote") as caught:
        planner(tcp=TCP).plan(
            checked((0, 1), spaces=(FileSpace(3, "/f"),)), checked((0, 1), spaces=(RemoteSpace("b", 1),), node="b")
        )
    assert "tcp" in str(caught.value)
    with pytest.raises(NoRoute, match="nonesuch"):
        planner(local=LOCAL).plan(checked((4096, 1)), checked((8192, 1)), pin="nonesuch")


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
