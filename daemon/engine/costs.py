"""What moves have cost so far: an average speed a route, pair of places and size class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.plugins.base import RemoteSpace

if TYPE_CHECKING:
    from xferd.plugins.base import Space

_Key = tuple[str, str, str, str, int]

SMOOTHING = 0.2
"""Weight of the newest measurement: five transfers forget most of what was before."""


class CostModel:
    """Learns seconds a byte from finished transfers; falls back on a backend's own assumption."""

    def __init__(self) -> None:
        self._seconds_a_byte: dict[_Key, float] = {}

    def observe(self, route: str, source: Space, target: Space, nbytes: int, duration_s: float) -> None:
        """Take in one finished leg."""
        if nbytes <= 0 or duration_s <= 0:
            return
        key = _key(route, source, target, nbytes)
        seconds = duration_s / nbytes
        before = self._seconds_a_byte.get(key)
        self._seconds_a_byte[key] = seconds if before is None else before + SMOOTHING * (seconds - before)

    def estimate_s(self, route: str, source: Space, target: Space, nbytes: int, assumed_s: float) -> tuple[float, str]:
        """Return the expected seconds and where they come from: "measured" or "assumed"."""
        seconds = self._seconds_a_byte.get(_key(route, source, target, nbytes))
        return (assumed_s, "assumed") if seconds is None else (seconds * nbytes, "measured")

    def is_measured(self, route: str, source: Space, target: Space) -> bool:
        """Whether any size class of this route was measured."""
        prefix = _key(route, source, target, 1)[:-1]
        return any(key[:-1] == prefix for key in self._seconds_a_byte)


def _key(route: str, source: Space, target: Space, nbytes: int) -> _Key:
    remote = source if isinstance(source, RemoteSpace) else target
    node = remote.node if isinstance(remote, RemoteSpace) else ""
    # Size classes by factors of 16: below 4 KiB overhead is all, above 16 MiB it is nothing.
    return route, source.kind.value, target.kind.value, node, max(nbytes.bit_length() - 1, 0) // 4
