"""Numbers and names as people read them. Pure text; tables are made in ``_tables.py``."""

from __future__ import annotations

import datetime

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = ("B/s", "kB/s", "MB/s", "GB/s", "TB/s")


def nbytes(count: int) -> str:
    """Return a size in binary units with four digits at most: "12 B", "1.5 KiB", "256 MiB"."""
    return _scaled(float(count), 1024.0, _BINARY)


def rate(bytes_per_s: float) -> str:
    """Return a rate in decimal units, as networks and memory are rated: "1.93 GB/s"."""
    return _scaled(bytes_per_s, 1000.0, _DECIMAL)


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    step = 0
    while step + 1 < len(units) and value >= base * (1 - 5e-4):  # what would round up to the next unit is that unit
        value /= base
        step += 1
    return f"{value:.{_decimals(value)}f} {units[step]}" if step else f"{value:.0f} {units[0]}"


def _decimals(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def duration(seconds: float) -> str:
    """Return a duration with two or three significant parts: "93 µs", "1.2 ms", "3.4 s", "5m 12s", "3d 4h"."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{_decimals(seconds * 1e3)}f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // below}{smaller}"
    return f"{whole}s"


def age(since: float, now: float) -> str:
    """Return how long ago a UNIX time was; "-" for 0.0, which stands for never."""
    return duration(max(now - since, 0.0)) if since else "-"


def moment(at: float) -> str:
    """Return a UNIX time as local time to the second; "-" for 0.0."""
    if not at:
        return "-"
    return datetime.datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")


def percent(part: int, whole: int) -> str:
    """Return a share in whole per cent; "-" where there is no whole."""
    return f"{100 * part // whole}%" if whole else "-"


def printable(text: str) -> str:
    r"""Return text of others (names, labels, paths, messages) with what could steer a terminal written as ``\x1b``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def error_line(message: str, limit: str = "", remedy: str = "", tried: tuple[str, ...] = ()) -> str:
    """Return an error as one line."""
    parts = [message, *(f"tried {route}" for route in tried)]
    if limit:
        parts.append(f"limit: {limit}")
    if remedy:
        parts.append(f"remedy: {remedy}")
    return printable("; ".join(parts))
