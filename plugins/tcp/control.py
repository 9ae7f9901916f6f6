"""A control lane: requests and replies of both sides, many under way at once, on the event loop.

Small messages have this lane to themselves, so that they never wait behind payload. What the requests mean is the
handler's business; pings are answered here, because they ask whether this loop still turns.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from xferd.api import wire
from xferd.api.errors import (
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PeerLost,
    ProtocolViolation,
    XferdError,
)
from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.api.timeouts import timeout
from xferd.plugins.tcp.frames import CONTROL_LIMITS, Frame, FrameParser, FrameType, decode_control, encode_frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from google.protobuf.message import Message

    from xferd.plugins.base import PeerIdentity
    from xferd.plugins.tcp.options import TcpOptions
    from xferd.plugins.tcp.tasks import TaskOwner

READ_NBYTES = 256 << 10
FLUSH_S = 1.0
"""How long a lane that is closed in good order may take to send what it still has."""

log = structlog.get_logger("xferd.tcp")


class ControlLane:
    """One control connection with an authenticated peer. All methods belong to the event loop."""

    def __init__(
        self,
        peer: PeerIdentity,
        options: TcpOptions,
        tasks: TaskOwner,
        handle: Callable[[PeerIdentity, pb.PeerRequest], Awaitable[pb.PeerReply]],
        *,
        is_dialled: bool,
    ) -> None:
        self.peer = peer
        self.is_dialled = is_dialled
        self._options = options
        self._tasks = tasks
        self._handle = handle
        self._parser = FrameParser(CONTROL_LIMITS)
        self._pending: dict[int, asyncio.Future[pb.PeerReply]] = {}
        self._next_id = 1
        self._handling = 0
        self._heard_at = 0.0
        self._reason = ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, sock: socket.socket) -> None:
        """Take over a connected socket whose handshake is done."""
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self._heard_at = asyncio.get_running_loop().time()

    async def run(self) -> str:
        """Serve the lane until it ends, close it, and return why it ended."""
        reader, writer = self._reader, self._writer
        assert reader is not None
        assert writer is not None
        watchdog = self._tasks.spawn(self._watch(), f"xferd-tcp-ping-{self.peer.node}")
        try:
            await self._read(reader)
        except OSError as exc:
            self._reason = self._reason or f"connection broke: {exc}"
        except XferdError as exc:
            self._reason = self._reason or str(exc)
            if isinstance(exc, ProtocolViolation):
                log.warning("peer violated the protocol", peer=self.peer.node, error=str(exc))
                self._write(FrameType.ERROR, wire.error_to_detail(exc), 0)
        finally:
            watchdog.cancel()
            self.close(self._reason or "the peer closed the connection")
        with contextlib.suppress(OSError):  # it broke; that is known
            await writer.wait_closed()
        return self._reason

    async def request(self, request: pb.PeerRequest, timeout_s: float) -> pb.PeerReply:
        """Send a request and return its reply. A cancelled request may have its effect all the same.

        Raises:
            DeadlineExceeded: no reply in time.
            PeerLost: the lane ended before the reply came.
            XferdError: what the reply says.
        """
        if self._reason:
            raise PeerLost(f"node {self.peer.node!r}: {self._reason}")
        request_id = self._next_id
        self._next_id += 1
        reply: asyncio.Future[pb.PeerReply] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = reply
        try:
            async with timeout(timeout_s):
                self._write(FrameType.REQUEST, request, request_id)
                await self._drain()
                answer = await reply
        except TimeoutError as exc:
            kind = request.WhichOneof("request")
            raise DeadlineExceeded(
                f"node {self.peer.node!r} did not answer {kind}", limit=f"{timeout_s} s", remedy="try again"
            ) from exc
        finally:
            self._pending.pop(request_id, None)
            reply.cancel()
        if answer.HasField("error"):
            raise wire.error_from_detail(answer.error)
        return answer

    def greet(self, frame_type: FrameType, message: pb.Welcome | xferd_pb.ErrorDetail) -> None:
        """Send the last frame of the handshake."""
        self._write(frame_type, message, 0)

    def post(self, request: pb.PeerRequest) -> None:
        """Send a request whose reply nobody waits for."""
        self._write(FrameType.REQUEST, request, self._next_id)
        self._next_id += 1

    def close(self, reason: str) -> None:
        """End the lane in good order: what was written is sent first. Twice is fine."""
        self._end(reason)
        if self._writer is not None and not self._writer.is_closing():
            self._writer.close()
            asyncio.get_running_loop().call_later(FLUSH_S, self._writer.transport.abort)

    def abort(self, reason: str) -> None:
        """End the lane at once. Twice is fine."""
        self._end(reason)
        if self._writer is not None:
            self._writer.transport.abort()

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        pending, self._pending = self._pending, {}
        for reply in pending.values():
            if not reply.done():
                reply.set_exception(PeerLost(f"node {self.peer.node!r}: {self._reason}"))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(READ_NBYTES):
            self._heard_at = loop.time()
            self._parser.feed(data)
            while (frame := self._parser.next_frame()) is not None:
                self._dispatch(frame)
        if not self._parser.is_between_frames:
            raise PeerLost("the connection ended in the middle of a frame")

    def _dispatch(self, frame: Frame) -> None:
        if frame.type is FrameType.REQUEST:
            self._take_request(frame)
        elif frame.type is FrameType.REPLY:
            if frame.request_id >= self._next_id:
                raise ProtocolViolation(f"a reply to request {frame.request_id}, which was never sent")
            reply = self._pending.get(frame.request_id)
            if reply is not None and not reply.done():  # else nobody waits any more, or it was a ping
                reply.set_result(decode_control(pb.PeerReply, frame.control))
        else:
            raise wire.error_from_detail(decode_control(xferd_pb.ErrorDetail, frame.control))

    def _take_request(self, frame: Frame) -> None:
        request = decode_control(pb.PeerRequest, frame.control)
        kind = request.WhichOneof("request")
        if kind == "ping":
            self._write(FrameType.REPLY, pb.PeerReply(pong=pb.Pong()), frame.request_id)
            return
        if kind == "goodbye":
            self._reason = self._reason or f"the peer said goodbye: {request.goodbye.reason}"
        if self._handling >= self._options.max_requests:
            error = Overloaded(
                f"{self._handling} requests of this lane are being handled",
                limit=f"backends.tcp.max_requests {self._options.max_requests}",
                remedy="wait for replies",
            )
            self._write(FrameType.REPLY, pb.PeerReply(error=wire.error_to_detail(error)), frame.request_id)
            return
        self._handling += 1
        self._tasks.spawn(self._answer(frame.request_id, request), f"xferd-tcp-{kind}-{self.peer.node}")

    async def _answer(self, request_id: int, request: pb.PeerRequest) -> None:
        try:
            reply = await self._handle(self.peer, request)
        except XferdError as exc:
            reply = pb.PeerReply(error=wire.error_to_detail(exc))
        except Exception as exc:
            # A bug in one handler must not leave the peer waiting.
            log.exception("control request failed", peer=self.peer.node, cause_id=request.cause_id)
            reply = pb.PeerReply(error=wire.error_to_detail(InternalError(f"{type(exc).__name__} in the peer")))
        finally:
            self._handling -= 1
        try:
            self._write(FrameType.REPLY, reply, request_id)
        except ProtocolViolation as exc:  # the reply is too large to be sent
            self._write(FrameType.REPLY, pb.PeerReply(error=wire.error_to_detail(exc)), request_id)
        with contextlib.suppress(PeerLost):  # the reader notices too
            await self._drain()

    async def _watch(self) -> None:
        """Ping a silent peer, and give up one that stays silent."""
        loop, interval_s = asyncio.get_running_loop(), self._options.ping_interval
        while True:
            until_lost_s = self._heard_at + self._options.peer_timeout - loop.time()
            due = loop.time() + min(interval_s, max(0.0, until_lost_s))
            await asyncio.sleep(due - loop.time())
            now = loop.time()
            if now - due > interval_s:  # we stood still ourselves, and have not read what may be there
                self._heard_at = now
            silent_s = now - self._heard_at
            if silent_s >= self._options.peer_timeout:
                self.abort(f"silent for {silent_s:.1f} s")
                return
            if silent_s >= interval_s / 2:
                self.post(pb.PeerRequest(ping=pb.Ping()))

    def _write(self, frame_type: FrameType, message: Message, request_id: int) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(frame_type, message, request_id=request_id))

    async def _drain(self) -> None:
        assert self._writer is not None
        try:
            await self._writer.drain()
        except OSError as exc:
            raise PeerLost(f"node {self.peer.node!r}: {self._reason or exc}") from exc
