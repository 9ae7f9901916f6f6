"""Staging slots go to whoever came first, neither side can starve the other, and nobody keeps one by accident."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from xferd.api.errors import Closed, ConfigError, InvalidArgument, LimitExceeded, Overloaded
from xferd.daemon.memory.staging import StagingPool, StagingSlot

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOT = 4096


@pytest.fixture
def pool() -> Iterator[StagingPool]:
    """Four slots, of which each side may take three."""
    made = StagingPool(4 * SLOT + 100, SLOT)
    yield made
    made.check_invariants()
    assert made.holds() == []
    made.close()


async def waiting(pool: StagingPool, holder: str) -> asyncio.Task[StagingSlot]:
    """Start an ``acquire`` and let it run until it waits."""
    task = asyncio.create_task(pool.acquire(holder), name=holder)
    await asyncio.sleep(0)
    return task


async def test_slots_do_not_overlap_and_can_be_written(pool: StagingPool) -> None:
    slots = [await pool.acquire("a") for _ in range(3)]
    addresses = sorted(slot.address for slot in slots)
    assert all(b - a >= SLOT for a, b in itertools.pairwise(addresses))
    for number, slot in enumerate(slots):
        slot.view[:] = number + 1
    for number, slot in enumerate(slots):
        assert slot.view.min() == slot.view.max() == number + 1
        assert slot.iov(17).tolist() == [[slot.address, 17]]
        pool.release(slot)


async def test_slots_are_a_memfd_that_goes_with_the_pool() -> None:
    pool = StagingPool(2 * SLOT, SLOT)
    slot = await pool.acquire("a")
    slot.view[:] = 7
    fd = pool.fd
    assert os.pread(fd, SLOT, slot.address - pool.address) == b"\7" * SLOT
    pool.release(slot)
    pool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_first_come_first_served(pool: StagingPool) -> None:
    held = [await pool.acquire("a") for _ in range(3)]
    first, second = await waiting(pool, "first"), await waiting(pool, "second")
    assert pool.statistics().waiting_acquire == 2
    pool.release(held.pop())
    slot = await first
    assert not second.done()
    pool.release(slot)
    for taken in (await second, *held):
        pool.release(taken)


async def test_each_side_has_a_slot_that_the_other_cannot_take(pool: StagingPool) -> None:
    acquired = [await pool.acquire("transfer") for _ in range(3)]
    waiter = await waiting(pool, "transfer")
    borrowed = pool.borrow(0.0, "lane")
    with pytest.raises(Overloaded, match="lane"):
        pool.borrow(0.001, "lane")
    assert [hold.owner for hold in pool.holds()] == ["transfer"] * 3 + ["lane"]
    pool.give_back(borrowed)
    assert not waiter.done()  # the free slot is the other side's
    pool.release(acquired.pop())
    for slot in (await waiter, *acquired):
        pool.release(slot)
    lent = [pool.borrow(0.0) for _ in range(3)]
    pool.release(await pool.acquire("transfer"))
    for slot in lent:
        pool.give_back(slot)
    assert pool.statistics().refused == 1


@pytest.mark.parametrize("served", [False, True])
async def test_a_cancelled_wait_holds_nothing(pool: StagingPool, served: bool) -> None:
    """Also when the slot was granted in the same turn of the loop as the cancel came."""
    held = [await pool.acquire("a") for _ in range(3)]
    cancelled, behind = await waiting(pool, "cancelled"), await waiting(pool, "behind")
    if served:
        pool.release(held.pop())
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    if not served:
        pool.release(held.pop())
    async with asyncio.timeout(10):
        pool.release(await behind)
    for slot in held:
        pool.release(slot)


async def test_a_blocked_thread_is_served_from_the_loop(pool: StagingPool) -> None:
    lent = [pool.borrow(0.0) for _ in range(3)]
    entered = threading.Event()

    def lane() -> None:
        entered.set()
        pool.give_back(pool.borrow(30.0, "lane"))

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(lane)
        entered.wait()
        for slot in lent:
            pool.give_back(slot)
        await asyncio.wrap_future(future)


async def test_a_slot_is_given_back_once(pool: StagingPool) -> None:
    slot = await pool.acquire("a")
    pool.release(slot)
    with pytest.raises(InvalidArgument, match="not on this loan"):
        pool.release(slot)
    again = await pool.acquire("b")
    assert again.index == slot.index  # warm memory first
    with pytest.raises(InvalidArgument):
        pool.release(slot)  # another's loan now
    pool.release(again)


async def test_a_lease_ends_with_its_block(pool: StagingPool) -> None:
    async def fails() -> None:
        async with pool.lease("t1", 100) as table:
            assert table[0, 1] == 100
            assert [hold.owner for hold in pool.holds()] == ["t1"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert pool.holds() == []
    with pytest.raises(LimitExceeded, match="4097"):
        async with pool.lease("t1", SLOT + 1):
            pass


async def test_closing_wakes_everybody() -> None:
    pool = StagingPool(2 * SLOT, SLOT)
    slot, lent = await pool.acquire("a"), pool.borrow(0.0)
    waiter = await waiting(pool, "late")
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(pool.borrow, 30.0)
        while not pool.statistics().waiting_borrow:  # noqa: ASYNC110 - the thread gives no other sign that it waits
            await asyncio.sleep(0)
        pool.close()
        pool.close()
        for woken in (waiter, asyncio.wrap_future(future)):
            with pytest.raises(Closed):
                await woken
    with pytest.raises(Closed):
        await pool.acquire("a")
    with pytest.raises(Closed):
        pool.borrow(1.0)
    slot.view[:] = 1  # a loan outlives the pool
    pool.release(slot)
    pool.release(lent)


@pytest.mark.parametrize(("nbytes", "slot_nbytes"), [(SLOT, SLOT), (0, SLOT), (SLOT, 0)])
def test_too_little_memory_is_refused_with_the_setting(nbytes: int, slot_nbytes: int) -> None:
    with pytest.raises(ConfigError, match=r"transfers\.staging"):
        StagingPool(nbytes, slot_nbytes)


@pytest.mark.slow
async def test_both_sides_get_on_under_load(pool: StagingPool) -> None:
    """No deadlock and no double grant when tasks and threads fight for the slots."""
    users: dict[int, str] = {}
    lock = threading.Lock()

    def use(slot: StagingSlot, name: str) -> None:
        with lock:
            assert slot.index not in users
            users[slot.index] = name
        slot.view[:8] = 1
        with lock:
            del users[slot.index]

    def lane(number: int) -> None:
        for _ in range(200):
            slot = pool.borrow(30.0, f"lane {number}")
            use(slot, "lane")
            pool.give_back(slot)

    async def transfer(number: int) -> None:
        for _ in range(100):
            slot = await pool.acquire(f"transfer {number}")
            use(slot, "transfer")
            await asyncio.sleep(0)
            pool.release(slot)

    with ThreadPoolExecutor(5) as executor:
        lanes = [executor.submit(lane, number) for number in range(5)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(transfer(number), name=f"transfer {number}")
            for future in lanes:
                await asyncio.wrap_future(future)
