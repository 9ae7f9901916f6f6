"""What a mover sees of a data lane, whatever carries it, and the pool that hands lanes out."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass
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
    """An exchange given to a lane. Settled, the lane touches no memory for it.

    Attributes:
        is_settled: whether it has come to rest.
        moved: bytes, once it has; 0 where it failed.
        error: why it failed, or None.
    """

    __slots__ = ("_claim", "_hears", "_loop", "error", "is_settled", "moved")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._claim = threading.Lock()
        self._hears: Callable[[], None] | None = None
        self.is_settled = False
        self.moved = 0
        self.error: XferdError | None = None

    def claim(self) -> bool:
        """Take the right to begin it, or to see that nobody begins it; only the first caller gets it. Thread-safe."""
        return self._claim.acquire(blocking=False)

    def tell(self, hears: Callable[[], None]) -> None:
        """Have ``hears`` called once it is settled, not from inside this; on the loop."""
        if self.is_settled:
            self._loop.call_soon(hears)
        else:
            self._hears = hears

    def settle(self, moved: int, error: XferdError | None) -> None:
        """Tell how it ended; on the loop. Twice is fine."""
        if self.is_settled:
            return
        self.is_settled, self.moved, self.error = True, moved, error
        if self._hears is not None:
            self._hears()


class Lane(Protocol):
    """A data connection to a peer."""

    peer: PeerIdentity
    limits: PeerLimits
    is_good: bool

    @property
    def stream(self) -> Counted:
        """Counts of the payload."""

    def submit(self, exchange: Exchange) -> Ticket:
        """Give it an exchange, to begin when its turn comes; on the loop."""

    def abort(self, reason: str) -> None:
        """End the lane: an exchange under way fails. Twice is fine."""

    def is_quiet(self) -> bool:
        """Whether the lane is up with nothing to read, as it must be between two exchanges."""


@dataclass(slots=True, eq=False)
class _Use:
    """What a lane is used for: exchanges of one transfer."""

    transfer_id: str
    exchanges: int


@dataclass(slots=True, eq=False)
class _Wait:
    """Somebody in the queue for a lane; what comes is a lane, or None: leave to open one."""

    transfer_id: str
    place: asyncio.Future[Lane | None]


class LanePool:
    """At most ``size`` data lanes to one peer, opened when first needed and again after one broke.

    A lane is given to one transfer at a time, for up to ``depth`` exchanges, so that it can go on with the next one
    without waiting for the loop. Never to two: a lane that is cut to stop one transfer would take the other along.
    Who waits is served in order, and nobody joins a lane past somebody who waits for one.
    """

    def __init__(self, size: int, dial: Callable[[], Awaitable[Lane]], depth: int = 1) -> None:
        self._size = size
        self._dial = dial
        self._depth = depth
        self._idle: deque[Lane] = deque()
        self._uses: dict[Lane, _Use] = {}
        self._opening = 0
        self._waits: deque[_Wait] = deque()
        self.lanes: set[Lane] = set()
        self._reason = ""

    async def acquire(self, transfer_id: str = "") -> Lane:
        """Return a lane for one exchange; give it back with ``release``.

        A lane that broke while it was idle is replaced by a new one: nothing was sent on it.

        Raises:
            PeerLost: the pool was closed, or the peer cannot be reached.
        """
        self._check()
        wait = _Wait(transfer_id, asyncio.get_running_loop().create_future())
        self._waits.append(wait)
        self._grant()
        try:
            lane = await wait.place
        except asyncio.CancelledError:
            self._withdraw(wait)
            raise
        return await self._open(transfer_id) if lane is None else lane

    def take(self, transfer_id: str = "") -> Lane | None:
        """Return a lane for one exchange if there is one at hand, which nobody waits for; else None.

        Raises:
            PeerLost: the pool was closed.
        """
        self._check()
        if self._waits:
            return None
        lane = self._idle_lane() or self._shared_lane(transfer_id)
        if lane is not None:
            self._uses.setdefault(lane, _Use(transfer_id, 0)).exchanges += 1
        return lane

    def release(self, lane: Lane) -> None:
        """Take a lane back, good or not, from one exchange."""
        use = self._uses[lane]
        use.exchanges -= 1
        if not use.exchanges:
            del self._uses[lane]
            if lane.is_good:
                self._idle.append(lane)
            else:
                lane.abort("not good any more")
        self._grant()

    def close(self, reason: str) -> None:
        """End all lanes; who waits for one gets ``PeerLost``. Twice is fine."""
        self._reason = self._reason or reason
        self._idle.clear()
        for wait in self._waits:
            if not wait.place.done():
                wait.place.set_exception(PeerLost(self._reason, remedy="post it again"))
        self._waits.clear()
        for lane in list(self.lanes):  # some leave at once
            lane.abort(reason)

    def forget(self, lane: Lane) -> None:
        """Take out a lane that has left."""
        self.lanes.discard(lane)

    def _check(self) -> None:
        if self._reason:
            raise PeerLost(self._reason, remedy="post it again")

    def _grant(self) -> None:
        """Serve who waits, the first one first, as long as there is something for it."""
        while self._waits:
            wait = self._waits[0]
            if not wait.place.done():
                lane = self._idle_lane() or self._shared_lane(wait.transfer_id)
                if lane is not None:
                    self._uses.setdefault(lane, _Use(wait.transfer_id, 0)).exchanges += 1
                elif len(self._uses) + self._opening < self._size:
                    self._opening += 1
                else:
                    return
                wait.place.set_result(lane)
            self._waits.popleft()

    def _idle_lane(self) -> Lane | None:
        while self._idle:
            lane = self._idle.pop()
            if lane.is_good and lane.is_quiet():
                return lane
            lane.abort("broke while idle")
        return None

    def _shared_lane(self, transfer_id: str) -> Lane | None:
        """Return the lane of a transfer that has the fewest exchanges; None where another lane may be opened."""
        if len(self._uses) + self._opening < self._size:
            return None
        return min(
            (
                lane
                for lane, use in self._uses.items()
                if lane.is_good and use.transfer_id == transfer_id and use.exchanges < self._depth
            ),
            key=lambda lane: self._uses[lane].exchanges,
            default=None,
        )

    def _withdraw(self, wait: _Wait) -> None:
        """Undo what a cancelled caller was given, or was about to be."""
        if wait in self._waits:
            self._waits.remove(wait)
        elif not wait.place.cancelled() and wait.place.exception() is None:
            lane = wait.place.result()
            if lane is not None:
                self.release(lane)
                return
            self._opening -= 1
        self._grant()

    async def _open(self, transfer_id: str) -> Lane:
        try:
            lane = await self._dial()
        except BaseException:
            self._opening -= 1
            self._grant()
            raise
        self._opening -= 1
        self.lanes.add(lane)
        if self._reason:  # closed meanwhile
            lane.abort(self._reason)
            self._check()
        self._uses[lane] = _Use(transfer_id, 1)
        self._grant()  # who waits may share it
        return lane
