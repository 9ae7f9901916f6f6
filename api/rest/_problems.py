"""Errors as problem documents (RFC 9457), and the middleware that turns everything that is raised into one.

The codes and their HTTP statuses are those of ``api/errors.py``. What only HTTP knows (an unknown route, a wrong
method, a wrong media type) keeps the status that HTTP has for it and takes the nearest code of that table.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import structlog
from aiohttp import web

from xferd.api.errors import (
    ERROR_TABLE,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    XferdError,
)
from xferd.api.rest._shapes import ERROR_SCHEMA, Json, error_document

if TYPE_CHECKING:
    from pydantic import ValidationError

PROBLEM = "application/problem+json"

PROBLEM_SCHEMA: dict[str, Json] = {
    "type": "object",
    "description": "A problem document (RFC 9457). `code` never changes its meaning; `detail` is for people.",
    "properties": {
        "type": {"type": "string", "pattern": "^urn:xferd:error:[a-z_]+$"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string"},
        "instance": {"type": "string", "description": "Names this occurrence in the daemon's log, for `internal`."},
        **{name: ERROR_SCHEMA["properties"][name] for name in ("code", "limit", "remedy", "retryable", "routes_tried")},
    },
    "required": ["type", "title", "status", "detail", "code", "limit", "remedy", "retryable", "routes_tried"],
    "additionalProperties": False,
}

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = structlog.get_logger("xferd.rest")


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure of ``handler`` as a problem document; a bug of ours is logged with its traceback."""
    try:
        return await handler(request)
    except XferdError as error:
        return problem(error)
    except web.HTTPException as exc:
        return _http_problem(request, exc)
    except Exception as exc:  # noqa: BLE001 - the last stop: a bug in one request must not close the connection
        incident = secrets.token_hex(8)
        _log.error("rest.request_failed", method=request.method, path=request.path, incident=incident, exc_info=exc)
        bug = InternalError("a bug in the daemon", remedy=f"look for incident {incident} in the log of the node")
        return problem(bug, instance=f"urn:xferd:incident:{incident}")


def problem(error: XferdError, *, status: int = 0, instance: str = "") -> web.Response:
    """Return the problem document of an error; ``status`` 0 takes the one of the error table."""
    status = status or http_status(type(error))
    record = error_document(error)
    document = {
        "type": f"urn:xferd:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status,
        "detail": record.pop("message"),
        **record,
    }
    if instance:
        document["instance"] = instance
    response = web.Response(status=status, body=json.dumps(document).encode() + b"\n", content_type=PROBLEM)
    if status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="xferd"'
    return response


def http_status(cls: type[XferdError]) -> int:
    """Return the HTTP status of an error class; one that the table lacks has its nearest base's."""
    return next(ERROR_TABLE[base].http for base in cls.__mro__ if base in ERROR_TABLE)


def invalid(error: ValidationError, where: str) -> InvalidArgument:
    """Return the error for a body or query that its model refused; it names the first field, and counts the rest."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    field = ".".join(str(part) for part in first["loc"]) or where
    value = "" if first["type"] in ("missing", "json_invalid") else f", got {_short(first['input'])}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return InvalidArgument(
        f"{where}: {field}: {first['msg']}{value}{more}", remedy="/openapi.json describes the request"
    )


def _short(value: object) -> str:
    if isinstance(value, list | dict):  # never the repr of a million rows
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 512:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 96 else text[:93] + "..."


def _http_problem(request: web.Request, exc: web.HTTPException) -> web.Response:
    error: XferdError
    if isinstance(exc, web.HTTPNotFound):
        error = NotFound(f"no route {request.path!r}", remedy="GET / lists the routes")
    elif isinstance(exc, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exc.allowed_methods))
        error = InvalidArgument(f"method {request.method} on {request.path!r}", limit=allowed, remedy="use one of them")
    elif isinstance(exc, web.HTTPRequestEntityTooLarge):
        error = LimitExceeded("the body is too large", limit=exc.text or "", remedy="split the request, or use gRPC")
    elif exc.status == 401:
        error = Unauthenticated(exc.reason)
    elif exc.status == 403:
        error = PermissionDenied(exc.reason)
    else:
        error = InvalidArgument(exc.text or exc.reason)
    response = problem(error, status=exc.status)
    if "Allow" in exc.headers:
        response.headers["Allow"] = exc.headers["Allow"]
    return response
