"""Putting in place what was received: in mover threads, all that has come meanwhile in one call.

To hand a copy to a thread, and to hear of its end, costs about as much as to copy 1 MiB. So what arrives while all
threads are busy is placed together, by one thread and, where the target is mapped, by one vectored copy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import numpy as np

from xferd.api.errors import Closed, XferdError
from xferd.plugins import vectored
from xferd.plugins.base import MappedSpace, ProcessSpace
from xferd.plugins.object.digests import leaves_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable, Space
    from xferd.plugins.local.mapped import MappedCopier
    from xferd.plugins.movers import MoverPool
    from xferd.plugins.object.ranges import Get


class Arrival:
    """The bytes of one get, on their way from obstore's buffer to their places.

    Args:
        data: what was received; kept until it is in place.
        get: which range it is.
        target: where the get's spans mean something.
        hashes: whether its digests are wanted.
    """

    def __init__(self, data: object, get: Get, target: Space, *, hashes: bool) -> None:
        self._data = np.frombuffer(memoryview(data), dtype=np.uint8)  # type: ignore[arg-type]  # obstore's Bytes
        self.target = target
        self.tables = get.tables(int(self._data.ctypes.data))
        self._hashes = hashes
        self.leaves: NDArray[np.uint64] | None = None
        self.error: XferdError | None = None
        self.waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_ended = False

    def end(self, error: XferdError | None = None) -> None:
        """Wake who waits, on the event loop; no byte of it is placed from now on."""
        self.error = self.error or error
        self.has_ended = True
        if not self.waiter.done():
            self.waiter.set_result(None)

    def hash(self) -> None:
        """Take the digests if they are wanted; in a thread."""
        if self._hashes:
            self.leaves = leaves_of(vectored.iov_of(self._data.data))


class Placer:
    """Places arrivals with a few threads. Used on one event loop.

    Args:
        movers: the threads.
        copier: what copies between mappings.
    """

    def __init__(self, movers: MoverPool, copier: MappedCopier) -> None:
        self._movers = movers
        self._copier = copier
        self._waiting: deque[Arrival] = deque()
        self._drains: set[asyncio.Task[None]] = set()

    async def place(self, arrival: Arrival) -> NDArray[np.uint64] | None:
        """Copy a get's spans to where they go; returns the digests of its range if they are wanted.

        Cancelled, it returns when no byte is placed any more.

        Raises:
            Closed: the backend was closed before.
            MoveFailed, PeerLost, PermissionDenied: the target process.
        """
        self._waiting.append(arrival)
        if len(self._drains) < self._movers.threads:
            self._drains.add(asyncio.create_task(self._drain(), name="object placing"))
        try:
            await arrival.waiter
        except asyncio.CancelledError:
            if arrival in self._waiting:
                self._waiting.remove(arrival)
            else:
                await self._until_ended(arrival)
            raise
        if arrival.error is not None:
            raise arrival.error
        return arrival.leaves

    async def _until_ended(self, arrival: Arrival) -> None:
        while not arrival.has_ended:
            arrival.waiter = asyncio.get_running_loop().create_future()
            with suppress(asyncio.CancelledError):  # the caller raises the first one
                await arrival.waiter

    async def _drain(self) -> None:
        """Place what waits, until nothing does."""
        try:
            while self._waiting:
                await self._place_all()
        finally:  # in the step that saw nothing wait: what comes later starts another one
            self._drains.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _place_all(self) -> None:
        batch = list(self._waiting)
        self._waiting.clear()
        error: XferdError | None = Closed("the object backend has stopped", remedy="the daemon is stopping")
        try:
            await self._movers.run(self._place, batch)
            error = None
        except XferdError as exc:
            error = exc
        finally:
            for arrival in batch:
                arrival.end(error)

    # ------------------------------------------------------------------------------------ in a thread

    def _place(self, batch: Sequence[Arrival]) -> None:
        mapped = [arrival.tables for arrival in batch if isinstance(arrival.target, MappedSpace)]
        if mapped:
            self._copier.copy(_joined([source for source, _ in mapped]), _joined([places for _, places in mapped]))
        for arrival in batch:
            if isinstance(arrival.target, ProcessSpace):
                source, places = arrival.tables
                try:
                    vectored.copy_process(source, places, arrival.target.pid, write=True, pidfd=arrival.target.pidfd)
                except XferdError as error:
                    arrival.error = error
            arrival.hash()


def _joined(tables: Sequence[IovTable]) -> IovTable:
    return tables[0] if len(tables) == 1 else np.concatenate(tables)
