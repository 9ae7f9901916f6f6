"""From a declared route to a handler of aiohttp: authenticate, parse, call, encode.

The order matters: nothing of a body is read, let alone asked for, before its sender is known.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web
from pydantic import TypeAdapter, ValidationError

from xferd.api.errors import InvalidArgument, Unauthenticated
from xferd.api.rest._problems import Handler, invalid, problem
from xferd.api.rest._route import JSON, OCTETS, Auth, Call, Route, Settings
from xferd.api.rest._shapes import Json, shape_of
from xferd.api.types import Caller

if TYPE_CHECKING:
    from xferd.api.engine import Engine


class Adapter:
    """Makes aiohttp handlers out of routes, for one engine."""

    def __init__(self, engine: Engine, settings: Settings, *, has_admin_token: bool) -> None:
        self._engine = engine
        self._settings = settings
        self._has_admin_token = has_admin_token

    def handler(self, route: Route) -> Handler:
        """Return the handler of a route."""
        adapter: TypeAdapter[Any] | None = None if route.body is None else TypeAdapter(route.body)
        encode = None if route.answer.shape is None else shape_of(route.answer.shape).encode

        async def handle(request: web.Request) -> web.StreamResponse:
            token = bearer(request)
            call: Call[Any, Any] = Call(
                self._engine, self._authenticate(route.auth, token), token, None, None, request, self._settings
            )
            refused = _check_media(request, route)
            if refused is not None:
                return refused
            query = _query(request, route)
            if adapter is not None:
                body = _body(await call.raw(), adapter, route)
                call = Call(self._engine, call.caller, token, query, body, request, self._settings)
            elif query is not None:
                call = Call(self._engine, call.caller, token, query, None, request, self._settings)
            answer = await route.handler(call)
            if isinstance(answer, web.StreamResponse):
                return answer
            if encode is None:
                return web.Response(status=route.answer.status)
            return _json(route.answer.status, encode(answer))

        return handle

    def _authenticate(self, auth: Auth, token: str) -> Caller:
        if auth is Auth.OPEN:
            return Caller(None, "")
        if auth is Auth.SESSION:
            return self._engine.authenticate(token)
        if auth is Auth.ADMIN or not token:
            return self._engine.authenticate_admin(token)
        try:
            return self._engine.authenticate(token)
        except Unauthenticated:
            # Without an admin token any token would pass for the operator's, so that a session which expired would
            # suddenly see everything. Who wants to be the operator there sends none.
            if not self._has_admin_token:
                raise
            return self._engine.authenticate_admin(token)


def bearer(request: web.Request) -> str:
    """Return the token of the Authorization header, "" without one.

    Raises:
        Unauthenticated: the header has another scheme.
    """
    header = request.headers.get(hdrs.AUTHORIZATION, "")
    scheme, _, token = header.partition(" ")
    if header and scheme.lower() != "bearer":
        raise Unauthenticated(
            f"authorization scheme {scheme[:32]!r}", limit="Bearer", remedy="send Authorization: Bearer <token>"
        )
    return token.strip()


def _check_media(request: web.Request, route: Route) -> web.Response | None:
    """Return the 415 for a body whose type the route does not take, or None.

    Also a defence: a web page cannot send application/json across origins without asking first.
    """
    if not request.body_exists:
        return None
    wanted = OCTETS if route.raw_body else JSON
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity")
    if encoding != "identity":
        error = InvalidArgument(f"content encoding {encoding[:32]!r}", limit="identity", remedy="send it uncompressed")
        return problem(error, status=415)
    given = request.content_type if hdrs.CONTENT_TYPE in request.headers else ""
    if given == wanted or (not given and route.raw_body):
        return None
    error = InvalidArgument(
        f"a body of media type {given or 'unknown'!r}", limit=wanted, remedy=f"send Content-Type: {wanted}"
    )
    return problem(error, status=415)


def _query(request: web.Request, route: Route) -> Any:
    pairs = request.query
    if route.query is None:
        if pairs:
            raise InvalidArgument(
                f"query parameter {next(iter(pairs))[:80]!r}", limit="none here", remedy="leave it out"
            )
        return None
    for name in pairs:
        if len(pairs.getall(name)) > 1:
            raise InvalidArgument(f"query parameter {name[:80]!r} is given twice", limit="once", remedy="give it once")
    try:
        return route.query.model_validate(dict(pairs))
    except ValidationError as exc:
        raise invalid(exc, "query") from exc


def _body(raw: bytes, adapter: TypeAdapter[Any], route: Route) -> Any:
    if not raw and route.optional_body:
        raw = b"{}"
    try:
        return adapter.validate_json(raw)
    except ValidationError as exc:
        raise invalid(exc, "body") from exc


def _json(status: int, document: Json) -> web.Response:
    body = json.dumps(document, allow_nan=False, separators=(",", ":")).encode() + b"\n"  # kind to terminals
    return web.Response(status=status, body=body, content_type=JSON)
