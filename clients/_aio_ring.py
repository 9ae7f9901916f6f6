"""The ring of the async client: completions are taken when the daemon's pipe can be read, and wake the tasks' futures.

The surface is that of ``_sync_ring.py``. The doorbell is rung once for all that one turn of the loop has put.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from xferd.api.errors import Closed, XferdError
from xferd.api.timeouts import timeout
from xferd.clients._ring_base import (
    LostAnswer,
    RingBase,
    Submission,
    cancel_of,
    closed_meanwhile,
    fence_of,
    is_told,
    listen_of,
    post_of,
    submit_flags,
)
from xferd.clients._ring_tracks import Ask, CutNote, Track

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.api import types as t
    from xferd.clients._aio_session_socket import AsyncSessionSocket
    from xferd.clients._ring import Ring
    from xferd.clients.transfers import ListLike, TransferBase, TransferOptions

_ROOM_S = 0.001
_END_NEWS_S = 0.2


class AsyncRing(RingBase):
    """Verbs over the ring, for one loop. None in answer to one means: by gRPC. Cancel-safe: what was asked goes on."""

    def __init__(self, ring: Ring, socket: AsyncSessionSocket) -> None:
        """Take over ``ring``; ``socket`` is borrowed for the reason of the session's end."""
        super().__init__(ring)
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._is_ringing = False
        self._crowd = asyncio.Lock()
        self._signalled = asyncio.Event()
        self._loop.add_reader(ring.signal, self._on_signal)

    # -- transfers

    async def run(self, op: t.TransferOp, local: ListLike, remote: ListLike, options: TransferOptions) -> Track | None:
        """As ``SyncRing.run``."""
        made = self._submission(op, local, remote, options, 0)
        if made is None:
            return None
        track, submission = made
        ask = track.ask = Ask(track)
        if not await self._send(ask, submission):
            return None
        await self._over(ask)
        return await self._answer(ask)

    async def start(
        self,
        op: t.TransferOp | str,
        local: ListLike,
        remote: ListLike,
        options: TransferOptions,
        *,
        hold: bool,
        wait_s: float,
    ) -> Track | None:
        """As ``SyncRing.start``."""
        made = self._submission(op, local, remote, options, submit_flags(hold=hold))
        if made is None:
            return None
        track, submission = made
        ask = Ask(track, is_held=hold)
        if not hold:
            track.ask = ask
        if not await self._send(ask, submission):
            return None
        await self._accepted(ask)
        if await self._answer(ask) is None:
            return None
        track = self._tracks.setdefault(track.id, track)
        if wait_s > 0:
            await self._over(ask, wait_s)
        return track

    async def post(self, transfer: TransferBase, wait_s: float) -> Track | None:
        """As ``SyncRing.post``."""
        self.glance()
        track = self._track_to_post(transfer)
        if track is None:
            return None
        if track.ask is not None:  # gRPC has told its end, and the ring is about to
            await self._over(track.ask)
        ask = Ask(track)
        track.post(ask)
        try:
            if not await self._send(ask, post_of(track, tells_accepted=wait_s <= 0)):
                track.unpost()
                return None
        except asyncio.CancelledError:  # while it waited for room: nothing was asked
            track.unpost()
            raise
        if wait_s <= 0:
            await self._accepted(ask)
        elif not await self._over(ask, wait_s):
            await self._ask_if_accepted(ask)
        return track if self._is_posted(track, ask) else None

    async def post_many(self, transfers: Sequence[TransferBase]) -> list[TransferBase]:
        """As ``SyncRing.post_many``."""
        posts = [asyncio.ensure_future(self.post(transfer, 0.0)) for transfer in transfers]
        done = await asyncio.gather(*posts, return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        return [transfer for transfer, track in zip(transfers, done, strict=True) if track is None]

    async def _accepted(self, ask: Ask) -> None:
        await self._until(lambda: ask.is_accepted or ask.is_over, (ask,), None)

    async def _ask_if_accepted(self, ask: Ask) -> None:
        """As ``SyncRing._ask_if_accepted``."""
        fence = Ask()
        if await self._send(fence, fence_of()):
            await self._over(fence)
        ask.is_accepted = ask.is_accepted or not (fence.is_lost or ask.is_over)

    async def cancel(self, tracks: Sequence[Track]) -> bool:
        """As ``SyncRing.cancel``."""
        asks = [Ask(track) for track in tracks]
        for ask, track in zip(asks, tracks, strict=True):
            if not await self._send(ask, cancel_of(track)):
                return False
        for ask in asks:
            await self._over(ask)
        for ask in asks:
            if ask.refusal is not None:
                raise ask.refusal
        return not any(ask.is_lost for ask in asks)

    async def wait(self, tracks: Sequence[Track], timeout_s: float | None, *, any_of: bool) -> bool:
        """As ``SyncRing.wait``."""
        asks = [track.ask for track in tracks if track.ask is not None]
        self.glance()
        if any_of:
            await self._until(lambda: any(ask.is_over for ask in asks), asks, timeout_s)
        else:
            pending = [ask for ask in asks if not ask.is_over]
            try:
                async with timeout(timeout_s):
                    for ask in pending:
                        await self._over(ask)
            except TimeoutError:
                pass  # they go on
        return all(is_told(track) for track in tracks)

    # -- notifications

    async def listen(self) -> None:
        """Let notifications come by the ring."""
        wanted = self._credits_wanted()
        if wanted and await self._send(None, listen_of(wanted)):
            self._ring.allowed += wanted
            self.is_listening = True

    async def notifications(self, timeout_s: float, limit: int) -> tuple[list[t.Notification], CutNote | None]:
        """As ``SyncRing.notifications``."""
        deadline = self._loop.time() + timeout_s
        while True:
            self.glance()
            arrival = self._ring.arrival
            taken = self._take_notes(limit)
            if taken[0] or taken[1] is not None or not self.is_usable:
                self._listen_nowait()
                return taken
            if not await self._over(arrival, max(deadline - self._loop.time(), 0.0)):
                return taken

    def _listen_nowait(self) -> None:
        """Give leave for more, if there is room: a wait here could be cancelled, and what was taken be lost."""
        wanted = self._credits_wanted()
        if wanted and self.is_usable and self._ring.put(None, *listen_of(wanted)):
            self._ring.allowed += wanted
            self._ring_soon()

    # -- sending

    async def _send(self, ask: Ask | None, submission: Submission) -> bool:
        """Hand a submission over, waiting for room; False if the ring is lost."""
        ring = self._ring
        try:
            if self._crowd.locked() or not ring.put(ask, *submission):
                async with self._crowd:  # one at a time looks for room, in the order of coming
                    while not ring.put(ask, *submission):
                        await self._make_room()
        except XferdError:
            if self._is_closing:
                raise closed_meanwhile() from None
            return False
        self._ring_soon()
        return True

    async def _make_room(self) -> None:
        """Give the daemon a moment to take submissions: it tells of completions only, not of free slots."""
        self._ring.ring()
        if not self._ring.reap() and self._ring.check() is None:
            self._signalled.clear()
            with contextlib.suppress(TimeoutError):
                async with timeout(_ROOM_S):
                    await self._signalled.wait()

    def _ring_soon(self) -> None:
        if not self._is_ringing:
            self._is_ringing = True
            self._loop.call_soon(self._ring_now)

    def _ring_now(self) -> None:
        self._is_ringing = False
        if not self._is_closing:
            self._ring.ring()

    # -- waiting

    def glance(self) -> None:
        """Take what has come. No system call."""
        self._ring.reap()

    def _on_signal(self) -> None:
        ring = self._ring
        goes_on = ring.drain()
        self._signalled.set()
        ring.reap()
        if ring.check() is None and not goes_on:
            ring.lose_session()
        if ring.lost is not None:
            self._loop.remove_reader(ring.signal)

    async def _over(self, ask: Ask, timeout_s: float | None = None) -> bool:
        """Return True when an ask is over, False when the time is."""
        return ask.is_over or await self._until(lambda: ask.is_over, (ask,), timeout_s)

    async def _until(self, is_over: Callable[[], bool], asks: Sequence[Ask], timeout_s: float | None) -> bool:
        """Return True when ``is_over``, which a change of one of ``asks`` may bring about, False when the time is."""
        try:
            async with timeout(timeout_s):
                while not is_over():
                    await self._change(asks)
        except TimeoutError:
            return is_over()
        return True

    async def _change(self, asks: Sequence[Ask]) -> None:
        future = self._loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        for ask in asks:
            ask.waiters.append(wake)
        try:
            await future
        finally:
            for ask in asks:
                ask.waiters.remove(wake)

    async def _answer(self, ask: Ask) -> Track | None:
        try:
            return self._answered(ask)
        except LostAnswer:
            raise self._unanswered(await self._socket.end_reason(_END_NEWS_S)) from None

    # -- the end

    def close(self) -> None:
        """Wake all who wait, which get ``Closed``, and let go of the memory. Twice is fine."""
        if self._is_closing:
            return
        self._is_closing = True
        self._loop.remove_reader(self._ring.signal)
        self._ring.lose(Closed("the client was closed"))
        self._ring.close()
