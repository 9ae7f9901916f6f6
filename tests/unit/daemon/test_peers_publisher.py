"""A node's record goes out at the start and after changes, tells of a drain, and is not seen again once withdrawn."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from xferd.api.errors import AlreadyExists, NotFound, Unavailable, Unsupported
from xferd.api.types import NodeInfo
from xferd.daemon.identity import lasting_id
from xferd.daemon.peers.labels import fetch_blob
from xferd.daemon.peers.publisher import Publisher
from xferd.metadata.embedded import EmbeddedStore

if TYPE_CHECKING:
    from pathlib import Path

    from xferd.api.errors import XferdError

ME = NodeInfo("a", "id-a", 1, "0", (), (), (), (), 0.0)


class Recorder(EmbeddedStore):
    """A store that notes what it is given, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[object] = []
        self.failure: XferdError | None = None
        self.published = asyncio.Event()
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.asked = asyncio.Event()

    async def publish(self, node: NodeInfo) -> None:
        if self.failure is not None:
            raise self.failure
        self.log.append((node.agents, node.draining))
        self.published.set()

    async def withdraw(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.log.append("withdrawn")

    async def get_blob(self, node: str, label: str) -> bytes:
        self.asked.set()
        if (node, label) not in self.blobs:
            raise NotFound(f"no {label} of {node}")
        return self.blobs[node, label]


class Rig:
    def __init__(self) -> None:
        self.me = ME
        self.store = Recorder()
        self.drains: list[bool] = []
        self.publisher = Publisher(self.store, lambda: self.me, on_drain=self._drained)

    async def _drained(self) -> None:
        self.drains.append(self.me.draining)

    async def changed(self, **fields: object) -> None:
        self.me = replace(self.me, **fields)  # type: ignore[arg-type]
        self.store.published.clear()
        self.publisher.changed()
        async with asyncio.timeout(5):
            await self.store.published.wait()


async def test_changes_go_out_and_a_drain_is_told_once() -> None:
    rig = Rig()
    async with rig.publisher:
        await rig.changed(agents=("x",))
        await rig.changed(draining=True)
        await rig.publisher.publish()
        await rig.changed(draining=False)
        await rig.publisher.publish()
    assert rig.drains == [True, False]
    assert rig.store.log[:3] == [((), False), (("x",), False), (("x",), True)]


async def test_a_withdrawn_record_stays_withdrawn() -> None:
    rig = Rig()
    async with rig.publisher:
        await rig.publisher.withdraw()
        rig.publisher.changed()
        await rig.publisher.publish()
        await asyncio.sleep(0)
    assert rig.store.log == [((), False), "withdrawn"]


async def test_a_taken_name_is_refused_at_the_start_and_a_store_that_is_away_is_not() -> None:
    rig = Rig()
    rig.store.failure = AlreadyExists("node 'a' is taken")
    with pytest.raises(AlreadyExists, match="'a' is taken"):
        await rig.publisher.__aenter__()
    rig.store.failure = Unavailable("etcd is away")
    async with rig.publisher:
        rig.me = replace(ME, draining=True)
        await rig.publisher.publish()
        assert rig.drains == [True], "peers are told though the store is not there"
        await rig.publisher.withdraw()


async def test_a_label_is_waited_for_until_the_deadline() -> None:
    store = Recorder()
    with pytest.raises(NotFound) as caught:
        await fetch_blob(store, "b", "kv", 0.0)
    assert caught.value.limit == "0 s"
    waiting = asyncio.ensure_future(fetch_blob(store, "b", "kv", 5.0))
    store.asked.clear()
    await store.asked.wait()
    store.blobs["b", "kv"] = b"blob"
    assert await waiting == b"blob"
    with pytest.raises(Unsupported, match="etcd"):
        await fetch_blob(EmbeddedStore(), "b", "kv", 5.0)
    for call in (EmbeddedStore().put_blob("kv", b""), EmbeddedStore().drop_blob("kv")):
        with pytest.raises(Unsupported, match="etcd"):
            await call


def test_the_id_lasts_as_long_as_the_run_directory(tmp_path: Path) -> None:
    first = lasting_id(tmp_path)
    assert lasting_id(tmp_path) == first
    (tmp_path / "node-id").write_text("rubbish\n")
    other = lasting_id(tmp_path)
    assert other != first
    assert len(other) == 32
