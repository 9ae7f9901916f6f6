"""Threads that make blocking calls for a backend, and the counters that go with them.

What is called in a thread is the backend's business; cutting work so that a call stays short is the engine's.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from xferd.api.errors import Cancelled, Closed
from xferd.plugins.base import BackendStatistics, Begun
from xferd.plugins.begun import told
from xferd.plugins.courtesy import give_way

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
        nice: added to the nice value of the threads; above 0 they give way to the event loop where cores are short,
            see ``courtesy.py``.
    """

    def __init__(self, name: str, threads: int, *, nice: int = 0) -> None:
        self.name = name
        self.threads = threads
        self._nice = nice
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._started: list[threading.Thread] = []
        self._batches: set[Batch] = set()
        self._calls = 0
        self._ended: deque[Batch] = deque()
        self._is_waking = False
        self._counting = threading.Lock()  # of calls that have ended, by all threads
        self._loop: asyncio.AbstractEventLoop | None = None
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

    def begin(self, calls: Sequence[Callable[[], Any]], done: Callable[[Batch], None]) -> Batch:
        """Have blocking calls, at least one, made in threads, side by side where threads are free.

        ``done`` is called on the event loop once all have ended; then none of them touches memory any more.

        Raises:
            Closed: the pool was closed.
        """
        if self._closed:
            raise Closed(f"the mover threads of {self.name} were closed", remedy="the backend is stopped")
        self._loop = asyncio.get_running_loop()
        batch = Batch(calls, done, self)
        if not self._batches:
            self._quiet.clear()
        self._batches.add(batch)
        self._calls += len(calls)
        for _ in calls:
            self._queue.put(batch)
        while len(self._started) < min(self.threads, self._calls):
            self._start_thread()
        return batch

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in a thread and return what it returns.

        When this is cancelled, a call that has not begun never begins, and one that has begun is waited for, however
        long it takes and however often the cancellation is repeated: afterwards the call touches no memory any more.

        Raises:
            Closed: the pool was closed.
        """
        [result] = await self.run_all((functools.partial(call, *args, **kwargs),))
        return result

    async def run_all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run blocking calls, side by side where threads are free, and return their results in order.

        All have ended when this returns or raises; of several errors the first in order is raised. Cancelled as
        with ``run``.
        """
        if not calls and not self._closed:
            return []

        results: list[T] = (await told(functools.partial(self.begin, calls))).results()
        return results

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way, end the threads. Twice is fine.

        Cancelled, it lets the calls under way end by themselves, drops those that wait, and does not wait for either.
        """
        self._closed = True
        try:
            await self._quiet.wait()
        except asyncio.CancelledError:
            for batch in list(self._batches):
                self.drop(batch)
            self._end_threads()
            raise
        for thread in self._end_threads():
            thread.join()  # idle by now: it takes microseconds

    # ------------------------------------------------------------------------------------ on the event loop

    def _start_thread(self) -> None:
        name = f"xferd-{self.name}_{len(self._started)}"
        # Daemonic: an interpreter that ends without ``aclose`` must not wait for a queue that nobody fills.
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._started.append(thread)
        thread.start()

    def drop(self, batch: Batch) -> None:
        """Take the calls of a batch back that have not begun; ``done`` is told in a later turn."""
        taken = batch.take_all()
        if taken and self._count(batch, taken):
            self._report(batch)

    def _collect(self) -> None:
        self._is_waking = False  # first: what ends from now on wakes the loop again
        try:
            while self._ended:
                batch = self._ended.popleft()
                self._batches.remove(batch)
                self._calls -= len(batch.calls)
                if not self._batches:
                    self._quiet.set()
                batch.done(batch)
        finally:
            if self._ended:  # a bug in one ``done`` is no reason to leave the others waiting
                asyncio.get_running_loop().call_soon(self._collect)

    def _end_threads(self) -> list[threading.Thread]:
        ending, self._started = self._started, []
        for _ in ending:
            self._queue.put(None)
        return ending

    # ------------------------------------------------------------------------------------ in the threads

    def _serve(self) -> None:
        give_way(self._nice)
        while (batch := self._queue.get()) is not None:
            if batch.perform_next() and self._count(batch, 1):
                self._report(batch)
            del batch  # an idle thread keeps nothing alive

    def _count(self, batch: Batch, ended: int) -> bool:
        """Note that calls have ended or were taken back; True for the last."""
        with self._counting:
            batch.left -= ended
            return batch.left == 0

    def _report(self, batch: Batch) -> None:
        self._ended.append(batch)
        if not self._is_waking:
            self._is_waking = True
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._collect)


class Batch(Begun):
    """Calls whose end is told together. Made by ``MoverPool.begin``.

    ``on_abort`` is called by the first ``abort``, to let calls under way end early.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], done: Callable[[Batch], None], pool: MoverPool) -> None:
        self.calls = calls
        self.done = done
        self.on_abort: Callable[[], None] | None = None
        self.left = len(calls)  # calls that have not ended, under the pool's lock
        self._pool = pool
        self._todo = deque(range(len(calls)))  # whoever pops a number, a thread or the loop, has that call alone
        self._ends: list[tuple[Any, BaseException | None] | None] = [None] * len(calls)

    def abort(self) -> None:
        """Take back the calls that have not begun; those under way are waited for by ``done``."""
        hurry, self.on_abort = self.on_abort, None
        if hurry is not None:
            hurry()
        self._pool.drop(self)

    def results(self) -> list[Any]:
        """Return what the calls returned, in order, or raise what the first of those that failed raised.

        Raises:
            CancelledError: a call was taken back before it began.
        """
        ends, self._ends = self._ends, []  # an error must not keep itself alive through this batch
        results = []
        for end in ends:
            if end is None:
                raise asyncio.CancelledError
            if end[1] is not None:
                raise end[1]
            results.append(end[0])
        return results

    def outcome(self) -> int | Exception:
        """Return the sum of what the calls returned, or the error of the first of those that failed."""
        try:
            total: int = sum(self.results())
        except asyncio.CancelledError:
            return Cancelled("the chunk was stopped before all of it had moved")
        except Exception as error:  # noqa: BLE001  # told, not swallowed
            return error
        return total

    def take_all(self) -> int:
        """Take the calls that have not begun, and return how many."""
        taken = 0
        with suppress(IndexError):
            while True:
                self._todo.popleft()
                taken += 1
        return taken

    def perform_next(self) -> bool:
        """Make a call that has not begun, and keep what comes of it; False where there is none any more."""
        try:
            number = self._todo.popleft()
        except IndexError:
            return False
        try:
            self._ends[number] = self.calls[number](), None
        except BaseException as error:  # noqa: BLE001  # kept, and raised again where it is waited for
            self._ends[number] = None, error
        return True


class MoveCounter:
    """The counters of a backend; used on the event loop only."""

    def __init__(self) -> None:
        self.moved_nbytes = 0
        self.chunks = 0
        self.failures = 0
        self.busy = 0

    def ended(self, nbytes: int, outcome: int | Exception) -> None:
        """Count the end of a chunk that was begun with ``busy += 1``, as ``moving`` does."""
        self.busy -= 1
        if not isinstance(outcome, Exception):
            self.chunks += 1
            self.moved_nbytes += nbytes
        elif not isinstance(outcome, Cancelled):
            self.failures += 1

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
