"""What goes out besides the records of ``api/types.py``: lists under a name, and small answers of this face only.

A list is always an object with one member, so that it can grow others later.
"""

from __future__ import annotations

from dataclasses import dataclass

from xferd.api import types as t  # noqa: TC001 - its hints are read at run time


@dataclass(frozen=True, slots=True)
class Health:
    """Liveness or readiness: `ok` with an empty reason, `degraded` (and ready) or `failing` with what is wrong."""

    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConfigDocument:
    """The configuration in force as TOML, with secrets replaced by "***"."""

    toml: str


@dataclass(frozen=True, slots=True)
class PoolList:
    """Pools of this node."""

    pools: tuple[t.PoolInfo, ...]


@dataclass(frozen=True, slots=True)
class DeviceList:
    """GPUs of this node, those that cannot be used among them."""

    devices: tuple[t.DeviceInfo, ...]


@dataclass(frozen=True, slots=True)
class SessionList:
    """Live sessions of this node."""

    sessions: tuple[t.SessionInfo, ...]


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent by its address `agent@node`, and the node that it is on."""

    address: str
    node: str


@dataclass(frozen=True, slots=True)
class AgentList:
    """Agents of this node and of the nodes it knows."""

    agents: tuple[Agent, ...]


@dataclass(frozen=True, slots=True)
class PeerList:
    """Nodes that this one knows."""

    peers: tuple[t.PeerInfo, ...]


@dataclass(frozen=True, slots=True)
class NodeList:
    """All nodes of the store."""

    nodes: tuple[t.NodeInfo, ...]


@dataclass(frozen=True, slots=True)
class BackendList:
    """Configured backends."""

    backends: tuple[t.BackendInfo, ...]


@dataclass(frozen=True, slots=True)
class StorageReport:
    """The storage pools."""

    pools: tuple[t.StorageInfo, ...]


@dataclass(frozen=True, slots=True)
class RouteList:
    """What the planner has learned of routes."""

    routes: tuple[t.RouteCost, ...]


@dataclass(frozen=True, slots=True)
class TransferList:
    """Transfers, as they are now."""

    transfers: tuple[t.TransferStatus, ...]


@dataclass(frozen=True, slots=True)
class NotificationList:
    """Notifications that were taken out of the inbox, oldest first."""

    notifications: tuple[t.Notification, ...]


@dataclass(frozen=True, slots=True)
class HoldList:
    """Everything that is held."""

    holds: tuple[t.HoldInfo, ...]


@dataclass(frozen=True, slots=True)
class DiagnoseReport:
    """What was looked at, what was found, and what to do about it."""

    checks: tuple[t.Check, ...]


@dataclass(frozen=True, slots=True)
class QueryResults:
    """What was found of each item, in order."""

    results: tuple[t.QueryResult, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """How many bytes are in place."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Drained:
    """Whether nothing runs any more, and how many transfers still do."""

    drained: bool
    transfers_left: int


@dataclass(frozen=True, slots=True)
class LogLevel:
    """The level of the log in force, and the one before."""

    level: str
    previous: str
