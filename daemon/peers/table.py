"""The states of peers, as bookkeeping: synchronous, no I/O. ``manager.py`` feeds it and acts.

UNKNOWN   its record or address is known, nobody tried to reach it
JOINING   a first attempt to reach it is under way
READY     connected
SUSPECT   the connection broke, or an attempt failed; it is tried again
DRAINING  it takes no new work: its record says so, or it is connected and said goodbye
GONE      it left in good order, or its record was withdrawn
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from xferd.api.types import NodeInfo, PeerInfo, PeerState

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import PeerIdentity, PeerLinkStatistics

MAX_GONE = 64
"""Peers kept for the listing after they have gone; the oldest are forgotten first."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Peer:
    """One peer. ``identity`` is set while any lane is up, ``dialled`` the address where we opened one, or "".

    ``left``: it said goodbye over the lanes that are up.
    """

    node: NodeInfo
    state: PeerState
    reason: str
    since: float
    identity: PeerIdentity | None = None
    dialled: str = ""
    left: bool = False
    down: asyncio.Event = field(default_factory=asyncio.Event)


class PeerTable:
    """All peers by name. Every method is one event; one that does not fit the state changes nothing.

    Args:
        clock: UNIX time.
        changed: told the name of a peer whose state, reason or record has changed.
    """

    def __init__(self, clock: Callable[[], float], changed: Callable[[str], None] = lambda _: None) -> None:
        self._clock = clock
        self._changed = changed
        self._peers: dict[str, Peer] = {}

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` where the table contradicts itself."""
        for name, peer in self._peers.items():
            assert peer.node.name == name
            up = peer.identity is not None
            assert up or peer.state is not PeerState.READY, (name, peer)
            assert not up or peer.state in (PeerState.READY, PeerState.DRAINING), (name, peer)
            assert not peer.left or (up and peer.state is PeerState.DRAINING), (name, peer)
            assert peer.down.is_set() == (peer.identity is None), name
            assert peer.identity is not None or not peer.dialled, name

    def identity(self, name: str) -> PeerIdentity | None:
        """Return who is connected under a name."""
        peer = self._peers.get(name)
        return peer.identity if peer is not None else None

    def dialled(self, name: str) -> tuple[PeerIdentity | None, str]:
        """Return who is connected over a lane that we opened, and to which address; (None, "") without one."""
        peer = self._peers.get(name)
        return (peer.identity, peer.dialled) if peer is not None and peer.dialled else (None, "")

    def is_leaving(self, name: str) -> bool:
        """Return whether a connected peer said goodbye."""
        peer = self._peers.get(name)
        return peer is not None and peer.left

    def refusal(self, name: str) -> str:
        """Return why a peer takes no new work, "" where it may."""
        peer = self._peers.get(name)
        return (peer.reason or "it drains") if peer is not None and peer.state is PeerState.DRAINING else ""

    def connected_names(self) -> list[str]:
        """Return the names of peers with a lane that is up."""
        return [name for name, peer in self._peers.items() if peer.identity is not None]

    async def wait_down(self, name: str) -> None:
        """Wait until no lane with a peer is up; at once for a peer that is not known."""
        peer = self._peers.get(name)
        if peer is not None:
            await peer.down.wait()

    def recorded(self, node: NodeInfo) -> None:
        """Take in a record."""
        peer = self._peers.get(node.name)
        if peer is not None and peer.identity is not None and node.epoch < peer.identity.epoch:
            return  # of an earlier start than the one that is connected
        if peer is None:
            peer, before = self._add(node), node
        else:
            before, peer.node = peer.node, node
        state, reason = peer.state, peer.reason
        if state is PeerState.GONE:
            state, reason = PeerState.UNKNOWN, "its record is back"
        if _drains(peer):
            if state in (PeerState.UNKNOWN, PeerState.JOINING, PeerState.READY):
                state, reason = PeerState.DRAINING, "its record says that it drains"
        elif state is PeerState.DRAINING:
            state, reason = (PeerState.READY if peer.identity is not None else PeerState.UNKNOWN), ""
        if (state, reason) != (peer.state, peer.reason):
            self._move(peer, state, reason)
        elif node != before:
            self._changed(node.name)

    def connecting(self, name: str) -> None:
        """An attempt to reach it begins; one that is suspect or gone stays so until the attempt succeeds."""
        peer = self._peers.get(name)
        if peer is not None and peer.state is PeerState.UNKNOWN:
            self._move(peer, PeerState.JOINING, "connecting")

    def failed(self, name: str, reason: str) -> None:
        """An attempt failed; one that has gone stays gone, because its leaving explains the failure."""
        peer = self._peers.get(name)
        if peer is not None and peer.identity is None and peer.state is not PeerState.GONE:
            self._move(peer, PeerState.SUSPECT, reason)

    def connected(self, identity: PeerIdentity, dialled: str = "") -> PeerIdentity | None:
        """A lane is up, one that we opened if ``dialled`` gives its address.

        Returns the identity that this one supersedes, if the peer was connected under another.
        """
        peer = self._peers.get(identity.node) or self._add(_bare(identity))
        before = peer.identity
        if before != identity:
            peer.identity, peer.dialled, peer.left = identity, "", False
            if peer.node.epoch < identity.epoch:  # its new record comes soon; what the old one says is over
                peer.node = replace(peer.node, id=identity.node_id, epoch=identity.epoch, agents=(), draining=False)
            peer.down.clear()
            if _drains(peer):
                self._move(peer, PeerState.DRAINING, "its record says that it drains")
            else:
                self._move(peer, PeerState.READY, "")
        peer.dialled = dialled or peer.dialled
        return before if before not in (None, identity) else None

    def undialled(self, name: str) -> None:
        """The lane that we opened failed; others may be up."""
        peer = self._peers.get(name)
        if peer is not None:
            peer.dialled = ""

    def leaving(self, name: str, reason: str) -> None:
        """A connected peer said goodbye."""
        peer = self._peers.get(name)
        if peer is not None and peer.identity is not None:
            peer.left = True
            self._move(peer, PeerState.DRAINING, reason or "it is going away")

    def lost(self, identity: PeerIdentity, reason: str) -> bool:
        """The last lane has gone; returns False for one that is not connected (any more) under this identity."""
        peer = self._peers.get(identity.node)
        if peer is None or peer.identity != identity:
            return False
        left = peer.left
        peer.identity, peer.dialled, peer.left = None, "", False
        peer.down.set()
        self._move(peer, PeerState.GONE if left else PeerState.SUSPECT, reason)
        return True

    def gone(self, name: str, reason: str) -> None:
        """Its record was withdrawn, and it is not connected."""
        peer = self._peers.get(name)
        if peer is not None and peer.identity is None:
            self._move(peer, PeerState.GONE, reason)

    def remove(self, name: str, reason: str = "it is not watched any more") -> None:
        """Forget a peer that is not connected; who follows it is told that no more is known of it."""
        peer = self._peers.get(name)
        if peer is not None and peer.identity is None:
            if peer.state is not PeerState.GONE:
                self._move(peer, PeerState.UNKNOWN, reason)
            del self._peers[name]

    def info(self, name: str, link: Callable[[str], PeerLinkStatistics]) -> PeerInfo | None:
        """Return one peer; ``link`` gives its counters."""
        peer = self._peers.get(name)
        if peer is None:
            return None
        counters = link(name)
        return PeerInfo(
            node=peer.node,
            state=peer.state,
            reason=peer.reason,
            since=peer.since,
            lanes=counters.lanes,
            sent_nbytes=counters.sent_nbytes,
            received_nbytes=counters.received_nbytes,
        )

    def listing(self, link: Callable[[str], PeerLinkStatistics]) -> list[PeerInfo]:
        """Return all peers by name; ``link`` gives the counters of one."""
        infos = (self.info(name, link) for name in sorted(self._peers))
        return [info for info in infos if info is not None]

    def _add(self, node: NodeInfo) -> Peer:
        peer = self._peers[node.name] = Peer(node, PeerState.UNKNOWN, "", self._clock())
        peer.down.set()
        self._changed(node.name)
        return peer

    def _move(self, peer: Peer, state: PeerState, reason: str) -> None:
        if (peer.state, peer.reason) == (state, reason):
            return
        if peer.state is not state:
            peer.since = self._clock()
            _log.info("peer_state", peer=peer.node.name, state=state.value, before=peer.state.value, reason=reason)
        peer.state, peer.reason = state, reason
        self._changed(peer.node.name)
        if state is PeerState.GONE:
            gone = sorted((p.since, name) for name, p in self._peers.items() if p.state is PeerState.GONE)
            for _, name in gone[:-MAX_GONE]:
                del self._peers[name]


def _drains(peer: Peer) -> bool:
    """Whether a peer takes no new work."""
    return peer.left or peer.node.draining


def _bare(identity: PeerIdentity) -> NodeInfo:
    """What is known of a node that connected before its record came."""
    return NodeInfo(
        name=identity.node,
        id=identity.node_id,
        epoch=identity.epoch,
        version="",
        addresses=(),
        backends=(),
        kinds=(),
        agents=(),
        started_at=0.0,
    )
