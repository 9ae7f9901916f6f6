"""The states of peers follow what happens, in any order that it may happen."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from xferd.api.types import MemoryKind, NodeInfo, PeerState
from xferd.daemon.peers.regions import RemoteRegions
from xferd.daemon.peers.table import MAX_GONE, PeerTable
from xferd.plugins.base import PeerIdentity, PeerLinkStatistics


def record(name: str, epoch: int = 1, draining: bool = False) -> NodeInfo:
    return NodeInfo(
        name=name,
        id=f"{name}-{epoch}",
        epoch=epoch,
        version="0",
        addresses=("tcp://x",),
        backends=(),
        kinds=(MemoryKind.DRAM,),
        agents=(),
        started_at=0.0,
        draining=draining,
    )


def identity(name: str, epoch: int = 1) -> PeerIdentity:
    return PeerIdentity(name, f"{name}-{epoch}", epoch)


def link(_: str) -> PeerLinkStatistics:
    return PeerLinkStatistics(2, 30, 40)


@pytest.fixture
def table() -> PeerTable:
    ticks = itertools.count(100)
    return PeerTable(lambda: float(next(ticks)))


def state(table: PeerTable, name: str = "b") -> tuple[PeerState, str]:
    table.check_invariants()
    (found,) = [info for info in table.listing(link) if info.node.name == name]
    return found.state, found.reason


def test_a_life(table: PeerTable) -> None:
    table.recorded(record("b"))
    assert state(table) == (PeerState.UNKNOWN, "")
    table.connecting("b")
    assert state(table) == (PeerState.JOINING, "connecting")
    table.connected(identity("b"), "tcp://x")
    assert state(table) == (PeerState.READY, "")
    assert table.lost(identity("b"), "broken pipe")
    assert state(table) == (PeerState.SUSPECT, "broken pipe")
    table.connecting("b")
    assert state(table) == (PeerState.SUSPECT, "broken pipe")
    table.connected(identity("b", 2))
    table.leaving("b", "stopping")
    assert state(table) == (PeerState.DRAINING, "stopping")
    assert table.lost(identity("b", 2), "closed")
    table.connecting("b")
    table.failed("b", "refused")
    assert state(table) == (PeerState.GONE, "closed")
    table.recorded(record("b", 3))
    assert state(table)[0] is PeerState.UNKNOWN


def test_a_drain_that_the_record_tells_of_comes_and_goes(table: PeerTable) -> None:
    table.recorded(record("b", draining=True))
    assert state(table)[0] is PeerState.DRAINING
    assert "drains" in table.refusal("b")
    table.connected(identity("b"))
    assert state(table)[0] is PeerState.DRAINING
    table.recorded(record("b"))
    assert state(table) == (PeerState.READY, "")
    assert table.refusal("b") == ""
    table.recorded(record("b", draining=True))
    assert table.lost(identity("b"), "broken pipe")
    assert state(table)[0] is PeerState.SUSPECT, "it said no goodbye"
    table.connected(identity("b", 2))
    assert state(table)[0] is PeerState.READY, "what an earlier epoch's record says is over"
    table.leaving("b", "stopping")
    table.recorded(record("b", 2))
    assert state(table) == (PeerState.DRAINING, "stopping"), "a goodbye stands"


def test_each_change_is_told_once_and_no_change_is_not() -> None:
    told: list[str] = []
    table = PeerTable(lambda: 0.0, told.append)

    def news() -> list[str]:
        found, told[:] = list(told), []
        return found

    table.recorded(record("b"))
    assert news() == ["b"]
    table.recorded(record("b"))
    assert news() == []
    table.recorded(record("b", 2))
    assert news() == ["b"]
    table.connected(identity("b", 2), "tcp://x")
    table.connected(identity("b", 2))
    assert news() == ["b"]
    table.lost(identity("b", 2), "cut")
    table.failed("b", "refused")
    table.failed("b", "refused")
    assert news() == ["b", "b"], "the state, then the reason"
    table.remove("b")
    assert news() == ["b"]
    table.gone("b", "left")
    assert news() == []


def test_listing_has_counters_and_times(table: PeerTable) -> None:
    table.recorded(record("c"))
    table.connected(identity("b"))
    b, c = table.listing(link)
    assert (b.node.name, b.node.epoch, b.lanes, b.sent_nbytes, b.received_nbytes) == ("b", 1, 2, 30, 40)
    assert (c.node.name, c.since) == ("c", 100.0)
    assert b.since > c.since


def test_a_newer_identity_supersedes_and_the_older_loss_is_ignored(table: PeerTable) -> None:
    assert table.connected(identity("b", 1), "tcp://x") is None
    assert table.connected(identity("b", 1)) is None
    assert table.dialled("b") == (identity("b", 1), "tcp://x")
    assert table.connected(identity("b", 2)) == identity("b", 1)
    assert table.dialled("b") == (None, ""), "what we dialled was the older one"
    assert not table.lost(identity("b", 1), "late")
    assert state(table)[0] is PeerState.READY


def test_gone_peers_are_forgotten_oldest_first(table: PeerTable) -> None:
    for number in range(MAX_GONE + 3):
        table.recorded(record(f"n{number:03}"))
        table.gone(f"n{number:03}", "left")
    names = [info.node.name for info in table.listing(link)]
    assert names == [f"n{number:03}" for number in range(3, MAX_GONE + 3)]


NAMES = st.sampled_from(["b", "c"])
EPOCHS = st.integers(1, 3)
EVENTS = st.one_of(
    st.tuples(st.just("recorded"), st.builds(record, NAMES, EPOCHS, st.booleans())),
    st.tuples(st.just("connected"), st.builds(identity, NAMES, EPOCHS), st.sampled_from(["", "tcp://x"])),
    st.tuples(st.just("lost"), st.builds(identity, NAMES, EPOCHS), st.just("gone")),
    st.tuples(st.sampled_from(["failed", "leaving", "gone"]), NAMES, st.just("why")),
    st.tuples(st.sampled_from(["connecting", "undialled", "remove"]), NAMES),
)


@given(st.lists(EVENTS, max_size=40))
def test_no_order_of_events_breaks_the_table(events: list[tuple[object, ...]]) -> None:
    table = PeerTable(lambda: 0.0)
    for event, *arguments in events:
        getattr(table, str(event))(*arguments)
        table.check_invariants()


def test_regions_are_kept_by_epoch_and_bounded() -> None:
    from xferd.api.types import Access, RegionId, RegionInfo, RegionSource

    def region(number: int, epoch: int) -> RegionInfo:
        return RegionInfo(
            id=RegionId(number),
            node="b",
            epoch=epoch,
            kind=MemoryKind.DRAM,
            source=RegionSource.POOL,
            device=0,
            nbytes=1,
            agent="x",
            access=Access.READ,
            writable=True,
        )

    cache = RemoteRegions(max_regions=3)
    cache.put("b", 1, [region(1, 1), region(2, 1)])
    cache.put("b", 1, [region(3, 1)])
    assert sorted(cache.known("b", 1)) == [1, 2, 3]
    assert cache.known("b", 2) == {}
    cache.put("b", 1, [region(4, 1)])
    assert sorted(cache.known("b", 1)) == [4], "one too many: the others are asked anew"
    cache.put("b", 2, [region(5, 2)])
    assert (cache.known("b", 1), sorted(cache.known("b", 2))) == ({}, [5])
    cache.put("b", 2, [region(number, 2) for number in range(10)])
    assert sorted(cache.known("b", 2)) == [5]
    cache.drop("b")
    cache.drop("b")
    assert repr(cache) == "RemoteRegions()"
