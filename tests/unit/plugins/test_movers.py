"""Mover threads are bounded and named, and a cancelled call never outlives its cancellation."""

from __future__ import annotations

import asyncio
import functools
import os
import threading

import pytest

from xferd.api.errors import Closed
from xferd.plugins.base import BackendStatistics
from xferd.plugins.movers import MoveCounter, MoverPool


class Gate:
    """A blocking call that says when it has begun, and ends when it is let."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.may_end = threading.Event()
        self.ended = False

    def __call__(self) -> str:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.may_end.wait(60)
        self.ended = True
        return threading.current_thread().name


async def test_runs_in_a_named_thread_and_returns_the_result():
    pool = MoverPool("test", 2)
    name = await pool.run(lambda: threading.current_thread().name)
    assert name.startswith("xferd-test_")
    assert await pool.run(divmod, 7, 4) == (1, 3)
    assert await pool.run(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 1, 0)
    await pool.aclose()


async def test_no_more_threads_than_said():
    pool = MoverPool("test", 2)
    gates = [Gate() for _ in range(3)]
    calls = [asyncio.create_task(pool.run(gate)) for gate in gates]
    await gates[0].begun.wait()
    await gates[1].begun.wait()
    assert "3 calls, 2 threads" in repr(pool)
    assert not gates[2].begun.is_set()
    gates[0].may_end.set()
    await gates[2].begun.wait()
    for gate in gates:
        gate.may_end.set()
    assert len(set(await asyncio.gather(*calls))) == 2
    await pool.aclose()


async def test_cancel_waits_for_the_running_call_however_often():
    pool, gate = MoverPool("test", 1), Gate()
    call = asyncio.create_task(pool.run(gate))
    await gate.begun.wait()
    for _ in range(3):
        call.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not call.done()
    gate.may_end.set()
    await asyncio.wait((call,))
    assert call.cancelled()
    assert gate.ended
    await pool.aclose()


async def test_cancelled_call_that_fails_is_still_cancelled():
    pool, gate = MoverPool("test", 1), Gate()

    def fail() -> None:
        gate()
        raise ValueError("late")

    call = asyncio.create_task(pool.run(fail))
    await gate.begun.wait()
    call.cancel()
    gate.may_end.set()
    await asyncio.wait((call,))
    assert call.cancelled()
    await pool.aclose()


async def test_call_cancelled_in_the_queue_never_begins():
    pool, first, second = MoverPool("test", 1), Gate(), Gate()
    running = asyncio.create_task(pool.run(first))
    await first.begun.wait()
    waiting = asyncio.create_task(pool.run(second))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert waiting.cancelled()
    first.may_end.set()
    await running
    await pool.aclose()
    assert not second.begun.is_set()


async def test_close_waits_refuses_and_ends_the_threads():
    before = set(threading.enumerate())
    pool, gate = MoverPool("test", 3), Gate()
    call = asyncio.create_task(pool.run(gate))
    await gate.begun.wait()
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    with pytest.raises(Closed):
        await pool.run(int)
    gate.may_end.set()
    await closing
    assert call.done()
    await pool.aclose()
    assert set(threading.enumerate()) == before
    assert "closed" in repr(pool)


async def test_cancelled_close_drops_what_waits():
    pool, first, second = MoverPool("test", 1), Gate(), Gate()
    running = asyncio.create_task(pool.run(first))
    await first.begun.wait()
    waiting = asyncio.create_task(pool.run(second))
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait((closing,))
    assert closing.cancelled()
    first.may_end.set()
    assert (await running).startswith("xferd-test")
    await asyncio.wait((waiting,))
    assert waiting.cancelled()
    assert not second.begun.is_set()
    await pool.aclose()


def test_counter_tells_moved_failed_and_cancelled_apart():
    counter = MoveCounter()
    with counter.moving(10):
        assert counter.snapshot(2) == BackendStatistics(0, 0, 0, 1, 2)
    with pytest.raises(ValueError, match="x"), counter.moving(10):
        raise ValueError("x")
    with pytest.raises(asyncio.CancelledError), counter.moving(10):
        raise asyncio.CancelledError
    assert counter.snapshot(2) == BackendStatistics(10, 1, 1, 0, 2)


async def test_batch_runs_side_by_side_and_gives_results_in_order():
    pool = MoverPool("test", 2)
    meet = threading.Barrier(2)

    def call(number: int) -> int:
        meet.wait(60)
        return number

    assert await pool.run_all([functools.partial(call, 1), functools.partial(call, 2)]) == [1, 2]
    assert pool.idle == 2
    await pool.aclose()


async def test_batch_that_fails_waits_for_its_other_calls():
    pool, gate = MoverPool("test", 2), Gate()

    def fail() -> str:
        raise ValueError("early")

    batch = asyncio.create_task(pool.run_all([fail, gate]))
    await gate.begun.wait()
    assert pool.idle == 0
    await asyncio.sleep(0)
    assert not batch.done()
    gate.may_end.set()
    with pytest.raises(ValueError, match="early"):
        await batch
    assert gate.ended
    await pool.aclose()


async def test_cancelled_batch_drops_what_waits_and_waits_for_what_runs():
    pool, first, second = MoverPool("test", 1), Gate(), Gate()
    batch = asyncio.create_task(pool.run_all([first, second]))
    await first.begun.wait()
    batch.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not batch.done()
    first.may_end.set()
    await asyncio.wait((batch,))
    assert batch.cancelled()
    await pool.aclose()
    assert not second.begun.is_set()


async def test_threads_give_way_as_they_are_told():
    pool = MoverPool("test", 1, nice=3)
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert await pool.run(os.getpriority, os.PRIO_PROCESS, 0) == mine + 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine
    await pool.aclose()


async def test_begun_calls_are_told_together_and_once_for_all_that_ended_meanwhile():
    pool, told = MoverPool("test", 2), []
    meet = threading.Barrier(2)
    is_told = asyncio.Event()

    def done(batch):
        told.append(batch.results())
        is_told.set()

    pool.begin([functools.partial(meet.wait, 60)] * 2, done)
    assert not told
    await is_told.wait()
    assert [sorted(results) for results in told] == [[0, 1]]
    assert pool.idle == 2
    await pool.aclose()
    with pytest.raises(Closed):
        pool.begin([int], done)


async def test_an_aborted_batch_is_told_when_its_last_call_has_ended_and_never_from_inside():
    pool, gate, told = MoverPool("test", 1), Gate(), []
    never = Gate()
    is_told = asyncio.Event()
    running = pool.begin([gate, never], lambda batch: (told.append(batch), is_told.set()))
    waiting = pool.begin([never], told.append)
    await gate.begun.wait()
    waiting.abort()
    assert not told
    await asyncio.sleep(0)
    assert told == [waiting]
    with pytest.raises(asyncio.CancelledError):
        waiting.results()
    running.abort()
    running.abort()
    for _ in range(3):
        await asyncio.sleep(0)
    assert told == [waiting], "told while a call was under way"
    gate.may_end.set()
    await is_told.wait()
    assert told == [waiting, running]
    assert not never.begun.is_set()
    running.abort()  # too late, and fine
    await pool.aclose()


async def test_a_bug_in_one_end_leaves_the_others_told():
    pool, gate, told = MoverPool("test", 1), Gate(), []
    loop = asyncio.get_running_loop()
    bugs: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: bugs.append(context))
    running = pool.begin([gate], told.append)
    await gate.begun.wait()

    def fail(_):
        raise ValueError("bug")

    for batch in [pool.begin([int], fail), pool.begin([int], told.append)]:
        batch.abort()
    for _ in range(4):
        await asyncio.sleep(0)
    assert len(told) == len(bugs) == 1
    gate.may_end.set()
    await pool.aclose()
    for _ in range(3):
        await asyncio.sleep(0)
    assert told[1:] == [running]
