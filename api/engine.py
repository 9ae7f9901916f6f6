"""The Engine protocol: all that the faces may ask of the daemon.

``api/grpc`` and ``api/rest`` are adapters over this protocol and hold no logic of their own; ``daemon/service.py``
implements it. Every method may raise any ``XferdError``; each says which ones carry a meaning of their own.
Methods are called on the daemon's event loop. Unless said otherwise a method is cancel-safe: a cancelled call has
either had its whole effect or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from xferd.api import types as t
    from xferd.api.descriptors import DescriptorList


class Sessions(Protocol):
    """Who is attached."""

    def authenticate(self, token: str) -> t.Caller:
        """Return the caller whose session has this token, and renew the session's expiry if it has one.

        Raises:
            Unauthenticated: no live session has it.
        """

    def authenticate_admin(self, token: str) -> t.Caller:
        """Return an admin caller; where an admin token is configured, ``token`` must equal it.

        Raises:
            Unauthenticated: it does not.
        """

    async def open_session(
        self,
        agent: str,
        transport: t.Transport,
        *,
        credentials: t.PeerCredentials | None = None,
        ttl_s: float = 0.0,
    ) -> t.SessionGrant:
        """Open a session; the face that opened it must end it with ``end_session`` when its connection ends.

        Args:
            agent: name; "" lets the daemon choose one.
            transport: how the client is attached.
            credentials: of the process at the other end, where the kernel told them.
            ttl_s: 0.0 for a session that lives as long as its connection; otherwise it ends when no call was made
                with its token for so long (REST).

        Raises:
            AlreadyExists: the agent has a live session.
            Unavailable: draining or stopping.
        """

    async def wait_session_end(self, session: t.SessionId) -> str:
        """Return the reason when the daemon ends the session (at once if it has ended)."""

    async def end_session(self, session: t.SessionId, reason: str) -> None:
        """End a session: cancel its transfers, wait until they are quiesced, release all it held. Twice is fine."""

    def sessions(self) -> list[t.SessionInfo]:
        """List live sessions."""


class Memory(Protocol):
    """Pools and regions."""

    async def allocate(self, caller: t.Caller, request: t.AllocateRequest) -> t.RegionListing:
        """Allocate a group of regions, all or none.

        Raises:
            PoolExhausted: no room for the whole group.
            LimitExceeded: more regions than ``max_group``.
        """

    async def register_private(self, caller: t.Caller, request: t.RegisterPrivateRequest) -> t.RegionInfo:
        """Register memory of the calling process.

        Raises:
            Unsupported: the session did not come over the session socket, so its process is not known.
            PermissionDenied: the process runs as another user, or the span cannot be read.
        """

    async def register_file(self, caller: t.Caller, request: t.RegisterFileRequest) -> t.RegionInfo:
        """Register a file under a configured root.

        Raises:
            PermissionDenied: the path leaves the roots, also through a symlink.
            NotFound: no such file, and ``create`` is not set.
        """

    async def free(self, caller: t.Caller, regions: Sequence[t.RegionId]) -> None:
        """Free regions of the caller, all or none. An operator frees persistent ones whose agent has no session.

        Raises:
            Busy: a transfer moves bytes of one of them; the message names it.
        """

    async def register_object(self, caller: t.Caller, request: t.RegisterObjectRequest) -> t.RegionInfo:
        """Register an object of a configured store, at its present version.

        Raises:
            NotFound: no such store, or no such object and ``create`` is not set.
            OutOfBounds: the object is smaller than ``nbytes``, and is not registered to be written.
            PermissionDenied, Unauthenticated: the store refuses, or is configured to be read only.
            Unsupported: no backend has stores.
        """

    async def query(self, caller: t.Caller, items: Sequence[t.QueryItem]) -> list[t.QueryResult]:
        """Say of files and objects whether they exist, how large and how old they are, in order.

        What goes wrong with one item is told in its result, and the others are told all the same.
        """

    async def delete_objects(self, caller: t.Caller, store: str, keys: Sequence[str]) -> None:
        """Delete objects of a store; those that are not there are fine. Where it raises, some may be gone."""

    async def list_objects(self, caller: t.Caller, query: t.ObjectQuery) -> t.ObjectPage:
        """List objects of a store, a page at a time.

        Raises:
            LimitExceeded: a page of more than 1000.
        """

    async def register_device(self, caller: t.Caller, request: t.RegisterDeviceRequest) -> t.RegionInfo:
        """Register GPU memory of the calling process by its IPC handle.

        Raises:
            InvalidArgument: no such handle, also of a process that has gone; a UUID or handle of a wrong length.
            OutOfBounds: the region passes the allocation's end.
            NotFound: no GPU of the node has the UUID.
            Unsupported: no backend has GPUs.
            DeviceLost, Unavailable: the GPU, or its worker, is out of order.
        """

    async def export_device(self, caller: t.Caller, region: t.RegionId) -> t.DeviceHandle:
        """Say how another process opens a region of GPU memory; the caller owns it or its access is not NONE.

        Raises:
            InvalidArgument: the region is no GPU memory.
            Unsupported: it was registered by a file descriptor, which only its owner can pass on.
            PermissionDenied: another session's region that grants no access.
        """

    def devices(self) -> list[t.DeviceInfo]:
        """List the GPUs of the node, those that cannot be used among them; empty without a backend that has any."""

    async def open_device_event(self, caller: t.Caller, device: int, handle: bytes) -> t.DeviceEvent:
        """Open an event of the calling process by its IPC handle, or make one where ``handle`` is b"".

        It is good until the session ends.

        Raises:
            NotFound: no such GPU.
            InvalidArgument: no such handle.
            LimitExceeded: the session has very many.
            Unsupported, DeviceLost, Unavailable: as with ``register_device``.
        """

    async def hand_over(self, caller: t.Caller, request: t.HandOverRequest) -> t.RegionListing:
        """Give regions of the caller (an operator: of any session) to another agent of this node, all or none.

        Ids and bytes stay; no byte is copied. The new owner is told by a notification, in the same step.

        Raises:
            AgentUnknown: the agent has no session here.
            Busy: a transfer moves bytes of one of them; the message names it.
            Overloaded: the agent's inbox is full.
            Unsupported: private memory of a process, or an agent of another node.
            PermissionDenied: another session's region.
        """

    async def regions(self, caller: t.Caller, query: t.RegionQuery) -> t.RegionListing:
        """List regions that the caller may see, here or on the node that the query names."""

    def read_region(self, caller: t.Caller, region: t.RegionId, offset: int, nbytes: int) -> AsyncIterator[bytes]:
        """Yield the bytes of a span in order, at most 1 MiB at a time. The slow road, for clients without fds."""

    async def write_region(self, caller: t.Caller, region: t.RegionId, offset: int, data: bytes) -> int:
        """Write bytes into a region; returns their number when all are in place."""

    def pools(self) -> list[t.PoolInfo]:
        """List pools with their statistics."""


class Transfers(Protocol):
    """Lists, transfers and what is known of them."""

    async def prepare(self, caller: t.Caller, descriptors: DescriptorList) -> t.PreparedInfo:
        """Check a list and keep it under a handle."""

    async def release_prepared(self, caller: t.Caller, handles: Sequence[t.PreparedHandle]) -> None:
        """Forget prepared lists, all or none. Transfers that use them are not disturbed."""

    async def submit(self, caller: t.Caller, request: t.TransferRequest) -> t.TransferStatus:
        """Create a transfer and, unless ``hold``, post it.

        Raises:
            AlreadyExists: the key was used for a different request.
            NoRoute: nothing can move between these places.
        """

    async def post(self, caller: t.Caller, transfer: t.TransferId) -> t.TransferStatus:
        """Post a held transfer, or an ended one again.

        Raises:
            InvalidState: it is posted or running.
        """

    def poll(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        """Return the status of each, in order."""

    async def wait(
        self, caller: t.Caller, transfers: Sequence[t.TransferId], timeout_s: float, *, any_of: bool = False
    ) -> list[t.TransferStatus]:
        """Return the status of each when all (or any) have ended or the time is over; the timeout is no error."""

    def watch(self, caller: t.Caller, transfers: Sequence[t.TransferId] = ()) -> AsyncIterator[t.TransferStatus]:
        """Yield each of the caller's transfers as it ends, those that had ended first. Empty: all, also later ones."""

    async def cancel(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> list[t.TransferStatus]:
        """Cancel, and return when no byte moves any more. One that had ended keeps its state."""

    async def release(self, caller: t.Caller, transfers: Sequence[t.TransferId]) -> None:
        """Cancel what runs, then forget."""

    async def estimate(self, caller: t.Caller, request: t.TransferRequest) -> t.Estimate:
        """Say how long the transfer would take, without doing it."""

    async def explain(self, caller: t.Caller, request: t.TransferRequest) -> t.Explanation:
        """Say which route the transfer would take and why, without doing it."""

    def transfers(self, *, active_only: bool = False, agent: str = "") -> list[t.TransferStatus]:
        """List transfers of all sessions, for an operator."""

    async def notify(self, caller: t.Caller, notification: t.Notification) -> None:
        """Deliver bytes to an agent's inbox, here or on another node.

        Raises:
            AgentUnknown: the agent has no session there.
            Overloaded: its inbox is full.
        """

    async def notifications(self, caller: t.Caller, limit: int, timeout_s: float) -> list[t.Notification]:
        """Take what has arrived for the caller's agent, waiting up to ``timeout_s`` for the first."""


class Metadata(Protocol):
    """This node and the others."""

    async def node(self, name: str = "") -> t.NodeInfo:
        """Return a node's record; "" is this node."""

    def peers(self) -> list[t.PeerInfo]:
        """List the nodes that this one knows, itself left out.

        With a central store those are the nodes that this one deals with; ``nodes`` has all.
        """

    async def nodes(self) -> list[t.NodeInfo]:
        """List all nodes of the store, this one too, asked from it now; costs as much as there are nodes.

        Raises:
            Unavailable: the store is away.
        """

    def watch_peers(self, name: str = "") -> AsyncIterator[t.PeerInfo]:
        """Yield the present peers, or the one named, then each as its state, reason or record changes.

        Ends when the daemon does. A reader that is slower than the changes gets the newest state of each peer. A name
        that is not known yet is waited for.
        """

    async def export_metadata(self, regions: Sequence[t.RegionId] | None = None) -> bytes:
        """Return this node's record and shared regions (or only ``regions``) as a blob."""

    async def import_metadata(self, blob: bytes) -> t.RegionListing:
        """Load another node's blob, replacing what was known of that node."""

    async def invalidate(self, name: str) -> None:
        """Forget a node that came by a blob."""

    async def publish_metadata(self, label: str, regions: Sequence[t.RegionId] | None = None) -> None:
        """Put the blob of ``export_metadata`` under a label of this node, for others to fetch; replaces an earlier one.

        It goes when the node goes.

        Raises:
            Unsupported: the store keeps no blobs.
        """

    async def withdraw_metadata(self, label: str) -> None:
        """Take a label of this node back.

        Raises:
            Unsupported: the store keeps no blobs.
            NotFound: this node has no such label.
        """

    async def fetch_metadata(self, node: str, label: str, timeout_s: float) -> t.RegionListing:
        """Load the blob under a node's label like ``import_metadata``, waiting up to ``timeout_s`` for it to appear.

        Raises:
            Unsupported: the store keeps no blobs.
            NotFound: the node put none there within the time.
        """


class Admin(Protocol):
    """What an operator sees and does."""

    def status(self) -> t.NodeStatus:
        """Return health and counters."""

    def liveness(self) -> str:
        """Return "" if the event loop ran lately, else what is wrong."""

    def readiness(self) -> str:
        """Return "" if new work is taken, else why not."""

    def degraded(self) -> str:
        """Return "" if all works, else what does not although new work is taken (the store is away)."""

    def config_toml(self) -> str:
        """Return the configuration in force as TOML, with secrets replaced by "***"."""

    def backends(self) -> list[t.BackendInfo]:
        """List the configured backends."""

    def routes(self) -> list[t.RouteCost]:
        """List what the planner has learned of routes: by peer, pair of places and size class."""

    def holds(self) -> list[t.HoldInfo]:
        """List everything held: by whom, why, until when."""

    def storage(self) -> list[t.StorageInfo]:
        """Describe the storage pools: their directories, and how much of them is proven."""

    async def scrub_storage(self, pool: str) -> t.StorageInfo:
        """Read all sealed blocks of a storage pool now, at its rate; damage is counted in what is returned.

        Raises:
            NotFound: no storage pool has the name.
            MoveFailed, ShortTransfer: it cannot be read.
        """

    async def diagnose(self) -> list[t.Check]:
        """Look at the daemon's surroundings and say what is wrong and what to do; changes nothing. Takes seconds."""

    def metrics(self) -> bytes:
        """Return all metrics in the Prometheus text format."""

    async def drain(self, timeout_s: float) -> int:
        """Refuse new work and wait for what runs; returns the number of transfers left at the deadline."""

    def undrain(self) -> None:
        """Take new work again. Raises ``InvalidState`` once the daemon is stopping."""

    def log_level(self) -> str:
        """Return the log level in force."""

    def set_log_level(self, level: str) -> str:
        """Set the level ("debug", "info", "warning", "error"); returns the previous one."""


class Engine(Sessions, Memory, Transfers, Metadata, Admin, Protocol):
    """All of it. A face takes the narrowest of the protocols above that serves it."""
