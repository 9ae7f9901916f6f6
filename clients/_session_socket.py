"""The client's end of the session socket: finding it, saying Hello, passing file descriptors, hearing of the end.

The exchange is described in docs/session-socket.md. Requests are made one at a time, so that a reply needs no
table of waiters; whoever waits in vain leaves a late reply behind, which is dropped with its file descriptors.
The end that lives on an event loop is in ``_aio_session_socket.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError

from xferd.api import wire
from xferd.api.errors import DeadlineExceeded, PermissionDenied, ProtocolViolation, Unavailable, XferdError
from xferd.api.proto.session_v1_pb2 import (
    Hello,
    MapPool,
    RegisterFd,
    RegisterMemfd,
    SessionSocketReply,
    SessionSocketRequest,
)
from xferd.clients.memory import ByteArray, map_shared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.api.proto import xferd_v1_pb2 as pb
    from xferd.api.types import Access, RegisterDeviceRequest

ENVIRONMENT = "XFERD_SOCKET"
PROTOCOL_VERSION = 1

_MAX_PACKET_NBYTES = 65536
_MAX_FDS = 8
_UCRED = struct.Struct("iii")
_PR_SET_PTRACER = 0x59616D61  # "Yama"; see prctl(2)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session socket is; with ``owners`` only a daemon of these users is trusted there."""

    path: Path
    owners: frozenset[int] | None = None


def find_place(path: str | Path | None) -> Place:
    """Return where the daemon listens: the argument, else $XFERD_SOCKET, else the default run directory.

    The default is that of a daemon of one's own user, and the system's daemon where there is none.
    """
    named = path or os.environ.get(ENVIRONMENT)
    if named:
        return Place(Path(named))
    system = Place(Path("/run/xferd/session.sock"))
    uid = os.geteuid()
    if uid == 0:
        return system
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        own = Place(Path(runtime) / "xferd/session.sock")
    else:  # anybody may make folders in /tmp, so the kernel must say whose daemon it is
        own = Place(Path(f"/tmp/xferd-{uid}/session.sock"), frozenset({uid, 0}))  # noqa: S108 - checked by owners
    return system if not own.path.exists() and system.path.exists() else own


def hello(agent: str) -> SessionSocketRequest:
    """Return the first message."""
    return SessionSocketRequest(hello=Hello(version=PROTOCOL_VERSION, agent=agent))


def map_pool(pool: str) -> SessionSocketRequest:
    """Return the request for a pool's memfd."""
    return SessionSocketRequest(map_pool=MapPool(pool=pool))


def memfd_request(nbytes: int, access: Access, label: str) -> SessionSocketRequest:
    """Return the request that goes with a memfd."""
    message = RegisterMemfd(nbytes=nbytes, access=_access(access), label=label)
    return SessionSocketRequest(register_memfd=message)


def fd_request(nbytes: int, writable: bool, access: Access, label: str) -> SessionSocketRequest:
    """Return the request that goes with an open file."""
    message = RegisterFd(nbytes=nbytes, writable=writable, access=_access(access), label=label)
    return SessionSocketRequest(register_fd=message)


def device_fd_request(request: RegisterDeviceRequest) -> SessionSocketRequest:
    """Return the request that goes with the fd of a VMM allocation."""
    return SessionSocketRequest(register_device_fd=wire.register_device_fd_to_message(request))


def _access(access: Access) -> pb.Access.ValueType:
    return cast("pb.Access.ValueType", wire.enum_to_wire(access))


def mapped_pool(reply: SessionSocketReply, fds: list[int]) -> ByteArray:
    """Map the pool that an answer brought, and close its fds: the mapping keeps the memory."""
    try:
        if len(fds) != 1:
            raise ProtocolViolation(f"a pool came with {len(fds)} file descriptors", limit="exactly 1")
        return map_shared(fds[0], reply.pool.nbytes)
    finally:
        close_all(fds)


@contextlib.contextmanager
def owned(fd: int) -> Iterator[int]:
    """Close a file descriptor in the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def open_socket(place: Place, timeout_s: float) -> socket.socket:
    """Connect and let the daemon's process read and write ours, for regions that are registered by address.

    Raises:
        Unavailable: nobody listens there, or the daemon is swamped; ``__cause__`` has the system's error.
        PermissionDenied: the path's permissions forbid it, or the daemon is not of a user to trust.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(place.path))
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if place.owners is not None and uid not in place.owners:
            raise PermissionDenied(
                f"the daemon at {place.path} runs as user {uid}",
                limit=f"users {sorted(place.owners)}",
                remedy=f"name the socket in ${ENVIRONMENT} if you trust it",
            )
        _allow_tracer(pid)
    except PermissionError as exc:
        sock.close()
        raise PermissionDenied(f"{place.path}: {exc.strerror}", remedy="ask for the right to write to it") from exc
    except OSError as exc:
        sock.close()
        raise Unavailable(
            f"no daemon answers at {place.path}: {exc.strerror or exc}",
            remedy=f"start xferd, or set ${ENVIRONMENT} to its session socket",
        ) from exc
    except XferdError:
        sock.close()
        raise
    return sock


def _allow_tracer(pid: int) -> None:
    """Let ``pid`` use process_vm_readv on us where the Yama module restricts it; elsewhere EINVAL, and no need."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Inbox:
    """Reads packets off the socket and knows what has been heard of the session's end. Sans waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.end_reason = ""

    def take(self) -> tuple[SessionSocketReply, list[int]] | None:
        """Return the next answer with its fds (the caller's), or None after an event or the end.

        Raises:
            BlockingIOError, TimeoutError: as the socket is set.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, _MAX_PACKET_NBYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            data, fds, flags = b"", [], 0
        try:
            reply = SessionSocketReply.FromString(data)
            if not data:
                self.end_reason = self.end_reason or "the daemon closed the session socket"
            elif flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolViolation("a reply of the daemon was cut", remedy="raise RLIMIT_NOFILE of this process")
            elif reply.request_id:
                taken, fds = fds, []
                return reply, taken
            elif reply.WhichOneof("reply") == "closing":
                self.end_reason = reply.closing
            elif reply.WhichOneof("reply") == "error":
                self.end_reason = reply.error.message
                raise wire.error_from_detail(reply.error)
        except DecodeError as exc:
            raise ProtocolViolation("the daemon sent no SessionSocketReply", remedy="is it xferd?") from exc
        finally:
            close_all(fds)
        return None

    def check_end(self) -> None:
        """Raise ``Unavailable`` if the session is known to be over."""
        if self.end_reason:
            raise ended(self.end_reason)


def ended(reason: str) -> Unavailable:
    """Return the error for whatever is asked of a session that the daemon has ended."""
    return Unavailable(f"the daemon ended this session: {reason}", remedy="connect again")


def close_all(fds: list[int]) -> None:
    """Close file descriptors that came with a reply."""
    for fd in fds:
        os.close(fd)


def answer_of(reply: SessionSocketReply, fds: list[int]) -> tuple[SessionSocketReply, list[int]]:
    """Return an answer, or raise the typed error that it is."""
    if reply.WhichOneof("reply") == "error":
        close_all(fds)
        raise wire.error_from_detail(reply.error)
    return reply, fds


def send(sock: socket.socket, request: SessionSocketRequest, fd: int) -> None:
    data = request.SerializeToString()
    try:
        if fd < 0:
            sock.send(data)
        else:
            socket.send_fds(sock, [data], [fd])
    except ConnectionError as exc:
        raise ended("the daemon closed the session socket") from exc


class SessionSocket:
    """Blocking exchanges, safe between threads."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        """Connect; raises as ``open_socket``."""
        self._inbox = Inbox(open_socket(place, timeout_s))
        self._lock = threading.Lock()
        self._number = 0
        self.timeout_s = timeout_s

    def exchange(self, request: SessionSocketRequest, fd: int = -1) -> tuple[SessionSocketReply, list[int]]:
        """Send a request (``fd`` stays the caller's) and return its answer with its fds (the caller's from here on).

        Raises:
            DeadlineExceeded: no answer in time.
            Unavailable: the session is over.
        """
        with self._lock:
            self._inbox.check_end()
            self._number += 1
            request.request_id = self._number
            deadline = time.monotonic() + self.timeout_s
            sock = self._inbox.sock
            try:
                sock.settimeout(self.timeout_s)
                send(sock, request, fd)
                while True:
                    sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                    answer = self._inbox.take()
                    self._inbox.check_end()
                    if answer is not None and answer[0].request_id == self._number:
                        return answer_of(*answer)
                    if answer is not None:
                        close_all(answer[1])
            except TimeoutError as exc:
                raise DeadlineExceeded(
                    "the daemon did not answer on the session socket", limit=f"{self.timeout_s:g} s"
                ) from exc

    def end_reason(self, wait_s: float) -> str:
        """Return why the daemon ended the session, "" if it has not said so within ``wait_s``."""
        with self._lock:
            try:
                self._inbox.sock.settimeout(wait_s)
                while not self._inbox.end_reason:
                    answer = self._inbox.take()
                    if answer is not None:
                        close_all(answer[1])
            except (XferdError, OSError):
                pass  # nothing to hear, or heard and noted
            return self._inbox.end_reason

    def close(self, linger_s: float) -> None:
        """End the session; returns when the daemon has released all it held, or ``linger_s`` are over."""
        with self._lock, self._inbox.sock as sock:
            deadline = time.monotonic() + linger_s
            try:
                sock.settimeout(linger_s)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(_MAX_PACKET_NBYTES):
                    sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            except OSError:  # too slow, or gone already: the daemon notices the closed socket in any case
                pass
