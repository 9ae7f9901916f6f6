"""Which peers a daemon watches in a store that serves many: those that it deals with, and no others.

One task a peer, from the first dealing on until nothing was to do with it for a while. What a change means is the
manager's business.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import XferdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from xferd.metadata.base import NodeChange, Store

MAX_IDLE = 1024
"""Watched peers with which there is nothing to do at present; the one that was used longest ago is let go first."""

IDLE_S = 600.0
"""So long a peer is watched after it was last used: it may well be used again, and a watch costs the store little."""

_log = structlog.get_logger(__name__)


class PeerInterest:
    """Watches peers by name.

    Args:
        store: is watched.
        on_change: takes each change; changes of one peer come one after the other.
        is_busy: whether there is something to do with a peer now (connected, or followed by a client).
        on_dropped: told the name of a peer that is watched no longer.
        max_idle: how many may be watched that are not busy.
        idle_s: how long one that is not busy stays watched.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        on_change: Callable[[NodeChange], Awaitable[None]],
        *,
        is_busy: Callable[[str], bool],
        on_dropped: Callable[[str], None],
        max_idle: int = MAX_IDLE,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._is_busy = is_busy
        self._on_dropped = on_dropped
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._used: OrderedDict[str, float] = OrderedDict()  # the one used longest ago first
        self._sweeper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    def names(self) -> list[str]:
        """Return who is watched."""
        return list(self._tasks)

    def touch(self, name: str) -> None:
        """Note that a peer is dealt with; begin to watch it if it is not watched."""
        if self._closed:
            return
        self._used[name] = self._clock()
        self._used.move_to_end(name)
        if name not in self._tasks:
            self._tasks[name] = self._spawn(self._watch(name), f"xferd-peer-watch-{name}")
            if len(self._tasks) > self._max_idle:
                self.sweep()
        if self._sweeper is None:
            self._sweeper = self._spawn(self._sweep_for_ever(), "xferd-peer-watch-sweeper")

    def sweep(self) -> None:
        """Let go of peers that were idle for too long, and of the oldest idle ones where they are too many."""
        now = self._clock()
        idle: list[str] = []
        for name in list(self._used):
            if self._is_busy(name):
                self._used[name] = now
                self._used.move_to_end(name)
            else:
                idle.append(name)
        surplus = len(idle) - self._max_idle
        for number, name in enumerate(idle):
            if number < surplus or now - self._used[name] >= self._idle_s:
                self._drop(name)

    async def aclose(self) -> None:
        """End all watches. Twice is fine."""
        self._closed = True
        tasks = [*self._tasks.values(), *self._ending]
        if self._sweeper is not None:
            tasks.append(self._sweeper)
        self._tasks.clear()
        self._used.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- inside

    def _drop(self, name: str) -> None:
        del self._used[name]
        task = self._tasks.pop(name)
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        self._on_dropped(name)

    async def _watch(self, name: str) -> None:
        watch = self._store.watch(name)
        try:
            async for change in watch:
                await self._on_change(change)
        finally:
            await watch.aclose()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._idle_s / 4)
            self.sweep()

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report)
        return task


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (problem := task.exception()) is not None and not isinstance(problem, XferdError):
        _log.error("peer_watch_failed", task=task.get_name(), exc_info=problem)
