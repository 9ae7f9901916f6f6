"""Sizes and durations as people write them: ``64MiB``, ``1.5GB``, ``500ms``, ``2h``; and back to text.

Plain Python on purpose: the client library imports this module, and must stay light. The pydantic types that use
these parsers in configuration are in ``plugins/options.py``.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

from xferd.api.errors import InvalidArgument

SIZE_UNITS: dict[str, int] = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
"""Bytes in each unit. Spelling is exact, because ``mb`` for megabytes and ``Mb`` for megabits are both in use."""

DURATION_UNITS: dict[str, Fraction] = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
"""Seconds in each unit."""

MAX_NBYTES = (1 << 63) - 1
MAX_SECONDS = 10.0 * 365 * 86400

_QUANTITY = re.compile(r"\s*(\d{1,30}(?:\.\d{1,400})?)\s*([A-Za-z]*)\s*", re.ASCII)
_SIZE_REMEDY = f"write a number of bytes, or a number and one of {', '.join(SIZE_UNITS)}"
_DURATION_REMEDY = f"write a number of seconds, or a number and one of {', '.join(DURATION_UNITS)}"


def parse_nbytes(value: object) -> int:
    """Return the bytes that a size means: an integer, or text like ``64MiB``, ``1.5GB``, ``4096``.

    Raises:
        InvalidArgument: no number, an unknown unit, a fraction of a byte, negative, or 2**63 and more.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        exact = Fraction(value)
    elif isinstance(value, str):
        number, unit = _split(value, "size", _SIZE_REMEDY)
        if unit and unit not in SIZE_UNITS:
            raise InvalidArgument(f"size {value!r} has the unknown unit {unit!r}", remedy=_SIZE_REMEDY)
        exact = number * SIZE_UNITS[unit or "B"]
    else:
        raise InvalidArgument(f"{value!r} is no size", remedy=_SIZE_REMEDY)
    if exact.denominator != 1:
        raise InvalidArgument(f"size {value!r} is no whole number of bytes", remedy=_SIZE_REMEDY)
    if not 0 <= exact <= MAX_NBYTES:
        raise InvalidArgument(f"size {value!r} is out of range", limit="0 to 2**63 - 1 bytes", remedy=_SIZE_REMEDY)
    return int(exact)


def parse_seconds(value: object) -> float:
    """Return the seconds that a duration means: a number, or text like ``500ms``, ``30s``, ``1.5h``.

    Raises:
        InvalidArgument: no number, an unknown unit, negative, not finite, or over ten years.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = _float(value)
    elif isinstance(value, str):
        number, unit = _split(value, "duration", _DURATION_REMEDY)
        if unit and unit not in DURATION_UNITS:
            raise InvalidArgument(f"duration {value!r} has the unknown unit {unit!r}", remedy=_DURATION_REMEDY)
        seconds = _float(number * DURATION_UNITS[unit or "s"])
    else:
        raise InvalidArgument(f"{value!r} is no duration", remedy=_DURATION_REMEDY)
    if not 0.0 <= seconds <= MAX_SECONDS:  # also catches NaN
        raise InvalidArgument(
            f"duration {value!r} is out of range", limit=f"0 to {MAX_SECONDS:.0f} seconds", remedy=_DURATION_REMEDY
        )
    return seconds


def format_nbytes(nbytes: int) -> str:
    """Return a size in the largest binary unit that divides it, so that ``parse_nbytes`` gives it back exactly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes and nbytes % SIZE_UNITS[unit] == 0:
            return f"{nbytes // SIZE_UNITS[unit]}{unit}"
    return f"{nbytes}B"


def format_seconds(seconds: float) -> str:
    """Return a duration in the largest unit that it is a whole number of; ``parse_seconds`` gives it back exactly."""
    decimal = Decimal(repr(float(seconds)))  # the shortest decimal that reads back as this float
    exact = Fraction(decimal)
    for unit in ("d", "h", "m", "s", "ms", "us"):
        count = exact / DURATION_UNITS[unit]
        if exact and count.denominator == 1:
            return f"{count.numerator}{unit}"
    return f"{decimal.normalize():f}s"


def _split(text: str, what: str, remedy: str) -> tuple[Fraction, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{text!r} is no {what}", remedy=remedy)
    return Fraction(match[1]), match[2]


def _float(value: float | Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
