"""The loop of a device worker: one thread that takes commands, looks at those under way, and answers requests.

Commands come through shared memory, requests over the socket. When nothing has come for a while the loop sleeps until
the daemon rings or asks.

What is under way is looked at by turns, not waited for, because the next command or request must not wait either; for
the same reason a blocking event of CUDA's is no help. A move is looked at without a pause for as long as an idle worker
spins, and before that not at all where it cannot have ended yet (``Paces``). One that takes half as long again is
looked at in steps of a twentieth of the time that it has taken so far: it is seen to end at most 5 % late, and costs
next to no processor time.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from xferd.api.errors import DeviceLost, MoveFailed, Unsupported, XferdError
from xferd.plugins.cuda import control
from xferd.plugins.cuda.driver import Pieces
from xferd.plugins.cuda.files import FilePlan
from xferd.plugins.cuda.kept import Kept, KeptPlans
from xferd.plugins.cuda.layout import NO_TABLE, Engine, Outcome, Side
from xferd.plugins.cuda.requests import Requests
from xferd.plugins.cuda.tables import Missing, Places, Translated, pieces_of

if TYPE_CHECKING:
    import socket

    from xferd.plugins.cuda.driver import Driver, Flight, Plan
    from xferd.plugins.cuda.files import FileMovers
    from xferd.plugins.cuda.layout import SharedQueues

MAX_STEP_NS: Final = 1_000_000
"""Between two looks at a move that takes long."""

CONTROL_NS: Final = 1_000_000
"""Between two looks at the socket while commands keep coming."""

LEARN_NBYTES: Final = 16 << 20
"""Moves of as many bytes tell how fast such moves are at best."""

MAX_TURN: Final = 8
"""Commands begun before those under way are looked at again."""

GARBAGE: Final = 10_000
"""Objects made since the last collection from which on an idle worker collects."""

LOST_STATUS: Final = 3
"""Exit status after the device was lost."""


class _UnknownTable(Exception):
    """A command names a table that is not kept here: the daemon sends it along."""


class _UnderWay:
    """A command whose bytes move."""

    __slots__ = ("begun_ns", "cookie", "flight", "kept")

    def __init__(self, cookie: int, kept: Kept, flight: Flight, begun_ns: int) -> None:
        self.cookie = cookie
        self.kept = kept
        self.flight = flight
        self.begun_ns = begun_ns


class Paces:
    """The best speeds seen, by what moves: how long a move takes at least.

    A best that is too good, by a reading that was too short, only lets the loop look earlier than it need.
    """

    def __init__(self) -> None:
        self._best: dict[tuple[Engine, bool], float] = {}

    def learn(self, plan: Plan, taken_ns: int) -> None:
        """Hear of a move that has ended. Short ones say little of speed."""
        if plan.nbytes >= LEARN_NBYTES:
            key = plan.engine, plan.on_host
            self._best[key] = max(self._best.get(key, 0.0), plan.nbytes / max(taken_ns, 1))

    def least_ns(self, plan: Plan) -> int:
        """Return how long a move takes at least, with some room; 0 where nothing like it was seen."""
        best = self._best.get((plan.engine, plan.on_host))
        return 0 if best is None else int(plan.nbytes / best * 0.95)


class Loop:
    """The loop. ``run`` returns the exit status."""

    def __init__(
        self,
        driver: Driver,
        queues: SharedQueues,
        sock: socket.socket,
        wake: int,
        told: int,
        files: FileMovers | None = None,
    ) -> None:
        self._driver = driver
        self._queues = queues
        self._socket = sock
        self._asked = sock.fileno()
        self._wake = wake
        self._told = told
        self._places = Places(
            lambda address, nbytes, is_writable: driver.lock_host(address, nbytes, is_writable=is_writable)
        )
        self._kept = KeptPlans()
        self._requests = Requests(driver, self._places, self._kept)
        self._files = files
        self._paces = Paces()
        self._under_way: list[_UnderWay] = []
        self._is_open = True
        self._active_ns = 0
        self._asked_ns = 0

    def run(self, spin_ns: int) -> int:
        """Work until the socket ends, or the device is lost; returns the exit status."""
        now_ns = time.perf_counter_ns
        self._active_ns = self._asked_ns = now_ns()
        try:
            while self._is_open:
                is_active = self._take_commands()
                if self._under_way and self._look():
                    is_active = True
                now = now_ns()
                if is_active:
                    self._active_ns = now
                    if now - self._asked_ns > CONTROL_NS:
                        self._wait(0.0)
                else:
                    self._rest(now, spin_ns)
        except DeviceLost as error:
            self._fail_all(error)
            return LOST_STATUS
        return 0

    # -- commands

    def _take_commands(self) -> bool:
        for turn in range(MAX_TURN):
            command = self._queues.take_command()
            if command is None:
                return turn > 0
            self._begin(command)
        return True

    def _begin(self, command: tuple[int, ...]) -> None:
        cookie = command[0]
        try:
            kept, flight = self._start(command)
        except Missing:
            self._end(cookie, Outcome.MISSING)
        except _UnknownTable:
            self._end(cookie, Outcome.UNKNOWN_TABLE)
        except DeviceLost as error:
            self._end(cookie, Outcome.FAILED, str(error))
            raise
        except MoveFailed as error:
            self._end(cookie, Outcome.FAILED, str(error))
        except XferdError as error:
            self._end(cookie, Outcome.REFUSED, str(error))
        else:
            self._under_way.append(_UnderWay(cookie, kept, flight, time.perf_counter_ns()))

    def _start(self, command: tuple[int, ...]) -> tuple[Kept, Flight]:
        _, table_id, _, _, _, source_side, target_side, _, slot, wait_event, done_event, _, _, _ = command
        wait, done = self._requests.event(wait_event), self._requests.event(done_event)
        if Side.FILE in (source_side, target_side):
            return self._start_file(command)
        kept = self._kept.get(table_id) if slot == NO_TABLE else self._compile(command)
        if kept is None:
            raise _UnknownTable
        kept.flights += 1
        try:
            return kept, self._driver.begin(kept.plan, wait, done)
        except XferdError:
            kept.end_flight()
            raise

    def _start_file(self, command: tuple[int, ...]) -> tuple[Kept, Flight]:
        """Give a move between a file and GPU memory to the library's threads."""
        _, _, _, _, _, _, target_side, _, _, _, _, _, file, _ = command
        if self._files is None:
            raise Unsupported("this worker was not asked for files", remedy="configure [backends.gds]")
        is_write = target_side == Side.FILE
        pieces = pieces_of(*self._translate(command))
        path = f"/proc/{os.getppid()}/fd/{file}"
        plan = FilePlan(path, pieces[:, [1, 0, 2]] if is_write else pieces, is_write=is_write)
        return Kept(plan, 0, flights=1), self._files.begin(plan)

    def _compile(self, command: tuple[int, ...]) -> Kept:
        """Make a plan of a command's table, and keep it if it has a number."""
        _, table_id, nbytes, _, _, source_side, target_side, _, _, _, _, _, _, _ = command
        source, target = self._translate(command)
        pieces = pieces_of(source, target)
        plan = self._driver.compile(Pieces(pieces, nbytes, Side.HOST in (source_side, target_side)))
        kept = Kept(plan, pieces.nbytes)
        if table_id:
            allocations: set[int] = set()
            segments: set[int] = set()
            for side, translated in ((source_side, source), (target_side, target)):
                (segments if side == Side.HOST else allocations).update(np.unique(translated.numbers).tolist())
            kept.allocations, kept.segments = frozenset(allocations), frozenset(segments)
            self._kept.put(table_id, kept)
        return kept

    def _translate(self, command: tuple[int, ...]) -> tuple[Translated, Translated]:
        _, _, _, rows, others, source_side, target_side, _, slot, _, _, _, _, _ = command
        table, translate = self._queues.tables[slot], self._places.translate
        return translate(source_side, table[:rows]), translate(target_side, table[rows : rows + others])

    def _look(self) -> bool:
        """Tell of commands that have ended; returns whether any has."""
        has_ended = False
        for one in tuple(self._under_way):
            try:
                if not one.flight.is_done():
                    continue
                nbytes, text, outcome = one.kept.plan.nbytes, "", Outcome.DONE
            except MoveFailed as error:
                nbytes, text, outcome = 0, str(error), Outcome.FAILED
            device_ns = one.flight.device_ns()
            if outcome is Outcome.DONE:
                self._paces.learn(one.kept.plan, device_ns)
            self._under_way.remove(one)  # now: if the next look says that the device is lost, those that are left fail
            self._queues.put_completion(one.cookie, nbytes, device_ns, outcome, one.kept.plan.engine, text)
            one.kept.end_flight()
            has_ended = True
        if has_ended:
            os.eventfd_write(self._told, 1)
        return has_ended

    def _end(self, cookie: int, outcome: Outcome, text: str = "") -> None:
        """Tell of a command of which no byte has moved."""
        self._queues.put_completion(cookie, 0, 0, outcome, Engine.NONE, text)
        os.eventfd_write(self._told, 1)

    def _fail_all(self, error: DeviceLost) -> None:
        for one in self._under_way:
            self._queues.put_completion(one.cookie, 0, 0, Outcome.FAILED, Engine.NONE, str(error))
        os.eventfd_write(self._told, 1)

    # -- waiting

    def _rest(self, now: int, spin_ns: int) -> None:
        if self._under_way:
            last = self._under_way[-1]  # the one begun last is likely the shortest
            taken_ns, least_ns = now - last.begun_ns, self._paces.least_ns(last.kept.plan)
            if least_ns - taken_ns > 2 * spin_ns:  # a sleeper wakes late, and the later the longer it slept
                self._wait(min(least_ns - taken_ns - spin_ns, MAX_STEP_NS) * 1e-9)
                return
            if taken_ns > max(spin_ns, least_ns + least_ns // 2):
                self._wait(min(taken_ns // 20, MAX_STEP_NS) * 1e-9)
                return
        elif now - self._active_ns > spin_ns:
            if gc.get_count()[0] > GARBAGE:
                gc.collect()
            self._wait(None)
            return
        os.sched_yield()

    def _wait(self, timeout_s: float | None) -> None:
        """Wait for the daemon to ring or ask, and answer."""
        ready, _, _ = select.select((self._wake, self._asked), (), (), timeout_s)
        self._asked_ns = time.perf_counter_ns()
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        if self._asked in ready:
            self._answer()

    def _answer(self) -> None:
        try:
            received = control.receive(self._socket)
        except ConnectionResetError:
            received = None
        if received is None:
            self._is_open = False
            return
        try:
            reply = self._requests.answer(received)
        except DeviceLost as error:
            control.send(self._socket, control.Reply.of(error))
            raise
        with contextlib.suppress(DeviceLost):  # the daemon has gone; the socket says so next
            control.send(self._socket, reply)
        self._active_ns = time.perf_counter_ns()
