"""Chunks that are begun by a call end as moved ones do: told once, however they end, and nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from test_machine import plan, route, transfer

from xferd.api.errors import Cancelled, Closed, DeadlineExceeded, InternalError, MoveFailed
from xferd.api.types import TransferState
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.machine import TransferMachine
from xferd.daemon.engine.runner import Runner
from xferd.daemon.engine.scheduler import Scheduler
from xferd.daemon.engine.sealing import NoSealer
from xferd.plugins.base import Begun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from xferd.daemon.engine.plan import Route
    from xferd.plugins.base import Chunk


class Started(Begun):
    """A chunk that ends when the test says so."""

    def __init__(self, done: Callable[[int | Exception], None]) -> None:
        self.done = done
        self.aborts = 0
        self.aborted = asyncio.Event()

    def abort(self) -> None:
        self.aborts += 1
        self.aborted.set()


class Mover:
    """Begins what it is given, or raises, or leaves it to ``move``."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.moved: list[Chunk] = []
        self.raises: Exception | None = None
        self.has_begin = True

    def begin(self, _chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        if self.raises is not None:
            raise self.raises
        if not self.has_begin:
            return None
        self.started.append(Started(done))
        return self.started[-1]

    def needs_leg(self, _target: object, *, durable: bool) -> bool:
        return durable

    async def move(self, chunk: Chunk) -> int:
        self.moved.append(chunk)
        return chunk.nbytes


class Staging:
    """Lends what nobody else has."""

    @contextlib.asynccontextmanager
    async def lease(self, _holder: str, nbytes: int) -> AsyncIterator[Any]:
        yield np.array([[1 << 20, nbytes]], dtype=np.uint64)


class Rig:
    def __init__(self) -> None:
        self.mover = Mover()
        self.machine = TransferMachine(Scheduler())
        self.costs = CostModel()
        self.ended: list[object] = []

        async def deliver(_: object) -> None: ...

        self.runner = Runner(
            self.machine,
            cast("Any", {"mover": self.mover, "other": self.mover}),
            self.costs,
            Staging(),
            sealer=NoSealer(),
            deliver=deliver,
            on_ended=self.ended.append,
            clock=asyncio.get_running_loop().time,
        )

    def post(self, chunks: int = 1, *routes: str, timeout_s: float = 30.0) -> Any:
        return self.post_by(chunks, tuple(map(route, routes or ("mover",))), timeout_s)

    def post_by(self, chunks: int, routes: tuple[Route, ...], timeout_s: float = 30.0, **more: Any) -> Any:
        t = replace(transfer(plan((chunks, routes))), timeout_s=timeout_s, **more)
        self.machine.add(t)
        self.runner.post(t)
        return t

    def check_nothing_left(self) -> None:
        assert not self.runner._begun
        assert len(self.runner._deadlines) == 0
        assert len(self.costs._pipes) == 0
        self.machine.check_invariants()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    async with rig.runner:
        yield rig
    rig.check_nothing_left()


async def test_a_begun_chunk_needs_no_task_and_ends_its_transfer(rig: Rig) -> None:
    before = asyncio.all_tasks()
    t = rig.post()
    assert asyncio.all_tasks() == before
    assert t.state is TransferState.RUNNING
    rig.mover.started[0].done(10)
    assert t.state is TransferState.DONE
    assert rig.ended == [t]
    assert not rig.mover.moved


async def test_who_hears_of_an_end_and_fails_leaves_the_books_kept(rig: Rig) -> None:
    def listen(_: object) -> None:
        assert not rig.ended, "who listens is told first"
        raise KeyError

    t = rig.post()
    rig.runner.ends.listen(t, listen)
    with pytest.raises(KeyError):
        rig.mover.started[0].done(10)
    assert rig.ended == [t]


async def test_what_is_not_begun_is_moved(rig: Rig) -> None:
    rig.mover.has_begin = False
    t = rig.post(2)
    await rig.runner.ends.wait([t], 10.0)
    assert t.state is TransferState.DONE
    assert len(rig.mover.moved) == 2
    assert [(chunk.source.iov.tolist(), chunk.nbytes) for chunk in rig.mover.moved] == [
        ([[4096, 10]], 10),
        ([[4106, 10]], 10),
    ]


async def test_what_takes_two_hops_is_moved_by_way_of_staging_memory(rig: Rig) -> None:
    t = rig.post_by(1, (replace(route("mover"), hops=route("mover").hops + route("other").hops),))
    await rig.runner.ends.wait([t], 10.0)
    assert t.state is TransferState.DONE
    assert not rig.mover.started
    rows = [(chunk.source.iov.tolist(), chunk.target.iov.tolist()) for chunk in rig.mover.moved]
    assert rows == [([[4096, 10]], [[1 << 20, 10]]), ([[1 << 20, 10]], [[4096, 10]])]


async def test_what_must_be_settled_is_moved_and_not_begun(rig: Rig) -> None:
    t = rig.post_by(1, (route("mover"),), is_enclosed=True)
    await rig.runner.ends.wait([t], 10.0)
    assert t.state is TransferState.DONE
    assert not rig.mover.started
    assert len(rig.mover.moved) == 1


async def test_a_chunk_that_was_stopped_teaches_how_long_it_took_at_least(rig: Rig) -> None:
    taught: list[object] = []
    end = rig.costs.end
    cast("Any", rig.costs).end = lambda metered, outcome: (taught.append(outcome), end(metered, outcome))
    t = rig.post()
    rig.runner.cancel(t)
    rig.mover.started[0].done(Cancelled("stopped"))
    rig.post()
    rig.mover.started[1].done(10)
    assert taught == [None, 10]


async def test_a_cancelled_transfer_ends_when_its_chunks_have_come_to_rest(rig: Rig) -> None:
    t = rig.post(2)
    first, second = rig.mover.started
    rig.runner.cancel(t)
    assert (first.aborts, second.aborts) == (1, 1)
    second.done(Cancelled("stopped"))
    assert t.is_active, "a chunk of it still moves"
    first.done(10)  # it was too late for it
    assert t.state is TransferState.CANCELLED


async def test_a_deadline_aborts_what_was_begun(rig: Rig) -> None:
    t = rig.post(timeout_s=0.0)
    await rig.mover.started[0].aborted.wait()
    rig.mover.started[0].done(Cancelled("stopped"))
    assert t.state is TransferState.FAILED
    assert isinstance(t.verdict, DeadlineExceeded)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    ("error", "verdict"),
    [(MoveFailed("EIO"), MoveFailed), (Closed("shut"), Closed), (ZeroDivisionError("?"), InternalError)],
)
async def test_an_error_or_a_bug_fails_the_transfer_whether_told_or_raised(
    rig: Rig, raises: bool, error: Exception, verdict: type[Exception]
) -> None:
    rig.mover.raises = error if raises else None
    t = rig.post()
    if raises:
        assert t.is_active, "told from inside the post"
        await rig.runner.ends.wait([t], 10.0)
    else:
        rig.mover.started[0].done(error)
    assert t.state is TransferState.FAILED
    assert isinstance(t.verdict, verdict)


async def test_all_chunks_that_cannot_begin_are_told(rig: Rig) -> None:
    rig.mover.raises = MoveFailed("EIO")
    t = rig.post(2, "mover", "other")
    await rig.runner.ends.wait([t], 10.0)
    assert isinstance(t.verdict, MoveFailed)
    assert len(t.verdict.routes_tried) == 2


async def test_a_chunk_that_fails_takes_the_next_route(rig: Rig) -> None:
    t = rig.post(1, "mover", "other")
    rig.mover.started[0].done(MoveFailed("EIO"))
    rig.mover.started[1].done(10)
    assert t.state is TransferState.DONE
    assert t.reroutes == 1


async def test_a_count_that_is_wrong_is_a_failure(rig: Rig) -> None:
    t = rig.post()
    rig.mover.started[0].done(9)
    assert t.state is TransferState.FAILED


async def test_leaving_waits_until_what_was_begun_has_come_to_rest() -> None:
    rig = Rig()
    async with rig.runner:
        t = rig.post()
        [started] = rig.mover.started
        asyncio.get_running_loop().call_later(0.01, started.done, Cancelled("stopped"))
    assert started.aborts == 1
    assert t.state is TransferState.CANCELLED
    rig.check_nothing_left()


async def test_chunks_of_what_is_posted_often_are_the_same_lists_from_the_second_post_on(rig: Rig) -> None:
    """Backends know them again then; what is posted once holds on to nothing."""
    rig.mover.has_begin = False
    t = rig.post(2)
    await rig.runner.ends.wait([t], 10.0)
    table_nbytes = t.plan.memory_nbytes
    for _ in range(2):
        rig.runner.post(t)
        await rig.runner.ends.wait([t], 10.0)
    first, second, third = (rig.mover.moved[at : at + 2] for at in (0, 2, 4))
    for a, b, c in zip(first, second, third, strict=True):
        assert a.source.iov.tolist() == b.source.iov.tolist() == c.source.iov.tolist()
        assert a.source is not b.source
        assert (b.source, b.target) == (c.source, c.target)
    assert t.plan.memory_nbytes == 3 * table_nbytes


async def test_a_chunk_that_is_all_of_a_leg_is_the_legs_lists(rig: Rig) -> None:
    rig.mover.has_begin = False
    t = rig.post(1)
    await rig.runner.ends.wait([t], 10.0)
    assert (rig.mover.moved[0].source, rig.mover.moved[0].target) == (t.plan.legs[0].source, t.plan.legs[0].target)
