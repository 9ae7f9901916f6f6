"""Bytes that arrived are put in place together, each once, and never after whoever waited has left."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

pytest.importorskip("obstore", reason="needs xferd[object]")

from xferd.api.errors import Closed, XferdError
from xferd.plugins.base import MappedSpace, ProcessSpace
from xferd.plugins.local.mapped import MappedCopier
from xferd.plugins.movers import MoverPool
from xferd.plugins.object.digests import leaves_of
from xferd.plugins.object.placing import Arrival, Placer
from xferd.plugins.object.ranges import Get
from xferd.plugins.vectored import iov_of

NBYTES = 1000


class Gate(MappedCopier):
    """Copies once it is let; tells how many copies it was asked for, and of how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.begun = threading.Event()
        self.open = threading.Event()

    def copy(self, source, target) -> int:
        self.asked.append(len(source))
        self.begun.set()
        assert self.open.wait(10)
        return super().copy(source, target)


class Rig:
    """A placer of one thread behind a gate, and memory for arrivals."""

    def __init__(self) -> None:
        self.copier = Gate()
        self.movers = MoverPool("placing", 1)
        self.placer = Placer(self.movers, self.copier)
        self.memory = np.zeros((8, NBYTES), dtype=np.uint8)

    def arrival(self, number: int, *, hashes: bool = False) -> Arrival:
        """Return bytes that are all ``number``, for their row of the memory."""
        place = np.array([[self.memory[number].ctypes.data, NBYTES]], dtype=np.uint64)
        return Arrival(bytes([number]) * NBYTES, Get(0, NBYTES, place), MappedSpace(), hashes=hashes)

    def place(self, number: int, *, hashes: bool = False) -> asyncio.Task[object]:
        return asyncio.create_task(self.placer.place(self.arrival(number, hashes=hashes)))

    async def until_begun(self) -> None:
        """Return when a copy is under way."""
        assert await asyncio.to_thread(self.copier.begun.wait, 10)


@pytest.fixture
async def rig():
    made = Rig()
    yield made
    made.copier.open.set()
    await made.movers.aclose()


async def test_what_arrives_while_a_thread_copies_is_placed_by_one_copy(rig):
    first = rig.place(1)
    await rig.until_begun()
    rest = [rig.place(n, hashes=n == 3) for n in (2, 3, 4)]
    await asyncio.sleep(0)
    rig.copier.open.set()
    results = await asyncio.gather(first, *rest)
    assert rig.copier.asked == [1, 3]
    for number in (1, 2, 3, 4):
        assert (rig.memory[number] == number).all()
    assert [result is None for result in results] == [True, True, False, True]
    wanted = np.full(NBYTES, 3, dtype=np.uint8)
    assert np.array_equal(results[2], leaves_of(iov_of(wanted.data)))
    await asyncio.wait_for(rig.place(5), 10)  # and another one after it had nothing to do


async def test_one_that_is_cancelled_while_it_waits_is_never_placed(rig):
    first = rig.place(1)
    await rig.until_begun()
    second, third = rig.place(2), rig.place(3)
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    rig.copier.open.set()
    await asyncio.gather(first, third)
    assert not rig.memory[2].any()
    assert (rig.memory[3] == 3).all()


async def test_one_that_is_cancelled_while_it_is_copied_returns_after_the_copy(rig):
    task = rig.place(1)
    await rig.until_begun()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    rig.copier.open.set()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    assert (rig.memory[1] == 1).all()


async def test_a_process_that_cannot_be_written_fails_its_own_arrivals_only(rig):
    rig.copier.open.set()
    table = np.array([[4096, NBYTES]], dtype=np.uint64)  # nobody has memory there
    bad = Arrival(bytes(NBYTES), Get(0, NBYTES, table), ProcessSpace(1 << 22, -1), hashes=False)
    results = await asyncio.gather(rig.placer.place(bad), rig.place(2), return_exceptions=True)
    assert isinstance(results[0], XferdError)
    assert results[1] is None
    assert (rig.memory[2] == 2).all()


async def test_after_the_end_nothing_is_placed(rig):
    rig.copier.open.set()
    await rig.movers.aclose()
    with pytest.raises(Closed):
        await rig.placer.place(rig.arrival(1))
    assert not rig.memory.any()
