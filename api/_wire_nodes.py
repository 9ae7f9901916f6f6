"""Wire form of nodes, peers and what an operator sees; part of ``wire.py``, which is what others import."""

from __future__ import annotations

from xferd.api import types as t
from xferd.api._wire_core import check_state_from_wire, known_kinds, peer_state_from_wire, text
from xferd.api.proto import xferd_v1_pb2 as pb


def node_to_message(info: t.NodeInfo) -> pb.Node:
    """Return the wire form."""
    message = pb.Node(
        name=info.name,
        id=info.id,
        epoch=info.epoch,
        version=info.version,
        addresses=info.addresses,
        backends=info.backends,
        agents=info.agents,
        started_at=info.started_at,
        draining=info.draining,
    )
    for kind in info.kinds:
        message.kinds.append(pb.MemoryKind.Value(f"MEMORY_KIND_{kind.name}"))
    return message


def node_from_message(message: pb.Node) -> t.NodeInfo:
    """Return the record; memory kinds that are not known here are left out."""
    return t.NodeInfo(
        name=message.name,
        id=message.id,
        epoch=message.epoch,
        version=message.version,
        addresses=tuple(message.addresses),
        backends=tuple(message.backends),
        kinds=known_kinds(message.kinds),
        agents=tuple(message.agents),
        started_at=message.started_at,
        draining=message.draining,
    )


def peer_to_message(info: t.PeerInfo) -> pb.Peer:
    """Return the wire form."""
    message = pb.Peer(
        node=node_to_message(info.node),
        reason=text(info.reason),
        since=info.since,
        lanes=info.lanes,
        sent_nbytes=info.sent_nbytes,
        received_nbytes=info.received_nbytes,
    )
    message.state = pb.PeerState.Value(f"PEER_STATE_{info.state.name}")
    return message


def peer_from_message(message: pb.Peer) -> t.PeerInfo:
    """Return the record."""
    return t.PeerInfo(
        node=node_from_message(message.node),
        state=peer_state_from_wire(message.state),
        reason=message.reason,
        since=message.since,
        lanes=message.lanes,
        sent_nbytes=message.sent_nbytes,
        received_nbytes=message.received_nbytes,
    )


def node_status_to_message(status: t.NodeStatus) -> pb.NodeStatus:
    """Return the wire form."""
    return pb.NodeStatus(
        node=node_to_message(status.node),
        live=status.live,
        ready=status.ready,
        reason=text(status.reason),
        draining=status.draining,
        sessions=status.sessions,
        regions=status.regions,
        transfers_active=status.transfers_active,
        transfers_done=status.transfers_done,
        transfers_failed=status.transfers_failed,
        transfers_cancelled=status.transfers_cancelled,
        moved_nbytes=status.moved_nbytes,
        uptime_s=status.uptime_s,
    )


def node_status_from_message(message: pb.NodeStatus) -> t.NodeStatus:
    """Return the record."""
    return t.NodeStatus(
        node=node_from_message(message.node),
        live=message.live,
        ready=message.ready,
        reason=message.reason,
        draining=message.draining,
        sessions=message.sessions,
        regions=message.regions,
        transfers_active=message.transfers_active,
        transfers_done=message.transfers_done,
        transfers_failed=message.transfers_failed,
        transfers_cancelled=message.transfers_cancelled,
        moved_nbytes=message.moved_nbytes,
        uptime_s=message.uptime_s,
    )


def backend_to_message(info: t.BackendInfo) -> pb.Backend:
    """Return the wire form."""
    return pb.Backend(
        name=info.name,
        pairs=info.pairs,
        moved_nbytes=info.moved_nbytes,
        chunks=info.chunks,
        failures=info.failures,
        busy=info.busy,
        slots=info.slots,
    )


def backend_from_message(message: pb.Backend) -> t.BackendInfo:
    """Return the record."""
    return t.BackendInfo(
        name=message.name,
        pairs=tuple(message.pairs),
        moved_nbytes=message.moved_nbytes,
        chunks=message.chunks,
        failures=message.failures,
        busy=message.busy,
        slots=message.slots,
    )


def hold_to_message(info: t.HoldInfo) -> pb.Hold:
    """Return the wire form."""
    return pb.Hold(
        kind=info.kind,
        what=text(info.what),
        owner=info.owner,
        reason=text(info.reason),
        since=info.since,
        expires_at=info.expires_at,
    )


def hold_from_message(message: pb.Hold) -> t.HoldInfo:
    """Return the record."""
    return t.HoldInfo(
        kind=message.kind,
        what=message.what,
        owner=message.owner,
        reason=message.reason,
        since=message.since,
        expires_at=message.expires_at,
    )


def check_to_message(check: t.Check) -> pb.Check:
    """Return the wire form."""
    message = pb.Check(name=check.name, finding=text(check.finding), remedy=text(check.remedy))
    message.state = pb.CheckState.Value(f"CHECK_STATE_{check.state.name}")
    return message


def check_from_message(message: pb.Check) -> t.Check:
    """Return the record."""
    return t.Check(message.name, check_state_from_wire(message.state), message.finding, message.remedy)


def route_cost_to_message(info: t.RouteCost) -> pb.RouteCost:
    """Return the wire form."""
    return pb.RouteCost(
        route=info.route,
        source=info.source,
        target=info.target,
        peer=info.peer,
        min_nbytes=info.min_nbytes,
        max_nbytes=info.max_nbytes,
        bytes_per_s=info.bytes_per_s,
        factor=info.factor,
        measurements=info.measurements,
        age_s=info.age_s,
        failures=info.failures,
        retry_in_s=info.retry_in_s,
        last_error=text(info.last_error),
    )


def route_cost_from_message(message: pb.RouteCost) -> t.RouteCost:
    """Return the record."""
    return t.RouteCost(
        route=message.route,
        source=message.source,
        target=message.target,
        peer=message.peer,
        min_nbytes=message.min_nbytes,
        max_nbytes=message.max_nbytes,
        bytes_per_s=message.bytes_per_s,
        factor=message.factor,
        measurements=message.measurements,
        age_s=message.age_s,
        failures=message.failures,
        retry_in_s=message.retry_in_s,
        last_error=message.last_error,
    )
