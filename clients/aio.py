"""The async client, on grpc.aio.

The surface is that of ``sync.py``; requests, errors and arrays are shared with it (``_calls.py``, ``_errors.py``,
``memory.py``, ``transfers.py``). Connecting and calling are in ``_aio_link.py``. A client belongs to one loop.

A cancelled call may have had its effect: a transfer that ``read`` or ``write`` started goes on until its deadline
when they are cancelled. Where that matters, start it with ``transfer`` and cancel it yourself.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, SupportsIndex, Unpack, overload

from xferd.api import types as t, wire
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.clients import _calls as calls, _device_regions as device_regions
from xferd.clients._aio_link import AsyncLink
from xferd.clients._aio_objects import AsyncPreparedList, AsyncRegion, AsyncTransfer
from xferd.clients._calls import WAIT_SLICE_S, ImportedMetadata
from xferd.clients._session_socket import device_fd_request, fd_request, memfd_request, owned
from xferd.clients.admin import AsyncAdmin
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
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from xferd.api.descriptors import DescriptorList
    from xferd.clients.devices import Event
    from xferd.clients.transfers import TransferBase

__all__ = ["AsyncClient", "AsyncPreparedList", "AsyncRegion", "AsyncTransfer"]


class AsyncClient(AsyncLink):
    """One agent attached to the daemon of its node. Made by ``connect`` or ``connect_grpc``, ended by ``aclose``."""

    @property
    def admin(self) -> AsyncAdmin:
        """The operator's verbs."""
        return AsyncAdmin(self._call)

    # -- memory

    async def pools(self) -> list[t.PoolInfo]:
        """Return the pools with their statistics."""
        return await self._call(calls.pools())

    @overload
    async def allocate(
        self, nbytes: int, pool: str = ..., *, access: t.Access = ..., label: str = ..., persistent: bool = ...
    ) -> AsyncRegion: ...
    @overload
    async def allocate(
        self,
        nbytes: Sequence[int],
        pool: str = ...,
        *,
        access: t.Access = ...,
        label: str = ...,
        persistent: bool = ...,
    ) -> list[AsyncRegion]: ...
    async def allocate(
        self,
        nbytes: int | Sequence[int],
        pool: str = "",
        *,
        access: t.Access = t.Access.NONE,
        label: str = "",
        persistent: bool = False,
    ) -> AsyncRegion | list[AsyncRegion]:
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
        listing = await self._call(calls.allocate(nbytes, pool, access, label, persistent))
        for info in listing.regions[:1]:
            await self._map(info)  # now, because ``array`` cannot wait
        made = [AsyncRegion(self, info) for info in listing.regions]
        return made[0] if isinstance(nbytes, SupportsIndex) else made

    async def free(self, regions: Iterable[AsyncRegion]) -> None:
        """Give regions back, all or none."""
        await self._free(list(regions))

    async def register(
        self, array: object, *, access: t.Access = t.Access.NONE, label: str = "", writable: bool | None = None
    ) -> AsyncRegion:
        """Register memory of this process: a C-contiguous array, or anything with a buffer. It is kept alive.

        ``writable`` None follows the array.
        """
        memory = bytes_of(array)
        can_write = bool(memory.flags.writeable) if writable is None else writable
        request = t.RegisterPrivateRequest(address_of(memory), len(memory), access, label, can_write)
        with self._keeping(memory):
            info = await self._call(calls.register_private(request))
        self._kept[info.id] = memory
        return AsyncRegion(self, info, memory)

    async def register_memfd(self, nbytes: int, *, access: t.Access = t.Access.NONE, label: str = "") -> AsyncRegion:
        """Make shared memory of this client's own and register it; the daemon reaches it without system calls."""
        fd, memory = make_memfd(nbytes, label)
        with owned(fd):
            info = await self._pass_fd(memfd_request(nbytes, access, label), fd)
        return AsyncRegion(self, info, memory)

    async def register_file(
        self,
        path: str | os.PathLike[str],
        *,
        nbytes: int = 0,
        writable: bool = False,
        create: bool = False,
        access: t.Access = t.Access.NONE,
        label: str = "",
    ) -> AsyncRegion:
        """Register a file under a root of the daemon; ``nbytes`` 0 takes its present size."""
        request = t.RegisterFileRequest(str(path), nbytes, writable, create, access, label)
        return AsyncRegion(self, await self._call(calls.register_file(request)))

    async def register_fd(
        self, fd: int, *, nbytes: int = 0, writable: bool = False, access: t.Access = t.Access.NONE, label: str = ""
    ) -> AsyncRegion:
        """Register a file that this process has open, wherever it is; ``fd`` stays the caller's."""
        return AsyncRegion(self, await self._pass_fd(fd_request(nbytes, writable, access, label), fd))

    async def register_object(
        self,
        store: str,
        key: str,
        *,
        nbytes: int = 0,
        writable: bool = False,
        create: bool = False,
        access: t.Access = t.Access.NONE,
        label: str = "",
    ) -> AsyncRegion:
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
        return AsyncRegion(self, await self._call(calls.register_object(request)))

    async def register_device(
        self, array: object, *, access: t.Access = t.Access.NONE, label: str = "", writable: bool | None = None
    ) -> AsyncRegion:
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
                    info = await self._call(calls.register_device(request))
                else:
                    with owned(exported.fd):
                        info = await self._pass_fd(device_fd_request(request), exported.fd)
            self._devices.add(wanted, info)
        return AsyncRegion(self, info)

    async def query(self, items: Iterable[str | os.PathLike[str] | tuple[str, str]]) -> list[t.QueryResult]:
        """Say of files (by path) and objects (by store and key), in order, whether they exist, how large and how old.

        One that cannot be looked at has the error in its result.
        """
        return await self._call(calls.query(query_item(item) for item in items))

    async def delete_objects(self, store: str, keys: Iterable[str]) -> None:
        """Delete objects of a store; those that are not there are fine. Where it raises, some may be gone."""
        await self._call(calls.delete_objects(store, keys))

    async def list_objects(self, store: str, prefix: str = "", *, after: str = "", limit: int = 0) -> t.ObjectPage:
        """List objects of a store in key order, at most 1000; ``after`` is the page's ``next`` of the one before."""
        return await self._call(calls.list_objects(t.ObjectQuery(store, prefix, after, limit)))

    async def hand_over(
        self, regions: Iterable[AsyncRegion], to: str, payload: bytes = b"", *, access: t.Access | None = None
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
        await self._call(calls.hand_over(request))
        self._forget_regions(given, "handed over")

    async def accept(self, notification: t.Notification) -> list[AsyncRegion]:
        """Return the regions that a notification has handed over, in its order: this client's own, mapped.

        Raises:
            InvalidArgument: the notification hands nothing over.
            PermissionDenied: they belong to another agent.
            Stale: one was freed since.
        """
        listing = await self._call(calls.regions(t.RegionQuery(regions=handed_over(notification))))
        for info in {info.pool: info for info in listing.regions}.values():
            await self._map(info)  # now, because ``array`` cannot wait
        return [AsyncRegion(self, info) for info in owned_by(self.agent, listing)]

    async def regions(
        self, *, node: str = "", agent: str = "", label: str = "", ids: Iterable[t.RegionId] = ()
    ) -> list[AsyncRegion]:
        """Return regions that this client may see: its own, and shared ones, here or on ``node``."""
        listing = await self._call(calls.regions(t.RegionQuery(node, agent, label, tuple(ids))))
        return [self.region(info) for info in listing.regions]

    def region(self, info: t.RegionInfo) -> AsyncRegion:
        """Return a region by its record, for example one that another process sent."""
        return AsyncRegion(self, info, self._kept.get(info.id) if info.node == self.grant.node else None)

    # -- GPUs

    async def devices(self) -> list[t.DeviceInfo]:
        """Return the GPUs of the node, those that cannot be used among them."""
        return await self._call(calls.devices())

    async def open_event(self, event: object = None, *, device: int | None = None) -> Event:
        """Let the daemon open an event of this process, for transfers to wait for: give it as ``wait_event``.

        Args:
            event: None makes one, whose ``record`` is used; else one of torch (``interprocess=True``), cupy or
                cuda-core, or a handle of 64 bytes. It is kept alive until the session ends.
            device: the daemon's number of the GPU; None is the one that this thread uses now.
        """
        wanted = device_regions.wanted_event(await self.devices(), event, device)
        told = await self._call(calls.open_device_event(wanted.device, wanted.handle))
        return self._devices.note_event(wanted.opened(told))

    async def make_event(self, device: int = 0) -> Event:
        """Let the daemon make an event that transfers record when they have ended: give it as ``done_event``."""
        infos = await self.devices()
        told = await self._call(calls.open_device_event(device, b""))
        return self._devices.note_event(device_regions.opened_event(infos, device, told))

    # -- transfers

    async def prepare(self, descriptors: DescriptorList | AsyncRegion) -> AsyncPreparedList:
        """Let the daemon check a list once and keep it."""
        wanted = descriptors.whole() if isinstance(descriptors, AsyncRegion) else descriptors
        info = await self._call(calls.prepare(wanted))
        if self._ring is not None:
            self._ring.know_list(info)
        return AsyncPreparedList(self, info)

    async def transfer(
        self,
        op: t.TransferOp | str,
        local: ListLike,
        remote: ListLike,
        *,
        hold: bool = False,
        wait_s: float = 0.0,
        **options: Unpack[TransferOptions],
    ) -> AsyncTransfer:
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
            track = await self._ring.start(op, local, remote, options, hold=hold, wait_s=wait_s)
            if track is not None:
                return AsyncTransfer(self, track)
        request = transfer_request(op, local, remote, options, hold=hold)
        return AsyncTransfer(self, await self._call(calls.submit(request, wait_s)))

    async def read(self, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]) -> t.TransferStatus:
        """Pull remote into local and return when it is DONE; one round trip. Raises what the transfer failed with."""
        return await self._run(t.TransferOp.READ, local, remote, options)

    async def write(self, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]) -> t.TransferStatus:
        """Push local into remote and return when it is DONE; one round trip. Raises what the transfer failed with."""
        return await self._run(t.TransferOp.WRITE, local, remote, options)

    async def post_many(self, transfers: Sequence[AsyncTransfer]) -> list[t.TransferStatus]:
        """Post held or ended transfers, over the ring all at once; returns the status of each.

        Raises:
            XferdError: what the first of those was refused with that were; the others are under way.
        """
        left: Sequence[TransferBase] = transfers
        if self.uses_ring and self._ring is not None:
            left = await self._ring.post_many(transfers)
        for transfer in left:
            await self._post_by_call(transfer, 0.0)
        return [transfer.status for transfer in transfers]

    async def poll_many(self, transfers: Sequence[TransferLike]) -> list[t.TransferStatus]:
        """Return the status of each, in order, with one call at most."""
        told = [await self._glance_at(transfer) for transfer in transfers]
        if transfers and None not in told:
            return [status for status in told if status is not None]
        statuses = await self._call(calls.poll(ids_of(transfers)))
        tell(transfers, statuses)
        return statuses

    async def wait_many(
        self, transfers: Sequence[TransferLike], timeout_s: float | None = None, *, any: bool = False
    ) -> list[t.TransferStatus]:
        """Wait until all (or any) have ended or the time is over; nothing of this is raised."""
        return await self._wait(transfers, timeout_s, any_of=any)

    async def completions(self, transfers: Iterable[TransferLike] = ()) -> AsyncGenerator[t.TransferStatus, None]:
        """Yield transfers as they end, those that had ended first; none named: all of this session, without end."""
        request = pb.WatchRequest(id=ids_of(transfers))
        async with contextlib.aclosing(self._stream("TransferService.Watch", request)) as messages:
            async for message in messages:
                yield wire.status_from_message(message)

    async def cancel(self, transfers: Sequence[TransferLike]) -> list[t.TransferStatus]:
        """Cancel; no byte of them moves any more when this returns."""
        return await self._cancel(transfers)

    async def release(self, transfers: Iterable[TransferLike]) -> None:
        """Let the daemon forget transfers, cancelling what runs."""
        await self._release(transfers)

    async def estimate(
        self, op: t.TransferOp | str, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]
    ) -> t.Estimate:
        """Ask how long a transfer would take."""
        return await self._call(calls.estimate(transfer_request(op, local, remote, options)))

    async def explain(
        self, op: t.TransferOp | str, local: ListLike, remote: ListLike, **options: Unpack[TransferOptions]
    ) -> t.Explanation:
        """Ask which way a transfer would go, and why."""
        return await self._call(calls.explain(transfer_request(op, local, remote, options)))

    # -- notifications

    async def notify(self, target: str, payload: bytes) -> None:
        """Send bytes to an agent, "agent" here or "agent@node"."""
        await self._call(calls.notify(target, payload))

    async def notifications(self, timeout_s: float = 0.0, *, limit: int = 100) -> list[t.Notification]:
        """Take what has arrived for this agent, waiting up to ``timeout_s`` for the first."""
        if self._ring is not None:
            return await self._notifications(timeout_s, limit)
        return await self._notifications_by_call(timeout_s, limit)

    # -- nodes

    async def node(self, name: str = "") -> t.NodeInfo:
        """Return a node's record; "" is this node."""
        return await self._call(calls.node(name))

    async def peers(self) -> list[t.PeerInfo]:
        """Return the other nodes that this one knows."""
        return await self._call(calls.peers())

    async def watch_peers(self, name: str = "") -> AsyncGenerator[t.PeerInfo, None]:
        """Yield the peers (or one) as they are, then each as its state, reason or record changes, without end.

        A slow reader gets the newest state of each peer. A name that is not known yet is waited for.
        """
        request = pb.WatchPeersRequest(name=name)
        async with contextlib.aclosing(self._stream("MetadataService.WatchPeers", request)) as messages:
            async for message in messages:
                yield wire.peer_from_message(message)

    async def nodes(self) -> list[t.NodeInfo]:
        """Return all nodes of the store, asked from it now; costs as much as there are nodes."""
        return await self._call(calls.nodes())

    async def publish_metadata(self, label: str, regions: Iterable[AsyncRegion] | None = None) -> None:
        """Put what ``export_metadata`` gives under a label of this node, for others to fetch; replaces it.

        Raises:
            Unsupported: the node's store keeps none; etcd does.
        """
        await self._call(calls.publish_metadata(label, None if regions is None else [region.id for region in regions]))

    async def withdraw_metadata(self, label: str) -> None:
        """Take a label of this node back; it goes with the node too."""
        await self._call(calls.withdraw_metadata(label))

    async def fetch_metadata(self, node: str, label: str, timeout_s: float = 0.0) -> list[AsyncRegion]:
        """Load what a node put under a label and return its regions; waits so long for it to appear.

        Raises:
            NotFound: it did not appear.
        """
        listing = await self._call(calls.fetch_metadata(node, label, timeout_s))
        return [self.region(info) for info in listing.regions]

    async def export_metadata(self, regions: Iterable[AsyncRegion] | None = None) -> bytes:
        """Return this node's record and shared regions (or only ``regions``) as a blob."""
        return await self._call(calls.export_metadata(None if regions is None else [region.id for region in regions]))

    async def import_metadata(self, blob: bytes) -> ImportedMetadata:
        """Load another node's blob."""
        return await self._call(calls.import_metadata(blob))

    async def invalidate(self, name: str) -> None:
        """Forget a node that came by a blob."""
        await self._call(calls.invalidate(name))

    async def _run(
        self, op: t.TransferOp, local: ListLike, remote: ListLike, options: TransferOptions
    ) -> t.TransferStatus:
        if self.uses_ring and self._ring is not None:
            track = await self._ring.run(op, local, remote, options)
            if track is not None:
                return checked(await self._whole(track))
        status = await self._call(calls.submit(transfer_request(op, local, remote, options), WAIT_SLICE_S))
        if status.state not in t.ENDED:
            [status] = await self._wait([status.id], None, any_of=False)
        return checked(status)
