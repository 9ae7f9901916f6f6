"""The worker's loop in this process, over a driver that does as a test says: what it tells, and when it looks."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest
from worker_rig import at

from xferd.api.errors import DeviceLost, MoveFailed
from xferd.plugins.cuda import control
from xferd.plugins.cuda.driver import Flight, Plan
from xferd.plugins.cuda.layout import COMMANDS, TOTAL_NBYTES, Engine, Outcome, SharedQueues, Side
from xferd.plugins.cuda.loop import LEARN_NBYTES, LOST_STATUS, MAX_STEP_NS, Loop, Paces, _UnderWay

MIB = 1 << 20
SPIN_NS = 200_000


class StubPlan(Plan):
    def __init__(self, nbytes=LEARN_NBYTES, engine=Engine.COPY, *, on_host=False):
        self.nbytes, self.engine, self.on_host = nbytes, engine, on_host
        self.drops = 0

    def drop(self):
        self.drops += 1


class StubFlight(Flight):
    """Its end is what ``end`` returns or raises."""

    def __init__(self, end):
        self.end = end

    def is_done(self):
        return self.end()

    def device_ns(self):
        return 5000


class StubDriver:
    """Begins what ``ends`` has the ends of, one after another."""

    def __init__(self, *ends):
        self.ends = list(ends)
        self.plans = []

    def allocate(self, nbytes):
        return 1 << 20, bytes(64)

    def free_nbytes(self):
        return 0

    def compile(self, pieces):
        self.plans.append(StubPlan(pieces.nbytes))
        return self.plans[-1]

    def begin(self, plan, wait_event, done_event):
        return StubFlight(self.ends.pop(0))


class Bench:
    """A loop, and the daemon's side of it."""

    def __init__(self, driver):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("loop")
        os.ftruncate(memory, TOTAL_NBYTES)
        self.wake, self.told = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self.queues = SharedQueues(memory)
        self.loop = Loop(driver, SharedQueues(memory), theirs, self.wake, self.told)
        self.theirs = theirs
        os.close(memory)
        self.status = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.socket.close()
        self.theirs.close()
        os.close(self.wake)
        os.close(self.told)

    @contextlib.contextmanager
    def running(self):
        """Let the loop run in a thread, with allocation 1, until its socket ends or the device is lost."""

        def run():
            self.status = self.loop.run(SPIN_NS)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            control.send(self.socket, control.Allocate(1, MIB))
            assert control.receive(self.socket).message.check()
            yield
        finally:
            self.socket.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()

    def put(self, cookie, *, table_id=0):
        slot = cookie % 16
        self.queues.tables[slot][:2] = [[at(1), 8], [at(1, 64), 8]]
        self.queues.put_command(cookie, table_id, 8, 1, 1, Side.DEVICE, Side.DEVICE, 0, slot, 0, 0, 0, 0)
        os.eventfd_write(self.wake, 1)

    def completions(self, count):
        """Return (cookie, outcome) of so many, and of all that come with them."""
        found, deadline = [], time.monotonic() + 10
        while len(found) < count:
            assert time.monotonic() < deadline
            completion = self.queues.take_completion()
            if completion is not None:
                found.append((completion[0], Outcome(completion[3])))
        return found


# ---------------------------------------------------------------------------------------- what is told


def test_a_device_that_is_lost_fails_only_what_was_not_told_yet():
    """Each command is told of once: the daemon has forgotten a cookie that it has heard of."""
    are_begun = threading.Event()

    def second():
        if are_begun.is_set():  # so the first has just ended, in the same look
            raise DeviceLost("gone", remedy="none")
        return False

    with Bench(StubDriver(are_begun.is_set, second, are_begun.set)) as bench:
        with bench.running():
            bench.put(1)
            bench.put(2)
            bench.put(3)
            told = bench.completions(3)
        assert sorted(told) == [(1, Outcome.DONE), (2, Outcome.FAILED), (3, Outcome.FAILED)]
        assert bench.queues.take_completion() is None
        assert bench.status == LOST_STATUS
        assert os.eventfd_read(bench.told), "the daemon was rung for"


def test_moves_end_in_any_order_and_plans_that_are_not_kept_go_with_them():
    gates = [threading.Event() for _ in range(3)]
    driver = StubDriver(*(gate.is_set for gate in gates))

    def failing():
        raise MoveFailed("this one", remedy="none")

    driver.ends.append(failing)
    with Bench(driver) as bench, bench.running():
        for cookie in (1, 2, 3, 4):
            bench.put(cookie, table_id=7 if cookie == 2 else 0)
        assert bench.completions(1) == [(4, Outcome.FAILED)]
        for number in (1, 0, 2):
            gates[number].set()
            assert bench.completions(1) == [(number + 1, Outcome.DONE)]
    assert [plan.drops for plan in driver.plans] == [1, 0, 1, 1]
    assert bench.status == 0


# ---------------------------------------------------------------------------------------- how long moves take


def test_nothing_is_known_of_moves_that_were_not_seen():
    paces = Paces()
    paces.learn(StubPlan(LEARN_NBYTES), 1_000_000)
    assert paces.least_ns(StubPlan()) > 0
    assert paces.least_ns(StubPlan(on_host=True)) == 0
    assert paces.least_ns(StubPlan(engine=Engine.KERNEL)) == 0


def test_the_least_time_goes_with_the_bytes_and_leaves_some_room():
    paces = Paces()
    paces.learn(StubPlan(LEARN_NBYTES), 1_000_000)
    assert paces.least_ns(StubPlan(LEARN_NBYTES)) == 950_000
    assert paces.least_ns(StubPlan(4 * LEARN_NBYTES)) == 3_800_000
    assert paces.least_ns(StubPlan(LEARN_NBYTES // 16)) == pytest.approx(59_375, abs=1)


def test_the_best_counts_whatever_comes_after():
    """Moves that wait for others, or for an event, take longer than they need; none takes less."""
    paces = Paces()
    for taken_ns in (2_000_000, 1_000_000, 50_000_000):
        paces.learn(StubPlan(), taken_ns)
    assert paces.least_ns(StubPlan()) == 950_000


def test_short_moves_say_little_of_speed():
    paces = Paces()
    paces.learn(StubPlan(LEARN_NBYTES - 1), 1000)
    assert paces.least_ns(StubPlan()) == 0


@pytest.mark.parametrize("taken_ns", [0, 1, -5])
def test_a_reading_that_is_too_short_only_makes_the_loop_look_early(taken_ns):
    paces = Paces()
    paces.learn(StubPlan(), taken_ns)
    assert paces.least_ns(StubPlan()) == 0
    assert paces.least_ns(StubPlan(COMMANDS * LEARN_NBYTES)) < 1000


# ---------------------------------------------------------------------------------------- when it looks


class Watched(Loop):
    """Notes how long it would sleep, in nanoseconds; None where it waits for the daemon."""

    waits: list

    def _wait(self, timeout_s):
        self.waits.append(None if timeout_s is None else round(timeout_s * 1e9))


@pytest.fixture
def rests():
    """How long the loop sleeps: (how long the last move is under way, how long nothing has come) to what it does."""
    with Bench(StubDriver()) as bench:
        loop = Watched(StubDriver(), bench.queues, bench.theirs, bench.wake, bench.told)
        loop._paces.learn(StubPlan(), 1_000_000)  # so LEARN_NBYTES take 950 us at least

        def rest(taken_ns=None, nbytes=LEARN_NBYTES, idle_ns=0):
            loop.waits, now = [], 10**12
            loop._active_ns = now - idle_ns
            loop._under_way = []
            if taken_ns is not None:
                older = _UnderWay(1, None, None, 0)
                older.kept = type("Kept", (), {"plan": StubPlan(1)})()
                newer = _UnderWay(2, type("Kept", (), {"plan": StubPlan(nbytes)})(), None, now - taken_ns)
                loop._under_way = [older, newer]
            loop._rest(now, SPIN_NS)
            return loop.waits

        yield rest


def test_a_move_that_cannot_have_ended_is_slept_through_until_shortly_before(rests):
    assert rests(0) == [750_000], "its least time but for what an idle worker spins"
    assert rests(500_000) == [250_000]
    assert rests(0, 16 * LEARN_NBYTES) == [MAX_STEP_NS]
    assert rests(0, LEARN_NBYTES // 4) == [], "too short to sleep: a sleeper wakes late"


def test_a_move_near_its_end_is_looked_at_without_a_pause(rests):
    assert rests(600_000) == []
    assert rests(1_000_000) == []
    assert rests(1_425_000) == []


def test_a_move_that_takes_long_is_looked_at_in_twentieths_of_its_time(rests):
    assert rests(1_425_001) == [71_250]
    assert rests(10_000_000) == [500_000]
    assert rests(10**9) == [MAX_STEP_NS]


def test_a_move_of_unknown_pace_is_spun_for_as_long_as_an_idle_worker_spins(rests):
    assert rests(SPIN_NS, nbytes=0) == []
    assert rests(SPIN_NS + 20, nbytes=0) == [10_001]


def test_an_idle_loop_spins_and_then_sleeps_until_it_is_rung_for(rests):
    assert rests(idle_ns=SPIN_NS) == []
    assert rests(idle_ns=SPIN_NS + 1) == [None]
