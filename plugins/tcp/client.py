"""Bulk data lanes that this node opened: one blocking socket and one thread each, one exchange at a time."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import InternalError, PeerLost, XferdError
from xferd.plugins.tcp.exchange import Answers, explain
from xferd.plugins.tcp.frames import FrameType
from xferd.plugins.tcp.lanes import Ticket
from xferd.plugins.tcp.streams import BlockingStream, give_way

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from xferd.plugins.base import PeerIdentity
    from xferd.plugins.tcp.exchange import Exchange, PeerLimits
    from xferd.plugins.tcp.options import TcpOptions

log = structlog.get_logger("xferd.tcp")


class ClientLane:
    """One data connection to a peer, with its thread. The thread leaves when the lane is no longer good."""

    def __init__(
        self,
        peer: PeerIdentity,
        sock: socket.socket,
        limits: PeerLimits,
        options: TcpOptions,
        name: str,
        on_left: Callable[[ClientLane], None],
    ) -> None:
        self.peer = peer
        self.limits = limits
        self.stream = BlockingStream(sock, options.turn)
        self.is_good = True
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Exchange, Ticket] | None] = queue.SimpleQueue()
        self._request_id = 0
        self._nice = options.nice
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, exchange: Exchange) -> Ticket:
        """Give the thread an exchange; on the loop, one at a time."""
        ticket = Ticket(self._loop)
        self._jobs.put((exchange, ticket))
        return ticket

    def abort(self, reason: str) -> None:
        """End the lane: an exchange under way fails, the thread leaves. Twice is fine."""
        self.is_good = False
        self.stream.abort(reason)
        self._jobs.put(None)

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be between two exchanges."""
        return self.stream.is_quiet()

    # ---------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        give_way(self._nice)
        try:
            while self.is_good and (job := self._jobs.get()) is not None:
                self._perform(*job)
        finally:
            self.is_good = False
            self.stream.close()
            self._loop.call_soon_threadsafe(self._leave)

    def _perform(self, exchange: Exchange, ticket: Ticket) -> None:
        error: XferdError | None = None
        moved = 0
        try:
            moved, error = self._exchange(exchange)
        except XferdError as exc:
            self.is_good = False
            error = explain(exc, self.peer.node, self.stream.reason)
        except Exception as exc:
            # A bug must not leave the mover waiting for ever; the lane is out of step.
            self.is_good = False
            log.exception("data lane failed", peer=self.peer.node, cause_id=exchange.request.cause_id)
            error = InternalError(f"data lane to {self.peer.node!r}: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
        self._loop.call_soon_threadsafe(ticket.settle, moved, error)

    def _exchange(self, exchange: Exchange) -> tuple[int, XferdError | None]:
        """Return the bytes moved and the peer's error; what is raised leaves the lane out of step."""
        self._request_id += 1
        self.stream.send(
            FrameType.DATA_REQUEST, exchange.request, request_id=self._request_id, payload=exchange.payload
        )
        answers = Answers(exchange, self._request_id, self.peer.node)
        while True:
            head = self.stream.receive_head(answers.limits())
            if head is None:
                raise PeerLost("the peer closed the data lane")
            window = answers.take(*head)
            if window is None:
                return answers.outcome
            self.stream.receive_payload(window)

    # ------------------------------------------------------------------------------------ on the loop

    def _leave(self) -> None:
        self.thread.join()  # it has nothing left to do
        while not self._jobs.empty():  # given to a lane that had just broken: nothing of it was sent
            if (job := self._jobs.get_nowait()) is not None:
                job[1].settle(0, PeerLost(f"node {self.peer.node!r}: {self.stream.reason or 'lane broke'}"))
        if not self.left.done():
            self.left.set_result(None)
        self._on_left(self)
