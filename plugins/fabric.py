"""What a backend is that serves peers by requests over a ``PeerTransport``, and moves the payload by a way of its own.

The transport proves who a peer is and notices its end; so such a backend has no handshake of its own. ``ucx`` is one.
What asks a peer for a chunk is the same message whoever carries its bytes.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

from xferd.api.proto import peer_v1_pb2 as peer_pb, xferd_v1_pb2 as xferd_pb

if TYPE_CHECKING:
    from xferd.api.types import NodeInfo
    from xferd.plugins.base import Chunk, Extent, PeerHandler, PeerIdentity, PeerTransport


def data_request(chunk: Chunk, remote: Extent, epoch: int, *, is_write: bool) -> peer_pb.DataRequest:
    """Return the request for a chunk whose side ``remote`` is at a peer of that epoch."""
    assert remote.region is not None
    return peer_pb.DataRequest(
        transfer_id=chunk.transfer_id,
        cause_id=chunk.cause_id,
        op=xferd_pb.TRANSFER_OP_WRITE if is_write else xferd_pb.TRANSFER_OP_READ,
        epoch=epoch,
        region=remote.region.astype("<u8", copy=False).tobytes(),
        offset=remote.iov[:, 0].astype("<u8", copy=False).tobytes(),
        nbytes=remote.iov[:, 1].astype("<u8", copy=False).tobytes(),
        total_nbytes=chunk.nbytes,
        agent=chunk.agent,
        verify=chunk.verify,
        durable=chunk.durable and is_write,
    )


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
