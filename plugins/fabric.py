"""What a backend is that serves peers by requests over a ``PeerTransport``, and moves the payload by a way of its own.

The transport proves who a peer is and notices its end; so such a backend has no handshake of its own. ``ucx`` is one.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from xferd.api.proto import peer_v1_pb2 as peer_pb
    from xferd.api.types import NodeInfo
    from xferd.plugins.base import PeerHandler, PeerIdentity, PeerTransport


class PeerService(abc.ABC):
    """A backend's side towards peers; called on the event loop. The daemon passes on what concerns it."""

    verbs: ClassVar[frozenset[str]]
    """Which requests of ``PeerRequest`` are its own."""

    @abc.abstractmethod
    def attach(self, me: NodeInfo, transport: PeerTransport, handler: PeerHandler) -> None:
        """Take up what the daemon has; called once, after ``start`` and before any peer is connected."""

    @abc.abstractmethod
    async def serve(self, peer: PeerIdentity, request: peer_pb.PeerRequest) -> peer_pb.PeerReply:
        """Answer a request of ``verbs``; raises an ``XferdError`` to be told to the peer."""

    @abc.abstractmethod
    async def quiesce(self, peer: PeerIdentity, transfer_id: str) -> None:
        """Refuse a peer's transfer from now on, and return when no byte of it moves here any more."""

    @abc.abstractmethod
    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Bring to rest whatever moves to or from a peer that is no longer connected. Does not wait."""
