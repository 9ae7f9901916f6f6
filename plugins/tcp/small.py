"""The small-message lane: a data lane that the event loop serves itself, for chunks that are over in one round trip.

A thread would have to be woken to send and would wake the loop when it has the answer; for 4 KiB those two hand-overs
cost as much as the network. A bulk chunk stays with a thread, because a vectored call that waits in the kernel moves
a thousand blocks, where the loop would come back to the interpreter for each full buffer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import InternalError, PeerLost, ProtocolViolation, XferdError
from xferd.plugins import vectored
from xferd.plugins.tcp.exchange import Answers, explain
from xferd.plugins.tcp.frames import FrameLimits, FrameType, encode_frame
from xferd.plugins.tcp.lanes import Ticket
from xferd.plugins.tcp.streams import FrameHeads, ReadAhead

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from xferd.plugins.base import IovTable, PeerIdentity
    from xferd.plugins.tcp.exchange import Exchange, PeerLimits

log = structlog.get_logger("xferd.tcp")

_NOTHING = FrameLimits.of(())


class ReadyStream:
    """A connected non-blocking socket that carries frames, read and written as the loop says that it is ready."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.ahead = ReadAhead()
        self.heads = FrameHeads()
        self.sent_nbytes = 0
        self.received_nbytes = 0

    def fill(self) -> bool:
        """Read ahead; returns False where nothing has come.

        Raises:
            PeerLost: the connection ended or broke.
        """
        try:
            got = self.sock.recv_into(self.ahead.room())
        except BlockingIOError:
            return False
        except OSError as exc:
            raise PeerLost(f"the connection broke: {exc}") from exc
        if not got:
            raise PeerLost("the peer closed the data lane")
        self.ahead.came(got)
        return True

    def payload(self, window: IovTable) -> IovTable:
        """Put what has come of a payload in its place; returns the rest of the table."""
        nbytes = vectored.total_nbytes(window)
        rest = self.ahead.payload(window, nbytes)
        if len(rest):
            rest = vectored.recv_now(self.fd, rest)
        self.received_nbytes += nbytes - (vectored.total_nbytes(rest) if len(rest) else 0)
        return rest


class SmallLane:
    """One data connection to a peer, served by the loop: everything here happens on it, and nothing waits."""

    def __init__(
        self, peer: PeerIdentity, sock: socket.socket, limits: PeerLimits, on_left: Callable[[SmallLane], None]
    ) -> None:
        self.peer = peer
        self.limits = limits
        self.stream = ReadyStream(sock)
        self.is_good = True
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._request_id = 0
        self._reason = ""
        self._ticket: Ticket | None = None
        self._answers: Answers | None = None
        self._unsent: IovTable | None = None
        self._window: IovTable | None = None
        self._loop.add_reader(self.stream.fd, self._guarded, self._read)

    def submit(self, exchange: Exchange) -> Ticket:
        """Send the request and return at once; one at a time."""
        ticket = Ticket(self._loop)
        ticket.claim()
        if not self.is_good:
            ticket.settle(0, explain(PeerLost("the data lane broke"), self.peer.node, self._reason))
            return ticket
        self._request_id += 1
        self._ticket = ticket
        self._answers = Answers(exchange, self._request_id, self.peer.node)
        self._guarded(self._send, exchange)
        return ticket

    def abort(self, reason: str) -> None:
        """End the lane: an exchange under way fails, and is at rest when this returns. Twice is fine."""
        if self.is_good:
            self._reason = reason
            self._break(PeerLost(reason))

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be between two exchanges."""
        return self.is_good and self.stream.ahead.is_between_frames and vectored.is_quiet(self.stream.sock)

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        try:
            step(*arguments)
        except XferdError as exc:
            self._break(exc)
        except Exception as exc:
            # A bug must not leave the mover waiting for ever; the lane is out of step.
            log.exception("data lane failed", peer=self.peer.node)
            error = InternalError(f"data lane to {self.peer.node!r}: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            self._break(error)

    def _send(self, exchange: Exchange) -> None:
        payload = exchange.payload
        nbytes = exchange.request.total_nbytes if exchange.is_write else 0
        head = encode_frame(
            FrameType.DATA_REQUEST, exchange.request, request_id=self._request_id, payload_nbytes=nbytes
        )
        self.stream.sent_nbytes += nbytes
        rest = vectored.send_now(self.stream.fd, self.stream.heads.table(head, payload))
        if len(rest):
            self._unsent = rest
            self._loop.add_writer(self.stream.fd, self._guarded, self._write)

    def _write(self) -> None:
        assert self._unsent is not None
        self._unsent = vectored.send_now(self.stream.fd, self._unsent)
        if not len(self._unsent):
            self._unsent = None
            self._loop.remove_writer(self.stream.fd)

    def _read(self) -> None:
        """Take in all that has come, to the end of the exchange."""
        if self._window is not None and not self._fill(self._window):
            return
        while self.stream.fill():
            while (head := self.stream.ahead.head(self._answers.limits() if self._answers else _NOTHING)) is not None:
                if self._answers is None:
                    raise PeerLost("the peer ended the data lane")
                window = self._answers.take(*head)
                if window is None:
                    self._finish(*self._answers.outcome)
                    return
                if not self._fill(window):
                    return

    def _fill(self, window: IovTable) -> bool:
        rest = self.stream.payload(window)
        self._window = rest if len(rest) else None
        return self._window is None

    def _finish(self, moved: int, error: XferdError | None) -> None:
        if self._unsent is not None:
            raise ProtocolViolation("an END before the request was sent", limit="the server receives all of it first")
        ticket, self._ticket, self._answers = self._ticket, None, None
        assert ticket is not None
        ticket.settle(moved, error)

    def _break(self, error: XferdError) -> None:
        """Close the connection and fail the exchange under way."""
        if not self.is_good:
            return
        self.is_good = False
        self._reason = self._reason or error.message
        self._loop.remove_reader(self.stream.fd)
        self._loop.remove_writer(self.stream.fd)
        self.stream.sock.close()
        ticket, self._ticket, self._answers, self._window, self._unsent = self._ticket, None, None, None, None
        if ticket is not None:
            ticket.settle(0, explain(error, self.peer.node, self._reason))
        self._on_left(self)
