"""The sealer as a lane's thread uses it: each call is made on the event loop, and waited for.

A peer's data request is proven by itself, before the peer is told that its bytes have arrived.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.engine.sealing import Sealer, WriteTicket
    from xferd.plugins.base import Extent


class LaneSealer:
    """Calls a ``Sealer`` from threads. Made on the event loop, which must be running while it is used."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self._loop = asyncio.get_running_loop()

    def concerns(self, extents: Sequence[Extent]) -> bool:
        """Whether any of the extents lies in a pool that keeps proof; does not block."""
        return self._sealer.concerns(extents)

    def begin(self, extents: Sequence[Extent]) -> WriteTicket | None:
        """Begin a write and return its ticket, None where nothing keeps proof. Blocks; errors as ``Sealer.begin``."""
        if not self.concerns(extents):
            return None
        return asyncio.run_coroutine_threadsafe(self._sealer.begin(extents), self._loop).result()

    def seal(self, ticket: WriteTicket) -> None:
        """Prove what was written. Blocks; errors as ``Sealer.seal``."""
        asyncio.run_coroutine_threadsafe(self._sealer.seal(ticket), self._loop).result()

    def abandon(self, ticket: WriteTicket) -> None:
        """End a write that failed; does not block."""
        self._loop.call_soon_threadsafe(self._sealer.abandon, ticket)

    def verify(self, extents: Sequence[Extent], *, is_asked: bool) -> None:
        """Compare what is about to be sent, where that is asked for or its pool always does.

        Blocks; errors as ``Sealer.verify``.
        """
        if self.concerns(extents):
            asyncio.run_coroutine_threadsafe(self._sealer.verify(extents, is_asked=is_asked), self._loop).result()
