"""The values that cross the Engine protocol: ids, enumerations, requests and records.

All are frozen dataclasses in bytes, seconds and UNIX times. How they look on a wire is the business of the faces
(``api/grpc``, ``api/rest``); descriptor lists are in ``descriptors.py``; errors are in ``errors.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api._enums import (
    ENDED as ENDED,
    Access as Access,
    CheckState as CheckState,
    MemoryKind as MemoryKind,
    PeerState as PeerState,
    PreparedHandle as PreparedHandle,
    Priority as Priority,
    RegionId as RegionId,
    RegionSource as RegionSource,
    SessionId as SessionId,
    TransferId as TransferId,
    TransferOp as TransferOp,
    TransferState as TransferState,
    Transport as Transport,
)

if TYPE_CHECKING:
    from xferd.api.descriptors import ListSpec
    from xferd.api.errors import XferdError

# ------------------------------------------------------------------------------------------- sessions


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process at the other end of a Unix socket, as the kernel tells it (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. ``session`` is None for an operator at the admin face, who owns nothing."""

    session: SessionId | None
    agent: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """The daemon's limits on one request; going over one is a ``LimitExceeded`` that names it."""

    max_descriptors: int
    max_message_nbytes: int
    max_notification_nbytes: int
    max_group: int


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """What a client gets when its session opens. ``token`` is secret and lives as long as the session."""

    session: SessionId
    token: str
    agent: str
    node: str
    epoch: int
    limits: Limits
    grpc_target: str
    pools: tuple[PoolInfo, ...]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as listed for an operator; ``expires_at`` 0.0 means: lives as long as its connection."""

    session: SessionId
    agent: str
    transport: Transport
    pid: int
    uid: int
    opened_at: float
    expires_at: float
    regions: int
    held_nbytes: int
    transfers: int
    prepared: int


# ------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """Statistics of one pool. ``fragmentation`` is 1 - largest free extent / free bytes, 0 when none is free.

    ``huge_nbytes`` is what lies in pages of 2 MiB as far as the daemon saw to it, and ``huge_refusal`` why the kernel
    makes no such pages, or "". ``reason`` says why nothing can be allocated from it now, or ""; ``device`` is the GPU
    of a pool of GPU memory.
    """

    name: str
    kind: MemoryKind
    nbytes: int
    used_nbytes: int
    free_nbytes: int
    largest_free_nbytes: int
    fragmentation: float
    allocations: int
    peak_used_nbytes: int
    failed_allocations: int
    mappable: bool
    huge_nbytes: int = 0
    huge_refusal: str = ""
    device: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region as its owner and, where access allows, others see it. Never holds an address."""

    id: RegionId
    node: str
    epoch: int
    kind: MemoryKind
    source: RegionSource
    device: int
    nbytes: int
    agent: str
    access: Access
    writable: bool
    label: str = ""
    pool: str = ""
    pool_offset: int = 0
    path: str = ""
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class RegionListing:
    """Regions of one node, at one epoch of it."""

    node: str
    epoch: int
    regions: tuple[RegionInfo, ...]


@dataclass(frozen=True, slots=True)
class AllocateRequest:
    """A group of regions from one pool, all or none. Sizes are rounded up to 4096 bytes.

    ``persistent`` regions (of storage pools only) belong to the agent rather than to its session: they outlive both the
    session and the daemon, and the agent's next session has them.
    """

    nbytes: tuple[int, ...]
    pool: str = ""
    access: Access = Access.NONE
    label: str = ""
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class RegisterPrivateRequest:
    """A span of the calling process's own memory, by address."""

    address: int
    nbytes: int
    access: Access = Access.NONE
    label: str = ""
    writable: bool = True


@dataclass(frozen=True, slots=True)
class RegisterFileRequest:
    """A file under a configured root. ``nbytes`` 0 takes the file's present size."""

    path: str
    nbytes: int = 0
    writable: bool = False
    create: bool = False
    access: Access = Access.NONE
    label: str = ""


@dataclass(frozen=True, slots=True)
class RegisterObjectRequest:
    """An object of a configured store; ``nbytes`` 0 is its present size, ``create`` needs ``writable`` and a size."""

    store: str
    key: str
    nbytes: int = 0
    writable: bool = False
    create: bool = False
    access: Access = Access.NONE
    label: str = ""


@dataclass(frozen=True, slots=True)
class RegisterDeviceRequest:
    """A span of the calling process's GPU memory, in an allocation that it exported.

    ``device_uuid`` has 16 bytes. ``handle`` is an IPC handle of 64 bytes; b"" where a file descriptor comes over the
    session socket. ``nbytes`` 0 reaches up to the allocation's end.
    """

    device_uuid: bytes
    allocation_nbytes: int
    handle: bytes = b""
    offset: int = 0
    nbytes: int = 0
    access: Access = Access.NONE
    label: str = ""
    writable: bool = True


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """How a process opens the allocation of a region of GPU memory, and where in it the region is."""

    device_uuid: bytes
    handle: bytes
    allocation_nbytes: int
    offset: int
    driver: str


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU of the node; ``reason`` says why it cannot be used, "" where it can.

    ``free_nbytes`` is as of the last time that a worker was asked. ``workers`` live now, ``worker_restarts`` counts
    those that were started in the place of one that died; ``pinned_nbytes`` is host memory that the driver has locked,
    summed over workers; ``kernel_s`` and ``copy_s`` are seconds of device time by kernels and by copy engines.
    """

    index: int
    device_uuid: bytes = b""
    name: str = ""
    driver: str = ""
    reason: str = ""
    total_nbytes: int = 0
    free_nbytes: int = 0
    workers: int = 0
    worker_restarts: int = 0
    pinned_nbytes: int = 0
    moved_nbytes: int = 0
    kernel_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """An event of a session: ``handle`` is b"" for one that the client made itself."""

    event: int
    handle: bytes = b""


@dataclass(frozen=True, slots=True)
class QueryItem:
    """What to look at: a file by ``path``, or else an object by ``store`` and ``key``."""

    path: str = ""
    store: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What was found of one item; ``modified_at`` is UNIX time. ``error`` says why it could not be told, else None."""

    exists: bool
    nbytes: int = 0
    modified_at: float = 0.0
    etag: str = ""
    error: XferdError | None = None


@dataclass(frozen=True, slots=True)
class ObjectQuery:
    """Which objects of a store to list: keys that begin with ``prefix`` and come after ``after``; ``limit`` 0: 1000."""

    store: str
    prefix: str = ""
    after: str = ""
    limit: int = 0


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """An object of a listing."""

    key: str
    nbytes: int
    modified_at: float
    etag: str


@dataclass(frozen=True, slots=True)
class ObjectPage:
    """A page of a listing, in key order. ``next`` is the ``after`` of the next page, "" where this is the last."""

    objects: tuple[ObjectEntry, ...]
    next: str = ""


@dataclass(frozen=True, slots=True)
class HandOverRequest:
    """Regions for another agent of the same node, which is told of them by a notification with ``payload``.

    ``access`` is what others than the new owner may do from now on, the giver among them; None leaves it as it is.
    """

    regions: tuple[RegionId, ...]
    to: str
    payload: bytes = b""
    access: Access | None = None
    cause_id: str = ""


@dataclass(frozen=True, slots=True)
class RegionQuery:
    """Which regions to list; empty fields do not filter. ``node`` "" is this node."""

    node: str = ""
    agent: str = ""
    label: str = ""
    regions: tuple[RegionId, ...] = ()


# ------------------------------------------------------------------------------------------- transfers


@dataclass(frozen=True, slots=True)
class PreparedInfo:
    """A list that was checked once; good until released, its session ends, or its node's epoch changes."""

    handle: PreparedHandle
    node: str
    epoch: int
    count: int
    total_nbytes: int


@dataclass(frozen=True, slots=True)
class Notification:
    """Bytes for an agent. Addresses are ``agent@node``; ``transfer`` is "" when it was sent on its own.

    ``regions`` are those that the source has handed over with it; only the daemon of the target fills it in.
    """

    target: str
    payload: bytes
    source: str = ""
    transfer: str = ""
    regions: tuple[RegionId, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What to move, and how. ``timeout_s`` 0.0 takes the daemon's default; it counts from posting.

    ``verify`` has what is read from storage pools compared with its checksums before DONE is told. ``wait_event`` and
    ``done_event`` are events of the session, 0: none: chunks that touch GPU memory wait for the first and record the
    second. ``durable`` has what is written to files put on the disk before DONE is told; elsewhere it means nothing.
    """

    op: TransferOp
    local: ListSpec
    remote: ListSpec
    key: str = ""
    timeout_s: float = 0.0
    priority: Priority = Priority.NORMAL
    cause_id: str = ""
    notification: Notification | None = None
    backend: str = ""
    hold: bool = False
    verify: bool = False
    wait_event: int = 0
    done_event: int = 0
    durable: bool = False


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a route, with the reason for it. Places read "DRAM@node-a"."""

    backend: str
    source: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Times and counts of a transfer's last post; a time of 0.0 has not come yet.

    ``descriptors`` counts both lists as given, ``pieces`` both after coalescing.
    """

    created_at: float
    posted_at: float
    first_byte_at: float
    ended_at: float
    queued_s: float
    moving_s: float
    total_nbytes: int
    moved_nbytes: int
    descriptors: int
    pieces: int
    chunks: int
    posts: int
    route: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """A transfer at one moment. ``error`` is set exactly when ``state`` is FAILED."""

    id: TransferId
    key: str
    op: TransferOp
    state: TransferState
    priority: Priority
    cause_id: str
    local_node: str
    remote_node: str
    agent: str
    error: XferdError | None
    telemetry: Telemetry


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected cost of a transfer; ``basis`` is "measured" or "assumed"."""

    duration_s: float
    bytes_per_s: float
    basis: str
    route: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The route a transfer would take, and what else was considered: "backend: why or why not"."""

    route: tuple[Hop, ...]
    considered: tuple[str, ...]
    chunks: int
    pieces: int
    total_nbytes: int


# ------------------------------------------------------------------------------------------- nodes


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One daemon. ``epoch`` grows at each start; ``addresses`` read "tcp://host:port", best first.

    ``draining``: it takes no new work; what runs with it may end.
    """

    name: str
    id: str
    epoch: int
    version: str
    addresses: tuple[str, ...]
    backends: tuple[str, ...]
    kinds: tuple[MemoryKind, ...]
    agents: tuple[str, ...]
    started_at: float
    draining: bool = False


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Another node as this one sees it, and since when (UNIX time)."""

    node: NodeInfo
    state: PeerState
    reason: str
    since: float
    lanes: int
    sent_nbytes: int
    received_nbytes: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The node's health and counters.

    ``reason`` says why it is not ready; where it is ready, what is degraded (the store is away), "" when nothing is.
    """

    node: NodeInfo
    live: bool
    ready: bool
    reason: str
    draining: bool
    sessions: int
    regions: int
    transfers_active: int
    transfers_done: int
    transfers_failed: int
    transfers_cancelled: int
    moved_nbytes: int
    uptime_s: float


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A backend with what it can move ("DRAM>FILE") and what it has moved since the start."""

    name: str
    pairs: tuple[str, ...]
    moved_nbytes: int
    chunks: int
    failures: int
    busy: int
    slots: int


@dataclass(frozen=True, slots=True)
class RouteCost:
    """What was learned of a route between two kinds of place with one peer ("": this node), in one size class.

    ``factor`` is what moves took over what the backends assume, faded by its age. A route whose ``retry_in_s`` is above
    0.0 failed lately and is tried last. Without measurements sizes and ``bytes_per_s`` are 0.
    """

    route: str
    source: str
    target: str
    peer: str
    min_nbytes: int
    max_nbytes: int
    bytes_per_s: float
    factor: float
    measurements: int
    age_s: float
    failures: int
    retry_in_s: float
    last_error: str


@dataclass(frozen=True, slots=True)
class HoldInfo:
    """Something held, by whom, why, since when, until when (0.0: until the owner goes)."""

    kind: str
    what: str
    owner: str
    reason: str
    since: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, what was found, and what to do about it ("" where it is OK)."""

    name: str
    state: CheckState
    finding: str
    remedy: str


# ------------------------------------------------------------------------------------------- storage pools


@dataclass(frozen=True, slots=True)
class StorageDirectoryInfo:
    """One directory of a storage pool, and what the start found in it.

    ``failure`` says why nothing more can be written down, "" where all is well; ``torn_nbytes`` were cut off the
    journal, of what was never acknowledged; ``unsealed_extents`` had bytes that no transfer had proven.
    """

    path: str
    uuid: str
    weight: float
    nbytes: int
    used_nbytes: int
    slabs: int
    extents: int
    journal_nbytes: int
    journal_batches: int
    failure: str
    was_clean: bool
    torn_nbytes: int
    recovered_extents: int
    unsealed_extents: int


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """What a storage pool has beyond ``PoolInfo``. Totals count from the daemon's start, UNIX times 0.0: never.

    ``sealed_nbytes`` of ``extents_nbytes`` are proven: on the disk since a transfer that was DONE, with a checksum
    unless ``checksum`` is "off". ``damaged_blocks`` were found not to be what was sealed, and not written since.
    """

    pool: str
    checksum: str
    verify: bool
    block_nbytes: int
    extents: int
    persistent_extents: int
    extents_nbytes: int
    sealed_nbytes: int
    damaged_blocks: int
    sealed_total_nbytes: int
    verified_total_nbytes: int
    mismatches: int
    scrub_bytes_per_s: int
    scrub_passes: int
    scrubbed_total_nbytes: int
    scrub_pass_ended_at: float
    directories: tuple[StorageDirectoryInfo, ...]
