"""The view of peers follows what etcd says, in order, and survives what etcd forgets; with a scripted etcd."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from xferd.api.errors import Unavailable
from xferd.api.types import NodeInfo
from xferd.metadata._etcd_cache import NodeCache
from xferd.metadata._etcd_records import Decoder, encode_node
from xferd.metadata._etcd_wire import Change, KeyValue, Snapshot, WatchBatch
from xferd.metadata.keys import Keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xferd.metadata.base import NodeChange

KEYS = Keys()
B = NodeInfo("b", "id-b", 1, "0.1.0", ("tcp://h:1",), ("tcp",), (), ("decode",), 1.0)


class ScriptedStream:
    """What the cache asked to watch, and a queue of what it will be told."""

    def __init__(self) -> None:
        self.added: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.removed: list[int] = []
        self.batches: asyncio.Queue[WatchBatch | Exception] = asyncio.Queue()
        self.closed = False

    async def add(self, watch_id: int, start: bytes, end: bytes, revision: int) -> None:
        self.added.put_nowait((watch_id, revision))

    async def remove(self, watch_id: int) -> None:
        self.removed.append(watch_id)

    async def read(self) -> WatchBatch:
        batch = await self.batches.get()
        if isinstance(batch, Exception):
            raise batch
        return batch

    def forget_token(self) -> None:
        raise AssertionError("no token here")

    async def aclose(self) -> None:
        self.closed = True


class ScriptedClient:
    """An etcd whose keys, revision and cluster a test sets."""

    def __init__(self) -> None:
        self.away_since: float | None = None
        self.outage: tuple[float, float] | None = None
        self.keys: dict[bytes, tuple[bytes, int]] = {}
        self.revision = 10
        self.cluster_id = 1
        self.streams: asyncio.Queue[ScriptedStream] = asyncio.Queue()

    def put(self, node: NodeInfo, mod_revision: int) -> None:
        self.keys.update({key: (value, mod_revision) for key, value in encode_node(KEYS, node).items()})

    async def watch(self, _: float) -> ScriptedStream:
        stream = ScriptedStream()
        self.streams.put_nowait(stream)
        return stream

    async def read_prefix(self, prefix: bytes, _: float) -> Snapshot:
        items = [KeyValue(key, *entry, 7) for key, entry in sorted(self.keys.items()) if key.startswith(prefix)]
        return Snapshot(self.cluster_id, self.revision, tuple(items))


class Rig:
    """A running cache."""

    def __init__(self, wanted: set[str], grace_s: float = 60.0) -> None:
        self.client = ScriptedClient()
        self.wanted = wanted
        self.told: asyncio.Queue[NodeChange] = asyncio.Queue()
        self.missing: list[str] = []
        self.cache = NodeCache(
            self.client,  # type: ignore[arg-type]
            KEYS,
            Decoder(KEYS),
            wanted=lambda: self.wanted,
            tell=self.told.put_nowait,
            missing=self.missing.append,
            grace_s=grace_s,
            request_timeout_s=1.0,
            backoff=lambda _: 0.0,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[ScriptedStream, int]]:
        """Gives the first stream, and the id of the first watch."""
        task = asyncio.create_task(self.cache.run())
        try:
            stream = await self.next_stream()
            watch_id, revision = await self.added(stream)
            assert revision == self.client.revision + 1
            yield stream, watch_id
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def next_stream(self) -> ScriptedStream:
        async with asyncio.timeout(5):
            return await self.client.streams.get()

    async def added(self, stream: ScriptedStream) -> tuple[int, int]:
        async with asyncio.timeout(5):
            return await stream.added.get()

    async def change(self) -> NodeChange:
        async with asyncio.timeout(5):
            return await self.told.get()


def puts(node: NodeInfo, mod_revision: int) -> tuple[Change, ...]:
    return tuple(Change(key, value, mod_revision) for key, value in encode_node(KEYS, node).items())


def deletes(node: NodeInfo, mod_revision: int) -> tuple[Change, ...]:
    return tuple(Change(key, None, mod_revision) for key in encode_node(KEYS, node))


async def test_one_revision_is_one_change() -> None:
    rig = Rig({"b"})
    async with rig.running() as (stream, watch_id):
        assert rig.missing == ["b"]
        stream.batches.put_nowait(WatchBatch(watch_id, 11, puts(B, 11)))
        assert (await rig.change()).node == B
        stream.batches.put_nowait(WatchBatch(watch_id, 12, deletes(B, 12)))
        gone = await rig.change()
        assert (gone.node, "lease" in gone.reason) == (None, True)
        assert rig.told.empty()


async def test_older_changes_are_passed_over() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, watch_id):
        assert (await rig.change()).node == B
        stale = replace(B, epoch=5)
        stream.batches.put_nowait(WatchBatch(watch_id, 11, puts(stale, 9)))
        newer = replace(B, epoch=6)
        stream.batches.put_nowait(WatchBatch(watch_id, 11, puts(newer, 11)))
        assert (await rig.change()).node == newer


async def test_a_compacted_watch_is_read_again_on_the_same_stream() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, watch_id):
        await rig.change()
        rig.client.keys.clear()
        rig.client.revision = 40
        stream.batches.put_nowait(WatchBatch(watch_id, 40, (), "mvcc: required revision has been compacted", 30))
        again, revision = await rig.added(stream)
        assert (again != watch_id, revision) == (True, 41)
        gone = await rig.change()
        assert gone.node is None
        assert not stream.closed


async def test_a_lost_stream_keeps_what_was_seen_and_marks_it() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, _):
        await rig.change()
        stream.batches.put_nowait(Unavailable("etcd at h:1 ended the watch"))
        following = await rig.next_stream()
        assert stream.closed
        assert rig.cache.node("b") == B
        await rig.added(following)
        assert rig.told.empty()
        assert rig.cache.is_current("b") or rig.cache.stale_since is None


@pytest.mark.parametrize("how", ["another cluster", "an earlier revision"])
async def test_an_etcd_that_lost_its_data_evicts_nobody_before_the_grace_ends(how: str) -> None:
    rig = Rig({"b"}, grace_s=0.05)
    rig.client.put(B, 9)
    async with rig.running() as (stream, _):
        await rig.change()
        rig.client.keys.clear()
        if how == "another cluster":
            rig.client.cluster_id = 2
        else:
            rig.client.revision = 3
        stream.batches.put_nowait(Unavailable("gone"))
        await rig.added(await rig.next_stream())
        assert rig.cache.node("b") == B
        assert rig.missing == ["b"]
        gone = await rig.change()
        assert gone.node is None
        assert "did not register again" in gone.reason


async def test_who_returns_within_the_grace_is_never_told_gone() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, _):
        await rig.change()
        rig.client.keys.clear()
        rig.client.cluster_id = 2
        stream.batches.put_nowait(Unavailable("gone"))
        following = await rig.next_stream()
        watch_id, _ = await rig.added(following)
        following.batches.put_nowait(WatchBatch(watch_id, 12, puts(B, 12)))
        later = replace(B, agents=())
        following.batches.put_nowait(WatchBatch(watch_id, 13, deletes(B, 13)[1:]))
        assert (await rig.change()).node == later


async def test_leases_that_ended_while_etcd_stood_still_evict_nobody_at_once() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, watch_id):
        await rig.change()
        rig.client.away_since = 1.0
        stream.batches.put_nowait(WatchBatch(watch_id, 12, deletes(B, 12)))
        stream.batches.put_nowait(WatchBatch(watch_id, 13, puts(replace(B, epoch=2), 13)))
        assert (await rig.change()).node == replace(B, epoch=2)


async def test_interests_come_and_go_on_one_stream() -> None:
    rig = Rig({"b"})
    async with rig.running() as (stream, watch_id):
        rig.wanted = {"c"}
        rig.cache.interests_changed()
        await rig.added(stream)
        assert stream.removed == [watch_id]
        rig.wanted = {"", "c"}
        rig.cache.interests_changed()
        await rig.added(stream)
        assert len(stream.removed) == 2
        assert rig.cache.is_current("anyone")


async def test_a_record_of_a_later_form_is_a_node_that_cannot_be_read() -> None:
    rig = Rig({"b"})
    rig.client.put(B, 9)
    async with rig.running() as (stream, watch_id):
        await rig.change()
        future = Change(KEYS.node("b").encode(), b'{"record_version":99}', 11)
        stream.batches.put_nowait(WatchBatch(watch_id, 11, (future,)))
        gone = await rig.change()
        assert (gone.node, "cannot be read" in gone.reason) == (None, True)
