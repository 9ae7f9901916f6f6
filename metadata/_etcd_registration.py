"""Keeps this node's keys in etcd under a lease: written once, renewed, and written anew when the lease is lost.

Which keys those are comes from ``_etcd_records.py``; what others wrote is read by ``_etcd_cache.py``.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import AlreadyExists, InvalidState, LimitExceeded, NotFound, Unavailable, XferdError
from xferd.api.timeouts import timeout
from xferd.metadata._etcd_records import encode_node
from xferd.metadata._etcd_wire import Guard
from xferd.metadata.base import LeaseView
from xferd.metadata.records import node_from_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import NodeInfo
    from xferd.metadata._etcd_client import EtcdClient
    from xferd.metadata._etcd_wire import KeyValue
    from xferd.metadata.keys import Keys

MAX_BATCH_KEYS = 100
"""etcd takes 128 operations a transaction (--max-txn-ops)."""

MAX_BATCH_NBYTES = 1 << 20
"""etcd takes 1.5 MiB a request (--max-request-bytes), frame and keys included."""

MAX_LABELLED_NBYTES = 1 << 20
"""So a blob under a label is one transaction."""

MAX_CLAIMS = 4
"""Transactions in a row that somebody else's change may spoil before the attempt is given up."""

_log = structlog.get_logger(__name__)


def boot_time() -> float:
    """Return seconds that go on while this process is stopped, and while the machine sleeps: a lease's do too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as we may believe in it: from when its last renewal was *asked* for, never longer than its TTL."""

    id: int
    ttl_s: float
    since: float

    def has_ended(self, now: float) -> bool:
        """Return True once etcd may have let it end."""
        return now - self.since >= self.ttl_s


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction's worth of writing."""

    puts: dict[bytes, bytes]
    deletes: tuple[bytes, ...]


class Registration:
    """This node's keys: what is wanted there, what is known to lie there, and the lease that carries them.

    Args:
        client: owned by the caller.
        keys: names.
        ttl_s: of the lease.
        request_timeout_s: for one operation.
        backoff: delay in seconds before the n-th attempt to heal.
        registered: called when our record has come to lie there, after a time without.
        clock: seconds that go on while the process is stopped.

    Public methods are cancel-safe: what was begun and not confirmed is written again.
    """

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        *,
        ttl_s: float,
        request_timeout_s: float,
        backoff: Callable[[int], float],
        registered: Callable[[], None],
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._client = client
        self._keys = keys
        self._ttl_s = ttl_s
        self._timeout_s = request_timeout_s
        self._backoff = backoff
        self._tell_registered = registered
        self._clock = clock
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._wanted: dict[bytes, bytes] = {}
        self._blobs: dict[bytes, bytes] = {}
        self._written: dict[bytes, bytes] = {}  # confirmed, under self._lease
        self._touched: set[bytes] = set()  # perhaps there: written without an answer, or under an earlier lease
        self._lease: Lease | None = None
        self._mod_revision = 0  # of the node's key, as last known; every write is guarded by it
        self.me: NodeInfo | None = None
        self.is_registered = False  # our record lay there once, and was not withdrawn
        self.problem = ""
        self.leases_granted = 0

    # -- what is wanted

    async def publish(self, node: NodeInfo) -> None:
        """Have the node's keys there. What cannot be written now is written by ``run`` as soon as it can be.

        Raises:
            AlreadyExists: another live node has the name; then all stays as it was.
            Unavailable: etcd is away.
        """
        async with self._lock:
            wanted = encode_node(self._keys, node)
            before, before_wanted = self.me, self._wanted
            if before is not None and before.name != node.name:
                self._lose("the node was renamed")  # it ends with all that lies under the old name
                self.is_registered = False
                self._touched.clear()
            self.me, self._wanted = node, wanted
            try:
                await self._settle()
            except AlreadyExists:
                self.me, self._wanted = before, before_wanted
                self._wake.set()
                raise
            except XferdError as exc:
                self._note_problem(exc)
                self._wake.set()
                raise

    async def put_blob(self, label: str, blob: bytes) -> None:
        """Offer a blob under a label, replacing what was there, for as long as this node lives.

        Raises:
            InvalidState: nothing was published yet.
            LimitExceeded: the blob is too large for etcd.
        """
        if len(blob) > MAX_LABELLED_NBYTES:
            raise LimitExceeded(
                f"the metadata under label {label!r} has {len(blob)} bytes",
                limit=f"{MAX_LABELLED_NBYTES} bytes in etcd",
                remedy="export only the regions that the other side needs, or carry the blob by other means",
            )
        async with self._lock:
            if self.me is None:
                raise InvalidState("this node is not published", remedy="publish it first: labels live as long as it")
            self._blobs[self._keys.blob(self.me.name, label).encode()] = blob
            await self._settle()

    async def drop_blob(self, label: str) -> None:
        """Take a label back.

        Raises:
            NotFound: this node offers none of this name.
        """
        async with self._lock:
            key = self._keys.blob(self.me.name, label).encode() if self.me is not None else b""
            if self._blobs.pop(key, None) is None:
                raise NotFound(f"this node offers no metadata under label {label!r}")
            await self._settle()

    async def withdraw(self) -> None:
        """Take all keys back by ending the lease. Where etcd is away they go when it ends by itself."""
        async with self._lock:
            lease, self._lease = self._lease, None
            self.is_registered = False
            self.me, self._wanted, self._blobs, self.problem = None, {}, {}, ""
            self._forget()
            self._touched.clear()
            if lease is None:
                return
            try:
                await self._client.revoke(lease.id, self._timeout_s)
            except NotFound:
                return

    async def lease_view(self) -> LeaseView | None:
        """Compare clocks by means of our lease; None where we hold none that we believe in, or lost it meanwhile.

        Raises:
            Unavailable: etcd is away.
        """
        lease = self._lease
        if lease is None or lease.has_ended(self._clock()):
            return None
        theirs_s = await self._client.time_to_live(lease.id, self._timeout_s)
        if self._lease is not lease:  # renewed or lost while we asked: the two times do not belong together
            return None
        return LeaseView(lease.ttl_s, lease.ttl_s - (self._clock() - lease.since), float(theirs_s))

    # -- upkeep

    async def run(self) -> None:
        """Renew the lease thrice a TTL, and heal what is broken at once, then after growing random delays."""
        attempt = 0
        while True:
            delay = self._backoff(attempt) if attempt else self._ttl_s / 3 * random.uniform(0.9, 1.0)
            await _wait(self._wake, delay)
            try:
                async with self._lock:
                    self._wake.clear()
                    await self._beat()
            except XferdError as exc:
                attempt += 1
                self._note_problem(exc)
            else:
                attempt = 0
                if self.problem:
                    self.problem = ""
                    _log.info("registration_healed", node=self.me.name if self.me is not None else "")

    def doubt(self) -> None:
        """Be told that our record does not lie in etcd as we left it: write it again, guarded, at once."""
        if self.me is not None:
            self._forget()
            self._wake.set()

    async def _beat(self) -> None:
        if not self._wanted:
            return
        lease = self._lease
        if lease is not None and not lease.has_ended(self._clock()):
            asked = self._clock()
            ttl_s = await self._client.keep_alive(lease.id, self._timeout_s)
            if ttl_s > 0:
                self._lease = Lease(lease.id, ttl_s, asked)
            else:
                self._lose("etcd let it end")
        await self._settle()

    async def _settle(self) -> None:
        """Bring etcd to what is wanted, under a lease that we may believe in; costs nothing where it is so already."""
        claims = 0
        while self.me is not None:
            lease = await self._live_lease()
            batch = self._next_batch()
            if batch is None:
                self._touched = set(self._written)
                return
            guard = Guard(self._keys.node(self.me.name).encode(), self._mod_revision)
            before = self._touched.copy()
            self._touched.update(batch.puts)
            for key in (*batch.puts, *batch.deletes):
                self._written.pop(key, None)
            try:
                result = await self._client.write(guard, batch.puts, batch.deletes, lease.id, self._timeout_s)
            except NotFound:
                self._lose("etcd does not know it")
                result = None
            if result is not None and result.ok:
                self._written.update(batch.puts)
                self._touched.difference_update(batch.deletes)
                if guard.key in batch.puts:
                    self._mod_revision = result.revision
                    if not self.is_registered:
                        self.is_registered = True
                        self._tell_registered()
                continue
            claims += 1
            if claims > MAX_CLAIMS:
                raise Unavailable(f"the key of node {self.me.name!r} was changed by others {claims} times in a row")
            if result is not None:
                self._touched = before  # nothing was written, for certain
                await self._claim(self.me, result.present)

    async def _live_lease(self) -> Lease:
        if self._lease is not None and self._lease.has_ended(self._clock()):
            self._lose("it was not renewed in time")
        if self._lease is None:
            asked = self._clock()
            lease, ttl_s = await self._client.grant(math.ceil(self._ttl_s), self._timeout_s)
            self._lease = Lease(lease, ttl_s, asked)
            self.leases_granted += 1
            self._forget()
        return self._lease

    def _next_batch(self) -> Batch | None:
        wanted = {**self._wanted, **self._blobs}
        deletes = sorted(self._touched - wanted.keys())[: MAX_BATCH_KEYS // 2]
        puts: dict[bytes, bytes] = {}
        room = MAX_BATCH_NBYTES
        for key, value in wanted.items():  # the node's own key is first
            if self._written.get(key) == value:
                continue
            if puts and (len(value) > room or len(puts) >= MAX_BATCH_KEYS // 2):
                break
            puts[key] = value
            room -= len(key) + len(value)
        return Batch(puts, tuple(deletes)) if puts or deletes else None

    async def _claim(self, me: NodeInfo, present: KeyValue | None) -> None:
        """Decide whether the name is ours to take; afterwards all is to be written, guarded by what lies there now."""
        self._forget()
        self._mod_revision = present.mod_revision if present is not None else 0
        if present is None:
            return
        if present.lease == 0:  # nobody lives there: a live node's key has a lease
            _log.warning("dead_record_replaced", node=me.name, mod_revision=present.mod_revision)
            return
        theirs = node_from_bytes(present.value, where=self._keys.node(me.name))
        if theirs is not None and theirs.id == me.id and theirs.epoch == me.epoch:
            return  # we wrote it, and did not get the answer, or did so under a lease that we no longer trust
        if theirs is not None and theirs.id == me.id and theirs.epoch < me.epoch:
            await self._end_former(present.lease)
            self._mod_revision = 0
            return
        who = f"the node {theirs.id} at {', '.join(theirs.addresses) or '?'}" if theirs is not None else "another node"
        raise AlreadyExists(
            f"node {me.name!r} is taken by {who}, whose lease lives",
            remedy="give this node another node.name, or stop the other; a dead one's name is free when its lease ends",
        )

    async def _end_former(self, lease: int) -> None:
        """End the lease of our own former start, and with it the agents and labels that it left behind."""
        try:
            await self._client.revoke(lease, self._timeout_s)
        except NotFound:
            return

    def _lose(self, reason: str) -> None:
        if self._lease is not None:
            _log.warning("lease_lost", node=self.me.name if self.me is not None else "", reason=reason)
        self._lease = None
        self._forget()

    def _forget(self) -> None:
        """Trust nothing that was written; the keys may still be there."""
        self._touched.update(self._written)
        self._written.clear()

    def _note_problem(self, exc: XferdError) -> None:
        if isinstance(exc, Unavailable):  # the client says that, and logged it
            return
        if self.problem != exc.message:
            _log.warning("registration_failed", code=exc.code, problem=str(exc))
        self.problem = exc.message


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Return when the event is set or the time has passed, whichever is first."""
    try:
        async with timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
