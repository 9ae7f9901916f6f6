"""Tasks of a component that is started and closed by calls, where an ``async with TaskGroup`` has no place to stand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from xferd.api.errors import Closed, XferdError

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

log = structlog.get_logger("xferd.tcp")


class TaskOwner:
    """Owns named tasks until they end; ``aclose`` cancels and awaits what is left.

    A task that fails is logged and does not touch the others: one peer's trouble is not another's.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task. Its result may be awaited or not.

        Raises:
            Closed: after ``aclose``.
        """
        if self._closed:
            work.close()
            raise Closed(f"no new task {name}: closed")
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            expected = isinstance(error, XferdError)  # the rest are bugs of ours
            (log.debug if expected else log.error)("task failed", task=task.get_name(), exc_info=error)

    async def aclose(self) -> None:
        """Refuse new tasks, cancel the present ones, wait until they ended. Twice is fine."""
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
