"""Wire form of transfers and notifications; part of ``wire.py``, which is what others import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t
from xferd.api._wire_core import (
    build,
    check_seconds,
    enum_to_wire,
    error_from_detail,
    error_to_detail,
    list_from_message,
    list_to_message,
    op_from_wire,
    priority_from_wire,
    state_from_wire,
    text,
)
from xferd.api.proto import xferd_v1_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable


def prepared_to_message(info: t.PreparedInfo) -> pb.PreparedList:
    """Return the wire form."""
    return build(
        pb.PreparedList,
        handle=info.handle,
        node=info.node,
        epoch=info.epoch,
        count=info.count,
        total_nbytes=info.total_nbytes,
    )


def prepared_from_message(message: pb.PreparedList) -> t.PreparedInfo:
    """Return the record."""
    return t.PreparedInfo(
        handle=t.PreparedHandle(message.handle),
        node=message.node,
        epoch=message.epoch,
        count=message.count,
        total_nbytes=message.total_nbytes,
    )


def notification_to_message(notification: t.Notification) -> pb.Notification:
    """Return the wire form."""
    return build(
        pb.Notification,
        source=notification.source,
        target=notification.target,
        payload=notification.payload,
        transfer_id=notification.transfer,
        region=notification.regions,
    )


def notification_from_message(message: pb.Notification) -> t.Notification:
    """Return the record. ``source`` is what the sender claims; whoever delivers it must fill in what it knows."""
    return t.Notification(
        target=message.target,
        payload=message.payload,
        source=message.source,
        transfer=message.transfer_id,
        regions=tuple(map(t.RegionId, message.region)),
    )


def notification_asked_for(message: pb.Notification) -> t.Notification:
    """Return what a client or another node may ask to have delivered: without what only a hand-over fills in."""
    return t.Notification(
        target=message.target, payload=message.payload, source=message.source, transfer=message.transfer_id
    )


def transfer_request_to_message(request: t.TransferRequest, *, wait_s: float = 0.0) -> pb.SubmitRequest:
    """Return the wire form; ``wait_s`` asks the daemon to answer when the transfer has ended."""
    return build(
        pb.SubmitRequest,
        op=enum_to_wire(request.op),
        local=list_to_message(request.local),
        remote=list_to_message(request.remote),
        key=request.key,
        timeout_s=request.timeout_s,
        priority=enum_to_wire(request.priority),
        cause_id=request.cause_id,
        notification=None if request.notification is None else notification_to_message(request.notification),
        backend=request.backend,
        hold=request.hold,
        verify=request.verify,
        wait_event=request.wait_event,
        done_event=request.done_event,
        durable=request.durable,
        wait_s=wait_s,
    )


def transfer_request_from_message(message: pb.SubmitRequest, max_descriptors: int) -> t.TransferRequest:
    """Return the request; ``wait_s`` is the face's business and stays in the message.

    Raises:
        InvalidArgument: no op, an unknown enumeration value, a timeout that is no duration.
        InvalidDescriptor: as ``list_from_message``.
        LimitExceeded: as ``list_from_message``.
    """
    return t.TransferRequest(
        op=op_from_wire(message.op),
        local=list_from_message(message.local, max_descriptors),
        remote=list_from_message(message.remote, max_descriptors),
        key=message.key,
        timeout_s=check_seconds("timeout_s", message.timeout_s),
        priority=priority_from_wire(message.priority),
        cause_id=message.cause_id,
        notification=notification_asked_for(message.notification) if message.HasField("notification") else None,
        backend=message.backend,
        hold=message.hold,
        verify=message.verify,
        wait_event=message.wait_event,
        done_event=message.done_event,
        durable=message.durable,
    )


def hops_to_messages(route: Iterable[t.Hop]) -> list[pb.Hop]:
    """Return the wire form."""
    return [pb.Hop(backend=hop.backend, source=hop.source, target=hop.target, reason=text(hop.reason)) for hop in route]


def hops_from_messages(messages: Iterable[pb.Hop]) -> tuple[t.Hop, ...]:
    """Return the records."""
    return tuple(t.Hop(hop.backend, hop.source, hop.target, hop.reason) for hop in messages)


def telemetry_to_message(telemetry: t.Telemetry) -> pb.Telemetry:
    """Return the wire form."""
    return build(
        pb.Telemetry,
        created_at=telemetry.created_at,
        posted_at=telemetry.posted_at,
        first_byte_at=telemetry.first_byte_at,
        ended_at=telemetry.ended_at,
        queued_s=telemetry.queued_s,
        moving_s=telemetry.moving_s,
        total_nbytes=telemetry.total_nbytes,
        moved_nbytes=telemetry.moved_nbytes,
        descriptors=telemetry.descriptors,
        pieces=telemetry.pieces,
        chunks=telemetry.chunks,
        posts=telemetry.posts,
        route=hops_to_messages(telemetry.route),
    )


def telemetry_from_message(message: pb.Telemetry) -> t.Telemetry:
    """Return the record."""
    return t.Telemetry(
        created_at=message.created_at,
        posted_at=message.posted_at,
        first_byte_at=message.first_byte_at,
        ended_at=message.ended_at,
        queued_s=message.queued_s,
        moving_s=message.moving_s,
        total_nbytes=message.total_nbytes,
        moved_nbytes=message.moved_nbytes,
        descriptors=message.descriptors,
        pieces=message.pieces,
        chunks=message.chunks,
        posts=message.posts,
        route=hops_from_messages(message.route),
    )


def status_to_message(status: t.TransferStatus) -> pb.TransferStatus:
    """Return the wire form."""
    return build(
        pb.TransferStatus,
        id=status.id,
        key=status.key,
        op=enum_to_wire(status.op),
        state=enum_to_wire(status.state),
        priority=enum_to_wire(status.priority),
        cause_id=status.cause_id,
        local_node=status.local_node,
        remote_node=status.remote_node,
        error=None if status.error is None else error_to_detail(status.error),
        telemetry=telemetry_to_message(status.telemetry),
        agent=status.agent,
    )


def status_from_message(message: pb.TransferStatus) -> t.TransferStatus:
    """Return the record."""
    return t.TransferStatus(
        id=t.TransferId(message.id),
        key=message.key,
        op=op_from_wire(message.op),
        state=state_from_wire(message.state),
        priority=priority_from_wire(message.priority),
        cause_id=message.cause_id,
        local_node=message.local_node,
        remote_node=message.remote_node,
        agent=message.agent,
        error=error_from_detail(message.error) if message.HasField("error") else None,
        telemetry=telemetry_from_message(message.telemetry),
    )


def statuses_to_message(statuses: Iterable[t.TransferStatus]) -> pb.TransferStatusList:
    """Return the wire form."""
    return pb.TransferStatusList(transfers=[status_to_message(status) for status in statuses])


def statuses_from_message(message: pb.TransferStatusList) -> list[t.TransferStatus]:
    """Return the records, in order."""
    return [status_from_message(status) for status in message.transfers]


def estimate_to_message(estimate: t.Estimate) -> pb.EstimateResponse:
    """Return the wire form."""
    return pb.EstimateResponse(
        duration_s=estimate.duration_s,
        bytes_per_s=estimate.bytes_per_s,
        basis=estimate.basis,
        route=hops_to_messages(estimate.route),
    )


def estimate_from_message(message: pb.EstimateResponse) -> t.Estimate:
    """Return the record."""
    return t.Estimate(
        duration_s=message.duration_s,
        bytes_per_s=message.bytes_per_s,
        basis=message.basis,
        route=hops_from_messages(message.route),
    )


def explanation_to_message(explanation: t.Explanation) -> pb.ExplainResponse:
    """Return the wire form."""
    return build(
        pb.ExplainResponse,
        route=hops_to_messages(explanation.route),
        considered=[text(line) for line in explanation.considered],
        chunks=explanation.chunks,
        pieces=explanation.pieces,
        total_nbytes=explanation.total_nbytes,
    )


def explanation_from_message(message: pb.ExplainResponse) -> t.Explanation:
    """Return the record."""
    return t.Explanation(
        route=hops_from_messages(message.route),
        considered=tuple(message.considered),
        chunks=message.chunks,
        pieces=message.pieces,
        total_nbytes=message.total_nbytes,
    )
