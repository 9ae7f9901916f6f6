"""What a mover sees of a data lane, whatever carries it, and the pool that hands lanes out."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol

from xferd.api.errors import PeerLost, XferdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xferd.plugins.base import PeerIdentity
    from xferd.plugins.tcp.exchange import Exchange, PeerLimits


class Counted(Protocol):
    """Where a lane counts its payload."""

    sent_nbytes: int
    received_nbytes: int


class Ticket:
    """An exchange under way. ``result`` may be cancelled; ``rest`` is done when the lane touches no memory for it."""

    __slots__ = ("rest", "result")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.result: asyncio.Future[int] = loop.create_future()
        self.rest: asyncio.Future[None] = loop.create_future()

    def settle(self, moved: int, error: XferdError | None) -> None:
        """Tell how it ended; on the loop. Twice is fine."""
        if not self.rest.done():
            self.rest.set_result(None)
        if self.result.done():
            return
        if error is None:
            self.result.set_result(moved)
        else:
            self.result.set_exception(error)


class Lane(Protocol):
    """A data connection to a peer that carries one exchange at a time."""

    peer: PeerIdentity
    limits: PeerLimits
    is_good: bool

    @property
    def stream(self) -> Counted:
        """Counts of the payload."""

    def submit(self, exchange: Exchange) -> Ticket:
        """Begin an exchange; on the loop."""

    def abort(self, reason: str) -> None:
        """End the lane: an exchange under way fails. Twice is fine."""

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be between two exchanges."""


class LanePool:
    """At most ``size`` data lanes to one peer, opened when first needed and again after one broke."""

    def __init__(self, size: int, dial: Callable[[], Awaitable[Lane]]) -> None:
        self._dial = dial
        self._free = asyncio.Semaphore(size)  # first come, first served
        self._idle: deque[Lane] = deque()
        self.lanes: set[Lane] = set()
        self._reason = ""

    async def acquire(self) -> Lane:
        """Return a lane for one exchange; give it back with ``release``.

        A lane that broke while it was idle is replaced by a new one: nothing was sent on it.

        Raises:
            PeerLost: the pool was closed, or the peer cannot be reached.
        """
        await self._free.acquire()
        try:
            while self._idle:
                lane = self._idle.pop()
                if lane.is_good and lane.is_quiet():
                    return lane
                lane.abort("broke while idle")
            self._check()
            lane = await self._dial()
            self.lanes.add(lane)
            if self._reason:  # closed meanwhile
                lane.abort(self._reason)
            self._check()
        except BaseException:
            self._free.release()
            raise
        return lane

    def release(self, lane: Lane) -> None:
        """Take a lane back, good or not."""
        if lane.is_good:
            self._idle.append(lane)
        else:
            lane.abort("not good any more")
        self._free.release()

    def close(self, reason: str) -> None:
        """End all lanes; who waits for one gets ``PeerLost``. Twice is fine."""
        self._reason = self._reason or reason
        self._idle.clear()
        for lane in list(self.lanes):  # some leave at once
            lane.abort(reason)

    def forget(self, lane: Lane) -> None:
        """Take out a lane that has left."""
        self.lanes.discard(lane)

    def _check(self) -> None:
        if self._reason:
            raise PeerLost(self._reason)
