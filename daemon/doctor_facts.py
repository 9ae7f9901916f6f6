"""Gathers what ``doctor.py`` judges: limits, /proc, paths, our own ports, the store, the peers. Changes nothing.

Files are looked at in a thread, and ports are called with a deadline, so that a dead file server or a firewall that
swallows packets holds up the answer and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError, XferdError
from xferd.api.timeouts import timeout
from xferd.daemon.config import diff
from xferd.daemon.config_checks import split_address
from xferd.daemon.doctor import Facts, PathFact, PortFact, diagnose
from xferd.daemon.doctor_storage import look_at_stores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from xferd.api.types import Check, DeviceInfo, NodeInfo, PeerInfo, PoolInfo, StorageInfo
    from xferd.daemon.config import Config
    from xferd.daemon.memory.staging import StagingPool
    from xferd.metadata.base import LeaseView, Store
    from xferd.plugins.base import ObjectCatalog

CALL_TIMEOUT_S = 2.0
"""For each of our own ports, all at once, and for each look at the disk."""

PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
MEMINFO = Path("/proc/meminfo")
FDS = Path("/proc/self/fd")


class Doctor:
    """Looks at the daemon that it belongs to.

    Args:
        config: the tree in force.
        load_config: loads it again from where it came.
        me: this node's record.
        faces: TCP addresses in use besides those of the record, by the key that set them; "" for none.
        pools, storage, devices, peers, refusal: as the service has them.
        catalog: of the object stores; None where no backend has any.
    """

    def __init__(
        self,
        *,
        config: Callable[[], Config],
        load_config: Callable[[], Config],
        me: Callable[[], NodeInfo],
        faces: Callable[[], Mapping[str, str]],
        pools: Callable[[], list[PoolInfo]],
        storage: Callable[[], list[StorageInfo]],
        catalog: ObjectCatalog | None,
        devices: Callable[[], list[DeviceInfo]],
        staging: StagingPool,
        store: Store,
        peers: Callable[[], list[PeerInfo]],
        refusal: Callable[[], str],
    ) -> None:
        self._config = config
        self._load_config = load_config
        self._me = me
        self._faces = faces
        self._pools = pools
        self._storage = storage
        self._catalog = catalog
        self._devices = devices
        self._staging = staging
        self._store = store
        self._peers = peers
        self._refusal = refusal
        self._clocks_apart_s = _clocks_apart_s()

    async def diagnose(self) -> list[Check]:
        """Look now, and judge. Cancel-safe."""
        return diagnose(await self.facts())

    async def facts(self) -> Facts:
        """Gather the facts; what cannot be had is a fact too, and no error."""
        config = self._config()
        async with asyncio.TaskGroup() as group:
            ports = group.create_task(self._call_ports(config), name="doctor: ports")
            paths = group.create_task(asyncio.to_thread(_paths, config), name="doctor: paths")
            lease = group.create_task(self._lease(), name="doctor: lease")
            stores = group.create_task(look_at_stores(self._catalog, CALL_TIMEOUT_S), name="doctor: stores")
            file = group.create_task(asyncio.to_thread(self._compare, config), name="doctor: config")
        config_error, changed = file.result()
        view, lease_error = lease.result()
        staging = self._staging.statistics()
        huge = _meminfo()
        return Facts(
            uid=os.geteuid(),
            version=self._me().version,
            refusal=self._refusal(),
            config_error=config_error,
            config_changed=changed,
            store=config.metadata.store,
            store_problem=self._store.health(),
            lease=view,
            lease_error=lease_error,
            clock_step_s=_clocks_apart_s() - self._clocks_apart_s,
            memlock_nbytes=_limit(resource.RLIMIT_MEMLOCK),
            max_fds=_limit(resource.RLIMIT_NOFILE),
            open_fds=_open_fds(),
            max_sessions=config.sessions.max_sessions,
            ptrace_scope=_ptrace_scope(),
            huge_pool_nbytes=sum(pool.nbytes for pool in config.pools if pool.huge_pages),
            huge_page_nbytes=huge.get("Hugepagesize", 2048) * 1024,
            huge_pages_total=huge.get("HugePages_Total", 0),
            huge_pages_free=huge.get("HugePages_Free", 0),
            pools=tuple(self._pools()),
            storage=tuple(self._storage()),
            stores=stores.result(),
            devices=tuple(self._devices()),
            staging_slots=staging.slots,
            staging_free=max(0, staging.slots - staging.acquired - staging.borrowed),
            staging_waiting=staging.waiting_acquire + staging.waiting_borrow,
            paths=paths.result(),
            ports=ports.result(),
            peers=tuple(self._peers()),
        )

    async def _lease(self) -> tuple[LeaseView | None, str]:
        try:
            return await self._store.lease_view(), ""
        except XferdError as exc:
            return None, exc.message

    def _compare(self, in_force: Config) -> tuple[str, tuple[str, ...]]:
        try:
            changes = diff(in_force, self._load_config())
        except ConfigError as exc:
            return str(exc), ()
        return "", (*changes.live, *changes.fixed)

    async def _call_ports(self, config: Config) -> tuple[PortFact, ...]:
        advertised = bool(config.backends.get("tcp", {}).get("advertise"))
        wanted = [(key, address, False) for key, address in self._faces().items() if address]
        wanted += [("backends.tcp", address, advertised) for address in self._me().addresses]
        return tuple(await asyncio.gather(*(_call(key, address, told) for key, address, told in wanted)))


async def _call(key: str, address: str, advertised: bool) -> PortFact:
    """Connect and hang up: whoever listens sees a caller that changed its mind."""
    try:
        host, port = split_address(address.removeprefix("tcp://"))
        async with timeout(CALL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(_reachable(host), port)
    except TimeoutError:
        return PortFact(key, address, f"no answer in {CALL_TIMEOUT_S:g} s", advertised)
    except (OSError, ConfigError) as exc:
        return PortFact(key, address, str(exc), advertised)
    writer.transport.abort()
    return PortFact(key, address, "", advertised)


def _reachable(host: str) -> str:
    """Return where to call a listener on every interface."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def _paths(config: Config) -> tuple[PathFact, ...]:
    places: Sequence[tuple[str, str, str, bool]] = (
        ("node.run_dir", str(config.run_dir), "directory", False),
        ("sessions.socket", str(config.session_socket), "socket", False),
        ("grpc.socket", str(config.grpc_socket), "socket", False),
        ("rest.socket", str(config.rest_socket), "socket", False),
        *(("files.roots", root, "directory", False) for root in config.files.roots),
        ("grpc.token_file", config.grpc.token_file, "file", True),
        ("rest.token_file", config.rest.token_file, "file", True),
        ("grpc.tls_key", config.grpc.tls_key, "file", True),
        ("backends.tcp.secret_file", str(config.active_backends().get("tcp", {}).get("secret_file", "")), "file", True),
        *(
            (("metadata.etcd.password_file", config.metadata.etcd.password_file, "file", True),)
            if config.metadata.store == "etcd"
            else ()
        ),
    )
    return tuple(look_at(name, path, kind, secret=secret) for name, path, kind, secret in places if path)


def look_at(name: str, path: str, kind: str, *, secret: bool = False) -> PathFact:
    """Return what there is at a path; a file must be readable, anything else writable."""
    try:
        status = Path(path).stat()
    except OSError as exc:
        return PathFact(name, path, kind, error=exc.strerror or str(exc), secret=secret)
    wanted = os.R_OK if kind == "file" else os.W_OK | (os.X_OK if kind == "directory" else 0)
    accessible = os.access(path, wanted, effective_ids=True)
    return PathFact(name, path, kind, "", status.st_mode, status.st_uid, accessible, secret)


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _open_fds() -> int:
    return sum(1 for _ in FDS.iterdir()) - 1  # without the one that lists them


def _ptrace_scope() -> int | None:
    try:
        return int(PTRACE_SCOPE.read_text())
    except (OSError, ValueError):  # a kernel without Yama
        return None


def _meminfo() -> dict[str, int]:
    """Return the numbers of /proc/meminfo as they stand there, in KiB or pages; what is not there is left out."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:  # hidden by a container
        return {}
    words = (line.split() for line in lines)
    return {parts[0].removesuffix(":"): int(parts[1]) for parts in words if len(parts) > 1 and parts[1].isdigit()}


def _clocks_apart_s() -> float:
    """Return the wall clock less the time since boot: it changes when somebody sets the wall clock."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
