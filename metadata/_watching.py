"""The queue between a store and one who watches it; the same for every store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.metadata.base import NodeChange


class Watch:
    """What a store's ``watch`` returns: iterates over changes; ends when it or the store is closed.

    Changes wait here until they are asked for; whoever lets go of a watch need not close it.

    Args:
        name: of the node; "" takes all.
        ended: called once, when the watch ends.
    """

    def __init__(self, name: str, ended: Callable[[], None] | None = None) -> None:
        self.name = name
        self._on_end = ended
        self._changes: asyncio.Queue[NodeChange | None] = asyncio.Queue()
        self.ended = False

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> NodeChange:
        change = await self._changes.get()
        if change is None:
            self._changes.put_nowait(None)
            raise StopAsyncIteration
        return change

    async def aclose(self) -> None:
        """End the iteration. Twice is fine."""
        self.end()

    def tell(self, change: NodeChange) -> None:
        """Queue a change if the watch is for its node."""
        if not self.ended and self.name in ("", change.name):
            self._changes.put_nowait(change)

    def end(self) -> None:
        """End the iteration after what is queued."""
        if not self.ended:
            self.ended = True
            self._changes.put_nowait(None)
            if self._on_end is not None:
                self._on_end()
