"""The composition root: the one place where every part is made and handed what it needs.

Order of starting: run directory, pools and table, backends, store, peers, engine, sessions, faces, the session socket
last, because it is what clients wait for. Stopping is the reverse; ``lifecycle.py`` drains before.
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import ConfigError
from xferd.api.grpc.server import GrpcFace, TlsFiles
from xferd.api.rest.face import RestFace
from xferd.api.types import Limits, MemoryKind
from xferd.daemon import log as logs, metrics
from xferd.daemon.components import Components
from xferd.daemon.config import to_toml
from xferd.daemon.doctor_facts import Doctor
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.desk import TransferDesk
from xferd.daemon.engine.lists import ListBook
from xferd.daemon.engine.machine import TransferMachine
from xferd.daemon.engine.notifications import Inboxes
from xferd.daemon.engine.planner import Planner
from xferd.daemon.engine.runner import Runner
from xferd.daemon.engine.scheduler import Scheduler
from xferd.daemon.health import Health
from xferd.daemon.identity import Identity, lasting_id, next_epoch
from xferd.daemon.lifecycle import Lifecycle
from xferd.daemon.memory.desk import MemoryDesk
from xferd.daemon.memory.device_pool import DevicePool
from xferd.daemon.memory.devices import DeviceDesk, NoDevices
from xferd.daemon.memory.files import FileRoots
from xferd.daemon.memory.handover import HandOverDesk
from xferd.daemon.memory.objects import ObjectDesk
from xferd.daemon.memory.pool import HostPool
from xferd.daemon.memory.regions import RegionTable
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.device_lane import DeviceLane
from xferd.daemon.peers.exchange import RecordExchange
from xferd.daemon.peers.manager import PeerManager
from xferd.daemon.peers.publisher import Publisher
from xferd.daemon.peers.serving import PeerServing
from xferd.daemon.rings.desk import RingDesk
from xferd.daemon.rundir import RunDir
from xferd.daemon.sdnotify import Notifier, listen_fds, watchdog_interval_s
from xferd.daemon.service import Service
from xferd.daemon.sessions.desk import SessionDesk
from xferd.daemon.sessions.socket import SessionSocketServer
from xferd.daemon.sessions.table import SessionTable
from xferd.daemon.storage.config import storage_options
from xferd.daemon.storage.desk import StorageDesk
from xferd.daemon.storage.lanes import LaneSealer
from xferd.metadata.embedded import EmbeddedStore, StaticPeer
from xferd.metadata.registry import store_class
from xferd.plugins.base import ObjectCatalog, PeerTransport
from xferd.plugins.devices import DeviceMemory
from xferd.plugins.fabric import PeerService
from xferd.plugins.registry import create_backends

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from xferd.api.types import Notification
    from xferd.daemon.config import Config, ConfigSource
    from xferd.metadata.base import ExchangeRecords, Store
    from xferd.plugins.base import Backend

log = structlog.get_logger(__name__)

EXCHANGE_TIMEOUT_S = 5.0
"""For a static peer's first answer; the control lane's own connect timeout is within it."""

GRPC_GRACE_S = 1.0
MIN_TOKEN_CHARACTERS = 16


async def serve(config: Config, source: ConfigSource) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    notifier = Notifier.from_environ(os.environ)
    health = Health(notifier, watchdog_interval_s(os.environ, os.getpid()))

    @asynccontextmanager
    async def open_components(settings: Config) -> AsyncIterator[Daemon]:
        with RunDir(settings.run_dir):
            async with Components() as stack:
                daemon = Daemon(settings, health, stack, source.load)
                await daemon.start()
                yield daemon

    return await Lifecycle(config, source, open_components, notifier=notifier, health=health).run()


class Daemon:
    """All parts of one daemon, made and started in the order of their dependencies.

    Args:
        config: the tree to start with; ``reload`` takes a later one.
        health: asked for liveness.
        stack: closes what was started, in reverse.
        load_config: loads the tree again from where it came, to compare.
    """

    def __init__(self, config: Config, health: Health, stack: Components, load_config: Callable[[], Config]) -> None:
        self._config = config
        self._load_config = load_config
        self._health = health
        self._stack = stack
        self._admin_token = _read_token(config.rest.token_file)
        self._client_token = _read_token(config.grpc.token_file)
        name, epoch = config.node_name, next_epoch(config.run_dir)
        limits = config.limits
        self._backends: dict[str, Backend] = create_backends(config.active_backends())
        self._identity = Identity(name, epoch, self._backends, self._agents, node_id=lasting_id(config.run_dir))
        self._regions = RegionTable(name, epoch, limits.max_regions)
        self._roots = FileRoots(config.files.roots)
        self._storage = StorageDesk(
            self._regions, storage_options(config.storage_pools), node=name, node_id=self._identity.id
        )
        self._staging = StagingPool(config.transfers.staging, config.transfers.chunk)
        self._inboxes = Inboxes(name, max_nbytes=limits.max_inbox, max_payload_nbytes=limits.max_notification)
        self._costs = CostModel()
        self._transport = next((b for b in self._backends.values() if isinstance(b, PeerTransport)), None)
        exchange = None if self._transport is None else RecordExchange(self._transport, timeout_s=EXCHANGE_TIMEOUT_S)
        self._store = _store(config, exchange)
        self._peers = PeerManager(self._identity.info, self._store, self._transport, keep=_peer_names(config))
        self._publisher = Publisher(self._store, self._identity.info, on_drain=self._tell_drain)
        self._planner = Planner(
            name,
            self._backends,
            self._costs,
            chunk_nbytes=config.transfers.chunk,
            max_pieces=config.transfers.max_pieces,
            staging_slots=self._staging.count,
        )
        self._lists = ListBook(name, epoch, self._regions, self._peers, max_prepared=limits.max_prepared)
        self._pools: dict[str, HostPool] = {}
        self._device_backend = next((b for b in self._backends.values() if isinstance(b, DeviceMemory)), None)
        self._device_memory = self._device_backend or NoDevices()
        self._device_pools: dict[str, DevicePool] = {}
        self._devices = DeviceDesk(self._regions, self._device_memory, self._device_pools)
        if self._device_backend is not None:
            self._identity.kinds += (MemoryKind.VRAM,)
        self._make_transfers(name)
        self._make_sessions(name, epoch)
        self._make_service()
        self._make_faces()
        self._make_doctor()

    # ------------------------------------------------------------------------------------ making

    def _make_transfers(self, name: str) -> None:
        config = self._config
        machine = TransferMachine(Scheduler())
        self._runner = Runner(
            machine,
            self._backends,
            self._costs,
            self._staging,
            sealer=self._storage.sealer,
            deliver=lambda notification: self._service.deliver(notification),
            on_ended=lambda transfer: self._transfers.on_ended(transfer),
            clock=time.time,
        )
        self._transfers = TransferDesk(
            name,
            machine,
            self._runner,
            self._lists,
            self._planner,
            self._regions,
            self._inboxes,
            check_events=self._devices.check_events,
            default_timeout_s=config.transfers.default_timeout,
            max_transfers=config.limits.max_transfers,
            keep_plans_nbytes=config.transfers.keep_plans,
        )
        self._rings = RingDesk(
            self._transfers,
            self._inboxes,
            check_open=lambda: self._service.check_open(),
            enabled=config.rings.enabled,
            max_nbytes=config.rings.max_nbytes,
        )

    def _make_sessions(self, name: str, epoch: int) -> None:
        config = self._config
        self._memory = MemoryDesk(
            name,
            epoch,
            self._regions,
            self._pools,
            self._roots,
            self._planner,
            self._backends,
            self._storage,
            self._devices,
            max_group=config.limits.max_group,
        )
        table = SessionTable(max_sessions=config.sessions.max_sessions)
        self._handovers = HandOverDesk(
            name, epoch, self._regions, self._inboxes, table.session_of_agent, max_group=config.limits.max_group
        )
        catalog = next((b for b in self._backends.values() if isinstance(b, ObjectCatalog)), None)
        self._objects = ObjectDesk(self._regions, self._roots, catalog, max_items=config.limits.max_group)
        self._sessions = SessionDesk(
            name,
            epoch,
            table,
            self._transfers,
            self._rings,
            self._storage,
            self._lists,
            self._inboxes,
            self._memory,
            self._regions,
            self._devices,
            limits=self._limits,
            pools=lambda: self._service.pools(),
            grpc_target=f"unix:{config.grpc_socket}",
            admin_token=self._admin_token,
            refusal=lambda: self._service.refusal(),
            abort_holder=self._abort_holder,
            agents_changed=self._publisher.changed,
            quiesce_timeout_s=config.transfers.quiesce_timeout,
            clock=time.time,
        )

    def _make_service(self) -> None:
        config = self._config
        self._serving = None
        if self._transport is not None:
            self._serving = PeerServing(
                me=self._identity.info,
                regions=self._regions,
                staging=self._staging,
                learn=self._store.learn,
                deliver=lambda notification: self._inboxes.deliver(_agent_of(notification), notification),
                transport=self._transport,
                events=self._peers,
                max_descriptors=config.limits.max_descriptors,
                quiesce_timeout_s=config.transfers.quiesce_timeout,
                sealer=LaneSealer(self._storage.sealer) if config.storage_pools else None,
                devices=DeviceLane(self._device_backend),
                services=self._peer_services(),
            )
        self._service = Service(
            me=self._identity.info,
            sessions=self._sessions,
            memory=self._memory,
            handovers=self._handovers,
            objects=self._objects,
            devices=self._devices,
            transfers=self._transfers,
            rings=self._rings,
            storage=self._storage,
            lists=self._lists,
            planner=self._planner,
            inboxes=self._inboxes,
            regions=self._regions,
            pools=self._pools,
            staging=self._staging,
            peers=self._peers,
            serving=self._serving,
            store=self._store,
            backends=self._backends,
            liveness=self._health.liveness,
            config_toml=lambda: to_toml(self._config),
            log_level=logs.level_in_force,
            set_log_level=logs.set_level,
            drain_changed=self._drain_changed,
            clock=time.time,
        )
        registry = metrics.exporter(self._service)
        self._service.set_metrics(lambda: metrics.render(registry))

    def _make_faces(self) -> None:
        config = self._config
        self._grpc = GrpcFace(
            self._service,
            socket_path=str(config.grpc_socket),
            listen=config.grpc.listen,
            admin_token=self._client_token,
            tls=_tls(config),
            max_message_nbytes=config.grpc.max_message,
            max_descriptors=config.limits.max_descriptors,
        )
        self._rest = RestFace(
            self._service,
            socket_path=str(config.rest_socket),
            listen=config.rest.listen,
            admin_token=self._admin_token,
            session_ttl_s=config.sessions.rest_ttl,
            max_descriptors=config.limits.max_descriptors,
        )
        inherited = listen_fds(os.environ, os.getpid()).get("session")
        self._socket = SessionSocketServer(
            inherited or config.session_socket, self._service, allowed_uids=config.sessions.allowed_uids
        )

    def _make_doctor(self) -> None:
        doctor = Doctor(
            config=lambda: self._config,
            load_config=self._load_config,
            me=self._identity.info,
            faces=lambda: {"grpc.listen": self._grpc_address(), "rest.listen": self._rest.address},
            pools=self._service.pools,
            storage=self._service.storage,
            catalog=self._objects.catalog,
            devices=self._service.devices,
            staging=self._staging,
            store=self._store,
            peers=self._peers.peers,
            refusal=self._service.refusal,
        )
        self._service.set_doctor(doctor)

    # ------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start every part; what was started is closed by the stack, whatever happens."""
        stack = self._stack
        for pool in self._config.pools:
            if pool.kind == "VRAM":
                continue
            self._pools[pool.name] = made = HostPool(
                pool.name, pool.nbytes, huge_pages=pool.huge_pages, collapse=pool.collapse
            )
            stack.push(f"pool {pool.name}", made.aclose)
        stack.push("staging", self._staging.aclose)
        await stack.enter("storage", self._storage)
        for name, backend in self._backends.items():
            await backend.start()
            stack.push(f"backend {name}", backend.aclose)
        await self._start_devices()
        if self._transport is not None and self._serving is not None:
            for service in self._peer_services():
                service.attach(self._identity.info(), self._transport, self._serving)
            self._identity.addresses = await self._transport.listen(self._identity.info(), self._serving)
        await self._store.start()
        stack.push("store", self._store.aclose)
        await stack.enter("publisher", self._publisher)
        await stack.enter("peers", self._peers)
        await stack.enter("runner", self._runner)
        self._peers.subscribe(self._peer_lost)
        await stack.enter("rings", self._rings)
        await stack.enter("sessions", self._sessions)
        await self._grpc.start()
        stack.push("grpc", lambda: self._grpc.aclose(GRPC_GRACE_S))
        await self._rest.start()
        stack.push("rest", self._rest.aclose)
        self._service.open_up()
        await self._grpc.set_serving(True)
        await stack.enter("session socket", self._socket)
        log.info(
            "listening",
            epoch=self._identity.epoch,
            session_socket=str(self._config.session_socket),
            grpc=self._grpc.socket_path,
            grpc_port=self._grpc.port or None,
            rest=str(self._config.rest_socket),
            rest_tcp=self._rest.address or None,
            peers=list(self._identity.addresses),
        )

    async def _start_devices(self) -> None:
        """Tell device workers of the host memory that they may map, and take the pools of GPU memory."""
        hosts: tuple[StagingPool | HostPool, ...] = (self._staging, *self._pools.values())
        for shared in hosts:
            number = self._devices.add_host(shared.address, shared.nbytes, shared.fd)
            self._stack.push("host memory of device workers", functools.partial(self._devices.drop_host, number))
        for pool in self._config.pools:
            if pool.kind == "VRAM":
                made = DevicePool(pool.name, pool.device, pool.nbytes, self._device_memory)
                self._device_pools[pool.name] = made
                await made.start()
                self._stack.push(f"pool {pool.name}", made.aclose)

    def readiness(self) -> str:
        """Return "" if new work is taken, else why not."""
        return self._service.readiness()

    def begin_drain(self) -> None:
        """Refuse new work from clients, at every face, and from peers."""
        self._service.begin_drain("stopping")
        self._socket.stop_listening()

    async def announce(self) -> None:
        """Tell health checks, the store and peers that this node drains, so that they choose another."""
        await self._publisher.publish()

    async def drain(self, timeout_s: float) -> int:
        """Wait for running transfers, of peers too; returns how many are left."""
        return await self._service.drain(timeout_s)

    async def withdraw(self) -> None:
        """Take the node's record back; nothing runs any more that peers would want to see through."""
        await self._publisher.withdraw()

    async def reload(self, config: Config) -> list[str]:
        """Take over the live keys of a new tree; every key marked live in the tree is taken over here."""
        self._config = config
        self._roots.reload(config.files.roots)
        self._inboxes.max_nbytes = config.limits.max_inbox
        self._inboxes.max_payload_nbytes = config.limits.max_notification
        self._memory.max_group = self._handovers.max_group = self._objects.max_items = config.limits.max_group
        self._transfers.max_transfers = config.limits.max_transfers
        self._transfers.default_timeout_s = config.transfers.default_timeout
        self._sessions.quiesce_timeout_s = config.transfers.quiesce_timeout
        self._sessions.max_sessions = config.sessions.max_sessions
        if isinstance(self._store, EmbeddedStore):
            self._store.reload(_static_peers(config))
        await self._peers.reload(_peer_names(config))
        return []

    # ------------------------------------------------------------------------------------ small answers

    def _peer_services(self) -> tuple[PeerService, ...]:
        """Return the backends that serve peers by requests over the transport."""
        return tuple(backend for backend in self._backends.values() if isinstance(backend, PeerService))

    def _agents(self) -> tuple[str, ...]:
        return self._sessions.agents()

    def _limits(self) -> Limits:
        limits = self._config.limits
        return Limits(limits.max_descriptors, self._config.grpc.max_message, limits.max_notification, limits.max_group)

    def _grpc_address(self) -> str:
        """Return gRPC's TCP address with the real port, "" where it has none."""
        return f"{self._config.grpc.listen.rpartition(':')[0]}:{self._grpc.port}" if self._grpc.port else ""

    def _drain_changed(self, draining: bool) -> None:
        self._identity.draining = draining
        self._publisher.changed()

    async def _tell_drain(self) -> None:
        """The store has the record of a drain that began or ended; tell those who do not hear of it from the store."""
        await self._grpc.set_serving(not self._identity.draining)
        await self._peers.announce()

    def _peer_lost(self, name: str, reason: str) -> None:
        self._costs.forget(name)
        failed = self._transfers.fail_peer(name, reason)
        if failed:
            log.warning("peer_transfers_failed", peer=name, transfers=failed, reason=reason)

    async def _abort_holder(self, holder: str) -> None:
        """Bring a peer's hold to rest by cutting the lanes that serve it."""
        if self._serving is not None:
            await self._serving.abort(holder)


def _store(config: Config, exchange: ExchangeRecords | None) -> Store:
    """Return the configured store; one that needs a client library imports it only here."""
    if config.metadata.store == "embedded":
        return EmbeddedStore(_static_peers(config), exchange)
    make: Callable[[object], Store] = store_class(config.metadata.store)
    return make(getattr(config.metadata, config.metadata.store))


def _static_peers(config: Config) -> list[StaticPeer]:
    return [StaticPeer(peer.name, peer.address) for peer in config.static_peers]


def _peer_names(config: Config) -> list[str]:
    return [peer.name for peer in config.static_peers if peer.name != config.node_name]


def _agent_of(notification: Notification) -> str:
    return notification.target.partition("@")[0]


def _read_token(path: str) -> str:
    """Return the content of a token file, "" where none is configured."""
    if not path:
        return ""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"token file {path}: {error.strerror}", remedy="make it readable for the daemon") from error
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"the token in {path} has {len(token)} characters",
            limit=f"at least {MIN_TOKEN_CHARACTERS}",
            remedy="write a random one, for example of `openssl rand -hex 32`",
        )
    return token


def _tls(config: Config) -> TlsFiles | None:
    grpc = config.grpc
    return TlsFiles(grpc.tls_cert, grpc.tls_key, grpc.tls_client_ca) if grpc.tls_cert else None
