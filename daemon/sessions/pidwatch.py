"""Notice that a process is gone, by its pidfd. Not here: the socket's end, which is noticed in ``socket.py``."""

from __future__ import annotations

import asyncio
import os
import struct
from socket import SO_PEERCRED, SOL_SOCKET
from typing import TYPE_CHECKING, Self

from xferd.api.errors import NotFound, Unsupported
from xferd.api.types import PeerCredentials

if TYPE_CHECKING:
    import socket

SO_PEERPIDFD = 77
"""Linux 6.5; not in Python's socket module. Unlike pidfd_open it cannot hit a process that reused the pid."""

_UCRED = struct.Struct("iii")


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Return who connected a Unix socket, as the kernel noted it at connect time."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size))
    return PeerCredentials(pid, uid, gid)


class ProcessWatch:
    """Waits for the exit of one process that need not be a child.

    Owns a pidfd until ``close``. ``wait`` may be called on the loop that is running, by one task at a time.
    """

    def __init__(self, pid: int, pidfd: int | None = None) -> None:
        """Watch ``pid``; a given ``pidfd`` is owned from here on.

        Raises:
            NotFound: the process is gone.
            Unsupported: the system has no pidfds, or the process is not visible from here.
        """
        self.pid = pid
        self._pidfd = _open_pidfd(pid) if pidfd is None else pidfd

    @classmethod
    def of_peer(cls, sock: socket.socket) -> Self:
        """Watch the process at the other end of a Unix socket. Raises as the constructor does."""
        pid = peer_credentials(sock).pid
        try:
            return cls(pid, sock.getsockopt(SOL_SOCKET, SO_PEERPIDFD))
        except OSError:  # an older kernel; or the process is reaped, which pidfd_open then reports by its own name
            return cls(pid)

    def fileno(self) -> int:
        """Return the pidfd, -1 after ``close``; it turns readable when the process exits."""
        return self._pidfd

    async def wait(self) -> None:
        """Return when the process has exited, at once if it has already. Cancel-safe."""
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[None] = loop.create_future()

        def on_exit() -> None:
            if not exited.done():
                exited.set_result(None)

        loop.add_reader(self._pidfd, on_exit)
        try:
            await exited
        finally:
            loop.remove_reader(self._pidfd)

    def close(self) -> None:
        """Give the pidfd back. Twice is fine; must not be called while ``wait`` runs."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_pidfd(pid: int) -> int:
    if pid <= 0:
        raise Unsupported(f"process id {pid} names no process here", remedy="run both in one pid namespace")
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise NotFound(f"process {pid} is gone") from exc
    except OSError as exc:
        raise Unsupported(f"process {pid} cannot be watched: {exc.strerror}", remedy="Linux 5.3 or newer") from exc
