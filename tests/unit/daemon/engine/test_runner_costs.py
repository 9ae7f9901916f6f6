"""The runner tells the cost model of every chunk, whatever became of it, and leaves none in a pipe."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from test_machine import plan, transfer

from xferd.api.errors import MoveFailed, Stale, XferdError
from xferd.api.types import Hop, TransferState
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.machine import Transfer, TransferMachine
from xferd.daemon.engine.plan import CostKey, Route
from xferd.daemon.engine.runner import Runner
from xferd.daemon.engine.scheduler import Scheduler
from xferd.daemon.engine.sealing import NoSealer

KEY = CostKey("mover", "mapped", "mapped", "")


class Mover:
    """Moves nothing, and says what it is told to; without a word it hangs."""

    def __init__(self, *outcomes: int | Exception) -> None:
        self._outcomes = list(outcomes)
        self.started = asyncio.Event()

    def begin(self, _chunk: object, _done: object) -> None:
        """As a backend that has ``move`` alone."""

    async def move(self, _chunk: object) -> int:
        self.started.set()
        if not self._outcomes:
            await asyncio.Event().wait()
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def a_route(*, pin: str = "") -> Route:
    return Route((Hop("mover", "here", "there", "test"),), 1.0, ("mover", ""), 2, True, KEY, 1.0, pin)


async def run(mover: Mover, costs: CostModel, t: Transfer, *, cancel: bool = False) -> Transfer:
    machine = TransferMachine(Scheduler())
    machine.add(t)

    async def deliver(_: object) -> None: ...

    async with Runner(
        machine,
        cast("Any", {"mover": mover}),
        costs,
        cast("Any", None),
        sealer=NoSealer(),
        deliver=deliver,
        on_ended=lambda _: None,
        clock=lambda: 1.0,
    ) as runner:
        runner.post(t)
        await mover.started.wait()
        if cancel:
            runner.cancel(t)
        await runner.ends.wait([t], 10.0)
    assert len(costs._pipes) == 0, "a chunk is left in its pipe"
    costs.check_invariants()
    return t


async def test_every_chunk_of_every_leg_teaches() -> None:
    costs = CostModel()
    t = await run(Mover(*[10] * 5), costs, transfer(plan((3, (a_route(),)), (2, (a_route(),)))))
    assert t.state is TransferState.DONE
    [row] = costs.listing()
    assert (row.route, row.measurements) == ("mover", 2)  # two legs, however many chunks


@pytest.mark.parametrize("cancel_it", [True, False])
async def test_a_stopped_chunk_leaves_its_pipe(cancel_it: bool) -> None:
    costs = CostModel()
    mover = Mover() if cancel_it else Mover(10, Stale("gone"))
    t = await run(mover, costs, transfer(plan((2, (a_route(),)))), cancel=cancel_it)
    assert t.state is (TransferState.CANCELLED if cancel_it else TransferState.FAILED)
    assert all(row.failures == 0 for row in costs.listing())


@pytest.mark.parametrize(
    ("outcome", "said"), [(MoveFailed("EIO"), "EIO"), (ZeroDivisionError("bug"), "bug"), (9, "9 of 10")]
)
async def test_a_route_that_fails_lies_or_has_a_bug_is_remembered_and_a_pin_is_named(
    outcome: int | Exception, said: str
) -> None:
    costs = CostModel()
    t = await run(Mover(outcome), costs, transfer(plan((1, (a_route(pin="mover"),)))))
    assert isinstance(t.verdict, XferdError)
    assert t.verdict.limit == "pinned to backend 'mover'"
    assert t.verdict.remedy
    [row] = costs.listing()
    assert row.failures == 1
    assert said in row.last_error
