"""The OpenAPI 3.1 document, made from the table of routes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from xferd.api.errors import InternalError, InvalidArgument, Unauthenticated, XferdError
from xferd.api.rest._problems import PROBLEM, PROBLEM_SCHEMA, http_status
from xferd.api.rest._route import JSON, OCTETS, Auth, Route
from xferd.api.rest._shapes import COMPONENTS, Json, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.json_schema import JsonSchemaMode

_REF = COMPONENTS + "{model}"
_MODE: JsonSchemaMode = "validation"
_PROBLEM_CONTENT = {PROBLEM: {"schema": {"$ref": COMPONENTS + "Problem"}}}
_SECURITY: dict[Auth, list[dict[str, list[str]]]] = {
    Auth.OPEN: [],
    Auth.SESSION: [{"session": []}],
    Auth.ADMIN: [{"admin": []}, {}],
    Auth.EITHER: [{"session": []}, {"admin": []}, {}],
}
_DESCRIPTION = (
    "The admin face of one xferd node. Sizes are bytes, durations seconds, times UNIX seconds. 64-bit identifiers "
    "(region ids, prepared handles, epochs) are answered as decimal strings and taken as strings or integers. "
    "Failures are problem documents (RFC 9457) with a stable `code`."
)


def document(routes: Sequence[Route]) -> dict[str, Json]:
    """Return the document that describes ``routes``."""
    schemas: dict[str, Json] = {"Problem": PROBLEM_SCHEMA}
    paths: dict[str, dict[str, Json]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "xferd",
            "version": "1",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(route.tag for route in routes)],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "session": _bearer("The token of a session, from `POST /v1/sessions` or any other face."),
                "admin": _bearer("The operator's token; needed where the daemon is configured with one."),
            },
        },
    }


def _bearer(description: str) -> dict[str, str]:
    return {"type": "http", "scheme": "bearer", "description": description}


def _operation(route: Route, schemas: dict[str, Json]) -> dict[str, Json]:
    operation: dict[str, Json] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [route.tag],
        "security": _SECURITY[route.auth],
        "parameters": [*_path_parameters(route.path), *_query_parameters(route)],
        "responses": {**_successes(route, schemas), **_failures(route)},
    }
    if route.description:
        operation["description"] = route.description
    body = _body(route, schemas)
    if body:
        operation["requestBody"] = body
    return operation


def _path_parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _query_parameters(route: Route) -> list[Json]:
    if route.query is None:
        return []
    schema = route.query.model_json_schema(mode=_MODE)
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": item}
        for name, item in schema["properties"].items()
    ]


def _body(route: Route, schemas: dict[str, Json]) -> dict[str, Json]:
    if route.raw_body:
        return {"required": True, "content": {OCTETS: {"schema": {}}}}
    if route.body is None:
        return {}
    adapter: TypeAdapter[Any] = TypeAdapter(route.body)
    schema = adapter.json_schema(ref_template=_REF, mode=_MODE)
    schemas.update(schema.pop("$defs", {}))
    if "properties" in schema:  # a model of its own, not a union: give it its name
        name = schema["title"]
        schemas[name] = schema
        schema = {"$ref": COMPONENTS + name}
    return {"required": not route.optional_body, "content": {JSON: {"schema": schema}}}


def _successes(route: Route, schemas: dict[str, Json]) -> dict[str, Json]:
    answer = route.answer
    content: dict[str, Json] = {}
    if answer.shape is not None:
        shape = shape_of(answer.shape)
        schemas.update(shape.definitions)
        content[JSON] = {"schema": dict(shape.schema)}
    for media in filter(None, (answer.media, answer.alternative)):
        content[media] = {"schema": {} if media == OCTETS else {"type": "object" if media == JSON else "string"}}
    statuses = {answer.status: "Done.", **(answer.also or {})}
    return {
        str(status): {"description": text, **({"content": content} if content else {})}
        for status, text in statuses.items()
    }


def _failures(route: Route) -> dict[str, Json]:
    classes: list[type[XferdError]] = [*route.errors, InternalError]
    if route.auth is not Auth.OPEN:
        classes.append(Unauthenticated)
    if route.query is not None or route.body is not None or route.raw_body or "{" in route.path:
        classes.append(InvalidArgument)
    by_status: dict[int, list[str]] = {}
    for cls in classes:
        by_status.setdefault(http_status(cls), []).append(cls.code)
    found = {
        str(status): {"description": f"Code {' or '.join(dict.fromkeys(codes))}.", "content": _PROBLEM_CONTENT}
        for status, codes in sorted(by_status.items())
    }
    return {**found, "default": {"description": "Any other failure.", "content": _PROBLEM_CONTENT}}
