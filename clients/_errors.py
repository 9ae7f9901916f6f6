"""gRPC's errors as xferd's errors: the one place of the client library that reads ``grpc.RpcError``."""

from __future__ import annotations

from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from xferd.api import wire
from xferd.api.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
    XferdError,
)
from xferd.api.proto import xferd_v1_pb2 as pb

ERROR_METADATA = "xferd-error-bin"

_BY_STATUS: dict[grpc.StatusCode, type[XferdError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,  # gRPC's own: a message over the limit
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
}

_REMEDIES: dict[type[XferdError], str] = {
    Unavailable: "check that xferd runs there, then connect again",
    DeadlineExceeded: "the daemon did not answer; look at its log, or give the call more time",
    LimitExceeded: "send less in one message, or raise grpc.max_message",
    Unsupported: "the daemon is older than this client, or is no xferd",
}


class RpcFailure(Protocol):
    """The part of ``grpc.RpcError`` that both the sync and the async API raise; grpcio has no types of its own."""

    def code(self) -> grpc.StatusCode:
        """Return the status."""

    def details(self) -> str | None:
        """Return the status message."""

    def trailing_metadata(self) -> object:
        """Return pairs of key and value, or None."""


def error_of(failure: grpc.RpcError, target: str) -> XferdError:
    """Return the typed error of a failed call; raise it ``from`` the failure.

    What the daemon said travels in trailing metadata. Without it the call failed in gRPC itself, and the status
    code decides; the message then names ``target``.
    """
    rpc = cast(RpcFailure, failure)
    detail = _detail(rpc)
    if detail is not None:
        return wire.error_from_detail(detail)
    cls = _BY_STATUS.get(rpc.code(), InternalError)
    where = f"the daemon at {target} cannot be reached" if cls is Unavailable else f"call to the daemon at {target}"
    return cls(f"{where}: {rpc.details() or rpc.code().name}", remedy=_REMEDIES.get(cls, ""))


def _detail(rpc: RpcFailure) -> pb.ErrorDetail | None:
    metadata = cast("tuple[tuple[str, bytes], ...]", rpc.trailing_metadata() or ())
    raw = next((value for key, value in metadata if key == ERROR_METADATA), None)
    if raw is None:
        return None
    try:
        return pb.ErrorDetail.FromString(raw)
    except DecodeError:  # something between us and the daemon rewrote it; the status still says enough
        return None
