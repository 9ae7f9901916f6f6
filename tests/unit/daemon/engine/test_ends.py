"""Whoever asked for the end of a transfer is told once, and nothing is kept of who does not wait any more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from test_machine import plan, route, transfer

from xferd.api.types import TransferState
from xferd.daemon.engine.ends import Ends

if TYPE_CHECKING:
    from xferd.daemon.engine.machine import Transfer


def two() -> tuple[Transfer, Transfer]:
    first, second = (transfer(plan((1, (route("r"),))), name) for name in ("first", "second"))
    return first, second


def end(ends: Ends, t: Transfer) -> None:
    t.state = TransferState.DONE
    ends.tell(t)


async def test_any_of_several_is_enough_also_where_it_ended_before() -> None:
    ends, (first, second) = Ends(), two()
    waiting = asyncio.create_task(ends.wait([first, second], None, any_of=True))
    await asyncio.sleep(0)
    end(ends, first)
    await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(ends.wait([first, second], None, any_of=True), 10)
    assert not ends._waiters


async def test_all_of_several_are_waited_for_until_the_time_is_over() -> None:
    ends, (first, second) = Ends(), two()
    end(ends, first)
    await ends.wait([first, second], 0.0)
    await ends.wait([first, second], 0.001)
    waiting = asyncio.create_task(ends.wait([first, second], None))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ends._waiters


async def test_listeners_come_first_and_hear_of_one_end() -> None:
    ends, (first, _) = Ends(), two()
    told: list[str] = []
    ends.listen(first, lambda t: told.append(f"heard {t.id}"))
    unheard = told.append
    ends.listen(first, unheard)  # type: ignore[arg-type]
    ends.unlisten(first, unheard)  # type: ignore[arg-type]
    waiting = asyncio.create_task(ends.wait([first], None))
    waiting.add_done_callback(lambda _: told.append("woken"))
    watched = ends.watch(first.session)
    await asyncio.sleep(0)
    end(ends, first)
    await waiting
    await asyncio.sleep(0)
    ends.tell(first)
    assert told == ["heard first", "woken"]
    assert [watched.get_nowait() for _ in range(watched.qsize())] == [first, first]
    ends.unwatch(first.session, watched)
    assert not ends._watchers
    assert not ends._listeners
