"""Connections that rest between two requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.plugins import vectored

if TYPE_CHECKING:
    import socket

IDLE_S = 30.0
"""How long one is kept."""


class Connections:
    """Connections that rest. Used on the event loop, which notices when a server closes one."""

    def __init__(self) -> None:
        self._resting: dict[socket.socket, float] = {}  # until when; the one used last is last
        self._expiry: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._resting)

    def take(self) -> socket.socket | None:
        """Return one that is up and rests, if there is any."""
        while self._resting:
            sock = next(reversed(self._resting))
            self._forget(sock)
            if vectored.is_quiet(sock):
                sock.setblocking(True)  # an event loop may have made it one that does not wait
                return sock
            sock.close()
        return None

    def keep(self, sock: socket.socket) -> None:
        """Keep one whose answer was read to its end, for a while."""
        loop = asyncio.get_running_loop()
        self._resting[sock] = loop.time() + IDLE_S
        loop.add_reader(sock, self._drop, sock)
        if self._expiry is None:
            self._expiry = loop.call_later(IDLE_S, self._expire)

    def close(self) -> None:
        """Close all that rest."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        for sock in list(self._resting):
            self._drop(sock)

    def _expire(self) -> None:
        self._expiry = None
        loop = asyncio.get_running_loop()
        for sock, until in list(self._resting.items()):
            if until > loop.time():
                self._expiry = loop.call_at(until, self._expire)
                return
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        """Close one; also called when it can be read, as a server that rests says nothing unless it ends."""
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        del self._resting[sock]
        asyncio.get_running_loop().remove_reader(sock)
