"""How a store without a service learns a record: ask the node itself. Given to ``EmbeddedStore`` as its exchange."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import ProtocolViolation
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.wire import node_from_message, node_to_message

if TYPE_CHECKING:
    from xferd.api.types import NodeInfo
    from xferd.plugins.base import PeerIdentity, PeerTransport

_log = structlog.get_logger(__name__)


class RecordExchange:
    """A callable ``ExchangeRecords``; the lane that it opens stays up for later requests."""

    def __init__(self, transport: PeerTransport, *, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s

    async def __call__(self, address: str, mine: NodeInfo) -> NodeInfo:
        """Give the node at an address our record and return its own.

        Raises:
            PeerLost: nobody answers in time.
            Unauthenticated: the secrets differ.
            ProtocolViolation: the record is not of the node that the handshake proved.
        """
        peer = await self._transport.connect(address)
        cause_id = new_cause_id()
        _log.debug("peer_request", peer=peer.node, request="get_node", address=address, cause_id=cause_id)
        request = peer_pb.PeerRequest(cause_id=cause_id, get_node=peer_pb.GetNode(mine=node_to_message(mine)))
        reply = await self._transport.request(peer.node, request, timeout_s=self._timeout_s)
        if reply.WhichOneof("reply") != "node":
            raise ProtocolViolation(f"node {peer.node!r} answered GetNode with {reply.WhichOneof('reply')}")
        node = node_from_message(reply.node)
        check_record(peer, node)
        return node


def check_record(peer: PeerIdentity, node: NodeInfo) -> None:
    """Raise ``ProtocolViolation`` unless a record is that of the node that the handshake proved."""
    if (node.name, node.id, node.epoch) != (peer.node, peer.node_id, peer.epoch):
        raise ProtocolViolation(
            f"node {peer.node!r} sent a record of {node.name!r}, id {node.id}, epoch {node.epoch}",
            limit=f"id {peer.node_id}, epoch {peer.epoch}",
            remedy="a node may only speak for itself",
        )


def new_cause_id() -> str:
    """Return an id for something that this node does of its own accord."""
    return uuid.uuid4().hex[:16]
