"""What a chunk does on a ``tcp`` lane: sent by the event loop where the lane rests, withdrawn, cut, asked after."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from check_backend import pattern
from tcp_rig import tcp_maker

from xferd.api.errors import Cancelled, PeerLost
from xferd.plugins.base import Chunk, SpaceKind
from xferd.plugins.tcp import client

NBYTES = 4 << 20
ROWS = 1024


@asynccontextmanager
async def rig_of(lanes=1):
    async with tcp_maker() as rig:
        rig.arenas = []  # chunks have addresses, which keep nothing alive
        rig.backend._options = rig.backend._options.model_copy(update={"lanes": lanes, "abort_grace": 0.05})
        await rig.start()
        yield rig


class Ends:
    """The end of a chunk that was begun."""

    def __init__(self):
        self.told = []
        self._has_ended = asyncio.Event()

    def done(self, end):
        self.told.append(end)
        self._has_ended.set()

    async def get(self):
        async with asyncio.timeout(10.0):
            await self._has_ended.wait()
        assert len(self.told) == 1
        return self.told[0]


def memory(rig, op, nbytes=NBYTES):
    here, there = rig.arena(SpaceKind.MAPPED, nbytes), rig.arena(SpaceKind.REMOTE, nbytes)
    rig.arenas += [here, there]
    source, target = (there, here) if op == "READ" else (here, there)
    source.fill(pattern(nbytes, 1))
    return source, target


def chunk_of(source, target, transfer="t1", rows=ROWS):
    size = source.nbytes // rows
    spans = [(number * size, size) for number in range(rows)]
    return Chunk(source.extent(spans), target.extent(spans), size * rows, transfer, "cause", "agent")


def begin(rig, chunk):
    ends = Ends()
    ends.handle = rig.backend.begin(chunk, ends.done)
    return ends


async def lane_of(rig):
    """Return the one bulk lane, which is opened by a chunk."""
    source, target = memory(rig, "READ")
    await rig.backend.move(chunk_of(source, target))
    (peer,) = rig.backend._peers()
    (lane,) = peer.pool.lanes
    return lane


def asleep(lane):
    """Let the lane's thread wait for ``go`` before it takes what it is given; returns that."""
    go, take = threading.Event(), lane._jobs.get

    class Jobs:
        def get(self, block):
            job = take(block=block)
            go.wait(10.0)
            return job

        def __getattr__(self, name):
            return getattr(jobs, name)

    jobs, lane._jobs = lane._jobs, Jobs()
    return go


async def nudge(rig, lane):
    """Bring the thread past the queue that it waited at, to ``Jobs``."""
    source, target = memory(rig, "READ")
    go = asleep(lane)
    go.set()
    await rig.backend.move(chunk_of(source, target))
    go.clear()
    return go


def requests_of(rig, hook=lambda: None):
    """Return a list of what the peer will be asked; ``hook`` is called before."""
    asked, (peer,) = [], rig.backend._peers()
    request = peer.control.request

    async def asking(message, timeout_s):
        asked.append(message.WhichOneof("request"))
        hook()
        return await request(message, timeout_s)

    peer.control.request = asking
    return asked


async def test_the_first_chunk_is_left_to_move_and_later_ones_are_begun():
    async with rig_of() as rig:
        source, target = memory(rig, "READ")
        assert begin(rig, chunk_of(source, target)).handle is None
        await lane_of(rig)
        ends = begin(rig, chunk_of(source, target))
        assert ends.handle is not None
        assert rig.backend.statistics().busy == 1
        assert await ends.get() == NBYTES
        assert np.array_equal(target.read(), pattern(NBYTES, 1))
        counted = rig.backend.statistics()
        assert (counted.chunks, counted.moved_nbytes, counted.busy) == (2, 2 * NBYTES, 0)


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_the_peer_begins_before_the_lanes_thread_is_awake(op):
    async with rig_of() as rig:
        go = await nudge(rig, await lane_of(rig))
        source, target = memory(rig, op)
        opened, open_grant = threading.Event(), rig._handler.open_grant

        def opening(*arguments):
            opened.set()
            return open_grant(*arguments)

        rig._handler.open_grant = opening
        ends = begin(rig, chunk_of(source, target))
        try:
            assert await asyncio.to_thread(opened.wait, 5.0)
            assert not ends.told
        finally:
            go.set()
        assert await ends.get() == NBYTES
        assert np.array_equal(target.read(), pattern(NBYTES, 1))


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_a_request_of_many_rows_is_the_threads_to_send(op, monkeypatch):
    monkeypatch.setattr(client, "EARLY_ROWS", ROWS - 1)
    async with rig_of() as rig:
        go = await nudge(rig, await lane_of(rig))
        source, target = memory(rig, op)
        ends = begin(rig, chunk_of(source, target))
        claim = ends.handle._ticket._claim
        assert not claim.locked(), "it was sent at once"
        go.set()
        assert await ends.get() == NBYTES
        assert np.array_equal(target.read(), pattern(NBYTES, 1))


async def test_what_no_lane_has_begun_is_withdrawn_and_moves_nothing():
    async with rig_of() as rig:
        lane = await lane_of(rig)
        go = await nudge(rig, lane)
        source, target = memory(rig, "READ")
        first, second = (begin(rig, chunk_of(source, target)) for _ in range(2))  # of one transfer: in line on a lane
        second.handle.abort()
        second.handle.abort()
        assert not second.told, "told from inside"
        assert isinstance(await second.get(), Cancelled)
        assert not first.told
        go.set()
        assert await first.get() == NBYTES
        assert lane.is_good
        assert rig.backend.statistics().failures == 0


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_what_does_not_end_in_time_is_cut_and_the_peer_is_asked(op):
    async with rig_of() as rig:
        lane = await lane_of(rig)
        source, target = memory(rig, op)
        may_go, is_in, open_grant = threading.Event(), threading.Event(), rig._handler.open_grant

        def opening(*arguments):
            is_in.set()
            may_go.wait(10.0)
            return open_grant(*arguments)

        rig._handler.open_grant = opening
        asked = requests_of(rig, may_go.set)
        ends = begin(rig, chunk_of(source, target))
        assert await asyncio.to_thread(is_in.wait, 5.0)
        ends.handle.abort()
        assert isinstance(await ends.get(), Cancelled)
        assert asked == ["quiesce"]
        assert not lane.is_good
        before = target.read()
        rig._handler.open_grant = open_grant
        await rig.backend.move(chunk_of(*memory(rig, op), transfer="t2"))
        assert np.array_equal(target.read(), before)


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_a_lane_that_breaks_before_its_thread_is_awake_fails_the_chunk(op):
    async with rig_of() as rig:
        lane = await lane_of(rig)
        go = await nudge(rig, lane)
        source, target = memory(rig, op)
        asked = requests_of(rig)
        ends = begin(rig, chunk_of(source, target))
        lane.abort("a test")
        go.set()
        end = await ends.get()
        assert asked == (["quiesce"] if op == "WRITE" else []), "it may still write what it had received"
        assert isinstance(end, PeerLost)
        assert "a test" in str(end)
        assert end.remedy
        assert rig.backend.statistics().failures == 1
        assert rig.backend.statistics().busy == 0
        again = chunk_of(*memory(rig, op), transfer="t2")
        assert await rig.backend.move(again) == NBYTES


async def test_who_waits_for_a_lane_comes_before_who_begins():
    async with rig_of() as rig:
        go = await nudge(rig, await lane_of(rig))
        source, target = memory(rig, "READ")
        first = begin(rig, chunk_of(source, target, "t1"))
        waiting = asyncio.create_task(rig.backend.move(chunk_of(source, target, "t2")))
        await asyncio.sleep(0)
        assert begin(rig, chunk_of(source, target, "t1")).handle is None, "it would go past t2"
        go.set()
        assert await first.get() == NBYTES
        assert await waiting == NBYTES
