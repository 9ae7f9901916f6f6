"""Gets over plain HTTP whose bytes the kernel puts where they go, by requests that obstore has signed.

obstore collects what it receives in a buffer, and that has to be copied to its places afterwards. Here a thread reads
the head of the answer and has the kernel fill the places, so that a byte is copied once (``fetching.py``). It is a
short cut and no second client: it knows one answer, 206 with a length, from a store that speaks S3 at an ``http://``
endpoint. Whatever else comes, an error, a redirect, a connection that breaks, it leaves to obstore, which asks again
and can tell why. What is encrypted goes by obstore alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from xferd.plugins.movers import MoverPool
from xferd.plugins.object.addresses import Addresses
from xferd.plugins.object.connections import Connections
from xferd.plugins.object.faults import FAULTS
from xferd.plugins.object.fetching import Fetch
from xferd.plugins.object.nearness import Nearness

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from xferd.plugins.object.fetching import Address, Range, Received
    from xferd.plugins.object.options import StoreOptions

REST_S = 30.0
"""How long the short cut is left alone after a server did not answer, or asked for less."""

TURN = 16
"""Ranges that a thread asks for before other requests of the store may have its slot."""

NEAR_THREADS = 4
"""How many threads ask a store that is near; others are asked by as many as they may be."""


class Ask(NamedTuple):
    """A range that is wanted.

    Attributes:
        key: of the object.
        etag: the version that it must be of; "" for any.
        range: which bytes, and where to.
        hashes: whether digests are wanted of an object with such metadata. Called in a thread.
    """

    key: str
    etag: str
    range: Range
    hashes: Callable[[Mapping[str, str]], bool]


class DirectGets:
    """Gets of one store. Used on one event loop.

    Threads of its own take what is asked for one after the other, each by a connection of its own, so that many small
    gets cost the event loop little.

    Args:
        client: obstore's, which signs.
        options: of the store, which ``is_for`` takes.
        slots: of requests of the store; a thread holds one while it asks.

    Attributes:
        gets: how many ranges came this way.
    """

    def __init__(self, client: Any, options: StoreOptions, slots: asyncio.Semaphore) -> None:
        self._options = options
        self._slots = slots
        self._addresses = Addresses(client, options)
        self._threads = MoverPool("object-get", options.max_concurrency)
        self._connections = Connections()
        self._nearness = Nearness()
        self._lock = threading.Lock()  # of the two that follow, of what is left of a batch, and of notes
        self._waiting: deque[_One] = deque()
        self._under_way: set[_One] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._rests_until = 0.0
        self._is_closed = False
        self.gets = 0

    @staticmethod
    def is_for(options: StoreOptions) -> bool:
        """Whether a store speaks S3 without encryption, and is reached without a proxy."""
        is_plain = options.scheme == "s3" and options.endpoint.startswith("http://")
        return options.direct_gets and is_plain and not {"http", "all"} & getproxies().keys()

    async def get(self, asks: Sequence[Ask]) -> list[Received | None]:
        """Fill the places of ranges; None for one that has to come another way, with some of it there perhaps.

        Cancelled, it returns when nothing is put anywhere any more.
        """
        nothing: list[Received | None] = [None] * len(asks)
        if not asks or self._is_closed or time.monotonic() < self._rests_until:
            return nothing
        try:
            addresses = [await self._addresses.of(ask.key) for ask in asks]
            requests = [_request(address, ask) for address, ask in zip(addresses, asks, strict=True)]
            await self._addresses.resolve()
        except FAULTS:  # no credentials, no such host: obstore finds the same, and says what it is
            return nothing
        times = {"connect_timeout_s": self._options.connect_timeout, "timeout_s": self._options.request_timeout}
        fetches = [Fetch(made, ask.range, ask.hashes, **times) for made, ask in zip(requests, asks, strict=True)]
        await self._perform(fetches)
        for ask, fetch in zip(asks, fetches, strict=True):
            self._learn(ask.key, fetch)
        return [fetch.received for fetch in fetches]

    async def aclose(self) -> None:
        """Break off what is under way and close all connections. Twice is fine."""
        self._is_closed = True
        with self._lock:
            under_way = list(self._under_way)
        for one in under_way:
            one.fetch.cut()
        self._drop_waiting()
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            await asyncio.wait(self._workers)
        await self._threads.aclose()
        self._connections.close()

    # ------------------------------------------------------------------------------------ work

    async def _perform(self, fetches: list[Fetch]) -> None:
        batch = _Batch(len(fetches), asyncio.get_running_loop())
        mine = [_One(fetch, batch) for fetch in fetches]
        with self._lock:
            self._waiting.extend(mine)
        self._start_workers()
        try:
            await batch.ended.wait()
        except asyncio.CancelledError:
            self._break_off(mine, batch)
            while not batch.ended.is_set():
                with suppress(asyncio.CancelledError):  # raised below, once
                    await batch.ended.wait()
            raise

    def _break_off(self, mine: list[_One], batch: _Batch) -> None:
        for one in mine:
            one.fetch.cut()
        self._drop_waiting(batch)

    def _drop_waiting(self, batch: _Batch | None = None) -> None:
        """End those that have not begun, all or those of a batch; from any thread."""
        with self._lock:
            dropped = [one for one in self._waiting if batch is None or one.batch is batch]
            for one in dropped:
                self._waiting.remove(one)
        for one in dropped:
            self._end(one)

    def _start_workers(self) -> None:
        """Have as many threads ask as there is something to ask for, and as are good for a store so far away."""
        at_once = self._options.max_concurrency
        if self._nearness.is_near(time.monotonic()):
            at_once = min(NEAR_THREADS, at_once)
        while len(self._workers) < min(at_once, len(self._waiting)):
            worker = asyncio.create_task(self._work(), name="object get")
            self._workers.add(worker)
            worker.add_done_callback(self._worker_ended)

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not self._is_closed:
            self._start_workers()  # for what is left after its turn, or came just when its thread saw nothing

    async def _work(self) -> None:
        async with self._slots:
            line = _Line(self._connections.take())
            try:
                await self._threads.run(self._drain, line, self._addresses.host)
            finally:
                if line.sock is not None and self._is_closed:
                    line.sock.close()
                elif line.sock is not None:
                    self._connections.keep(line.sock)

    def _drain(self, line: _Line, addresses: list[Address]) -> None:
        """Ask for one range after the other, for a turn or until none is left; in a thread."""
        for _ in range(TURN):
            with self._lock:
                if not self._waiting:
                    return
                one = self._waiting.popleft()
                self._under_way.add(one)
            sock, line.sock = line.sock, None
            try:
                line.sock = one.fetch.run(sock, addresses)
                if one.fetch.is_discouraging:
                    self._drop_waiting()
                elif one.fetch.received is not None:
                    self._note(one)
            finally:
                self._end(one)

    def _note(self, one: _One) -> None:
        """Learn from one that came; in a thread. The rest of a long queue is better asked for side by side at once."""
        now, fetch = time.monotonic(), one.fetch
        with self._lock:
            is_news = self._nearness.note(fetch.nbytes, fetch.took_s, now)
        if is_news:
            with suppress(RuntimeError):
                one.batch.loop.call_soon_threadsafe(self._start_workers)

    def _end(self, one: _One) -> None:
        """Note that one has ended, or will not begin; from any thread."""
        with self._lock:
            self._under_way.discard(one)
            one.batch.left -= 1
            is_last = not one.batch.left
        if is_last:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                one.batch.loop.call_soon_threadsafe(one.batch.ended.set)

    def _learn(self, key: str, fetch: Fetch) -> None:
        if fetch.is_refused:
            self._addresses.forget(key)
        if fetch.is_discouraging:
            self._rests_until = max(self._rests_until, time.monotonic() + REST_S)
        self.gets += fetch.received is not None


class _Batch:
    """Ranges whose end is told together."""

    def __init__(self, left: int, loop: asyncio.AbstractEventLoop) -> None:
        self.left = left
        self.loop = loop
        self.ended = asyncio.Event()


class _Line:
    """The connection of a worker, if it has any."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.sock = sock


class _One:
    """A range of a batch; compared by identity."""

    def __init__(self, fetch: Fetch, batch: _Batch) -> None:
        self.fetch = fetch
        self.batch = batch


def _request(address: str, ask: Ask) -> bytes:
    """Return the head of a request.

    Raises:
        ValueError: the etag has no place in one.
    """
    parts = urlsplit(address)
    target = parts.path + ("?" + parts.query if parts.query else "")
    span = f"bytes={ask.range.start}-{ask.range.stop - 1}"
    lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc}", f"Range: {span}"]
    if ask.etag:
        lines.append(f"If-Match: {ask.etag}")
    if not all(line.isascii() and line.isprintable() for line in lines):
        raise ValueError("a line of the request is not plain text")
    return "\r\n".join([*lines, "Accept: */*", "", ""]).encode()
