"""The client's end of the session socket on an event loop; see ``_session_socket.py``."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from xferd.api.errors import DeadlineExceeded, XferdError
from xferd.api.timeouts import timeout
from xferd.clients._session_socket import Inbox, answer_of, close_all, ended, send

if TYPE_CHECKING:
    from xferd.api.proto.session_v1_pb2 import SessionSocketReply, SessionSocketRequest


class AsyncSessionSocket:
    """Exchanges on the running loop, which also hears the daemon's events as they come. Cancel-safe."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        """Take over a connected socket."""
        sock.setblocking(False)
        self._inbox = Inbox(sock)
        self._lock = asyncio.Lock()
        self._number = 0
        self.timeout_s = timeout_s
        self._waiter: asyncio.Future[tuple[SessionSocketReply, list[int]]] | None = None
        self._told = asyncio.Event()  # the end is coming
        self._ended = asyncio.Event()  # and here it is
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._on_readable)

    async def exchange(self, request: SessionSocketRequest, fd: int = -1) -> tuple[SessionSocketReply, list[int]]:
        """As ``SessionSocket.exchange``. A cancelled exchange may have had its effect; its answer is dropped."""
        async with self._lock:
            self._inbox.check_end()
            self._number += 1
            request.request_id = self._number
            self._waiter = waiter = self._loop.create_future()
            answer = None
            try:
                # One small packet is under way at a time, so there is always room for it.
                send(self._inbox.sock, request, fd)
                async with timeout(self.timeout_s):
                    answer = await waiter
            except TimeoutError as exc:
                raise DeadlineExceeded(
                    "the daemon did not answer on the session socket", limit=f"{self.timeout_s:g} s"
                ) from exc
            finally:
                self._waiter = None
                if answer is None:
                    _forfeit(waiter)
            return answer_of(*answer)

    async def end_reason(self, wait_s: float) -> str:
        """Return why the daemon ended the session, "" if it has not said so within ``wait_s``."""
        if not self._inbox.end_reason and not self._ended.is_set() and self._inbox.sock.fileno() >= 0:
            self._on_readable()  # what has arrived, without a turn of the loop
        try:
            async with timeout(wait_s):
                await self._told.wait()
        except TimeoutError:
            return ""
        return self._inbox.end_reason

    async def close(self, linger_s: float) -> None:
        """As ``SessionSocket.close``; when cancelled it closes at once."""
        sock = self._inbox.sock
        try:
            if not self._ended.is_set():
                sock.shutdown(socket.SHUT_WR)
                async with timeout(linger_s):
                    await self._ended.wait()
        except (OSError, TimeoutError):  # as in SessionSocket.close
            pass
        finally:
            self._stop_reading()
            sock.close()

    def abort(self) -> None:
        """Close at once; the daemon ends the session on its own."""
        self._stop_reading()
        self._inbox.sock.close()

    def _stop_reading(self) -> None:
        if self._inbox.sock.fileno() >= 0:
            self._loop.remove_reader(self._inbox.sock.fileno())

    def _on_readable(self) -> None:
        try:
            answer = self._inbox.take()
        except BlockingIOError:
            return
        except XferdError as exc:
            self._fail(exc)
            if self._inbox.end_reason:
                self._told.set()
            return
        if answer is None:
            if self._inbox.end_reason:
                self._told.set()
                self._fail(ended(self._inbox.end_reason))
            if self._inbox.end_reason and not _has_more(self._inbox.sock):
                self._stop_reading()
                self._ended.set()
            return
        waiter = self._waiter
        if waiter is None or waiter.done() or answer[0].request_id != self._number:
            close_all(answer[1])
            return
        waiter.set_result(answer)

    def _fail(self, error: XferdError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


def _forfeit(waiter: asyncio.Future[tuple[SessionSocketReply, list[int]]]) -> None:
    """Close the fds of an answer that came just when its exchange was cancelled."""
    if not waiter.cancel() and not waiter.cancelled() and waiter.exception() is None:
        close_all(waiter.result()[1])


def _has_more(sock: socket.socket) -> bool:
    """Say whether more than the end is to come: after `closing` the daemon still releases, then closes."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
