"""Packets with file descriptors over a non-blocking SOCK_SEQPACKET socket, on the running loop.

One packet is one message, so there is no framing here and no partial send. What the messages mean is the business
of ``socket.py``. Works on any loop that has ``add_reader``: the raw socket is never given to a transport.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Self

from xferd.api.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_PACKET_NBYTES = 65536
"""One message; the largest ones are grants, at about 100 bytes a pool."""

MAX_FDS = 8
"""File descriptors taken off one packet. A message carries at most one; a few more are taken to be told of and closed,
and what the kernel has to leave out beyond that it closes itself."""


class Packet:
    """One received message and the file descriptors that came with it, which it owns until they are taken.

    A context manager: leaving it closes what was not taken.
    """

    __slots__ = ("_fds", "data", "is_truncated")

    def __init__(self, data: bytes, fds: list[int], *, is_truncated: bool) -> None:
        self.data = data
        self.is_truncated = is_truncated
        self._fds = fds

    def take_fd(self) -> int:
        """Return the one file descriptor; the caller owns it.

        Raises:
            InvalidArgument: there is none, or more than one (which then are closed with the packet).
        """
        self.check_fds(1)
        return self._fds.pop()

    def check_fds(self, count: int) -> None:
        """Raise ``InvalidArgument`` unless exactly ``count`` file descriptors came along."""
        if len(self._fds) != count:
            raise InvalidArgument(
                f"the message came with {len(self._fds)} file descriptors",
                limit=f"exactly {count}",
                remedy="pass file descriptors as SCM_RIGHTS of the packet that speaks of them, and of no other",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())


class PacketSocket:
    """Sends and receives packets; owns the socket. At most one task may receive and one may send at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    async def receive(self) -> Packet | None:
        """Return the next packet, or None at the end of the connection. Cancel-safe: no packet is lost.

        An empty packet looks the same as the end to the kernel's caller and is taken for it.
        """
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self._socket, MAX_PACKET_NBYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
                continue
            except ConnectionError:
                return None
            packet = Packet(data, fds, is_truncated=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))
            if data:
                return packet
            with packet:
                return None

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one packet, waiting for room; ``fds`` stay the caller's. Cancel-safe: all is sent or nothing.

        Raises:
            ConnectionError: the other side is gone.
        """
        while not self.send_nowait(data, fds):
            await self._wait(self._loop.add_writer, self._loop.remove_writer)

    def send_nowait(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one packet if there is room for it; False when there is none. Raises as ``send`` does."""
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the socket. Twice is fine; nobody may be waiting in ``receive`` or ``send``."""
        self._socket.close()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def _wait(self, add: Callable[..., None], remove: Callable[[int], object]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def on_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        descriptor = self._socket.fileno()
        add(descriptor, on_ready)
        try:
            await ready
        finally:
            remove(descriptor)
