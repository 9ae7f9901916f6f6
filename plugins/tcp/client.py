"""Bulk data lanes that this node opened: a blocking socket and a thread each, exchanges in line."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import InternalError, PeerLost, XferdError
from xferd.plugins.courtesy import give_way
from xferd.plugins.tcp.exchange import Answers, explain
from xferd.plugins.tcp.frames import FrameType
from xferd.plugins.tcp.lanes import Ticket
from xferd.plugins.tcp.streams import BlockingStream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from xferd.plugins.base import PeerIdentity
    from xferd.plugins.tcp.exchange import Exchange, PeerLimits
    from xferd.plugins.tcp.options import TcpOptions

log = structlog.get_logger("xferd.tcp")


EARLY_ROWS = 2048
"""Rows of a request that the event loop sends itself: 48 KiB, which every socket takes at once."""

WIRE_DEPTH = 2
"""Exchanges of a lane whose requests are sent: one that moves, and one that the peer goes on with at once."""


@dataclass(slots=True, eq=False)
class _Job:
    exchange: Exchange
    ticket: Ticket
    answers: Answers | None = None  # of a request that was sent when the lane was given it


class ClientLane:
    """One data connection to a peer, with its thread. The thread leaves when the lane is no longer good.

    Exchanges end in the order in which they were given to it. The request of the next one is sent before the answer to
    the last one is complete, so that neither side waits for a round trip between two: the payload of a WRITE goes
    behind that of another, and the request of a READ as soon as there is one. Not the payload of a WRITE behind the
    request of a READ: both sides would send, neither would receive.

    The request of an exchange that finds the lane at rest is sent by the event loop: the peer has begun with it before
    this node's thread is awake. The stream is the loop's then, because the thread waits for something to do.
    """

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
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._held: _Job | None = None
        self._last: Ticket | None = None
        self._under_way: deque[tuple[_Job, Answers]] = deque()
        self._request_id = 0
        self._nice = options.nice
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, exchange: Exchange) -> Ticket:
        """Give the thread an exchange; on the loop."""
        ticket = Ticket(self._loop)
        if not self.is_good:  # the thread has left, or is about to
            ticket.settle(0, self._not_begun())
            return ticket
        job = _Job(exchange, ticket)
        if self._last is None or self._last.is_settled:  # they end in order
            self._ask(job)
        self._last = ticket
        self._jobs.put(job)
        return ticket

    def _ask(self, job: _Job) -> None:
        request = job.exchange.request
        if len(request.offset) > EARLY_ROWS * 8:
            return
        job.ticket.claim()
        self._request_id += 1
        job.answers = Answers(job.exchange, self._request_id, self.peer.node)
        nbytes = request.total_nbytes if job.exchange.is_write else 0
        with contextlib.suppress(PeerLost):  # which the thread is told as well
            self.stream.send_early(FrameType.DATA_REQUEST, request, request_id=self._request_id, payload_nbytes=nbytes)

    def abort(self, reason: str) -> None:
        """End the lane: exchanges under way fail, the thread leaves. Twice is fine."""
        self.is_good = False
        self.stream.abort(reason)
        self._jobs.put(None)

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be while it is idle."""
        return self.stream.is_quiet()

    # ---------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        give_way(self._nice)
        try:
            while self.is_good and self._begin_what_may():
                self._finish()
        except XferdError as exc:
            self._fail(exc)
        except Exception as exc:
            # A bug must not leave a mover waiting for ever; the lane is out of step.
            causes = [job.exchange.request.cause_id for job, _ in self._under_way]
            log.exception("data lane failed", peer=self.peer.node, cause_id=causes)
            error = InternalError(f"data lane to {self.peer.node!r}: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            self._fail(error)
        else:
            self._fail(PeerLost("the data lane was closed"))  # between two exchanges, with the next one begun
        finally:
            self.is_good = False
            self.stream.close()
            self._loop.call_soon_threadsafe(self._leave)

    def _fail(self, error: XferdError) -> None:
        self.is_good = False
        for job, _ in self._under_way:
            told = explain(error, self.peer.node, self.stream.reason)
            self._loop.call_soon_threadsafe(job.ticket.settle, 0, told)

    def _begin_what_may(self) -> bool:
        """Begin exchanges as long as there are some and they may go; returns False when the lane is to end."""
        while len(self._under_way) < WIRE_DEPTH and (job := self._next()) is not None:
            payload, is_asked = job.exchange.payload, job.answers is not None
            if job.answers is None:
                self._request_id += 1
                job.answers = Answers(job.exchange, self._request_id, self.peer.node)
            is_early = bool(self._under_way) and payload is None
            self._under_way.append((job, job.answers))
            if not is_asked:
                self._send(job.exchange, is_early=is_early)
            elif payload is not None:
                self.stream.send_rest(payload)
        return bool(self._under_way)

    def _send(self, exchange: Exchange, *, is_early: bool) -> None:
        if is_early:
            self.stream.send_early(FrameType.DATA_REQUEST, exchange.request, request_id=self._request_id)
        else:
            self.stream.send(
                FrameType.DATA_REQUEST, exchange.request, request_id=self._request_id, payload=exchange.payload
            )

    def _next(self) -> _Job | None:
        """Return what to begin next; waits where nothing is under way, and returns None where there is nothing."""
        while True:
            job, self._held = self._held, None
            if job is None:
                try:
                    job = self._jobs.get(block=not self._under_way)
                except queue.Empty:
                    return None
            if job is None:
                return None
            if self._under_way and job.exchange.is_write and not self._under_way[-1][0].exchange.is_write:
                self._held = job
                return None
            if job.answers is not None or job.ticket.claim():  # else it was withdrawn
                return job

    def _finish(self) -> None:
        """Receive the answers to the first exchange under way; what is raised leaves the lane out of step."""
        job, answers = self._under_way[0]
        if len(self._under_way) == 1:
            self.stream.flush()
        while True:
            head = self.stream.receive_head(answers.limits())
            if head is None:
                raise PeerLost("the peer closed the data lane")
            window = answers.take(*head)
            if window is None:
                break
            self.stream.receive_payload(window)
        self._under_way.popleft()
        self._loop.call_soon_threadsafe(job.ticket.settle, *answers.outcome)

    # ------------------------------------------------------------------------------------ on the loop

    def _leave(self) -> None:
        self.thread.join()  # it has nothing left to do
        left = [self._held]
        while not self._jobs.empty():
            left.append(self._jobs.get_nowait())
        for job in left:  # given to a lane that had just broken: at most its request was sent
            if job is not None and (job.answers is not None or job.ticket.claim()):
                job.ticket.settle(0, self._not_begun())
        if not self.left.done():
            self.left.set_result(None)
        self._on_left(self)

    def _not_begun(self) -> XferdError:
        return explain(PeerLost("the data lane broke"), self.peer.node, self.stream.reason)
