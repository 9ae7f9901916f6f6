"""Whether few threads keep a store busy, by how long it takes to bring what was asked for. Pure.

One thread that never waits takes bytes as fast as a core copies them; more of them only take the interpreter's lock
from each other. Where the way is long, or one connection is slow, requests have to be under way side by side.
"""

from __future__ import annotations

NEAR_S = 0.002
"""Until the first byte."""

NEAR_NBYTES_PER_S = 200e6
"""Of one connection."""

_SHARE = 0.25
"""Of the last one in the mean: one that was held up by chance decides nothing, one that took far longer does."""

FAR_S = 60.0
"""How long a store is taken for far before it is looked at again."""


class Nearness:
    """Of one store; near until it is known better. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._far_until = 0.0

    def is_near(self, now: float) -> bool:
        """Whether few threads are enough."""
        return now >= self._far_until

    def note(self, nbytes: int, took_s: float, now: float) -> bool:
        """Take how long a range took, from the request to its last byte; True where the store is far from now on."""
        if not self.is_near(now):
            return False
        self._mean += _SHARE * (took_s / (NEAR_S + nbytes / NEAR_NBYTES_PER_S) - self._mean)
        if self._mean <= 1.0:
            return False
        self._mean, self._far_until = 0.0, now + FAR_S
        return True
