"""The REST face: an aiohttp server over the Engine protocol, on a Unix socket and, when configured, on TCP.

What it answers is in ``_table.py``; docs/rest.md shows every verb as a curl line. TLS is not done here: put a
terminating proxy in front of the Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from xferd.api.errors import Closed, ConfigError
from xferd.api.rest._adapter import Adapter
from xferd.api.rest._guard import Listen, guard
from xferd.api.rest._problems import problems
from xferd.api.rest._route import Settings
from xferd.api.rest._table import ROUTES

if TYPE_CHECKING:
    from xferd.api.engine import Engine

SOCKET_MODE = 0o660
"""Owner and group: who may reach the socket is the operator, where no admin token is configured."""

_LINE_NBYTES = 16384
_READ_NBYTES = 1 << 19
_SHUTDOWN_S = 0.5
"""How long requests under way are given at ``aclose``; the engine has drained before, so only waits are left."""

_LINGER_S = 1.0
"""How long a refused body is still read, so that its sender gets to see the answer."""

_log = structlog.get_logger("xferd.rest")


class RestFace:
    """Serves the table of routes until closed.

    Args:
        engine: answers everything; must outlive the face.
        socket_path: of the Unix socket, made with mode 0660; a dead one in its place is replaced.
        listen: "host:port" to listen on too, or "".
        admin_token: the token that ``engine.authenticate_admin`` wants, or "". The face needs to know that there
            is one; it compares nothing itself.
        session_ttl_s: how long a session lives without a call, where its opener does not say.
        max_body_nbytes: largest JSON body or metadata blob. Bytes of regions are streamed and not bounded by it.
            A JSON body is parsed in one go on the event loop, at roughly 10 ms a MiB.
        max_descriptors: longest list in a request.

    Raises:
        ConfigError: ``listen`` is no address, or one that others can reach without a token.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        socket_path: str,
        listen: str = "",
        admin_token: str = "",
        session_ttl_s: float = 60.0,
        max_body_nbytes: int = 8 << 20,
        max_descriptors: int = 1 << 20,
    ) -> None:
        self._socket_path = Path(socket_path)
        self._listen = Listen.parse(listen) if listen else None
        if self._listen is not None:
            self._listen.check(has_token=bool(admin_token))
        self._app = _application(
            Adapter(
                engine, Settings(session_ttl_s, max_body_nbytes, max_descriptors), has_admin_token=bool(admin_token)
            ),
            self._listen,
        )
        self._runner: web.AppRunner | None = None
        self._inode = 0
        self._address = ""
        self._closed = False

    @property
    def address(self) -> str:
        """The TCP address in use as "host:port", with the real port; "" without one, or before ``start``."""
        return self._address

    async def start(self) -> None:
        """Listen. Twice is fine; a failure leaves nothing open.

        Raises:
            ConfigError: the socket's path is too long, taken by something else, or not writable; or the TCP
                address cannot be listened on.
            Closed: after ``aclose``.
        """
        if self._closed:
            raise Closed("the REST face was closed", remedy="make a new one")
        if self._runner is not None:
            return
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            logger=_server_log(),
            handle_signals=False,
            handler_cancellation=True,  # who hangs up in a wait must not take notifications out of the inbox
            shutdown_timeout=_SHUTDOWN_S,
            lingering_time=_LINGER_S,
            auto_decompress=False,
            max_line_size=_LINE_NBYTES,
            read_bufsize=_READ_NBYTES,
        )
        try:
            await self._runner.setup()
            await self._start_unix(self._runner)
            if self._listen is not None:
                await self._start_tcp(self._runner, self._listen)
        except BaseException:
            await self.aclose()
            raise
        _log.info("rest.listening", socket=str(self._socket_path), address=self._address)

    async def aclose(self) -> None:
        """Stop listening, give requests under way a moment, remove the socket. Twice is fine."""
        self._closed = True
        runner, self._runner = self._runner, None
        try:
            if runner is not None:
                await runner.cleanup()
        finally:
            if self._inode:
                with contextlib.suppress(FileNotFoundError):
                    if self._socket_path.stat().st_ino == self._inode:  # not the one of a successor
                        self._socket_path.unlink()
                self._inode = 0

    async def _start_unix(self, runner: web.AppRunner) -> None:
        listener = bind_unix(self._socket_path)
        self._inode = self._socket_path.stat().st_ino
        await _UnixSite(runner, listener).start()

    async def _start_tcp(self, runner: web.AppRunner, listen: Listen) -> None:
        try:
            await web.TCPSite(runner, listen.host, listen.port).start()
        except OSError as exc:
            raise ConfigError(
                f"rest.listen {listen.host}:{listen.port}: {exc.strerror or exc}", remedy="choose another address"
            ) from exc
        host, port = next(address for address in runner.addresses if isinstance(address, tuple))[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _UnixSite(web.BaseSite):
    """A site on a socket that is bound already, which ``web.UnixSite`` cannot take."""

    def __init__(self, runner: web.AppRunner, listener: socket.socket) -> None:
        super().__init__(runner)
        self._listener = listener

    @property
    def name(self) -> str:
        return f"http://unix:{self._listener.getsockname()}:"

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        self._server = await loop.create_unix_server(server, sock=self._listener, backlog=self._backlog)


def bind_unix(path: Path) -> socket.socket:
    """Return a socket bound to ``path`` with mode 0660, never wider, not even for a moment.

    Raises:
        ConfigError: the path is too long or not writable, or something other than a dead socket is there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _remove_dead(path)
        os.fchmod(listener.fileno(), SOCKET_MODE)  # Linux gives the file this mode, less the umask
        listener.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"rest.socket {str(path)!r}: {exc.strerror or exc}",
            limit="a writable directory and at most 107 bytes",
            remedy="set node.run_dir or rest.socket",
        ) from exc
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_dead(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISSOCK(mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            if probe.connect_ex(str(path)) != 0:
                path.unlink()
                return
    raise ConfigError(
        f"rest.socket {str(path)!r} is in use", limit="one daemon", remedy="stop the other daemon, or set another path"
    )


def _application(adapter: Adapter, listen: Listen | None) -> web.Application:
    # Largest body: the adapter's own reader bounds bodies, with a better message than aiohttp's.
    app = web.Application(middlewares=[problems, guard(listen)], client_max_size=0)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, adapter.handler(route), expect_handler=_expect)
    app.on_response_prepare.append(_headers)
    return app


class _NotOurFault(logging.Filter):
    """Drops what aiohttp logs, with a traceback of the client's bytes, when someone sends what is no HTTP."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _server_log() -> logging.Logger:
    logger = logging.getLogger("xferd.rest.http")
    if not any(isinstance(item, _NotOurFault) for item in logger.filters):
        logger.addFilter(_NotOurFault())
    return logger


async def _expect(request: web.Request) -> None:
    """Do not ask for the body yet: ``Call.blocks`` does, once the request is known to be fair."""
    expected = request.headers.get(hdrs.EXPECT, "")
    if expected.lower() != "100-continue":
        raise web.HTTPExpectationFailed(text=f"Expect: {expected[:80]}")


async def _headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[hdrs.SERVER] = "xferd"
    response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
