"""Who is told when a transfer ends: listeners first, then who waits, then who watches a session.

Told is at most once for each time that somebody asked; the runner calls ``tell`` when a transfer has come to rest.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.api.types import ENDED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.api.types import SessionId, TransferId
    from xferd.daemon.engine.machine import Transfer


class Ends:
    """Listeners, waiters and watchers of all transfers. Used on the event loop."""

    def __init__(self) -> None:
        self._listeners: dict[TransferId, list[Callable[[Transfer], None]]] = {}
        self._waiters: dict[TransferId, list[asyncio.Future[None]]] = {}
        self._watchers: dict[SessionId, list[asyncio.Queue[Transfer]]] = {}

    def tell(self, transfer: Transfer) -> None:
        """Tell all who asked that a transfer has ended."""
        for listener in self._listeners.pop(transfer.id, ()):
            listener(transfer)
        if self._waiters:
            for future in self._waiters.pop(transfer.id, ()):
                if not future.done():
                    future.set_result(None)
        if self._watchers:
            for queue in self._watchers.get(transfer.session, ()):
                queue.put_nowait(transfer)

    def listen(self, transfer: Transfer, listener: Callable[[Transfer], None]) -> None:
        """Call ``listener`` once, when the transfer ends, before others are woken."""
        self._listeners.setdefault(transfer.id, []).append(listener)

    def unlisten(self, transfer: Transfer, listener: Callable[[Transfer], None]) -> None:
        """Take a listener back; fine if it has been called."""
        listeners = self._listeners.get(transfer.id, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(transfer.id, None)

    def unlisten_all(self, transfer: Transfer) -> None:
        """Forget who listens: the transfer is forgotten too."""
        self._listeners.pop(transfer.id, None)

    async def wait(self, transfers: Sequence[Transfer], timeout_s: float | None, *, any_of: bool = False) -> None:
        """Return when all (or any) of the transfers have ended, or the time is over. Cancel-safe."""
        pending = [transfer for transfer in transfers if transfer.state not in ENDED]
        if not pending or (any_of and len(pending) < len(transfers)) or timeout_s == 0:
            return
        loop = asyncio.get_running_loop()
        futures = [self._waiter(loop, transfer) for transfer in pending]
        try:
            await asyncio.wait(
                futures,
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED if any_of else asyncio.ALL_COMPLETED,
            )
        finally:
            for transfer, future in zip(pending, futures, strict=True):
                self._drop_waiter(transfer, future)

    def watch(self, session: SessionId) -> asyncio.Queue[Transfer]:
        """Return a queue that gets each of the session's transfers as it ends; ``unwatch`` it afterwards."""
        queue: asyncio.Queue[Transfer] = asyncio.Queue()
        self._watchers.setdefault(session, []).append(queue)
        return queue

    def unwatch(self, session: SessionId, queue: asyncio.Queue[Transfer]) -> None:
        """Stop filling a queue."""
        watchers = self._watchers.get(session, [])
        watchers.remove(queue)
        if not watchers:
            self._watchers.pop(session, None)

    def _waiter(self, loop: asyncio.AbstractEventLoop, transfer: Transfer) -> asyncio.Future[None]:
        future = loop.create_future()
        self._waiters.setdefault(transfer.id, []).append(future)
        return future

    def _drop_waiter(self, transfer: Transfer, future: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(transfer.id)
        if waiters is not None and future in waiters:
            waiters.remove(future)
            if not waiters:
                del self._waiters[transfer.id]
