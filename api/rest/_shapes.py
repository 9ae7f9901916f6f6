"""How a value of ``api/types.py`` looks in JSON: its encoder and its JSON Schema, both made from its type hints.

One walk over the hints yields both, so that what is answered and what the OpenAPI document says cannot differ.
Sizes are JSON integers. 64-bit identifiers (region ids, prepared handles, epochs) are decimal strings, because
JavaScript rounds integers past 2**53. Enumerations are their names and bytes are base64.
What comes in is not here but in ``_bodies.py``.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from xferd.api.errors import ERRORS_BY_CODE, XferdError
from xferd.api.types import PreparedHandle, RegionId

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Json: TypeAlias = Any
"""Whatever ``json.dumps`` takes; a seam without types."""

COMPONENTS = "#/components/schemas/"

_ID_FIELDS = frozenset({"epoch"})
_ID_TYPES = (RegionId, PreparedHandle)
_NAMES = {"XferdError": XferdError, "ListSpec": object}
"""What ``api/types.py`` imports for type checkers only."""

_DECIMAL = {"type": "string", "pattern": "^[0-9]{1,20}$"}
_SCALARS: dict[object, dict[str, Json]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A type as JSON. ``schema`` refers to ``definitions`` by component name."""

    encode: Callable[[Any], Json]
    schema: Mapping[str, Json]
    definitions: Mapping[str, Json] = field(default_factory=dict)


@functools.cache
def shape_of(hint: object) -> Shape:
    """Return the shape of a dataclass of the contract, or of any type such a dataclass is made of.

    Raises:
        TypeError: a hint that has no JSON form here; add one rather than answer something loose.
    """
    if hint in _SCALARS:
        return Shape(_same, _SCALARS[hint])
    if hint is bytes:
        return Shape(_base64, {"type": "string", "contentEncoding": "base64"})
    if hint is XferdError:
        return Shape(error_document, {"$ref": COMPONENTS + "Error"}, {"Error": ERROR_SCHEMA})
    if isinstance(hint, typing.NewType):
        return Shape(str, _DECIMAL) if hint in _ID_TYPES else shape_of(hint.__supertype__)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_shape(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record_shape(hint)
    return _generic_shape(hint)


def error_document(error: XferdError) -> dict[str, Json]:
    """Return an error as the contract's fields, as it stands in a failed transfer and in a problem document."""
    return {
        "code": error.code,
        "message": error.message,
        "limit": error.limit,
        "remedy": error.remedy,
        "retryable": error.retryable,
        "routes_tried": list(error.routes_tried),
    }


_STRING = {"type": "string"}
ERROR_SCHEMA: dict[str, Json] = {
    "type": "object",
    "description": "One error: a stable code, the value that was wrong, the limit it met and what to do about it.",
    "properties": {
        "code": {"type": "string", "enum": sorted(ERRORS_BY_CODE)},
        "message": _STRING,
        "limit": _STRING,
        "remedy": _STRING,
        "retryable": {"type": "boolean"},
        "routes_tried": {"type": "array", "items": _STRING},
    },
    "required": ["code", "message", "limit", "remedy", "retryable", "routes_tried"],
    "additionalProperties": False,
}


def _same(value: Json) -> Json:
    return value


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _enum_shape(hint: type[enum.Enum]) -> Shape:
    if issubclass(hint, enum.Flag):
        names = list(hint.__members__)
        schema = {"type": "string", "enum": names, "description": _summary(hint)}
        return Shape(lambda value: value.name, {"$ref": COMPONENTS + hint.__name__}, {hint.__name__: schema})
    schema = {"type": "string", "enum": [item.value for item in hint], "description": _summary(hint)}
    return Shape(lambda value: value.value, {"$ref": COMPONENTS + hint.__name__}, {hint.__name__: schema})


def _record_shape(hint: type) -> Shape:
    hints = typing.get_type_hints(hint, localns=_NAMES)
    shapes: dict[str, Shape] = {}
    for item in dataclasses.fields(hint):
        shapes[item.name] = Shape(str, _DECIMAL) if item.name in _ID_FIELDS else shape_of(hints[item.name])
    definitions: dict[str, Json] = {}
    for shape in shapes.values():
        definitions.update(shape.definitions)
    definitions[hint.__name__] = {
        "type": "object",
        "description": _summary(hint),
        "properties": {name: dict(shape.schema) for name, shape in shapes.items()},
        "required": list(shapes),
        "additionalProperties": False,
    }
    encoders = tuple((name, shape.encode) for name, shape in shapes.items())

    def encode(value: object) -> Json:
        return {name: encoder(getattr(value, name)) for name, encoder in encoders}

    return Shape(encode, {"$ref": COMPONENTS + hint.__name__}, definitions)


def _generic_shape(hint: object) -> Shape:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or (origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis):
        item = shape_of(arguments[0])
        return Shape(
            lambda values: [item.encode(value) for value in values],
            {"type": "array", "items": dict(item.schema)},
            item.definitions,
        )
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and arguments[1] is type(None):
        some = shape_of(arguments[0])
        return Shape(
            lambda value: None if value is None else some.encode(value),
            {"anyOf": [dict(some.schema), {"type": "null"}]},
            some.definitions,
        )
    raise TypeError(f"{hint!r} has no JSON form")


def _summary(hint: type) -> str:
    return (hint.__doc__ or "").strip().split("\n", 1)[0]
