"""Data lanes that this node opened: one thread each, one exchange at a time, and the pool that hands them out."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api import wire
from xferd.api.errors import InternalError, PeerLost, ProtocolViolation, ShortTransfer, XferdError
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.proto import xferd_v1_pb2 as xferd_pb
from xferd.plugins import vectored
from xferd.plugins.tcp.frames import FrameLimits, FrameType, decode_control
from xferd.plugins.tcp.streams import BlockingStream

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from xferd.plugins.base import IovTable, PeerIdentity

log = structlog.get_logger("xferd.tcp")

_END_ONLY = FrameLimits.of({FrameType.END})


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One READ or WRITE: the request, and the memory here that it fills or empties."""

    request: pb.DataRequest
    local: IovTable
    is_write: bool


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What the peer said in its Welcome."""

    max_payload_nbytes: int
    max_descriptors: int


class ClientLane:
    """One data connection to a peer, with its thread. The thread leaves when the lane is no longer good."""

    def __init__(
        self,
        peer: PeerIdentity,
        sock: socket.socket,
        limits: PeerLimits,
        name: str,
        on_left: Callable[[ClientLane], None],
    ) -> None:
        self.peer = peer
        self.limits = limits
        self.stream = BlockingStream(sock)
        self.is_good = True
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Exchange, asyncio.Future[int]] | None] = queue.SimpleQueue()
        self._request_id = 0
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, exchange: Exchange) -> asyncio.Future[int]:
        """Give the thread an exchange; on the loop, one at a time. The future must not be cancelled."""
        result: asyncio.Future[int] = self._loop.create_future()
        self._jobs.put((exchange, result))
        return result

    def abort(self, reason: str) -> None:
        """End the lane: an exchange under way fails, the thread leaves. Twice is fine."""
        self.is_good = False
        self.stream.abort(reason)
        self._jobs.put(None)

    # ---------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            while self.is_good and (job := self._jobs.get()) is not None:
                self._perform(*job)
        finally:
            self.is_good = False
            self.stream.close()
            self._loop.call_soon_threadsafe(self._leave)

    def _perform(self, exchange: Exchange, result: asyncio.Future[int]) -> None:
        error: XferdError | None = None
        moved = 0
        try:
            moved, error = self._exchange(exchange)
        except XferdError as exc:
            self.is_good = False
            error = self._explain(exc)
        except Exception as exc:
            # A bug must not leave the mover waiting for ever; the lane is out of step.
            self.is_good = False
            log.exception("data lane failed", peer=self.peer.node, cause_id=exchange.request.cause_id)
            error = InternalError(f"data lane to {self.peer.node!r}: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
        self._loop.call_soon_threadsafe(_settle, result, moved, error)

    def _explain(self, error: XferdError) -> XferdError:
        if not isinstance(error, PeerLost):
            return error
        why, who = self.stream.reason or error.message, f"node {self.peer.node!r}: "
        lost = PeerLost(why if why.startswith(who) else who + why, remedy="post it again")
        lost.__cause__ = error
        return lost

    def _exchange(self, exchange: Exchange) -> tuple[int, XferdError | None]:
        """Return the bytes moved and the peer's error; what is raised leaves the lane out of step."""
        self._request_id += 1
        self.stream.send(
            FrameType.DATA_REQUEST,
            exchange.request,
            request_id=self._request_id,
            payload=exchange.local if exchange.is_write else None,
        )
        total = exchange.request.total_nbytes
        moved = total if exchange.is_write else 0
        rest = exchange.local
        while True:
            limits = (
                _END_ONLY
                if exchange.is_write
                else FrameLimits.of({FrameType.DATA, FrameType.END}, payload_nbytes=total - moved)
            )
            header = self.stream.receive_header(limits)
            if header is None:
                raise PeerLost("the peer closed the data lane")
            control = self.stream.receive_control(header)
            if header.type is FrameType.ERROR:
                raise wire.error_from_detail(decode_control(xferd_pb.ErrorDetail, control))
            if header.request_id != self._request_id:
                raise ProtocolViolation(f"an answer to request {header.request_id}", limit=f"{self._request_id}")
            if header.type is FrameType.END:
                return self._finish(decode_control(pb.DataReply, control), moved, total)
            if not header.payload_nbytes or control:
                raise ProtocolViolation("a DATA frame without payload, or with a control part")
            window, rest = vectored.split(rest, header.payload_nbytes)
            self.stream.receive_payload(window)
            moved += header.payload_nbytes

    def _finish(self, reply: pb.DataReply, moved: int, total: int) -> tuple[int, XferdError | None]:
        if reply.HasField("error"):
            return 0, wire.error_from_detail(reply.error)
        if not moved == reply.moved_nbytes == total:
            raise ShortTransfer(
                f"node {self.peer.node!r} reports {reply.moved_nbytes} bytes, {moved} of {total} went over the lane"
            )
        return moved, None

    # ------------------------------------------------------------------------------------ on the loop

    def _leave(self) -> None:
        self.thread.join()  # it has nothing left to do
        while not self._jobs.empty():  # given to a lane that had just broken: nothing of it was sent
            if (job := self._jobs.get_nowait()) is not None:
                _settle(job[1], 0, PeerLost(f"node {self.peer.node!r}: {self.stream.reason or 'lane broke'}"))
        if not self.left.done():
            self.left.set_result(None)
        self._on_left(self)


def _settle(result: asyncio.Future[int], moved: int, error: XferdError | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(moved)
    else:
        result.set_exception(error)


class LanePool:
    """At most ``size`` data lanes to one peer, opened when first needed and again after one broke."""

    def __init__(self, size: int, dial: Callable[[], Awaitable[ClientLane]]) -> None:
        self._dial = dial
        self._free = asyncio.Semaphore(size)  # first come, first served
        self._idle: deque[ClientLane] = deque()
        self.lanes: set[ClientLane] = set()
        self._reason = ""

    async def acquire(self) -> ClientLane:
        """Return a lane for one exchange; give it back with ``release``.

        A lane that broke while it was idle is replaced by a new one: nothing was sent on it.

        Raises:
            PeerLost: the pool was closed, or the peer cannot be reached.
        """
        await self._free.acquire()
        try:
            while self._idle:
                lane = self._idle.pop()
                if lane.is_good and lane.stream.is_quiet():
                    return lane
                lane.abort("broke while idle")
            self._check()
            lane = await self._dial()
            self.lanes.add(lane)
            if self._reason:  # closed meanwhile
                lane.abort(self._reason)
            self._check()
        except BaseException:
            self._free.release()
            raise
        return lane

    def release(self, lane: ClientLane) -> None:
        """Take a lane back, good or not."""
        if lane.is_good:
            self._idle.append(lane)
        else:
            lane.abort("not good any more")
        self._free.release()

    def close(self, reason: str) -> None:
        """End all lanes; who waits for one gets ``PeerLost``. Twice is fine."""
        self._reason = self._reason or reason
        self._idle.clear()
        for lane in self.lanes:
            lane.abort(reason)

    def forget(self, lane: ClientLane) -> None:
        """Take out a lane whose thread has left."""
        self.lanes.discard(lane)

    def _check(self) -> None:
        if self._reason:
            raise PeerLost(self._reason)
