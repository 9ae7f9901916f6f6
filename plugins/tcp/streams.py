"""Frames on a data lane: blocking, from the lane's own thread, payload straight into or out of iovec tables."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import numpy as np

from xferd.api import wire
from xferd.api.errors import PeerLost, ProtocolViolation, XferdError
from xferd.plugins import vectored
from xferd.plugins.tcp.frames import HEADER_NBYTES, FrameLimits, FrameType, Header, encode_frame

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from xferd.plugins.base import IovTable

LINGER_S = 1.0
MAX_DROPS = 64
"""Reads that a lane which is being refused is given to take notice."""


class BlockingStream:
    """A connected blocking socket that carries frames. One thread reads and writes; any may ``abort``."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._fd = sock.fileno()
        self.reason = ""
        self.sent_nbytes = 0
        self.received_nbytes = 0

    def abort(self, reason: str) -> None:
        """Make every blocking call of the lane's thread end at once. Thread-safe; the thread closes the socket."""
        self.reason = self.reason or reason
        with contextlib.suppress(OSError):  # it may be closed or broken already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; by the lane's thread, or when it has none."""
        self._sock.close()

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be between two exchanges."""
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # ended, or the peer talks out of turn

    def send(
        self, frame_type: FrameType, message: Message, *, request_id: int, payload: IovTable | None = None
    ) -> None:
        """Send a frame, payload included, in as few system calls as there are."""
        nbytes = 0 if payload is None else vectored.total_nbytes(payload)
        head = encode_frame(frame_type, message, request_id=request_id, payload_nbytes=nbytes)
        table = vectored.iov_of(head)  # an address: `head` must stay until it is sent
        self._send_table(table if payload is None else np.concatenate((table, payload)), nbytes)

    def send_payload(self, payload: IovTable, *, request_id: int) -> int:
        """Send a DATA frame, which has no control part; returns the payload's size."""
        nbytes = vectored.total_nbytes(payload)
        head = Header(FrameType.DATA, 0, nbytes, request_id).to_bytes()
        self._send_table(np.concatenate((vectored.iov_of(head), payload)), nbytes)
        return nbytes

    def _send_table(self, table: IovTable, payload_nbytes: int) -> None:
        vectored.send_all(self._fd, table)
        self.sent_nbytes += payload_nbytes

    def receive_header(self, limits: FrameLimits) -> Header | None:
        """Return the next header after checking it, or None where the stream ended between two frames."""
        raw = bytearray(HEADER_NBYTES)
        try:
            got = self._sock.recv_into(raw, HEADER_NBYTES, socket.MSG_WAITALL)
        except OSError as exc:
            raise PeerLost(f"the connection broke: {exc}") from exc
        if not got:
            return None
        if got < HEADER_NBYTES:
            vectored.recv_all(self._fd, vectored.iov_of(memoryview(raw)[got:]))
        return limits.check(Header.from_bytes(raw))

    def receive_control(self, header: Header) -> bytes:
        """Return the control part of a frame whose header came."""
        raw = bytearray(header.control_nbytes)
        if raw:
            vectored.recv_all(self._fd, vectored.iov_of(raw))
        return bytes(raw)

    def receive_payload(self, target: IovTable) -> None:
        """Fill a table with payload."""
        self.received_nbytes += vectored.recv_all(self._fd, target)

    def discard(self, nbytes: int) -> None:
        """Drop payload without receiving it into memory."""
        vectored.discard(self._fd, nbytes)

    def refuse(self, error: XferdError) -> None:
        """Tell the other side why the lane ends, and end it. Never raises for a lane that is broken."""
        with contextlib.suppress(OSError, PeerLost, ProtocolViolation):
            self._sock.settimeout(LINGER_S)  # a peer that does not read must not hold the thread
            self._sock.sendall(encode_frame(FrameType.ERROR, wire.error_to_detail(error)))
            self._sock.shutdown(socket.SHUT_WR)
            # What it has sent is dropped first: closing a socket with unread bytes resets it, and loses the reason.
            for _ in range(MAX_DROPS):
                if not self._sock.recv(1 << 20, socket.MSG_TRUNC):
                    break
