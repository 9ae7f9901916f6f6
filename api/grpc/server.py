"""The gRPC face: one server on a Unix socket and, where configured, on TCP.

What the methods do is in the modules named like their services; how errors travel is in ``_rpc.py``.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from xferd.api.errors import Closed, ConfigError
from xferd.api.grpc.admin import AdminServicer
from xferd.api.grpc.memory import MemoryServicer
from xferd.api.grpc.metadata import MetadataServicer
from xferd.api.grpc.sessions import SessionServicer
from xferd.api.grpc.transfers import NotificationServicer, TransferServicer
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.api.engine import Engine

_SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_SOCKET_MODE = 0o660
_SOCKET_PATH_NBYTES = 107  # sun_path less its NUL

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of the TCP listener. With ``client_ca`` a client must show a certificate that it signed."""

    cert: str
    key: str
    client_ca: str = ""


class GrpcFace:
    """Serve ``xferd.v1`` with health and reflection. An async context manager; ``start`` and ``aclose`` do the same.

    Args:
        engine: who does the work.
        socket_path: of the Unix socket; made with mode 0660, removed on closing.
        listen: "host:port" for TCP as well, port 0 for a free one; "" for none.
        admin_token: what a client that comes over TCP must show to open a session. (The engine checks the token of
            AdminService itself.)
        tls: encrypts the TCP listener.
        max_message_nbytes: of one message, in either direction. A larger request is refused by gRPC itself with
            RESOURCE_EXHAUSTED and no ErrorDetail.
        max_descriptors: in one list of one request.

    Raises:
        ConfigError: ``listen`` is no address, or is not loopback and has neither token nor client CA.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        socket_path: str,
        listen: str = "",
        admin_token: str = "",
        tls: TlsFiles | None = None,
        max_message_nbytes: int = 64 << 20,
        max_descriptors: int = 1 << 20,
    ) -> None:
        if listen:
            check_listen(listen, authenticated=bool(admin_token or (tls and tls.client_ca)))
        self._socket_path = Path(socket_path)
        self._listen = listen
        self._tls = tls
        self._port = 0
        self._max_message_nbytes = max_message_nbytes
        self._sessions = SessionServicer(engine, admin_token)
        self._transfers = TransferServicer(engine, max_descriptors)
        self._engine = engine
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._closed = False

    @property
    def socket_path(self) -> str:
        """The Unix socket's path."""
        return str(self._socket_path)

    @property
    def port(self) -> int:
        """The TCP port, once started; 0 without one."""
        return self._port

    async def start(self) -> None:
        """Listen and serve; health says NOT_SERVING until ``set_serving(True)``.

        Raises:
            ConfigError: a socket or port cannot be had; the message says which.
            Closed: the face was closed; it serves once.
        """
        if self._closed:
            raise Closed("the gRPC face was closed", remedy="make a new one")
        if self._server is not None:
            return
        server = grpc.aio.server(options=self._options())
        self._register(server)
        await self.set_serving(False)
        try:
            self._bind_socket(server)
            if self._listen:
                self._bind_tcp(server)
            await server.start()
        except BaseException:
            await server.stop(None)
            raise
        self._server = server
        _log.info("grpc.listening", socket=str(self._socket_path), listen=self._listen, port=self._port)

    async def set_serving(self, serving: bool) -> None:
        """Let the health service answer SERVING or NOT_SERVING, for the server and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def aclose(self, grace_s: float = 0.0) -> None:
        """End the sessions of all streams, refuse new calls, give running ones ``grace_s``, cancel the rest.

        The socket file is gone afterwards, and no call runs any more. Twice is fine.
        """
        self._closed = True
        server, self._server = self._server, None
        if server is None:
            return
        try:
            await self.set_serving(False)
            await self._sessions.end_all()
            await server.stop(grace_s or None)
            await self._sessions.join()
        finally:
            self._socket_path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- starting

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self._max_message_nbytes),
            ("grpc.max_send_message_length", self._max_message_nbytes),
            # Two daemons on one port would share its clients by chance.
            ("grpc.so_reuseport", 0),
            # A session is a silent stream: only pings show that a client on another host has died. They are rare
            # enough not to show on an idle node, and clients may send as many of their own.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]

    def _register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_SessionServiceServicer_to_server(self._sessions, server)
        pb_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(self._engine), server)
        pb_grpc.add_TransferServiceServicer_to_server(self._transfers, server)
        pb_grpc.add_NotificationServiceServicer_to_server(NotificationServicer(self._engine), server)
        pb_grpc.add_MetadataServiceServicer_to_server(MetadataServicer(self._engine), server)
        pb_grpc.add_AdminServiceServicer_to_server(AdminServicer(self._engine), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def _bind_socket(self, server: grpc.aio.Server) -> None:
        path = self._socket_path
        if len(os.fsencode(path)) > _SOCKET_PATH_NBYTES:
            raise ConfigError(
                f"grpc.socket {str(path)!r} has {len(os.fsencode(path))} bytes",
                limit=f"{_SOCKET_PATH_NBYTES} bytes, the system's for a Unix socket",
                remedy="use a shorter node.run_dir",
            )
        _remove_stale(path)
        try:
            server.add_insecure_port(f"unix:{path}")
            path.chmod(_SOCKET_MODE)
        except (RuntimeError, OSError) as exc:
            raise ConfigError(
                f"cannot listen on the socket {str(path)!r}: {exc}", remedy="check that its folder exists and is yours"
            ) from exc

    def _bind_tcp(self, server: grpc.aio.Server) -> None:
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self._listen)
            else:
                self._port = server.add_secure_port(self._listen, _credentials(self._tls))
        except RuntimeError as exc:
            raise ConfigError(
                f"cannot listen on grpc.listen {self._listen!r}: {exc}", remedy="free the port, or use another"
            ) from exc


def check_listen(listen: str, *, authenticated: bool) -> None:
    """Check "host:port" of a TCP listener.

    Raises:
        ConfigError: it does not parse, or another host could reach it while nobody has to say who they are.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"grpc.listen is {listen!r}", limit="host:port, port 0 to 65535", remedy="127.0.0.1:9481")
    if not authenticated and not _is_loopback(host.removeprefix("[").removesuffix("]")):
        raise ConfigError(
            f"grpc.listen {listen!r} can be reached from other hosts without authentication",
            limit="loopback addresses only",
            remedy="set grpc.token_file, or grpc.tls_cert, tls_key and tls_client_ca, or listen on 127.0.0.1",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # any other name may resolve to anything


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. gRPC would take over a living one without a word."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"grpc.socket {str(path)!r} exists and is no socket", remedy="move the file, or the socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as exc:
            raise ConfigError(f"grpc.socket {str(path)!r} cannot be probed: {exc}", remedy="remove it") from exc
    raise ConfigError(
        f"grpc.socket {str(path)!r} is served by another process",
        limit="one daemon a socket",
        remedy="stop the other daemon, or give this one a node.run_dir of its own",
    )


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        pair = (Path(tls.key).read_bytes(), Path(tls.cert).read_bytes())
        client_ca = Path(tls.client_ca).read_bytes() if tls.client_ca else None
    except OSError as exc:
        raise ConfigError(f"TLS file {exc.filename!r}: {exc.strerror}", remedy="check grpc.tls_*") from exc
    return grpc.ssl_server_credentials([pair], root_certificates=client_ca, require_client_auth=client_ca is not None)
