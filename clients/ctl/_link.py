"""How a command reaches the daemon: the operator's verbs without a session, the others in a session of their own.

gRPC is imported when something is asked, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import DeadlineExceeded, PermissionDenied, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from xferd.api.errors import XferdError
    from xferd.clients.admin import AdminConnection
    from xferd.clients.ctl._output import Output
    from xferd.clients.sync import Client

GRPC_SOCKET = "grpc.sock"
PROBE_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 30.0
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options. ``grpc`` wins over ``socket``; with neither it is the default run directory's daemon."""

    socket: Path | None
    grpc: str
    token: str
    output: Output


def admin(settings: Settings, *, timeout_s: float = CALL_TIMEOUT_S) -> AdminConnection:
    """Return a connection for operator's verbs; ``timeout_s`` is of one call, beyond what it waits for on purpose.

    Raises:
        Unavailable: nobody listens at the Unix socket; ``__cause__`` has the system's error.
    """
    from xferd.clients.admin import AdminConnection

    target = settings.grpc
    if not target and settings.socket is not None:
        target = f"unix:{settings.socket.absolute().with_name(GRPC_SOCKET)}"
    connection = AdminConnection(target, token=settings.token, timeout_s=timeout_s)
    if connection.target.startswith(_UNIX):
        try:
            _probe(connection.target.removeprefix(_UNIX))
        except BaseException:
            connection.close()
            raise
    return connection


def _probe(path: str) -> None:
    """Connect once: the system's word is one line, and gRPC's is four."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PROBE_TIMEOUT_S)
            sock.connect(path)
    except OSError as exc:
        raise Unavailable(
            f"no daemon answers at {path}: {exc.strerror or exc}",
            remedy="start xferd, or name its session socket with --socket or $XFERD_SOCKET",
        ) from exc


def attach(settings: Settings) -> Client:
    """Open a session.

    Raises:
        Unavailable: no daemon answers, or it takes no new sessions.
    """
    from xferd.clients.sync import Client

    if settings.grpc:
        return Client.connect_grpc(settings.grpc, token=settings.token)
    return Client.connect(settings.socket, admin_token=settings.token)


def is_unreachable(error: XferdError) -> bool:
    """Say whether an error means that no daemon answered, as opposed to a daemon that said no."""
    cause = error.__cause__
    if cause is None or not isinstance(error, Unavailable | DeadlineExceeded | PermissionDenied):
        return False
    if isinstance(cause, OSError):
        return True
    import grpc

    from xferd.clients._errors import ERROR_METADATA

    if isinstance(cause, grpc.RpcError):
        trailer = cause.trailing_metadata() or ()
        return all(key != ERROR_METADATA for key, _ in trailer)
    return isinstance(cause, grpc.FutureTimeoutError)
