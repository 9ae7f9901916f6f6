"""What this node does for its peers: the ``PeerHandler`` that a transport calls.

Not here: what this node asks of its peers (``manager.py``), how granted bytes are reached (``grants.py``), frames
and lanes (the transport).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import numpy as np
import structlog

from xferd.api.descriptors import U64, DescriptorList
from xferd.api.errors import (
    DeadlineExceeded,
    LimitExceeded,
    PermissionDenied,
    ProtocolViolation,
    SizeMismatch,
    Stale,
    Unavailable,
)
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.timeouts import timeout
from xferd.api.types import RegionId, RegionListing, RegionQuery, TransferOp
from xferd.api.wire import listing_to_message, node_from_message, node_to_message, notification_asked_for
from xferd.daemon.memory.regions import PeerActor
from xferd.daemon.peers.exchange import check_record
from xferd.daemon.peers.grants import PeerGrant, check_served

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.api.types import NodeInfo, Notification
    from xferd.daemon.memory.regions import RegionTable
    from xferd.daemon.memory.staging import StagingPool
    from xferd.daemon.peers.device_lane import DeviceLane
    from xferd.daemon.storage.lanes import LaneSealer
    from xferd.plugins.base import PeerIdentity, PeerTransport
    from xferd.plugins.fabric import PeerService

LINGER_S = 1.0
"""A peer's transfer counts as running for so long after its last grant: between two of its chunks none is open."""

_log = structlog.get_logger(__name__)


class PeerEvents(Protocol):
    """Who hears of connections; ``PeerManager`` is one. Called on the event loop."""

    def peer_connected(self, peer: PeerIdentity) -> None:
        """A first lane is up."""

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """The last lane has gone."""

    def peer_leaving(self, peer: PeerIdentity, reason: str) -> None:
        """The peer said goodbye."""


class PeerServing:
    """Answers peers. One object for the daemon's life; it owns nothing but its grants' bookkeeping.

    Args:
        me: this node's present record; name and epoch never change.
        regions: the region table.
        staging: lends memory to grants over private memory and files.
        learn: takes the record of a node that made contact (``Store.learn``).
        deliver: puts a notification into a local agent's inbox; raises ``AgentUnknown`` or ``Overloaded``.
        transport: is asked to quiesce.
        events: hears of connections.
        max_descriptors: limit on the rows of one request.
        quiesce_timeout_s: how long a peer's Quiesce may take.
        staging_timeout_s: how long a lane waits for staging memory.
        linger_s: how long a transfer counts as under way after its last grant.
        sealer: keeps the proof of what peers write to storage pools; None where there are none.
        devices: reaches GPU memory; None where there is none.
        services: backends that serve peers by requests of their own.
    """

    def __init__(
        self,
        *,
        me: Callable[[], NodeInfo],
        regions: RegionTable,
        staging: StagingPool,
        learn: Callable[[NodeInfo], None],
        deliver: Callable[[Notification], None],
        transport: PeerTransport,
        events: PeerEvents,
        max_descriptors: int = 1 << 20,
        quiesce_timeout_s: float = 5.0,
        staging_timeout_s: float = 5.0,
        linger_s: float = LINGER_S,
        sealer: LaneSealer | None = None,
        devices: DeviceLane | None = None,
        services: Sequence[PeerService] = (),
    ) -> None:
        self._services = services
        self._devices = devices
        self._sealer = sealer
        self._me = me
        self._epoch = me().epoch
        self._regions = regions
        self._staging = staging
        self._learn = learn
        self._deliver = deliver
        self._transport = transport
        self._events = events
        self._max_descriptors = max_descriptors
        self._quiesce_timeout_s = quiesce_timeout_s
        self._staging_timeout_s = staging_timeout_s
        self._linger_s = linger_s
        self._refusal = ""
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], int] = {}
        self._closed_at: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._idlers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._holders: dict[str, tuple[PeerIdentity, str]] = {}
        self._quiescing: dict[tuple[str, str], list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    # -- what the daemon sets and asks

    def refuse(self, reason: str) -> None:
        """Refuse new transfers with this reason ("" takes them again); those that are under way go on."""
        self._refusal = reason

    def open_grants(self) -> int:
        """Return the number of open grants."""
        with self._lock:
            return sum(self._open.values())

    async def wait_idle(self, timeout_s: float) -> int:
        """Return when no transfer of a peer is under way here, or the time is over; returns how many are left."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._idlers.append(waiter)
        try:
            async with timeout(timeout_s):
                while under_way := self._under_way():
                    waiter[1].clear()
                    if self.open_grants():
                        await waiter[1].wait()
                    else:  # each of them has ended, or goes on with another chunk before its time is over
                        await asyncio.sleep(self._linger_s - (time.monotonic() - max(under_way.values())))
        except TimeoutError:
            pass
        finally:
            with self._lock:
                self._idlers.remove(waiter)
        return len(self._under_way())

    def _under_way(self) -> dict[tuple[str, str], float]:
        """Return the transfers that have a grant, or had one lately, and when."""
        now = time.monotonic()
        with self._lock:
            lately = {key: at for key, at in self._closed_at.items() if now - at < self._linger_s}
            return lately | dict.fromkeys(self._open, now)

    async def abort(self, holder: str) -> None:
        """Bring the grant of a holder to rest, because what it reads or writes must go; a closed one is fine.

        Raises:
            DeadlineExceeded: a system call does not return.
        """
        with self._lock:
            held = self._holders.get(holder)
        if held is not None:
            await self._quiesce(*held, cause_id="")

    # -- control requests

    async def handle(self, peer: PeerIdentity, request: peer_pb.PeerRequest) -> peer_pb.PeerReply:
        """Answer a control request, on the event loop."""
        verb = request.WhichOneof("request")
        log = _log.bind(peer=peer.node, request=verb, cause_id=request.cause_id)
        log.debug("peer_request_served")
        match verb:
            case "ping":
                return peer_pb.PeerReply(pong=peer_pb.Pong())
            case "get_node":
                return self._get_node(peer, request.get_node)
            case "get_regions":
                return self._get_regions(peer, request.get_regions)
            case "notify":
                return self._notify(peer, request.notify)
            case "quiesce":
                return await self._quiesce(peer, request.quiesce.transfer_id, request.cause_id)
            case "goodbye":
                log.info("peer_said_goodbye", reason=request.goodbye.reason)
                self._events.peer_leaving(peer, request.goodbye.reason)
                return _done()
        for service in self._services:
            if verb in service.verbs:
                return await service.serve(peer, request)
        raise ProtocolViolation(
            f"node {peer.node!r} sent a request that this node does not know",
            limit="ping, get_node, get_regions, notify, quiesce, goodbye",
            remedy="run the same version of xferd on both nodes",
        )

    def _get_node(self, peer: PeerIdentity, request: peer_pb.GetNode) -> peer_pb.PeerReply:
        if request.HasField("mine"):
            node = node_from_message(request.mine)
            check_record(peer, node)
            self._learn(node)
        return peer_pb.PeerReply(node=node_to_message(self._me()))

    def _get_regions(self, peer: PeerIdentity, request: peer_pb.GetRegions) -> peer_pb.PeerReply:
        me = self._me()
        query = RegionQuery(
            node=me.name,
            agent=request.agent,
            label=request.label,
            regions=tuple(RegionId(region) for region in request.region),
        )
        visible = self._regions.visible(PeerActor(peer.node), query)
        return peer_pb.PeerReply(regions=listing_to_message(RegionListing(me.name, me.epoch, visible)))

    def _notify(self, peer: PeerIdentity, request: peer_pb.Notify) -> peer_pb.PeerReply:
        notification = notification_asked_for(request.notification)
        _, at, node = notification.source.rpartition("@")
        if not at or node != peer.node:
            raise PermissionDenied(
                f"node {peer.node!r} sent a notification from {notification.source!r}",
                limit=f"agents of {peer.node!r}",
                remedy="a node may only speak for its own agents",
            )
        self._deliver(notification)
        return _done()

    async def _quiesce(self, peer: PeerIdentity, transfer_id: str, cause_id: str) -> peer_pb.PeerReply:
        try:
            async with timeout(self._quiesce_timeout_s):
                await self._transport.wait_quiesced(peer, transfer_id)
                for service in self._services:
                    await service.quiesce(peer, transfer_id)
                await self._wait_closed((peer.node, transfer_id))
        except TimeoutError:
            raise DeadlineExceeded(
                f"transfer {transfer_id} of node {peer.node!r} still moves bytes here",
                limit=f"{self._quiesce_timeout_s} s",
                remedy="ask again; a system call that does not return holds it up",
            ) from None
        _log.info("transfer_quiesced", peer=peer.node, transfer=transfer_id, cause_id=cause_id)
        return _done()

    async def _wait_closed(self, key: tuple[str, str]) -> None:
        """Return when no grant of a transfer is open; the transport gives it no new one."""
        closed = asyncio.Event()
        waiter = (asyncio.get_running_loop(), closed)
        with self._lock:
            if not self._open.get(key):
                return
            self._quiescing.setdefault(key, []).append(waiter)
        try:
            await closed.wait()
        finally:
            with self._lock:
                self._quiescing[key].remove(waiter)
                if not self._quiescing[key]:
                    del self._quiescing[key]

    # -- data requests, from lanes' threads

    def open_grant(self, peer: PeerIdentity, op: TransferOp, request: peer_pb.DataRequest) -> PeerGrant:
        """Check a data request and hold its regions until the grant is closed. Thread-safe, does not block.

        Raises:
            Unavailable: this node is draining.
            Stale: another epoch, or a region that was freed.
            InvalidDescriptor, OutOfBounds, SizeMismatch, LimitExceeded: the list is wrong.
            PermissionDenied: a region's access does not say so.
        """
        key = (peer.node, request.transfer_id)
        if self._refusal and key not in self._under_way():
            raise Unavailable(f"node {self._me().name!r} takes no new work: {self._refusal}", remedy="try another node")
        if request.epoch != self._epoch:
            raise Stale(
                f"the request is for epoch {request.epoch}, node {self._me().name!r} is at epoch {self._epoch}",
                remedy="the node was restarted: ask for its regions again",
            )
        descriptors = self._parse(request)
        resolved = self._regions.resolve(descriptors)
        check_served(resolved.spaces)
        holder = f"peer {peer.node} transfer {request.transfer_id} #{next(self._numbers)}"
        reason = f"{op.value} by {request.agent or '?'}@{peer.node}, cause {request.cause_id}"
        self._regions.hold(resolved.regions, holder, reason, PeerActor(peer.node), write=op is TransferOp.WRITE)
        with self._lock:
            self._open[key] = self._open.get(key, 0) + 1
            self._holders[holder] = (peer, request.transfer_id)
        _log.debug(
            "grant_opened",
            peer=peer.node,
            transfer=request.transfer_id,
            cause_id=request.cause_id,
            op=op.value,
            nbytes=request.total_nbytes,
            descriptors=len(descriptors),
        )

        def close() -> None:
            try:
                self._regions.release(holder)
            finally:
                self._grant_closed(key, holder)

        return PeerGrant(
            resolved,
            op,
            request.total_nbytes,
            staging=self._staging,
            staging_timeout_s=self._staging_timeout_s,
            holder=holder,
            on_close=close,
            sealer=self._sealer,
            devices=self._devices,
            verify=request.verify,
            durable=request.durable,
        )

    def _parse(self, request: peer_pb.DataRequest) -> DescriptorList:
        rows = max(len(request.region), len(request.offset), len(request.nbytes)) // 8
        if rows > self._max_descriptors:
            raise LimitExceeded(
                f"the request has {rows} descriptors",
                limit=f"{self._max_descriptors} descriptors",
                remedy="send smaller chunks, or raise limits.max_descriptors here",
            )
        if rows == 1 and (one := _one_row(request)) is not None:
            return one
        descriptors = DescriptorList.from_packed(request.region, request.offset, request.nbytes)
        if descriptors.total_nbytes != request.total_nbytes:
            raise SizeMismatch(
                f"the list has {descriptors.total_nbytes} bytes and its request says {request.total_nbytes}",
                limit="equal totals",
                remedy="the requesting node is at fault",
            )
        return descriptors

    def _grant_closed(self, key: tuple[str, str], holder: str) -> None:
        with self._lock:
            del self._holders[holder]
            left = self._open[key] = self._open[key] - 1
            if left:
                return
            del self._open[key]
            self._note_closed(key)
            for loop, closed in self._quiescing.get(key, ()):
                loop.call_soon_threadsafe(closed.set)

    def _note_closed(self, key: tuple[str, str]) -> None:
        """Remember when a transfer's last grant was closed, and wake who waits for all of them; under the lock."""
        now = time.monotonic()
        self._closed_at[key] = now
        self._closed_at.move_to_end(key)
        while now - next(iter(self._closed_at.values())) >= self._linger_s:
            self._closed_at.popitem(last=False)
        if not self._open:
            for loop, idle in self._idlers:
                loop.call_soon_threadsafe(idle.set)

    # -- connections

    def peer_connected(self, peer: PeerIdentity) -> None:
        """Pass it on."""
        self._events.peer_connected(peer)

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Pass it on; the transport has closed the peer's grants, or does so as their lanes end."""
        for service in self._services:
            service.peer_lost(peer, reason)
        self._events.peer_lost(peer, reason)


def _one_row(request: peer_pb.DataRequest) -> DescriptorList | None:
    """Return a list of one row that is right in itself, without numpy's price for each check; None if it is not."""
    if not len(request.region) == len(request.offset) == len(request.nbytes) == 8:
        return None
    offset, nbytes = int.from_bytes(request.offset, "little"), int.from_bytes(request.nbytes, "little")
    if not 0 < nbytes == request.total_nbytes or offset + nbytes >= 1 << 64:
        return None
    region, start, size = (np.frombuffer(raw, dtype=U64) for raw in (request.region, request.offset, request.nbytes))
    return DescriptorList(region, start, size)


def _done() -> peer_pb.PeerReply:
    return peer_pb.PeerReply(done=peer_pb.Done())
