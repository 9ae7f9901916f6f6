"""The base of every configuration section, and the types for sizes and durations in one.

A backend's options are one such model, next to the backend; the daemon's own sections are in ``daemon/config.py``.
The parsers are in ``api/units.py``, which clients share and which therefore knows nothing of pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema

from xferd.api.errors import InvalidArgument
from xferd.api.units import format_nbytes, format_seconds, parse_nbytes, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable


class Options(BaseModel):
    """A frozen section of the configuration in which an unknown key is an error, and defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


def _validator(parse: Callable[[object], int | float]) -> Callable[[object], int | float]:
    def validate(value: object) -> int | float:
        try:
            return parse(value)
        except InvalidArgument as exc:  # pydantic collects ValueErrors and adds the key
            raise ValueError(str(exc)) from exc

    return validate


def _schema(example: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "minimum": 0}], "examples": [example]})


Nbytes = Annotated[
    int,
    BeforeValidator(_validator(parse_nbytes)),
    PlainSerializer(format_nbytes, return_type=str, when_used="json"),
    _schema("64MiB"),
]
"""Bytes: ``4096``, ``"64KiB"``, ``"1.5GB"``. An int once parsed; text again in ``model_dump(mode="json")``."""

Seconds = Annotated[
    float,
    BeforeValidator(_validator(parse_seconds)),
    PlainSerializer(format_seconds, return_type=str, when_used="json"),
    _schema("30s"),
]
"""Seconds: ``0.5``, ``"500ms"``, ``"5m"``. A float once parsed; text again in ``model_dump(mode="json")``."""
