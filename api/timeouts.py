"""``asyncio.timeout`` as newer Python has it, for 3.11.2 as well, which is Debian 12's.

There, a timeout that expires in a task that was cancelled before, and went on, raises ``CancelledError`` in place of
``TimeoutError`` (python/cpython#102780). Whoever caught a failed ``TaskGroup`` is such a task, and so is whoever brings
something to rest after it was cancelled: exactly where time limits must hold.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class timeout:  # noqa: N801  # it stands where ``asyncio.timeout`` would
    """An asynchronous context manager that raises ``TimeoutError`` after ``delay_s`` seconds; None: never.

    What the task was cancelled for before does not count; a cancellation that comes meanwhile does, and wins.
    """

    def __init__(self, delay_s: float | None) -> None:
        self._timeout = asyncio.timeout(delay_s)
        self._cancelling = 0

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        self._cancelling = task.cancelling() if task is not None else 0
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._timeout.__aexit__(kind, error, trace)  # raises where Python has it right
        task = asyncio.current_task()
        is_over = kind is asyncio.CancelledError and self._timeout.expired()
        if is_over and task is not None and task.cancelling() <= self._cancelling:
            raise TimeoutError from error
