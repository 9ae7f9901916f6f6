"""One connection of the session socket, from Hello to the end of its session.

Accepting connections is in ``socket.py``, packets are in ``packets.py``; docs/session-socket.md has the exchange.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog
from google.protobuf.message import DecodeError

from xferd.api import wire
from xferd.api.engine import Sessions
from xferd.api.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidState,
    Overloaded,
    ProtocolViolation,
    Unsupported,
    XferdError,
)
from xferd.api.proto.session_v1_pb2 import SessionSocketReply, SessionSocketRequest
from xferd.api.ring import RingSizes
from xferd.api.timeouts import timeout
from xferd.api.types import Caller, Transport
from xferd.daemon.sessions.packets import MAX_PACKET_NBYTES

if TYPE_CHECKING:
    from xferd.api.types import (
        Access,
        PeerCredentials,
        PoolInfo,
        RegionInfo,
        RegisterDeviceRequest,
        SessionGrant,
        SessionId,
    )
    from xferd.daemon.sessions.packets import Packet, PacketSocket
    from xferd.daemon.sessions.pidwatch import ProcessWatch

PROTOCOL_VERSION = 1

_log = structlog.get_logger(__name__)


class SessionEngine(Sessions, Protocol):
    """What the session socket asks of the daemon: sessions, and the verbs that need file descriptors."""

    async def register_memfd(self, caller: Caller, fd: int, nbytes: int, access: Access, label: str) -> RegionInfo:
        """Register a client's memfd and own ``fd`` from the call on, also when it fails; ``nbytes`` 0: its size."""

    async def register_fd(
        self, caller: Caller, fd: int, nbytes: int, writable: bool, access: Access, label: str
    ) -> RegionInfo:
        """Register an open file and own ``fd`` from the call on, also when it fails; ``nbytes`` 0: its size."""

    async def register_device_fd(self, caller: Caller, fd: int, request: RegisterDeviceRequest) -> RegionInfo:
        """Register GPU memory by a VMM allocation's fd, and own ``fd`` from the call on, also when it fails."""

    def pool_fd(self, caller: Caller, pool: str) -> tuple[PoolInfo, int]:
        """Return a pool and its memfd, which stays the daemon's; "" is the first host pool.

        Raises:
            NotFound: no such pool.
            Unsupported: the pool cannot be mapped.
        """

    def open_ring(self, caller: Caller, version: int, sizes: RingSizes) -> tuple[int, tuple[int, int, int]]:
        """Open the session's ring; return its nbytes and the client's fds, which are the caller's to close.

        Raises:
            InvalidState: the session has one.
            Unsupported: rings are turned off, or do not work on this machine.
            InvalidArgument, LimitExceeded: as to the sizes.
        """


@dataclass(frozen=True, slots=True)
class _End:
    """Why a session is over; ``announce`` when the client does not know yet."""

    reason: str
    announce: bool


class _Fatal(Exception):
    """Carries the error that the client gets before its connection is closed."""

    def __init__(self, error: XferdError, request_id: int = 0) -> None:
        super().__init__(str(error))
        self.error = error
        self.request_id = request_id


class Connection:
    """Serves one client. ``run`` never raises but for cancellation, and leaves nothing behind.

    Requests are answered one after the other, in their order. The session ends with the connection, with the
    client's process, or when the daemon says so, whichever comes first; the socket is closed only when the session
    has let go of everything, so that a client which reads its end knows that its names and bytes are free again.
    """

    def __init__(
        self,
        packets: PacketSocket,
        credentials: PeerCredentials,
        watch: ProcessWatch | None,
        engine: SessionEngine,
        *,
        hello_timeout_s: float,
    ) -> None:
        """Take over ``packets`` and ``watch``; without a watch only the socket tells that the client has gone."""
        self._packets = packets
        self._credentials = credentials
        self._watch = watch
        self._engine = engine
        self._hello_timeout_s = hello_timeout_s

    async def run(self) -> None:
        """Serve until the session is over and has ended."""
        try:
            await self._serve()
        except _Fatal as exc:
            self._say_nowait(SessionSocketReply(request_id=exc.request_id, error=wire.error_to_detail(exc.error)))
        except OSError as exc:
            _log.debug("session socket broke", pid=self._credentials.pid, error=str(exc))
        except Exception as exc:  # noqa: BLE001 - a bug met by one client must not end the connections of others
            _log.exception("session connection failed", pid=self._credentials.pid)
            error = InternalError(f"{type(exc).__name__} in the daemon", remedy="see the daemon's log")
            self._say_nowait(SessionSocketReply(error=wire.error_to_detail(error)))
        finally:
            self._packets.close()
            if self._watch:
                self._watch.close()

    async def _serve(self) -> None:
        try:
            async with timeout(self._hello_timeout_s):
                request_id, agent = await self._receive_hello()
        except TimeoutError as exc:
            raise _Fatal(
                DeadlineExceeded("no Hello came", limit=f"{self._hello_timeout_s:g} s", remedy="say Hello at once")
            ) from exc
        try:
            grant = await self._engine.open_session(agent, Transport.SOCKET, credentials=self._credentials)
        except XferdError as exc:
            raise _Fatal(exc, request_id) from exc
        end = _End("an error in the daemon", announce=False)
        try:
            end = await self._serve_session(grant, request_id)
        except asyncio.CancelledError:
            end = _End("the daemon is stopping", announce=True)
            raise
        except OSError as exc:
            end = _End(f"the session socket broke: {exc.strerror}", announce=False)
        finally:
            if end.announce:
                self._say_nowait(SessionSocketReply(closing=end.reason))
            await self._engine.end_session(grant.session, end.reason)

    async def _receive_hello(self) -> tuple[int, str]:
        packet = await self._packets.receive()
        if packet is None:
            raise ConnectionResetError("closed before Hello")
        with packet:
            request = _parse(packet)
            if request.WhichOneof("request") != "hello":
                raise _Fatal(
                    ProtocolViolation("the first message is not Hello", remedy="say Hello first"), request.request_id
                )
            if request.hello.version != PROTOCOL_VERSION:
                error = Unsupported(
                    f"session protocol version {request.hello.version}",
                    limit=f"version {PROTOCOL_VERSION}",
                    remedy="use a client of this daemon's release",
                )
                raise _Fatal(error, request.request_id)
            try:
                packet.check_fds(0)
            except XferdError as exc:
                raise _Fatal(exc, request.request_id) from exc
            return request.request_id, request.hello.agent

    async def _serve_session(self, grant: SessionGrant, request_id: int) -> _End:
        await self._packets.send(
            SessionSocketReply(request_id=request_id, grant=wire.grant_to_message(grant)).SerializeToString()
        )
        caller = Caller(grant.session, grant.agent)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._answer(caller), name=f"session-answer-{grant.session}"),
                group.create_task(self._await_daemon(grant.session), name=f"session-end-{grant.session}"),
            ]
            if self._watch:
                name = f"session-process-{grant.session}"
                tasks.append(group.create_task(self._await_exit(self._watch), name=name))
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
        # A daemon's reason says more than the end of the socket that may come with it.
        return max((task.result() for task in done), key=lambda end: end.announce)

    async def _await_daemon(self, session: SessionId) -> _End:
        return _End(await self._engine.wait_session_end(session), announce=True)

    async def _await_exit(self, watch: ProcessWatch) -> _End:
        await watch.wait()
        return _End(f"process {watch.pid} exited", announce=False)

    async def _answer(self, caller: Caller) -> _End:
        """Answer requests until the client closes its end or sends what cannot be understood."""
        try:
            while (packet := await self._packets.receive()) is not None:
                with packet:
                    request = _parse(packet)
                    await self._answer_one(caller, request, packet)
        except _Fatal as exc:
            self._say_nowait(SessionSocketReply(request_id=exc.request_id, error=wire.error_to_detail(exc.error)))
            return _End(exc.error.message, announce=True)
        except ConnectionError:
            return _End("the client left while it was answered", announce=False)
        return _End("the client closed its session", announce=False)

    async def _answer_one(self, caller: Caller, request: SessionSocketRequest, packet: Packet) -> None:
        reply = SessionSocketReply(request_id=request.request_id)
        fds: tuple[int, ...] = ()
        try:
            match request.WhichOneof("request"):
                case "map_pool":
                    packet.check_fds(0)
                    info, borrowed = self._engine.pool_fd(caller, request.map_pool.pool)
                    fds = (_duplicate(borrowed),)  # sending may wait, and the pool may go meanwhile
                    reply.pool.CopyFrom(wire.pool_to_message(info))
                case "register_memfd":
                    region = await self._register_memfd(caller, request, packet)
                    reply.region.CopyFrom(wire.region_to_message(region))
                case "register_fd":
                    region = await self._register_fd(caller, request, packet)
                    reply.region.CopyFrom(wire.region_to_message(region))
                case "register_device_fd":
                    region = await self._register_device_fd(caller, request, packet)
                    reply.region.CopyFrom(wire.region_to_message(region))
                case "open_ring":
                    packet.check_fds(0)
                    wanted = request.open_ring
                    sizes = RingSizes(wanted.sq_entries, wanted.cq_entries, wanted.detail_nbytes, wanted.arena_nbytes)
                    reply.ring.nbytes, fds = self._engine.open_ring(caller, wanted.version, sizes)
                case "hello":
                    raise InvalidState("this connection has its session", remedy="connect again for another one")
                case _:
                    raise Unsupported(
                        "the message has no request that is known here",
                        limit=f"version {PROTOCOL_VERSION}",
                        remedy="anything that needs no file descriptor goes over gRPC",
                    )
        except XferdError as exc:
            reply.error.CopyFrom(wire.error_to_detail(exc))
        try:
            await self._packets.send(reply.SerializeToString(), fds)
        finally:
            for fd in fds:
                os.close(fd)

    async def _register_memfd(self, caller: Caller, request: SessionSocketRequest, packet: Packet) -> RegionInfo:
        message = request.register_memfd
        access = wire.access_from_wire(message.access)
        return await self._engine.register_memfd(caller, packet.take_fd(), message.nbytes, access, message.label)

    async def _register_fd(self, caller: Caller, request: SessionSocketRequest, packet: Packet) -> RegionInfo:
        message = request.register_fd
        access = wire.access_from_wire(message.access)
        return await self._engine.register_fd(
            caller, packet.take_fd(), message.nbytes, message.writable, access, message.label
        )

    async def _register_device_fd(self, caller: Caller, request: SessionSocketRequest, packet: Packet) -> RegionInfo:
        wanted = wire.register_device_fd_from_message(request.register_device_fd)
        return await self._engine.register_device_fd(caller, packet.take_fd(), wanted)

    def _say_nowait(self, reply: SessionSocketReply) -> None:
        """Send last words if there is room for them; a client that does not read, or has gone, misses them."""
        try:
            self._packets.send_nowait(reply.SerializeToString())
        except OSError as exc:
            _log.debug("last words not sent", pid=self._credentials.pid, error=str(exc))


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError as exc:
        raise Overloaded(
            f"no file descriptor to spare: {exc.strerror}", limit="RLIMIT_NOFILE", remedy="raise LimitNOFILE="
        ) from exc


def _parse(packet: Packet) -> SessionSocketRequest:
    """Return the request. What is too long or is no request leaves no id to answer to, and ends the connection."""
    if packet.is_truncated:
        raise _Fatal(
            ProtocolViolation(
                "the packet is too long or carries too many file descriptors",
                limit=f"{MAX_PACKET_NBYTES} bytes",
                remedy="send one message a packet",
            )
        )
    try:
        request = SessionSocketRequest.FromString(packet.data)
    except DecodeError as exc:
        raise _Fatal(
            ProtocolViolation(
                f"a packet of {len(packet.data)} bytes is no SessionSocketRequest", remedy="send one message a packet"
            )
        ) from exc
    if not request.request_id:
        raise _Fatal(
            ProtocolViolation("request_id is 0", limit="at least 1", remedy="0 marks events; number requests from 1")
        )
    return request
