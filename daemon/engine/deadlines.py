"""Deadlines of all posts by one timer: what a post costs is one entry in a table, and no timer of its own.

The timer stands at the earliest deadline that was ever armed and not looked at since; most posts end long before, and
a timer that finds nothing due moves on to what is earliest by then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import TransferId
    from xferd.daemon.engine.machine import Transfer


_LEAST_S = 0.001
"""Of a timer: those of uvloop know whole milliseconds and may come a little early, and must not then come at once."""


class Deadlines:
    """Tells of posts whose time is over. Used on the event loop.

    Args:
        clock: seconds; any that only grows.
        is_over: called once for each post whose deadline passes, with the transfer and the number of the post. It may
            arm and drop deadlines.
    """

    def __init__(self, clock: Callable[[], float], is_over: Callable[[Transfer, int], None]) -> None:
        self._clock = clock
        self._is_over = is_over
        self._due: dict[TransferId, tuple[float, Transfer, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")

    def __len__(self) -> int:
        return len(self._due)

    def arm(self, transfer: Transfer, now: float) -> None:
        """Have the present post of a transfer end ``timeout_s`` after ``now``; an earlier one counts no more."""
        at = now + transfer.timeout_s
        self._due[transfer.id] = at, transfer, transfer.posts
        if at < self._timer_at:
            self._set_timer(at)

    def drop(self, transfer: Transfer) -> None:
        """Forget a transfer's deadline; fine where it has none."""
        self._due.pop(transfer.id, None)

    def close(self) -> None:
        """Tell of nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, float("inf")

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(at - self._clock(), _LEAST_S), self._look)

    def _look(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        now = self._clock()
        over = [due for due in self._due.values() if due[0] <= now]
        for due in over:
            _, transfer, post = due
            if self._due.get(transfer.id) is due:  # not dropped, nor armed anew, by who was told of another
                del self._due[transfer.id]
                self._is_over(transfer, post)
        if self._due:
            earliest = min(due[0] for due in self._due.values())
            if earliest < self._timer_at:
                self._set_timer(earliest)
