"""The blocking client. Calls go straight to gRPC's blocking stubs: there is no event loop and no thread of ours.

The surface is that of ``aio.py``; requests, errors and arrays are shared with it (``_calls.py``, ``_errors.py``,
``memory.py``, ``transfers.py``). Connecting and calling are in ``_sync_link.py``. Several threads may use a client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex, Unpack, overload

from xferd.api import types as t, wire
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.clients import _calls as calls, _device_regions as device_regions
from xferd.clients._calls import WAIT_SLICE_S, ImportedMetadata
from xferd.clients._session_socket import device_fd_request, fd_request, memfd_request, owned
from xferd.clients._sync_link import SyncLink
from xferd.clients._sync_objects import PreparedList, Region, Transfer
from xferd.clients.admin import Admin
from xferd.clients.memory import address_of, bytes_of, handed_over, make_memfd, owned_by, query_item
from xferd.clients.transfers import (
    ListLike,
    TransferLike,
    TransferOptions,
    checked,
    ids_of,
    tell,
    transfer_request,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from xferd.api.descriptors import DescriptorList
    from xferd.clients.devices import Event
    from xferd.clients.transfers import TransferBase

__all__ = ["Client", "PreparedList", "Region", "Transfer"]


class Client(SyncLink):
    """One agent attached to the daemon of its node. A context manager; made by ``connect`` or ``connect_grpc``."""

    @property
    def admin(self) -> Admin:
        """The operator's verbs."""
        return Admin(self._call)

    # -- memory

    def pools(self) -> list[t.PoolInfo]:
        """Return the pools with their statistics."""
        return self._call(calls.pools())

    @overload
    def allocate(
        self, nbytes: int, pool: str = ..., *, access: t.Access = ..., label: str = ..., persistent: bool = ...
    ) -> Region: ...
    @overload
    def allocate(
        self,
        nbytes: Sequence[int],
        pool: str = ...,
        *,
        access: t.Access = ...,
        label: str = ...,
        persistent: bool = ...,
    ) -> list[Region]: ...
    def allocate(
        self,
        nbytes: int | Sequence[int],
        pool: str = "",
        *,
        access: t.Access = t.Access.NONE,
        label: str = "",
        persistent: bool = False,
    ) -> Region | list[Region]:
        """Allocate a region, or with a sequence of sizes a group of regions, all or none.

        Args:
            nbytes: size, rounded up to 4096; or sizes.
            pool: "" is the first host pool.
            access: what others may do with it.
            label: for others to find it by.
            persistent: of a storage pool: it belongs to the agent, outlives this session and the daemon, and
                ``regions(agent=client.agent, label=...)`` finds it again.

        Raises:
            PoolExhausted: no room for all.
            Unsupported: ``persistent`` regions of a pool that is not a storage pool.
        """
        listing = self._call(calls.allocate(nbytes, pool, access, label, persistent))
        made = [Region(self, info) for info in listing.regions]
        return made[0] if isinstance(nbytes, SupportsIndex) else made

    def free(self, regions: Iterable[Region]) -> None:
        """Give regions back, all or none."""
        self._free(list(regions))

    def register(
        self, array: object, *, access: t.Access = t.Access.NONE, label: str = "", writable: bool | None = None
    ) -> Region:
        """Register memory of this process: a C-contiguous array, or anything with a buffer. It is kept alive.

        ``writable`` None follows the array.
        """
        memory = bytes_of(array)
        can_write = bool(memory.flags.writeable) if writable is None else writable
        request = t.RegisterPrivateRequest(address_of(memory), len(memory), access, label, can_write)
        with self._keeping(memory):
            info = self._call(calls.register_private(request))
        self._kept[info.id] = memory
        return Region(self, info, memory)

    def register_memfd(self, nbytes: int, *, access: t.Access = t.Access.NONE, label: str = "") -> Region:
        """Make shared memory of this client's own and register it; the daemon reaches it without system calls."""
        fd, memory = make_memfd(nbytes, label)
        with owned(fd):
            info = self._pass_fd(memfd_request(nbytes, access, label), fd)
        return Region(self, info, memory)

    def register_file(
        self,
        path: str | os.PathLike[str],
        *,
        nbytes: int = 0,
        writable: bool = False,
        create: bool = False,
        access: t.Access = t.Access.NONE,
        label: str = "",
    ) -> Region:
        """Register a file under a root of the daemon; ``nbytes`` 0 takes its present size."""
        request = t.RegisterFileRequest(str(path), nbytes, writable, create, access, label)
        return Region(self, self._call(calls.register_file(request)))

    def register_fd(
        self, fd: int, *, nbytes: int = 0, writable: bool = False, access: t.Access = t.Access.NONE, label: str = ""
    ) -> Region:
        """Register a file that this process has open, wherever it is; ``fd`` stays the caller's."""
        return Region(self, self._pass_fd(fd_request(nbytes, writable, access, label), fd))

    def register_object(
        self,
        store: str,
        key: str,
        *,
        nbytes: int = 0,
        writable: bool = False,
        create: bool = False,
        access: t.Access = t.Access.NONE,
        label: str = "",
    ) -> Region:
        """Register an object of a store of the daemon, at the version that it has now.

        It is read in any spans, and written by one transfer that covers all of it, or not at all.

        Args:
            store: as configured in the daemon.
            key: of the object, below the store's prefix.
            nbytes: size of the region; 0 takes the object's present size.
            writable: whether it may be written.
            create: whether it need not be there yet; needs ``writable`` and ``nbytes``.
            access: what other sessions of this node may do; other nodes reach the store themselves.
            label: free text.

        Raises:
            NotFound: no such store or object.
            PermissionDenied, Unauthenticated: the store refuses.
        """
        request = t.RegisterObjectRequest(store, key, nbytes, writable, create, access, label)
        return Region(self, self._call(calls.register_object(request)))

    def register_device(
        self, array: object, *, access: t.Access = t.Access.NONE, label: str = "", writable: bool | None = None
    ) -> Region:
        """Register memory of a GPU: an array of torch, cupy or anything with ``__cuda_array_interface__`` or DLPack.

        It is kept alive. The same memory registered again in the same way is the same region and costs no call; it is
        freed when each of them was.

        Args:
            array: contiguous, of memory that cudaMalloc gave (the default of torch and cupy), or of ``cuMemCreate``
                with file descriptors.
            access: what others may do with it.
            label: for others to find it by.
            writable: None follows the array.

        Raises:
            InvalidArgument: it is no memory of a GPU, or has gaps.
            Unsupported: the memory cannot be given to other processes, or there is no driver; the remedy says more.
            NotFound: the daemon does not use that GPU.
        """
        wanted = device_regions.wanted(array, access, label, writable)
        info = self._devices.again(wanted.key)
        if info is None:
            exported = wanted.driver.export(wanted.allocation)
            request = wanted.request(exported)
            with self._keeping(wanted.span):
                if exported.fd < 0:
                    info = self._call(calls.register_device(request))
                else:
                    with owned(exported.fd):
                        info = self._pass_fd(device_fd_request(request), exported.fd)
            self._devices.add(wanted, info)
        return Region(self, info)

    def query(self, items: Iterable[str | os.PathLike[str] | tuple[str, str]]) -> list[t.QueryResult]:
        """Say of files (by path) and objects (by store and key), in order, whether they exist, how large and how old.

        One that cannot be looked at has the error in its result.
        """
        return self._call(calls.query(query_item(item) for item in items))

    def delete_objects(self, store: str, keys: Iterable[str]) -> None:
        """Delete objects of a store; those that are not there are fine. Where it raises, some may be gone."""
        self._call(calls.delete_objects(store, keys))

    def list_objects(self, store: str, prefix: str = "", *, after: str = "", limit: int = 0) -> t.ObjectPage:
        """List objects of a store in key order, at most 1000; ``after`` is the page's ``next`` of the one before."""
        return self._call(calls.list_objects(t.ObjectQuery(store, prefix, after, limit)))

    def hand_over(
        self, regions: Iterable[Region], to: str, payload: bytes = b"", *, access: t.Access | None = None
    ) -> None:
        """Give regions to another agent of this node, all or none, and copy nothing.

        They keep ids and bytes and end with the new owner's session, not with this one. The new owner gets a
        notification with ``payload``, and takes them with ``accept``. Arrays of the regions must not be used any more.

        Args:
            regions: of this session: of pools, memfds and files, not private memory.
            to: the agent.
            payload: for the notification.
            access: what others may do with them from now on, this client among them; None: what they granted before.

        Raises:
            AgentUnknown: the agent has no session on this node.
            Busy: a transfer moves bytes of one of them.
            Overloaded: the agent's inbox is full.
        """
        given = list(regions)
        request = t.HandOverRequest(tuple(region.id for region in given), to, bytes(payload), access)
        self._call(calls.hand_over(request))
        self._forget_regions(given, "handed over")

    def accept(self, notification: t.Notification) -> list[Region]:
        """Return the regions that a notification has handed over, in its order: this client's own, mapped.

        Raises:
            InvalidArgument: the notification hands nothing over.
            PermissionDenied: they belong to another agent.
            Stale: one was freed since.
        """
        listing = self._call(calls.regions(t.RegionQuery(regions=handed_over(notification))))
        return [Region(self, info) for info in owned_by(self.agent, listing)]

    def regions(
        self, *, node: str = "", agent: str = "", label: str = "", ids: Iterable[t.RegionId] = ()
    ) -> list[Region]:
        """Return regions that this client may see: its own, and shared ones, here or on ``node``."""
        listing = self._call(calls.regions(t.RegionQuery(node, agent, label, tuple(ids))))
        return [self.region(info) for info in listing.regions]

    def region(self, info: t.RegionInfo) -> Region:
        """Return a region by its record, for example one that another process sent."""
        return Region(self, info, self._kept.get(info.id) if info.node == self.grant.node else None)

    # -- GPUs

    def devices(self) -> list[t.DeviceInfo]:
        """Return the GPUs of the node, those that cannot be used among them."""
        return self._call(calls.devices())

    def open_event(self, event: object = None, *, device: int | None = None) -> Event:
        """Let the daemon open an event of this process, for transfers to wait for: give it as ``wait_event``.

        Args:
            event: None makes one, whose ``record`` is used; else one of torch (``interprocess=True``), cupy or
                cuda-core, or a handle of 64 bytes. It is kept alive until the session ends.
            device: the daemon's number of the GPU; None is the one that this thread uses now.
        """
        wanted = device_regions.wanted_event(self.devices(), event, device)
        told = self._call(calls.open_device_event(wanted.device, wanted.handle))
        return self._devices.note_event(wanted.opened(told))

    def make_event(self, device: int = 0) -> Event:
        """Let the daemon make an event that transfers record when they have ended: give it as ``done_event``."""
        infos = self.devices()
        told = self._call(calls.open_device_event(device, b""))
        return self._devices.note_event(device_regions.opened_event(infos, device, told))

    # -- transfers

    def prepare(self, descriptors: DescriptorList | Region) -> PreparedList:
        """Let the daemon check a list once and keep it."""
        wanted = descriptors.whole() if isinstance(descriptors, Region) else descriptors
        info = self._call(calls.prepare(wanted))
        if self._ring is not None:
            self._ring.know_list(info)
        return PreparedList(self, info)

    def transfer(
        self,
        op: t.TransferOp | str,
        local: ListLike,
        remote: ListLike,
        *,
        hold: bool = False,
        wait_s: float = 0.0,
        **options: Unpack[TransferOptions],
    ) -> Transfer:
        """Start a transfer and return it; with ``hold`` it waits for ``post``.

        Args:
            op: READ pulls remote into local, WRITE pushes local into remote.
            local: on this node.
            remote: here or on another node.
            hold: create it only.
            wait_s: wait so long for its end, in the same call.
            **options: see ``TransferOptions``.
        """
        if self.uses_ring and self._ring is not None:
            track = self._ring.start(op, local, remote, options, hold=hold, wait_s=wait_s)
            if track is not None:
                return Transfer(self, track)
        request = transfer_request(op, local, remote, options, hold=hold)
        return Transfer(self, self._call(calls.submit(request, wait_s)))

    def read(self, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]) -> t.TransferStatus:
        """Pull remote into local and return when it is DONE; one round trip. Raises what the transfer failed with."""
        return self._run(t.TransferOp.READ, local, remote, options)

    def write(self, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]) -> t.TransferStatus:
        """Push local into remote and return when it is DONE; one round trip. Raises what the transfer failed with."""
        return self._run(t.TransferOp.WRITE, local, remote, options)

    def post_many(self, transfers: Sequence[Transfer]) -> list[t.TransferStatus]:
        """Post held or ended transfers, over the ring all at once; returns the status of each.

        Raises:
            XferdError: what the first of those was refused with that were; the others are under way.
        """
        left: Sequence[TransferBase] = transfers
        if self.uses_ring and self._ring is not None:
            left = self._ring.post_many(transfers)
        for transfer in left:
            self._post_by_call(transfer, 0.0)
        return [transfer.status for transfer in transfers]

    def poll_many(self, transfers: Sequence[TransferLike]) -> list[t.TransferStatus]:
        """Return the status of each, in order, with one call at most."""
        told = [self._glance_at(transfer) for transfer in transfers]
        if transfers and None not in told:
            return [status for status in told if status is not None]
        statuses = self._call(calls.poll(ids_of(transfers)))
        tell(transfers, statuses)
        return statuses

    def wait_many(
        self, transfers: Sequence[TransferLike], timeout_s: float | None = None, *, any: bool = False
    ) -> list[t.TransferStatus]:
        """Wait until all (or any) have ended or the time is over; nothing of this is raised."""
        return self._wait(transfers, timeout_s, any_of=any)

    def completions(self, transfers: Iterable[TransferLike] = ()) -> Iterator[t.TransferStatus]:
        """Yield transfers as they end, those that had ended first; none named: all of this session, without end."""
        request = pb.WatchRequest(id=ids_of(transfers))
        for message in self._stream("TransferService.Watch", request):
            yield wire.status_from_message(message)

    def cancel(self, transfers: Sequence[TransferLike]) -> list[t.TransferStatus]:
        """Cancel; no byte of them moves any more when this returns."""
        return self._cancel(transfers)

    def release(self, transfers: Iterable[TransferLike]) -> None:
        """Let the daemon forget transfers, cancelling what runs."""
        self._release(transfers)

    def estimate(
        self, op: t.TransferOp | str, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]
    ) -> t.Estimate:
        """Ask how long a transfer would take."""
        return self._call(calls.estimate(transfer_request(op, local, remote, options)))

    def explain(
        self, op: t.TransferOp | str, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]
    ) -> t.Explanation:
        """Ask which way a transfer would go, and why."""
        return self._call(calls.explain(transfer_request(op, local, remote, options)))

    # -- notifications

    def notify(self, target: str, payload: bytes) -> None:
        """Send bytes to an agent, "agent" here or "agent@node"."""
        self._call(calls.notify(target, payload))

    def notifications(self, timeout_s: float = 0.0, *, limit: int = 100) -> list[t.Notification]:
        """Take what has arrived for this agent, waiting up to ``timeout_s`` for the first."""
        if self._ring is not None:
            return self._notifications(timeout_s, limit)
        return self._notifications_by_call(timeout_s, limit)

    # -- nodes

    def node(self, name: str = "") -> t.NodeInfo:
        """Return a node's record; "" is this node."""
        return self._call(calls.node(name))

    def peers(self) -> list[t.PeerInfo]:
        """Return the other nodes that this one knows."""
        return self._call(calls.peers())

    def watch_peers(self, name: str = "") -> Iterator[t.PeerInfo]:
        """Yield the peers (or one) as they are, then each as its state, reason or record changes, without end.

        A slow reader gets the newest state of each peer. A name that is not known yet is waited for.
        """
        for message in self._stream("MetadataService.WatchPeers", pb.WatchPeersRequest(name=name)):
            yield wire.peer_from_message(message)

    def nodes(self) -> list[t.NodeInfo]:
        """Return all nodes of the store, asked from it now; costs as much as there are nodes."""
        return self._call(calls.nodes())

    def publish_metadata(self, label: str, regions: Iterable[Region] | None = None) -> None:
        """Put what ``export_metadata`` gives under a label of this node, for others to fetch; replaces it.

        Raises:
            Unsupported: the node's store keeps none; etcd does.
        """
        self._call(calls.publish_metadata(label, None if regions is None else [region.id for region in regions]))

    def withdraw_metadata(self, label: str) -> None:
        """Take a label of this node back; it goes with the node too."""
        self._call(calls.withdraw_metadata(label))

    def fetch_metadata(self, node: str, label: str, timeout_s: float = 0.0) -> list[Region]:
        """Load what a node put under a label and return its regions; waits so long for it to appear.

        Raises:
            NotFound: it did not appear.
        """
        listing = self._call(calls.fetch_metadata(node, label, timeout_s))
        return [self.region(info) for info in listing.regions]

    def export_metadata(self, regions: Iterable[Region] | None = None) -> bytes:
        """Return this node's record and shared regions (or only ``regions``) as a blob."""
        return self._call(calls.export_metadata(None if regions is None else [region.id for region in regions]))

    def import_metadata(self, blob: bytes) -> ImportedMetadata:
        """Load another node's blob."""
        return self._call(calls.import_metadata(blob))

    def invalidate(self, name: str) -> None:
        """Forget a node that came by a blob."""
        self._call(calls.invalidate(name))

    def _run(self, op: t.TransferOp, local: ListLike, remote: ListLike, options: TransferOptions) -> t.TransferStatus:
        if self.uses_ring and self._ring is not None:
            track = self._ring.run(op, local, remote, options)
            if track is not None:
                return checked(self._whole(track))
        status = self._call(calls.submit(transfer_request(op, local, remote, options), WAIT_SLICE_S))
        if status.state not in t.ENDED:
            [status] = self._wait([status.id], None, any_of=False)
        return checked(status)
