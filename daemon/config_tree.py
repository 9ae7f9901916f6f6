"""The configuration tree: every section, key, type and default. How it is read is in ``config.py``.

Sizes are bytes and durations are seconds once parsed. What must hold between keys is in ``config_checks.py``; what
each key is for is in ``docs/configuration.md`` and in the commented ``systemd/xferd.toml``, and tests keep both in
step with this tree. Sections of backends stay raw here: a backend's options belong to the backend's module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from xferd.api.units import SIZE_UNITS
from xferd.metadata.etcd_options import EtcdOptions
from xferd.plugins.options import Nbytes, Options, Seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

KIB, MIB, GIB = SIZE_UNITS["KiB"], SIZE_UNITS["MiB"], SIZE_UNITS["GiB"]

LIVE = "live"
"""Marks a key that SIGHUP changes in the running daemon; any other waits for a restart."""

Count = Annotated[int, Field(strict=True, ge=1, le=1 << 32)]  # strict: neither true nor "5" is a count
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$")]
LogLevel = Literal["debug", "info", "warning", "error"]
BackendSections: TypeAlias = dict[str, dict[str, Any]]  # raw until the registry gives each to its backend


class NodeConfig(Options):
    """Who this daemon is; "" takes the host name, and the run directory of ``default_run_dir``."""

    name: str = Field(default="", pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$")
    run_dir: str = ""


class LogConfig(Options):
    """What is logged, and how; "auto" is colours on a terminal and JSON elsewhere."""

    level: Annotated[LogLevel, LIVE] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class SessionsConfig(Options):
    """Who may attach. No ``allowed_uids`` means the daemon's own uid and root."""

    socket: str = ""
    allowed_uids: tuple[Annotated[int, Field(strict=True, ge=0, lt=1 << 32)], ...] = ()
    max_sessions: Annotated[Count, LIVE] = 256
    rest_ttl: Annotated[Seconds, Field(gt=0)] = 60.0


class RingsConfig(Options):
    """Rings in shared memory, which attached clients may open beside gRPC."""

    enabled: Annotated[bool, Field(strict=True)] = True
    max_nbytes: Annotated[Nbytes, Field(ge=64 * KIB)] = 16 * MIB


class GrpcConfig(Options):
    """The gRPC face: always a Unix socket, TCP where ``listen`` is set."""

    socket: str = ""
    listen: str = ""
    token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    max_message: Annotated[Nbytes, Field(ge=64 * KIB, lt=1 << 31)] = 64 * MIB


class RestConfig(Options):
    """The REST face: always a Unix socket, TCP where ``listen`` is set."""

    socket: str = ""
    listen: str = ""
    token_file: str = ""


class PoolConfig(Options):
    """One pool of memory that the daemon owns, of this machine or of a GPU (``VRAM``, of ``device``)."""

    name: Name = "host"
    kind: Literal["DRAM", "VRAM"] = "DRAM"
    nbytes: Annotated[Nbytes, Field(ge=4096)] = 256 * MIB
    device: Annotated[int, Field(strict=True, ge=0, lt=256)] = 0
    huge_pages: Annotated[bool, Field(strict=True)] = False
    collapse: Literal["allocated", "all", "off"] = "allocated"


class StorageDirectoryConfig(Options):
    """One directory of a storage pool, and its share of it."""

    path: str
    weight: Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)] = 1.0


class StoragePoolConfig(Options):
    """One pool of memory on disks that the daemon owns."""

    name: Name
    directories: tuple[StorageDirectoryConfig, ...]
    nbytes: Annotated[Nbytes, Field(ge=4096)]
    slab_nbytes: Annotated[Nbytes, Field(ge=4096)] = 64 * GIB
    checksum: Literal["xxh3", "off"] = "xxh3"
    block_nbytes: Annotated[Nbytes, Field(ge=4096, le=16 * MIB)] = 256 * KIB
    verify: Annotated[bool, Field(strict=True)] = False
    scrub_rate: Nbytes = 16 * MIB
    movers: Annotated[int, Field(strict=True, ge=1, le=64)] = 4


class FilesConfig(Options):
    """Directories under which clients may register files by path; none by default."""

    roots: Annotated[tuple[str, ...], LIVE] = ()


class LimitsConfig(Options):
    """Bounds on single requests, sessions and inboxes; whoever meets one is told its name here."""

    max_descriptors: Count = 1 << 20
    max_notification: Annotated[Nbytes, LIVE] = MIB
    max_inbox: Annotated[Nbytes, LIVE] = 16 * MIB
    max_group: Annotated[Count, LIVE] = 65536
    max_transfers: Annotated[Count, LIVE] = 4096
    max_prepared: Count = 65536
    max_regions: Count = 65536


class TransfersConfig(Options):
    """How transfers are cut and bounded in time."""

    chunk: Annotated[Nbytes, Field(ge=4096)] = 8 * MIB
    max_pieces: Count = 8192
    default_timeout: Annotated[Seconds, Field(gt=0), LIVE] = 60.0
    staging: Annotated[Nbytes, Field(ge=4096)] = 64 * MIB
    keep_plans: Nbytes = 64 * MIB
    quiesce_timeout: Annotated[Seconds, Field(gt=0), LIVE] = 5.0


class PeerConfig(Options):
    """A node that is known without a store."""

    name: Name
    address: str


class EmbeddedConfig(Options):
    """The embedded store: peers named here, records exchanged with them directly."""

    peers: Annotated[tuple[PeerConfig, ...], LIVE] = ()


class MetadataConfig(Options):
    """Which store tells who is out there; the store's own section has its name."""

    store: Literal["embedded", "etcd"] = "embedded"
    embedded: EmbeddedConfig = EmbeddedConfig()
    etcd: EtcdOptions = EtcdOptions()


class ShutdownConfig(Options):
    """How long running transfers may take to end once the daemon is asked to stop."""

    drain_timeout: Annotated[Seconds, LIVE] = 10.0


class Config(Options):
    """The whole tree. Build it with ``load_config``, which also checks what must hold between keys."""

    node: NodeConfig = NodeConfig()
    log: LogConfig = LogConfig()
    sessions: SessionsConfig = SessionsConfig()
    rings: RingsConfig = RingsConfig()
    grpc: GrpcConfig = GrpcConfig()
    rest: RestConfig = RestConfig()
    pools: tuple[PoolConfig, ...] = (PoolConfig(),)
    storage_pools: tuple[StoragePoolConfig, ...] = ()
    files: FilesConfig = FilesConfig()
    limits: LimitsConfig = LimitsConfig()
    transfers: TransfersConfig = TransfersConfig()
    metadata: MetadataConfig = MetadataConfig()
    backends: BackendSections = Field(default_factory=lambda: default_backends())
    shutdown: ShutdownConfig = ShutdownConfig()

    @property
    def node_name(self) -> str:
        """The node's name: configured, or the host name up to its first dot."""
        return self.node.name or default_node_name()

    @property
    def run_dir(self) -> Path:
        """The directory of sockets and of the lock; ``load_config`` fills it in from the environment it is given."""
        return Path(self.node.run_dir) if self.node.run_dir else default_run_dir(os.environ, os.geteuid())

    @property
    def session_socket(self) -> Path:
        """Where clients open sessions."""
        return Path(self.sessions.socket) if self.sessions.socket else self.run_dir / "session.sock"

    @property
    def grpc_socket(self) -> Path:
        """The gRPC face's Unix socket."""
        return Path(self.grpc.socket) if self.grpc.socket else self.run_dir / "grpc.sock"

    @property
    def rest_socket(self) -> Path:
        """The REST face's Unix socket."""
        return Path(self.rest.socket) if self.rest.socket else self.run_dir / "admin.sock"

    def active_backends(self) -> BackendSections:
        """Return the sections of the backends to start.

        A section is enough for any but ``tcp``: that one has work only once it listens or has a peer to call, and
        a peer is enough for it. With a central store there may always be one, so that a section is enough.
        """
        active = {name: options for name, options in self.backends.items() if name != "tcp"}
        tcp = self.backends.get("tcp", {})
        has_peers = bool(self.static_peers) or (self.metadata.store == "etcd" and "tcp" in self.backends)
        if tcp.get("listen") or has_peers:
            active["tcp"] = tcp
        return active

    @property
    def static_peers(self) -> tuple[PeerConfig, ...]:
        """The configured peers, where the store goes by them."""
        return self.metadata.embedded.peers if self.metadata.store == "embedded" else ()


def default_backends() -> BackendSections:
    """Return the sections that are there unless a source says ``name = false``."""
    return {"local": {}, "posix": {}}


def default_node_name() -> str:
    """Return the host name up to its first dot, or "node" where the host has none that would do."""
    host = os.uname().nodename.partition(".")[0]
    return host if host and all(c.isalnum() or c in "_-" for c in host) and host[0].isalnum() else "node"


def default_run_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Return what systemd made for the unit, else /run/xferd for root, else a place of the user's own."""
    from_systemd = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if from_systemd:
        return Path(from_systemd)
    if uid == 0:
        return Path("/run/xferd")
    if environ.get("XDG_RUNTIME_DIR"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "xferd"
    return Path(f"/tmp/xferd-{uid}")  # noqa: S108 - rundir.py refuses it unless it is ours alone
