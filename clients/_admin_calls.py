"""The calls of AdminService as values; see ``_calls.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api import types as t, wire
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.clients._calls import Call

if TYPE_CHECKING:
    from collections.abc import Iterable

DIAGNOSE_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class DrainResult:
    """How a drain went: whether all came to rest before the deadline, and how many transfers were left."""

    is_drained: bool
    transfers_left: int


def status() -> Call[t.NodeStatus]:
    """Ask for health and counters."""
    return Call("AdminService.Status", pb.StatusRequest(), wire.node_status_from_message, is_admin=True)


def config() -> Call[str]:
    """Ask for the configuration in force."""

    def parse(reply: pb.ConfigDocument) -> str:
        return reply.toml

    return Call("AdminService.GetConfig", pb.GetConfigRequest(), parse, is_admin=True)


def pools() -> Call[list[t.PoolInfo]]:
    """List pools with their statistics."""

    def parse(reply: pb.PoolList) -> list[t.PoolInfo]:
        return [wire.pool_from_message(message) for message in reply.pools]

    return Call("AdminService.ListPools", pb.ListPoolsRequest(), parse, is_admin=True)


def devices() -> Call[list[t.DeviceInfo]]:
    """List GPUs."""

    def parse(reply: pb.DeviceList) -> list[t.DeviceInfo]:
        return [wire.device_from_message(message) for message in reply.devices]

    return Call("MemoryService.ListDevices", pb.ListDevicesRequest(), parse, is_admin=True)


def sessions() -> Call[list[t.SessionInfo]]:
    """List sessions."""

    def parse(reply: pb.SessionList) -> list[t.SessionInfo]:
        return [wire.session_from_message(message) for message in reply.sessions]

    return Call("AdminService.ListSessions", pb.ListSessionsRequest(), parse, is_admin=True)


def backends() -> Call[list[t.BackendInfo]]:
    """List backends."""

    def parse(reply: pb.BackendList) -> list[t.BackendInfo]:
        return [wire.backend_from_message(message) for message in reply.backends]

    return Call("AdminService.ListBackends", pb.ListBackendsRequest(), parse, is_admin=True)


def storage() -> Call[list[t.StorageInfo]]:
    """Describe the storage pools."""

    def parse(reply: pb.StorageReport) -> list[t.StorageInfo]:
        return [wire.storage_from_message(message) for message in reply.pools]

    return Call("AdminService.GetStorage", pb.GetStorageRequest(), parse, is_admin=True)


def scrub_storage(pool: str, wait_s: float) -> Call[t.StorageInfo]:
    """Read all of a storage pool again."""
    request = pb.ScrubStorageRequest(pool=pool)
    return Call("AdminService.ScrubStorage", request, wire.storage_from_message, wait_s=wait_s, is_admin=True)


def free(regions: Iterable[t.RegionId]) -> Call[None]:
    """Free persistent regions whose agent has no session."""
    return Call("MemoryService.Free", pb.FreeRequest(region=regions), lambda _reply: None, is_admin=True)


def routes() -> Call[list[t.RouteCost]]:
    """List what was learned of routes."""

    def parse(reply: pb.RouteList) -> list[t.RouteCost]:
        return [wire.route_cost_from_message(message) for message in reply.routes]

    return Call("AdminService.ListRoutes", pb.ListRoutesRequest(), parse, is_admin=True)


def transfers(active_only: bool, agent: str) -> Call[list[t.TransferStatus]]:
    """List transfers of all sessions."""
    request = pb.ListTransfersRequest(active_only=active_only, agent=agent)
    return Call("AdminService.ListTransfers", request, wire.statuses_from_message, is_admin=True)


def holds() -> Call[list[t.HoldInfo]]:
    """List what is held."""

    def parse(reply: pb.HoldList) -> list[t.HoldInfo]:
        return [wire.hold_from_message(message) for message in reply.holds]

    return Call("AdminService.ListHolds", pb.ListHoldsRequest(), parse, is_admin=True)


def diagnose() -> Call[list[t.Check]]:
    """Have the daemon look at its surroundings; it waits for ports and etcd."""

    def parse(reply: pb.DiagnoseReport) -> list[t.Check]:
        return [wire.check_from_message(message) for message in reply.checks]

    return Call("AdminService.Diagnose", pb.DiagnoseRequest(), parse, wait_s=DIAGNOSE_WAIT_S, is_admin=True)


def end_session(session: t.SessionId) -> Call[None]:
    """End somebody's session."""
    return Call("AdminService.EndSession", pb.EndSessionRequest(id=session), lambda _reply: None, is_admin=True)


def drain(timeout_s: float, undo: bool) -> Call[DrainResult]:
    """Drain, or take it back."""

    def parse(reply: pb.DrainResponse) -> DrainResult:
        return DrainResult(reply.drained, reply.transfers_left)

    request = pb.DrainRequest(timeout_s=timeout_s, undo=undo)
    return Call("AdminService.Drain", request, parse, wait_s=timeout_s, is_admin=True)


def set_log_level(level: str) -> Call[str]:
    """Set the log level."""

    def parse(reply: pb.SetLogLevelResponse) -> str:
        return reply.previous

    return Call("AdminService.SetLogLevel", pb.SetLogLevelRequest(level=level), parse, is_admin=True)
