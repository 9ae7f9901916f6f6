"""What every metadata store must do, ours or foreign: ``await check_store(maker)``, or one test for each of ``CHECKS``.

``maker`` gives an async context manager of a ``Cluster``: three stores of three nodes that can see each other. What
the daemons do between themselves on top of a store (telling each other goodbye) is ``Cluster.goodbye``; a store with
a service of its own leaves it as it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from xferd.api.errors import AlreadyExists, Closed, InvalidArgument, PeerLost, PeerUnknown
from xferd.api.types import MemoryKind, NodeInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from xferd.metadata.base import NodeChange, Store

TIMEOUT_S = 10.0
NAMES = ("node-a", "node-b", "node-c")

_epochs = itertools.count(1)


async def _no_goodbye(_: int) -> None:
    return


@dataclass(frozen=True)
class Cluster:
    """Started stores, for the nodes of ``NAMES`` in order."""

    stores: Sequence[Store]
    goodbye: Callable[[int], Awaitable[None]] = _no_goodbye


def record(name: str, **changes: object) -> NodeInfo:
    """Return a record with an id and an epoch of its own."""
    number = next(_epochs)
    node = NodeInfo(
        name=name,
        id=f"id-{number}",
        epoch=number,
        version="0.1.0",
        addresses=(f"tcp://127.0.0.1:{number}",),
        backends=("local", "tcp"),
        kinds=(MemoryKind.DRAM, MemoryKind.FILE),
        agents=("decode",),
        started_at=1.5,
    )
    return dataclasses.replace(node, **changes)


async def next_change(watch: AsyncIterator[NodeChange]) -> NodeChange:
    """Return the next change; a store that says nothing in time fails the check."""
    async with asyncio.timeout(TIMEOUT_S):
        return await anext(watch)


async def change_where(watch: AsyncIterator[NodeChange], fits: Callable[[NodeChange], bool]) -> NodeChange:
    """Return the first change that fits."""
    while not fits(change := await next_change(watch)):
        pass
    return change


async def records(store: Store) -> dict[str, NodeInfo]:
    """Return what a store lists, without peers that were never reached."""
    return {node.name: node for node in await store.list_nodes() if node.epoch}


async def check_get_of_unknown(cluster: Cluster) -> None:
    """A name that nobody has is PeerUnknown, and the message repeats it."""
    with pytest.raises(PeerUnknown, match="nobody"):
        await cluster.stores[0].get("nobody")
    with pytest.raises(PeerUnknown, match="nobody"):
        await cluster.stores[0].refresh("nobody")


async def check_publish_and_get(cluster: Cluster) -> None:
    """A published record reaches the other nodes as it is, but for the order of its addresses."""
    a, b, _ = cluster.stores
    mine, theirs = record("node-a"), record("node-b")
    await a.publish(mine)
    await b.publish(theirs)
    seen = await a.get("node-b")
    assert theirs.addresses[0] in seen.addresses
    assert dataclasses.replace(seen, addresses=theirs.addresses) == theirs
    assert (await b.refresh("node-a")).epoch == mine.epoch


async def check_list(cluster: Cluster) -> None:
    """Listings have the others, by name, and not oneself."""
    for store, name in zip(cluster.stores, NAMES, strict=True):
        await store.publish(record(name))
    for name in ("node-c", "node-a"):
        await cluster.stores[1].get(name)
    assert [node.name for node in await cluster.stores[1].list_nodes()] == ["node-a", "node-c"]
    assert list(await records(cluster.stores[1])) == ["node-a", "node-c"]


async def check_publish_again(cluster: Cluster) -> None:
    """A changed record replaces the last one, and an equal one is fine."""
    a, b, _ = cluster.stores
    first = record("node-a")
    await a.publish(first)
    await a.publish(first)
    await b.publish(record("node-b"))
    assert (await b.get("node-a")).agents == ("decode",)
    await a.publish(dataclasses.replace(first, agents=("decode", "prefill")))
    assert (await b.refresh("node-a")).agents == ("decode", "prefill")
    assert (await b.get("node-a")).agents == ("decode", "prefill")


async def check_taken_name(cluster: Cluster) -> None:
    """A name that a live node is known to have cannot be taken by another."""
    a, b, c = cluster.stores
    await a.publish(record("node-a"))
    await b.publish(record("node-b"))
    await b.get("node-a")
    with pytest.raises(AlreadyExists, match="node-a"):
        await b.publish(record("node-a"))
    await c.publish(record("node-c"))
    assert (await c.get("node-b")).name == "node-b"


async def check_withdraw(cluster: Cluster) -> None:
    """A withdrawn record goes from the others' view, and a watcher hears of it with a reason."""
    a, b, _ = cluster.stores
    await a.publish(record("node-a"))
    await b.publish(record("node-b"))
    await b.get("node-a")
    watch = b.watch("node-a")
    assert (await next_change(watch)).node is not None
    await a.withdraw()
    await cluster.goodbye(0)
    change = await change_where(watch, lambda change: change.node is None)
    assert (change.name, bool(change.reason)) == ("node-a", True)
    assert "node-a" not in await records(b)
    with pytest.raises((PeerUnknown, PeerLost), match="node-a"):
        await b.refresh("node-a")
    await a.withdraw()  # nothing is published: fine
    back = record("node-a")
    await a.publish(back)
    assert (await b.refresh("node-a")).id == back.id


async def check_watch(cluster: Cluster) -> None:
    """A watch of one node yields its record, its changes, and nothing of others."""
    a, b, c = cluster.stores
    first = record("node-a")
    await a.publish(first)
    await b.publish(record("node-b"))
    await c.publish(record("node-c"))
    await b.get("node-a")
    one, every = b.watch("node-a"), b.watch()
    assert (await next_change(one)).node is not None
    await b.get("node-c")
    await a.publish(dataclasses.replace(first, agents=("prefill",)))
    await b.refresh("node-a")
    change = await next_change(one)
    assert change.node is not None
    assert (change.name, change.node.agents) == ("node-a", ("prefill",))
    names = {(await change_where(every, lambda change: change.node is not None)).name}
    while names != {"node-a", "node-c"}:
        names.add((await next_change(every)).name)


async def check_load_and_forget(cluster: Cluster) -> None:
    """A loaded record is known until it is forgotten, which works once."""
    a, b, _ = cluster.stores
    await a.publish(record("node-a"))
    old, new = record("far-away", addresses=()), record("far-away", addresses=())
    with pytest.raises(PeerUnknown, match="far-away"):
        await a.forget("far-away")
    watch = a.watch("far-away")
    await a.load(old)
    await a.load(new)
    assert await a.get("far-away") == new
    assert (await records(a))["far-away"] == new
    with pytest.raises(PeerUnknown):
        await b.get("far-away")
    await a.forget("far-away")
    assert (await change_where(watch, lambda change: change.node is None)).reason
    with pytest.raises(PeerUnknown, match="far-away"):
        await a.get("far-away")
    with pytest.raises(PeerUnknown, match="far-away"):
        await a.forget("far-away")


async def check_load_of_own_name(cluster: Cluster) -> None:
    """A record with this node's own name cannot be loaded."""
    await cluster.stores[0].publish(record("node-a"))
    with pytest.raises(InvalidArgument, match="node-a"):
        await cluster.stores[0].load(record("node-a"))


async def check_learn(cluster: Cluster) -> None:
    """Learning and unlearning never fail, whatever the store makes of them."""
    a = cluster.stores[0]
    await a.publish(record("node-a"))
    a.learn(record("visitor"))
    a.learn(record("node-a"))
    a.unlearn("visitor", "left")
    a.unlearn("nobody", "left")
    assert "visitor" not in await records(a)
    assert a.health() == ""


async def check_close_twice(cluster: Cluster) -> None:
    """Closing ends watches and may be done twice; later use is Closed."""
    a = cluster.stores[0]
    await a.publish(record("node-a"))
    assert a.health() == ""
    watch = a.watch()
    ended = asyncio.ensure_future(anext(watch, None))
    await a.aclose()
    async with asyncio.timeout(TIMEOUT_S):
        assert await ended is None
    await a.aclose()
    assert a.health() != ""
    with pytest.raises(Closed):
        await a.publish(record("node-a"))
    with pytest.raises(Closed):
        await a.get("node-b")


async def check_cancelled_calls(cluster: Cluster) -> None:
    """A call that is cancelled leaves the store as usable as before."""
    a, b, _ = cluster.stores
    await a.publish(record("node-a"))
    await b.publish(record("node-b"))
    calls = [asyncio.ensure_future(b.refresh("node-a")) for _ in range(3)]
    await asyncio.wait(calls, timeout=0)
    for call in calls[:2]:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[2], NodeInfo)
    assert (await b.get("node-a")).name == "node-a"


CHECKS = (
    check_get_of_unknown,
    check_publish_and_get,
    check_list,
    check_publish_again,
    check_taken_name,
    check_withdraw,
    check_watch,
    check_load_and_forget,
    check_load_of_own_name,
    check_learn,
    check_close_twice,
    check_cancelled_calls,
)


async def check_store(maker: Callable[[], AbstractAsyncContextManager[Cluster]]) -> None:
    """Run every check, each on stores of its own."""
    for check in CHECKS:
        async with maker() as cluster:
            await check(cluster)
