"""A stream of completions tells of each end once, also of one that comes while the reader is slow."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, cast

import pytest
from test_machine import plan, route, transfer

from xferd.api.types import Caller, SessionId, TransferId
from xferd.daemon.engine.costs import CostModel
from xferd.daemon.engine.desk import TransferDesk
from xferd.daemon.engine.machine import Ended, TransferMachine
from xferd.daemon.engine.runner import Runner
from xferd.daemon.engine.scheduler import Scheduler
from xferd.daemon.engine.sealing import NoSealer

CALLER = Caller(SessionId("s"), "a")


@pytest.mark.parametrize("by_name", [False, True])
async def test_each_end_is_told_once(by_name: bool) -> None:
    machine = TransferMachine(Scheduler())
    nothing = cast("Any", None)

    async def deliver(_: object) -> None: ...

    runner = Runner(
        machine,
        {},
        CostModel(),
        nothing,
        sealer=NoSealer(),
        deliver=deliver,
        on_ended=lambda _: None,
        clock=lambda: 1.0,
    )
    desk = TransferDesk(
        "n",
        machine,
        runner,
        nothing,
        nothing,
        nothing,
        nothing,
        default_timeout_s=1.0,
        max_transfers=10,
        keep_plans_nbytes=0,
        check_events=lambda *_: None,
    )
    first, second = (transfer(plan((1, (route("r"),))), name) for name in ("first", "second"))
    desk._by_session[CALLER.session] = OrderedDict((t.id, t) for t in (first, second))
    for t in (first, second):
        machine.add(t)

    def end(t: Any) -> None:
        instructions = machine.cancel(t, 1.0)
        assert instructions == [Ended(t)]
        runner.perform(instructions)

    end(first)
    stream = desk.watch(CALLER, [TransferId("first"), TransferId("second")] if by_name else [])
    assert (await anext(stream)).id == "first"
    end(second)  # while the reader still looks at the first
    assert (await anext(stream)).id == "second"
    if by_name:
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return
    more = asyncio.ensure_future(anext(stream))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not more.done()
    more.cancel()
    with pytest.raises(asyncio.CancelledError):
        await more
    await stream.aclose()
