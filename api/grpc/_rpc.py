"""What every method of the gRPC face shares: the context's type, tokens off metadata, errors onto statuses.

A method is an adapter: it reads its request, asks the engine, writes its answer. ``answers`` goes around each of them
and is the only place where an error becomes a status.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

import grpc
import structlog

from xferd.api import wire
from xferd.api.errors import ERROR_TABLE, InternalError, Unauthenticated, XferdError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from google.protobuf.message import Message

    from xferd.api import types as t
    from xferd.api.engine import Sessions
    from xferd.api.proto import xferd_v1_pb2 as pb

ERROR_METADATA = "xferd-error-bin"
"""Trailing metadata with the serialised ``ErrorDetail`` of a failed call."""

# Clients refuse trailers of more than 8 KiB. Binary metadata grows by a third on its way, and the status message is
# percent-encoded to at most three times its bytes; with these limits both together stay below that.
_DETAIL_NBYTES = 3072
_STATUS_MESSAGE_NBYTES = 768
_SCHEME = "bearer "

_log = structlog.get_logger(__name__)


class Context(Protocol):
    """The part of ``grpc.aio.ServicerContext`` that the face uses; grpcio has no types of its own."""

    async def abort(self, code: object, details: str, trailing_metadata: Sequence[tuple[str, bytes]]) -> NoReturn:
        """End the call with a status, by an exception that must not be caught."""
        ...

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        """Return what the client sent along."""
        ...

    def peer(self) -> str:
        """Return "unix:...", "ipv4:..." or "ipv6:..."."""
        ...

    async def write(self, message: Message) -> None:
        """Send one message of a stream."""
        ...


S = TypeVar("S")
R = TypeVar("R")
Q = TypeVar("Q")
T = TypeVar("T")


def answers(
    method: Callable[[S, Q, Context], Awaitable[R]],
) -> Callable[[S, Q, Context], Awaitable[R]]:
    """Wrap a method: an ``XferdError`` becomes its status, anything else is logged and becomes ``InternalError``.

    A cancelled call passes through, so that what the engine does for it is cancelled too.
    """

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except XferdError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001 - the last line: whatever it is, the client gets an answer and the log the trace
            _log.exception("rpc.bug", method=method.__qualname__, peer=context.peer())
            await _abort(
                context,
                InternalError(
                    f"{method.__name__} met a bug of the daemon", remedy="see the daemon's log; please report it"
                ),
            )

    return wrapped


def _status_of(cls: type[XferdError]) -> str:
    return next(ERROR_TABLE[base].grpc for base in cls.__mro__ if base in ERROR_TABLE)


async def _abort(context: Context, error: XferdError) -> NoReturn:
    code = grpc.StatusCode[_status_of(type(error))]
    message = str(error).encode("utf-8", "backslashreplace")[:_STATUS_MESSAGE_NBYTES].decode("utf-8", "ignore")
    await context.abort(code, message, ((ERROR_METADATA, _bounded(error).SerializeToString()),))


def _bounded(error: XferdError) -> pb.ErrorDetail:
    """Return the detail, cut so that it fits into a trailer: routes from the last, then the texts."""
    detail = wire.error_to_detail(error)
    while detail.ByteSize() > _DETAIL_NBYTES and detail.routes_tried:
        del detail.routes_tried[-1]
    if detail.ByteSize() > _DETAIL_NBYTES:
        each = _DETAIL_NBYTES // 4
        for field in ("message", "limit", "remedy"):
            setattr(detail, field, getattr(detail, field).encode()[:each].decode("utf-8", "ignore"))
    return detail


# ------------------------------------------------------------------------------------------- callers


def token_of(context: Context) -> str:
    """Return the token of ``authorization: Bearer <token>``, or "" where there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return ""


def caller_of(engine: Sessions, context: Context) -> t.Caller:
    """Return the session that makes this call, or raise ``Unauthenticated``."""
    return engine.authenticate(token_of(context))


def reader_of(engine: Sessions, context: Context) -> t.Caller:
    """Return who asks for what sessions and operators may both do.

    A token that no session has is an operator's only where an admin token is configured and equals it: an expired
    session never turns into an operator.
    """
    token = token_of(context)
    if not token:
        return engine.authenticate_admin("")
    try:
        return engine.authenticate(token)
    except Unauthenticated:
        if not _has_admin_token(engine):
            raise
        return engine.authenticate_admin(token)


def _has_admin_token(engine: Sessions) -> bool:
    try:
        engine.authenticate_admin("")
    except Unauthenticated:
        return True
    return False


@contextlib.asynccontextmanager
async def closing(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an engine's stream when the call ends, not when the garbage collector comes by."""
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
