"""Sockets: dialling, listening, options, and whole frames over a non-blocking socket during the handshake.

**Congestion control.** A connection within one host has no network to share, and what a sender probes for or paces by
costs it more than the copying does: with BBR, which paces, one stream over loopback was seen to be half as fast as with
Reno, for twice the sender's CPU (``tools/bench_lanes.py congestion=bbr``). The algorithm must be chosen before a
connection is up, because pacing that has begun stays on. Which hosts it joins is known afterwards. So ``auto`` makes
sockets with Reno, which every Linux has and lets everybody choose, and gives those that lead to other hosts the
system's algorithm back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from xferd.api import wire
from xferd.api.errors import ConfigError, PeerLost, ProtocolViolation, XferdError
from xferd.api.proto import xferd_v1_pb2 as xferd_pb
from xferd.api.timeouts import timeout
from xferd.plugins.tcp.frames import (
    HANDSHAKE_LIMITS,
    HEADER_NBYTES,
    FrameType,
    Header,
    decode_control,
    encode_frame,
)

if TYPE_CHECKING:
    from xferd.plugins.tcp.options import Address, TcpOptions

MessageT = TypeVar("MessageT", bound=Message)

AUTO = "auto"
WITHIN_HOST = "reno"
NAME_NBYTES = 16
"""Longest name of an algorithm (``TCP_CA_NAME_MAX``)."""

LINGER_S = 1.0
"""How long a refused caller may take to read why; then the connection is reset."""


async def dial(address: Address, options: TcpOptions) -> socket.socket:
    """Return a connected non-blocking socket; ``tune`` comes next.

    Raises:
        PeerLost: nobody answers at any of the host's addresses; ``__cause__`` is the last OSError.
    """
    loop = asyncio.get_running_loop()
    last: OSError | None = None
    try:
        targets = await _resolve(address)
    except OSError as exc:
        raise PeerLost(f"cannot resolve {address}: {exc}", remedy="check the peer's address") from exc
    for family, target in targets:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _begin_congestion(sock, options.congestion)
            await loop.sock_connect(sock, target)
        except OSError as exc:
            last = exc
            sock.close()
        except BaseException:  # cancelled: nothing may be left open
            sock.close()
            raise
        else:
            return sock
    raise PeerLost(f"cannot connect to {address}: {last}", remedy="check that the peer runs and listens") from last


async def listen(address: Address, options: TcpOptions) -> socket.socket:
    """Return a listening non-blocking socket; port 0 takes a free one. ``tune`` what it accepts."""
    family, target = (await _resolve(address))[0]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _begin_congestion(sock, options.congestion)  # what is accepted inherits it
        sock.bind(target)
        sock.listen(options.max_handshakes)
    except OSError:
        sock.close()
        raise
    return sock


async def _resolve(address: Address) -> list[tuple[int, tuple[str, int]]]:
    """Resolve without a helper thread where the host is a number."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return [(int(family), target[:2]) for family, _, _, _, target in found]  # type: ignore[misc]  # (host, port, ...)


def check_congestion(name: str) -> None:
    """Check that the kernel has a congestion control algorithm, and lets us have it.

    Raises:
        ConfigError: it has not, or does not.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            _begin_congestion(sock, name)
        except OSError as exc:
            raise ConfigError(
                f"backends.tcp.congestion {name!r}: {exc.strerror}",
                limit="net.ipv4.tcp_allowed_congestion_control, which has what everybody may choose",
                remedy=f'leave it at "{AUTO}", or load the kernel\'s module for it',
            ) from exc


def _begin_congestion(sock: socket.socket, name: str) -> None:
    """Choose the algorithm of a socket that is not connected yet."""
    if name == AUTO:
        with contextlib.suppress(OSError):  # as the system has it, then
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, WITHIN_HOST.encode())
    elif name:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def _settle_congestion(sock: socket.socket) -> None:
    """Give a connection to another host the system's algorithm."""
    with contextlib.suppress(OSError):  # it has ended already, or the system lets nobody choose
        if sock.getsockname()[0] == sock.getpeername()[0]:
            return
        with socket.socket(sock.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as fresh:
            system = fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_NBYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, system.rstrip(b"\0"))


def tune(sock: socket.socket, options: TcpOptions, *, is_data: bool) -> None:
    """Set the options of a connected lane.

    Dead hosts are noticed by keepalive on every lane. A peer that stands still while its kernel answers is noticed
    by pings on the control lane, which is always being read; a data lane may stand still for good reasons (a slow
    disk), so only the control lane has ``TCP_USER_TIMEOUT``.
    """
    probe_s = max(1, int(options.peer_timeout / 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if options.congestion == AUTO:
        _settle_congestion(sock)
    if not is_data:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.peer_timeout * 1000))
        return
    if options.sndbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.sndbuf)
    if options.rcvbuf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.rcvbuf)


async def send_message(sock: socket.socket, frame_type: FrameType, message: Message) -> None:
    """Send one frame of the handshake. Raises ``PeerLost``."""
    try:
        await asyncio.get_running_loop().sock_sendall(sock, encode_frame(frame_type, message))
    except OSError as exc:
        raise PeerLost(f"the connection broke during the handshake: {exc}") from exc


async def receive_message(sock: socket.socket, frame_type: FrameType, message_type: type[MessageT]) -> MessageT:
    """Receive one frame of the handshake, and not a byte more.

    Raises:
        ProtocolViolation: another frame, or rubbish.
        PeerLost: the connection ended.
        XferdError: what the other side gives as its reason for refusing.
    """
    header = HANDSHAKE_LIMITS.check(Header.from_bytes(await _receive_exactly(sock, HEADER_NBYTES)))
    control = await _receive_exactly(sock, header.control_nbytes)
    if header.type is FrameType.ERROR:
        raise wire.error_from_detail(decode_control(xferd_pb.ErrorDetail, bytes(control)))
    if header.type is not frame_type:
        raise ProtocolViolation(f"a frame of type {header.type.name} came", limit=frame_type.name)
    return decode_control(message_type, bytes(control))


async def _receive_exactly(sock: socket.socket, nbytes: int) -> bytearray:
    loop = asyncio.get_running_loop()
    buffer = bytearray(nbytes)
    view, done = memoryview(buffer), 0
    while done < nbytes:
        try:
            got = await loop.sock_recv_into(sock, view[done:])
        except OSError as exc:
            raise PeerLost(f"the connection broke during the handshake: {exc}") from exc
        if not got:
            raise PeerLost("the other side closed the connection during the handshake")
        done += got
    return buffer


async def refuse(sock: socket.socket, error: XferdError) -> None:
    """Tell the other side why, and close. Never raises for a connection that is broken.

    The reason would be lost if the socket were closed with unread bytes in it (the kernel then resets the
    connection), so what the other side still sends is read and dropped for a moment.
    """
    loop = asyncio.get_running_loop()
    try:
        async with timeout(LINGER_S):
            await send_message(sock, FrameType.ERROR, wire.error_to_detail(error))
            sock.shutdown(socket.SHUT_WR)
            scratch = bytearray(65536)
            while await loop.sock_recv_into(sock, scratch):
                pass
    except (OSError, TimeoutError, PeerLost):
        pass  # it is on its way out
    finally:
        sock.close()
