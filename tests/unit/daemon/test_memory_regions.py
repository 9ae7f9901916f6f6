"""The region table: ids are never good twice, spans stay inside, rights hold, and nothing held goes away."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import (
    Busy,
    Closed,
    InvalidArgument,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    Stale,
    XferdError,
)
from xferd.api.types import Access, RegionId, RegionInfo, RegionQuery, RegionSource, SessionId
from xferd.daemon.memory.backing import Backing
from xferd.daemon.memory.regions import LocalActor, PeerActor, RegionTable
from xferd.plugins.base import FileSpace, MappedSpace, ProcessSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.plugins.base import Space

ALICE, BOB = SessionId("s-alice"), SessionId("s-bob")
OWNER, OTHER, PEER = LocalActor(ALICE), LocalActor(BOB), PeerActor("node-b")
ANY = RegionQuery()


class Span(Backing):
    """A backing with nothing behind it."""

    source = RegionSource.POOL

    def __init__(self, position: int = 0, space: Space | None = None) -> None:
        self.position = position
        self.space = space or MappedSpace()

    def _close(self) -> None:
        pass


@pytest.fixture
def table() -> Iterator[RegionTable]:
    made = RegionTable("node-a", 7, 128, first_generation=1)
    yield made
    made.check_invariants()


def add(
    table: RegionTable,
    nbytes: int = 4096,
    position: int = 0x10000,
    *,
    owner: SessionId = ALICE,
    access: Access = Access.NONE,
    writable: bool = True,
    space: Space | None = None,
    label: str = "",
) -> RegionInfo:
    return table.add(
        owner, f"agent-{owner}", Span(position, space), nbytes, access=access, label=label, writable=writable
    )


def rows(*spans: tuple[int, int, int]) -> DescriptorList:
    return DescriptorList.from_columns(*(np.array(column, dtype=np.uint64) for column in zip(*spans, strict=True)))


# ------------------------------------------------------------------------------------------------ ids


def test_a_removed_region_is_stale_and_its_slot_gets_another_id(table: RegionTable) -> None:
    first = add(table)
    table.remove(ALICE, [first.id])
    second = add(table)
    assert second.id & 0xFFFF_FFFF == first.id & 0xFFFF_FFFF
    assert second.id >> 32 > first.id >> 32
    for look in (table.info, lambda region: table.resolve(rows((region, 0, 1)))):
        with pytest.raises(Stale, match=str(first.id)):
            look(first.id)
    assert table.info(second.id) == second


@pytest.mark.parametrize("region", [0, 1, 9, 1 << 32 | 77, (1 << 64) - 1, -1, 1 << 70])
def test_an_id_that_never_was_is_not_found(table: RegionTable, region: int) -> None:
    add(table)
    with pytest.raises(NotFound, match=str(region)):
        table.info(RegionId(region))
    with pytest.raises(NotFound):
        table.hold([RegionId(region)], "t", "test", OWNER, write=False)
    with pytest.raises(NotFound):
        table.remove(ALICE, [RegionId(region)])


def test_generations_start_at_random() -> None:
    starts = {add(RegionTable("n", 1, 8)).id >> 32 for _ in range(8)}
    assert len(starts) > 1
    assert all(0 < start <= 1 << 31 for start in starts)


def test_generations_wrap_past_0() -> None:
    table = RegionTable("n", 1, 8, first_generation=(1 << 32) - 1)
    assert [add(table).id >> 32 for _ in range(3)] == [(1 << 32) - 1, 1, 2]
    table.check_invariants()


def test_the_table_is_bounded_and_a_group_enters_whole_or_not_at_all() -> None:
    table = RegionTable("n", 1, 3)
    add(table)
    with pytest.raises(Overloaded, match="3 more regions") as caught:
        table.add_group(ALICE, "a", [(Span(), 1)] * 3)
    assert "limits.max_regions" in caught.value.remedy
    assert len(table) == 1
    assert len(table.add_group(ALICE, "a", [(Span(), 1)] * 2)) == 2
    assert table.add_group(ALICE, "a", []) == ()


@pytest.mark.parametrize(("nbytes", "position"), [(0, 0), (-1, 0), (2, (1 << 64) - 1)])
def test_an_impossible_span_is_refused(table: RegionTable, nbytes: int, position: int) -> None:
    with pytest.raises(InvalidArgument):
        add(table, nbytes, position)
    assert len(table) == 0


# -------------------------------------------------------------------------------------------- resolving


def test_resolving_one_region(table: RegionTable) -> None:
    region = add(table, 100, 1000).id
    found = table.resolve(rows((region, 0, 100), (region, 99, 1)))
    assert found.position.tolist() == [1000, 1099]
    assert found.nbytes.tolist() == [100, 1]
    assert found.space is None
    assert found.spaces == (MappedSpace(),)
    assert found.regions == (region,)


def test_resolving_several_spaces(table: RegionTable) -> None:
    file, process = FileSpace(9, "/f"), ProcessSpace(5, 6)
    plain = add(table, 10, 1000).id
    on_file = add(table, 10, 0, space=file).id
    table.remove(ALICE, [add(table).id])
    private = add(table, 10, 500, space=process).id
    found = table.resolve(rows((private, 1, 1), (plain, 2, 1), (on_file, 3, 1), (private, 4, 1)))
    assert found.position.tolist() == [501, 1002, 3, 504]
    assert found.space is not None
    assert [found.spaces[number] for number in found.space] == [process, MappedSpace(), file, process]
    assert set(found.regions) == {plain, on_file, private}
    assert table.resolve(rows((plain, 0, 1), (add(table).id, 0, 1))).space is None


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(100, 1), (99, 2), (0, 101), (1 << 63, 1), ((1 << 64) - 2, 1), (1, (1 << 64) - 2)]
)
@pytest.mark.parametrize("others", [0, 1])
def test_a_span_past_its_region_names_row_region_and_limit(
    table: RegionTable, offset: int, nbytes: int, others: int
) -> None:
    region, other = add(table, 100).id, add(table, 1 << 40).id
    good = [(other, 4096, 4096)] * others + [(region, 0, 1)]
    with pytest.raises(OutOfBounds) as caught:
        table.resolve(rows(*good, (region, offset, nbytes)))
    assert f"descriptor {len(good)} (offset {offset}, nbytes {nbytes})" in caught.value.message
    assert str(region) in caught.value.message
    assert caught.value.limit == "100 bytes"


def test_a_missing_region_among_good_ones_is_named_with_its_row(table: RegionTable) -> None:
    good, gone, unknown = add(table).id, add(table).id, RegionId(1 << 32 | 100)
    add(table)
    table.remove(ALICE, [gone])
    with pytest.raises(Stale, match=f"descriptor 1: region {gone}"):
        table.resolve(rows((good, 0, 1), (gone, 0, 1)))
    with pytest.raises(NotFound, match=f"descriptor 1: no region {unknown}"):
        table.resolve(rows((good, 0, 1), (unknown, 0, 1)))
    with pytest.raises(NotFound, match="descriptor 0"):
        table.resolve(rows((unknown, 0, 1), (gone, 0, 1)))
    with pytest.raises(NotFound, match="descriptor 0"):
        table.resolve(rows((unknown, 0, 1)))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_resolving_agrees_with_a_loop_over_rows(data: st.DataObject) -> None:
    table = RegionTable("n", 1, 16, first_generation=5)
    spaces: list[Space] = [MappedSpace(), FileSpace(3, "/f"), ProcessSpace(1, 2)]
    specs = data.draw(
        st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90), st.sampled_from(spaces)), min_size=1, max_size=9)
    )
    infos = [add(table, nbytes, position, space=space) for nbytes, position, space in specs]
    removed = data.draw(st.sets(st.sampled_from(range(len(infos)))))
    table.remove(ALICE, [infos[number].id for number in removed])
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, len(infos)), st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=12)
    )
    ids = [info.id for info in infos] + [RegionId(5 << 32 | 99)]
    expected: list[tuple[int, int, Space]] = []
    failure: type[XferdError] | None = None
    missing = [Stale if n in removed else NotFound for n, _, _ in spans if n in removed or n == len(infos)]
    if missing:
        failure = missing[0]
    elif any(offset + nbytes > specs[n][0] for n, offset, nbytes in spans):
        failure = OutOfBounds
    else:
        expected = [(specs[n][1] + offset, nbytes, specs[n][2]) for n, offset, nbytes in spans]
    descriptors = rows(*((ids[n], offset, nbytes) for n, offset, nbytes in spans))
    if failure is not None:
        with pytest.raises(failure):
            table.resolve(descriptors)
    else:
        found = table.resolve(descriptors)
        numbers = [0] * len(spans) if found.space is None else found.space.tolist()
        got = zip(found.position.tolist(), found.nbytes.tolist(), (found.spaces[n] for n in numbers), strict=True)
        assert list(got) == expected
        assert set(found.regions) == {ids[n] for n, _, _ in spans}
        assert len(set(found.spaces)) == len(found.spaces)
    table.check_invariants()


# ----------------------------------------------------------------------------------------- rights and holds


@pytest.mark.parametrize("access", [Access.NONE, Access.READ, Access.WRITE, Access.READ_WRITE])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("actor", [OWNER, OTHER, PEER])
def test_rights(table: RegionTable, access: Access, writable: bool, write: bool, actor: LocalActor | PeerActor) -> None:
    region = add(table, access=access, writable=writable).id
    needed = Access.WRITE if write else Access.READ
    allowed = (writable or not write) and (actor == OWNER or needed in access)
    if allowed:
        table.hold([region], "t", "test", actor, write=write)
        assert table.holders(region) == ("t",)
    else:
        with pytest.raises(PermissionDenied) as caught:
            table.hold([region], "t", "test", actor, write=write)
        assert caught.value.remedy
        assert caught.value.limit
        assert table.holders(region) == ()


def test_a_hold_is_all_or_none(table: RegionTable) -> None:
    mine, foreign = add(table).id, add(table, owner=BOB).id
    with pytest.raises(PermissionDenied, match=f"region {foreign} of agent agent-s-bob does not grant READ"):
        table.hold([mine, foreign], "t", "test", OWNER, write=False)
    gone = add(table).id
    table.remove(ALICE, [gone])
    with pytest.raises(Stale):
        table.hold([mine, gone], "t", "test", OWNER, write=False)
    assert table.holders(mine) == ()
    table.remove(ALICE, [mine])


def test_a_held_region_cannot_be_removed_and_the_group_stays(table: RegionTable) -> None:
    held, free = add(table).id, add(table).id
    table.hold([held, held], "transfer t1", "moves", OWNER, write=True)
    table.hold([held], "transfer t1", "moves more", OWNER, write=False)
    table.hold([held], "transfer t2", "moves", OWNER, write=False)
    with pytest.raises(Busy, match="transfer t1, transfer t2"):
        table.remove(ALICE, [free, held])
    assert len(table.owned_by(ALICE)) == 2
    table.release("transfer t1")
    table.release("transfer t1")
    assert table.holders(held) == ("transfer t2",)
    table.release("transfer t2")
    table.release("nobody")
    assert table.holds() == []
    assert len(table.remove(ALICE, [held, free, held])) == 2


def test_only_the_owner_removes(table: RegionTable) -> None:
    mine, foreign = add(table).id, add(table, owner=BOB, access=Access.READ_WRITE).id
    with pytest.raises(PermissionDenied, match="agent-s-bob"):
        table.remove(ALICE, [mine, foreign])
    assert len(table) == 2


def test_what_was_held_is_held_again_without_a_look(table: RegionTable) -> None:
    one, *more = (add(table).id for _ in range(4))
    table.hold([one], "t", "moves", OWNER, write=False)
    table.hold(more, "t", "moves", OWNER, write=True)
    standing = table.standing("t")
    table.release("t")
    add(table)  # what is new takes nothing away
    assert table.hold_again(standing)
    with pytest.raises(Busy, match="held by t"):
        table.remove(ALICE, more[:1])
    table.check_invariants()
    table.release("t")
    table.remove(ALICE, [one, *more])


def test_what_is_held_again_counts_beside_others_and_since_now() -> None:
    now = 5.0
    table = RegionTable("n", 1, 8, clock=lambda: now)
    held = add(table).id
    table.hold([held], "t1", "moves", OWNER, write=False)
    standing = table.standing("t1")
    table.hold([held], "t2", "moves", OWNER, write=False)
    table.release("t1")
    now = 7.0
    assert table.hold_again(standing)
    assert [(hold.owner, hold.since) for hold in table.holds()] == [("t2", 5.0), ("t1", 7.0)]
    table.release("t1")
    with pytest.raises(Busy, match="held by t2"):
        table.remove(ALICE, [held])
    table.check_invariants()


@pytest.mark.parametrize("change", ["freed", "given", "retired"])
def test_what_has_changed_is_not_held_again(table: RegionTable, change: str) -> None:
    held, other = add(table).id, add(table).id
    table.hold([held], "t", "moves", OWNER, write=True)
    standing = table.standing("t")
    table.release("t")
    match change:
        case "freed":
            table.remove(ALICE, [held])
        case "given":
            table.move([held], BOB)
        case _:
            table.retire(ALICE)
    assert not table.hold_again(standing)
    assert table.holders(other) == table.holders(held) == ()


def test_holds_and_registrations_are_listed() -> None:
    table = RegionTable("n", 1, 8, clock=lambda: 12.5)
    ids = [add(table).id for _ in range(6)]
    table.hold(ids, "transfer t1", "transfer of agent a", OWNER, write=False)
    (hold,) = table.holds()
    assert (hold.owner, hold.reason, hold.since) == ("transfer t1", "transfer of agent a", 12.5)
    assert hold.what.endswith("and 2 more")
    assert [entry.owner for entry in table.registrations()] == [ALICE] * 6


def test_who_sees_what(table: RegionTable) -> None:
    private = add(table)
    shared = add(table, access=Access.READ, label="kv")
    foreign = add(table, owner=BOB, access=Access.WRITE)
    assert set(table.visible(OWNER, ANY)) == {private, shared, foreign}
    assert set(table.visible(OTHER, ANY)) == {shared, foreign}
    assert set(table.visible(PEER, ANY)) == {shared, foreign}
    assert set(table.visible(None, ANY)) == {private, shared, foreign}
    assert table.visible(PEER, RegionQuery(label="kv")) == (shared,)
    assert table.visible(PEER, RegionQuery(agent="agent-s-bob")) == (foreign,)
    assert table.visible(PEER, RegionQuery(regions=(private.id, shared.id, RegionId(3)))) == (shared,)
    table.retire(BOB)
    assert table.visible(PEER, ANY) == (shared,)
    assert foreign in table.visible(None, ANY)


# ------------------------------------------------------------------------------------------- a session's end


async def test_a_sessions_end_waits_for_holds_that_end_on_another_thread(table: RegionTable) -> None:
    region = add(table, access=Access.READ).id
    other = add(table, owner=BOB).id
    table.hold([region], "lane", "serving node-b", PEER, write=False)
    table.hold([other], "unrelated", "test", OTHER, write=False)
    table.retire(ALICE)
    assert table.holders_of(ALICE) == ("lane",)
    with pytest.raises(Stale, match="session ends"):
        table.hold([region], "late", "test", PEER, write=False)
    with pytest.raises(Closed):
        add(table)
    with pytest.raises(Busy, match="lane"):
        table.remove_retired(ALICE)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = [group.create_task(table.wait_idle(ALICE), name=f"waiter {n}") for n in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        thread = threading.Thread(target=table.release, args=("lane",))
        thread.start()
    thread.join()
    assert len(table.remove_retired(ALICE)) == 1
    with pytest.raises(Stale):
        table.info(region)
    with pytest.raises(Closed):  # a registration that was under way when the session ended
        add(table)
    assert table.remove_retired(ALICE) == []
    table.release("unrelated")


async def test_a_cancelled_wait_leaves_nothing_behind(table: RegionTable) -> None:
    region = add(table).id
    table.hold([region], "t", "test", OWNER, write=False)
    waiting = asyncio.ensure_future(table.wait_idle(ALICE))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not table._owned[ALICE].waiters
    table.release("t")
    await table.wait_idle(ALICE)
    await table.wait_idle(SessionId("unknown"))


def test_a_live_session_is_not_taken_out(table: RegionTable) -> None:
    add(table)
    with pytest.raises(Busy, match="retire it first"):
        table.remove_retired(ALICE)


@pytest.mark.slow
def test_threads_that_hold_and_an_owner_that_frees_never_disagree() -> None:
    """Holds, releases, resolves and removals from several threads leave the books right."""
    table = RegionTable("n", 1, 64)
    shared = [add(table, access=Access.READ_WRITE).id for _ in range(16)]

    def lane(number: int) -> None:
        rng = np.random.default_rng(number)
        for turn in range(300):
            region = shared[int(rng.integers(len(shared)))]
            try:
                table.hold([region], f"lane {number}", "test", PEER, write=bool(turn % 2))
                table.resolve(rows((region, 0, 4096)))  # held, so it must be there
            except Stale:
                assert f"lane {number}" not in {hold.owner for hold in table.holds()}
            finally:
                table.release(f"lane {number}")

    with ThreadPoolExecutor(4) as lanes:
        running = [lanes.submit(lane, number) for number in range(4)]
        for turn in range(300):
            slot = turn % len(shared)
            try:
                table.remove(ALICE, [shared[slot]])
            except Busy:
                continue
            shared[slot] = add(table, access=Access.READ_WRITE).id
        for future in running:
            future.result()
    assert table.holds() == []
    table.check_invariants()
