"""Where an object of a store that speaks S3 may be asked for by plain HTTP: signed addresses, and the server's own."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import obstore

if TYPE_CHECKING:
    from xferd.plugins.object.fetching import Address
    from xferd.plugins.object.options import StoreOptions

SIGNED_S, SIGNED_ANEW_S = 900.0, 300.0
"""How long a signed address is good for, and how long it is used: credentials may be renewed meanwhile."""

MAX_SIGNED = 4096
"""Addresses that are kept."""

RESOLVED_S = 30.0
"""How long the addresses of the endpoint are used before its name is looked up again."""


class Addresses:
    """Of one store. Used on one event loop.

    Args:
        client: obstore's, which signs.
        options: of the store; it has an endpoint.

    Attributes:
        host: where the endpoint can be reached, in the resolver's order, once ``resolve`` was asked.
    """

    def __init__(self, client: Any, options: StoreOptions) -> None:
        self._client = client
        self._options = options
        self._endpoint = urlsplit(options.endpoint)
        self._signed: dict[str, tuple[float, str]] = {}
        self._resolved_at = 0.0
        self.host: list[Address] = []

    async def of(self, key: str) -> str:
        """Return an address at which the object may be asked for, for some minutes."""
        if self._options.anonymous:
            bucket = "" if self._options.virtual_hosted else self._options.bucket
            path = "/".join(filter(None, (bucket, self._options.path, key)))
            return f"{self._options.endpoint.rstrip('/')}/{quote(path)}"
        now = time.monotonic()
        made_at, address = self._signed.get(key, (-SIGNED_ANEW_S, ""))
        if now - made_at >= SIGNED_ANEW_S:
            address = await obstore.sign_async(self._client, "GET", key, timedelta(seconds=SIGNED_S))
            if len(self._signed) >= MAX_SIGNED:
                self._signed.clear()
            self._signed[key] = now, address
        return address

    async def resolve(self) -> None:
        """Look up where the endpoint can be reached."""
        if self.host and time.monotonic() - self._resolved_at < RESOLVED_S:
            return
        host, port = self._endpoint.hostname, self._endpoint.port or 80
        rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.host, self._resolved_at = [(int(row[0]), row[4]) for row in rows], time.monotonic()

    def forget(self, key: str) -> None:
        """Have the object's address signed anew when it is needed again."""
        self._signed.pop(key, None)
