"""Signals become events; a second request to stop kills.

The handlers only set events. After the first SIGTERM or SIGINT both go back to the kernel's default action, so that
the second one ends the process at once, with a status that says so, even while the event loop is stuck.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """The events ``stop`` and ``reload``, fed by SIGTERM and SIGINT, and by SIGHUP, while entered.

    Enter it on the main thread's running loop, for the rest of the process's life: leaving it does not give back what
    was there before, but leaves the process to die of a signal to stop, and deaf to SIGHUP.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self._any = asyncio.Event()
        self.stop_signal: signal.Signals | None = None
        self._is_killing = False

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGHUP)
        # A late SIGHUP must not kill a daemon that is on its way out.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._kill_on_next()

    async def wait(self) -> None:
        """Wait until ``stop`` or ``reload`` is set; at once if one is."""
        while not (self.stop.is_set() or self.reload.is_set()):
            self._any.clear()
            await self._any.wait()

    def request_stop(self) -> None:
        """Do what the first SIGTERM does."""
        self.stop.set()
        self._any.set()
        self._kill_on_next()

    def _on_reload(self) -> None:
        self.reload.set()
        self._any.set()

    def _on_stop(self, number: signal.Signals) -> None:
        self.stop_signal = number
        self.request_stop()

    def _kill_on_next(self) -> None:
        if self._is_killing:
            return
        self._is_killing = True
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # Python's own default for SIGINT would raise in the middle
