"""Which peers are connected, by which lanes. Bookkeeping on the event loop; nothing here awaits.

A peer is connected as long as it has a control lane. The data lanes of one direction live no longer than the
control lanes of that direction: who is not heard on the control lane is not served either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import AlreadyExists, Overloaded, Stale, Unavailable
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.base import PeerLinkStatistics

if TYPE_CHECKING:
    from xferd.plugins.base import PeerHandler, PeerIdentity
    from xferd.plugins.tcp.control import ControlLane
    from xferd.plugins.tcp.lanes import Lane, LanePool
    from xferd.plugins.tcp.server import ServedLane, ServingTable

MAX_ACCEPTED_CONTROL = 8
"""Control lanes that one peer may open; one is enough, more come from reconnects and several addresses."""

log = structlog.get_logger("xferd.tcp")


@dataclass(slots=True, eq=False)
class Peer:
    """One connected node, at one epoch."""

    identity: PeerIdentity
    dialled: ControlLane | None = None
    addresses: set[str] = field(default_factory=set)
    pool: LanePool | None = None
    small: LanePool | None = None
    accepted: set[ControlLane] = field(default_factory=set)
    served: set[ServedLane] = field(default_factory=set)
    gone: str = ""
    sent_nbytes: int = 0
    received_nbytes: int = 0

    @property
    def control(self) -> ControlLane | None:
        """A lane for requests: ours, or else one of theirs."""
        return self.dialled or next(iter(self.accepted), None)

    @property
    def pools(self) -> tuple[LanePool, ...]:
        """Our data lanes to it: bulk and small."""
        return tuple(pool for pool in (self.pool, self.small) if pool is not None)

    def close_pools(self, reason: str) -> None:
        """End the data lanes that we opened."""
        for pool in self.pools:
            pool.close(f"node {self.identity.node!r}: {reason}")

    def fold(self, lane: Lane | ServedLane) -> None:
        """Keep the counts of a data lane that has ended."""
        self.sent_nbytes += lane.stream.sent_nbytes
        self.received_nbytes += lane.stream.received_nbytes

    def link(self) -> PeerLinkStatistics:
        """Return lanes and bytes, both directions."""
        data: list[Lane | ServedLane] = [*self.served, *(lane for pool in self.pools for lane in pool.lanes)]
        return PeerLinkStatistics(
            lanes=len(data) + len(self.accepted) + (self.dialled is not None),
            sent_nbytes=self.sent_nbytes + sum(lane.stream.sent_nbytes for lane in data),
            received_nbytes=self.received_nbytes + sum(lane.stream.received_nbytes for lane in data),
        )


class PeerTable:
    """The connected peers, one entry a node name; tells the handler who comes and goes."""

    def __init__(self, my_name: str, handler: PeerHandler, serving: ServingTable) -> None:
        self._my_name = my_name
        self._handler = handler
        self._serving = serving
        self._peers: dict[str, Peer] = {}

    def all(self) -> list[Peer]:
        """List the connected peers."""
        return list(self._peers.values())

    def get(self, node: str) -> Peer | None:
        """Return a peer by name."""
        return self._peers.get(node)

    def at(self, address: str) -> Peer | None:
        """Return the peer that we dialled at an address."""
        return next((peer for peer in self._peers.values() if peer.dialled and address in peer.addresses), None)

    def check(self, identity: PeerIdentity) -> None:
        """Raise if a node that has proved who it is may not connect.

        Raises:
            AlreadyExists: it has our own name, or that of another node which is connected.
            Stale: a later epoch of it is connected.
        """
        remedy = "give each node a name of its own"
        if identity.node == self._my_name:
            raise AlreadyExists(f"both nodes are called {identity.node!r}", remedy=remedy)
        known = self._peers.get(identity.node)
        if known is None or known.identity == identity or identity.epoch > known.identity.epoch:
            return
        if identity.epoch == known.identity.epoch:
            raise AlreadyExists(f"another node called {identity.node!r} is connected", remedy=remedy)
        raise Stale(
            f"node {identity.node!r} calls with epoch {identity.epoch}, and {known.identity.epoch} is connected",
            remedy="stop the older process",
        )

    def check_accept(self, identity: PeerIdentity, *, is_data: bool) -> None:
        """Raise if a caller may not open one more lane of a kind.

        Raises:
            Unavailable: a data lane without a control lane.
            Overloaded: too many control lanes.
        """
        self.check(identity)
        known = self._peers.get(identity.node)
        accepted = known.accepted if known is not None and known.identity == identity else set()
        if is_data and not accepted:
            raise Unavailable(
                f"node {identity.node!r} opens a data lane and has no control lane",
                remedy="open the control lane first",
            )
        if not is_data and len(accepted) >= MAX_ACCEPTED_CONTROL:
            raise Overloaded(
                f"node {identity.node!r} has {len(accepted)} control lanes",
                limit=f"{MAX_ACCEPTED_CONTROL}",
                remedy="use the lane that is open",
            )

    def add_control(self, lane: ControlLane) -> Peer:
        """Enter a control lane whose handshake is done, after ``check``; an older epoch of the node is dropped."""
        identity = lane.peer
        peer = self._peers.get(identity.node)
        if peer is not None and peer.identity != identity:
            self.drop(peer, f"the node came back with epoch {identity.epoch}")
            peer = None
        is_new = peer is None
        if peer is None:
            peer = self._peers[identity.node] = Peer(identity)
        if lane.is_dialled:
            peer.dialled = lane
        else:
            peer.accepted.add(lane)
        if is_new:
            log.info("peer connected", peer=identity.node, epoch=identity.epoch)
            self._handler.peer_connected(identity)
        return peer

    def remove_control(self, lane: ControlLane, reason: str) -> None:
        """Take out a control lane that ended, and the data lanes that depended on it."""
        peer = self._peers.get(lane.peer.node)
        if peer is None or peer.identity != lane.peer:
            return  # dropped before
        if lane is peer.dialled:
            peer.dialled = None
            peer.addresses.clear()
            peer.close_pools(reason)
        peer.accepted.discard(lane)
        if not peer.accepted:
            for served in peer.served:
                served.abort(reason)
        if peer.control is None:
            self.drop(peer, reason)

    def drop(self, peer: Peer, reason: str, *, goodbye: bool = False) -> None:
        """End all lanes of a peer, after a word to it if ``goodbye``, and tell the handler. Twice is fine."""
        if peer.gone:
            return
        peer.gone = reason or "closed"
        if self._peers.get(peer.identity.node) is peer:
            del self._peers[peer.identity.node]
        for lane in [*peer.accepted, *([peer.dialled] if peer.dialled else [])]:
            if goodbye:
                lane.post(pb.PeerRequest(goodbye=pb.Goodbye(reason=reason)))
            lane.close(reason)
        peer.close_pools(reason)
        for served in peer.served:
            served.abort(reason)
        self._serving.forget(peer.identity)
        log.info("peer lost", peer=peer.identity.node, epoch=peer.identity.epoch, reason=reason)
        self._handler.peer_lost(peer.identity, peer.gone)
