"""The Engine: one object that the faces speak to. It puts the desks together and holds no logic of its own.

Sessions are ``sessions/desk.py``, memory ``memory/desk.py``, transfers ``engine/desk.py``, other nodes ``peers/``.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import InvalidState, PermissionDenied, Unavailable
from xferd.api.types import (
    BackendInfo,
    HoldInfo,
    NodeInfo,
    NodeStatus,
    Notification,
    RegionListing,
    RegionQuery,
    TransferState,
)
from xferd.daemon.memory.regions import LocalActor
from xferd.daemon.peers.labels import fetch_blob
from xferd.daemon.sessions.caller import session_of
from xferd.metadata.blob import decode_blob, encode_blob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from xferd.api import types as t
    from xferd.api.descriptors import DescriptorList
    from xferd.api.ring import RingSizes
    from xferd.daemon.doctor_facts import Doctor
    from xferd.daemon.engine.desk import TransferDesk
    from xferd.daemon.engine.lists import ListBook
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.engine.planner import Planner
    from xferd.daemon.memory.desk import MemoryDesk
    from xferd.daemon.memory.devices import DeviceDesk
    from xferd.daemon.memory.handover import HandOverDesk
    from xferd.daemon.memory.objects import ObjectDesk
    from xferd.daemon.memory.pool import HostPool
    from xferd.daemon.memory.regions import RegionTable
    from xferd.daemon.memory.staging import StagingPool
    from xferd.daemon.peers.manager import PeerManager
    from xferd.daemon.peers.serving import PeerServing
    from xferd.daemon.rings.desk import RingDesk
    from xferd.daemon.rings.ring import RingCounters
    from xferd.daemon.sessions.desk import SessionDesk
    from xferd.daemon.storage.desk import StorageDesk
    from xferd.metadata.base import Store
    from xferd.plugins.base import Backend

log = structlog.get_logger(__name__)

SPACE_NAMES = {
    "mapped": "DRAM",
    "process": "DRAM(private)",
    "file": "FILE",
    "object": "OBJECT",
    "device": "VRAM",
    "remote": "remote",
}


class Service:
    """Implements ``xferd.api.engine.Engine`` and the session socket's ``SessionEngine``."""

    def __init__(
        self,
        *,
        me: Callable[[], NodeInfo],
        sessions: SessionDesk,
        memory: MemoryDesk,
        handovers: HandOverDesk,
        objects: ObjectDesk,
        devices: DeviceDesk,
        transfers: TransferDesk,
        rings: RingDesk,
        storage: StorageDesk,
        lists: ListBook,
        planner: Planner,
        inboxes: Inboxes,
        regions: RegionTable,
        pools: Mapping[str, HostPool],
        staging: StagingPool,
        peers: PeerManager,
        serving: PeerServing | None,
        store: Store,
        backends: Mapping[str, Backend],
        liveness: Callable[[], str],
        config_toml: Callable[[], str],
        log_level: Callable[[], str],
        set_log_level: Callable[[str], str],
        drain_changed: Callable[[bool], None],
        clock: Callable[[], float],
    ) -> None:
        self._me = me
        self._sessions = sessions
        self._memory = memory
        self._handovers = handovers
        self._objects = objects
        self._devices = devices
        self._transfers = transfers
        self._rings = rings
        self._storage = storage
        self._lists = lists
        self._planner = planner
        self._inboxes = inboxes
        self._regions = regions
        self._pools = pools
        self._staging = staging
        self._peers = peers
        self._serving = serving
        self._store = store
        self._backends = backends
        self._liveness = liveness
        self._config_toml = config_toml
        self._log_level = log_level
        self._set_log_level = set_log_level
        self._drain_changed = drain_changed
        self._clock = clock
        self._refusal = "starting"
        self._is_stopping = False
        self._metrics: Callable[[], bytes] = bytes
        self._doctor: Doctor | None = None

    # ------------------------------------------------------------------------------------ Sessions

    def authenticate(self, token: str) -> t.Caller:
        return self._sessions.authenticate(token)

    def authenticate_admin(self, token: str) -> t.Caller:
        return self._sessions.authenticate_admin(token)

    async def open_session(
        self,
        agent: str,
        transport: t.Transport,
        *,
        credentials: t.PeerCredentials | None = None,
        ttl_s: float = 0.0,
    ) -> t.SessionGrant:
        return await self._sessions.open(agent, transport, credentials=credentials, ttl_s=ttl_s)

    async def wait_session_end(self, session: t.SessionId) -> str:
        return await self._sessions.wait_end(session)

    async def end_session(self, session: t.SessionId, reason: str) -> None:
        await self._sessions.end(session, reason)

    def sessions(self) -> list[t.SessionInfo]:
        return self._sessions.sessions()

    # ------------------------------------------------------------------------------------ Memory

    async def allocate(self, caller: t.Caller, request: t.AllocateRequest) -> RegionListing:
        self.check_open()
        return await self._memory.allocate(caller, request)

    async def register_private(self, caller: t.Caller, request: t.RegisterPrivateRequest) -> t.RegionInfo:
        self.check_open()
        return await self._memory.register_private(caller, request)

    async def register_file(self, caller: t.Caller, request: t.RegisterFileRequest) -> t.RegionInfo:
        self.check_open()
        return await self._memory.register_file(caller, request)

    async def register_memfd(
        self, caller: t.Caller, fd: int, nbytes: int, access: t.Access, label: str
    ) -> t.RegionInfo:
        return await self._memory.register_memfd(caller, fd, nbytes, access, label)

    async def register_fd(
        self, caller: t.Caller, fd: int, nbytes: int, writable: bool, access: t.Access, label: str
    ) -> t.RegionInfo:
        return await self._memory.register_fd(caller, fd, nbytes, writable, access, label)

    def open_ring(self, caller: t.Caller, version: int, sizes: RingSizes) -> tuple[int, tuple[int, int, int]]:
        self.check_open()
        return self._rings.open_ring(caller, version, sizes)

    def pool_fd(self, caller: t.Caller, pool: str) -> tuple[t.PoolInfo, int]:
        del caller  # who may attach may map: pools are shared by those whom the session socket admits
        return self._memory.pool_fd(pool)

    async def free(self, caller: t.Caller, regions: Sequence[t.RegionId]) -> None:
        await self._memory.free(caller, regions)

    async def register_object(self, caller: t.Caller, request: t.RegisterObjectRequest) -> t.RegionInfo:
        self.check_open()
        return await self._objects.register_object(caller, request)

    async def query(self, caller: t.Caller, items: Sequence[t.QueryItem]) -> list[t.QueryResult]:
        return await self._objects.query(caller, items)

    async def delete_objects(self, caller: t.Caller, store: str, keys: Sequence[str]) -> None:
        self.check_open()
        await self._objects.delete_objects(caller, store, keys)

    async def list_objects(self, caller: t.Caller, query: t.ObjectQuery) -> t.ObjectPage:
        return await self._objects.list_objects(caller, query)

    async def register_device(self, caller: t.Caller, request: t.RegisterDeviceRequest) -> t.RegionInfo:
        self.check_open()
        return await self._devices.register(caller, request)

    async def register_device_fd(self, caller: t.Caller, fd: int, request: t.RegisterDeviceRequest) -> t.RegionInfo:
        return await self._devices.register_fd(caller, fd, request)

    async def export_device(self, caller: t.Caller, region: t.RegionId) -> t.DeviceHandle:
        return self._devices.export(caller, region)

    def devices(self) -> list[t.DeviceInfo]:
        return self._devices.infos()

    async def open_device_event(self, caller: t.Caller, device: int, handle: bytes) -> t.DeviceEvent:
        self.check_open()
        return await self._devices.open_event(caller, device, handle)

    async def hand_over(self, caller: t.Caller, request: t.HandOverRequest) -> RegionListing:
        listing = self._handovers.hand_over(caller, request)
        await self._storage.handed_over(listing.regions)
        return listing

    async def regions(self, caller: t.Caller, query: RegionQuery) -> RegionListing:
        me = self._me()
        if query.node not in ("", me.name):
            return await self._peers.regions(query.node, query)
        actor = None if caller.session is None else LocalActor(caller.session)
        found = self._regions.visible(actor, query)
        if query.regions:
            for region in set(query.regions) - {info.id for info in found}:
                self._regions.info(region)  # raises for one that is not there
                raise PermissionDenied(
                    f"region {region} is another session's and grants no access", remedy="ask its owner for access"
                )
        return RegionListing(me.name, me.epoch, found)

    def read_region(self, caller: t.Caller, region: t.RegionId, offset: int, nbytes: int) -> AsyncIterator[bytes]:
        return self._memory.read_region(caller, region, offset, nbytes)

    async def write_region(self, caller: t.Caller, region: t.RegionId, offset: int, data: bytes) -> int:
        return await self._memory.write_region(caller, region, offset, data)

    def pools(self) -> list[t.PoolInfo]:
        host = (pool.info() for pool in self._pools.values())
        return [*host, *self._devices.pool_infos(), *self._storage.infos()]

    # ------------------------------------------------------------------------------------ Transfers

    async def prepare(self, caller: t.Caller, descriptors: DescriptorList) -> t.PreparedInfo:
        self.check_open()
        return await self._lists.prepare(session_of(caller), descriptors, self._clock())

    async def release_prepared(self, caller: t.Caller, handles: Sequence[t.PreparedHandle]) -> None:
        self._lists.release(session_of(caller), handles)

    async def submit(self, caller: t.Caller, request: t.TransferRequest) -> t.TransferStatus:
        self.check_open()
        return await self._transfers.submit(caller, request)

    async def post(self, caller: t.Caller, transfer: t.TransferId) -> t.TransferStatus:
        self.check_open()
        return self._transfers.post(caller, transfer)

    def poll(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        return self._transfers.poll(caller, transfers)

    async def wait(
        self, caller: t.Caller, transfers: Sequence[t.TransferId], timeout_s: float, *, any_of: bool = False
    ) -> list[t.TransferStatus]:
        return await self._transfers.wait(caller, transfers, timeout_s, any_of=any_of)

    def watch(self, caller: t.Caller, transfers: Sequence[t.TransferId] = ()) -> AsyncIterator[t.TransferStatus]:
        return self._transfers.watch(caller, transfers)

    async def cancel(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        return await self._transfers.cancel(caller, transfers)

    async def release(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> None:
        await self._transfers.release(caller, transfers)

    async def estimate(self, caller: t.Caller, request: t.TransferRequest) -> t.Estimate:
        return self._planner.estimate(await self._transfers.plan(caller, request))

    async def explain(self, caller: t.Caller, request: t.TransferRequest) -> t.Explanation:
        return self._planner.explain(await self._transfers.plan(caller, request))

    def transfers(self, *, active_only: bool = False, agent: str = "") -> list[t.TransferStatus]:
        return self._transfers.transfers(active_only=active_only, agent=agent)

    async def notify(self, caller: t.Caller, notification: Notification) -> None:
        self._inboxes.check(notification)
        source = f"{caller.agent}@{self._me().name}"
        await self.deliver(Notification(notification.target, notification.payload, source, notification.transfer))

    async def notifications(self, caller: t.Caller, limit: int, timeout_s: float) -> list[Notification]:
        session_of(caller)
        return await self._inboxes.take(caller.agent, limit, timeout_s)

    async def deliver(self, notification: Notification) -> None:
        """Deliver to an agent here or on another node; ``source`` is set."""
        agent, _, node = notification.target.partition("@")
        if node in ("", self._me().name):
            self._inboxes.deliver(agent, notification)
        else:
            await self._peers.notify(node, notification, cause_id=notification.transfer)

    # ------------------------------------------------------------------------------------ Metadata

    async def node(self, name: str = "") -> NodeInfo:
        return self._me() if name in ("", self._me().name) else await self._store.get(name)

    def peers(self) -> list[t.PeerInfo]:
        return self._peers.peers()

    async def nodes(self) -> list[NodeInfo]:
        return sorted([self._me(), *await self._store.list_nodes()], key=lambda node: node.name)

    def watch_peers(self, name: str = "") -> AsyncIterator[t.PeerInfo]:
        return self._peers.watch(name)

    async def export_metadata(self, regions: Sequence[t.RegionId] | None = None) -> bytes:
        if regions is None:
            shared = self._regions.visible(None, RegionQuery())
        else:
            shared = tuple(self._regions.info(region) for region in regions)
        return encode_blob(self._me(), [info for info in shared if info.access.value])

    async def import_metadata(self, blob: bytes) -> RegionListing:
        node, regions = decode_blob(blob)
        await self._store.load(node)
        listing = RegionListing(node.name, node.epoch, tuple(regions))
        self._peers.remember(listing)
        return listing

    async def invalidate(self, name: str) -> None:
        await self._store.forget(name)

    async def publish_metadata(self, label: str, regions: Sequence[t.RegionId] | None = None) -> None:
        await self._store.put_blob(label, await self.export_metadata(regions))

    async def withdraw_metadata(self, label: str) -> None:
        await self._store.drop_blob(label)

    async def fetch_metadata(self, node: str, label: str, timeout_s: float) -> RegionListing:
        return await self.import_metadata(await fetch_blob(self._store, node, label, timeout_s))

    # ------------------------------------------------------------------------------------ Admin

    def status(self) -> NodeStatus:
        me, ended = self._me(), self._transfers.counters.ended
        refusal = self.readiness()
        return NodeStatus(
            node=me,
            live=not self._liveness(),
            ready=not refusal,
            reason=refusal or self.degraded(),
            draining=bool(self._refusal),
            sessions=len(self._sessions.sessions()),
            regions=len(self._regions),
            transfers_active=len(self._transfers.active),
            transfers_done=ended[TransferState.DONE],
            transfers_failed=ended[TransferState.FAILED],
            transfers_cancelled=ended[TransferState.CANCELLED],
            moved_nbytes=self._transfers.counters.moved_nbytes,
            uptime_s=self._clock() - me.started_at,
        )

    def liveness(self) -> str:
        return self._liveness()

    def readiness(self) -> str:
        return self._refusal

    def degraded(self) -> str:
        pools = (f"pool {pool.name!r}: {pool.reason}" for pool in self._devices.pool_infos() if pool.reason)
        return "; ".join(filter(None, (self._store.health(), *pools)))

    def store_problem(self) -> str:
        """Return what is wrong with the store of nodes, or "", for metrics."""
        return self._store.health()

    def handed_over(self) -> tuple[int, int]:
        """Return how many regions, and bytes of them, changed their owner since the start, for metrics."""
        return self._handovers.given_regions, self._handovers.given_nbytes

    def integrity_failures(self) -> dict[str, int]:
        """Return how many reads each backend found not to be what was written, for metrics."""
        return {name: backend.statistics().integrity_failures for name, backend in self._backends.items()}

    def peer_losses(self) -> int:
        """Return how many connected peers were lost since the start, for metrics."""
        return self._peers.losses

    def rings(self) -> tuple[int, RingCounters]:
        """Return how many rings are open, and what all rings did since the start, for metrics."""
        return len(self._rings), self._rings.counters

    def store_statistics(self) -> Mapping[str, float]:
        """Return the store's own counters, for metrics."""
        return self._store.statistics()

    def config_toml(self) -> str:
        return self._config_toml()

    def backends(self) -> list[BackendInfo]:
        infos = []
        for name, backend in self._backends.items():
            counted = backend.statistics()
            pairs = sorted(f"{SPACE_NAMES[a.value]}>{SPACE_NAMES[b.value]}" for a, b in backend.pairs())
            infos.append(
                BackendInfo(
                    name,
                    tuple(pairs),
                    counted.moved_nbytes,
                    counted.chunks,
                    counted.failures,
                    counted.busy,
                    counted.slots,
                )
            )
        return infos

    def storage(self) -> list[t.StorageInfo]:
        return self._storage.statistics()

    async def scrub_storage(self, pool: str) -> t.StorageInfo:
        return await self._storage.scrub(pool)

    def routes(self) -> list[t.RouteCost]:
        return [
            replace(row, source=SPACE_NAMES.get(row.source, row.source), target=SPACE_NAMES.get(row.target, row.target))
            for row in self._planner.learned()
        ]

    def holds(self) -> list[HoldInfo]:
        prepared = [
            HoldInfo("prepared", str(entry.info.handle), entry.session, f"{entry.info.count} rows", entry.since, 0.0)
            for entry in self._lists.entries()
        ]
        return [
            *self._regions.registrations(),
            *self._regions.holds(),
            *prepared,
            *self._rings.holds(),
            *self._staging.holds(),
        ]

    def set_metrics(self, metrics: Callable[[], bytes]) -> None:
        """Take the function that makes the metrics; it reads this service, so it comes after it."""
        self._metrics = metrics

    def metrics(self) -> bytes:
        return self._metrics()

    def set_doctor(self, doctor: Doctor) -> None:
        """Take who looks at the surroundings; it reads the faces, so it comes after them."""
        self._doctor = doctor

    async def diagnose(self) -> list[t.Check]:
        if self._doctor is None:
            raise Unavailable("the daemon is starting", remedy="ask again")
        return await self._doctor.diagnose()

    def log_level(self) -> str:
        return self._log_level()

    def set_log_level(self, level: str) -> str:
        return self._set_log_level(level)

    # ------------------------------------------------------------------------------------ drain

    def open_up(self) -> None:
        """Take new work: every component is up."""
        self._refusal = ""

    def refusal(self) -> str:
        """Return why no new work is taken, or ""."""
        return self._refusal

    def begin_drain(self, reason: str = "draining") -> None:
        """Refuse new work from clients and peers; what runs goes on."""
        self._refusal = reason
        self._is_stopping = self._is_stopping or reason == "stopping"
        if self._serving is not None:
            self._serving.refuse(reason)
        self._drain_changed(True)

    async def drain(self, timeout_s: float) -> int:
        self.begin_drain("stopping" if self._is_stopping else "draining")
        theirs = 0
        async with asyncio.TaskGroup() as group:
            group.create_task(self._transfers.wait_all(timeout_s), name="drain transfers")
            if self._serving is not None:
                theirs = await self._serving.wait_idle(timeout_s)
        return len(self._transfers.active) + theirs

    def undrain(self) -> None:
        if self._is_stopping:
            raise InvalidState("the daemon is stopping", remedy="start it again")
        self._refusal = ""
        if self._serving is not None:
            self._serving.refuse("")
        self._drain_changed(False)

    def check_open(self) -> None:
        """Raise ``Unavailable`` while no new work is taken."""
        if self._refusal:
            raise Unavailable(
                f"node {self._me().name} takes no new work: {self._refusal}", remedy="use another node, or wait"
            )
