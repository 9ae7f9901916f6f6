"""Peers as a stream, all nodes as a list, and metadata under labels, over gRPC."""

from __future__ import annotations

import grpc
import pytest
from fake_engine import FakeEngine
from grpc_harness import attached, failure, serving

from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.types import Access, AllocateRequest, NodeInfo, PeerInfo, PeerState
from xferd.api.wire import node_from_message, node_to_message


def peer(name: str, state: PeerState, *, draining: bool = False) -> PeerInfo:
    node = NodeInfo(name, f"id-{name}", 1, "0", (), (), (), (), 0.0, draining)
    return PeerInfo(node, state, "", 0.0, 0, 0, 0)


@pytest.mark.parametrize("draining", [False, True])
def test_a_record_says_whether_its_node_drains(draining: bool) -> None:
    node = peer("b", PeerState.READY, draining=draining).node
    assert node_from_message(node_to_message(node)) == node


async def test_peers_are_streamed_as_they_change_until_the_call_ends() -> None:
    engine = FakeEngine()
    async with serving(engine) as face, attached(face) as client:
        await engine.set_peers(peer("b", PeerState.READY), peer("c", PeerState.READY))
        stream = client.metadata.WatchPeers(pb.WatchPeersRequest(name="b"), metadata=client.auth)
        first = await stream.read()
        assert (first.node.name, first.state) == ("b", pb.PEER_STATE_READY)
        await engine.set_peers(peer("b", PeerState.DRAINING, draining=True), peer("c", PeerState.GONE))
        second = await stream.read()
        assert (second.node.name, second.state, second.node.draining) == ("b", pb.PEER_STATE_DRAINING, True)
        stream.cancel()
        await engine.was_cancelled("watch_peers")


async def test_all_nodes_are_listed() -> None:
    engine = FakeEngine()
    engine.peer_list.append(peer("b", PeerState.READY))
    async with serving(engine) as face, attached(face) as client:
        nodes = await client.metadata.ListNodes(pb.ListNodesRequest(), metadata=client.auth)
        assert [node.name for node in nodes.nodes] == ["node-a", "b"]


async def test_metadata_under_a_label() -> None:
    engine = FakeEngine()
    async with serving(engine) as face, attached(face) as client:
        publish = pb.PublishMetadataRequest(label="kv", partial=True)
        code, detail = await failure(client.metadata.PublishMetadata(publish, metadata=client.auth))
        assert (code, detail.code) == (grpc.StatusCode.UNIMPLEMENTED, "unsupported")
        engine.labels = {}
        caller = engine.authenticate(client.grant.token)
        (region,) = (await engine.allocate(caller, AllocateRequest((4096,), access=Access.READ))).regions
        await client.metadata.PublishMetadata(publish, metadata=client.auth)
        fetch = pb.FetchMetadataRequest(node="node-a", label="kv")
        assert not (await client.metadata.FetchMetadata(fetch, metadata=client.auth)).regions
        publish.region.append(region.id)
        await client.metadata.PublishMetadata(publish, metadata=client.auth)
        listing = await client.metadata.FetchMetadata(fetch, metadata=client.auth)
        assert [found.id for found in listing.regions] == [region.id], "publishing again replaces"
        withdraw = pb.WithdrawMetadataRequest(label="kv")
        await client.metadata.WithdrawMetadata(withdraw, metadata=client.auth)
        for call in (
            client.metadata.WithdrawMetadata(withdraw, metadata=client.auth),
            client.metadata.FetchMetadata(fetch, metadata=client.auth),
        ):
            assert (await failure(call))[0] is grpc.StatusCode.NOT_FOUND
        fetch.timeout_s = -1.0
        code, _ = await failure(client.metadata.FetchMetadata(fetch, metadata=client.auth))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
