"""Handing regions over is a change of owner: all of it or nothing, and nothing but the owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xferd.api.errors import (
    AgentUnknown,
    Busy,
    Closed,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    Stale,
    Unauthenticated,
    Unsupported,
)
from xferd.api.types import (
    Access,
    Caller,
    HandOverRequest,
    Notification,
    RegionId,
    RegionInfo,
    RegionQuery,
    RegionSource,
    SessionId,
)
from xferd.daemon.engine.notifications import Inboxes
from xferd.daemon.memory.backing import Backing
from xferd.daemon.memory.handover import HandOverDesk
from xferd.daemon.memory.regions import LocalActor, PeerActor, RegionTable

if TYPE_CHECKING:
    from collections.abc import Iterator

ALICE, BOB, CAROL = SessionId("alice"), SessionId("bob"), SessionId("carol")
SESSIONS = (ALICE, BOB, CAROL)
EVERYTHING = RegionQuery()
OPERATOR = Caller(None, "admin", admin=True)


class Span(Backing):
    """Memory with nothing behind it, which outlives its client or not."""

    source = RegionSource.POOL

    def __init__(self, *, outlives_client: bool = True) -> None:
        self.outlives_client = outlives_client

    def _close(self) -> None: ...


@pytest.fixture
def table() -> Iterator[RegionTable]:
    made = RegionTable("node-a", 7, 128, first_generation=1)
    yield made
    made.check_invariants()


@pytest.fixture
def inboxes() -> Inboxes:
    made = Inboxes("node-a", max_nbytes=400, max_payload_nbytes=200)
    for session in SESSIONS:
        made.open(session)
    return made


@pytest.fixture
def desk(table: RegionTable, inboxes: Inboxes) -> HandOverDesk:
    """A desk where agents and sessions have the same names."""
    return HandOverDesk("node-a", 7, table, inboxes, {s: s for s in SESSIONS}.get, max_group=4)


def add(
    table: RegionTable,
    owner: SessionId = ALICE,
    *,
    access: Access = Access.NONE,
    writable: bool = True,
    outlives_client: bool = True,
) -> RegionInfo:
    backing = Span(outlives_client=outlives_client)
    return table.add(owner, owner, backing, 4096, access=access, label="kv", writable=writable)


def request(*infos: RegionInfo, to: str = BOB, access: Access | None = None, payload: bytes = b"") -> HandOverRequest:
    return HandOverRequest(tuple(info.id for info in infos), to, payload, access)


async def inbox(inboxes: Inboxes, agent: str) -> list[Notification]:
    return await inboxes.take(agent, 100, 0.0)


# ------------------------------------------------------------------------------------------- the table


def test_only_owner_agent_and_rights_change(table: RegionTable) -> None:
    before = add(table)
    (after,) = table.hand_over([before.id], ALICE, BOB, BOB)
    assert (after.agent, after.id, after.nbytes, after.label) == (BOB, before.id, 4096, "kv")
    assert table.info(before.id) == after
    assert (table.owned_by(ALICE), table.owned_by(BOB)) == ((), (after,))
    assert ALICE not in table._owned, "one who owns nothing is not kept"
    table.hold([before.id], "b", "test", LocalActor(BOB), write=True)
    table.release("b")
    with pytest.raises(PermissionDenied, match="does not grant READ"):
        table.hold([before.id], "a", "test", LocalActor(ALICE), write=False)
    with pytest.raises(PermissionDenied, match="of agent bob"):
        table.remove(ALICE, [before.id])
    assert len(table.remove(BOB, [before.id])) == 1


def test_the_giver_keeps_what_the_new_access_grants_and_a_read_only_region_stays_so(table: RegionTable) -> None:
    shared, fixed = add(table), add(table, writable=False, access=Access.READ)
    table.hand_over([shared.id, fixed.id], ALICE, BOB, BOB, access=Access.READ_WRITE)
    for actor in (LocalActor(ALICE), LocalActor(BOB), PeerActor("node-b")):
        table.hold([shared.id], "t", "test", actor, write=True)
        table.hold([fixed.id], "t", "test", actor, write=False)
        with pytest.raises(PermissionDenied, match="read-only"):
            table.hold([fixed.id], "t", "test", actor, write=True)
        table.release("t")
    table.hand_over([shared.id], BOB, CAROL, CAROL, access=Access.NONE)
    with pytest.raises(PermissionDenied):
        table.hold([shared.id], "t", "test", PeerActor("node-b"), write=False)


def test_they_end_with_their_new_owner_and_not_with_the_giver(table: RegionTable) -> None:
    given, kept = add(table), add(table)
    table.hand_over([given.id], ALICE, BOB, BOB)
    table.retire(ALICE)
    assert len(table.remove_retired(ALICE)) == 1
    with pytest.raises(Stale):
        table.info(kept.id)
    assert table.info(given.id).agent == BOB
    table.retire(BOB)
    assert len(table.remove_retired(BOB)) == 1
    assert len(table) == 0


@pytest.mark.parametrize("access", [None, Access.READ])
def test_one_that_may_not_be_given_keeps_all_where_they_are(table: RegionTable, access: Access | None) -> None:
    good, private, held = add(table), add(table, outlives_client=False), add(table, access=Access.READ)
    foreign = add(table, CAROL)
    table.hold([held.id], "transfer t1", "test", PeerActor("node-b"), write=False)
    before = table.visible(None, EVERYTHING)
    for bad, error, named in (
        (private.id, Unsupported, "POOL memory of agent alice"),
        (held.id, Busy, "transfer t1"),
        (foreign.id, PermissionDenied, "of agent carol"),
        (RegionId(99), NotFound, "99"),
    ):
        with pytest.raises(error, match=named) as caught:
            table.hand_over([good.id, bad], ALICE, BOB, BOB, access=access)
        assert caught.value.remedy
        assert table.visible(None, EVERYTHING) == before
    table.release("transfer t1")


def test_a_session_that_ends_neither_gives_nor_takes(table: RegionTable) -> None:
    mine = add(table)
    table.retire(BOB)
    with pytest.raises(Closed):
        table.hand_over([mine.id], ALICE, BOB, BOB)
    table.remove_retired(BOB)
    with pytest.raises(Closed):
        table.hand_over([mine.id], ALICE, BOB, BOB)
    table.retire(ALICE)
    with pytest.raises(Stale, match="session ends"):
        table.hand_over([mine.id], ALICE, CAROL, CAROL)


def test_what_announcing_raises_leaves_all_as_it_was(table: RegionTable) -> None:
    mine = add(table)

    def full(infos: tuple[RegionInfo, ...]) -> None:
        assert [info.agent for info in infos] == [BOB]
        raise Overloaded("full")

    with pytest.raises(Overloaded):
        table.hand_over([mine.id], ALICE, BOB, BOB, access=Access.READ, announce=full)
    assert table.info(mine.id) == mine
    assert table.owned_by(ALICE) == (mine,)


# ------------------------------------------------------------------------------------------- the desk


async def test_the_new_owner_is_told_which_and_by_whom(
    table: RegionTable, inboxes: Inboxes, desk: HandOverDesk
) -> None:
    first, second = add(table), add(table)
    listing = desk.hand_over(Caller(ALICE, ALICE), request(second, first, second, to="bob@node-a", payload=b"layer 3"))
    assert [info.id for info in listing.regions] == [second.id, first.id]
    (told,) = await inbox(inboxes, BOB)
    assert told == Notification("bob@node-a", b"layer 3", "alice@node-a", "", (second.id, first.id))
    assert (desk.given_regions, desk.given_nbytes) == (2, 8192)


async def test_a_full_inbox_keeps_the_regions_with_the_giver(
    table: RegionTable, inboxes: Inboxes, desk: HandOverDesk
) -> None:
    mine = add(table)
    inboxes.deliver(BOB, Notification(BOB, bytes(200)))
    with pytest.raises(Overloaded, match="inbox of agent 'bob'"):
        desk.hand_over(Caller(ALICE, ALICE), request(mine, payload=bytes(80)))
    assert table.owned_by(ALICE) == (mine,)
    with pytest.raises(Overloaded):  # by one byte: the ids take room as well
        desk.hand_over(Caller(ALICE, ALICE), request(mine, payload=bytes(65)))
    desk.hand_over(Caller(ALICE, ALICE), request(mine, payload=bytes(64)))  # 264 + 64 + 64 + 8 = 400: just fits
    assert len(await inbox(inboxes, BOB)) == 2
    inboxes.deliver(BOB, Notification(BOB, bytes(200)))
    inboxes.deliver(BOB, Notification(BOB, bytes(200 - 128)))  # all room came back, that of the ids too


def test_who_may_give_what_to_whom(table: RegionTable, desk: HandOverDesk) -> None:
    mine = add(table)
    alice = Caller(ALICE, ALICE)
    for wrong, error, named in (
        (request(mine, to="nobody"), AgentUnknown, "nobody"),
        (request(mine, to="bob@node-b"), Unsupported, "node-b"),
        (request(mine, to=""), InvalidArgument, "no agent"),
        (request(mine, to=ALICE), InvalidArgument, "itself"),
        (request(), InvalidArgument, "no region"),
        (HandOverRequest((mine.id,) * 5, BOB), LimitExceeded, "max_group"),
        (request(mine, payload=bytes(201)), LimitExceeded, "max_notification"),
    ):
        with pytest.raises(error, match=named) as caught:
            desk.hand_over(alice, wrong)
        assert caught.value.remedy
    with pytest.raises(Unauthenticated):
        desk.hand_over(Caller(None, "x"), request(mine))
    assert table.owned_by(ALICE) == (mine,)
    desk.hand_over(OPERATOR, request(mine, add(table, CAROL)))
    assert len(table.owned_by(BOB)) == 2


# ------------------------------------------------------------------------------------------- any order


class HandOvers(RuleBasedStateMachine):
    """Regions that are made, given, held, freed and lost with their sessions are always where a model says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RegionTable("n", 1, 64, first_generation=5)
        self.owner: dict[RegionId, SessionId] = {}
        self.held: dict[RegionId, str] = {}
        self.sessions = dict.fromkeys(SESSIONS, 0)

    def name(self, session: SessionId) -> SessionId:
        return SessionId(f"{session}{self.sessions[session]}")

    @rule(session=st.sampled_from(SESSIONS), access=st.sampled_from(Access))
    def make(self, session: SessionId, access: Access) -> None:
        self.owner[add(self.table, self.name(session), access=access).id] = self.name(session)

    @precondition(lambda self: self.owner)
    @rule(data=st.data(), giver=st.sampled_from(SESSIONS), taker=st.sampled_from(SESSIONS), fails=st.booleans())
    def give(self, data: st.DataObject, giver: SessionId, taker: SessionId, fails: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.owner)), min_size=1, max_size=4))
        mine = all(self.owner[region] == self.name(giver) for region in ids)

        def announce(_: object) -> None:
            if fails:
                raise Overloaded("full")

        def attempt() -> None:
            self.table.hand_over(ids, self.name(giver), self.name(taker), taker, announce=announce)

        if fails or not mine or any(region in self.held for region in ids):
            with pytest.raises((Overloaded, PermissionDenied, Busy)):
                attempt()
        else:
            attempt()
            self.owner.update(dict.fromkeys(ids, self.name(taker)))

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        region = data.draw(st.sampled_from(sorted(self.owner)))
        self.table.hold([region], f"t{region}", "test", LocalActor(self.owner[region]), write=True)
        self.held[region] = f"t{region}"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.table.release(self.held.pop(data.draw(st.sampled_from(sorted(self.held)))))

    @rule(session=st.sampled_from(SESSIONS))
    def end(self, session: SessionId) -> None:
        name = self.name(session)
        mine = {region for region, owner in self.owner.items() if owner == name}
        self.table.retire(name)
        for region in mine & set(self.held):
            self.table.release(self.held.pop(region))
        assert len(self.table.remove_retired(name)) == len(mine)
        self.owner = {region: owner for region, owner in self.owner.items() if owner != name}
        self.sessions[session] += 1

    @invariant()
    def agrees(self) -> None:
        self.table.check_invariants()
        for session in SESSIONS:
            found = {info.id for info in self.table.owned_by(self.name(session))}
            assert found == {region for region, owner in self.owner.items() if owner == self.name(session)}


TestHandOvers = HandOvers.TestCase
TestHandOvers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestHandOvers.pytestmark = [pytest.mark.slow]
