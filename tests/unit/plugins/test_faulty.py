"""Injected faults strike the chunks that they should, do what they say, and are counted."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from arenas import FileArena, MappedArena, ProcessArena
from check_backend import pattern
from hypothesis import given, strategies as st

from xferd.api.errors import Closed, MoveFailed, PeerLost, ShortTransfer, XferdError
from xferd.plugins.base import Backend, BackendStatistics, Chunk, Extent, MappedSpace, RemoteSpace, SpaceKind
from xferd.plugins.faulty import FaultOptions, FaultyBackend, FaultyOptions
from xferd.plugins.local import LocalBackend, LocalOptions
from xferd.plugins.movers import MoveCounter
from xferd.plugins.options import Options
from xferd.plugins.posix import PosixBackend, PosixOptions

NBYTES = 10_000


class Rig:
    """A faulty local backend with memory on both sides."""

    def __init__(self, *faults, inner=None, source=None, target=None):
        options = FaultyOptions(inner="local", faults=tuple(FaultOptions(**fault) for fault in faults))
        self.backend = FaultyBackend(options, inner or LocalBackend(LocalOptions()), owns_inner=True)
        self.source, self.target = source or MappedArena(NBYTES), target or MappedArena(NBYTES)
        self.data = pattern(NBYTES, 1)
        self.source.fill(self.data)

    def chunk(self):
        rows = [(0, NBYTES)]
        return Chunk(self.source.extent(rows), self.target.extent(rows), NBYTES, "t", "c", "a")

    async def move(self):
        return await self.backend.move(self.chunk())

    def moved_nbytes(self):
        return int((self.target.read() == self.data).sum())

    async def struck(self, count):
        """Move so many chunks and return the numbers of those that failed."""
        failed = []
        for number in range(count):
            try:
                await self.move()
            except XferdError:
                failed.append(number)
        return failed


async def test_without_faults_it_is_the_inner_backend_a_little_cheaper():
    rig = Rig()
    inner, space = rig.backend.inner, MappedSpace()
    assert await rig.move() == NBYTES
    assert rig.backend.pairs() == inner.pairs()
    assert rig.backend.slots(space, space) == inner.slots(space, space)
    assert 0 < rig.backend.estimate_s(space, space, NBYTES, 1) < inner.estimate_s(space, space, NBYTES, 1)
    assert rig.backend.statistics() == inner.statistics()
    assert rig.backend.is_restartable is inner.is_restartable
    await rig.backend.aclose()


@pytest.mark.parametrize(("kind", "error"), [("error", MoveFailed), ("disconnect", PeerLost), ("short", ShortTransfer)])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9999])
async def test_failures_move_their_part_and_no_more(kind, error, fraction):
    rig = Rig({"kind": kind, "fraction": fraction})
    rig.target.fill(~rig.data)
    with pytest.raises(error, match=f"after {int(NBYTES * fraction)} of {NBYTES} bytes, injected"):
        await rig.move()
    assert rig.moved_nbytes() == int(NBYTES * fraction)
    assert rig.backend.injected() == {kind: 1}
    assert rig.backend.statistics() == BackendStatistics(0, 0, 1, 0, 2)
    await rig.backend.aclose()


@pytest.mark.parametrize(("mode", "claimed"), [("lie", NBYTES // 2), ("hide", NBYTES)])
async def test_short_can_lie(mode, claimed):
    rig = Rig({"kind": "short", "mode": mode})
    rig.target.fill(~rig.data)
    assert await rig.move() == claimed
    assert rig.moved_nbytes() == NBYTES // 2
    await rig.backend.aclose()


@pytest.mark.parametrize("make", [MappedArena, ProcessArena])
async def test_corrupt_inverts_one_byte_of_the_target(make):
    rig = Rig({"kind": "corrupt", "seed": 5}, target=make(NBYTES))
    assert await rig.move() == NBYTES
    found = rig.target.read()
    wrong = np.flatnonzero(found != rig.data)
    assert len(wrong) == 1
    assert found[wrong[0]] == rig.data[wrong[0]] ^ 0xFF
    np.testing.assert_array_equal(rig.source.read(), rig.data)
    await rig.backend.aclose()
    rig.target.close()


async def test_corrupt_reaches_files():
    rig = Rig({"kind": "corrupt"}, inner=PosixBackend(PosixOptions()), target=FileArena(NBYTES))
    await rig.move()
    assert rig.moved_nbytes() == NBYTES - 1
    await rig.backend.aclose()
    rig.target.close()


class ToRemote(Backend):
    """Stands for a network: keeps what the source had when it was moved, or waits, or fails."""

    name = "to-remote"
    options = Options

    def __init__(self, source, *, fails=False):
        self.counter = MoveCounter()
        self.source = source
        self.fails = fails
        self.received = None
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self):
        pass

    async def aclose(self):
        pass

    def pairs(self):
        return frozenset({(SpaceKind.MAPPED, SpaceKind.REMOTE)})

    def estimate_s(self, source, target, nbytes, pieces):
        return 1.0

    def slots(self, source, target):
        return 1

    async def move(self, chunk):
        self.entered.set()
        await self.gate.wait()
        if self.fails:
            raise PeerLost("gone")
        self.received = self.source.read()
        return chunk.nbytes

    def statistics(self):
        return self.counter.snapshot(1)


@pytest.mark.parametrize("ending", ["returns", "fails", "cancelled"])
async def test_corrupt_of_what_cannot_be_reached_changes_the_source_meanwhile(ending):
    source = MappedArena(NBYTES)
    inner = ToRemote(source, fails=ending == "fails")
    rig = Rig({"kind": "corrupt"}, {"kind": "corrupt", "seed": 1}, inner=inner, source=source)
    remote = Extent(RemoteSpace("b", 1), np.array([[0, NBYTES]], dtype=np.uint64), np.ones(1, dtype=np.uint64))
    chunk = Chunk(rig.chunk().source, remote, NBYTES, "t", "c")
    if ending == "returns":
        assert await rig.backend.move(chunk) == NBYTES
        assert (inner.received != rig.data).sum() == 2
    elif ending == "fails":
        with pytest.raises(PeerLost):
            await rig.backend.move(chunk)
    else:
        inner.gate.clear()
        move = asyncio.create_task(rig.backend.move(chunk))
        await inner.entered.wait()
        assert (source.read() != rig.data).sum() == 2
        move.cancel()
        await asyncio.wait((move,))
        assert move.cancelled()
    np.testing.assert_array_equal(source.read(), rig.data)
    await rig.backend.aclose()


async def test_delay_holds_the_chunk_back_and_can_be_cancelled():
    rig = Rig({"kind": "delay", "delay": "1h"})
    rig.target.fill(~rig.data)
    move = asyncio.create_task(rig.move())
    await asyncio.sleep(0)
    assert rig.backend.statistics().busy == 1
    move.cancel()
    await asyncio.wait((move,))
    assert move.cancelled()
    assert rig.moved_nbytes() == 0
    assert rig.backend.injected() == {"delay": 1}
    assert rig.backend.statistics() == BackendStatistics(0, 0, 0, 0, 2)
    await rig.backend.aclose()


async def test_delay_of_nothing_then_moves():
    rig = Rig({"kind": "delay", "delay": 0})
    assert await rig.move() == NBYTES
    await rig.backend.aclose()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"every": 3}, [2, 5]),
        ({"limit": 2}, [0, 1]),
        ({"every": 2, "limit": 2}, [1, 3]),
        ({"after_nbytes": 3 * NBYTES}, [3, 4, 5, 6, 7]),
        ({"after_nbytes": 3 * NBYTES - 1, "every": 2}, [4, 6]),
        ({"after_nbytes": 3 * NBYTES, "limit": 1}, [3]),
    ],
)
async def test_conditions(conditions, expected):
    rig = Rig({"kind": "error", **conditions})
    assert await rig.struck(8) == expected
    assert rig.backend.injected() == {"error": len(expected)}
    await rig.backend.aclose()


@given(st.integers(0, 2**32), st.floats(0.01, 1.0))
def test_chance_depends_on_the_seed_alone(seed, probability):
    async def main():
        outcomes = []
        for _ in range(2):
            rig = Rig({"kind": "error", "probability": probability, "seed": seed, "fraction": 0})
            outcomes.append(await rig.struck(12))
            await rig.backend.aclose()
        return outcomes

    first, second = asyncio.run(main())
    assert first == second
    if probability == 1.0:
        assert len(first) == 12


async def test_chance_is_neither_never_nor_always():
    rig = Rig({"kind": "error", "probability": 0.5, "seed": 1, "fraction": 0})
    assert 10 < len(await rig.struck(60)) < 50
    await rig.backend.aclose()


async def test_several_faults_on_one_chunk():
    rig = Rig({"kind": "delay", "delay": 0}, {"kind": "corrupt"}, {"kind": "error", "every": 2})
    assert await rig.move() == NBYTES
    assert rig.moved_nbytes() == NBYTES - 1
    with pytest.raises(MoveFailed):
        await rig.move()
    assert rig.backend.injected() == {"delay": 2, "corrupt": 2, "error": 1}
    await rig.backend.aclose()


async def test_shared_inner_backend_outlives_it():
    inner = LocalBackend(LocalOptions())
    backend = FaultyBackend(FaultyOptions(inner="local"), inner, owns_inner=False)
    rig = Rig(inner=inner)
    await backend.start()
    await backend.aclose()
    with pytest.raises(Closed):
        await backend.move(rig.chunk())
    assert await inner.move(rig.chunk()) == NBYTES
    await rig.backend.aclose()
    with pytest.raises(Closed):
        await inner.move(rig.chunk())
