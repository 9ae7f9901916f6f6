"""Liveness: has my event loop run lately? And the watchdog pings that depend on it.

Readiness, whether new work is taken, is another question, which the service answers. A daemon that is drained or has
lost its metadata store is alive; restarting it would help nobody.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Self

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from xferd.daemon.sdnotify import Notifier

HEARTBEAT_INTERVAL_S = 5.0
"""One timer each few seconds: cheap enough that an idle daemon's CPU does not show it."""

STALL_S = 15.0
"""Three heartbeats: the loop does no blocking call, so even one missed beat is a bug or a machine in distress."""

LAG_WARNING_S = 0.5
"""A callback that holds the loop for so long hurts every client, and is worth a line in the log."""

log = structlog.get_logger(__name__)


class Health:
    """The loop's heartbeat, further checks, and the service manager's watchdog. An async context manager.

    Args:
        notifier: gets a watchdog ping every half of ``watchdog_s`` as long as ``liveness()`` is "".
        watchdog_s: what ``sdnotify.watchdog_interval_s`` says; None for no watchdog.
        stall_s: age of the last heartbeat from which the loop counts as stalled.
        interval_s: time between heartbeats.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        notifier: Notifier,
        watchdog_s: float | None = None,
        *,
        stall_s: float = STALL_S,
        interval_s: float = HEARTBEAT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._ping_interval_s = None if watchdog_s is None else watchdog_s / 2
        self._stall_s = stall_s
        self._interval_s = interval_s
        self._clock = clock
        self._checks: dict[str, Callable[[], str]] = {}
        self._last_beat = clock()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._reported = ""

    def register(self, name: str, check: Callable[[], str]) -> None:
        """Add a check to liveness: a quick function that returns "" or what is wrong beyond repair but by a restart."""
        self._checks[name] = check

    def liveness(self) -> str:
        """Return "" if the event loop ran lately and every check passes, else what is wrong. Thread-safe."""
        age_s = self._clock() - self._last_beat
        if age_s > self._stall_s:
            return f"the event loop has not run for {age_s:.1f} s"
        for name, check in list(self._checks.items()):
            reason = check()
            if reason:
                return f"{name}: {reason}"
        return ""

    async def __aenter__(self) -> Self:
        self._last_beat = self._clock()
        self._schedule("beat", self._interval_s, self._beat)
        if self._ping_interval_s is not None:
            self._notifier.watchdog()
            self._schedule("ping", self._ping_interval_s, self._ping)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _schedule(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(delay_s, callback)

    def _beat(self) -> None:
        self._schedule("beat", self._interval_s, self._beat)
        self._mark()

    def _ping(self) -> None:
        assert self._ping_interval_s is not None
        self._schedule("ping", self._ping_interval_s, self._ping)
        self._mark()  # that this runs is the sign of life
        reason = self.liveness()
        if not reason:
            self._notifier.watchdog()
        elif reason != self._reported:
            log.error("watchdog_ping_withheld", reason=reason)
        self._reported = reason

    def _mark(self) -> None:
        now = self._clock()
        lag_s = now - self._last_beat - self._interval_s
        self._last_beat = now
        if lag_s > LAG_WARNING_S:
            log.warning("event_loop_lagged", lag_s=round(lag_s, 3))
