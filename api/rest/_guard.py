"""Who may reach the face at all: where it may listen, and which browsers it does not listen to.

A Unix socket has the file system's permissions. A TCP port on loopback is open to every local process, and to every
web page that a local browser shows: a page may send simple requests to it, and a name that its owner points at
127.0.0.1 makes the answers readable too (DNS rebinding). Hence the checks of Host and Origin.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from xferd.api.errors import ConfigError, PermissionDenied

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

    from xferd.api.rest._problems import Handler


@dataclass(frozen=True, slots=True)
class Listen:
    """A TCP address to listen on; port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Return "host:port" or "[v6]:port" as an address.

        Raises:
            ConfigError: it is neither.
        """
        try:
            parts = urlsplit(f"//{text}")
            if parts.hostname and parts.port is not None and parts.netloc == text and "@" not in text:
                return cls(parts.hostname, parts.port)
        except ValueError:
            pass
        raise ConfigError(f"rest.listen is {text!r}", limit="host:port", remedy='write "127.0.0.1:9480"')

    def check(self, *, has_token: bool) -> None:
        """Refuse an address that others can reach where no token protects it.

        Raises:
            ConfigError: the address is not loopback and there is no admin token.
        """
        if not has_token and not self.is_loopback():
            raise ConfigError(
                f"rest.listen is {self.host!r} and there is no admin token",
                limit="loopback without a token",
                remedy="set rest.token_file, or listen on 127.0.0.1",
            )

    def is_loopback(self) -> bool:
        """Say whether only this machine can reach it. A name other than localhost counts as reachable."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def guard(listen: Listen | None) -> Middleware:
    """Return the middleware that refuses requests over TCP that a foreign web page may have caused."""
    names = {"localhost", socket.gethostname().lower()}
    if listen is not None:
        names.add(listen.host.lower())

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _over_tcp(request):
            _check_host(request, names)
            _check_origin(request)
        return await handler(request)

    return check


def _over_tcp(request: web.Request) -> bool:
    connection = request.get_extra_info("socket")
    return connection is None or connection.family != socket.AF_UNIX


def _check_host(request: web.Request, names: set[str]) -> None:
    host = request.headers.get(hdrs.HOST, "")
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        name = ""
    if name in names or _is_address(name):
        return
    raise PermissionDenied(
        f"host {host[:80]!r} is not this node",
        limit="an IP address, or " + ", ".join(sorted(names)),
        remedy="use the address that the daemon listens on",
    )


def _check_origin(request: web.Request) -> None:
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and urlsplit(origin).netloc != request.headers.get(hdrs.HOST, ""):
        raise PermissionDenied(
            f"a request of the web page {origin[:80]!r}", limit="the own origin", remedy="call from outside a browser"
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
