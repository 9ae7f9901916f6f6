"""Threads that make blocking calls for a backend, and the counters that go with them.

What is called in a thread is the backend's business; cutting work so that a call stays short is the engine's.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections import deque
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from xferd.api.errors import Closed
from xferd.plugins.base import BackendStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

P = ParamSpec("P")
T = TypeVar("T")


class MoverPool:
    """A bounded set of threads named ``xferd-<name>_<n>``, started when first needed.

    Used from one event loop. Calls beyond the number of threads wait in order; how many may wait is bounded by
    whoever gives out the work (the scheduler gives a backend no more chunks than its ``slots``).

    Not ``concurrent.futures``, whose futures take several locks a call and wake the loop once for each. Here the thread
    that ends the last call of a batch wakes the loop, once for all that ended meanwhile.

    Args:
        name: of the backend.
        threads: how many at most.
        nice: added to the nice value of the threads; above 0 they give way to the event loop where cores are short.
    """

    def __init__(self, name: str, threads: int, *, nice: int = 0) -> None:
        self.name = name
        self.threads = threads
        self._nice = nice
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._started: list[threading.Thread] = []
        self._batches: set[_Batch] = set()
        self._calls = 0
        self._ended: deque[_Batch] = deque()
        self._is_waking = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closed = False

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<MoverPool {self.name} {self._calls} calls, {self.threads} threads{state}>"

    @property
    def idle(self) -> int:
        """Threads for which there is no call."""
        return max(0, self.threads - self._calls)

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a thread and return what it returns.

        When this is cancelled, a call that has not begun never begins, and one that has begun is waited for, however
        long it takes and however often the cancellation is repeated: afterwards the call touches no memory any more.

        Raises:
            Closed: the pool was closed.
        """
        [result] = await self.run_all((functools.partial(call, *args, **kwargs),))
        return result

    async def run_all(
        self, calls: Sequence[Callable[[], T]], *, on_cancel: Callable[[], None] | None = None
    ) -> list[T]:
        """Run blocking calls, side by side where threads are free, and return their results in order.

        ``on_cancel`` is called when this is cancelled, before those under way are waited for: to let them end early.

        All have ended when this returns or raises; of several errors the first in order is raised. Cancelled as
        with ``run``.
        """
        if self._closed:
            raise Closed(f"the mover threads of {self.name} were closed", remedy="the backend is stopped")
        if not calls:
            return []
        batch = _Batch(calls, asyncio.get_running_loop())
        self._begin(batch)
        try:
            await batch.waiter
        except asyncio.CancelledError:
            if on_cancel is not None:
                on_cancel()
            self._drop(batch)
            await self._until_ended(batch)
            raise
        return [entry.outcome() for entry in batch.entries]

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way, end the threads. Twice is fine.

        Cancelled, it lets the calls under way end by themselves, drops those that wait, and does not wait for either.
        """
        self._closed = True
        try:
            await self._quiet.wait()
        except asyncio.CancelledError:
            for batch in list(self._batches):
                self._drop(batch)
            self._end_threads()
            raise
        for thread in self._end_threads():
            thread.join()  # idle by now: it takes microseconds

    # ------------------------------------------------------------------------------------ on the event loop

    def _begin(self, batch: _Batch) -> None:
        self._batches.add(batch)
        self._quiet.clear()
        self._calls += len(batch.entries)
        for entry in batch.entries:
            self._queue.put(entry)
        while len(self._started) < min(self.threads, self._calls):
            name = f"xferd-{self.name}_{len(self._started)}"
            # Daemonic: an interpreter that ends without ``aclose`` must not wait for a queue that nobody fills.
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._started.append(thread)
            thread.start()

    def _drop(self, batch: _Batch) -> None:
        """Take the calls back that have not begun."""
        taken = sum(entry.take() for entry in batch.entries)
        if taken and batch.count_down(taken):
            self._end(batch)

    def _end(self, batch: _Batch) -> None:
        self._batches.remove(batch)
        self._calls -= len(batch.entries)
        if not batch.waiter.done():
            batch.waiter.set_result(None)
        if not self._batches:
            self._quiet.set()

    async def _until_ended(self, batch: _Batch) -> None:
        while batch in self._batches:
            batch.waiter = batch.loop.create_future()
            with suppress(asyncio.CancelledError):  # the caller raises the first one when the calls have ended
                await batch.waiter

    def _end_threads(self) -> list[threading.Thread]:
        ending, self._started = self._started, []
        for _ in ending:
            self._queue.put(None)
        return ending

    def _collect(self) -> None:
        self._is_waking = False  # first: what ends from now on wakes the loop again
        while self._ended:
            self._end(self._ended.popleft())

    # ------------------------------------------------------------------------------------ in the threads

    def _serve(self) -> None:
        if self._nice:
            with suppress(OSError):  # not allowed to lower it again, as in a container: the threads work all the same
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + self._nice)
        while (entry := self._queue.get()) is not None:
            if entry.take():
                entry.perform()
                if entry.batch.count_down(1):
                    self._report(entry.batch)
            del entry  # an idle thread keeps nothing alive

    def _report(self, batch: _Batch) -> None:
        self._ended.append(batch)
        if not self._is_waking:
            self._is_waking = True
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                batch.loop.call_soon_threadsafe(self._collect)


class _Batch:
    """Calls whose end is told together."""

    def __init__(self, calls: Sequence[Callable[[], Any]], loop: asyncio.AbstractEventLoop) -> None:
        self.entries = [_Call(call, self) for call in calls]
        self.loop = loop
        self.waiter: asyncio.Future[None] = loop.create_future()
        self._left = len(self.entries)
        self._lock = threading.Lock()

    def count_down(self, ended: int) -> bool:
        """Note that calls have ended or were taken back; True for the last."""
        with self._lock:
            self._left -= ended
            return self._left == 0


class _Call:
    """One call of a batch: whoever takes it, a thread or the loop that takes it back, has it alone."""

    def __init__(self, call: Callable[[], Any], batch: _Batch) -> None:
        self.batch = batch
        self._call = call
        self._taken = threading.Lock()
        self._has_run = False
        self._result: Any = None
        self._error: BaseException | None = None

    def take(self) -> bool:
        """Take the call; False where somebody has."""
        return self._taken.acquire(blocking=False)

    def perform(self) -> None:
        """Make the call and keep what comes of it."""
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001  # kept, and raised again where it is waited for
            self._error = error
        self._has_run = True

    def outcome(self) -> Any:
        """Return or raise what came of the call; one that was taken back is cancelled."""
        if not self._has_run:
            raise asyncio.CancelledError
        error, self._error = self._error, None  # an error must not keep itself alive through this call
        if error is not None:
            raise error
        return self._result


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
