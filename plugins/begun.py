"""Waiting for what ends by a call: how a backend that has ``begin`` makes its ``move`` of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import Begun

T = TypeVar("T")


async def told(start: Callable[[Callable[[T | Exception], None]], Begun]) -> T:
    """Start something and return what its end is told, or raise it where that is an exception.

    Cancelled, this aborts it and waits for its end, however long that takes and however often the cancellation is
    repeated.

    Args:
        start: starts it; its argument is to be called at the end, once, on the event loop and not from inside. What
            it raises is raised here.
    """
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    ends: list[T | Exception] = []

    def done(end: T | Exception) -> None:
        ends.append(end)
        if not waiter.done():
            waiter.set_result(None)

    begun = start(done)
    try:
        await waiter
    except asyncio.CancelledError:
        begun.abort()
        while not ends:
            waiter = loop.create_future()
            with suppress(asyncio.CancelledError):  # the first one is raised when it has ended
                await waiter
        raise
    end = ends.pop()
    if isinstance(end, Exception):
        raise end
    return end
