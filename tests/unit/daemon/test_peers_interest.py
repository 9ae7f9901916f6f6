"""A daemon watches those that it deals with, lets go of those it no longer does, and never watches too many."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from xferd.daemon.peers.interest import PeerInterest
from xferd.metadata._watching import Watch
from xferd.metadata.base import NodeChange

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xferd.metadata.base import Store


class Rig:
    """An interest over a store that counts, with a clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy: set[str] = set()
        self.dropped: list[str] = []
        self.seen: list[str] = []
        self.watches: list[Watch] = []
        self.interest = PeerInterest(
            cast("Store", self),
            self._change,
            is_busy=self.busy.__contains__,
            on_dropped=self.dropped.append,
            max_idle=3,
            idle_s=100.0,
            clock=lambda: self.now,
        )

    def watch(self, name: str) -> Watch:
        self.watches.append(Watch(name))
        return self.watches[-1]

    async def _change(self, change: NodeChange) -> None:
        self.seen.append(change.name)

    def open(self) -> list[str]:
        return sorted(watch.name for watch in self.watches if not watch.ended)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    await made.interest.aclose()
    await made.interest.aclose()
    assert made.open() == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
    made.interest.touch("late")
    assert made.interest.names() == []


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_watch_a_peer_from_the_first_touch_on(rig: Rig) -> None:
    for _ in range(3):
        rig.interest.touch("b")
    await turns()
    assert rig.open() == ["b"]
    rig.watches[0].tell(NodeChange("b", None, "gone"))
    await turns()
    assert rig.seen == ["b"], "also one that is gone is watched on: it may come back"
    assert rig.open() == ["b"]


async def test_idle_ones_are_let_go_and_busy_ones_kept(rig: Rig) -> None:
    rig.busy.add("b")
    for name in "bcd":
        rig.interest.touch(name)
    await turns()
    rig.now = 99.0
    rig.interest.touch("d")
    rig.now = 100.0
    rig.interest.sweep()
    await turns()
    assert (rig.open(), rig.dropped) == (["b", "d"], ["c"])
    rig.busy.clear()
    rig.now = 199.0
    rig.interest.sweep()
    assert rig.interest.names() == ["b"], "b was busy until just now"
    rig.now = 200.0
    rig.interest.sweep()
    await turns()
    assert rig.open() == []


async def test_too_many_idle_ones_push_out_the_one_used_longest_ago(rig: Rig) -> None:
    rig.busy.add("b")
    for name in "bcdefg":
        rig.now += 1.0
        rig.interest.touch(name)
    await turns()
    assert rig.open() == ["b", "e", "f", "g"]
    rig.interest.touch("e")
    rig.interest.touch("h")
    await turns()
    assert rig.open() == ["b", "e", "g", "h"]
    assert rig.dropped == ["c", "d", "f"]
