"""Every deadline is told once, and only while it counts, whatever timer stands."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from test_machine import plan, route, transfer

from xferd.daemon.engine.deadlines import Deadlines


def a_transfer(name: str, timeout_s: float) -> Any:
    t = transfer(plan((1, (route("r"),))), name)
    t.timeout_s = timeout_s
    return t


class Told:
    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.told: list[tuple[str, int]] = []
        self.news = asyncio.Event()
        self.deadlines = Deadlines(self.loop.time, self.hear)

    def arm(self, t: Any) -> None:
        self.deadlines.arm(t, self.loop.time())

    def hear(self, t: Any, post: int) -> None:
        self.told.append((t.id, post))
        self.news.set()

    async def until(self, count: int) -> list[tuple[str, int]]:
        while len(self.told) < count:
            self.news.clear()
            await self.news.wait()
        return self.told


async def test_the_earlier_one_is_told_first_though_it_was_armed_later() -> None:
    told = Told()
    told.arm(a_transfer("late", 0.02))
    told.arm(a_transfer("early", 0.0))
    assert await told.until(2) == [("early", 0), ("late", 0)]
    assert len(told.deadlines) == 0


async def test_what_was_dropped_or_posted_again_is_not_told() -> None:
    told = Told()
    dropped, again, last = a_transfer("dropped", 0.0), a_transfer("again", 0.0), a_transfer("last", 0.01)
    for t in (dropped, again, last):
        told.arm(t)
    told.deadlines.drop(dropped)
    told.deadlines.drop(dropped)
    again.posts, again.timeout_s = 1, 1000.0
    told.arm(again)
    assert await told.until(1) == [("last", 0)]
    assert len(told.deadlines) == 1
    told.deadlines.close()


async def test_one_timer_serves_all() -> None:
    told = Told()
    timers: list[float] = []
    call_later = told.loop.call_later
    cast("Any", told.loop).call_later = lambda delay_s, *rest: (timers.append(delay_s), call_later(delay_s, *rest))[1]
    try:
        for number in range(100):
            told.arm(t := a_transfer(str(number), 30.0))
            told.deadlines.drop(t)
    finally:
        del cast("Any", told.loop).call_later
    assert len(timers) == 1
    told.deadlines.close()


async def test_who_is_told_may_arm_and_drop() -> None:
    told = Told()
    first, second, third = a_transfer("first", 0.0), a_transfer("second", 0.0), a_transfer("third", 0.0)
    again = a_transfer("again", 0.0)

    def hear(t: Any, post: int) -> None:
        told.hear(t, post)
        if t is first:
            told.deadlines.drop(second)
            again.posts = 1
            told.arm(again)
            told.arm(third)

    told.deadlines = Deadlines(told.loop.time, hear)
    told.arm(first)
    told.arm(second)
    told.arm(again)
    assert await told.until(3) == [("first", 0), ("again", 1), ("third", 0)]
