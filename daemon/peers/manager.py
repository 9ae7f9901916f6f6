"""The other nodes as the engine uses them: resolve a name, ask for regions, notify, quiesce, hear of losses.

Not here: what this node answers to others (``serving.py``), the states (``table.py``), how frames travel (the
transport), where records come from (the store).
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, TypeVar

import structlog

from xferd.api.errors import (
    Closed,
    InvalidArgument,
    NotFound,
    PeerLost,
    PeerUnknown,
    ProtocolViolation,
    Stale,
    Unavailable,
    Unsupported,
    XferdError,
)
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.types import RegionQuery
from xferd.api.wire import listing_from_message, node_to_message, notification_to_message
from xferd.daemon.peers.exchange import new_cause_id
from xferd.daemon.peers.feed import PeerFeed
from xferd.daemon.peers.interest import PeerInterest
from xferd.daemon.peers.regions import RemoteRegions
from xferd.daemon.peers.table import PeerTable
from xferd.plugins.base import PeerLinkStatistics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from typing import Self

    from xferd.api.types import NodeInfo, Notification, PeerInfo, RegionId, RegionInfo, RegionListing
    from xferd.metadata.base import NodeChange, Store
    from xferd.plugins.base import PeerIdentity, PeerTransport

    PeerLostCallback = Callable[[str, str], None]

MAX_REGIONS_A_REQUEST = 4096
"""Ids in one question, so that neither it nor its answer becomes a frame that holds up the control lane."""

STEADY_S = 10.0
"""A connection that held for so long counts as a success for the backoff."""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


def full_jitter(attempt: int) -> float:
    """Return a random delay in seconds before the given attempt: at most 0.2 s first, at most 30 s ever."""
    return random.uniform(0.0, min(30.0, 0.1 * 2.0 ** min(attempt, 16)))


class PeerManager:
    """Connections to other nodes by name.

    Args:
        me: this node's present record.
        store: where records of others come from; owned by the caller, started before and closed after this.
        transport: carries requests; None where no backend reaches other nodes, and then every remote call is
            ``Unsupported``. Owned by the caller.
        cache: of other nodes' regions.
        keep: names of peers to stay connected to, those that are configured.
        clock: UNIX time.
        backoff: delay in seconds before the n-th attempt to reach a kept peer again.
        request_timeout_s: for one request to a connected peer.

    All methods are cancel-safe: a connection attempt that others wait for too goes on when one of them is cancelled.
    """

    def __init__(
        self,
        me: Callable[[], NodeInfo],
        store: Store,
        transport: PeerTransport | None,
        *,
        cache: RemoteRegions | None = None,
        keep: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
        backoff: Callable[[int], float] = full_jitter,
        request_timeout_s: float = 10.0,
    ) -> None:
        self._me = me
        self._store = store
        self._transport = transport
        self._cache = cache if cache is not None else RemoteRegions()
        self._keep = tuple(keep)
        self._clock = clock
        self._backoff = backoff
        self._request_timeout_s = request_timeout_s
        self._feed = PeerFeed()
        self._table = PeerTable(clock, self._changed)
        self._interest = PeerInterest(store, self._record_changed, is_busy=self._is_busy, on_dropped=self._table.remove)
        self._listeners: list[PeerLostCallback] = []
        self._dials: dict[str, asyncio.Task[PeerIdentity]] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        self.losses = 0

    # -- life

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begin to watch and to reach the kept peers. Does not wait for any peer.

        A store where that is cheap is listed and watched as a whole; in any other a peer is watched from the first
        dealing with it on.
        """
        self._check_open()
        if self._watcher is None and self._store.watches_all:
            for node in await self._store.list_nodes():
                self._table.recorded(node)
            self._watcher = self._spawn(self._watch(), "xferd-peers-watch")
        self._start_keepers()

    async def reload(self, keep: Sequence[str]) -> None:
        """Take a new list of peers to stay connected to, after the store took it; connections that are up stay."""
        self._check_open()
        self._keep = tuple(keep)
        dropped = [name for name in self._keepers if name not in self._keep]
        await _end([self._keepers.pop(name) for name in dropped])
        if self._store.watches_all:
            nodes = {node.name: node for node in await self._store.list_nodes()}
            for node in nodes.values():
                self._table.recorded(node)
            for name in dropped:
                if name not in nodes:
                    self._table.remove(name, "it was taken out of the configuration")
        self._start_keepers()

    async def aclose(self) -> None:
        """End all tasks; the transport's owner closes the connections. Twice is fine."""
        self._closed = True
        tasks: list[asyncio.Task[None] | asyncio.Task[PeerIdentity]] = [*self._keepers.values(), *self._dials.values()]
        if self._watcher is not None:
            tasks.append(self._watcher)
        self._keepers.clear()
        self._listeners.clear()
        self._feed.end()
        await self._interest.aclose()
        await _end(tasks)

    # -- peers

    async def resolve(self, name: str) -> PeerIdentity:
        """Return who answers under a name and takes new work, connecting if need be.

        Callers at the same time share one attempt.

        Raises:
            InvalidArgument: it is this node.
            PeerUnknown: no node of this name is known; the message names those that are, and the remedy.
            PeerLost: it does not answer.
            Unavailable: it drains; what runs with it goes on.
            Unsupported: no backend reaches other nodes.
        """
        identity = await self._reached(name)
        refusal = self._table.refusal(name)
        if refusal:
            raise Unavailable(
                f"node {name!r} takes no new work: {refusal}", remedy="choose another node, or wait until it is back"
            )
        return identity

    async def _reached(self, name: str) -> PeerIdentity:
        """Return who answers under a name, also one that drains: what runs with it is brought to its end."""
        self._check_open()
        transport = self._reach()
        if name == self._me().name:
            raise InvalidArgument(f"{name!r} is this node", remedy='leave the node out, or give ""')
        identity, address = self._table.dialled(name)
        if identity is not None:
            self._deal_with(name)
            try:  # at once if the lane is up; another one alone would carry requests, but no bytes
                return await transport.connect(address, name=name, epoch=identity.epoch)
            except (PeerLost, Stale):
                self._table.undialled(name)
        dial = self._dials.get(name)
        if dial is None:
            dial = self._dials[name] = self._spawn(self._dial(name), f"xferd-peer-dial-{name}")
        try:
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            if dial.cancelled():  # not the caller was cancelled: this object was closed meanwhile
                self._check_open()
            raise

    async def check(self, name: str, epoch: int) -> PeerIdentity:
        """Return who answers under a name if it still is at this epoch; 0 takes any.

        Raises:
            Stale: it was restarted since. Raises like ``resolve`` too.
        """
        identity = await self._reached(name)
        if epoch not in (0, identity.epoch):
            raise Stale(
                f"node {name!r} is at epoch {identity.epoch}, the reference is of epoch {epoch}",
                remedy="the node was restarted: ask for its regions again",
            )
        return identity

    def peers(self) -> list[PeerInfo]:
        """List the other nodes, by name."""
        link = self._transport.link if self._transport is not None else _no_link
        me = self._me().name
        return [info for info in self._table.listing(link) if info.node.name != me]

    async def watch(self, name: str = "") -> AsyncIterator[PeerInfo]:
        """Yield the present peers, or the one named, then each as its state, reason or record changes.

        A slow reader gets the newest state of each peer. Ends when this object is closed.
        """
        me = self._me().name
        if name and name != me:
            self._deal_with(name)
        reader = self._feed.open(name, self.peers())
        try:
            while (info := await reader.next()) is not None:
                if info.node.name != me:
                    yield info
        finally:
            self._feed.close(reader)

    def subscribe(self, on_peer_lost: PeerLostCallback) -> Callable[[], None]:
        """Hear of losses: when a connected peer is lost, or comes back under another epoch.

        ``on_peer_lost(name, reason)`` is called on the event loop, and must not raise nor block. Returns what ends
        the subscription.
        """
        self._listeners.append(on_peer_lost)

        def unsubscribe() -> None:
            if on_peer_lost in self._listeners:
                self._listeners.remove(on_peer_lost)

        return unsubscribe

    # -- requests

    async def regions(self, name: str, query: RegionQuery, *, cause_id: str = "") -> RegionListing:
        """Ask a node for those of its regions that other nodes may see. Raises like ``resolve``."""
        ask = peer_pb.GetRegions(agent=query.agent, label=query.label, region=query.regions)
        identity = await self._reached(name)
        reply = await self._request(identity, peer_pb.PeerRequest(get_regions=ask), "regions", cause_id=cause_id)
        listing = listing_from_message(reply.regions)
        if (listing.node, listing.epoch) != (identity.node, identity.epoch):
            raise ProtocolViolation(
                f"node {name!r} at epoch {identity.epoch} listed regions of {listing.node!r} at epoch {listing.epoch}"
            )
        self._cache.put(name, listing.epoch, listing.regions)
        return listing

    async def remote_regions(
        self, name: str, ids: Sequence[RegionId], *, epoch: int = 0, cause_id: str = ""
    ) -> dict[RegionId, RegionInfo]:
        """Return the records of regions of another node, each of ``ids`` (unique), asking for those not known yet.

        Raises:
            NotFound: the node does not show such a region to us: freed, never there, or without access.
            Stale: the node is not at ``epoch`` (0: any). Raises like ``resolve`` too.
        """
        identity = await self.check(name, epoch)
        known = self._cache.known(name, identity.epoch)
        found = {region: known[region] for region in ids if region in known}
        missing = [region for region in ids if region not in found]
        for start in range(0, len(missing), MAX_REGIONS_A_REQUEST):
            wanted = tuple(missing[start : start + MAX_REGIONS_A_REQUEST])
            listing = await self.regions(name, RegionQuery(regions=wanted), cause_id=cause_id)
            if listing.epoch != identity.epoch:
                raise Stale(
                    f"node {name!r} was restarted meanwhile: epoch {identity.epoch} became {listing.epoch}",
                    remedy="ask for its regions again",
                )
            found.update((region.id, region) for region in listing.regions)
            absent = next((region for region in wanted if region not in found), None)
            if absent is not None:
                raise NotFound(
                    f"node {name!r} shows no region {absent} to this node",
                    remedy="it was freed, or its owner gave no access: ask for its regions again",
                )
        return found

    def remember(self, listing: RegionListing) -> None:
        """Take in regions that came by other means (a blob), to save asking for them."""
        self._cache.put(listing.node, listing.epoch, listing.regions)

    async def notify(self, name: str, notification: Notification, *, cause_id: str = "") -> None:
        """Deliver to an agent of another node.

        Raises:
            AgentUnknown: it has no such agent.
            Overloaded: the agent's inbox is full. Raises like ``resolve`` too.
        """
        request = peer_pb.PeerRequest(notify=peer_pb.Notify(notification=notification_to_message(notification)))
        await self._request(await self._reached(name), request, "done", cause_id=cause_id)

    async def quiesce(self, name: str, transfer_id: str, *, cause_id: str = "", timeout_s: float = 0.0) -> None:
        """Return when the other node moves no byte of our transfer any more, and refuses later frames of it.

        Raises:
            PeerLost: the connection went, and with it what was served over it.
            DeadlineExceeded: it did not come to rest in time.
        """
        request = peer_pb.PeerRequest(quiesce=peer_pb.Quiesce(transfer_id=transfer_id))
        await self._request(await self._reached(name), request, "done", cause_id=cause_id, timeout_s=timeout_s)

    async def announce(self) -> None:
        """Give this node's record to all connected peers, where they learn it from nobody else.

        One that does not take it learns it at its next connection.
        """
        if self._transport is None or not self._store.watches_all:
            return
        record = peer_pb.GetNode(mine=node_to_message(self._me()))
        async with asyncio.TaskGroup() as group:
            for name in self._table.connected_names():
                request = peer_pb.PeerRequest(cause_id=new_cause_id(), get_node=record)
                group.create_task(self._tell_record(name, request), name=f"xferd-peer-announce-{name}")

    async def _tell_record(self, name: str, request: peer_pb.PeerRequest) -> None:
        try:
            await self._reach().request(name, request, timeout_s=self._request_timeout_s)
        except XferdError as exc:
            _log.info("peer_not_told", peer=name, problem=str(exc))

    # -- what the transport tells (through PeerServing)

    def peer_connected(self, peer: PeerIdentity) -> None:
        """A first lane is up, whoever opened it."""
        self._deal_with(peer.node)
        superseded = self._table.connected(peer)
        if superseded is not None:
            self._tell_lost(peer.node, f"it was restarted: epoch {superseded.epoch} became {peer.epoch}")

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """The last lane has gone."""
        left = self._table.is_leaving(peer.node)
        if self._table.lost(peer, reason):
            if left:
                self._store.unlearn(peer.node, reason)
            self._tell_lost(peer.node, reason)

    def peer_leaving(self, peer: PeerIdentity, reason: str) -> None:
        """The peer said goodbye; what runs may end."""
        self._table.leaving(peer.node, reason)

    # -- inside

    async def _dial(self, name: str) -> PeerIdentity:
        self._table.connecting(name)
        try:
            node = await self._store.refresh(name)
            self._table.recorded(node)
            self._deal_with(name)
            identity, address = await self._connect(node)
        except XferdError as exc:
            incoming = self._table.identity(name)
            if isinstance(exc, PeerUnknown) and incoming is not None:
                return incoming  # it made contact and proved its name; its record has not come yet
            self._table.failed(name, exc.message)
            raise
        finally:
            self._dials.pop(name, None)
        superseded = self._table.connected(identity, address)
        if superseded is not None:
            self._tell_lost(name, f"it was restarted: epoch {superseded.epoch} became {identity.epoch}")
        return identity

    async def _connect(self, node: NodeInfo) -> tuple[PeerIdentity, str]:
        """Try a record's addresses in order; returns the one that answered too."""
        transport, failure = self._reach(), None
        for address in node.addresses:
            try:
                return await transport.connect(address, name=node.name, epoch=node.epoch), address
            except (PeerLost, Stale) as exc:
                failure = exc
        incoming = self._table.identity(node.name)
        if incoming is not None and not node.addresses:
            return incoming, ""  # it listens nowhere and came to us
        tried = ", ".join(node.addresses) or "no address: it listens nowhere"
        problem = failure.message if failure is not None else "there is nothing to connect to"
        raise PeerLost(f"node {node.name!r} cannot be reached at {tried}: {problem}") from failure

    async def _request(
        self,
        peer: PeerIdentity,
        request: peer_pb.PeerRequest,
        expected: str,
        *,
        cause_id: str,
        timeout_s: float = 0.0,
    ) -> peer_pb.PeerReply:
        transport, verb = self._reach(), request.WhichOneof("request")
        request.cause_id = cause_id or new_cause_id()
        _log.debug("peer_request", peer=peer.node, request=verb, cause_id=request.cause_id)
        try:
            reply = await transport.request(peer.node, request, timeout_s=timeout_s or self._request_timeout_s)
        except PeerLost:
            self._table.undialled(peer.node)
            raise
        answer = reply.WhichOneof("reply")
        if answer != expected:
            raise ProtocolViolation(f"node {peer.node!r} answered {verb} with {answer}", limit=expected)
        return reply

    async def _watch(self) -> None:
        watch = self._store.watch()
        try:
            async for change in watch:
                await self._record_changed(change)
        finally:
            await watch.aclose()

    async def _record_changed(self, change: NodeChange) -> None:
        connected = self._table.identity(change.name)
        if change.node is None:
            if connected is not None:
                await self._disconnect(connected, change.reason or "its record was withdrawn")
            self._table.gone(change.name, change.reason)
            self._cache.drop(change.name)
            return
        self._table.recorded(change.node)
        if connected is not None and change.node.epoch > connected.epoch:
            await self._disconnect(connected, f"it was restarted, now at epoch {change.node.epoch}")

    def _deal_with(self, name: str) -> None:
        if not self._store.watches_all:
            self._interest.touch(name)

    def _is_busy(self, name: str) -> bool:
        return self._table.identity(name) is not None or name in self._feed.names()

    def _changed(self, name: str) -> None:
        if self._feed:
            info = self._table.info(name, self._transport.link if self._transport is not None else _no_link)
            if info is not None:
                self._feed.tell(info)

    async def _disconnect(self, peer: PeerIdentity, reason: str) -> None:
        await self._reach().disconnect(peer.node, reason)
        self.peer_lost(peer, reason)  # unless the transport has said so already

    def _start_keepers(self) -> None:
        if self._transport is None:
            return
        me = self._me().name
        for name in self._keep:
            if name != me and name not in self._keepers:
                self._keepers[name] = self._spawn(self._keep_connected(name), f"xferd-peer-keep-{name}")

    async def _keep_connected(self, name: str) -> None:
        """Reach a configured peer, and again whenever it was lost, so that its state is true without any use."""
        attempt = 0
        while True:
            attempt += 1
            try:
                await self._reached(name)
                began = self._clock()
                await self._table.wait_down(name)
                attempt = 0 if self._clock() - began >= STEADY_S else attempt
            except XferdError as exc:
                _log.debug("peer_unreachable", peer=name, attempt=attempt, problem=str(exc))
            await asyncio.sleep(self._backoff(attempt + 1))

    def _tell_lost(self, name: str, reason: str) -> None:
        self.losses += 1
        self._cache.drop(name)
        for listener in tuple(self._listeners):
            listener(name, reason)

    def _reach(self) -> PeerTransport:
        if self._transport is None:
            raise Unsupported(
                "this node has nothing to reach other nodes with",
                remedy="configure [backends.tcp] with listen or peers, and a secret_file",
            )
        return self._transport

    def _spawn(self, work: Coroutine[object, object, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report)
        return task

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the peer manager is closed")


def _report(task: asyncio.Task[object]) -> None:
    """Log what ended a task against its will; the errors of an attempt are its callers' business."""
    if task.cancelled():
        return
    problem = task.exception()
    if problem is not None and not isinstance(problem, XferdError):
        _log.error("peer_task_failed", task=task.get_name(), exc_info=problem)


async def _end(tasks: Sequence[asyncio.Task[None] | asyncio.Task[PeerIdentity]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _no_link(_: str) -> PeerLinkStatistics:
    return PeerLinkStatistics()
