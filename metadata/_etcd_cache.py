"""What this node has seen of others in etcd, kept current by watching, for those nodes alone that somebody asks about.

A range is read, then watched from the next revision on. Where the watch ends, for whatever reason, what was seen is
kept and marked stale, and the range is read again. A record is dropped because etcd says that it has gone, never
because etcd cannot be seen; and an etcd that was away long enough for leases to end, or that came back with less
than it had, is given time in which nodes can register again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import PermissionDenied, Unauthenticated, Unavailable, XferdError
from xferd.api.timeouts import timeout
from xferd.metadata._etcd_records import assemble
from xferd.metadata._etcd_wire import prefix_range_end
from xferd.metadata.base import NodeChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from xferd.api.types import NodeInfo
    from xferd.metadata._etcd_client import EtcdClient, Watching
    from xferd.metadata._etcd_records import Decoder
    from xferd.metadata._etcd_wire import Change, Snapshot, WatchBatch
    from xferd.metadata.keys import Keys

STEADY_S = 5.0
"""A stream that held for so long was a success: the next failure begins the delays anew."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Part:
    """One key: a record, an agent's name, or None for what cannot be read."""

    mod_revision: int
    content: NodeInfo | str | None


@dataclass(slots=True)
class _Known:
    """All keys of one node, and the node as it was last told."""

    parts: dict[bytes, _Part] = field(default_factory=dict)
    node: NodeInfo | None = None
    missing_until: float | None = None  # not there when etcd came back: gone by then, in the loop's time

    def assembled(self) -> NodeInfo | None:
        record: NodeInfo | None = None
        agents: set[str] = set()
        for part in self.parts.values():
            if isinstance(part.content, str):
                agents.add(part.content)
            elif part.content is not None:
                record = part.content
        return assemble(record, agents) if record is not None else None


@dataclass(slots=True)
class _View:
    """One watched range: a node's, or under the name "" all nodes'. The id is 0 while it is not being watched."""

    name: str
    watch_id: int = 0
    revision: int = 0
    cluster_id: int = 0
    seen_at: float | None = None  # when the watch ended, in the loop's time


class NodeCache:
    """Nodes by name, as etcd showed them last.

    Args:
        client: owned by the caller.
        keys: names.
        decoder: of what lies under them.
        wanted: gives the names to watch at present, "" for all; asked again after ``interests_changed``.
        tell: hears of every change.
        missing: hears at once of a watched node that a reading of its range did not find.
        grace_s: for nodes that are missing after an outage.
        request_timeout_s: for one reading.
        backoff: delay in seconds before the n-th attempt to watch again.
        clock: UNIX time.
    """

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        decoder: Decoder,
        *,
        wanted: Callable[[], set[str]],
        tell: Callable[[NodeChange], None],
        missing: Callable[[str], None],
        grace_s: float,
        request_timeout_s: float,
        backoff: Callable[[int], float],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._keys = keys
        self._decoder = decoder
        self._wanted = wanted
        self._tell = tell
        self._missing = missing
        self._grace_s = grace_s
        self._timeout_s = request_timeout_s
        self._backoff = backoff
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._views: dict[str, _View] = {}
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()
        self.stale_since: float | None = None
        self.rebuilds = 0
        self.events = 0

    # -- reading

    def node(self, name: str) -> NodeInfo | None:
        """Return a node as it was last seen, None where it was not or has gone."""
        known = self._known.get(name)
        return known.node if known is not None else None

    def nodes(self) -> dict[str, NodeInfo]:
        """Return all nodes seen, by name."""
        return {name: known.node for name, known in self._known.items() if known.node is not None}

    def is_current(self, name: str) -> bool:
        """Return True where a live watch covers the node; "" asks for all nodes."""
        return any(self._views[view].watch_id for view in {name, ""} if view in self._views)

    def interests_changed(self) -> None:
        """Have ``wanted`` asked again."""
        self._changed.set()

    # -- keeping current

    async def run(self) -> None:
        """Watch for ever. Ends only by being cancelled."""
        attempt = 0
        while True:
            while not self._wanted():
                self._changed.clear()
                await self._changed.wait()
            began = _now()
            try:
                await self._follow()
            except* XferdError as group:
                problem = _first(group)
                held = _now() - began
                attempt = 0 if held >= STEADY_S else attempt + 1
                self._mark_stale(problem)
            await self._expire_while(self._backoff(attempt))

    async def _follow(self) -> None:
        stream = await self._client.watch(self._timeout_s)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(stream), name="xferd-etcd-watch-read")
                group.create_task(self._build(stream), name="xferd-etcd-watch-build")
        finally:
            await stream.aclose()

    async def _build(self, stream: Watching) -> None:
        """Read and watch what is wanted and not watched; stop watching what is no longer wanted."""
        while True:
            self._changed.clear()
            await self._drop_unwanted(stream)
            for name in sorted(self._names() - {name for name, view in self._views.items() if view.watch_id}):
                await self._open_view(stream, name)
            if self.stale_since is not None:
                _log.info("etcd_cache_current", stale_s=round(self._clock() - self.stale_since, 3))
                self.stale_since = None
            await self._expire_while(None)

    async def _open_view(self, stream: Watching, name: str) -> None:
        prefix = self._keys.of_node(name).encode()
        snapshot = await self._client.read_prefix(prefix, self._timeout_s)
        view = self._views.setdefault(name, _View(name))
        self._apply_snapshot(view, snapshot)
        watch_id = next(self._ids)
        await stream.add(watch_id, prefix, prefix_range_end(prefix), snapshot.revision + 1)
        view.watch_id, view.seen_at = watch_id, None

    async def _drop_unwanted(self, stream: Watching) -> None:
        names = self._names()
        for name in [name for name in self._views if name not in names]:
            view = self._views.pop(name)
            if view.watch_id:
                await stream.remove(view.watch_id)
        if "" not in names:
            self._known = {name: known for name, known in self._known.items() if name in names}

    async def _read(self, stream: Watching) -> None:
        while True:
            batch = await stream.read()
            view = next((view for view in self._views.values() if view.watch_id == batch.watch_id), None)
            if batch.cancelled:
                self._cancelled(stream, view, batch)
            elif view is not None:
                self._apply_changes(view, batch)

    def _cancelled(self, stream: Watching, view: _View | None, batch: WatchBatch) -> None:
        if batch.compacted and view is not None:
            _log.info("etcd_watch_compacted", node=view.name, revision=view.revision, compacted=batch.compacted)
            view.watch_id = 0
            self._changed.set()
        elif batch.compacted or (view is None and batch.watch_id > 0):
            return  # the end of a watch that we stopped ourselves
        elif "ermission" in batch.cancelled or "token" in batch.cancelled:
            stream.forget_token()
            raise PermissionDenied(f"etcd refused a watch: {batch.cancelled}")
        else:
            raise Unavailable(f"etcd ended a watch: {batch.cancelled}")

    def _names(self) -> set[str]:
        names = self._wanted()
        return {""} if "" in names else names

    def _mark_stale(self, problem: XferdError) -> None:
        for view in self._views.values():
            if view.watch_id:
                view.watch_id, view.seen_at = 0, _now()
        if self.stale_since is None:
            self.stale_since = self._clock()
            level = _log.warning if isinstance(problem, Unauthenticated | PermissionDenied) else _log.info
            level("etcd_cache_stale", problem=problem.message)
        if isinstance(problem, Unavailable) and self._client.away_since is None:
            _log.debug("etcd_watch_ended", problem=problem.message)

    # -- what etcd says

    def _apply_snapshot(self, view: _View, snapshot: Snapshot) -> None:
        lost_data = view.cluster_id not in (0, snapshot.cluster_id) or snapshot.revision < view.revision
        away_s = _now() - view.seen_at if view.seen_at is not None else 0.0
        forgiving = lost_data or away_s >= self._grace_s / 3
        if lost_data:
            _log.warning("etcd_lost_data", revision=snapshot.revision, seen=view.revision)
        if view.revision:
            self.rebuilds += 1
        view.revision, view.cluster_id = snapshot.revision, snapshot.cluster_id
        found: dict[str, dict[bytes, _Part]] = {view.name: {}} if view.name else {}
        for item in snapshot.items:
            name = self._decoder.name_of(item.key)
            if name is None:
                self._decoder.decode(item.key, item.value, item.mod_revision)  # logs it
                continue
            found.setdefault(name, {})[item.key] = self._part(item.key, item.value, item.mod_revision)
        for name in {*found, *(self._known if not view.name else ())}:
            known = self._known.setdefault(name, _Known())
            present = found.get(name, {})
            if not lost_data:  # another watch may have shown later changes than this reading
                later = {key: part for key, part in known.parts.items() if part.mod_revision > snapshot.revision}
                present = {**present, **later}
            known.parts = present
            if known.assembled() is None:
                self._missing(name)
                if forgiving and known.node is not None:
                    known.missing_until = _now() + self._grace_s
                    continue
            self._settle(name, known, "its record has gone")

    def _apply_changes(self, view: _View, batch: WatchBatch) -> None:
        view.revision = max(view.revision, batch.revision)
        self.events += len(batch.changes)
        for name in self._apply(batch.changes):
            known = self._known[name]
            if known.missing_until is None and known.node is not None and known.assembled() is None and self._unsure():
                known.missing_until = _now() + self._grace_s
                self._missing(name)
                self._changed.set()  # for the end of the grace to be waited for
            if known.missing_until is None or known.assembled() is not None:
                self._settle(name, known, "its record has gone: it was withdrawn, or its lease ended")

    def _apply(self, changes: Sequence[Change]) -> Iterable[str]:
        names: dict[str, None] = {}
        for change in changes:
            name = self._decoder.name_of(change.key)
            if name is None:
                if change.value is not None:
                    self._decoder.decode(change.key, change.value, change.mod_revision)  # logs it
                continue
            parts = self._known.setdefault(name, _Known()).parts
            before = parts.get(change.key)
            if before is not None and before.mod_revision >= change.mod_revision:
                continue
            if change.value is None:
                parts.pop(change.key, None)
            else:
                parts[change.key] = self._part(change.key, change.value, change.mod_revision)
            names[name] = None
        return names

    def _part(self, key: bytes, value: bytes, mod_revision: int) -> _Part:
        decoded = self._decoder.decode(key, value, mod_revision)
        return _Part(mod_revision, decoded[1] if decoded is not None else None)

    def _settle(self, name: str, known: _Known, reason: str) -> None:
        """Tell what became of a node, if that is news."""
        node = known.assembled()
        known.missing_until = None
        if node is None and not known.parts:
            del self._known[name]
        if any(part.content is None for part in known.parts.values()):
            reason = "its record cannot be read by this xferd"
        if node != known.node:
            known.node = node
            self._tell(NodeChange(name, node, "" if node is not None else reason))

    # -- grace

    def _unsure(self) -> bool:
        """Return True while leases may have ended because etcd stood still, not because their nodes did."""
        if self._client.away_since is not None:
            return True
        if self._client.outage is None:
            return False
        away_s, ended = self._client.outage
        return away_s >= self._grace_s / 4 and _now() - ended < self._grace_s

    async def _expire_while(self, delay_s: float | None) -> None:
        """Wait so long (None: until interests change), dropping nodes whose grace ends meanwhile."""
        until = _now() + delay_s if delay_s is not None else None
        while True:
            waits = [known.missing_until - _now() for known in self._known.values() if known.missing_until is not None]
            if until is not None:
                waits.append(until - _now())
            try:
                async with timeout(max(0.0, min(waits)) if waits else None):
                    if until is None:
                        await self._changed.wait()
                        return
                    await asyncio.get_running_loop().create_future()
            except TimeoutError:
                self._expire()
            if until is not None and _now() >= until:
                return

    def _expire(self) -> None:
        now = _now()
        for name, known in list(self._known.items()):
            if known.missing_until is None or known.missing_until > now:
                continue
            if self.stale_since is not None or self._client.away_since is not None:  # nobody can show that it lives
                known.missing_until = now + self._grace_s
                continue
            self._settle(name, known, f"it did not register again within {self._grace_s:g}s of etcd's return")


def _first(group: BaseExceptionGroup[XferdError]) -> XferdError:
    problem: BaseException = group
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    assert isinstance(problem, XferdError)
    return problem


def _now() -> float:
    return asyncio.get_running_loop().time()
