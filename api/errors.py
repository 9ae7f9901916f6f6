"""Every error that xferd reports, and the one table that gives each its gRPC status and HTTP status.

A class answers: whose fault is it, and is a retry worth while? Areas do not invent errors of their own, because
an error must survive the trip to a client in another language: what travels is ``code``, a stable name.
Translating the errors of libraries happens at their seams, not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class XferdError(Exception):
    """Root of all errors of xferd.

    Attributes:
        code: stable name of the error, the same in every language.
        retryable: the same call may succeed later, unchanged.
        limit: the limit that was met, or "".
        remedy: what the receiver can do about it, or "".
        routes_tried: "backend: reason" for each route of a transfer that ran out of routes.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, limit: str = "", remedy: str = "", routes_tried: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.limit = limit
        self.remedy = remedy
        self.routes_tried = routes_tried

    def __str__(self) -> str:
        parts = [self.message]
        if self.limit:
            parts.append(f"limit: {self.limit}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        parts.extend(f"tried {route}" for route in self.routes_tried)
        return "; ".join(parts)


class InternalError(XferdError):
    """A bug of ours. The log of the node has the traceback, under the same cause id."""


class InvalidArgument(XferdError):
    """The request itself is wrong and will be wrong again; nothing was changed."""

    code = "invalid_argument"


class InvalidDescriptor(InvalidArgument):
    """A descriptor list is malformed: misaligned or unequal columns, length 0, an end past 2**64 - 1."""

    code = "invalid_descriptor"


class SizeMismatch(InvalidArgument):
    """The local and the remote list of a transfer differ in total bytes."""

    code = "size_mismatch"


class OutOfBounds(InvalidArgument):
    """A span reaches past the end of its region. The message names the first such row."""

    code = "out_of_bounds"


class ConfigError(InvalidArgument):
    """The configuration is wrong: an unknown key, a value out of range, a file that cannot be read."""

    code = "config"


class Unauthenticated(XferdError):
    """No token, or one that no live session has."""

    code = "unauthenticated"


class PermissionDenied(XferdError):
    """The caller is known and may not do this: a foreign region, access not granted, a path outside the roots."""

    code = "permission_denied"


class NotFound(XferdError):
    """No object of this kind has this id or name here; it may have existed."""

    code = "not_found"


class AlreadyExists(XferdError):
    """The name is taken: an agent's live session, or an idempotency key used for another request."""

    code = "already_exists"


class InvalidState(XferdError):
    """The object exists but cannot do this now, for example a post of a transfer that is running."""

    code = "invalid_state"


class Busy(XferdError):
    """The object is in use, for example a region to be freed while a transfer moves its bytes."""

    code = "busy"
    retryable = True


class Stale(XferdError):
    """The reference is to something that has gone: a region's old generation, or a node's old epoch.

    Ask for the region's record again and prepare again; the old reference never becomes good again.
    """

    code = "stale"


class LimitExceeded(XferdError):
    """One request asks for more than the configured limit on one request."""

    code = "limit_exceeded"


class PoolExhausted(XferdError):
    """The pool has no room for the group. Nothing was allocated."""

    code = "pool_exhausted"
    retryable = True


class Overloaded(XferdError):
    """A bounded queue is full: an agent's inbox, a session's transfers, staging memory."""

    code = "overloaded"
    retryable = True


class WouldBlock(XferdError):
    """A ``*_nowait`` call would have had to wait."""

    code = "would_block"
    retryable = True


class DeadlineExceeded(XferdError):
    """The deadline passed. For a transfer: it has come to rest and part of its bytes may have moved."""

    code = "deadline_exceeded"
    retryable = True


class Cancelled(XferdError):
    """The work was cancelled by its owner, and has come to rest."""

    code = "cancelled"


class Unsupported(XferdError):
    """This daemon, session or backend cannot do this; another may."""

    code = "unsupported"


class NoRoute(XferdError):
    """No backend, nor chain of backends, can move between these places, or every route was tried and failed."""

    code = "no_route"


class Unavailable(XferdError):
    """The daemon is draining or stopping, or not up yet."""

    code = "unavailable"
    retryable = True


class Closed(XferdError):
    """You closed this object yourself, and used it afterwards."""

    code = "closed"


class PeerUnknown(XferdError):
    """No node of this name is configured, imported or registered."""

    code = "peer_unknown"


class PeerLost(XferdError):
    """The connection to the node broke, or could not be made, or its lease ended.

    ``__cause__`` holds the system's error where there was one. What was written to the peer may have arrived.
    """

    code = "peer_lost"
    retryable = True


class DeviceLost(XferdError):
    """A device worker ended, or did not answer in time and was killed; what it had mapped is let go of.

    The next use starts a new worker, which maps again what still lives. Memory of the daemon's own pool on that device
    is gone if its owner was the worker that died. ``__cause__`` holds nothing.
    """

    code = "device_lost"
    retryable = True


class ProtocolViolation(XferdError):
    """The other side sent something that the protocol forbids: a wrong magic, version, size or proof."""

    code = "protocol_violation"


class AgentUnknown(XferdError):
    """The agent that a notification is for has no session on its node."""

    code = "agent_unknown"


class ShortTransfer(XferdError):
    """Fewer bytes moved than asked, for example from a file that is shorter than the read."""

    code = "short_transfer"


class IntegrityError(XferdError):
    """Bytes arrived that are not those that were sent."""

    code = "integrity"


class MoveFailed(XferdError):
    """The system refused to move bytes; ``__cause__`` is the OSError, and the message names its errno."""

    code = "move_failed"
    retryable = True


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """What a face answers for an error: the name of the gRPC status code, and the HTTP status."""

    grpc: str
    http: int


ERROR_TABLE: dict[type[XferdError], ErrorStatus] = {
    InvalidArgument: ErrorStatus("INVALID_ARGUMENT", 400),
    InvalidDescriptor: ErrorStatus("INVALID_ARGUMENT", 400),
    SizeMismatch: ErrorStatus("INVALID_ARGUMENT", 400),
    ConfigError: ErrorStatus("INVALID_ARGUMENT", 400),
    OutOfBounds: ErrorStatus("OUT_OF_RANGE", 416),
    Unauthenticated: ErrorStatus("UNAUTHENTICATED", 401),
    PermissionDenied: ErrorStatus("PERMISSION_DENIED", 403),
    NotFound: ErrorStatus("NOT_FOUND", 404),
    PeerUnknown: ErrorStatus("NOT_FOUND", 404),
    AgentUnknown: ErrorStatus("NOT_FOUND", 404),
    AlreadyExists: ErrorStatus("ALREADY_EXISTS", 409),
    InvalidState: ErrorStatus("FAILED_PRECONDITION", 409),
    Busy: ErrorStatus("FAILED_PRECONDITION", 409),
    Closed: ErrorStatus("FAILED_PRECONDITION", 409),
    Stale: ErrorStatus("FAILED_PRECONDITION", 410),
    Cancelled: ErrorStatus("CANCELLED", 409),
    LimitExceeded: ErrorStatus("RESOURCE_EXHAUSTED", 413),
    PoolExhausted: ErrorStatus("RESOURCE_EXHAUSTED", 507),
    Overloaded: ErrorStatus("RESOURCE_EXHAUSTED", 429),
    WouldBlock: ErrorStatus("UNAVAILABLE", 503),
    Unavailable: ErrorStatus("UNAVAILABLE", 503),
    Unsupported: ErrorStatus("UNIMPLEMENTED", 501),
    NoRoute: ErrorStatus("UNIMPLEMENTED", 501),
    DeadlineExceeded: ErrorStatus("DEADLINE_EXCEEDED", 504),
    PeerLost: ErrorStatus("UNAVAILABLE", 502),
    DeviceLost: ErrorStatus("UNAVAILABLE", 503),
    ProtocolViolation: ErrorStatus("INTERNAL", 502),
    ShortTransfer: ErrorStatus("DATA_LOSS", 500),
    IntegrityError: ErrorStatus("DATA_LOSS", 500),
    MoveFailed: ErrorStatus("INTERNAL", 500),
    InternalError: ErrorStatus("INTERNAL", 500),
    XferdError: ErrorStatus("INTERNAL", 500),
}

ERRORS_BY_CODE: dict[str, type[XferdError]] = {cls.code: cls for cls in ERROR_TABLE if cls is not XferdError}


def error_for_code(code: str) -> type[XferdError]:
    """Return the class for a code off the wire; a code from a newer daemon gives the root class."""
    return ERRORS_BY_CODE.get(code, XferdError)
