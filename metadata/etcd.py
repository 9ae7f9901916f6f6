"""The store for many nodes: records in etcd, under leases, so that a dead node's go by themselves.

The parts: ``_etcd_registration.py`` keeps our keys there, ``_etcd_cache.py`` sees those of others,
``_etcd_client.py`` is the cluster with its endpoints and deadlines, ``_etcd_rpc.py`` alone knows the client library.
What an operator needs to know is in ``docs/etcd.md``.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import (
    Closed,
    InvalidArgument,
    NotFound,
    PeerUnknown,
    Unavailable,
    XferdError,
)
from xferd.api.timeouts import timeout
from xferd.metadata._etcd_cache import NodeCache
from xferd.metadata._etcd_client import EtcdClient
from xferd.metadata._etcd_records import Decoder, assemble
from xferd.metadata._etcd_registration import Registration, boot_time
from xferd.metadata._etcd_wire import full_jitter
from xferd.metadata._watching import Watch
from xferd.metadata.base import LeaseView, NodeChange, Store
from xferd.metadata.etcd_options import EtcdOptions
from xferd.metadata.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import NodeInfo
    from xferd.metadata._etcd_wire import Snapshot

MAX_REMEMBERED = 1024
"""Records read once and not watched, kept for the time that etcd is away."""

CLOSE_TIMEOUT_S = 2.0
"""For taking our keys back at the end; where that fails they go when the lease ends."""

_log = structlog.get_logger(__name__)


class EtcdStore(Store):
    """Records of nodes in etcd.

    Args:
        options: section ``[metadata.etcd]``.
        clock: UNIX time.
        lease_clock: seconds that go on while this process is stopped or the machine sleeps.
        backoff: delay in seconds before the n-th attempt to heal, and its cap.
    """

    options = EtcdOptions
    watches_all = False

    def __init__(
        self,
        options: EtcdOptions,
        *,
        clock: Callable[[], float] = time.time,
        lease_clock: Callable[[], float] = boot_time,
        backoff: Callable[[int, float], float] = full_jitter,
    ) -> None:
        self._options = options
        self._clock = clock
        self._keys = Keys(options.namespace)
        self._decoder = Decoder(self._keys)
        self._client = EtcdClient(options, clock=clock)
        # Half a TTL apart at most: a node that missed etcd's return by one delay still has its lease.
        cap_s = options.ttl / 2
        self._registration = Registration(
            self._client,
            self._keys,
            ttl_s=options.ttl,
            request_timeout_s=options.request_timeout,
            backoff=lambda attempt: backoff(attempt, cap_s),
            registered=lambda: self._cache.interests_changed(),
            clock=lease_clock,
        )
        self._cache = NodeCache(
            self._client,
            self._keys,
            self._decoder,
            wanted=self._interests,
            tell=self._seen,
            missing=self._missing,
            grace_s=options.ttl,
            request_timeout_s=options.request_timeout,
            backoff=lambda attempt: backoff(attempt, cap_s),
            clock=clock,
        )
        self._loaded: dict[str, NodeInfo] = {}
        self._remembered: OrderedDict[str, NodeInfo] = OrderedDict()
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._task: asyncio.Task[None] | None = None
        self._broken = ""
        self._closed = False

    # -- life

    async def start(self) -> None:
        """Connect, and begin to keep our keys and our view. Twice is fine.

        Raises:
            ConfigError: a file of the options cannot be read.
            Unauthenticated, PermissionDenied: etcd refuses us, which waiting would not change.
        """
        self._check_open()
        if self._task is not None:
            return
        self._client.check_files()
        try:
            await self._client.probe(self._options.dial_timeout)
        except Unavailable as exc:
            _log.warning("etcd_away_at_start", problem=str(exc))
        self._task = asyncio.create_task(self._run(), name="xferd-etcd")
        self._task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """Take our keys back if that is quick, end all watches, release everything. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        for watch in tuple(self._watches):
            watch.end()
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
            async with timeout(min(CLOSE_TIMEOUT_S, self._options.request_timeout)):
                await self._registration.withdraw()
        except (XferdError, TimeoutError) as exc:
            _log.info("etcd_keys_left_to_the_lease", problem=str(exc) or "no time")
        finally:
            await self._client.aclose()

    def health(self) -> str:
        """Return "" where our record lies in etcd and the view of others is current, else what is wrong."""
        if self._closed:
            return "closed"
        if self._broken:
            return self._broken
        if self._client.away_since is not None:
            since = _when(self._client.away_since)
            return f"etcd does not answer since {since}: {self._client.away_reason}; known peers are kept"
        if self._registration.problem:
            return f"this node's record is not in etcd: {self._registration.problem}"
        if self._cache.stale_since is not None:
            return f"what is known of peers is not current since {_when(self._cache.stale_since)}"
        return ""

    async def lease_view(self) -> LeaseView | None:
        """Compare clocks by means of our lease; None where we hold none. Raises ``Unavailable`` while etcd is away."""
        self._check_open()
        return await self._registration.lease_view()

    def statistics(self) -> dict[str, float]:
        """Return counters since the start, and what is held now.

        ``requests``: calls to etcd; ``leases``: granted; ``events``: changes that watches brought; ``rebuilds``:
        ranges read again after a watch was lost; ``watches``: names watched, all nodes counting as one;
        ``stale_seconds``: for how long the view of peers has not been current, 0 where it is.
        """
        stale = self._cache.stale_since
        return {
            "requests": float(self._client.requests),
            "leases": float(self._registration.leases_granted),
            "events": float(self._cache.events),
            "rebuilds": float(self._cache.rebuilds),
            "watches": float(len(self._interests())),
            "stale_seconds": max(0.0, self._clock() - stale) if stale is not None else 0.0,
        }

    # -- our own record

    async def publish(self, node: NodeInfo) -> None:
        """Put our record and our agents' under a lease; a record equal to the last one costs nothing.

        Where etcd is away this is ``Unavailable``, and the record is put there as soon as it is back.
        """
        self._check_open()
        await self._registration.publish(node)

    async def withdraw(self) -> None:
        """End the lease, and with it our record, our agents' and our labels."""
        self._check_open()
        await self._registration.withdraw()
        self._cache.interests_changed()

    # -- the others' records

    async def get(self, name: str) -> NodeInfo:
        """Return a record: a watched one from memory, any other from etcd, and what was seen last while etcd is away.

        Raises:
            Unavailable: etcd is away, and the node was never seen.
        """
        self._check_open()
        me = self._registration.me
        if me is not None and name == me.name:
            return me
        if self._cache.is_current(name) and (node := self._best(name)) is not None:
            return node
        return await self.refresh(name)

    async def refresh(self, name: str) -> NodeInfo:
        """Return a record as it lies in etcd, or as it was seen last while etcd is away. Raises like ``get``."""
        self._check_open()
        me = self._registration.me
        if me is not None and name == me.name:
            return me
        if self._client.away_since is not None and (node := self._best(name)) is not None:
            return node
        try:
            snapshot = await self._client.read_prefix(self._prefix(name), self._options.request_timeout)
        except Unavailable:
            node = self._best(name)
            if node is None:
                raise
            return node
        node = self._nodes_in(snapshot).get(name)
        if node is None:
            self._remembered.pop(name, None)
            node = self._best(name)  # loaded, or missing since etcd lost its data, with time left to return
        else:
            self._remember(node)
            node = max(node, self._loaded.get(name, node), key=lambda node: node.epoch)
        if node is None:
            raise self._unknown(name)
        return node

    async def list_nodes(self) -> list[NodeInfo]:
        """Return all records: from memory where all are watched, else from etcd.

        Raises:
            Unavailable: etcd is away, and not all nodes are watched.
        """
        self._check_open()
        if self._is_wanted_all():
            nodes = self._cache.nodes() if self._cache.is_current("") or self._client.away_since is not None else None
        else:
            nodes = None
        if nodes is None:
            nodes = self._nodes_in(await self._client.read_prefix(self._prefix(""), self._options.request_timeout))
        for name, node in self._loaded.items():
            if name not in nodes or nodes[name].epoch < node.epoch:
                nodes[name] = node
        me = self._registration.me
        if me is not None:
            nodes.pop(me.name, None)
        return [nodes[name] for name in sorted(nodes)]

    def watch(self, name: str = "") -> Watch:
        """Watch a node, known or not; "" all nodes. Close the watch when it is no longer needed: it costs etcd."""
        self._check_open()
        watch = Watch(name, self._cache.interests_changed)
        me = self._registration.me
        # Only what is being watched, or was loaded: anything else comes with the first reading, and cannot be missed.
        for known in sorted({*self._cache.nodes(), *self._loaded}) if not name else [name]:
            node = self._cache.node(known) or self._loaded.get(known)
            if node is not None and (me is None or known != me.name):
                watch.tell(NodeChange(known, self._best(known)))
        self._watches.add(watch)
        self._cache.interests_changed()
        return watch

    async def load(self, node: NodeInfo) -> None:
        """Take in a record that came by a blob; etcd's own takes precedence if it is of a later epoch."""
        self._check_open()
        me = self._registration.me
        if me is not None and node.name == me.name:
            raise InvalidArgument(
                f"the record is one of {node.name!r}, which is this node", remedy="load it on another node"
            )
        before = self._best(node.name)
        self._loaded[node.name] = node
        if self._best(node.name) != before:
            self._tell(NodeChange(node.name, self._best(node.name)))

    async def forget(self, name: str) -> None:
        """Drop a record that came by a blob; one that lies in etcd is in force again."""
        self._check_open()
        if name not in self._loaded:
            raise PeerUnknown(
                f"no metadata of a node {name!r} was loaded",
                limit=f"loaded: {', '.join(sorted(self._loaded)) or 'none'}",
                remedy="only what was loaded can be forgotten; what lies in etcd goes when its node does",
            )
        del self._loaded[name]
        node = self._cache.node(name)
        self._tell(NodeChange(name, node, "" if node is not None else "forgotten"))

    # -- metadata under labels

    async def put_blob(self, label: str, blob: bytes) -> None:
        """Keep a blob under a label of this node for as long as the node lives; replaces an earlier one.

        Raises:
            InvalidArgument: the label is empty.
            InvalidState: this node is not published.
            LimitExceeded: the blob has more than ``MAX_LABELLED_NBYTES``.
            Unavailable: etcd is away; the blob is put there as soon as it is back.
        """
        self._check_open()
        if not label:
            raise InvalidArgument("the label is empty")
        await self._registration.put_blob(label, blob)

    async def get_blob(self, node: str, label: str) -> bytes:
        """Return the blob that a node keeps under a label.

        Raises:
            NotFound: it keeps none, or has gone.
            Unavailable: etcd is away.
        """
        self._check_open()
        found = await self._client.read_key(self._keys.blob(node, label).encode(), self._options.request_timeout)
        if found is None:
            raise NotFound(
                f"node {node!r} keeps no metadata under label {label[:80]!r}",
                remedy="labels go with their node; have it exported again",
            )
        return found.value

    async def drop_blob(self, label: str) -> None:
        """Take a label of this node back; raises ``NotFound`` where it has none of this name."""
        self._check_open()
        await self._registration.drop_blob(label)

    # -- inside

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._registration.run(), name="xferd-etcd-registration")
            group.create_task(self._cache.run(), name="xferd-etcd-cache")

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._broken = f"the etcd store failed: {problem!r}"
            _log.error("etcd_store_failed", exc_info=problem)

    def _interests(self) -> set[str]:
        me = self._registration.me
        names = {watch.name for watch in self._watches if not watch.ended}
        # Our own too, to notice if somebody takes our record away; not before it lies there.
        return names | {me.name} if me is not None and self._registration.is_registered else names

    def _is_wanted_all(self) -> bool:
        return "" in self._interests()

    def _seen(self, change: NodeChange) -> None:
        me = self._registration.me
        if me is not None and change.name == me.name:
            if change.node is None or (change.node.id, change.node.epoch) != (me.id, me.epoch):
                self._registration.doubt()
            return
        if change.node is not None:
            self._remember(change.node)
        else:
            self._remembered.pop(change.name, None)
        loaded = self._loaded.get(change.name)
        if loaded is not None and (change.node is None or change.node.epoch < loaded.epoch):
            return  # what was loaded is in force until it is forgotten
        self._tell(change)

    def _missing(self, name: str) -> None:
        me = self._registration.me
        if me is not None and name == me.name:
            self._registration.doubt()

    def _tell(self, change: NodeChange) -> None:
        for watch in tuple(self._watches):
            watch.tell(change)

    def _remember(self, node: NodeInfo) -> None:
        self._remembered[node.name] = node
        self._remembered.move_to_end(node.name)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _best(self, name: str) -> NodeInfo | None:
        """Return what is known of a node without asking: etcd's record, or a loaded one of a later epoch."""
        seen = self._cache.node(name) or (None if self._cache.is_current(name) else self._remembered.get(name))
        loaded = self._loaded.get(name)
        if seen is None or loaded is None:
            return seen or loaded
        return loaded if loaded.epoch > seen.epoch else seen

    def _nodes_in(self, snapshot: Snapshot) -> dict[str, NodeInfo]:
        records: dict[str, NodeInfo] = {}
        agents: dict[str, set[str]] = {}
        for item in snapshot.items:
            decoded = self._decoder.decode(item.key, item.value, item.mod_revision)
            if decoded is None:
                continue
            name, content = decoded
            if isinstance(content, str):
                agents.setdefault(name, set()).add(content)
            else:
                records[name] = content
        return {name: assemble(record, agents.get(name, set())) for name, record in records.items()}

    def _prefix(self, name: str) -> bytes:
        return self._keys.of_node(name).encode()

    def _unknown(self, name: str) -> PeerUnknown:
        known = sorted({*self._cache.nodes(), *self._loaded, *self._remembered})
        return PeerUnknown(
            f"node {name!r} is not registered in etcd",
            limit=f"nodes seen: {', '.join(known[:20]) or 'none'}",
            remedy="see that it runs with the same metadata.etcd.endpoints and namespace, or load its metadata",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the metadata store is closed")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
