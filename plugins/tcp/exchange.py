"""One READ or WRITE as its caller sees it: the request, and what the answers mean. No I/O.

``client.py`` and ``small.py`` carry it over a lane, each in its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api import wire
from xferd.api.errors import LimitExceeded, PeerLost, ProtocolViolation, ShortTransfer, XferdError
from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.plugins import vectored
from xferd.plugins.fabric import data_request
from xferd.plugins.tcp.frames import FrameLimits, FrameType, Header, decode_control

if TYPE_CHECKING:
    from xferd.plugins.base import Chunk, Extent, IovTable

_END_ONLY = FrameLimits.of({FrameType.END})
_DATA_OR_END = frozenset({FrameType.DATA, FrameType.END, FrameType.ERROR})


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What the peer said in its Welcome."""

    max_payload_nbytes: int
    max_descriptors: int


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One READ or WRITE: the request, and the memory here that it fills or empties."""

    request: pb.DataRequest
    local: IovTable
    is_write: bool

    @classmethod
    def of(cls, chunk: Chunk, remote: Extent, local: Extent, epoch: int, *, is_write: bool) -> Exchange:
        """Build the exchange that moves a chunk."""
        return cls(data_request(chunk, remote, epoch, is_write=is_write), local.iov, is_write)

    @property
    def payload(self) -> IovTable | None:
        """What goes along with the request."""
        return self.local if self.is_write else None

    def check(self, limits: PeerLimits, node: str) -> None:
        """Refuse here what the peer would refuse by ending the lane.

        Raises:
            LimitExceeded: more rows or bytes than it takes.
        """
        rows, total = len(self.request.offset) // 8, self.request.total_nbytes
        if rows > limits.max_descriptors:
            raise LimitExceeded(
                f"a chunk has {rows} rows at node {node!r}",
                limit=f"{limits.max_descriptors}, set there by backends.tcp.max_descriptors",
                remedy="lower transfers.max_pieces here",
            )
        if self.is_write and total > limits.max_payload_nbytes:
            raise LimitExceeded(
                f"a chunk of {total} bytes for node {node!r}",
                limit=f"{limits.max_payload_nbytes}, set there by backends.tcp.max_frame",
                remedy="lower transfers.chunk here",
            )


class Answers:
    """Follows the answers to one request until its END.

    ``outcome`` is then the bytes moved and the peer's error. What ``take`` raises leaves the lane out of step.
    """

    def __init__(self, exchange: Exchange, request_id: int, node: str) -> None:
        self._request_id = request_id
        self._node = node
        self._total = exchange.request.total_nbytes
        self._is_write = exchange.is_write
        self._moved = self._total if exchange.is_write else 0
        self._rest = exchange.local
        self.outcome: tuple[int, XferdError | None] = (0, None)

    def limits(self) -> FrameLimits:
        """Return what the next header may be."""
        return _END_ONLY if self._is_write else FrameLimits(_DATA_OR_END, payload_nbytes=self._total - self._moved)

    def take(self, header: Header, control: bytes) -> IovTable | None:
        """Take the next answer; returns the memory that its payload goes to, or None after the END.

        Raises:
            XferdError: the peer ended the lane, with this reason.
            ProtocolViolation, ShortTransfer: the answer does not fit the request.
        """
        if header.type is FrameType.ERROR:
            raise wire.error_from_detail(decode_control(xferd_pb.ErrorDetail, control))
        if header.request_id != self._request_id:
            raise ProtocolViolation(f"an answer to request {header.request_id}", limit=f"{self._request_id}")
        if header.type is FrameType.END:
            self.outcome = self._end(decode_control(pb.DataReply, control))
            return None
        if not header.payload_nbytes or control:
            raise ProtocolViolation("a DATA frame without payload, or with a control part")
        self._moved += header.payload_nbytes
        if self._moved == self._total:
            return self._rest
        window, self._rest = vectored.split(self._rest, header.payload_nbytes)
        return window

    def _end(self, reply: pb.DataReply) -> tuple[int, XferdError | None]:
        if reply.HasField("error"):
            return 0, wire.error_from_detail(reply.error)
        if not self._moved == reply.moved_nbytes == self._total:
            raise ShortTransfer(
                f"node {self._node!r} reports {reply.moved_nbytes} bytes, "
                f"{self._moved} of {self._total} went over the lane"
            )
        return self._moved, None


def explain(error: XferdError, node: str, reason: str) -> XferdError:
    """Return what a mover is told when its lane broke with an error; ``reason`` is why we broke it, if we did."""
    if not isinstance(error, PeerLost):
        return error
    why, who = reason or error.message, f"node {node!r}: "
    lost = PeerLost(why if why.startswith(who) else who + why, remedy="post it again")
    lost.__cause__ = error
    return lost
