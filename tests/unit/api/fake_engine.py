"""An Engine in memory, for tests of faces and clients: real sessions, real bytes, no daemon.

Regions are bytearrays and transfers between them copy. A test can make any method fail (``fail_next``), hold it
before it does anything (``gate``), keep transfers from moving (``paused``), and see what was called and what was
cancelled (``calls``, ``cancelled``). Other nodes do not exist here; a list that names one is ``PeerUnknown``.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from xferd.api import types as t
from xferd.api.descriptors import DescriptorList, ListSpec, PreparedRef, check_total, coalesce
from xferd.api.errors import (
    AgentUnknown,
    AlreadyExists,
    Busy,
    InvalidArgument,
    InvalidState,
    LimitExceeded,
    NotFound,
    OutOfBounds,
    Overloaded,
    PeerUnknown,
    PermissionDenied,
    PoolExhausted,
    Stale,
    Unauthenticated,
    Unavailable,
    Unsupported,
    XferdError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

READ_NBYTES = 1 << 20
GPU_UUID = b"xferd-simulated\x00"


@dataclass
class FakeSession:
    """A live session and all that it holds."""

    info: t.SessionInfo
    token: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""
    keys: dict[str, t.TransferId] = field(default_factory=dict)


@dataclass
class FakeRegion:
    """A region and its bytes."""

    info: t.RegionInfo
    owner: t.SessionId
    data: bytearray


@dataclass
class FakeTransfer:
    """A transfer; ``ended`` is set exactly in an ended state."""

    owner: t.SessionId
    request: t.TransferRequest
    local: DescriptorList
    remote: DescriptorList
    status: t.TransferStatus
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FakeEngine:
    """Implements ``xferd.api.engine.Engine`` over bytearrays.

    Attributes:
        calls: name of each method called, in order.
        cancelled: names of methods that were cancelled while a gate held them or while they waited.
        paused: while true, a posted transfer stays POSTED until ``finish`` or ``cancel``.
        files: contents for ``register_file``, by path; a path that starts with ".." is outside the roots.
        objects: contents for ``register_object``, by (store, key).
        peer_list: what ``peers`` returns.
        live_reason: what ``liveness`` returns.
        labels: blobs by (node, label), as a store that keeps some; None is a store that keeps none.
        degraded_reason: what ``degraded`` returns.
        checks: what ``diagnose`` returns.
    """

    def __init__(
        self,
        node: str = "node-a",
        *,
        epoch: int = 7,
        pool_nbytes: int = 64 << 20,
        limits: t.Limits | None = None,
        admin_token: str = "",
        max_inbox: int = 100,
    ) -> None:
        self.name = node
        self.epoch = epoch
        self.pool_nbytes = pool_nbytes
        self.limits = limits or t.Limits(1 << 20, 64 << 20, 1 << 20, 65536)
        self.admin_token = admin_token
        self.max_inbox = max_inbox
        self.calls: list[str] = []
        self.cancelled: list[str] = []
        self.paused = False
        self.files: dict[str, bytearray] = {}
        self.objects: dict[tuple[str, str], bytearray] = {}
        self.gpus = [
            t.DeviceInfo(0, GPU_UUID, "fake", "simulated", "", 1 << 30, 1 << 29, 1, 0, 4096, 0, 0.0, 0.0),
            t.DeviceInfo(1, b"", "", "simulated", "device 1 of 1", 0, 0, 0, 0, 0, 0, 0.0, 0.0),
        ]
        self.device_handles: dict[t.RegionId, t.DeviceHandle] = {}
        self.peer_list: list[t.PeerInfo] = []
        self.imported: dict[str, t.RegionListing] = {}
        self.live_reason = ""
        self.labels: dict[tuple[str, str], bytes] | None = None
        self.degraded_reason = ""
        self.checks = [t.Check("etcd", t.CheckState.OK, "not used: the store is embedded", "")]
        self.draining = False
        self.level = "info"
        self._errors: dict[str, list[BaseException]] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._sessions: dict[t.SessionId, FakeSession] = {}
        self._past: dict[t.SessionId, str] = {}
        self._regions: dict[t.RegionId, FakeRegion] = {}
        self._slots: dict[int, t.RegionId] = {}
        self._prepared: dict[int, tuple[t.SessionId, DescriptorList]] = {}
        self._transfers: dict[t.TransferId, FakeTransfer] = {}
        self._inboxes: dict[str, list[t.Notification]] = {}
        self._changed = asyncio.Condition()
        self._marks: dict[tuple[str, str], asyncio.Event] = {}
        self._ids = itertools.count(1)
        self._started_at = time.time()

    # -- what tests use

    def fail_next(self, method: str, error: BaseException) -> None:
        """Let the next call of ``method`` raise ``error`` before it does anything."""
        self._errors.setdefault(method, []).append(error)

    def gate(self, method: str) -> asyncio.Event:
        """Hold calls of an async ``method`` until the returned event is set."""
        return self._gates.setdefault(method, asyncio.Event())

    async def called(self, method: str) -> None:
        """Return when ``method`` has been called since the start, or since the last ``called`` of it returned."""
        mark = self._mark("called", method)
        await mark.wait()
        mark.clear()

    async def was_cancelled(self, method: str) -> None:
        """Return when a call of ``method`` has been cancelled."""
        await self._mark("cancelled", method).wait()

    def data(self, region: int) -> bytearray:
        """Return the live bytes of a region."""
        return self._regions[t.RegionId(region)].data

    async def finish(self, transfer: t.TransferId, error: XferdError | None = None) -> None:
        """End a transfer that was kept by ``paused``: DONE with its bytes moved, or FAILED with ``error``."""
        held = self._transfers[transfer]
        if error is None:
            self._move(held)
        else:
            self._end(held, t.TransferState.FAILED, error)
        await self._wake()

    def nothing_held(self) -> bool:
        """Say whether no session, region, prepared list or transfer is left."""
        return not (self._sessions or self._regions or self._prepared or self._transfers)

    # -- sessions

    def authenticate(self, token: str) -> t.Caller:
        self._hit("authenticate")
        for session in self._sessions.values():
            if token and session.token == token:
                return t.Caller(session.info.session, session.info.agent)
        raise Unauthenticated(
            "no live session has this token", remedy="open a session and send its token as authorization: Bearer"
        )

    def authenticate_admin(self, token: str) -> t.Caller:
        self._hit("authenticate_admin")
        if self.admin_token and token != self.admin_token:
            raise Unauthenticated("the admin token is missing or wrong", remedy="send the token of the daemon's file")
        return t.Caller(None, "admin", admin=True)

    async def open_session(
        self,
        agent: str,
        transport: t.Transport,
        *,
        credentials: t.PeerCredentials | None = None,
        ttl_s: float = 0.0,
    ) -> t.SessionGrant:
        await self._enter("open_session")
        self._check_ready()
        number = next(self._ids)
        agent = agent or f"agent-{number}"
        if any(session.info.agent == agent for session in self._sessions.values()):
            raise AlreadyExists(f"agent {agent!r} has a live session", limit="one session an agent", remedy="close it")
        session = t.SessionId(f"s-{number}")
        now = time.time()
        pid, uid = (credentials.pid, credentials.uid) if credentials else (0, 0)
        info = t.SessionInfo(session, agent, transport, pid, uid, now, now + ttl_s if ttl_s else 0.0, 0, 0, 0, 0)
        token = hashlib.sha256(f"{self.name}/{number}".encode()).hexdigest()
        self._sessions[session] = FakeSession(info, token)
        self._inboxes.setdefault(agent, [])
        return t.SessionGrant(session, token, agent, self.name, self.epoch, self.limits, "", tuple(self.pools()))

    async def wait_session_end(self, session: t.SessionId) -> str:
        await self._enter("wait_session_end")
        live = self._sessions.get(session)
        if live is None:
            return self._past.get(session, "unknown session")
        try:
            await live.ended.wait()
        except asyncio.CancelledError:
            self._cancelled("wait_session_end")
            raise
        return live.reason

    async def end_session(self, session: t.SessionId, reason: str) -> None:
        await self._enter("end_session")
        live = self._sessions.pop(session, None)
        if live is None:
            return
        for transfer in [key for key, held in self._transfers.items() if held.owner == session]:
            self._cancel(self._transfers.pop(transfer))
        for region in [key for key, held in self._regions.items() if held.owner == session]:
            del self._regions[region]
        for handle in [key for key, (owner, _) in self._prepared.items() if owner == session]:
            del self._prepared[handle]
        self._inboxes.pop(live.info.agent, None)
        self._past[session] = live.reason = reason
        live.ended.set()
        await self._wake()

    def sessions(self) -> list[t.SessionInfo]:
        self._hit("sessions")
        return [
            replace(
                live.info,
                regions=sum(held.owner == key for held in self._regions.values()),
                held_nbytes=sum(held.info.nbytes for held in self._regions.values() if held.owner == key),
                transfers=sum(held.owner == key for held in self._transfers.values()),
                prepared=sum(owner == key for owner, _ in self._prepared.values()),
            )
            for key, live in self._sessions.items()
        ]

    # -- memory

    async def allocate(self, caller: t.Caller, request: t.AllocateRequest) -> t.RegionListing:
        await self._enter("allocate")
        self._check_ready()
        if request.pool == "vram":
            made = self._add(
                caller,
                bytearray(sum(request.nbytes)),
                t.RegionSource.POOL,
                request.access,
                request.label,
                kind=t.MemoryKind.VRAM,
                pool="vram",
            )
            self.device_handles[made.id] = t.DeviceHandle(GPU_UUID, b"v" * 64, 1 << 20, 0, "simulated")
            return t.RegionListing(self.name, self.epoch, (made,))
        if request.pool not in ("", "host"):
            raise NotFound(f"pool {request.pool!r}", limit="host", remedy="name a configured pool")
        if not request.nbytes or not all(request.nbytes):
            raise InvalidArgument("a region of 0 bytes", limit="at least 1 byte", remedy="ask for bytes")
        if len(request.nbytes) > self.limits.max_group:
            raise LimitExceeded(
                f"a group of {len(request.nbytes)} regions",
                limit=f"{self.limits.max_group} regions",
                remedy="split the group, or raise limits.max_group",
            )
        sizes = [-(-nbytes // 4096) * 4096 for nbytes in request.nbytes]
        if sum(sizes) > self.pools()[0].free_nbytes:
            raise PoolExhausted(
                f"the group needs {sum(sizes)} bytes",
                limit=f"{self.pools()[0].free_nbytes} bytes free in pool host",
                remedy="free regions, or raise nbytes of the pool",
            )
        infos = tuple(
            self._add(caller, bytearray(size), t.RegionSource.POOL, request.access, request.label, pool="host")
            for size in sizes
        )
        return t.RegionListing(self.name, self.epoch, infos)

    async def register_private(self, caller: t.Caller, request: t.RegisterPrivateRequest) -> t.RegionInfo:
        await self._enter("register_private")
        session = self._sessions[self._session(caller)]
        if session.info.transport is not t.Transport.SOCKET:
            raise Unsupported(
                f"a session over {session.info.transport.value} has no known process",
                remedy="open the session over the session socket",
            )
        return self._add(
            caller,
            bytearray(request.nbytes),
            t.RegionSource.PRIVATE,
            request.access,
            request.label,
            writable=request.writable,
        )

    async def register_file(self, caller: t.Caller, request: t.RegisterFileRequest) -> t.RegionInfo:
        await self._enter("register_file")
        if request.path.startswith(".."):
            raise PermissionDenied(f"path {request.path!r} is outside the roots", limit="files.roots", remedy="")
        if request.path not in self.files:
            if not request.create:
                raise NotFound(f"file {request.path!r}", remedy="set create to make it")
            self.files[request.path] = bytearray(request.nbytes)
        data = self.files[request.path]
        if request.nbytes > len(data):
            data.extend(bytes(request.nbytes - len(data)))
        return self._add(
            caller,
            data,
            t.RegionSource.PATH,
            request.access,
            request.label,
            kind=t.MemoryKind.FILE,
            writable=request.writable,
            path=request.path,
        )

    async def free(self, caller: t.Caller, regions: Sequence[t.RegionId]) -> None:
        await self._enter("free")
        for region in regions:
            if self._region(region).owner != self._session(caller):
                raise PermissionDenied(
                    f"region {region} belongs to {self._region(region).info.agent}",
                    limit="own regions",
                    remedy="ask its owner to free it",
                )
            for key, held in self._transfers.items():
                if not held.ended.is_set() and (region in held.local.region or region in held.remote.region):
                    raise Busy(f"region {region} is held by transfer {key}", remedy="wait for it, or cancel it")
        for region in regions:
            del self._regions[region]

    async def register_object(self, caller: t.Caller, request: t.RegisterObjectRequest) -> t.RegionInfo:
        await self._enter("register_object")
        place = request.store, request.key
        if place not in self.objects:
            if not request.create:
                raise NotFound(f"object {request.key!r}", remedy="set create to make it")
            self.objects[place] = bytearray(request.nbytes)
        return self._add(
            caller,
            self.objects[place],
            t.RegionSource.OBJECT,
            request.access,
            request.label,
            kind=t.MemoryKind.OBJECT,
            writable=request.writable,
            path=f"{request.store}/{request.key}",
        )

    async def register_device(self, caller: t.Caller, request: t.RegisterDeviceRequest) -> t.RegionInfo:
        await self._enter("register_device")
        gpu = next((d for d in self.gpus if d.device_uuid == request.device_uuid), None)
        if gpu is None:
            raise NotFound("no GPU of this UUID", limit="the GPUs of this node", remedy="list them")
        nbytes = request.nbytes or request.allocation_nbytes - request.offset
        info = self._add(
            caller,
            bytearray(nbytes),
            t.RegionSource.DEVICE,
            request.access,
            request.label,
            kind=t.MemoryKind.VRAM,
            writable=request.writable,
        )
        self.device_handles[info.id] = t.DeviceHandle(
            request.device_uuid, request.handle, request.allocation_nbytes, request.offset, gpu.driver
        )
        return info

    async def export_device(self, caller: t.Caller, region: t.RegionId) -> t.DeviceHandle:
        await self._enter("export_device")
        self._session(caller)
        try:
            return self.device_handles[region]
        except KeyError:
            raise InvalidArgument(f"region {region} is no GPU memory", remedy="name one that is") from None

    def devices(self) -> list[t.DeviceInfo]:
        return list(self.gpus)

    async def open_device_event(self, caller: t.Caller, device: int, handle: bytes) -> t.DeviceEvent:
        await self._enter("open_device_event")
        self._session(caller)
        return t.DeviceEvent(next(self._ids), b"" if handle else bytes([device]) * 64)

    async def query(self, caller: t.Caller, items: Sequence[t.QueryItem]) -> list[t.QueryResult]:
        await self._enter("query")
        results = []
        for item in items:
            data = self.objects.get((item.store, item.key)) if item.store else self.files.get(item.path)
            if item.path.startswith(".."):
                error = PermissionDenied(f"path {item.path!r} is outside the roots", limit="files.roots")
                results.append(t.QueryResult(False, error=error))
            else:
                found = t.QueryResult(False) if data is None else t.QueryResult(True, len(data), 1.5, "etag")
                results.append(found)
        return results

    async def delete_objects(self, caller: t.Caller, store: str, keys: Sequence[str]) -> None:
        await self._enter("delete_objects")
        for key in keys:
            self.objects.pop((store, key), None)

    async def list_objects(self, caller: t.Caller, query: t.ObjectQuery) -> t.ObjectPage:
        await self._enter("list_objects")
        keys = sorted(key for store, key in self.objects if store == query.store and key > query.after)
        keys = [key for key in keys if key.startswith(query.prefix)]
        page = keys[: query.limit or 1000]
        entries = tuple(t.ObjectEntry(key, len(self.objects[query.store, key]), 1.5, "etag") for key in page)
        return t.ObjectPage(entries, page[-1] if len(page) < len(keys) else "")

    async def hand_over(self, caller: t.Caller, request: t.HandOverRequest) -> t.RegionListing:
        await self._enter("hand_over")
        taker = next((s for s, held in self._sessions.items() if held.info.agent == request.to), None)
        if taker is None:
            raise AgentUnknown(f"no agent {request.to!r}", remedy="open a session")
        given = []
        for region in request.regions:
            held = self._region(region)
            if not caller.admin and held.owner != self._session(caller):
                raise PermissionDenied(f"region {region} belongs to {held.info.agent}", limit="own regions")
            access = held.info.access if request.access is None else request.access
            given.append((held, replace(held.info, agent=request.to, access=access)))
        source = f"{caller.agent}@{self.name}"
        self._deliver(t.Notification(request.to, request.payload, source, regions=request.regions))
        for held, info in given:
            held.owner, held.info = taker, info
        await self._wake()
        return t.RegionListing(self.name, self.epoch, tuple(info for _, info in given))

    async def regions(self, caller: t.Caller, query: t.RegionQuery) -> t.RegionListing:
        await self._enter("regions")
        if query.node not in ("", self.name):
            if query.node in self.imported:
                return self.imported[query.node]
            raise PeerUnknown(f"node {query.node!r}", remedy="configure it as a peer, or import its metadata")
        found = tuple(
            held.info
            for held in self._regions.values()
            if (caller.admin or held.owner == caller.session or held.info.access is not t.Access.NONE)
            and query.agent in ("", held.info.agent)
            and query.label in ("", held.info.label)
            and (not query.regions or held.info.id in query.regions)
        )
        return t.RegionListing(self.name, self.epoch, found)

    async def read_region(self, caller: t.Caller, region: t.RegionId, offset: int, nbytes: int) -> AsyncIterator[bytes]:
        await self._enter("read_region")
        held = self._span(caller, region, offset, nbytes, t.Access.READ)
        for start in range(offset, offset + nbytes, READ_NBYTES):
            yield bytes(held.data[start : min(start + READ_NBYTES, offset + nbytes)])

    async def write_region(self, caller: t.Caller, region: t.RegionId, offset: int, data: bytes) -> int:
        await self._enter("write_region")
        held = self._span(caller, region, offset, len(data), t.Access.WRITE)
        held.data[offset : offset + len(data)] = data
        return len(data)

    def pools(self) -> list[t.PoolInfo]:
        sizes = [held.info.nbytes for held in self._regions.values() if held.info.source is t.RegionSource.POOL]
        used = sum(sizes)
        free = self.pool_nbytes - used
        return [
            t.PoolInfo(
                "host", t.MemoryKind.DRAM, self.pool_nbytes, used, free, free, 0.0, len(sizes), used, 0, mappable=False
            )
        ]

    # -- transfers

    async def prepare(self, caller: t.Caller, descriptors: DescriptorList) -> t.PreparedInfo:
        await self._enter("prepare")
        self._check_rows(descriptors)
        handle = t.PreparedHandle(next(self._ids))
        self._prepared[handle] = (self._session(caller), descriptors)
        return t.PreparedInfo(handle, self.name, self.epoch, len(descriptors), descriptors.total_nbytes)

    async def release_prepared(self, caller: t.Caller, handles: Sequence[t.PreparedHandle]) -> None:
        await self._enter("release_prepared")
        for handle in handles:
            self._prepared_list(caller, handle)
        for handle in handles:
            del self._prepared[handle]

    async def submit(self, caller: t.Caller, request: t.TransferRequest) -> t.TransferStatus:
        await self._enter("submit")
        self._check_ready()
        session = self._sessions[self._session(caller)]
        if request.key in session.keys:
            held = self._transfers[session.keys[request.key]]
            if held.request.op is not request.op:
                raise AlreadyExists(f"key {request.key!r} was used for another request", remedy="use a new key")
            return held.status
        local, remote = self._lists(caller, request)
        number = next(self._ids)
        status = t.TransferStatus(
            id=t.TransferId(f"x-{number}"),
            key=request.key,
            op=request.op,
            state=t.TransferState.PREPARED,
            priority=request.priority,
            cause_id=request.cause_id or f"c-{number}",
            local_node=self.name,
            remote_node=self.name,
            agent=caller.agent,
            error=None,
            telemetry=_telemetry(local, remote),
        )
        held = FakeTransfer(self._session(caller), request, local, remote, status)
        self._transfers[status.id] = held
        if request.key:
            session.keys[request.key] = status.id
        if not request.hold:
            self._post(held)
        await self._wake()
        return held.status

    async def post(self, caller: t.Caller, transfer: t.TransferId) -> t.TransferStatus:
        await self._enter("post")
        held = self._transfer(caller, transfer)
        if held.status.state in (t.TransferState.POSTED, t.TransferState.RUNNING):
            raise InvalidState(f"transfer {transfer} is {held.status.state.value}", remedy="wait until it has ended")
        self._post(held)
        await self._wake()
        return held.status

    def poll(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        self._hit("poll")
        return [self._transfer(caller, transfer).status for transfer in transfers]

    async def wait(
        self, caller: t.Caller, transfers: Sequence[t.TransferId], timeout_s: float, *, any_of: bool = False
    ) -> list[t.TransferStatus]:
        await self._enter("wait")
        held = [self._transfer(caller, transfer) for transfer in transfers]
        reduce = any if any_of else all
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: reduce(item.ended.is_set() for item in held))
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._cancelled("wait")
            raise
        return [item.status for item in held]

    async def watch(self, caller: t.Caller, transfers: Sequence[t.TransferId] = ()) -> AsyncIterator[t.TransferStatus]:
        await self._enter("watch")
        wanted = {transfer: self._transfer(caller, transfer) for transfer in transfers}
        seen: set[tuple[t.TransferId, int]] = set()

        def fresh() -> list[t.TransferStatus]:
            held = wanted.values() if wanted else self._transfers.values()
            return [
                item.status
                for item in held
                if item.owner == caller.session
                and item.ended.is_set()
                and (item.status.id, item.status.telemetry.posts) not in seen
            ]

        try:
            while not wanted or len(seen) < len(wanted):
                async with self._changed:
                    ready = await self._changed.wait_for(fresh)
                for status in ready:
                    seen.add((status.id, status.telemetry.posts))
                    yield status
        except asyncio.CancelledError:
            self._cancelled("watch")
            raise

    async def cancel(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        await self._enter("cancel")
        held = [self._transfer(caller, transfer) for transfer in transfers]
        for item in held:
            self._cancel(item)
        await self._wake()
        return [item.status for item in held]

    async def release(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> None:
        await self._enter("release")
        held = [self._transfer(caller, transfer) for transfer in transfers]
        for item in held:
            self._cancel(item)
            del self._transfers[item.status.id]
            self._sessions[item.owner].keys.pop(item.request.key, None)
        await self._wake()

    async def estimate(self, caller: t.Caller, request: t.TransferRequest) -> t.Estimate:
        await self._enter("estimate")
        local, _ = self._lists(caller, request)
        return t.Estimate(local.total_nbytes / 1e9, 1e9, "assumed", _ROUTE)

    async def explain(self, caller: t.Caller, request: t.TransferRequest) -> t.Explanation:
        await self._enter("explain")
        local, remote = self._lists(caller, request)
        pieces = _telemetry(local, remote).pieces
        return t.Explanation(_ROUTE, ("local: both ends are here",), 1, pieces, local.total_nbytes)

    def transfers(self, *, active_only: bool = False, agent: str = "") -> list[t.TransferStatus]:
        self._hit("transfers")
        return [
            held.status
            for held in self._transfers.values()
            if agent in ("", held.status.agent) and not (active_only and held.ended.is_set())
        ]

    async def notify(self, caller: t.Caller, notification: t.Notification) -> None:
        await self._enter("notify")
        self._deliver(replace(notification, source=f"{caller.agent}@{self.name}"))
        await self._wake()

    async def notifications(self, caller: t.Caller, limit: int, timeout_s: float) -> list[t.Notification]:
        await self._enter("notifications")
        inbox = self._inboxes[caller.agent]
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: inbox)
        except TimeoutError:
            return []
        except asyncio.CancelledError:
            self._cancelled("notifications")
            raise
        taken = inbox[:limit]
        del inbox[:limit]
        return taken

    # -- metadata

    async def node(self, name: str = "") -> t.NodeInfo:
        await self._enter("node")
        if name not in ("", self.name):
            for peer in self.peer_list:
                if peer.node.name == name:
                    return peer.node
            if name in self.imported:
                listing = self.imported[name]
                return t.NodeInfo(name, f"id-{name}", listing.epoch, "0", (), (), (t.MemoryKind.DRAM,), (), 0.0)
            raise PeerUnknown(f"node {name!r}", remedy="configure it as a peer, or import its metadata")
        return self._node()

    def peers(self) -> list[t.PeerInfo]:
        self._hit("peers")
        return list(self.peer_list)

    async def nodes(self) -> list[t.NodeInfo]:
        await self._enter("nodes")
        return [self._node(), *(peer.node for peer in self.peer_list)]

    async def watch_peers(self, name: str = "") -> AsyncIterator[t.PeerInfo]:
        self._hit("watch_peers")
        told: dict[str, t.PeerInfo] = {}

        def news() -> list[t.PeerInfo]:
            wanted = [peer for peer in self.peer_list if name in ("", peer.node.name)]
            return [peer for peer in wanted if told.get(peer.node.name) != peer]

        try:
            while True:
                async with self._changed:
                    fresh = await self._changed.wait_for(news)
                for peer in fresh:
                    told[peer.node.name] = peer
                    yield peer
        except asyncio.CancelledError:
            self._cancelled("watch_peers")
            raise

    async def set_peers(self, *peers: t.PeerInfo) -> None:
        """Replace ``peer_list`` and wake who watches it."""
        self.peer_list = list(peers)
        await self._wake()

    async def export_metadata(self, regions: Sequence[t.RegionId] | None = None) -> bytes:
        await self._enter("export_metadata")
        shared = [
            (held.info.id, held.info.nbytes)
            for held in self._regions.values()
            if (held.info.access is not t.Access.NONE if regions is None else held.info.id in regions)
        ]
        return json.dumps({"node": self.name, "epoch": self.epoch, "regions": shared}).encode()

    async def import_metadata(self, blob: bytes) -> t.RegionListing:
        await self._enter("import_metadata")
        try:
            record = json.loads(blob)
            name, epoch, rows = record["node"], record["epoch"], record["regions"]
        except (ValueError, KeyError, TypeError) as exc:
            raise InvalidArgument("the blob is no metadata", remedy="pass the bytes of Export unchanged") from exc
        infos = tuple(
            t.RegionInfo(
                t.RegionId(region),
                name,
                epoch,
                t.MemoryKind.DRAM,
                t.RegionSource.POOL,
                0,
                nbytes,
                "",
                t.Access.READ_WRITE,
                writable=True,
            )
            for region, nbytes in rows
        )
        self.imported[name] = t.RegionListing(name, epoch, infos)
        return self.imported[name]

    async def invalidate(self, name: str) -> None:
        await self._enter("invalidate")
        if self.imported.pop(name, None) is None:
            raise NotFound(f"node {name!r} came by no blob", remedy="only imported nodes can be forgotten")

    async def publish_metadata(self, label: str, regions: Sequence[t.RegionId] | None = None) -> None:
        await self._enter("publish_metadata")
        self._labels()[self.name, label] = await self.export_metadata(regions)
        await self._wake()

    async def withdraw_metadata(self, label: str) -> None:
        await self._enter("withdraw_metadata")
        if self._labels().pop((self.name, label), None) is None:
            raise NotFound(f"label {label!r}", remedy="publish it first")

    async def fetch_metadata(self, node: str, label: str, timeout_s: float) -> t.RegionListing:
        await self._enter("fetch_metadata")
        labels = self._labels()
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: (node, label) in labels)
        except TimeoutError:
            raise NotFound(
                f"node {node!r} has no label {label!r}", limit=f"{timeout_s} s", remedy="publish it"
            ) from None
        return await self.import_metadata(labels[node, label])

    def _labels(self) -> dict[tuple[str, str], bytes]:
        if self.labels is None:
            raise Unsupported("the store keeps no blobs", remedy='set metadata.store = "etcd"')
        return self.labels

    # -- admin

    def status(self) -> t.NodeStatus:
        self._hit("status")
        states = [held.status.state for held in self._transfers.values()]
        return t.NodeStatus(
            node=self._node(),
            live=not self.live_reason,
            ready=not self.readiness(),
            reason=self.readiness() or self.degraded_reason,
            draining=self.draining,
            sessions=len(self._sessions),
            regions=len(self._regions),
            transfers_active=sum(state not in t.ENDED for state in states),
            transfers_done=states.count(t.TransferState.DONE),
            transfers_failed=states.count(t.TransferState.FAILED),
            transfers_cancelled=states.count(t.TransferState.CANCELLED),
            moved_nbytes=sum(held.status.telemetry.moved_nbytes for held in self._transfers.values()),
            uptime_s=time.time() - self._started_at,
        )

    def liveness(self) -> str:
        self._hit("liveness")
        return self.live_reason

    def readiness(self) -> str:
        return "draining" if self.draining else ""

    def degraded(self) -> str:
        return self.degraded_reason

    def config_toml(self) -> str:
        self._hit("config_toml")
        return f'[node]\nname = "{self.name}"\n'

    def backends(self) -> list[t.BackendInfo]:
        self._hit("backends")
        return [t.BackendInfo("local", ("DRAM>DRAM",), 0, 0, 0, 0, 2)]

    def storage(self) -> list[t.StorageInfo]:
        self._hit("storage")
        directory = t.StorageDirectoryInfo("/ssd", "ab" * 16, 1.0, 65536, 4096, 1, 1, 88, 2, "", True, 0, 1, 0)
        return [
            t.StorageInfo(
                "ssd", "xxh3", False, 4096, 1, 1, 4096, 4096, 0, 4096, 0, 0, 1 << 20, 3, 12288, 1.5, (directory,)
            )
        ]

    async def scrub_storage(self, pool: str) -> t.StorageInfo:
        await self._enter("scrub_storage")
        if pool != "ssd":
            raise NotFound(f"no storage pool {pool!r}")
        return self.storage()[0]

    def routes(self) -> list[t.RouteCost]:
        self._hit("routes")
        return [t.RouteCost("local", "DRAM", "DRAM", "", 4096, 65535, 5e9, 1.5, 3, 2.0, 0, 0.0, "")]

    def holds(self) -> list[t.HoldInfo]:
        self._hit("holds")
        return [
            t.HoldInfo("region", str(held.info.id), held.owner, "allocated", self._started_at, 0.0)
            for held in self._regions.values()
        ]

    async def diagnose(self) -> list[t.Check]:
        await self._enter("diagnose")
        return list(self.checks)

    def metrics(self) -> bytes:
        self._hit("metrics")
        return f"# TYPE xferd_sessions gauge\nxferd_sessions {len(self._sessions)}\n".encode()

    async def drain(self, timeout_s: float) -> int:
        await self._enter("drain")
        self.draining = True
        active = [held for held in self._transfers.values() if not held.ended.is_set()]
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: all(held.ended.is_set() for held in active))
        except TimeoutError:
            pass
        return sum(not held.ended.is_set() for held in active)

    def undrain(self) -> None:
        self._hit("undrain")
        self.draining = False

    def log_level(self) -> str:
        self._hit("log_level")
        return self.level

    def set_log_level(self, level: str) -> str:
        self._hit("set_log_level")
        if level not in ("debug", "info", "warning", "error"):
            raise InvalidArgument(f"log level {level!r}", limit="debug, info, warning, error", remedy="use one of them")
        previous, self.level = self.level, level
        return previous

    # -- inside

    def _hit(self, method: str) -> None:
        self.calls.append(method)
        self._mark("called", method).set()
        errors = self._errors.get(method)
        if errors:
            raise errors.pop(0)

    def _mark(self, what: str, method: str) -> asyncio.Event:
        return self._marks.setdefault((what, method), asyncio.Event())

    def _cancelled(self, method: str) -> None:
        self.cancelled.append(method)
        self._mark("cancelled", method).set()

    async def _enter(self, method: str) -> None:
        self._hit(method)
        gate = self._gates.get(method)
        if gate is not None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self._cancelled(method)
                raise

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _check_ready(self) -> None:
        if self.draining:
            raise Unavailable("the node is draining", remedy="ask another node, or wait for undrain")

    def _node(self) -> t.NodeInfo:
        agents = tuple(live.info.agent for live in self._sessions.values())
        kinds = (t.MemoryKind.DRAM, t.MemoryKind.FILE)
        return t.NodeInfo(
            self.name,
            f"id-{self.name}",
            self.epoch,
            "0.1.0",
            (),
            ("local",),
            kinds,
            agents,
            self._started_at,
            self.draining,
        )

    def _session(self, caller: t.Caller) -> t.SessionId:
        if caller.session is None or caller.session not in self._sessions:
            raise Unauthenticated("this call needs a session", remedy="open one")
        return caller.session

    def _add(
        self,
        caller: t.Caller,
        data: bytearray,
        source: t.RegionSource,
        access: t.Access,
        label: str,
        *,
        kind: t.MemoryKind = t.MemoryKind.DRAM,
        writable: bool = True,
        pool: str = "",
        path: str = "",
    ) -> t.RegionInfo:
        slot = next(self._ids)
        region = t.RegionId(1 << 32 | slot)
        info = t.RegionInfo(
            id=region,
            node=self.name,
            epoch=self.epoch,
            kind=kind,
            source=source,
            device=0,
            nbytes=len(data),
            agent=caller.agent,
            access=access,
            writable=writable,
            label=label,
            pool=pool,
            path=path,
        )
        self._slots[slot] = region
        self._regions[region] = FakeRegion(info, self._session(caller), data)
        return info

    def _region(self, region: int) -> FakeRegion:
        found = self._regions.get(t.RegionId(region))
        if found is not None:
            return found
        if (region & 0xFFFF_FFFF) in self._slots:
            raise Stale(f"region {region} has gone", remedy="ask for the region's record again")
        raise NotFound(f"region {region}", remedy="ask for the region's record again")

    def _span(self, caller: t.Caller, region: int, offset: int, nbytes: int, need: t.Access) -> FakeRegion:
        held = self._region(region)
        if held.owner != caller.session and not held.info.access & need:
            raise PermissionDenied(
                f"region {region} of {held.info.agent} gives others {held.info.access.name}",
                limit=str(need.name),
                remedy="ask its owner for access",
            )
        if need is t.Access.WRITE and not held.info.writable:
            raise PermissionDenied(f"region {region} is read-only", limit="READ", remedy="register it writable")
        if offset + nbytes > held.info.nbytes:
            raise OutOfBounds(
                f"offset {offset} and {nbytes} bytes in region {region}",
                limit=f"{held.info.nbytes} bytes",
                remedy="stay inside the region",
            )
        return held

    def _prepared_list(self, caller: t.Caller, handle: int) -> DescriptorList:
        owner, descriptors = self._prepared.get(handle, (None, None))
        if descriptors is None or owner != caller.session:
            raise NotFound(f"prepared list {handle}", remedy="prepare it in this session")
        return descriptors

    def _lists(self, caller: t.Caller, request: t.TransferRequest) -> tuple[DescriptorList, DescriptorList]:
        reads = request.op is t.TransferOp.READ
        local = self._resolve(caller, request.local, t.Access.WRITE if reads else t.Access.READ)
        remote = self._resolve(caller, request.remote, t.Access.READ if reads else t.Access.WRITE)
        check_total(local, remote)
        if request.backend not in ("", "local"):
            raise NotFound(f"backend {request.backend!r}", limit="local", remedy="name a configured backend")
        return local, remote

    def _resolve(self, caller: t.Caller, spec: ListSpec, need: t.Access) -> DescriptorList:
        if isinstance(spec, PreparedRef):
            descriptors = self._prepared_list(caller, spec.handle).select(spec.index)
        else:
            descriptors = spec
        self._check_rows(descriptors)
        for region, offset, nbytes in _rows(descriptors):
            self._span(caller, region, offset, nbytes, need)
        return descriptors

    def _check_rows(self, descriptors: DescriptorList) -> None:
        if descriptors.node not in ("", self.name):
            raise PeerUnknown(f"node {descriptors.node!r}", remedy="configure it as a peer, or import its metadata")
        if descriptors.epoch not in (0, self.epoch):
            raise Stale(f"epoch {descriptors.epoch} of {self.name}", limit=str(self.epoch), remedy="ask again")
        for region, offset, nbytes in _rows(descriptors):
            held = self._region(region)
            if offset + nbytes > held.info.nbytes:
                raise OutOfBounds(
                    f"offset {offset} and {nbytes} bytes in region {region}",
                    limit=f"{held.info.nbytes} bytes",
                    remedy="stay inside the region",
                )

    def _transfer(self, caller: t.Caller, transfer: t.TransferId) -> FakeTransfer:
        held = self._transfers.get(transfer)
        if held is None or held.owner != caller.session:
            raise NotFound(f"transfer {transfer!r}", remedy="submit it in this session")
        return held

    def _post(self, held: FakeTransfer) -> None:
        telemetry = held.status.telemetry
        held.ended.clear()
        held.status = replace(
            held.status,
            state=t.TransferState.POSTED,
            error=None,
            telemetry=replace(
                telemetry, posted_at=time.time(), ended_at=0.0, moved_nbytes=0, posts=telemetry.posts + 1
            ),
        )
        if not self.paused:
            self._move(held)

    def _move(self, held: FakeTransfer) -> None:
        reads = held.request.op is t.TransferOp.READ
        source, target = (held.remote, held.local) if reads else (held.local, held.remote)
        try:
            spans = [self._region(region).data[at : at + nbytes] for region, at, nbytes in _rows(source)]
            moved = memoryview(b"".join(spans))
            for region, at, nbytes in _rows(target):
                self._region(region).data[at : at + nbytes] = moved[:nbytes]
                moved = moved[nbytes:]
            if held.request.notification is not None:
                self._deliver(
                    replace(
                        held.request.notification,
                        source=f"{held.status.agent}@{self.name}",
                        transfer=held.status.id,
                    )
                )
        except XferdError as error:
            self._end(held, t.TransferState.FAILED, error)
        else:
            self._end(held, t.TransferState.DONE)

    def _cancel(self, held: FakeTransfer) -> None:
        if not held.ended.is_set():
            self._end(held, t.TransferState.CANCELLED)

    def _end(self, held: FakeTransfer, state: t.TransferState, error: XferdError | None = None) -> None:
        telemetry = held.status.telemetry
        moved = telemetry.total_nbytes if state is t.TransferState.DONE else 0
        held.status = replace(
            held.status,
            state=state,
            error=error,
            telemetry=replace(telemetry, ended_at=time.time(), first_byte_at=time.time(), moved_nbytes=moved),
        )
        held.ended.set()

    def _deliver(self, notification: t.Notification) -> None:
        agent, _, node = notification.target.partition("@")
        if node not in ("", self.name):
            raise PeerUnknown(f"node {node!r}", remedy="configure it as a peer, or import its metadata")
        if agent not in self._inboxes:
            raise AgentUnknown(f"agent {agent!r} has no session on {self.name}", remedy="wait until it attaches")
        if len(notification.payload) > self.limits.max_notification_nbytes:
            raise LimitExceeded(
                f"a notification of {len(notification.payload)} bytes",
                limit=f"{self.limits.max_notification_nbytes} bytes",
                remedy="move it as a transfer",
            )
        if len(self._inboxes[agent]) >= self.max_inbox:
            raise Overloaded(f"the inbox of {agent} is full", limit=f"{self.max_inbox}", remedy="receive first")
        self._inboxes[agent].append(notification)


_ROUTE = (t.Hop("local", "DRAM@node-a", "DRAM@node-a", "both ends are on this node"),)


def _rows(descriptors: DescriptorList) -> list[tuple[int, int, int]]:
    return list(zip(descriptors.region.tolist(), descriptors.offset.tolist(), descriptors.nbytes.tolist(), strict=True))


def _telemetry(local: DescriptorList, remote: DescriptorList) -> t.Telemetry:
    pieces = sum(len(coalesce(item.region, item.offset, item.nbytes)[0]) for item in (local, remote))
    return t.Telemetry(
        created_at=time.time(),
        posted_at=0.0,
        first_byte_at=0.0,
        ended_at=0.0,
        queued_s=0.0,
        moving_s=0.0,
        total_nbytes=local.total_nbytes,
        moved_nbytes=0,
        descriptors=len(local) + len(remote),
        pieces=pieces,
        chunks=1,
        posts=0,
        route=_ROUTE,
    )
