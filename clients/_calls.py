"""Every unary call of ``xferd.v1`` as a value: which method, which request, how its reply is read.

Both clients build their calls here and differ only in how they wait for them. Streaming calls are in the clients.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar

from xferd.api import types as t, wire
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import grpc
    from google.protobuf.message import Message

    from xferd.api.descriptors import DescriptorList

R = TypeVar("R", covariant=True)

WAIT_SLICE_S = 30.0
"""One round of an unbounded wait: long enough to cost nothing, short enough that a lost daemon is noticed."""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One unary call. ``wait_s`` is time that the daemon may take on purpose, on top of any call timeout."""

    method: str
    request: Message
    parse: Callable[[Any], R]
    wait_s: float = 0.0
    is_admin: bool = False


def wait_slices(timeout_s: float | None) -> Iterator[float]:
    """Yield how long each call of a wait may take, until the whole of ``timeout_s`` is used up; None: for ever."""
    if timeout_s is None:
        while True:
            yield WAIT_SLICE_S
    deadline = time.monotonic() + timeout_s
    left = timeout_s
    while True:
        yield min(max(left, 0.0), WAIT_SLICE_S)
        left = deadline - time.monotonic()
        if left <= 0:
            return


class Methods:
    """The stubs of one channel, by "Service.Method"; seam to gRPC, whose callables have no types."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        self._stubs: dict[str, Any] = {
            "SessionService": pb_grpc.SessionServiceStub(channel),
            "MemoryService": pb_grpc.MemoryServiceStub(channel),
            "TransferService": pb_grpc.TransferServiceStub(channel),
            "NotificationService": pb_grpc.NotificationServiceStub(channel),
            "MetadataService": pb_grpc.MetadataServiceStub(channel),
            "AdminService": pb_grpc.AdminServiceStub(channel),
        }

    def __getitem__(self, name: str) -> Callable[..., Any]:
        service, _, method = name.partition(".")
        found: Callable[..., Any] = getattr(self._stubs[service], method)
        return found


def channel_options(max_message_nbytes: int = -1) -> list[tuple[str, int]]:
    """Return the options of a channel; -1 leaves message sizes to the daemon's own limit."""
    return [
        ("grpc.max_receive_message_length", max_message_nbytes),
        ("grpc.max_send_message_length", max_message_nbytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A shared subchannel remembers another client's failed attempts, and waits with ours.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that shows a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def _nothing(_reply: object) -> None:
    return None


# ------------------------------------------------------------------------------------------- sessions, memory


def close_session() -> Call[None]:
    """End the session; answers when all is released."""
    return Call("SessionService.Close", pb.CloseSessionRequest(), _nothing)


def pools() -> Call[list[t.PoolInfo]]:
    """List pools with their statistics."""

    def parse(reply: pb.PoolList) -> list[t.PoolInfo]:
        return [wire.pool_from_message(message) for message in reply.pools]

    return Call("MemoryService.ListPools", pb.ListPoolsRequest(), parse)


def allocate(
    nbytes: int | Sequence[int], pool: str, access: t.Access, label: str, persistent: bool = False
) -> Call[t.RegionListing]:
    """Allocate one region, or a group."""
    sizes = (int(nbytes),) if isinstance(nbytes, SupportsIndex) else tuple(int(size) for size in nbytes)
    request = t.AllocateRequest(sizes, pool, access, label, persistent)
    return Call("MemoryService.Allocate", wire.allocate_to_message(request), wire.listing_from_message)


def register_private(request: t.RegisterPrivateRequest) -> Call[t.RegionInfo]:
    """Register memory by address."""
    return Call("MemoryService.RegisterPrivate", wire.register_private_to_message(request), wire.region_from_message)


def register_file(request: t.RegisterFileRequest) -> Call[t.RegionInfo]:
    """Register a file by path."""
    return Call("MemoryService.RegisterFile", wire.register_file_to_message(request), wire.region_from_message)


def free(regions: Iterable[t.RegionId]) -> Call[None]:
    """Free regions, all or none."""
    return Call("MemoryService.Free", pb.FreeRequest(region=regions), _nothing)


def register_object(request: t.RegisterObjectRequest) -> Call[t.RegionInfo]:
    """Register an object of a store."""
    return Call("MemoryService.RegisterObject", wire.register_object_to_message(request), wire.region_from_message)


def query(items: Iterable[t.QueryItem]) -> Call[list[t.QueryResult]]:
    """Ask about files and objects."""

    def parse(reply: pb.QueryResponse) -> list[t.QueryResult]:
        return [wire.query_result_from_message(result) for result in reply.result]

    return Call("MemoryService.Query", pb.QueryRequest(item=map(wire.query_item_to_message, items)), parse)


def delete_objects(store: str, keys: Iterable[str]) -> Call[None]:
    """Delete objects of a store."""
    return Call("MemoryService.DeleteObjects", pb.DeleteObjectsRequest(store=store, key=keys), _nothing)


def list_objects(request: t.ObjectQuery) -> Call[t.ObjectPage]:
    """List a page of a store's objects."""
    return Call("MemoryService.ListObjects", wire.object_query_to_message(request), wire.object_page_from_message)


def register_device(request: t.RegisterDeviceRequest) -> Call[t.RegionInfo]:
    """Register GPU memory by its IPC handle."""
    return Call("MemoryService.RegisterDevice", wire.register_device_to_message(request), wire.region_from_message)


def export_device(region: t.RegionId) -> Call[t.DeviceHandle]:
    """Ask how a region of GPU memory is opened."""
    return Call("MemoryService.ExportDevice", pb.ExportDeviceRequest(region=region), wire.device_handle_from_message)


def devices() -> Call[list[t.DeviceInfo]]:
    """List the GPUs of the node."""

    def parse(reply: pb.DeviceList) -> list[t.DeviceInfo]:
        return [wire.device_from_message(message) for message in reply.devices]

    return Call("MemoryService.ListDevices", pb.ListDevicesRequest(), parse)


def open_device_event(device: int, handle: bytes) -> Call[t.DeviceEvent]:
    """Open an event of this process, or let the daemon make one where ``handle`` is b""."""
    request = pb.OpenDeviceEventRequest(device=device, handle=handle)
    return Call("MemoryService.OpenDeviceEvent", request, wire.device_event_from_message)


def hand_over(request: t.HandOverRequest, *, is_admin: bool = False) -> Call[t.RegionListing]:
    """Give regions to another agent."""
    message = wire.hand_over_to_message(request)
    return Call("MemoryService.HandOver", message, wire.listing_from_message, is_admin=is_admin)


def regions(query: t.RegionQuery) -> Call[t.RegionListing]:
    """List regions."""
    return Call("MemoryService.ListRegions", wire.region_query_to_message(query), wire.listing_from_message)


# ------------------------------------------------------------------------------------------- transfers


def prepare(descriptors: DescriptorList) -> Call[t.PreparedInfo]:
    """Prepare a list."""
    request = pb.PrepareRequest(list=wire.list_to_message(descriptors))
    return Call("TransferService.Prepare", request, wire.prepared_from_message)


def release_prepared(handles: Iterable[t.PreparedHandle]) -> Call[None]:
    """Forget prepared lists."""
    return Call("TransferService.ReleasePrepared", pb.ReleasePreparedRequest(handle=handles), _nothing)


def submit(request: t.TransferRequest, wait_s: float) -> Call[t.TransferStatus]:
    """Submit, and wait for the end up to ``wait_s`` in the same call."""
    message = wire.transfer_request_to_message(request, wait_s=wait_s)
    return Call("TransferService.Submit", message, wire.status_from_message, wait_s)


def post(transfer: t.TransferId, wait_s: float) -> Call[t.TransferStatus]:
    """Post, and wait for the end up to ``wait_s`` in the same call."""
    return Call("TransferService.Post", pb.PostRequest(id=transfer, wait_s=wait_s), wire.status_from_message, wait_s)


def poll(transfers: Iterable[t.TransferId]) -> Call[list[t.TransferStatus]]:
    """Ask for the status of each."""
    return Call("TransferService.Poll", pb.PollRequest(id=transfers), wire.statuses_from_message)


def wait(transfers: Iterable[t.TransferId], wait_s: float, *, any_of: bool) -> Call[list[t.TransferStatus]]:
    """Wait for all, or any, to end."""
    request = pb.WaitRequest(id=transfers, timeout_s=wait_s, any=any_of)
    return Call("TransferService.Wait", request, wire.statuses_from_message, wait_s)


def cancel(transfers: Iterable[t.TransferId]) -> Call[list[t.TransferStatus]]:
    """Cancel; answers when no byte moves any more."""
    return Call("TransferService.Cancel", pb.CancelRequest(id=transfers), wire.statuses_from_message)


def release(transfers: Iterable[t.TransferId]) -> Call[None]:
    """Forget transfers."""
    return Call("TransferService.Release", pb.ReleaseRequest(id=transfers), _nothing)


def estimate(request: t.TransferRequest) -> Call[t.Estimate]:
    """Ask what a transfer would cost."""
    message = wire.transfer_request_to_message(request)
    return Call("TransferService.Estimate", message, wire.estimate_from_message)


def explain(request: t.TransferRequest) -> Call[t.Explanation]:
    """Ask which way a transfer would go."""
    message = wire.transfer_request_to_message(request)
    return Call("TransferService.Explain", message, wire.explanation_from_message)


def notify(target: str, payload: bytes) -> Call[None]:
    """Send a notification."""
    message = wire.notification_to_message(t.Notification(target, bytes(payload)))
    return Call("NotificationService.Send", message, _nothing)


def notifications(limit: int, wait_s: float) -> Call[list[t.Notification]]:
    """Take notifications, waiting for the first."""

    def parse(reply: pb.NotificationList) -> list[t.Notification]:
        return [wire.notification_from_message(message) for message in reply.notifications]

    return Call("NotificationService.Receive", pb.ReceiveRequest(max=limit, timeout_s=wait_s), parse, wait_s)


# ------------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True, slots=True)
class ImportedMetadata:
    """What a blob brought: the node, and the number of its regions."""

    node: t.NodeInfo
    regions: int


def node(name: str) -> Call[t.NodeInfo]:
    """Ask for a node's record."""
    return Call("MetadataService.GetNode", pb.GetNodeRequest(name=name), wire.node_from_message)


def peers() -> Call[list[t.PeerInfo]]:
    """List peers."""

    def parse(reply: pb.PeerList) -> list[t.PeerInfo]:
        return [wire.peer_from_message(message) for message in reply.peers]

    return Call("MetadataService.ListPeers", pb.ListPeersRequest(), parse)


def nodes() -> Call[list[t.NodeInfo]]:
    """List all nodes of the store."""

    def parse(reply: pb.NodeList) -> list[t.NodeInfo]:
        return [wire.node_from_message(message) for message in reply.nodes]

    return Call("MetadataService.ListNodes", pb.ListNodesRequest(), parse)


def publish_metadata(label: str, wanted: Iterable[t.RegionId] | None) -> Call[None]:
    """Put this node's metadata under a label."""
    request = pb.PublishMetadataRequest(label=label, region=wanted or (), partial=wanted is not None)
    return Call("MetadataService.PublishMetadata", request, _nothing)


def withdraw_metadata(label: str) -> Call[None]:
    """Take a label back."""
    return Call("MetadataService.WithdrawMetadata", pb.WithdrawMetadataRequest(label=label), _nothing)


def fetch_metadata(node: str, label: str, wait_s: float) -> Call[t.RegionListing]:
    """Load what a node put under a label, waiting for it to appear."""
    request = pb.FetchMetadataRequest(node=node, label=label, timeout_s=wait_s)
    return Call("MetadataService.FetchMetadata", request, wire.listing_from_message, wait_s)


def export_metadata(wanted: Iterable[t.RegionId] | None) -> Call[bytes]:
    """Take this node's metadata as a blob."""

    def parse(reply: pb.MetadataBlob) -> bytes:
        return reply.data

    return Call("MetadataService.Export", pb.ExportRequest(region=wanted or (), partial=wanted is not None), parse)


def import_metadata(blob: bytes) -> Call[ImportedMetadata]:
    """Load another node's blob."""

    def parse(reply: pb.ImportResponse) -> ImportedMetadata:
        return ImportedMetadata(wire.node_from_message(reply.node), reply.regions)

    return Call("MetadataService.Import", pb.MetadataBlob(data=blob), parse)


def invalidate(name: str) -> Call[None]:
    """Forget a node that came by a blob."""
    return Call("MetadataService.Invalidate", pb.InvalidateRequest(name=name), _nothing)
