"""Parts of the daemon, entered in the order in which they depend on each other and left in the reverse of it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from xferd.api.timeouts import timeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

T = TypeVar("T")

CLOSE_TIMEOUT_S = 10.0
"""What one part may take to close; it is cancelled then, and the next one gets its turn."""

log = structlog.get_logger(__name__)


class Components:
    """A stack of parts. Leaving it closes every part, whatever the others do.

    A failure to close is logged and goes no further: there is nobody above who could do more about it. A cancellation
    that comes meanwhile is raised once all parts are closed. Parts own their tasks and end them when they close.
    """

    def __init__(self, *, close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self._close_timeout_s = close_timeout_s
        self._closers: list[tuple[str, Callable[[], Awaitable[object]]]] = []

    async def enter(self, name: str, part: AbstractAsyncContextManager[T]) -> T:
        """Enter a part, to be left with the stack; its own error, if it fails to start, is raised."""
        started = time.monotonic()
        value = await part.__aenter__()
        self._closers.append((name, lambda: part.__aexit__(None, None, None)))
        log.debug("component_started", component=name, took_s=round(time.monotonic() - started, 4))
        return value

    def push(self, name: str, close: Callable[[], Awaitable[object]]) -> None:
        """Add something that was started already; ``close`` is awaited once."""
        self._closers.append((name, close))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cancelled: asyncio.CancelledError | None = None
        while self._closers:
            name, close = self._closers.pop()
            try:
                async with timeout(self._close_timeout_s):
                    await close()
            except asyncio.CancelledError as cancel:
                cancelled = cancel
                log.warning("component_close_cancelled", component=name)
            except TimeoutError:
                log.error("component_would_not_close", component=name, timeout_s=self._close_timeout_s)
            except Exception:
                log.exception("component_close_failed", component=name)
            else:
                log.debug("component_closed", component=name)
        if cancelled is not None:
            raise cancelled
