"""What the embedded store adds to the store's contract: static peers, exchange, learning."""

from __future__ import annotations

import asyncio
import dataclasses
import gc

import pytest
import structlog

from xferd.api.errors import ConfigError, PeerLost, PeerUnknown, Unauthenticated, Unsupported
from xferd.api.types import MemoryKind, NodeInfo
from xferd.metadata.embedded import EmbeddedStore, StaticPeer


def record(name: str, epoch: int = 1, *addresses: str) -> NodeInfo:
    return NodeInfo(
        name=name,
        id=f"{name}-{epoch}",
        epoch=epoch,
        version="0",
        addresses=addresses,
        backends=("tcp",),
        kinds=(MemoryKind.DRAM,),
        agents=(),
        started_at=0.0,
    )


class Network:
    """Answers exchanges: a record or an error by address, and holds them while its gate is closed."""

    def __init__(self, **answers: NodeInfo | Exception) -> None:
        self.answers = {f"tcp://{address}": answer for address, answer in answers.items()}
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, address: str, mine: NodeInfo) -> NodeInfo:
        self.asked.append(address)
        await self.gate.wait()
        answer = self.answers.get(address, PeerLost(f"nobody listens at {address}"))
        if isinstance(answer, Exception):
            raise answer
        return answer


async def store(network: Network | None, *peers: tuple[str, str]) -> EmbeddedStore:
    made = EmbeddedStore([StaticPeer(*peer) for peer in peers], network)
    await made.publish(record("me"))
    return made


async def test_alone_it_needs_nothing() -> None:
    alone = EmbeddedStore()
    await alone.start()
    await alone.publish(record("me"))
    assert await alone.list_nodes() == []
    assert (await alone.get("me")).name == "me"
    with pytest.raises(PeerUnknown, match=r"'b'.*known nodes: none.*metadata.embedded.peers"):
        await alone.get("b")


async def test_a_static_peer_is_listed_before_it_is_reached() -> None:
    network = Network(b=record("b", 5))
    made = await store(network, ("b", "tcp://b"), ("me", "tcp://me"))
    (known,) = await made.list_nodes()
    assert (known.name, known.epoch, known.addresses) == ("b", 0, ("tcp://b",))
    assert (await made.get("b")).epoch == 5
    (known,) = await made.list_nodes()
    assert known.epoch == 5


async def test_a_record_is_asked_once_and_again_when_refreshed() -> None:
    network = Network(b=record("b", 5, "tcp://elsewhere"))
    made = await store(network, ("b", "tcp://b"))
    first = await made.get("b")
    assert first.addresses == ("tcp://b", "tcp://elsewhere"), "the address that answered goes first"
    await made.get("b")
    assert network.asked == ["tcp://b"]
    network.answers["tcp://b"] = record("b", 6)
    assert (await made.refresh("b")).epoch == 6
    assert (await made.get("b")).epoch == 6


async def test_calls_at_the_same_time_share_one_exchange() -> None:
    network = Network(b=record("b"))
    network.gate.clear()
    made = await store(network, ("b", "tcp://b"))
    calls = [asyncio.ensure_future(made.get("b")) for _ in range(5)]
    await asyncio.wait(calls, timeout=0)
    calls[0].cancel()
    network.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, NodeInfo) for result in results[1:])
    assert network.asked == ["tcp://b"] * 2, "the cancelled one, and one for all others"


async def test_a_wrong_name_at_an_address_is_said() -> None:
    made = await store(Network(b=record("c")), ("b", "tcp://b"))
    with pytest.raises(PeerUnknown, match=r"node at tcp://b is 'c', not 'b'.*metadata.embedded.peers"):
        await made.get("b")
    assert [node.name for node in await made.list_nodes()] == ["b"]


async def test_all_addresses_are_tried_and_named() -> None:
    network = Network(second=record("b", 3))
    made = await store(network, ("b", "tcp://first"))
    made.learn(record("b", 2, "tcp://second"))
    assert (await made.refresh("b")).epoch == 3
    network.answers.clear()
    with pytest.raises(PeerLost, match=r"none of its addresses.*tcp://first.*tcp://second"):
        await made.refresh("b")
    assert (await made.get("b")).epoch == 3, "a failed refresh changes nothing"


async def test_a_wrong_secret_is_final() -> None:
    network = Network(first=Unauthenticated("the secrets differ"), second=record("b"))
    made = await store(network, ("b", "tcp://first"))
    made.learn(record("b", 2, "tcp://second"))
    with pytest.raises(Unauthenticated):
        await made.refresh("b")


async def test_without_exchange_a_static_peer_names_the_remedy() -> None:
    made = await store(None, ("b", "tcp://b"))
    with pytest.raises(Unsupported, match=r"backends\.tcp"):
        await made.get("b")
    made.learn(record("b", 4))
    assert (await made.get("b")).epoch == 4
    assert (await made.refresh("b")).epoch == 4


async def test_goodbye_drops_what_was_learned_and_keeps_what_was_loaded() -> None:
    made = await store(Network())
    made.learn(record("guest"))
    await made.load(record("far"))
    made.learn(record("far", 2))
    made.unlearn("guest", "left")
    made.unlearn("far", "left")
    assert [(node.name, node.epoch) for node in await made.list_nodes()] == [("far", 2)]
    await made.forget("far")


async def test_what_was_not_loaded_cannot_be_forgotten() -> None:
    made = await store(Network(), ("b", "tcp://b"))
    made.learn(record("guest"))
    for name in ("b", "guest"):
        with pytest.raises(PeerUnknown, match="loaded: none"):
            await made.forget(name)


async def test_a_namesake_is_refused_with_a_log_line() -> None:
    made = await store(Network())
    with structlog.testing.capture_logs() as lines:
        made.learn(record("me", 99))
    assert [line["event"] for line in lines] == ["namesake_refused"]
    assert (await made.get("me")).epoch == 1


async def test_the_static_list_can_be_replaced() -> None:
    network = Network(b=record("b"), c=record("c"))
    made = await store(network, ("b", "tcp://b"))
    made.reload([StaticPeer("c", "tcp://c")])
    assert [node.name for node in await made.list_nodes()] == ["c"]
    assert (await made.get("c")).name == "c"
    with pytest.raises(PeerUnknown):
        await made.get("b")
    with pytest.raises(ConfigError, match="'c' is configured twice"):
        made.reload([StaticPeer("c", "tcp://1"), StaticPeer("c", "tcp://2")])
    with pytest.raises(ConfigError, match="lacks"):
        made.reload([StaticPeer("", "tcp://1")])
    assert (await made.get("c")).name == "c"


async def test_a_watch_says_nothing_of_an_equal_record_and_is_not_kept_alive() -> None:
    made = await store(Network())
    watch = made.watch()
    made.learn(record("b"))
    made.learn(record("b"))
    made.learn(dataclasses.replace(record("b"), agents=("x",)))
    made.unlearn("b", "left")
    await watch.aclose()
    made.learn(record("c"))
    changes = [change async for change in watch]
    assert [(change.name, change.node and change.node.agents, change.reason) for change in changes] == [
        ("b", (), ""),
        ("b", ("x",), ""),
        ("b", None, "left"),
    ]
    del watch
    gc.collect()
    assert not made._watches
