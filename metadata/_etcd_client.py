"""One etcd cluster behind several endpoints: deadlines, failover, logging in again, and since when it is away.

Verbs on one member, and the client library, are in ``_etcd_rpc.py``.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog

from xferd.api.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    PermissionDenied,
    Stale,
    Unauthenticated,
    Unavailable,
)
from xferd.metadata._etcd_rpc import Connection, TlsFiles
from xferd.metadata._etcd_wire import Endpoint, KeyValue, Snapshot, prefix_range_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from xferd.api.errors import XferdError
    from xferd.metadata._etcd_rpc import WatchStream
    from xferd.metadata._etcd_wire import Guard, TxnResult, WatchBatch
    from xferd.metadata.etcd_options import EtcdOptions

PAGE = 500
"""Keys an answer, so that a listing of thousands neither stalls etcd nor exceeds a message."""

MIN_ATTEMPTS = 2
"""A connection that etcd's restart broke fails at once, and the next one may be good."""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class EtcdClient:
    """The cluster as one. Only one member is talked to at a time, drawn by chance, another one when that fails.

    Args:
        options: endpoints, timeouts, where credentials are.
        clock: UNIX time.

    Raises (all verbs): ``Unavailable`` where no member answers within the time, ``Unauthenticated`` and
    ``PermissionDenied`` where etcd refuses, ``Overloaded`` where it is full, ``Closed`` after ``aclose``.
    """

    def __init__(self, options: EtcdOptions, *, clock: Callable[[], float] = time.time) -> None:
        self._options = options
        self._clock = clock
        self._endpoints = [Endpoint.parse(text) for text in options.endpoints]
        random.shuffle(self._endpoints)  # N nodes spread over the members
        self._turn = 0
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._retired: set[Connection] = set()  # slow, moved away from, with streams that may still work
        self._streams: dict[Connection, int] = {}
        self._closed = False
        self.away_since: float | None = None
        self.away_reason = ""
        self.outage: tuple[float, float] | None = None  # the last one that ended: its length, and when, in loop time
        self.requests = 0

    # -- life

    def check_files(self) -> None:
        """Read the files that the options name.

        Raises:
            ConfigError: one cannot be read; the message names it.
        """
        self._tls()
        self._password()

    async def aclose(self) -> None:
        """Close all connections. Twice is fine."""
        self._closed = True
        connections = {*self._retired, *self._streams}
        if self._connection is not None:
            connections.add(self._connection)
        self._connection = None
        for connection in connections:
            await connection.aclose()

    # -- verbs

    async def read_prefix(self, prefix: bytes, timeout_s: float) -> Snapshot:
        """Return all keys with a prefix, at one revision."""
        deadline = _now() + timeout_s
        end, start, items = prefix_range_end(prefix), prefix, list[KeyValue]()
        first: Snapshot | None = None
        while True:
            revision = first.revision if first is not None else 0
            try:
                page = await self._page(start, end, revision, deadline)
            except Stale:  # compacted between two pages: begin again
                first, start, items = None, prefix, []
                continue
            first = first or page
            items.extend(page.items)
            if not page.more:
                return Snapshot(first.cluster_id, first.revision, tuple(items))
            start = page.items[-1].key + b"\0"

    async def read_key(self, key: bytes, timeout_s: float) -> KeyValue | None:
        """Return one key, None where it is absent."""
        found = await self._call(lambda connection, left: connection.read(key, b"", left), _now() + timeout_s)
        return found.items[0] if found.items else None

    async def write(
        self, guard: Guard, puts: Mapping[bytes, bytes], deletes: Sequence[bytes], lease: int, timeout_s: float
    ) -> TxnResult:
        """Do all puts and deletes if the guard holds. An answer that got lost makes the retry's guard fail."""
        return await self._call(
            lambda connection, left: connection.write(guard, puts, deletes, lease, left), _now() + timeout_s
        )

    async def grant(self, ttl_s: int, timeout_s: float) -> tuple[int, int]:
        """Return a new lease and its TTL. A grant whose answer got lost ends by itself."""
        return await self._call(lambda connection, left: connection.grant(ttl_s, left), _now() + timeout_s)

    async def keep_alive(self, lease: int, timeout_s: float) -> int:
        """Renew a lease; 0: it has ended."""
        return await self._call(lambda connection, left: connection.keep_alive(lease, left), _now() + timeout_s)

    async def time_to_live(self, lease: int, timeout_s: float) -> int:
        """Return the whole seconds that a lease has left, -1 where it has ended. Does not renew it."""
        return await self._call(lambda connection, left: connection.time_to_live(lease, left), _now() + timeout_s)

    async def revoke(self, lease: int, timeout_s: float) -> None:
        """End a lease; raises ``NotFound`` where it has ended."""
        await self._call(lambda connection, left: connection.revoke(lease, left), _now() + timeout_s)

    async def probe(self, timeout_s: float) -> None:
        """Ask the cheapest question there is."""
        key = self._options.namespace.encode()
        await self._call(lambda connection, left: connection.read(key, b"", left, keys_only=True), _now() + timeout_s)

    async def watch(self, timeout_s: float) -> Watching:
        """Open a stream for watches. Close it; it is not reopened."""
        connection = await self._connected(_now() + timeout_s)
        self._streams[connection] = self._streams.get(connection, 0) + 1
        return Watching(self, connection, connection.watch())

    # -- inside

    async def _page(self, start: bytes, end: bytes, revision: int, deadline: float) -> Snapshot:
        return await self._call(
            lambda connection, left: connection.read(start, end, left, limit=PAGE, revision=revision), deadline
        )

    async def _call(self, verb: Callable[[Connection, float], Awaitable[T]], deadline: float) -> T:
        attempts = max(MIN_ATTEMPTS, len(self._endpoints))
        renewed = False
        failure: XferdError | None = None
        attempt = 0
        while attempt < attempts and (left := deadline - _now()) > 0:
            share = left / max(1, len(self._endpoints) - attempt)
            try:
                connection = await self._connected(_now() + share)
            except (Unavailable, DeadlineExceeded) as exc:
                failure, attempt = exc, attempt + 1
                continue
            try:
                self.requests += 1
                answer = await verb(connection, share)
            except (Unavailable, DeadlineExceeded) as exc:
                failure, attempt = exc, attempt + 1
                await self.give_up(connection, exc)
            except Unauthenticated:
                connection.token = ""
                if renewed or not self._options.user:
                    raise
                renewed = True  # tokens end, and with every change of etcd's users: one more log-in
                await self._log_in(connection, deadline - _now())
            else:
                self.seen()
                await self._drop_retired()
                return answer
        self._check_open()
        raise self.missed(failure)

    def seen(self) -> None:
        """Note that etcd answered."""
        if self.away_since is not None:
            away_s = self._clock() - self.away_since
            self.outage = away_s, _now()
            _log.info("etcd_back", endpoint=self.talking_to(), away_s=round(away_s, 3))
        self.away_since, self.away_reason = None, ""

    def missed(self, failure: XferdError | None) -> Unavailable:
        """Note that no member answered; returns what to raise."""
        reason = failure.message if failure is not None else "no time was left to ask"
        if self.away_since is None:
            self.away_since = self._clock()
            _log.warning("etcd_away", reason=reason)
        self.away_reason = reason
        error = Unavailable(
            f"no etcd member answered: {reason}",
            limit=f"endpoints {', '.join(self._options.endpoints)} within {self._options.request_timeout:g}s",
            remedy="check that etcd runs and has a leader, and metadata.etcd.endpoints; this node goes on trying",
        )
        error.__cause__ = failure
        return error

    def talking_to(self) -> str:
        """Return the member that is asked next, as "host:port"."""
        return str(self._endpoints[self._turn % len(self._endpoints)])

    async def give_up(self, connection: Connection, problem: XferdError) -> None:
        """Turn to the next member. Watches of a slow one live on until another member shows that it is the only one."""
        if self._connection is not connection:
            return  # somebody else was faster
        if len(self._endpoints) == 1 and isinstance(problem, DeadlineExceeded):
            return  # there is nowhere to turn to; gRPC's own pings tell if the connection is dead
        self._connection = None
        self._turn += 1
        if self._streams.get(connection, 0) and isinstance(problem, DeadlineExceeded):
            self._retired.add(connection)
            return
        await connection.aclose()

    async def _drop_retired(self) -> None:
        while self._retired:
            await self._retired.pop().aclose()

    async def stream_ended(self, connection: Connection) -> None:
        """Let go of a connection that was kept for its streams alone."""
        self._streams[connection] -= 1
        if not self._streams[connection]:
            del self._streams[connection]
            if connection in self._retired:
                self._retired.discard(connection)
                await connection.aclose()

    async def _connected(self, deadline: float) -> Connection:
        async with self._connecting:
            self._check_open()
            if self._connection is None:
                connection = Connection(self._endpoints[self._turn % len(self._endpoints)], self._tls())
                try:
                    if self._options.user:
                        await self._log_in(connection, deadline - _now())
                except BaseException as exc:  # a cancelled log-in leaves no channel behind either
                    if isinstance(exc, Unavailable | DeadlineExceeded):
                        self._turn += 1
                    await connection.aclose()
                    raise
                self._connection = connection
            return self._connection

    async def _log_in(self, connection: Connection, left: float) -> None:
        await connection.authenticate(self._options.user, self._password(), max(left, 0.001))

    def _tls(self) -> TlsFiles | None:
        """Read the files again at each connection: certificates are renewed under a running daemon."""
        options = self._options
        if not options.uses_tls:
            return None
        return TlsFiles(*(_content(name, getattr(options, name)) for name in ("tls_ca", "tls_cert", "tls_key")))

    def _password(self) -> str:
        content = _content("password_file", self._options.password_file)
        return content.decode("utf-8", "strict").rstrip() if content is not None else ""

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the etcd client is closed")


class Watching:
    """A stream of watches that tells the client how it fared. See ``WatchStream`` for the verbs."""

    def __init__(self, client: EtcdClient, connection: Connection, stream: WatchStream) -> None:
        self._client = client
        self._connection = connection
        self._stream = stream
        self._open = True

    async def add(self, watch_id: int, start: bytes, end: bytes, revision: int) -> None:
        """Begin to watch a range from a revision on."""
        await self._stream.add(watch_id, start, end, revision)

    async def remove(self, watch_id: int) -> None:
        """Stop a watch."""
        await self._stream.remove(watch_id)

    async def read(self) -> WatchBatch:
        """Wait for what etcd says next; raises ``Unavailable`` when the stream ends."""
        try:
            return await self._stream.read()
        except Unavailable as exc:
            await self._client.give_up(self._connection, exc)
            raise
        except (Unauthenticated, PermissionDenied):
            self.forget_token()
            raise

    def forget_token(self) -> None:
        """Have the next call log in again."""
        self._connection.token = ""

    async def aclose(self) -> None:
        """End the stream. Twice is fine."""
        if self._open:
            self._open = False
            self._stream.close()
            await self._client.stream_ended(self._connection)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _content(key: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"metadata.etcd.{key} = {path!r} cannot be read: {exc.strerror}", remedy="correct the path, or its rights"
        ) from exc
