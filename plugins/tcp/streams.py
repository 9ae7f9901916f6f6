"""Frames on a data lane: what came ahead of its reader, and the blocking stream that lanes with a thread use.

Payload goes straight between the socket and the memory it belongs to. The one exception is what a system call that
looked for a header brought along: at most ``READ_AHEAD_NBYTES`` of a frame, which costs a small copy and saves a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np

from xferd.api import wire
from xferd.api.errors import PeerLost, ProtocolViolation, XferdError
from xferd.plugins import vectored
from xferd.plugins.tcp.frames import HEADER_NBYTES, FrameLimits, FrameType, Header, encode_frame

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from xferd.plugins.base import IovTable

READ_AHEAD_NBYTES = 8192
"""What a call that looks for a header may bring along: a small request with its payload comes in one call."""
LINGER_S = 1.0
STALL_S = 1
"""After how long without room in the socket a sender looks whether the other side has hung up."""
MAX_DROPS = 64
"""Reads that a lane which is being refused is given to take notice."""


class ReadAhead:
    """The bytes of a stream that came before they were asked for. No I/O; used by one thread.

    ``room`` is where the next bytes go, ``came`` says how many did. A header is checked before room is made for what
    it announces.
    """

    def __init__(self) -> None:
        self._resize(READ_AHEAD_NBYTES)
        self._start = self._stop = 0
        self._header: Header | None = None

    def _resize(self, nbytes: int) -> None:
        self._memory = np.empty(nbytes, dtype=np.uint8)
        self._view = self._memory.data
        self._address = int(self._memory.ctypes.data)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here."""
        return self._start == self._stop and self._header is None

    @property
    def missing(self) -> int:
        """How many bytes of a frame are still to come whose header is known."""
        return 0 if self._header is None else max(self._header.control_nbytes - len(self), 0)

    def room(self) -> memoryview:
        """Return where the next bytes go: what is missing, or else what may be read ahead."""
        missing = self.missing
        self._settle(max(len(self) + missing, READ_AHEAD_NBYTES))
        return self._view[self._stop : self._stop + missing] if missing else self._view[self._stop :]

    def came(self, nbytes: int) -> None:
        """Note that so many bytes were put into ``room``."""
        self._stop += nbytes

    def head(self, limits: FrameLimits) -> tuple[Header, bytes] | None:
        """Take a header and its control part, or return None until more came.

        Raises:
            ProtocolViolation: the header is not what the limits allow.
        """
        if self._header is None:
            if len(self) < HEADER_NBYTES:
                return None
            raw = self._view[self._start : self._start + HEADER_NBYTES]
            self._header = limits.check(Header.from_bytes(raw))
            self._start += HEADER_NBYTES
        header = self._header
        if len(self) < header.control_nbytes:
            return None
        control = bytes(self._view[self._start : self._start + header.control_nbytes])
        self._start += header.control_nbytes
        self._header = None
        return header, control

    def payload(self, target: IovTable, nbytes: int) -> IovTable:
        """Put what came of a payload of ``nbytes`` in its place; returns the rest of the table, for which nothing came.

        Raises:
            MoveFailed: the memory cannot be written. The stream is out of step then.
        """
        waiting = len(self)
        if not waiting:
            return target
        window, rest = (target, target[:0]) if nbytes <= waiting else vectored.split(target, waiting)
        size = min(nbytes, waiting)
        self._copy_out(size, window)
        self._start += size
        return rest

    def _copy_out(self, nbytes: int, window: IovTable) -> None:
        """Copy the next bytes; one row without a system call, which a mapping that is sure to stay whole allows."""
        address = self._address + self._start
        if len(window) == 1:
            ctypes.memmove(int(window[0, 0]), address, nbytes)
        else:
            vectored.copy_local(np.array([[address, nbytes]], dtype=np.uint64), window)

    def drop(self, nbytes: int) -> int:
        """Drop up to so many bytes of what came; returns how many are still to come."""
        dropped = min(nbytes, len(self))
        self._start += dropped
        return nbytes - dropped

    def _settle(self, capacity: int) -> None:
        """Move what there is to the front of a memory of this size."""
        if self._start == self._stop:
            self._start = self._stop = 0
        if self._start == 0 and len(self._memory) == capacity:
            return
        waiting = bytes(self._view[self._start : self._stop])
        if len(self._memory) != capacity:
            self._resize(capacity)
        self._view[: len(waiting)] = waiting
        self._start, self._stop = 0, len(waiting)


class FrameHeads:
    """Where the head of the frame being sent stands, as a row in front of its payload. Used by one thread."""

    def __init__(self) -> None:
        self._memory = np.empty(READ_AHEAD_NBYTES, dtype=np.uint8)
        self._view = self._memory.data
        self._address = int(self._memory.ctypes.data)
        self._long = b""

    def table(self, head: bytes, payload: IovTable | None) -> IovTable:
        """Return a table over head and payload; good until the next call."""
        size = len(head)
        if size <= len(self._view):
            self._view[:size] = head
            first = np.array([[self._address, size]], dtype=np.uint64)
        else:
            self._long = head  # an address is taken: it must stay
            first = vectored.iov_of(head)
        return first if payload is None else np.concatenate((first, payload))


class BlockingStream:
    """A connected blocking socket that carries frames. One thread reads and writes; any may ``abort``.

    Args:
        sock: connected; it becomes ours.
        turn_nbytes: most payload that one system call moves, see ``vectored.turns``.
    """

    def __init__(self, sock: socket.socket, turn_nbytes: int) -> None:
        sock.settimeout(None)
        # A side that says goodbye and reads no more without closing (a proxy does) still answers the kernel's probes: a
        # call that only sends would wait for room for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", STALL_S, 0))  # struct timeval
        self._turn_nbytes = turn_nbytes
        self._sock = sock
        self._fd = sock.fileno()
        self._ahead = ReadAhead()
        self._heads = FrameHeads()
        self._unsent: IovTable | None = None
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
        return self._ahead.is_between_frames and vectored.is_quiet(self._sock)

    def send(
        self, frame_type: FrameType, message: Message, *, request_id: int, payload: IovTable | None = None
    ) -> None:
        """Send a frame, payload included, in as few system calls as there are."""
        self.flush()
        nbytes = 0 if payload is None else vectored.total_nbytes(payload)
        head = encode_frame(frame_type, message, request_id=request_id, payload_nbytes=nbytes)
        vectored.send_all(self._fd, self._heads.table(head, payload), turn_nbytes=self._turn_nbytes)
        self.sent_nbytes += nbytes

    def send_early(self, frame_type: FrameType, message: Message, *, request_id: int, payload_nbytes: int = 0) -> None:
        """Send as much of a frame's head as goes without waiting; ``flush`` sends the rest, and so does the next frame.

        For what is sent while the other side sends too: if this waited, and the other side's buffer were full, both
        would wait for ever. And for the event loop, which must not wait. A payload follows by ``send_rest``.
        """
        self.flush()
        head = encode_frame(frame_type, message, request_id=request_id, payload_nbytes=payload_nbytes)
        rest = vectored.send_now(self._fd, self._heads.table(head, None))
        self._unsent = rest if len(rest) else None

    def send_rest(self, payload: IovTable) -> None:
        """Send the payload of a frame whose head went early."""
        self.flush()
        vectored.send_all(self._fd, payload, turn_nbytes=self._turn_nbytes)
        self.sent_nbytes += vectored.total_nbytes(payload)

    def flush(self) -> None:
        """Send what ``send_early`` left."""
        if self._unsent is not None:
            vectored.send_all(self._fd, self._unsent)
            self._unsent = None

    def send_payload(self, payload: IovTable, *, request_id: int) -> int:
        """Send a DATA frame, which has no control part; returns the payload's size. Another frame must follow."""
        nbytes = vectored.total_nbytes(payload)
        head = Header(FrameType.DATA, 0, nbytes, request_id).to_bytes()
        vectored.send_all(self._fd, self._heads.table(head, payload), more=True, turn_nbytes=self._turn_nbytes)
        self.sent_nbytes += nbytes
        return nbytes

    def receive_head(self, limits: FrameLimits) -> tuple[Header, bytes] | None:
        """Return the next header, checked, with its control part; None where the stream ended between two frames.

        Raises:
            ProtocolViolation: the header is not what the limits allow.
            PeerLost: the connection broke, or ended within the frame.
        """
        while (head := self._ahead.head(limits)) is None:
            flags = socket.MSG_WAITALL if self._ahead.missing else 0
            try:
                got = self._sock.recv_into(self._ahead.room(), 0, flags)
            except OSError as exc:
                raise PeerLost(f"the connection broke: {exc}") from exc
            if not got:
                if self._ahead.is_between_frames:
                    return None
                raise PeerLost("the connection ended within a frame")
            self._ahead.came(got)
        return head

    def receive_payload(self, target: IovTable) -> None:
        """Fill a table with payload."""
        nbytes = vectored.total_nbytes(target)
        rest = self._ahead.payload(target, nbytes)
        if len(rest):
            vectored.recv_all(self._fd, rest, turn_nbytes=self._turn_nbytes)
        self.received_nbytes += nbytes

    def discard(self, nbytes: int) -> None:
        """Drop payload without receiving it into memory."""
        vectored.discard(self._fd, self._ahead.drop(nbytes))

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
