"""Answers as JSON documents: the same that the REST face gives for the same question.

Sizes are numbers. 64-bit identifiers (region ids, prepared handles, epochs) are decimal strings, because JavaScript
rounds numbers past 2**53. Enumerations are their names and bytes are base64.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
from typing import Any, TypeAlias

from xferd.api.errors import XferdError

Json: TypeAlias = Any
"""Whatever ``json.dumps`` takes; a seam without types."""

_ID_TYPES = frozenset({"RegionId", "PreparedHandle"})
_ID_FIELDS = frozenset({"epoch"})


def document(value: object) -> Json:
    """Return a record of the contract, or a sequence or an object of such, as JSON."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, XferdError):
        return error_document(value)
    if isinstance(value, enum.Flag):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [document(item) for item in value]
    if isinstance(value, dict):
        return {str(name): document(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        identifiers = _identifiers(type(value))
        return {
            item.name: str(getattr(value, item.name))
            if item.name in identifiers
            else document(getattr(value, item.name))
            for item in dataclasses.fields(value)
        }
    return value


def error_document(error: XferdError) -> dict[str, Json]:
    """Return an error by its fields."""
    return {
        "code": error.code,
        "message": error.message,
        "limit": error.limit,
        "remedy": error.remedy,
        "retryable": error.retryable,
        "routes_tried": list(error.routes_tried),
    }


@functools.cache
def _identifiers(record: type) -> frozenset[str]:
    """Return the fields of a record that are 64-bit identifiers, by the names of their types."""
    return frozenset(
        item.name for item in dataclasses.fields(record) if item.name in _ID_FIELDS or item.type in _ID_TYPES
    )
