"""The session socket's server: listens, checks who connects, and runs one ``Connection`` each.

The exchange itself is in ``connection.py``. The listening socket is made here, or handed over by systemd.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from xferd.api import wire
from xferd.api.errors import (
    AlreadyExists,
    Closed,
    ConfigError,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unsupported,
    XferdError,
)
from xferd.api.proto.session_v1_pb2 import SessionSocketReply
from xferd.daemon.sessions.connection import Connection, SessionEngine
from xferd.daemon.sessions.packets import PacketSocket
from xferd.daemon.sessions.pidwatch import ProcessWatch, peer_credentials

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.api.types import PeerCredentials

__all__ = ["SessionEngine", "SessionSocketServer"]

MAX_PATH_NBYTES = 107
"""What fits into sockaddr_un."""

HELLO_TIMEOUT_S = 5.0
_BACKLOG = 128
_ACCEPTS_A_WAKE = 64

_log = structlog.get_logger(__name__)


class SessionSocketServer:
    """Gives local processes their sessions over a Unix SOCK_SEQPACKET socket.

    Owns the listening socket, its path if it bound it, and one task a connection. ``aclose`` ends the sessions of
    all connections and returns when that is done.
    """

    def __init__(
        self,
        path_or_socket: str | Path | socket.socket,
        engine: SessionEngine,
        *,
        allowed_uids: Iterable[int] = (),
        mode: int = 0o660,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        max_connections: int = 512,
    ) -> None:
        """Keep what is needed; ``start`` does the rest.

        Args:
            path_or_socket: where to listen, or a listening socket (owned from here on), for example systemd's.
            engine: whose sessions these are.
            allowed_uids: users who may connect; none: the daemon's own and root.
            mode: permissions of the socket's path; connecting needs the right to write.
            hello_timeout_s: how long a connection may be silent before its Hello.
            max_connections: refused beyond, with an error that says so.
        """
        self._listener = path_or_socket if isinstance(path_or_socket, socket.socket) else None
        self._path = None if isinstance(path_or_socket, socket.socket) else Path(path_or_socket)
        self._bound: os.stat_result | None = None
        self._engine = engine
        self._allowed_uids = frozenset(allowed_uids) or frozenset({os.geteuid(), 0})
        self._mode = mode
        self._hello_timeout_s = hello_timeout_s
        self._max_connections = max_connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._spare_fd = -1
        self._is_listening = False
        self._is_closed = False

    @property
    def connections(self) -> int:
        """Number of connections that are served, or are ending."""
        return len(self._tasks)

    async def start(self) -> None:
        """Listen. Twice is fine.

        Raises:
            AlreadyExists: another process listens at the path.
            ConfigError: the path is too long, or cannot be bound; ``__cause__`` has the system's error.
            Closed: ``aclose`` was called.
        """
        if self._is_closed:
            raise Closed("the session socket is closed")
        if self._is_listening:
            return
        if self._listener is None:
            assert self._path is not None
            self._listener = _bind(self._path, self._mode)
            self._bound = self._path.stat()
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._on_acceptable)
        self._is_listening = True

    async def aclose(self) -> None:
        """Stop listening, tell every client, end their sessions, and return when that is done. Twice is fine."""
        self._is_closed = True
        self.stop_listening()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop_listening(self) -> None:
        """Refuse new connections; those that are there go on. For a drain, or as the first step of closing."""
        if self._listener is not None:
            if self._is_listening:
                asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self._unlink()
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
        self._spare_fd = -1
        self._is_listening = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _on_acceptable(self) -> None:
        for _ in range(_ACCEPTS_A_WAKE):  # bounded, so that a storm of connects leaves the loop its turn
            assert self._listener is not None
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._on_accept_failed(exc)
                return
            self._admit(sock)

    def _on_accept_failed(self, exc: OSError) -> None:
        """Without a free descriptor, give the waiting client its end; else the loop would spin on the listener."""
        _log.warning("a client could not be accepted", error=exc.strerror)
        if exc.errno not in (errno.EMFILE, errno.ENFILE) or self._spare_fd < 0:
            return
        assert self._listener is not None
        os.close(self._spare_fd)
        try:
            self._listener.accept()[0].close()
        except OSError as again:
            _log.debug("nor turned away", error=again.strerror)
        self._spare_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _admit(self, sock: socket.socket) -> None:
        packets = PacketSocket(sock)
        try:
            credentials = peer_credentials(sock)
            self._check(credentials)
            watch = _watch(sock)
        except (XferdError, OSError) as exc:
            _refuse(packets, exc)
            return
        connection = Connection(packets, credentials, watch, self._engine, hello_timeout_s=self._hello_timeout_s)
        task = asyncio.get_running_loop().create_task(connection.run(), name=f"session-socket-{credentials.pid}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check(self, credentials: PeerCredentials) -> None:
        if credentials.uid not in self._allowed_uids:
            _log.warning("user refused at the session socket", uid=credentials.uid, pid=credentials.pid)
            raise PermissionDenied(
                f"user {credentials.uid} may not attach",
                limit=f"sessions.allowed_uids = {sorted(self._allowed_uids)}",
                remedy="add the user to the setting",
            )
        if len(self._tasks) >= self._max_connections:
            raise Overloaded(
                f"{len(self._tasks)} connections are open",
                limit=f"{self._max_connections} connections",
                remedy="close some, and try again",
            )

    def _unlink(self) -> None:
        """Remove the path if it still is ours; a daemon that came after us may have bound it again."""
        if self._path is None or self._bound is None:
            return
        try:
            if os.path.samestat(self._path.stat(), self._bound):
                self._path.unlink()
        except FileNotFoundError:
            pass
        self._bound = None


def _watch(sock: socket.socket) -> ProcessWatch | None:
    """Watch the client's process; where it cannot be seen (another pid namespace), its socket's end must do."""
    try:
        return ProcessWatch.of_peer(sock)
    except Unsupported as exc:
        _log.debug("client's process is not watched", reason=exc.message)
        return None
    except NotFound:
        return None  # gone already: the end of its socket comes next


def _refuse(packets: PacketSocket, exc: XferdError | OSError) -> None:
    error = exc if isinstance(exc, XferdError) else Overloaded(f"{exc.strerror}", remedy="try again")
    try:
        packets.send_nowait(SessionSocketReply(error=wire.error_to_detail(error)).SerializeToString())
    except OSError as gone:
        _log.debug("refused client had gone", error=gone.strerror)
    finally:
        packets.close()


def _bind(path: Path, mode: int) -> socket.socket:
    if len(os.fsencode(path)) > MAX_PATH_NBYTES:
        raise ConfigError(
            f"sessions.socket is {len(os.fsencode(path))} bytes long: {path}",
            limit=f"{MAX_PATH_NBYTES} bytes",
            remedy="choose a shorter node.run_dir or sessions.socket",
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(str(path))
        path.chmod(mode)  # before listen: nobody can connect in between
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"cannot listen at {path}: {exc.strerror}", remedy="check that the folder exists and may be written to"
        ) from exc
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed; refuse where one still answers."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as exc:  # a full backlog, or another type of socket: somebody is there
            raise AlreadyExists(f"{path} is in use: {exc.strerror}", remedy="choose another path") from exc
    raise AlreadyExists(f"another daemon listens at {path}", remedy="stop it, or choose another node.run_dir")
