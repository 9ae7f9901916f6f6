"""Threads that make blocking calls for a backend, and the counters that go with them.

What is called in a thread is the backend's business; cutting work so that a call stays short is the engine's.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from xferd.api.errors import Closed
from xferd.plugins.base import BackendStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


class MoverPool:
    """A bounded set of threads named ``xferd-<name>_<n>``, started when first needed.

    Used from one event loop. Calls beyond the number of threads wait in order; how many may wait is bounded by
    whoever gives out the work (the scheduler gives a backend no more chunks than its ``slots``).
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"xferd-{name}")
        self._running: set[asyncio.Future[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<MoverPool {self.name} {len(self._running)} calls, {self.threads} threads{state}>"

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a thread and return what it returns.

        When this is cancelled, a call that has not begun never begins, and one that has begun is waited for, however
        long it takes and however often the cancellation is repeated: afterwards the call touches no memory any more.

        Raises:
            Closed: the pool was closed.
        """
        if self._closed:
            raise Closed(f"the mover threads of {self.name} were closed", remedy="the backend is stopped")
        job = self._executor.submit(call, *args, **kwargs)
        waiter: asyncio.Future[T] = asyncio.wrap_future(job)
        self._running.add(waiter)
        waiter.add_done_callback(self._running.discard)
        try:
            await asyncio.wait((waiter,))  # unlike awaiting the future itself, this leaves it alone when cancelled
        except asyncio.CancelledError:
            job.cancel()
            await _until_done(waiter)
            raise
        return waiter.result()

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way, end the threads. Twice is fine.

        Cancelled, it lets the calls under way end by themselves, drops those that wait, and does not wait for either.
        """
        self._closed = True
        try:
            if self._running:
                await asyncio.wait(tuple(self._running))
        except asyncio.CancelledError:
            self._executor.shutdown(wait=False, cancel_futures=True)
            raise
        self._executor.shutdown(wait=True)  # idle threads by now: it takes microseconds


async def _until_done(waiter: asyncio.Future[T]) -> None:
    while not waiter.done():
        try:
            await asyncio.wait((waiter,))
        except asyncio.CancelledError:
            continue  # the caller raises the first one when the call has ended
    if not waiter.cancelled():
        waiter.exception()  # seen: an error of a cancelled call interests nobody


class MoveCounter:
    """The counters of a backend; used on the event loop only."""

    def __init__(self) -> None:
        self.moved_nbytes = 0
        self.chunks = 0
        self.failures = 0
        self.busy = 0

    @contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """Count a chunk as busy inside, then as moved; or as a failure where it raised. A cancelled one is neither."""
        self.busy += 1
        try:
            yield
        except Exception:
            self.failures += 1
            raise
        else:
            self.chunks += 1
            self.moved_nbytes += nbytes
        finally:
            self.busy -= 1

    def snapshot(self, slots: int) -> BackendStatistics:
        """Return the counters as they are now."""
        return BackendStatistics(self.moved_nbytes, self.chunks, self.failures, self.busy, slots)
