"""What surrounds a transfer's chunks is opened once, committed or dropped once, and never left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from test_machine import plan, route, transfer

from xferd.api.errors import IntegrityError, MoveFailed, Unsupported
from xferd.daemon.engine.machine import ROUTE_FAULTS
from xferd.daemon.engine.passage import Passage, is_needed
from xferd.daemon.engine.sealing import NoSealer
from xferd.plugins.base import BlockSums, Chunk, FileSpace, OpenLeg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.engine.plan import Plan
    from xferd.plugins.base import Extent, LegScope, Space

FILE = FileSpace(0, "/data")


class Leg(OpenLeg):
    def __init__(self, story: list[str], name: str, fails: set[str], moves_short: bool, chunks: list[Chunk]) -> None:
        self.story, self.name, self.fails, self.moves_short = story, name, fails, moves_short
        self.chunks = chunks

    async def move(self, chunk: Chunk) -> int:
        self.chunks.append(chunk)
        self.story.append(f"move {chunk.transfer_id}")
        return chunk.nbytes - self.moves_short

    async def commit(self) -> None:
        self.story.append(f"commit {self.name}")
        if self.name in self.fails:
            raise MoveFailed("the store is full")

    async def abort(self) -> None:
        self.story.append(f"abort {self.name}")


class Store:
    """A transactional backend."""

    name = "s"

    def __init__(self) -> None:
        self.is_transactional = True
        self.flushes = False
        self.story: list[str] = []
        self.fails: set[str] = set()
        self.moves_short = False
        self.gate: asyncio.Event | None = None
        self.opened = 0
        self.chunks: list[Chunk] = []
        self.scopes: list[LegScope] = []

    def can_flush(self) -> bool:
        return self.flushes

    def needs_leg(self, target: Space, *, durable: bool) -> bool:
        return self.is_transactional or durable

    async def move(self, chunk: Chunk) -> int:
        self.story.append(f"move plainly {chunk.transfer_id}")
        return chunk.nbytes

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        if self.gate is not None:
            await self.gate.wait()
        self.opened += 1
        self.story.append(f"open {scope.nbytes} {scope.source is not None} {scope.target is not None}")
        self.scopes.append(scope)
        return Leg(self.story, f"leg{self.opened}", self.fails, self.moves_short, self.chunks)


class Awaited:
    """Blocks of a chunk that a sealer waits for."""

    sums = BlockSums.of(np.empty(0, np.int64), np.empty(0, np.int64))


class Leaving:
    """Of a chunk that is written."""

    sums = BlockSums.of(np.empty(0, np.int64), np.empty(0, np.int64))


class Proof(NoSealer):
    """A sealer that writes down what it is asked."""

    def __init__(self, story: list[str]) -> None:
        self.story = story
        self.bad = False

    def concerns(self, extents: Sequence[Extent]) -> bool:
        return bool(extents)

    async def begin(self, extents: Sequence[Extent]) -> Any:
        self.story.append("begin")
        return "ticket"

    async def seal(self, ticket: Any) -> None:
        self.story.append("seal")

    def abandon(self, ticket: Any) -> None:
        self.story.append("abandon")

    def reading(self, extents: Sequence[Extent], *, is_asked: bool) -> Any:
        return f"reading {is_asked}"

    def leaving(self, ticket: Any, source: Extent, target: Extent) -> Any:
        return Leaving()

    async def left(self, ticket: Any, chunk: Any, source: Extent) -> None:
        self.story.append(f"left {ticket}")

    def arriving(self, ticket: Any, leg: Extent, start: int, source: Extent, target: Extent) -> Any:
        return Awaited()

    async def arrived(self, ticket: Any, chunk: Any, source: Extent, target: Extent) -> None:
        self.story.append(f"arrived {ticket}")

    async def finish(self, ticket: Any) -> None:
        self.story.append(f"finish {ticket}")
        if self.bad:
            raise IntegrityError("block 3")


def passage(store: Store, *legs: int, sealer: Any = None) -> Passage:
    made = transfer(plan(*[(chunks, (route("s"),)) for chunks in legs]))
    made.verify = True
    return Passage(made, cast("Any", {"s": store}), sealer or NoSealer())


async def test_a_leg_is_opened_once_for_all_its_chunks() -> None:
    store = Store()
    one = passage(store, 3)
    moves = await asyncio.gather(*(one.moves(0, route("s"), 0) for _ in range(3)))
    assert store.story == ["open 30 True True"]
    assert len({id(move.__self__) for [move] in moves}) == 1
    await one.commit()
    assert store.story[1:] == ["commit leg1"]


async def test_proof_is_begun_before_the_first_leg_and_what_was_read_is_compared_before_anything_appears() -> None:
    store = Store()
    one = passage(store, 1, 1, sealer=Proof(store.story))
    await one.moves(0, route("s"), 0)
    await one.moves(1, route("s"), 0)
    await one.commit()
    assert [word.split()[0] for word in store.story] == [
        *("begin", "open", "open", "finish", "commit", "commit", "seal"),
    ]
    assert "finish reading True" in store.story


async def test_proof_sees_the_bytes_of_whole_chunks_as_they_pass() -> None:
    store = Store()
    one = passage(store, 1, sealer=Proof(store.story))
    [move] = await one.moves(0, route("s"), 0)
    nothing = cast("Any", None)
    assert await move(Chunk(nothing, nothing, 10, "x", "c")) == 10
    assert store.story[-3:] == ["move x", "arrived reading True", "left ticket"]
    assert store.chunks[0].sums is Awaited.sums


async def test_of_two_hops_the_first_is_proof_of_what_was_read_and_the_last_of_what_was_written() -> None:
    store = Store()
    one = passage(store, 1, sealer=Proof(store.story))
    both = replace(route("s"), hops=route("s").hops * 2)
    first, last = await one.moves(0, both, 0)
    nothing = cast("Any", None)
    await first(Chunk(nothing, nothing, 10, "x", "c"))
    assert store.story[-2:] == ["move x", "arrived reading True"]
    await last(Chunk(nothing, nothing, 10, "y", "c"))
    assert store.story[-2:] == ["move y", "left ticket"]
    assert [chunk.sums for chunk in store.chunks] == [Awaited.sums, Leaving.sums]


async def test_proof_does_not_see_a_chunk_that_moved_in_part() -> None:
    store = Store()
    store.moves_short = True
    one = passage(store, 1, sealer=Proof(store.story))
    [move] = await one.moves(0, route("s"), 0)
    nothing = cast("Any", None)
    assert await move(Chunk(nothing, nothing, 10, "x", "c")) == 9
    assert store.story[-1] == "move x"


async def test_where_one_commit_fails_the_rest_is_dropped() -> None:
    store = Store()
    store.fails = {"leg1"}
    one = passage(store, 1, 1, sealer=Proof(store.story))
    await one.moves(0, route("s"), 0)
    await one.moves(1, route("s"), 0)
    with pytest.raises(MoveFailed):
        await one.commit()
    assert store.story[-3:] == ["commit leg1", "abort leg2", "abandon"]


async def test_bytes_that_do_not_verify_fail_the_commit_and_appear_nowhere() -> None:
    store = Store()
    proof = Proof(store.story)
    proof.bad = True
    one = passage(store, 1, sealer=proof)
    await one.moves(0, route("s"), 0)
    with pytest.raises(IntegrityError):
        await one.commit()
    assert store.story[-3:] == ["finish reading True", "abort leg1", "abandon"]


async def test_abandon_drops_all_once_and_nothing_where_nothing_was_opened() -> None:
    store = Store()
    await passage(store, 1).abandon()
    assert store.story == []
    one = passage(store, 1, sealer=Proof(store.story))
    await one.moves(0, route("s"), 0)
    await one.abandon()
    await one.abandon()
    assert store.story == ["begin", "open 10 True True", "abort leg1", "abandon"]


async def test_a_cancelled_open_leaves_the_leg_for_the_next_chunk() -> None:
    store = Store()
    store.gate = asyncio.Event()
    one = passage(store, 2)
    first = asyncio.create_task(one.moves(0, route("s"), 0))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    store.gate.set()
    await one.moves(0, route("s"), 0)
    assert store.opened == 1


def test_plain_plans_need_none() -> None:
    store = Store()
    made = plan((1, (route("s"),)))
    assert is_needed(made, cast("Any", {"s": store}), NoSealer(), durable=False)
    assert is_needed(made, cast("Any", {"s": store}), Proof([]), durable=False)
    store.is_transactional = False
    assert not is_needed(made, cast("Any", {"s": store}), NoSealer(), durable=False)
    assert not is_needed(made, cast("Any", {"s": store}), NoSealer(), durable=True), "memory is never durable"
    assert is_needed(to_file(made), cast("Any", {"s": store}), NoSealer(), durable=True)
    assert not is_needed(to_file(made), cast("Any", {"s": store}), NoSealer(), durable=False)
    assert not is_needed(turned(to_file(made)), cast("Any", {"s": store}), NoSealer(), durable=True), "a file is read"


# ------------------------------------------------------------------------------------------ durable transfers


def to_file(made: Plan) -> Plan:
    """Return the plan with a file as the target of its legs."""
    return replace(made, legs=tuple(replace(leg, target=replace(leg.target, space=FILE)) for leg in made.legs))


def turned(made: Plan) -> Plan:
    return replace(made, legs=tuple(replace(leg, source=leg.target, target=leg.source) for leg in made.legs))


def durable_passage(store: Store, made: Plan, *, sealer: Any = None) -> Passage:
    asked = replace(transfer(made), durable=True)
    return Passage(asked, cast("Any", {"s": store}), sealer or NoSealer())


def flushing() -> Store:
    store = Store()
    store.is_transactional, store.flushes = False, True
    return store


async def test_a_durable_leg_to_a_file_is_opened_and_committed_once_for_all_its_chunks() -> None:
    store = flushing()
    one = durable_passage(store, to_file(plan((3, (route("s"),)))))
    for _ in range(3):
        [move] = await one.moves(0, route("s"), 0)
        await move(Chunk(cast("Any", None), cast("Any", None), 10, "x", "c"))
    await one.commit()
    assert store.story == ["open 30 True True", *["move x"] * 3, "commit leg1"]
    assert [scope.durable for scope in store.scopes] == [True]


async def test_a_durable_leg_by_way_of_staging_memory_is_opened_for_the_hop_to_the_file_alone() -> None:
    store = flushing()
    both = replace(route("s"), hops=route("s").hops * 2)
    one = durable_passage(store, to_file(plan((1, (both,)))))
    first, last = await one.moves(0, both, 0)
    nothing = cast("Any", None)
    await first(Chunk(nothing, nothing, 10, "x", "c"))
    await last(Chunk(nothing, nothing, 10, "y", "c"))
    await one.commit()
    assert store.story == ["open 10 False True", "move plainly x", "move y", "commit leg1"]


async def test_a_flush_that_fails_is_how_the_commit_fails() -> None:
    store = flushing()
    store.fails = {"leg1"}
    one = durable_passage(store, to_file(plan((1, (route("s"),)))))
    await one.moves(0, route("s"), 0)
    with pytest.raises(MoveFailed):
        await one.commit()


async def test_what_is_no_file_is_not_flushed_and_a_storage_pool_does_so_itself() -> None:
    store = flushing()
    await durable_passage(store, plan((1, (route("s"),)))).moves(0, route("s"), 0)
    await durable_passage(store, turned(to_file(plan((1, (route("s"),)))))).moves(0, route("s"), 0)
    await durable_passage(store, to_file(plan((1, (route("s"),)))), sealer=Proof([])).moves(0, route("s"), 0)
    assert store.opened == 0


async def test_a_backend_that_cannot_flush_is_no_route_for_a_durable_transfer_to_a_file() -> None:
    store = flushing()
    store.flushes = False
    one = durable_passage(store, to_file(plan((1, (route("s"),)))))
    with pytest.raises(Unsupported, match="s does not put on the disk"):
        await one.moves(0, route("s"), 0)
    assert isinstance(Unsupported("x"), ROUTE_FAULTS), "the next route is tried"
    store.is_transactional = True
    with pytest.raises(Unsupported):
        await durable_passage(store, to_file(plan((1, (route("s"),))))).moves(0, route("s"), 0)
