"""Ids and enumerations of the contract. ``types.py``, whose they are, hands them out."""

from __future__ import annotations

import enum
from typing import NewType

SessionId = NewType("SessionId", str)
TransferId = NewType("TransferId", str)
RegionId = NewType("RegionId", int)
"""``generation << 32 | slot``: an id is never given twice, so that a stale one is noticed."""
PreparedHandle = NewType("PreparedHandle", int)


class MemoryKind(enum.Enum):
    """What sort of memory a region is; the values are the names of the wire."""

    DRAM = "DRAM"
    VRAM = "VRAM"
    FILE = "FILE"
    OBJECT = "OBJECT"
    BLOCK = "BLOCK"


class RegionSource(enum.Enum):
    """Where a region's bytes live, which decides how they can be reached."""

    POOL = "POOL"
    MEMFD = "MEMFD"
    PRIVATE = "PRIVATE"
    PATH = "PATH"
    FD = "FD"
    OBJECT = "OBJECT"
    DEVICE = "DEVICE"


class Access(enum.Flag):
    """What others than the owner may do with a region; the owner may always do both."""

    NONE = 0
    READ = 1
    WRITE = 2
    READ_WRITE = 3


class TransferOp(enum.Enum):
    """READ pulls the remote list into the local one, WRITE pushes the local list into the remote one."""

    READ = "READ"
    WRITE = "WRITE"


class TransferState(enum.Enum):
    """The states of a transfer; ``daemon/engine/states.py`` has the table of transitions."""

    __hash__ = object.__hash__  # members are unique, and Enum's own is Python code on the way of each small transfer

    PREPARED = "PREPARED"
    POSTED = "POSTED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({TransferState.DONE, TransferState.FAILED, TransferState.CANCELLED})
"""States in which no byte of the transfer moves any more."""


class Priority(enum.Enum):
    """Class of a transfer for the scheduler; order within a class is round robin by transfer."""

    __hash__ = object.__hash__  # as above

    LOW = "LOW"
    NORMAL = "NORMAL"
    HIGH = "HIGH"


class PeerState(enum.Enum):
    """How this node sees another one."""

    UNKNOWN = "UNKNOWN"
    JOINING = "JOINING"
    READY = "READY"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"
    GONE = "GONE"


class CheckState(enum.Enum):
    """How a check of the daemon's surroundings ended; what does not apply is OK, and the finding says so."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


class Transport(enum.Enum):
    """How a session came about; its values stand in listings."""

    SOCKET = "socket"
    GRPC = "grpc"
    REST = "rest"
