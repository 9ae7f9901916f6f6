"""The embedded store passes the suite that every store must pass; records travel within this process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from check_store import CHECKS, NAMES, Cluster, check_store

from xferd.api.errors import PeerLost
from xferd.metadata.embedded import EmbeddedStore, StaticPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from xferd.api.types import NodeInfo


class Hub:
    """Stands for the network: an address is a node's name, and each side learns the other's record, as daemons do."""

    def __init__(self) -> None:
        self.stores: dict[str, EmbeddedStore] = {}

    async def exchange(self, address: str, mine: NodeInfo) -> NodeInfo:
        await asyncio.sleep(0)  # a real one waits here, so that calls can meet and be cancelled
        name = address.removeprefix("hub://")
        store = self.stores.get(name)
        theirs = store.published if isinstance(store, Published) else None
        if store is None or theirs is None:
            raise PeerLost(f"nobody listens at {address}")
        store.learn(mine)
        return theirs


class Published(EmbeddedStore):
    """Lets the hub see what is published; the daemon gives its own record to whoever asks."""

    published: NodeInfo | None = None

    async def publish(self, node: NodeInfo) -> None:
        await super().publish(node)
        self.published = node

    async def withdraw(self) -> None:
        await super().withdraw()
        self.published = None


@asynccontextmanager
async def embedded() -> AsyncIterator[Cluster]:
    hub = Hub()
    peers = [StaticPeer(name, f"hub://{name}") for name in NAMES]
    for name in NAMES:
        hub.stores[name] = Published([peer for peer in peers if peer.name != name], hub.exchange)
        await hub.stores[name].start()

    async def goodbye(index: int) -> None:
        for name, store in hub.stores.items():
            if name != NAMES[index]:
                store.unlearn(NAMES[index], "said goodbye")

    yield Cluster(list(hub.stores.values()), goodbye)
    for store in hub.stores.values():
        await store.aclose()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Callable[[Cluster], Awaitable[None]]) -> None:
    async with embedded() as cluster:
        await check(cluster)


async def test_a_store_that_forgets_nothing_is_caught() -> None:
    """The suite can fail: a store whose forget does nothing does not pass."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[Cluster]:
        async with embedded() as cluster:
            cluster.stores[0].forget = lambda _: asyncio.sleep(0)  # type: ignore[method-assign]
            yield cluster

    with pytest.raises(pytest.fail.Exception):
        await check_store(broken)
