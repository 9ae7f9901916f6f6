"""A bounded amount of memory that waits in order, so that what is in flight never passes what is configured."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ByteBudget:
    """Bytes that may be in flight at once; used on one event loop.

    Who asks first is served first, so that a large request is not passed over for ever.

    Args:
        nbytes: the limit. A request for more than all of it waits for, and then has, all of it.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used_nbytes = 0
        self.peak_nbytes = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.used_nbytes} of {self.nbytes}, {len(self._waiters)} wait>"

    @asynccontextmanager
    async def lease(self, nbytes: int) -> AsyncIterator[None]:
        """Hold some bytes of the budget inside the block."""
        taken = await self.take(nbytes)
        try:
            yield
        finally:
            self.give_back(taken)

    async def take(self, nbytes: int) -> int:
        """Take bytes, waiting in turn, and return how many were taken, which is what has to be given back.

        Cancel-safe.
        """
        wanted = min(nbytes, self.nbytes)
        if not self._waiters and self.used_nbytes + wanted <= self.nbytes:
            self._take(wanted)
            return wanted
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((wanted, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._serve()  # whoever came next may be smaller
            else:
                self.give_back(wanted)
            raise
        return wanted

    def give_back(self, nbytes: int) -> None:
        """Return what ``take`` took."""
        self.used_nbytes -= nbytes
        assert self.used_nbytes >= 0, "more was given back than taken"
        self._serve()

    def _take(self, nbytes: int) -> None:
        self.used_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)

    def _serve(self) -> None:
        while self._waiters:
            wanted, granted = self._waiters[0]
            if granted.cancelled():  # its task has not run yet to see it
                self._waiters.popleft()
            elif self.used_nbytes + wanted <= self.nbytes:
                self._waiters.popleft()
                self._take(wanted)
                granted.set_result(None)
            else:
                return
