"""What a route declares, and what its handler is given. The routes themselves are in ``_table.py``.

A route says all that both the server (``_adapter.py``) and the OpenAPI document (``_openapi.py``) need, so that
the two cannot drift apart.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from xferd.api.errors import InvalidArgument, LimitExceeded, XferdError
from xferd.api.rest._bodies import MIN_TTL_S, Query
from xferd.api.types import ENDED, Caller, PreparedHandle, RegionId, TransferId, TransferStatus

if TYPE_CHECKING:
    from aiohttp import StreamReader, web

    from xferd.api.engine import Engine

JSON = "application/json"
OCTETS = "application/octet-stream"
TEXT = "text/plain"
EVENTS = "text/event-stream"

SLICE_S = MIN_TTL_S / 2
"""A wait renews its session so often, so that a patient caller's session does not expire under it."""

Q = TypeVar("Q")
B = TypeVar("B")


class Auth(enum.Enum):
    """Whose token a route takes, as ``Authorization: Bearer``."""

    OPEN = "open"
    """Nobody's."""
    SESSION = "session"
    """A session's: the call owns or moves something."""
    ADMIN = "admin"
    """The operator's; where no admin token is configured, reaching the socket is enough."""
    EITHER = "either"
    """A session sees its own part, the operator all of it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the face was configured with, in seconds and bytes."""

    session_ttl_s: float
    max_body_nbytes: int
    max_descriptors: int


@dataclass(frozen=True, slots=True)
class Call(Generic[Q, B]):
    """One authenticated request. ``query`` and ``body`` are instances of the models that the route declares."""

    engine: Engine
    caller: Caller
    token: str
    query: Q
    body: B
    request: web.Request
    settings: Settings

    def renew(self) -> None:
        """Put off the session's expiry. Raises ``Unauthenticated`` if it ended meanwhile."""
        if self.caller.session is not None:
            self.engine.authenticate(self.token)

    def part(self, name: str) -> str:
        """Return a part of the path."""
        return self.request.match_info[name]

    def region(self) -> RegionId:
        """Return the region id in the path. Raises ``InvalidArgument`` if it is no number."""
        return RegionId(self._number("id"))

    def device(self) -> int:
        """Return the GPU's number in the path. Raises ``InvalidArgument`` if it is no number."""
        return self._number("index")

    def handle(self) -> PreparedHandle:
        """Return the prepared list's handle in the path. Raises ``InvalidArgument`` if it is no number."""
        return PreparedHandle(self._number("handle"))

    def transfer(self) -> TransferId:
        """Return the transfer id in the path."""
        return TransferId(self.part("id"))

    def _number(self, name: str) -> int:
        text = self.part(name)
        if not (text.isascii() and text.isdigit() and len(text) <= 20) or int(text) >= 1 << 64:
            raise InvalidArgument(
                f"{name} {text[:80]!r} in the path", limit="0 to 2**64 - 1", remedy="give the id as it was answered"
            )
        return int(text)

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield the request's body as it arrives, a bounded part at a time. Nothing is asked of the client before."""
        await self._continue()
        content: StreamReader = self.request.content
        async for block in content.iter_any():
            yield block

    async def raw(self) -> bytes:
        """Return the whole body.

        Raises:
            LimitExceeded: it is larger than the configured limit; at most that much was kept.
        """
        limit = self.settings.max_body_nbytes
        if (self.request.content_length or 0) > limit:
            raise _too_large(f"a body of {self.request.content_length} bytes", limit)
        body = bytearray()
        async for block in self.blocks():
            body += block
            if len(body) > limit:
                raise _too_large(f"a body of more than {limit} bytes", limit)
        return bytes(body)

    async def _continue(self) -> None:
        """Send the interim answer that a client with ``Expect`` waits for, now that the request is known to be fair."""
        if self.request.headers.get("Expect", "").lower() == "100-continue":
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.request.writer.output_size = 0

    async def wait_ended(self, transfer: TransferId, timeout_s: float) -> TransferStatus:
        """Return the transfer's status when it has ended or the time is over; the session does not expire under it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            left_s = deadline - loop.time()
            (status,) = await self.engine.wait(self.caller, (transfer,), max(0.0, min(left_s, SLICE_S)))
            if left_s <= SLICE_S or status.state in ENDED:
                return status
            self.renew()


def _too_large(what: str, limit: int) -> LimitExceeded:
    return LimitExceeded(what, limit=f"{limit} bytes", remedy="split the request, or use gRPC, which packs columns")


Handler = Callable[[Call[Any, Any]], Awaitable[object]]
"""Takes the call; returns a value of the route's answer type, or a response that it made itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers when all goes well.

    Attributes:
        shape: type of the JSON document (see ``_shapes.py``); None has none.
        status: HTTP status.
        media: media type of the body where it is not JSON.
        also: other statuses, with the same shape, and when they are answered.
        alternative: another media type, on a client's ``Accept``.
    """

    shape: object = None
    status: int = 200
    media: str = ""
    also: Mapping[int, str] | None = None
    alternative: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One verb of the face.

    Attributes:
        method: HTTP method.
        path: pattern, with parts like ``{id}``.
        handler: does it.
        auth: whose token it takes.
        answer: what it answers.
        query: model of the query string.
        body: type of the JSON body; None has none.
        optional_body: the JSON body may be left out, which gives each field its default.
        raw_body: the body is bytes, read by the handler as a stream.
        errors: errors with a meaning of their own; any other of the table may come as well.
    """

    method: str
    path: str
    handler: Handler
    auth: Auth
    answer: Answer
    query: type[Query] | None = None
    body: Any = None  # a type form: a model, or a union of models
    optional_body: bool = False
    raw_body: bool = False
    errors: Sequence[type[XferdError]] = ()

    @property
    def name(self) -> str:
        """Name of the operation, unique among routes."""
        return getattr(self.handler, "__name__", "")

    @property
    def summary(self) -> str:
        """First line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().split("\n", 1)[0]

    @property
    def description(self) -> str:
        """The rest of the handler's docstring, its lines joined."""
        _, _, rest = (self.handler.__doc__ or "").strip().partition("\n")
        return " ".join(rest.split())

    @property
    def tag(self) -> str:
        """Group of the route: what follows ``/v1/``."""
        parts = self.path.strip("/").split("/")
        return parts[1] if parts[0] == "v1" else "health"
