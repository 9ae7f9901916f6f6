"""Keeps this node's record in the store up to date: one task that publishes whenever something changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import structlog

from xferd.api.errors import Unavailable, XferdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xferd.api.types import NodeInfo
    from xferd.metadata.base import Store

log = structlog.get_logger(__name__)


class Publisher:
    """Publishes ``me()`` at the start and after each ``changed``; many changes at once are one publication.

    Args:
        store: takes the record.
        me: the record as it is now.
        on_drain: called after a record went out whose ``draining`` differs from the one before; must not raise.
    """

    def __init__(
        self, store: Store, me: Callable[[], NodeInfo], *, on_drain: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._store = store
        self._me = me
        self._on_drain = on_drain
        self._changed = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._was_draining = False
        self._is_withdrawn = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Publish for the first time; raises ``AlreadyExists`` where another live node has the name.

        A store that is away is no reason not to start: it publishes by itself when it is back.
        """
        try:
            await self._store.publish(self._me())
        except Unavailable as error:
            log.warning("publish_failed", code=error.code, error=str(error))
        self._task = asyncio.create_task(self._run(), name="xferd-publisher")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def changed(self) -> None:
        """Have the record published again, soon."""
        self._changed.set()

    async def publish(self) -> None:
        """Publish the record as it is now, and tell of a drain that began or ended. Does not raise for the store."""
        async with self._publishing:
            if self._is_withdrawn:
                return
            self._changed.clear()
            me = self._me()
            try:
                await self._store.publish(me)
            except XferdError as error:
                # The store heals itself and its health says so; the next change tries again.
                log.warning("publish_failed", code=error.code, error=str(error))
            if me.draining is not self._was_draining:
                self._was_draining = me.draining
                if self._on_drain is not None:
                    await self._on_drain()

    async def withdraw(self) -> None:
        """Take the record back for good: no later change publishes it again. Does not raise for the store."""
        self._is_withdrawn = True
        await self._stop()
        try:
            await self._store.withdraw()
        except XferdError as error:
            # What keeps records of others lets go of those whose node has gone by itself.
            log.warning("withdraw_failed", code=error.code, error=str(error))

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            await self.publish()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
