"""The peer manager reaches nodes by name, notices when they go, and says what is wrong and what to do.

Nodes talk through a network in this process that does what a transport promises, so that losses come when a test
wants them; the store and both ends of the protocol (manager and serving) are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from xferd.api.errors import (
    AgentUnknown,
    Closed,
    InvalidArgument,
    NotFound,
    PeerLost,
    PeerUnknown,
    ProtocolViolation,
    Stale,
    Unavailable,
    Unsupported,
)
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.types import (
    Access,
    MemoryKind,
    NodeInfo,
    Notification,
    PeerState,
    RegionId,
    RegionQuery,
    RegionSource,
    SessionId,
)
from xferd.daemon.memory.backing import FileBacking
from xferd.daemon.memory.regions import RegionTable
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.exchange import RecordExchange
from xferd.daemon.peers.manager import PeerManager, full_jitter
from xferd.daemon.peers.serving import PeerServing
from xferd.metadata._watching import Watch
from xferd.metadata.base import NodeChange, Store
from xferd.metadata.embedded import EmbeddedStore, StaticPeer
from xferd.plugins.base import PeerIdentity, PeerLinkStatistics, PeerTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from xferd.api.types import PeerInfo
    from xferd.plugins.base import PeerHandler

TIMEOUT_S = 10.0


class Link(PeerTransport):
    """One node's transport: a lane to another node is an entry in ``lanes`` on both sides."""

    def __init__(self, network: dict[str, Link], me: NodeInfo) -> None:
        self.network = network
        self.me = me
        self.handler: PeerHandler
        self.lanes: dict[str, Link] = {}
        self.dials: list[str] = []
        self.requests: list[peer_pb.PeerRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.answer: peer_pb.PeerReply | None = None

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.me.name, self.me.id, self.me.epoch)

    async def listen(self, me: NodeInfo, handler: PeerHandler) -> tuple[str, ...]:
        self.handler = handler
        for address in me.addresses:
            self.network[address] = self
        return me.addresses

    async def connect(self, address: str, *, name: str = "", epoch: int = 0) -> PeerIdentity:
        for other in self.lanes.values():
            if address in other.me.addresses:
                return other.identity
        self.dials.append(address)
        await self.gate.wait()
        other = self.network.get(address)
        if other is None:
            raise PeerLost(f"nobody listens at {address}")
        if name not in ("", other.me.name) or epoch not in (0, other.me.epoch):
            raise Stale(f"{other.me.name} at epoch {other.me.epoch} answers")
        if other.me.name not in self.lanes:
            self.lanes[other.me.name], other.lanes[self.me.name] = other, self
            other.handler.peer_connected(self.identity)
            self.handler.peer_connected(other.identity)
        return other.identity

    async def request(self, node: str, request: peer_pb.PeerRequest, *, timeout_s: float) -> peer_pb.PeerReply:
        if node not in self.lanes:
            raise PeerLost(f"node {node!r} is not connected")
        self.requests.append(request)
        if self.answer is not None:
            return self.answer
        return await self.lanes[node].handler.handle(self.identity, request)

    async def disconnect(self, node: str, reason: str) -> None:
        self.cut(node, reason)

    def cut(self, node: str, reason: str) -> None:
        other = self.lanes.pop(node, None)
        if other is not None:
            del other.lanes[self.me.name]
            self.handler.peer_lost(other.identity, reason)
            other.handler.peer_lost(self.identity, reason)

    def stop(self) -> None:
        for address in self.me.addresses:
            self.network.pop(address, None)
        for node in list(self.lanes):
            self.cut(node, "connection reset")

    async def wait_quiesced(self, peer: PeerIdentity, transfer_id: str) -> None:
        return

    def link(self, node: str) -> PeerLinkStatistics:
        return PeerLinkStatistics(lanes=int(node in self.lanes))

    def sent(self, kind: str) -> list[peer_pb.PeerRequest]:
        return [request for request in self.requests if request.WhichOneof("request") == kind]


class Registry:
    """What all nodes' central stores share, as etcd would: records, and who watches which."""

    def __init__(self) -> None:
        self.records: dict[str, NodeInfo] = {}
        self.watches: list[Watch] = []
        self.listed = 0

    def put(self, name: str, node: NodeInfo | None, reason: str = "") -> None:
        if node is None:
            del self.records[name]
        else:
            self.records[name] = node
        for watch in self.watches:
            watch.tell(NodeChange(name, node, reason))

    def watched(self) -> list[str]:
        return sorted(watch.name for watch in self.watches if not watch.ended)


class CentralStore(Store):
    """A store that serves many nodes and is not to be watched as a whole."""

    watches_all = False

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.me: NodeInfo | None = None

    async def start(self) -> None:
        return

    async def aclose(self) -> None:
        return

    async def publish(self, node: NodeInfo) -> None:
        self.me = node
        self.registry.put(node.name, node)

    async def withdraw(self) -> None:
        assert self.me is not None
        self.registry.put(self.me.name, None, "withdrawn")

    async def get(self, name: str) -> NodeInfo:
        if name not in self.registry.records:
            raise PeerUnknown(f"no node {name!r}")
        return self.registry.records[name]

    async def list_nodes(self) -> list[NodeInfo]:
        self.registry.listed += 1
        return list(self.registry.records.values())

    def watch(self, name: str = "") -> Watch:
        watch = Watch(name)
        self.registry.watches.append(watch)
        for node in self.registry.records.values():
            watch.tell(NodeChange(node.name, node))
        return watch

    async def load(self, node: NodeInfo) -> None:
        raise NotImplementedError

    async def forget(self, name: str) -> None:
        raise NotImplementedError

    def health(self) -> str:
        return ""


@dataclass
class Node:
    me: NodeInfo
    link: Link
    store: EmbeddedStore
    manager: PeerManager
    regions: RegionTable
    inbox: list[Notification] = field(default_factory=list)

    def state(self, name: str) -> tuple[PeerState, str]:
        (info,) = [info for info in self.manager.peers() if info.node.name == name]
        return info.state, info.reason

    def deliver(self, notification: Notification) -> None:
        if notification.target.startswith("nobody@"):
            raise AgentUnknown(f"no agent {notification.target}")
        self.inbox.append(notification)


class World:
    """Makes nodes a, b, ... and closes them."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.network: dict[str, Link] = {}
        self.stack = stack

    async def node(
        self,
        name: str,
        *peers: str,
        epoch: int = 1,
        keep: tuple[str, ...] = (),
        listens: bool = True,
        clock: Callable[[], float] = lambda: 0.0,
        registry: Registry | None = None,
    ) -> Node:
        me = NodeInfo(
            name=name,
            id=f"{name}-{epoch}",
            epoch=epoch,
            version="0",
            addresses=(f"net://{name}",) if listens else (),
            backends=("tcp",),
            kinds=(MemoryKind.DRAM,),
            agents=(),
            started_at=0.0,
        )
        link = Link(self.network, me)
        static = [StaticPeer(peer, f"net://{peer}") for peer in peers]
        store: EmbeddedStore = EmbeddedStore(static, RecordExchange(link, timeout_s=1.0))
        if registry is not None:
            store = CentralStore(registry)  # type: ignore[assignment]
        await store.publish(me)
        manager = PeerManager(lambda: node.me, store, link, keep=keep, clock=clock, backoff=lambda _: 0.0)
        regions = RegionTable(name, epoch, 1 << 16)
        node = Node(me, link, store, manager, regions)
        staging = StagingPool(2 << 12, 1 << 12)
        self.stack.callback(staging.close)
        serving = PeerServing(
            me=lambda: node.me,
            regions=regions,
            staging=staging,
            learn=store.learn,
            deliver=node.deliver,
            transport=link,
            events=manager,
        )
        await link.listen(me, serving)
        await manager.start()
        self.stack.push_async_callback(store.aclose)
        self.stack.push_async_callback(manager.aclose)
        return node


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        yield World(stack)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left


async def until(check: Callable[[], bool]) -> None:
    """Let others run until something is so."""
    async with asyncio.timeout(TIMEOUT_S):
        while not check():  # noqa: ASYNC110 -- each turn lets one step of the others run, none is timed
            await asyncio.sleep(0)


def share(node: Node, access: Access = Access.READ, label: str = "") -> RegionId:
    backing = FileBacking(-1, "/nowhere", RegionSource.PATH)  # nobody touches its bytes here
    return node.regions.add(SessionId("s"), "prefill", backing, 4096, access=access, label=label).id


# ---------------------------------------------------------------------------------------------- resolve


async def test_resolve_connects_once_and_both_sides_know(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    assert a.state("b")[0] is PeerState.UNKNOWN
    identity = await a.manager.resolve("b")
    assert identity == PeerIdentity("b", "b-1", 1)
    assert await a.manager.resolve("b") == identity
    assert a.link.dials == ["net://b"]
    assert (a.state("b")[0], b.state("a")[0]) == (PeerState.READY, PeerState.READY)
    assert (await b.store.get("a")).id == "a-1", "b learned the record of whoever made contact"


async def test_callers_at_the_same_time_share_one_attempt(world: World) -> None:
    a, _ = await world.node("a", "b"), await world.node("b")
    a.link.gate.clear()
    calls = [asyncio.ensure_future(a.manager.resolve("b")) for _ in range(4)]
    await until(lambda: bool(a.link.dials))
    assert a.state("b") == (PeerState.JOINING, "connecting")
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    a.link.gate.set()
    results = await asyncio.gather(*calls[1:])
    assert {identity.node for identity in results} == {"b"}
    assert a.link.dials == ["net://b"]


async def test_an_unknown_name_lists_the_known_ones(world: World) -> None:
    a = await world.node("a", "b", "c")
    with pytest.raises(PeerUnknown, match=r"'nobody'.*known nodes: b, c.*remedy"):
        await a.manager.resolve("nobody")
    assert [info.node.name for info in a.manager.peers()] == ["b", "c"], "a question makes no peer"


async def test_an_absent_peer_is_lost_and_suspect(world: World) -> None:
    a = await world.node("a", "b")
    with pytest.raises(PeerLost, match="net://b"):
        await a.manager.resolve("b")
    state, reason = a.state("b")
    assert state is PeerState.SUSPECT
    assert "net://b" in reason
    await world.node("b")
    await a.manager.resolve("b")
    assert a.state("b") == (PeerState.READY, "")


async def test_oneself_is_no_peer(world: World) -> None:
    a = await world.node("a", "a")
    assert a.manager.peers() == []
    with pytest.raises(InvalidArgument, match="this node"):
        await a.manager.resolve("a")


async def test_without_transport_every_remote_call_names_the_remedy(world: World) -> None:
    a = await world.node("a", "b")
    manager = PeerManager(lambda: a.me, a.store, None, keep=["b"])
    async with manager:
        for call in (
            manager.resolve("b"),
            manager.check("b", 1),
            manager.regions("b", RegionQuery()),
            manager.remote_regions("b", [RegionId(1)]),
            manager.notify("b", Notification("x@b", b"")),
            manager.quiesce("b", "t1"),
        ):
            with pytest.raises(Unsupported, match=r"\[backends\.tcp\]"):
                await call
        assert [(info.node.name, info.lanes) for info in manager.peers()] == [("b", 0)]


async def test_a_peer_that_listens_nowhere_is_reached_over_its_own_lane(world: World) -> None:
    a, b = await world.node("a"), await world.node("b", "a", listens=False)
    await b.manager.resolve("a")
    assert (await a.manager.resolve("b")).node_id == "b-1"
    b.link.stop()
    with pytest.raises(PeerLost):
        await a.manager.resolve("b")


async def test_check_compares_epochs(world: World) -> None:
    a, _ = await world.node("a", "b"), await world.node("b", epoch=7)
    assert (await a.manager.check("b", 7)).epoch == 7
    assert (await a.manager.check("b", 0)).epoch == 7
    with pytest.raises(Stale, match=r"epoch 7.*epoch 6"):
        await a.manager.check("b", 6)


async def test_close_ends_waiting_callers_with_closed(world: World) -> None:
    a = await world.node("a", "b")
    a.link.gate.clear()
    call = asyncio.ensure_future(a.manager.resolve("b"))
    await until(lambda: bool(a.link.dials))
    await a.manager.aclose()
    await a.manager.aclose()
    with pytest.raises(Closed):
        await call
    with pytest.raises(Closed):
        await a.manager.resolve("b")


# ---------------------------------------------------------------------------------------------- losses


async def test_a_loss_is_told_and_healed_by_the_next_use(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    losses: list[tuple[str, str]] = []
    unsubscribe = a.manager.subscribe(lambda name, reason: losses.append((name, reason)))
    await a.manager.resolve("b")
    b.link.cut("a", "cable pulled")
    assert losses == [("b", "cable pulled")]
    assert a.state("b") == (PeerState.SUSPECT, "cable pulled")
    await a.manager.resolve("b")
    assert a.state("b") == (PeerState.READY, "")
    unsubscribe()
    unsubscribe()
    b.link.cut("a", "again")
    assert len(losses) == 1


async def test_a_restarted_peer_is_found_under_its_new_epoch(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    await a.manager.resolve("b")
    b.link.stop()
    await world.node("b", epoch=2)
    assert (await a.manager.resolve("b")).epoch == 2
    with pytest.raises(Stale):
        await a.manager.check("b", 1)


async def test_a_newer_identity_counts_as_a_loss_of_the_older(world: World) -> None:
    a, _ = await world.node("a", "b"), await world.node("b")
    losses: list[tuple[str, str]] = []
    a.manager.subscribe(lambda name, reason: losses.append((name, reason)))
    await a.manager.resolve("b")
    a.manager.peer_connected(PeerIdentity("b", "b-2", 2))
    assert losses == [("b", "it was restarted: epoch 1 became 2")]
    a.manager.peer_lost(PeerIdentity("b", "b-1", 1), "late news")
    assert a.state("b")[0] is PeerState.READY
    assert len(losses) == 1


async def test_a_goodbye_is_draining_then_gone(world: World) -> None:
    a, b = await world.node("a"), await world.node("b", "a")
    await b.manager.resolve("a")
    await b.link.request("a", peer_pb.PeerRequest(goodbye=peer_pb.Goodbye(reason="stopping")), timeout_s=1.0)
    assert a.state("b") == (PeerState.DRAINING, "stopping")
    b.link.stop()
    assert a.state("b")[0] is PeerState.GONE
    with pytest.raises(PeerUnknown):
        await a.manager.resolve("b")


async def test_a_forgotten_record_disconnects(world: World) -> None:
    a, b = await world.node("a"), await world.node("b")
    await a.store.load(b.me)
    losses: list[str] = []
    a.manager.subscribe(lambda name, _: losses.append(name))
    await a.manager.resolve("b")
    await a.store.forget("b")
    await until(lambda: a.state("b")[0] is PeerState.GONE)
    assert a.state("b") == (PeerState.GONE, "forgotten")
    assert losses == ["b"]
    assert not a.link.lanes


async def test_a_newer_record_ends_the_older_connection(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    await a.manager.resolve("b")
    a.store.learn(replace(b.me, id="b-2", epoch=2))
    await until(lambda: not a.link.lanes)
    assert a.state("b")[0] is PeerState.SUSPECT


# ---------------------------------------------------------------------------------------------- kept peers


async def test_a_kept_peer_becomes_ready_by_itself_and_again_after_a_loss(world: World) -> None:
    a = await world.node("a", "b", keep=("b",))
    await until(lambda: len(a.link.dials) >= 3)
    assert a.state("b")[0] is PeerState.SUSPECT
    b = await world.node("b")
    await until(lambda: a.state("b")[0] is PeerState.READY)
    b.link.cut("a", "cable pulled")
    await until(lambda: a.state("b")[0] is PeerState.READY)


async def test_kept_peers_can_be_replaced(world: World) -> None:
    a, _, _ = await world.node("a", "b", keep=("b", "a")), await world.node("b"), await world.node("c")
    await until(lambda: a.state("b")[0] is PeerState.READY)
    a.store.reload([StaticPeer("c", "net://c")])
    await a.manager.reload(["c"])
    await until(lambda: a.state("c")[0] is PeerState.READY)
    assert a.state("b")[0] is PeerState.READY, "a connection that is up stays"
    dials = len(a.link.dials)
    a.link.cut("b", "cable pulled")
    await until(lambda: a.state("b")[0] is PeerState.SUSPECT)
    assert len(a.link.dials) == dials


def test_backoff_is_jittered_and_bounded() -> None:
    delays = [[full_jitter(attempt) for _ in range(200)] for attempt in (1, 5, 10, 1000)]
    for cap, sample in zip((0.2, 3.2, 30.0, 30.0), delays, strict=True):
        assert all(0.0 <= delay <= cap for delay in sample)
        assert max(sample) > cap / 2
        assert min(sample) < cap / 2


# ---------------------------------------------------------------------------------------------- requests


async def test_regions_are_those_that_the_peer_shows(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b", epoch=3)
    shown, _ = share(b, label="kv"), share(b, Access.NONE)
    listing = await a.manager.regions("b", RegionQuery(label="kv"), cause_id="why")
    assert (listing.node, listing.epoch, [region.id for region in listing.regions]) == ("b", 3, [shown])
    assert [request.cause_id for request in a.link.sent("get_regions")] == ["why"]
    assert (await a.manager.regions("b", RegionQuery(agent="other"))).regions == ()
    assert all(request.cause_id for request in a.link.requests)


async def test_remote_regions_are_asked_once(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    ids = [share(b) for _ in range(5000)]
    found = await a.manager.remote_regions("b", ids, epoch=1)
    assert list(found) == ids
    assert [len(request.get_regions.region) for request in a.link.sent("get_regions")] == [4096, 904]
    assert await a.manager.remote_regions("b", ids[:10]) == {number: found[number] for number in ids[:10]}
    assert len(a.link.sent("get_regions")) == 2
    a.link.cut("b", "cable pulled")
    await a.manager.remote_regions("b", ids[:10])
    assert len(a.link.sent("get_regions")) == 3, "a loss empties the cache"


async def test_a_region_that_is_not_shown_is_not_found(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    shown, hidden = share(b), share(b, Access.NONE)
    with pytest.raises(NotFound, match=f"'b' shows no region {hidden}"):
        await a.manager.remote_regions("b", [shown, hidden])
    with pytest.raises(Stale):
        await a.manager.remote_regions("b", [shown], epoch=9)


async def test_remembered_regions_need_not_be_asked(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    region = share(b)
    a.manager.remember(await a.manager.regions("b", RegionQuery()))
    await a.manager.remote_regions("b", [region])
    assert len(a.link.sent("get_regions")) == 1


async def test_a_notification_arrives_and_its_errors_come_back(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    sent = Notification("decode@b", b"\0any", source="prefill@a", transfer="t1")
    await a.manager.notify("b", sent)
    assert b.inbox == [sent]
    with pytest.raises(AgentUnknown, match="nobody@b"):
        await a.manager.notify("b", Notification("nobody@b", b"", source="prefill@a"))


async def test_quiesce_carries_the_transfer(world: World) -> None:
    a, _ = await world.node("a", "b"), await world.node("b")
    await a.manager.quiesce("b", "t1", cause_id="why")
    (request,) = a.link.sent("quiesce")
    assert (request.quiesce.transfer_id, request.cause_id) == ("t1", "why")


@pytest.mark.parametrize(
    "answer",
    [
        peer_pb.PeerReply(),
        peer_pb.PeerReply(pong=peer_pb.Pong()),
        peer_pb.PeerReply(regions={"node": "c", "epoch": 1}),
        peer_pb.PeerReply(regions={"node": "b", "epoch": 2}),
    ],
)
async def test_an_answer_to_another_question_is_a_violation(world: World, answer: peer_pb.PeerReply) -> None:
    a, _ = await world.node("a", "b"), await world.node("b")
    await a.manager.resolve("b")
    a.link.answer = answer
    with pytest.raises(ProtocolViolation, match="'b'"):
        await a.manager.regions("b", RegionQuery())


async def test_a_record_of_another_node_is_refused(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    forged = replace(a.me, name="c")
    a.link.me = a.me
    with pytest.raises(ProtocolViolation, match="'c'"):
        await RecordExchange(a.link, timeout_s=1.0)("net://b", forged)
    assert "c" not in [node.name for node in await b.store.list_nodes()]


# ---------------------------------------------------------------------------------------------- drain


async def drain(node: Node, draining: bool = True) -> None:
    node.me = replace(node.me, draining=draining)
    await node.store.publish(node.me)
    await node.manager.announce()


@pytest.mark.parametrize("central", [False, True])
async def test_a_draining_peer_is_not_chosen_and_what_runs_with_it_goes_on(world: World, central: bool) -> None:
    registry = Registry() if central else None
    a, b = await world.node("a", "b", registry=registry), await world.node("b", registry=registry)
    region = share(b)
    await a.manager.resolve("b")
    await drain(b)
    await until(lambda: a.state("b")[0] is PeerState.DRAINING)
    with pytest.raises(Unavailable, match=r"'b' takes no new work.*another node"):
        await a.manager.resolve("b")
    await a.manager.notify("b", Notification("decode@b", b"", source="prefill@a"))
    await a.manager.quiesce("b", "t1")
    assert list(await a.manager.remote_regions("b", [region])) == [region]
    await drain(b, False)
    await until(lambda: a.state("b") == (PeerState.READY, ""))
    assert (await a.manager.resolve("b")).node == "b"


@pytest.mark.parametrize("central", [False, True])
async def test_a_peer_that_drained_before_it_was_met_is_refused_until_it_is_back(world: World, central: bool) -> None:
    registry = Registry() if central else None
    a, b = await world.node("a", "b", registry=registry), await world.node("b", registry=registry)
    await drain(b)
    with pytest.raises(Unavailable, match="'b'"):
        await a.manager.resolve("b")
    a.link.cut("b", "cable pulled")
    await drain(b, False)
    assert (await a.manager.resolve("b")).node == "b", "nobody told it, it asked"


async def test_one_that_said_goodbye_takes_no_new_work(world: World) -> None:
    a, b = await world.node("a"), await world.node("b", "a")
    await b.manager.resolve("a")
    await b.link.request("a", peer_pb.PeerRequest(goodbye=peer_pb.Goodbye(reason="stopping")), timeout_s=1.0)
    with pytest.raises(Unavailable, match="stopping"):
        await a.manager.resolve("b")


async def test_a_peer_that_cannot_be_told_of_a_drain_holds_nobody_up(world: World) -> None:
    a, b, c = await world.node("a", "b", "c"), await world.node("b"), await world.node("c")
    await a.manager.resolve("b")
    await a.manager.resolve("c")
    b.link.handler = None  # type: ignore[assignment]
    del a.link.lanes["b"]
    await drain(a)
    assert c.state("a")[0] is PeerState.DRAINING


# ---------------------------------------------------------------------------------------------- a central store


async def test_only_those_it_deals_with_are_watched(world: World) -> None:
    registry = Registry()
    nodes = [await world.node(name, registry=registry) for name in "abcd"]
    a = nodes[0]
    assert (registry.listed, registry.watched(), a.manager.peers()) == (0, [], [])
    with pytest.raises(PeerUnknown):
        await a.manager.resolve("nobody")
    await a.manager.resolve("b")
    await until(lambda: registry.watched() == ["a", "b"])  # b watches a, which made contact
    assert [info.node.name for info in a.manager.peers()] == ["b"]
    assert [info.node.addresses for info in nodes[1].manager.peers()] == [("net://a",)]
    await a.manager.resolve("b")
    assert registry.watched() == ["a", "b"]
    await a.manager.aclose()
    assert registry.watched() == ["a"], "its watches were let go"
    assert registry.listed == 0


async def test_a_lease_that_ends_is_a_loss_and_a_record_that_is_back_can_be_used(world: World) -> None:
    registry = Registry()
    a, b = await world.node("a", registry=registry), await world.node("b", registry=registry)
    losses: list[tuple[str, str]] = []
    a.manager.subscribe(lambda name, reason: losses.append((name, reason)))
    await a.manager.resolve("b")
    await until(lambda: "b" in registry.watched())
    registry.put("b", None, "its lease ended")
    await until(lambda: a.state("b") == (PeerState.GONE, "its lease ended"))
    assert losses == [("b", "its lease ended")]
    assert a.manager.losses == 1
    assert not a.link.lanes
    with pytest.raises(PeerUnknown):
        await a.manager.resolve("b")
    registry.put("b", b.me)
    await until(lambda: a.state("b")[0] is PeerState.UNKNOWN)
    assert (await a.manager.resolve("b")).node == "b"


async def test_a_record_of_a_newer_epoch_ends_what_was_with_the_older(world: World) -> None:
    registry = Registry()
    a, b = await world.node("a", registry=registry), await world.node("b", registry=registry)
    await a.manager.resolve("b")
    b.link.stop()
    await world.node("b", epoch=2, registry=registry)
    assert (await a.manager.resolve("b")).epoch == 2
    with pytest.raises(Stale):
        await a.manager.check("b", 1)


# ---------------------------------------------------------------------------------------------- followers


async def next_states(changes: AsyncIterator[PeerInfo], count: int) -> list[tuple[str, PeerState]]:
    async with asyncio.timeout(TIMEOUT_S):
        found = [await anext(changes) for _ in range(count)]
    return [(info.node.name, info.state) for info in found]


async def test_followers_hear_of_those_there_and_of_each_change(world: World) -> None:
    a, b = await world.node("a", "b", "c"), await world.node("b")
    changes = a.manager.watch()
    assert await next_states(changes, 2) == [("b", PeerState.UNKNOWN), ("c", PeerState.UNKNOWN)]
    await a.manager.resolve("b")
    assert ("b", PeerState.READY) in await next_states(changes, 1)
    b.link.cut("a", "cable pulled")
    info = await anext(changes)
    assert (info.node.name, info.state, info.reason) == ("b", PeerState.SUSPECT, "cable pulled")
    await changes.aclose()  # type: ignore[attr-defined]


async def test_a_slow_follower_gets_the_newest_state_of_each_peer(world: World) -> None:
    a, b = await world.node("a", "b"), await world.node("b")
    changes = a.manager.watch()
    assert await next_states(changes, 1) == [("b", PeerState.UNKNOWN)]
    for _ in range(100):
        await a.manager.resolve("b")
        b.link.cut("a", "cable pulled")
    await a.manager.resolve("b")
    assert await next_states(changes, 1) == [("b", PeerState.READY)]
    waiting = asyncio.ensure_future(anext(changes, None))
    await asyncio.sleep(0)
    assert not waiting.done(), "one entry was kept, not two hundred"
    await a.manager.aclose()
    assert await waiting is None, "the stream ends with the manager"


async def test_one_that_is_not_known_yet_can_be_followed(world: World) -> None:
    registry = Registry()
    a = await world.node("a", registry=registry)
    changes = a.manager.watch("b")
    waiting = asyncio.ensure_future(anext(changes))
    await until(lambda: registry.watched() == ["b"])
    await world.node("c", registry=registry)
    await world.node("b", registry=registry)
    async with asyncio.timeout(TIMEOUT_S):
        info = await waiting
    assert (info.node.name, info.state) == ("b", PeerState.UNKNOWN)
    await changes.aclose()  # type: ignore[attr-defined]
    left = a.manager.watch()
    await a.manager.aclose()
    assert [info.node.name async for info in left] == ["b"], "what is there, then the end"
