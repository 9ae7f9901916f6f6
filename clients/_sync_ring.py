"""The ring of the blocking client: who takes completions, and how threads wait for theirs.

One thread at a time *leads*: it takes the completions of all, first by looking at the ring for a short time, then
asleep on the pipe of the daemon's signals, whose end is the daemon's too. The others follow, each asleep until its
own answer is there or the lead falls to it. There is no thread of ours.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from xferd.api.errors import Closed, XferdError
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
    spin_us_here,
    submit_flags,
)
from xferd.clients._ring_tracks import Ask, CutNote, Track

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.api import types as t
    from xferd.clients._ring import Ring
    from xferd.clients._session_socket import SessionSocket
    from xferd.clients.transfers import ListLike, TransferBase, TransferOptions

_ROOM_S = 0.001
"""How long to sleep for room in the submission queue: the daemon tells of completions only, not of free slots."""

_END_NEWS_S = 0.2
_MAX_SLEEP_S = 3600.0  # an hour and then anew: system calls know no infinity


class SyncRing(RingBase):
    """Verbs over the ring, safe between threads. None in answer to one means: by gRPC."""

    def __init__(self, ring: Ring, socket: SessionSocket, *, spin_us: float | None = None) -> None:
        """Take over ``ring``; ``socket`` is borrowed for word of the daemon's end."""
        super().__init__(ring)
        self._socket = socket
        self._sending = threading.Lock()
        self._lead = threading.Lock()
        self._followers: dict[SimpleQueue[None], None] = {}
        self._gate = threading.Lock()  # of the followers
        self._max_spin_s = (spin_us_here() if spin_us is None else spin_us) * 1e-6
        self._spin_s = self._max_spin_s
        self._sleep = select.poll()
        self._sleep.register(ring.signal, select.POLLIN)
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes whoever leads, for closing
        self._sleep.register(self._stop, select.POLLIN)

    # -- transfers

    def run(self, op: t.TransferOp, local: ListLike, remote: ListLike, options: TransferOptions) -> Track | None:
        """Submit and wait for the end.

        Raises:
            XferdError: it was refused.
            Unavailable: the ring or the daemon went before it could say what it did.
        """
        made = self._submission(op, local, remote, options, 0)
        if made is None:
            return None
        track, submission = made
        ask = track.ask = Ask(track)
        if not self._send(ask, submission):
            return None
        self._over(ask, None)
        return self._answer(ask)

    def start(
        self,
        op: t.TransferOp | str,
        local: ListLike,
        remote: ListLike,
        options: TransferOptions,
        *,
        hold: bool,
        wait_s: float,
    ) -> Track | None:
        """Submit and wait until it is accepted, and with ``wait_s`` for so long for its end; raises as ``run``."""
        made = self._submission(op, local, remote, options, submit_flags(hold=hold))
        if made is None:
            return None
        track, submission = made
        ask = Ask(track, is_held=hold)
        if not hold:
            track.ask = ask
        if not self._send(ask, submission):
            return None
        self._accepted(ask)
        if self._answer(ask) is None:
            return None
        track = self._tracks.setdefault(track.id, track)
        if wait_s > 0:
            self._over(ask, time.monotonic() + wait_s)
        return track

    def post(self, transfer: TransferBase, wait_s: float) -> Track | None:
        """Post and return when it is accepted or, with ``wait_s``, has ended or that time is over.

        Raises:
            InvalidState: it has not ended.
            XferdError: it was refused.
        """
        if transfer._track is not None:
            self.glance()
        track = self._track_to_post(transfer)
        if track is None:
            return None
        self._settle(track)
        ask = Ask(track)
        track.post(ask)
        # Who waits for the end is not woken for less: it would take the core that the bytes are moved by.
        if not self._send(ask, post_of(track, tells_accepted=wait_s <= 0)):
            track.unpost()
            return None
        if wait_s <= 0:
            self._accepted(ask)
        elif not self._over(ask, time.monotonic() + wait_s):
            self._ask_if_accepted(ask)
        return track if self._is_posted(track, ask) else None

    def post_many(self, transfers: Sequence[TransferBase]) -> list[TransferBase]:
        """Post with one doorbell, and return, when the rest is accepted, those that gRPC has to post.

        Raises:
            XferdError: as ``post``; the first refusal, when all have been answered.
        """
        self.glance()
        tracks = self._tracks_to_post(transfers)
        if tracks is None:
            return list(transfers)
        for track in tracks:
            self._settle(track)
        asks = [Ask(track) for track in tracks]
        for track, ask in zip(tracks, asks, strict=True):
            track.post(ask)
        self._send_all([(ask, post_of(track, tells_accepted=True)) for ask, track in zip(asks, tracks, strict=True)])
        left, refusals = [], []
        for transfer, track, ask in zip(transfers, tracks, asks, strict=True):
            self._accepted(ask)
            try:
                if not self._is_posted(track, ask):
                    left.append(transfer)
            except XferdError as refusal:
                refusals.append(refusal)
        if refusals:
            raise refusals[0]
        return left

    def _settle(self, track: Track) -> None:
        """Wait for what the ring is about to tell of an end that gRPC has told."""
        if track.ask is not None:
            self._over(track.ask, None)

    def _accepted(self, ask: Ask) -> None:
        self._until(lambda: ask.is_accepted or ask.is_over, (ask,), None)

    def _ask_if_accepted(self, ask: Ask) -> None:
        """Find out whether a post came about whose acceptance is not told: a refusal would come before what is now."""
        fence = Ask()
        if self._send(fence, fence_of()):
            self._over(fence, None)
        ask.is_accepted = ask.is_accepted or not (fence.is_lost or ask.is_over)

    def cancel(self, tracks: Sequence[Track]) -> bool:
        """Cancel, and return when no byte of them moves any more; False where gRPC has to do it."""
        asks = [Ask(track) for track in tracks]
        for ask, track in zip(asks, tracks, strict=True):
            if not self._send(ask, cancel_of(track)):
                return False
        self._until(lambda: all(ask.is_over for ask in asks), asks, None)
        for ask in asks:
            if ask.refusal is not None:
                raise ask.refusal
        return not any(ask.is_lost for ask in asks)

    def wait(self, tracks: Sequence[Track], timeout_s: float | None, *, any_of: bool) -> bool:
        """Return when all (or any) have ended or the time is over; False where gRPC has to go on waiting."""
        asks = [track.ask for track in tracks if track.ask is not None]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if any_of:
            self._until(lambda: any(ask.is_over for ask in asks), asks, deadline)
        else:
            all(self._over(ask, deadline) for ask in asks)
        return all(is_told(track) for track in tracks)

    # -- notifications

    def listen(self) -> None:
        """Let notifications come by the ring."""
        wanted = self._credits_wanted()
        if wanted and self._send(None, listen_of(wanted), wanted):
            self.is_listening = True

    def notifications(self, timeout_s: float, limit: int) -> tuple[list[t.Notification], CutNote | None]:
        """Wait for the first, and return what has come, or what stands for one that gRPC has to take."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.glance()
            arrival = self._ring.arrival
            taken = self._take_notes(limit)
            if taken[0] or taken[1] is not None or not self.is_usable:
                self.listen()
                return taken
            if not self._over(arrival, deadline):
                return taken

    # -- sending

    def _send(self, ask: Ask | None, submission: Submission, allowed: int = 0) -> bool:
        """Hand a submission over, waiting for room; False if the ring is lost."""
        try:
            with self._sending:
                self._put(ask, submission)
                self._ring.allowed += allowed
                self._ring.ring()
        except XferdError:
            self._check_closing()
            return False
        if self._ring.lost is not None and ask is not None:
            ask.lose()  # put just when all others were told
        return True

    def _send_all(self, submissions: Sequence[tuple[Ask, Submission]]) -> None:
        """Hand over several with one doorbell; the asks of those for which the ring is lost are lost."""
        try:
            with self._sending:
                for ask, submission in submissions:
                    self._put(ask, submission)
                self._ring.ring()
        except XferdError:
            self._check_closing()
        if self._ring.lost is not None:
            for ask, _ in submissions:
                if not ask.is_over:
                    ask.lose()

    def _put(self, ask: Ask | None, submission: Submission) -> None:
        while not self._ring.put(ask, *submission):
            self._check_closing()
            self._make_room()

    def _make_room(self) -> None:
        """Give the daemon a moment to take submissions: the one wait for which it has no event."""
        self._ring.ring()
        if not self._lead.acquire(blocking=False):
            time.sleep(_ROOM_S)  # somebody else leads
            return
        try:
            if not self._ring.reap() and self._ring.check() is None:
                self._doze(_ROOM_S)
        finally:
            self._leave_lead()

    # -- waiting

    def glance(self) -> None:
        """Take what has come, if nobody else is about to. No system call."""
        if self._lead.acquire(blocking=False):
            try:
                self._ring.reap()
            finally:
                self._leave_lead()

    def _answer(self, ask: Ask) -> Track | None:
        try:
            return self._answered(ask)
        except LostAnswer:
            raise self._unanswered(self._socket.end_reason(_END_NEWS_S)) from None

    def _check_closing(self) -> None:
        if self._is_closing:
            raise closed_meanwhile()

    def _over(self, ask: Ask, deadline: float | None) -> bool:
        """Return True when an ask is over, False at the deadline."""
        return ask.is_over or self._until(lambda: ask.is_over, (ask,), deadline)

    def _until(self, is_over: Callable[[], bool], asks: Sequence[Ask], deadline: float | None) -> bool:
        """Return True when ``is_over``, which a change of one of ``asks`` may bring about, False at the deadline."""
        while not is_over():
            if self._lead.acquire(blocking=False):
                try:
                    return self._attend(is_over, deadline)
                finally:
                    self._leave_lead()
            if not self._follow(is_over, asks, deadline):
                return is_over()
        return True

    def _follow(self, is_over: Callable[[], bool], asks: Sequence[Ask], deadline: float | None) -> bool:
        """Sleep until there is an answer or the lead is free; False when the time is over."""
        call: SimpleQueue[None] = SimpleQueue()
        wake = lambda: call.put(None)
        with self._gate:
            self._followers[call] = None
        for ask in asks:
            ask.waiters.append(wake)
        try:
            # Looked at after signing up: from here on no change and no free lead goes by unheard.
            if is_over() or not self._lead.locked():
                return True
            left_s = _MAX_SLEEP_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                return False
            with contextlib.suppress(Empty):
                call.get(timeout=min(left_s, _MAX_SLEEP_S))
            return True
        finally:
            for ask in asks:
                ask.waiters.remove(wake)
            with self._gate:
                del self._followers[call]
            if not self._lead.locked():  # it may have been this one's turn to lead, and it is not staying
                self._call_follower()

    def _leave_lead(self) -> None:
        self._lead.release()
        if self._followers:
            self._call_follower()

    def _call_follower(self) -> None:
        with self._gate:
            for call in self._followers:
                call.put(None)
                return

    def _attend(self, is_over: Callable[[], bool], deadline: float | None) -> bool:
        """Lead until ``is_over`` or the deadline."""
        ring = self._ring
        while True:
            ring.reap()
            if is_over():
                return True
            self._check_closing()
            if ring.check() is not None or (deadline is not None and time.monotonic() >= deadline):
                return is_over()
            began = time.perf_counter()
            if self._spin_s and not self._followers and self._spin(deadline):
                continue
            self._doze(_MAX_SLEEP_S if deadline is None else deadline - time.monotonic())
            # Spin as long as answers come soon enough for it, and try it again when they do. Where they do not, this
            # would take a core from whoever moves the bytes, and has to be woken all the same.
            soon = time.perf_counter() - began < self._max_spin_s
            self._spin_s = self._max_spin_s if soon else self._spin_s / 2 if self._spin_s > 1e-6 else 0.0

    def _spin(self, deadline: float | None) -> bool:
        """Look at the ring for a while; True when there is something."""
        words, at, number = self._ring.awaited
        now = time.perf_counter
        stop = now() + self._spin_s
        if deadline is not None:
            stop = min(stop, now() + deadline - time.monotonic())
        while words[at] != number:
            if now() > stop:
                return False
        return True

    def _doze(self, timeout_s: float) -> None:
        """Sleep until the daemon rings, has gone, or the time is over."""
        events = self._sleep.poll(min(max(timeout_s, 0.0), _MAX_SLEEP_S) * 1000)
        if any(fd == self._ring.signal for fd, _ in events) and not self._ring.drain():
            self._ring.reap()  # what it had still said
            if self._ring.check() is None:
                self._ring.lose_session()

    # -- the end

    def close(self) -> None:
        """Wake all who wait, which get ``Closed``, and let go of the memory. Twice is fine."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._ring.is_disowned:  # locks and wake-ups are those of the parent's threads
            self._let_go()
            return
        os.eventfd_write(self._stop, 1)
        with self._sending, self._lead:
            self._ring.lose(Closed("the client was closed"))  # which calls all followers
            self._let_go()

    def _let_go(self) -> None:
        self._ring.close()
        os.close(self._stop)
