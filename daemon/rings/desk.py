"""Where sessions get their rings, and where rings end with them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from typing import TYPE_CHECKING, Any, Self

from xferd.api import ring as layout
from xferd.api.errors import InvalidState, LimitExceeded, Overloaded, Unsupported
from xferd.api.ring import RingLayout, RingSizes
from xferd.api.types import HoldInfo, SessionId
from xferd.daemon.rings.memory import RingMemory
from xferd.daemon.rings.ring import Ring, RingCounters
from xferd.daemon.sessions.caller import session_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from xferd.api.types import Caller
    from xferd.daemon.engine.desk import TransferDesk
    from xferd.daemon.engine.notifications import Inboxes

_PIPE_NBYTES = 4096
"""A page: what is in a pipe means nothing, so that more would only be memory."""


class RingDesk:
    """Opens one ring for a session that asks, and closes it with the session.

    Args:
        transfers: what rings ask of the engine.
        inboxes: where notifications wait.
        check_open: raises while the node takes no new work.
        enabled: whether there are rings at all.
        max_nbytes: the largest ring; its memory is the daemon's until the session ends.
    """

    def __init__(
        self,
        transfers: TransferDesk,
        inboxes: Inboxes,
        *,
        check_open: Callable[[], None],
        enabled: bool,
        max_nbytes: int,
    ) -> None:
        self._transfers = transfers
        self._inboxes = inboxes
        self._check_open = check_open
        self._enabled = enabled
        self._max_nbytes = max_nbytes
        self._rings: dict[SessionId, tuple[Ring, int, float]] = {}
        self._tasks: dict[SessionId, set[asyncio.Task[None]]] = {}
        self._group = asyncio.TaskGroup()
        self.counters = RingCounters()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what rings are left."""
        for session in list(self._rings):
            self.close_session(session)
        await self._group.__aexit__(None, None, None)

    def __len__(self) -> int:
        return len(self._rings)

    def open_ring(self, caller: Caller, version: int, sizes: RingSizes) -> tuple[int, tuple[int, int, int]]:
        """As ``SessionEngine.open_ring``: memfd, the doorbell's end to write, the signal's end to read."""
        session = session_of(caller)
        self._check(session, version)
        place = RingLayout.of(sizes)
        if place.nbytes > self._max_nbytes:
            raise LimitExceeded(
                f"a ring of {place.nbytes} bytes",
                limit=f"{self._max_nbytes} bytes (rings.max_nbytes)",
                remedy="ask for fewer entries or a smaller arena",
            )
        try:
            memory, doorbell, signal = _open(place)
        except OSError as exc:
            raise Overloaded(
                f"no ring can be made: {exc.strerror}", limit="RLIMIT_NOFILE, memory", remedy="use gRPC alone"
            ) from exc
        ring = Ring(
            caller,
            memory,
            doorbell[0],
            signal[1],
            self._transfers,
            self._inboxes,
            check_open=self._check_open,
            spawn=lambda work, name: self._spawn(session, work, name),
            counters=self.counters,
        )
        ring.start()
        self._rings[session] = ring, place.nbytes, time.time()
        return place.nbytes, (os.dup(memory.fd), doorbell[1], signal[0])

    def close_session(self, session: SessionId) -> None:
        """Close a session's ring, if it has one; its transfers have ended."""
        ring, _, _ = self._rings.pop(session, (None, 0, 0.0))
        if ring is not None:
            ring.close()
        for task in self._tasks.pop(session, ()):
            task.cancel()

    def holds(self) -> list[HoldInfo]:
        """List the rings as things that sessions hold."""
        return [
            HoldInfo("ring", f"{nbytes} bytes", session, "submission and completion ring", since, 0.0)
            for session, (_, nbytes, since) in self._rings.items()
        ]

    def _check(self, session: SessionId, version: int) -> None:
        if not self._enabled:
            raise Unsupported("rings are turned off", limit="rings.enabled = false", remedy="use gRPC alone")
        if not layout.is_supported():
            raise Unsupported(
                "rings need a machine that keeps the order of stores", limit="x86-64", remedy="use gRPC alone"
            )
        if version != layout.VERSION:
            raise Unsupported(
                f"ring version {version}", limit=f"version {layout.VERSION}", remedy="use a client of this release"
            )
        if session in self._rings:
            raise InvalidState("the session has a ring", limit="one a session", remedy="use it, or open a session more")

    def _spawn(self, session: SessionId, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._group.create_task(work, name=name)
        mine = self._tasks.setdefault(session, set())
        mine.add(task)
        task.add_done_callback(mine.discard)


def _open(place: RingLayout) -> tuple[RingMemory, tuple[int, int], tuple[int, int]]:
    """Make a ring's memory and its two pipes, as (end to read, end to write), or nothing at all."""
    doorbell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        signal = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for end in (doorbell[1], signal[1]):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_NBYTES)
            return RingMemory(place), doorbell, signal
        except OSError:
            for end in signal:
                os.close(end)
            raise
    except OSError:
        for end in doorbell:
            os.close(end)
        raise
