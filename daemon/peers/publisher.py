"""Keeps this node's record in the store up to date: one task that publishes whenever something changed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import structlog

from xferd.api.errors import XferdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import NodeInfo
    from xferd.metadata.base import Store

log = structlog.get_logger(__name__)


class Publisher:
    """Publishes ``me()`` at the start and after each ``changed``; many changes at once are one publication."""

    def __init__(self, store: Store, me: Callable[[], NodeInfo]) -> None:
        self._store = store
        self._me = me
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Publish for the first time; raises ``AlreadyExists`` where another live node has the name."""
        await self._store.publish(self._me())
        self._task = asyncio.create_task(self._run(), name="xferd-publisher")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def changed(self) -> None:
        """Have the record published again, soon."""
        self._changed.set()

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._store.publish(self._me())
            except XferdError as error:
                # The store heals itself and its health says so; the next change tries again.
                log.warning("publish_failed", code=error.code, error=str(error))
