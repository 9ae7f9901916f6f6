"""Wire form of sessions, pools and regions; part of ``wire.py``, which is what others import."""

from __future__ import annotations

from xferd.api import types as t
from xferd.api._wire_core import access_from_wire, build, enum_to_wire, kind_from_wire, source_from_wire, text
from xferd.api.errors import InvalidArgument
from xferd.api.proto import xferd_v1_pb2 as pb

# ------------------------------------------------------------------------------------------- sessions


def limits_to_message(limits: t.Limits) -> pb.Limits:
    """Return the wire form."""
    return pb.Limits(
        max_descriptors=limits.max_descriptors,
        max_message_nbytes=limits.max_message_nbytes,
        max_notification_nbytes=limits.max_notification_nbytes,
        max_group=limits.max_group,
    )


def limits_from_message(message: pb.Limits) -> t.Limits:
    """Return the record."""
    return t.Limits(
        max_descriptors=message.max_descriptors,
        max_message_nbytes=message.max_message_nbytes,
        max_notification_nbytes=message.max_notification_nbytes,
        max_group=message.max_group,
    )


def grant_to_message(grant: t.SessionGrant) -> pb.SessionGrant:
    """Return the wire form; it holds the token, so it must not be logged."""
    return pb.SessionGrant(
        session_id=grant.session,
        token=grant.token,
        agent=grant.agent,
        node=grant.node,
        epoch=grant.epoch,
        limits=limits_to_message(grant.limits),
        grpc_target=text(grant.grpc_target),
        pools=[pool_to_message(pool) for pool in grant.pools],
    )


def grant_from_message(message: pb.SessionGrant) -> t.SessionGrant:
    """Return the record."""
    return t.SessionGrant(
        session=t.SessionId(message.session_id),
        token=message.token,
        agent=message.agent,
        node=message.node,
        epoch=message.epoch,
        limits=limits_from_message(message.limits),
        grpc_target=message.grpc_target,
        pools=tuple(pool_from_message(pool) for pool in message.pools),
    )


def session_to_message(info: t.SessionInfo) -> pb.Session:
    """Return the wire form. A pid or uid that is not known (0 or less) is 0."""
    return pb.Session(
        id=info.session,
        agent=info.agent,
        transport=info.transport.value,
        pid=max(info.pid, 0),
        uid=max(info.uid, 0),
        opened_at=info.opened_at,
        expires_at=info.expires_at,
        regions=info.regions,
        held_nbytes=info.held_nbytes,
        transfers=info.transfers,
        prepared=info.prepared,
    )


def session_from_message(message: pb.Session) -> t.SessionInfo:
    """Return the record; a transport that is not known here raises ``InvalidArgument``."""
    try:
        transport = t.Transport(message.transport)
    except ValueError:
        raise InvalidArgument(
            f"session transport {message.transport!r}",
            limit=", ".join(item.value for item in t.Transport),
            remedy="use a client as new as the daemon",
        ) from None
    return t.SessionInfo(
        session=t.SessionId(message.id),
        agent=message.agent,
        transport=transport,
        pid=message.pid,
        uid=message.uid,
        opened_at=message.opened_at,
        expires_at=message.expires_at,
        regions=message.regions,
        held_nbytes=message.held_nbytes,
        transfers=message.transfers,
        prepared=message.prepared,
    )


# ------------------------------------------------------------------------------------------- pools and regions


def pool_to_message(info: t.PoolInfo) -> pb.PoolInfo:
    """Return the wire form."""
    return build(
        pb.PoolInfo,
        name=info.name,
        kind=enum_to_wire(info.kind),
        nbytes=info.nbytes,
        used_nbytes=info.used_nbytes,
        free_nbytes=info.free_nbytes,
        largest_free_nbytes=info.largest_free_nbytes,
        fragmentation=info.fragmentation,
        allocations=info.allocations,
        peak_used_nbytes=info.peak_used_nbytes,
        failed_allocations=info.failed_allocations,
        mappable=info.mappable,
        huge_nbytes=info.huge_nbytes,
        huge_refusal=info.huge_refusal,
        device=info.device,
        reason=text(info.reason),
    )


def pool_from_message(message: pb.PoolInfo) -> t.PoolInfo:
    """Return the record."""
    return t.PoolInfo(
        name=message.name,
        kind=kind_from_wire(message.kind),
        nbytes=message.nbytes,
        used_nbytes=message.used_nbytes,
        free_nbytes=message.free_nbytes,
        largest_free_nbytes=message.largest_free_nbytes,
        fragmentation=message.fragmentation,
        allocations=message.allocations,
        peak_used_nbytes=message.peak_used_nbytes,
        failed_allocations=message.failed_allocations,
        mappable=message.mappable,
        huge_nbytes=message.huge_nbytes,
        huge_refusal=message.huge_refusal,
        device=message.device,
        reason=message.reason,
    )


def region_to_message(info: t.RegionInfo) -> pb.Region:
    """Return the wire form."""
    return build(
        pb.Region,
        id=info.id,
        node=info.node,
        epoch=info.epoch,
        kind=enum_to_wire(info.kind),
        source=enum_to_wire(info.source),
        device=info.device,
        nbytes=info.nbytes,
        agent=info.agent,
        access=enum_to_wire(info.access),
        writable=info.writable,
        label=text(info.label),
        pool=info.pool,
        pool_offset=info.pool_offset,
        path=text(info.path),
        persistent=info.persistent,
    )


def region_from_message(message: pb.Region) -> t.RegionInfo:
    """Return the record."""
    return t.RegionInfo(
        id=t.RegionId(message.id),
        node=message.node,
        epoch=message.epoch,
        kind=kind_from_wire(message.kind),
        source=source_from_wire(message.source),
        device=message.device,
        nbytes=message.nbytes,
        agent=message.agent,
        access=access_from_wire(message.access),
        writable=message.writable,
        label=message.label,
        pool=message.pool,
        pool_offset=message.pool_offset,
        path=message.path,
        persistent=message.persistent,
    )


def listing_to_message(listing: t.RegionListing) -> pb.RegionList:
    """Return the wire form."""
    regions = [region_to_message(region) for region in listing.regions]
    return pb.RegionList(node=listing.node, epoch=listing.epoch, regions=regions)


def listing_from_message(message: pb.RegionList) -> t.RegionListing:
    """Return the record."""
    return t.RegionListing(
        node=message.node,
        epoch=message.epoch,
        regions=tuple(region_from_message(region) for region in message.regions),
    )


# ------------------------------------------------------------------------------------------- requests


def allocate_to_message(request: t.AllocateRequest) -> pb.AllocateRequest:
    """Return the wire form."""
    return build(
        pb.AllocateRequest,
        pool=request.pool,
        nbytes=request.nbytes,
        access=enum_to_wire(request.access),
        label=request.label,
        persistent=request.persistent,
    )


def allocate_from_message(message: pb.AllocateRequest) -> t.AllocateRequest:
    """Return the request."""
    return t.AllocateRequest(
        nbytes=tuple(message.nbytes),
        pool=message.pool,
        access=access_from_wire(message.access),
        label=message.label,
        persistent=message.persistent,
    )


def register_private_to_message(request: t.RegisterPrivateRequest) -> pb.RegisterPrivateRequest:
    """Return the wire form."""
    return build(
        pb.RegisterPrivateRequest,
        address=request.address,
        nbytes=request.nbytes,
        access=enum_to_wire(request.access),
        label=request.label,
        writable=request.writable,
    )


def register_private_from_message(message: pb.RegisterPrivateRequest) -> t.RegisterPrivateRequest:
    """Return the request."""
    return t.RegisterPrivateRequest(
        address=message.address,
        nbytes=message.nbytes,
        access=access_from_wire(message.access),
        label=message.label,
        writable=message.writable,
    )


def register_file_to_message(request: t.RegisterFileRequest) -> pb.RegisterFileRequest:
    """Return the wire form."""
    return build(
        pb.RegisterFileRequest,
        path=request.path,
        nbytes=request.nbytes,
        writable=request.writable,
        create=request.create,
        access=enum_to_wire(request.access),
        label=request.label,
    )


def register_file_from_message(message: pb.RegisterFileRequest) -> t.RegisterFileRequest:
    """Return the request."""
    return t.RegisterFileRequest(
        path=message.path,
        nbytes=message.nbytes,
        writable=message.writable,
        create=message.create,
        access=access_from_wire(message.access),
        label=message.label,
    )


def region_query_to_message(query: t.RegionQuery) -> pb.ListRegionsRequest:
    """Return the wire form."""
    return build(pb.ListRegionsRequest, node=query.node, agent=query.agent, label=query.label, region=query.regions)


def region_query_from_message(message: pb.ListRegionsRequest) -> t.RegionQuery:
    """Return the query."""
    return t.RegionQuery(
        node=message.node,
        agent=message.agent,
        label=message.label,
        regions=tuple(t.RegionId(region) for region in message.region),
    )


def hand_over_to_message(request: t.HandOverRequest) -> pb.HandOverRequest:
    """Return the wire form."""
    return build(
        pb.HandOverRequest,
        region=request.regions,
        to=request.to,
        payload=request.payload,
        access=None if request.access is None else enum_to_wire(request.access),
        cause_id=request.cause_id,
    )


def hand_over_from_message(message: pb.HandOverRequest) -> t.HandOverRequest:
    """Return the request; an access that is not known here raises ``InvalidArgument``."""
    return t.HandOverRequest(
        regions=tuple(map(t.RegionId, message.region)),
        to=message.to,
        payload=message.payload,
        access=access_from_wire(message.access) if message.HasField("access") else None,
        cause_id=message.cause_id,
    )
