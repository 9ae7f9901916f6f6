"""Both clients follow peers, list all nodes, and carry metadata under labels."""

from __future__ import annotations

import contextlib
import io

import pytest

from xferd.api import types as t
from xferd.api.errors import NotFound, Unsupported
from xferd.clients import AsyncClient, Client
from xferd.clients.ctl import _tables
from xferd.clients.ctl._output import Output


def peer(name, state, reason=""):
    return t.PeerInfo(t.NodeInfo(name, f"id-{name}", 1, "0", (), (), (), (), 0.0), state, reason, 0.0, 0, 0, 0)


def test_the_blocking_client(threaded):
    engine = threaded.engine
    with Client.connect(threaded.path, "me") as client:
        threaded.run(engine.set_peers(peer("b", t.PeerState.READY), peer("c", t.PeerState.READY)))
        assert [node.name for node in client.nodes()] == ["node-a", "b", "c"]
        with contextlib.closing(client.watch_peers("b")) as changes:
            assert next(changes).state is t.PeerState.READY
            threaded.run(engine.set_peers(peer("b", t.PeerState.GONE, "it left"), peer("c", t.PeerState.READY)))
            gone = next(changes)
            assert (gone.node.name, gone.state, gone.reason) == ("b", t.PeerState.GONE, "it left")
        threaded.run(engine.was_cancelled("watch_peers"))
        with pytest.raises(Unsupported, match="etcd"):
            client.publish_metadata("kv")
        engine.labels = {}
        shared, _ = client.allocate([4096, 4096], access=t.Access.READ)
        client.publish_metadata("kv", [shared])
        [found] = client.fetch_metadata("node-a", "kv")
        assert found.id == shared.id
        client.publish_metadata("kv")
        assert len(client.fetch_metadata("node-a", "kv", 1.0)) == 2
        client.withdraw_metadata("kv")
        with pytest.raises(NotFound):
            client.fetch_metadata("node-a", "kv")


async def test_the_async_client(daemon):
    engine = daemon.engine
    async with AsyncClient.connect(daemon.path, "me") as client:
        await engine.set_peers(peer("b", t.PeerState.READY))
        assert [node.name for node in await client.nodes()] == ["node-a", "b"]
        async with contextlib.aclosing(client.watch_peers()) as changes:
            assert (await anext(changes)).state is t.PeerState.READY
            await engine.set_peers(peer("b", t.PeerState.DRAINING))
            assert (await anext(changes)).state is t.PeerState.DRAINING
        await engine.was_cancelled("watch_peers")
        engine.labels = {}
        shared = await client.allocate(4096, access=t.Access.READ)
        await client.publish_metadata("kv", [shared])
        assert [region.id for region in await client.fetch_metadata("node-a", "kv")] == [shared.id]
        await client.withdraw_metadata("kv")
        with pytest.raises(NotFound):
            await client.withdraw_metadata("kv")


def test_a_change_of_a_peer_is_one_line():
    for is_json, start in ((False, ""), (True, '{"node":{"name":"b"')):
        out = io.StringIO()
        change = peer("b", t.PeerState.SUSPECT, "connection reset")
        Output(is_json=is_json, stdout=out).event(change, _tables.peer_line(change))
        assert out.getvalue().startswith(start)
        assert out.getvalue().count("\n") == 1
        assert "SUSPECT" in out.getvalue()
        assert "connection reset" in out.getvalue()
