"""Processes and links die in the middle of a 1 GiB transfer, drain, stop and reload; everybody else carries on.

What is killed is really killed: clients and daemons with SIGKILL, links by a proxy between two daemons that hangs up.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster import eventually, free_port
from faces import FACES, Refused, refuses, request, row
from google.protobuf.message import DecodeError

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import DeadlineExceeded, PeerLost, Stale, Unavailable, XferdError
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.types import Access, TransferState
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster import Cluster, DaemonProcess

    from xferd.clients import Region, Transfer

GIB = 1 << 30
POOLS = 'pools=[{name="host", nbytes="2500MiB"}]'
IMPATIENT = (
    POOLS,
    "backends.tcp.ping_interval=200ms",
    "backends.tcp.peer_timeout=1s",
    "backends.tcp.connect_timeout=1s",
    "transfers.quiesce_timeout=1s",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def patient(module_cluster: Cluster) -> tuple[DaemonProcess, DaemonProcess]:
    """Two daemons with room for 1 GiB on both sides, which no test of this module kills."""
    a = module_cluster.make("a", settings=(POOLS,))
    return a, module_cluster.make("b", peers=(a,), settings=(POOLS,))


def until_moving(transfer: Transfer) -> None:
    """Return when the first bytes of a transfer have moved."""
    eventually(lambda: transfer.poll().telemetry.moved_nbytes > 0 or transfer.status, what="a first byte")
    assert not transfer.is_ended, transfer.status


def until_one_moves(daemon: DaemonProcess) -> str:
    """Return the id of the transfer that moves at a daemon."""

    def moving() -> object:
        active = daemon.get("/v1/transfers?active=true")[1]["transfers"]
        return any(status["telemetry"]["moved_nbytes"] for status in active) or active

    eventually(moving, what=f"a transfer under way at {daemon.name}")
    (status,) = daemon.get("/v1/transfers?active=true")[1]["transfers"]
    return str(status["id"])


def check_works(client: Client) -> None:
    """A small transfer of this client goes through, same node."""
    source, target = client.allocate([1 << 20, 1 << 20])
    source.array()[:] = 0x5A
    assert client.write(source, target).state is TransferState.DONE
    assert target.array().min() == 0x5A
    client.free([source, target])


def check_reaches(client: Client, owner: DaemonProcess) -> None:
    """A small transfer across nodes goes through, without any help."""
    with Client.connect(owner.session_socket, agent="checker") as other:
        source = other.allocate(1 << 20, access=Access.READ)
        source.array()[:] = 0x5A
        target = client.allocate(1 << 20)
        client.read(target, source.whole())
        assert target.array().min() == 0x5A
        target.free()


def eventually_reaches(client: Client, owner: DaemonProcess) -> None:
    """As ``check_reaches``, for a peer that has just come back: its first attempts may be refused as lost."""

    def reached() -> object:
        try:
            check_reaches(client, owner)
        except PeerLost as exc:
            return exc
        return True

    eventually(reached, what=f"node {owner.name} in use again")


def agents_of(daemon: DaemonProcess) -> set[str]:
    return {info["agent"] for info in daemon.get("/v1/sessions")[1]["sessions"]}


def holds_of_peers(daemon: DaemonProcess) -> list[str]:
    return [hold["owner"] for hold in daemon.get("/v1/holds")[1]["holds"] if hold["owner"].startswith("peer ")]


def is_at_rest(daemon: DaemonProcess) -> Callable[[], object]:
    return lambda: not holds_of_peers(daemon) or holds_of_peers(daemon)


# ------------------------------------------------------------------------------------------- daemons die


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_the_serving_daemon_is_killed(cluster: Cluster, no_leaks: Callable[..., None], op: str) -> None:
    a = cluster.make("a", settings=IMPATIENT)
    b = cluster.make("b", peers=(a,), settings=IMPATIENT)
    with Client.connect(b.session_socket, agent="bob") as bob:
        with ExitStack() as alices:
            alice = alices.enter_context(Client.connect(a.session_socket, agent="alice"))
            theirs = alice.allocate(GIB, access=Access.READ_WRITE)
            record = theirs.whole()
            check_reaches(bob, a)
            no_leaks(b)
            mine = bob.allocate(GIB)
            prepared = bob.prepare(record)
            transfer = bob.transfer(op, mine, prepared)
            until_moving(transfer)
            a.kill()
            began = time.monotonic()
            with pytest.raises(PeerLost, match="'a'") as lost:
                transfer.wait(20)
            assert time.monotonic() - began < 5
            assert lost.value.retryable
            assert lost.value.remedy
            assert 0 < transfer.status.telemetry.moved_nbytes < GIB
            with pytest.raises(XferdError):  # the other client hears of it too
                alice.node()
        check_works(bob)
        with pytest.raises(PeerLost, match="'a'"):
            bob.read(mine.rows([0], [4096]), row_of(record, 4096))
        a.start()
        eventually_reaches(bob, a)
        # What was of the old life is stale, and says so.
        with pytest.raises(Stale, match="epoch"):
            bob.transfer("READ", mine, prepared)
        with pytest.raises(Stale, match="epoch"):
            bob.prepare(record)
        transfer.post()
        with pytest.raises(Stale, match="epoch"):
            transfer.wait(20)
        assert not a.get("/v1/regions")[1]["regions"]


def row_of(record: DescriptorList, nbytes: int) -> DescriptorList:
    return DescriptorList.from_columns(record.region, [0], [nbytes], node=record.node)


def test_the_asking_daemon_is_killed(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    a = cluster.make("a", settings=IMPATIENT)
    b = cluster.make("b", peers=(a,), settings=IMPATIENT)
    with Client.connect(a.session_socket, agent="alice") as alice:
        theirs = alice.allocate(GIB, access=Access.READ_WRITE)
        with Client.connect(b.session_socket, agent="bob") as bob:
            no_leaks(a)
            transfer = bob.transfer("WRITE", bob.allocate(GIB), theirs.whole())
            until_moving(transfer)
            b.kill()
            with pytest.raises(Unavailable):
                transfer.wait(20)
        eventually(is_at_rest(a), what="no hold of the dead peer")
        check_works(alice)
        theirs.array()[:] = 1  # nobody writes here any more
        b.start()
        with Client.connect(b.session_socket, agent="bob") as bob:
            assert theirs.array().min() == 1
            eventually_reaches(bob, a)
            small = bob.allocate(4096)
            bob.read(small, theirs.rows([0], [4096]))


def test_a_stopped_daemon_is_a_lost_one_until_it_goes_on(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    a = cluster.make("a", settings=IMPATIENT)
    b = cluster.make("b", peers=(a,), settings=IMPATIENT)
    with (
        Client.connect(a.session_socket, agent="alice") as alice,
        Client.connect(b.session_socket, agent="bob") as bob,
    ):
        theirs, mine = alice.allocate(GIB, access=Access.READ), bob.allocate(GIB)
        check_reaches(bob, a)
        no_leaks(a, b)
        transfer = bob.transfer("READ", mine, theirs.whole())
        until_moving(transfer)
        os.kill(a.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(PeerLost, match="'a'"):
                transfer.wait(20)
            assert time.monotonic() - began < 5
            check_works(bob)
            # A deadline does not wait for a peer that says nothing either.
            began = time.monotonic()
            with pytest.raises((DeadlineExceeded, PeerLost)):
                bob.read(mine, theirs.whole(), timeout_s=0.3)
            assert time.monotonic() - began < 5
            mine.array()[:] = 9
        finally:
            os.kill(a.process.pid, signal.SIGCONT)
        eventually_reaches(bob, a)
        eventually(is_at_rest(a), what="no hold left at the daemon that was stopped")
        assert mine.array().min() == 9, "bytes moved after the transfer had failed"
        assert bob.read(mine, theirs.whole()).state is TransferState.DONE


def test_a_deadline_passes_while_the_peer_is_stopped(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    """The peer cannot say that it has come to rest, so its lane is cut; the peer itself is not lost for that."""
    a = cluster.make("a", settings=(POOLS, "backends.tcp.peer_timeout=8s"))
    b = cluster.make(
        "b", peers=(a,), settings=(POOLS, "backends.tcp.peer_timeout=8s", "backends.tcp.quiesce_timeout=1s")
    )
    with (
        Client.connect(a.session_socket, agent="alice") as alice,
        Client.connect(b.session_socket, agent="bob") as bob,
    ):
        theirs, mine = alice.allocate(GIB, access=Access.READ_WRITE), bob.allocate(GIB)
        check_reaches(bob, a)
        no_leaks(a, b)
        transfer = bob.transfer("WRITE", mine, theirs.whole(), timeout_s=2.0)
        until_moving(transfer)
        os.kill(a.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises((DeadlineExceeded, PeerLost)):
                transfer.wait(20)
            check_works(bob)
        finally:
            os.kill(a.process.pid, signal.SIGCONT)
        eventually_reaches(bob, a)
        eventually(is_at_rest(a), what="no hold left at the daemon that was stopped")


# ------------------------------------------------------------------------------------------- clients die


CLIENT = """
import json, sys, time
import numpy as np
from xferd.api.types import RegionId
from xferd.clients import Client, DescriptorList
path, kind, region, node, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
client = Client.connect(path, agent="victim")
mine = client.allocate(nbytes) if kind == "pool" else (
    client.register_memfd(nbytes) if kind == "memfd" else client.register(np.zeros(nbytes, np.uint8)))
remote = DescriptorList.from_columns(region, [0], [nbytes], node=node)
prepared = client.prepare(remote)
transfer = client.transfer("READ", mine, prepared)
print("started", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("where", ["same node", "across nodes"])
@pytest.mark.parametrize("kind", ["pool", "memfd", "private"])
def test_the_client_is_killed(
    patient: tuple[DaemonProcess, DaemonProcess], no_leaks: Callable[..., None], kind: str, where: str
) -> None:
    """Its transfer comes to rest and all it held is free, while the source goes on being used."""
    no_leaks(*patient)
    owner = patient[1] if where == "same node" else patient[0]
    with Client.connect(owner.session_socket, agent="owner") as other:
        source = other.allocate(GIB, access=Access.READ)
        no_leaks(*patient)
        ended = patient[1].get("/v1/node")[1]
        args = [str(patient[1].session_socket), kind, str(source.id), owner.name, str(GIB)]
        victim = subprocess.Popen([sys.executable, "-c", CLIENT, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"started\n"
            until_one_moves(patient[1])
        finally:
            victim.kill()
            victim.communicate()
        eventually(lambda: not patient[1].get("/v1/transfers?agent=victim")[1]["transfers"], what="nothing of it left")
        now = patient[1].get("/v1/node")[1]
        assert now["transfers_done"] == ended["transfers_done"]
        assert now["transfers_cancelled"] + now["transfers_failed"] == (
            ended["transfers_cancelled"] + ended["transfers_failed"] + 1
        )
        source.array()[:4096] = 5
        source.free()  # nobody holds it any more
        check_works(other)
        # Its memory is wiped before its name is free.
        eventually(lambda: "victim" not in agents_of(patient[1]) or agents_of(patient[1]), what="its session gone")
        with Client.connect(patient[1].session_socket, agent="victim") as successor:
            check_works(successor)


@pytest.mark.parametrize(
    ("kind", "how"),
    [*itertools.product(FACES, ["by itself", "by an operator"]), ("grpc", "connection")],
)
def test_a_session_that_ends_takes_its_running_transfer_along(
    patient: tuple[DaemonProcess, DaemonProcess], no_leaks: Callable[..., None], kind: str, how: str
) -> None:
    a, b = patient
    no_leaks(a, b)
    with Client.connect(a.session_socket, agent="alice") as alice:
        source = alice.allocate(GIB, access=Access.READ)
        with ExitStack() as stack:
            face = stack.enter_context(closing(FACES[kind](b, "leaver")))
            (mine,) = face.allocate(GIB)
            status = face.submit("READ", row(mine, 0, GIB), row(source.id, 0, GIB, "a"), wait_s=0)
            assert until_one_moves(b) == status["id"]
            match how:
                case "by itself":
                    face.close()
                case "by an operator":
                    face.end_session(face.session)
                case "connection":
                    face.stream.cancel()
        eventually(lambda: not b.get("/v1/transfers?agent=leaver")[1]["transfers"], what="nothing of it left")
        eventually(is_at_rest(a), what="no hold of its transfer at the other node")
        source.free()


# ------------------------------------------------------------------------------------------- links break


class Proxy:
    """Stands between a daemon and its peer: passes bytes on, until told to hang up."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._kinds: list[int] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                kind = self._kind(near)
                far = socket.create_connection(("127.0.0.1", self._target))
            except (OSError, DecodeError):  # the daemon has thought better of it
                near.close()
                continue
            self._pairs.append((near, far))
            self._kinds.append(kind)  # last: by it a pair is found
            for source, target in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pass_on, args=(source, target)))
                self._threads[-1].start()

    @staticmethod
    def _kind(near: socket.socket) -> int:
        """Look into the Hello that comes first, and leave it where it is."""
        near.settimeout(10)
        header = near.recv(32, socket.MSG_PEEK | socket.MSG_WAITALL)
        nbytes = int.from_bytes(header[8:12], "little")
        said = near.recv(32 + nbytes, socket.MSG_PEEK | socket.MSG_WAITALL)
        near.settimeout(None)
        return int(peer_pb.Hello.FromString(said[32:]).lane)

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def hang_up(self, kind: int | None = None, *, reset: bool = False) -> None:
        """Close the last connection of a kind of lane, or all connections."""
        numbers = [number for number, known in enumerate(self._kinds) if kind in (None, known)]
        for number in numbers if kind is None else numbers[-1:]:
            for sock in self._pairs[number]:
                with contextlib.suppress(OSError):
                    if reset:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RDWR)
                    if reset:
                        sock.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join()
        for pair in self._pairs:
            for sock in pair:
                sock.close()


@pytest.fixture(scope="module")
def linked(module_cluster: Cluster) -> Iterator[tuple[DaemonProcess, DaemonProcess, Proxy]]:
    """``c`` serves, ``d`` asks, and reaches it through a proxy."""
    c = module_cluster.make("c", settings=(POOLS,))
    with closing(Proxy(c.peer_port)) as proxy:
        known = f'metadata.embedded.peers=[{{name="c", address="tcp://127.0.0.1:{proxy.port}"}}]'
        d = module_cluster.make("d", settings=(POOLS, known, "backends.tcp.connect_timeout=2s"))
        yield c, d, proxy
        d.stop()
        module_cluster.daemons.remove(d)


LANES = {"the control lane": peer_pb.LANE_KIND_CONTROL, "a data lane": peer_pb.LANE_KIND_DATA, "all lanes": None}


@pytest.mark.parametrize(("op", "reset"), [("READ", True), ("WRITE", False)], ids=["READ-reset", "WRITE-closed"])
@pytest.mark.parametrize("which", list(LANES))
def test_the_link_breaks(
    linked: tuple[DaemonProcess, DaemonProcess, Proxy],
    no_leaks: Callable[..., None],
    which: str,
    reset: bool,
    op: str,
) -> None:
    c, d, proxy = linked
    with (
        Client.connect(c.session_socket, agent="carol") as carol,
        Client.connect(d.session_socket, agent="dave") as dave,
    ):
        theirs, mine = carol.allocate(GIB, access=Access.READ_WRITE), dave.allocate(GIB)
        eventually_reaches(dave, c)
        no_leaks(c, d)
        transfer = dave.transfer(op, mine, theirs.whole())
        until_moving(transfer)
        proxy.hang_up(LANES[which], reset=reset)
        while which == "a data lane" and not transfer.poll().telemetry.ended_at:
            # A lane that breaks while nothing is on it is replaced without a word: break it again.
            proxy.hang_up(LANES[which], reset=reset)
        with pytest.raises(PeerLost, match="'c'") as lost:
            transfer.wait(20)
        assert lost.value.remedy
        eventually(is_at_rest(c), what="no hold left at the other end")
        mine.array()[:] = 3
        theirs.array()[:] = 4
        eventually_reaches(dave, c)
        assert (mine.array().max(), theirs.array().min()) == (3, 4), "bytes moved after the transfer had failed"
        if which == "all lanes":
            transfer.post()
            assert transfer.wait(30).state is TransferState.DONE
            assert mine.array().min() == theirs.array().min() == (4 if op == "READ" else 3)


# ------------------------------------------------------------------------------------------- drain, stop


SLOW = 'backends.faulty={inner="tcp", faults=[{kind="delay", delay="20ms"}]}'
SLOWER = 'backends.faulty={inner="tcp", faults=[{kind="delay", delay="1s"}]}'


def start_large(bob: Client, source: Region) -> tuple[Transfer, Region]:
    mine = bob.allocate(source.nbytes)
    transfer = bob.transfer("READ", mine, source.whole())
    until_moving(transfer)
    return transfer, mine


def test_draining_refuses_new_work_and_lets_running_work_finish(
    cluster: Cluster, no_leaks: Callable[..., None]
) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOW))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob, ExitStack() as stack:
        faces = [stack.enter_context(closing(FACES[kind](b, kind))) for kind in FACES]
        source = alice.allocate(256 << 20, access=Access.READ)
        source.array()[:] = 7
        regions = [face.allocate(4096)[0] for face in faces]
        no_leaks(a, b)
        transfer, mine = start_large(bob, source)
        assert b.get("/v1/drain", "POST", {"timeout_s": 0.0}) == (200, {"drained": False, "transfers_left": 1})
        assert b.get("/readyz")[0] == 503
        assert b.get("/livez")[0] == 200
        for face, region in zip(faces, regions, strict=True):
            for act in (
                lambda face=face, region=region: face.submit("READ", row(region, 0, 8), row(region, 8, 8)),
                lambda face=face: face.allocate(4096),
                lambda face=face, region=region: face.prepare(row(region, 0, 8)),
                lambda face=face: FACES[face.kind](b, "newcomer"),
            ):
                with refuses(Unavailable, "draining"):
                    act()
            assert face.read(region, 0, 8) == bytes(8)  # what is there can still be looked at
        assert transfer.wait(20).state is TransferState.DONE
        assert mine.array().min() == 7
        assert b.get("/v1/drain", "POST", {"timeout_s": 5.0}) == (200, {"drained": True, "transfers_left": 0})
        assert b.get("/v1/drain", "DELETE")[0] in (200, 204)
        assert b.get("/readyz")[0] == 200
        check_works(bob)


def test_draining_the_serving_node_lets_running_work_of_its_peers_finish(
    cluster: Cluster, no_leaks: Callable[..., None]
) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOW))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        theirs = alice.allocate(256 << 20, access=Access.READ_WRITE)
        mine = bob.allocate(256 << 20)
        check_reaches(bob, a)
        no_leaks(a, b)
        transfer = bob.transfer("READ", mine, theirs.whole())
        until_moving(transfer)
        a.get("/v1/drain", "POST", {"timeout_s": 0.0})
        assert transfer.wait(20).state is TransferState.DONE
        with pytest.raises(Unavailable, match="drain"):
            bob.transfer("READ", mine, theirs.whole()).wait(20)
        assert a.get("/v1/drain", "DELETE")[0] in (200, 204)
        check_reaches(bob, a)


def test_sigterm_of_the_serving_node_waits_for_its_peers(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOW))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        theirs = alice.allocate(256 << 20, access=Access.READ_WRITE)
        mine = bob.allocate(256 << 20)
        check_reaches(bob, a)
        no_leaks(b)
        transfer = bob.transfer("WRITE", mine, theirs.whole())
        until_moving(transfer)
        a.process.send_signal(signal.SIGTERM)
        assert transfer.wait(20).state is TransferState.DONE
        assert a.process.wait(20) == 0
    assert "drain_deadline_passed" not in a.log()


def test_sigterm_waits_for_a_running_transfer(cluster: Cluster) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOW))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        source = alice.allocate(256 << 20, access=Access.READ)
        source.array()[:] = 7
        view = np.zeros(source.nbytes, np.uint8)  # a pool's bytes are wiped when the session ends, these are ours
        transfer = bob.transfer("READ", bob.register(view), source)
        until_moving(transfer)
        b.process.send_signal(signal.SIGTERM)
        assert transfer.wait(20).state is TransferState.DONE
        assert view.min() == 7
        assert b.process.wait(20) == 0
        with pytest.raises(Unavailable):
            bob.node()
    eventually(is_at_rest(a), what="no hold of the peer that left")
    assert "drain_deadline_passed" not in b.log()


def test_sigterm_cancels_what_does_not_end_in_time(cluster: Cluster) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOWER, "shutdown.drain_timeout=500ms"))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        source = alice.allocate(GIB, access=Access.READ)
        mine = bob.allocate(GIB)
        transfer = bob.transfer("READ", mine, source.whole())
        eventually(lambda: transfer.poll().state is TransferState.RUNNING or transfer.state)
        began = time.monotonic()
        b.process.send_signal(signal.SIGTERM)
        with pytest.raises(XferdError):  # Cancelled, if the answer was quicker than the end
            transfer.wait(20)
        assert b.process.wait(20) == 0
        assert time.monotonic() - began < 8
        eventually(is_at_rest(a), what="no hold of the peer that left")
        source.free()
    assert "drain_deadline_passed" in b.log()


def test_a_second_sigterm_kills(cluster: Cluster) -> None:
    a = cluster.make("a", settings=(POOLS,))
    b = cluster.make("b", peers=(a,), settings=(POOLS, SLOWER, "shutdown.drain_timeout=30s"))
    with Client.connect(a.session_socket) as alice, Client.connect(b.session_socket) as bob:
        source = alice.allocate(GIB, access=Access.READ)
        transfer = bob.transfer("READ", bob.allocate(GIB), source.whole())
        eventually(lambda: transfer.poll().state is TransferState.RUNNING or transfer.state)
        b.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stop_requested" in b.log(), what="the stop under way")
        b.process.send_signal(signal.SIGTERM)
        assert b.process.wait(5) == -signal.SIGTERM
        eventually(is_at_rest(a), what="no hold of the dead peer")
        source.free()


# ------------------------------------------------------------------------------------------- reload


def configured(cluster: Cluster, name: str, text: str) -> tuple[DaemonProcess, Path]:
    """Start a daemon that has all but its place from a file."""
    daemon = cluster.make(name, tcp=False, start=False)
    path = cluster.root / f"{name}.toml"
    path.write_text(text)
    daemon.args = ["--config", str(path), "--set", f"node.run_dir={daemon.run_dir}", "--set", f"node.name={name}"]
    daemon.start()
    cluster.daemons.append(daemon)
    return daemon, path


def test_sighup_takes_what_it_can_and_says_what_it_cannot(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    one, two = cluster.root / "one", cluster.root / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "file").write_bytes(b"x" * 4096)
    before = f'files.roots = ["{one}"]\nlimits.max_group = 2\nlog.format = "json"\n'
    daemon, path = configured(cluster, "reloads", before)
    with ExitStack() as stack:
        faces = [stack.enter_context(closing(FACES[kind](daemon, kind))) for kind in FACES]
        no_leaks(daemon)
        old = [face.register_file(str(one / "file")) for face in faces]
        for face in faces:
            with refuses(Exception_of("permission_denied"), str(two)):
                face.register_file(str(two / "file"))
        path.write_text(
            f'files.roots = ["{two}"]\nlimits.max_group = 3\nlimits.max_descriptors = 5\nlog.format = "json"\n'
            '[[pools]]\nname = "host"\nnbytes = "1MiB"\n'
        )
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(events(daemon, "reloaded")) == 1, what="the reload")
        (reloaded,) = events(daemon, "reloaded")
        assert set(reloaded["changed"]) == {"files.roots", "limits.max_group"}
        assert set(reloaded["needs_restart"]) == {"limits.max_descriptors", "pools"}
        for face, region in zip(faces, old, strict=True):
            assert face.read(region, 0, 4) == b"xxxx"  # what is registered stays
            face.free(region)
            new = face.register_file(str(two / "file"))
            face.free(new)
            with refuses(Exception_of("permission_denied"), str(one)):
                face.register_file(str(one / "file"))
            for region in face.allocate(*[4096] * 3):
                face.free(region)
            with refuses(Exception_of("limit_exceeded"), 4, limit="3"):
                face.allocate(*[4096] * 4)
        # A file that is wrong changes nothing, and says where it is wrong.
        path.write_text(f'files.rootz = ["{one}"]\nlimits.max_group = 9\n')
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(events(daemon, "reload_failed")) == 1, what="the failed reload")
        assert "rootz" in events(daemon, "reload_failed")[0]["error"]
        with refuses(Exception_of("limit_exceeded"), limit="3"):
            faces[0].allocate(*[4096] * 4)


def Exception_of(code: str) -> type[XferdError]:  # noqa: N802
    from xferd.api.errors import error_for_code

    return error_for_code(code)


def events(daemon: DaemonProcess, name: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == name]


def test_a_peer_is_added_by_reload(cluster: Cluster) -> None:
    a = cluster.make("a")
    tcp = f'[backends.tcp]\nlisten = "127.0.0.1:{free_port()}"\nsecret_file = "{cluster.secret}"\n'
    daemon, path = configured(cluster, "grows", tcp)
    with Client.connect(daemon.session_socket) as client:
        with pytest.raises(XferdError, match="'a'"):
            client.regions(node="a")
        path.write_text(f'{tcp}[[metadata.embedded.peers]]\nname = "a"\naddress = "tcp://127.0.0.1:{a.peer_port}"\n')
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: "reloaded" in daemon.log(), what="the reload")
        eventually_reaches(client, a)


def test_a_rest_session_expires(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    daemon = cluster.make("expires", tcp=False, settings=("sessions.rest_ttl=500ms",))
    no_leaks(daemon)
    status, grant = request(daemon, "POST", "/v1/sessions", {"agent": "brief"})
    assert status == 201
    body = {"kind": "allocate", "nbytes": [1 << 20]}
    assert request(daemon, "POST", "/v1/regions", body, token=grant["token"])[0] == 201
    eventually(lambda: daemon.get("/v1/node")[1]["sessions"] == 0, timeout_s=8, what="the end of the session")
    assert request(daemon, "GET", "/v1/regions", token=grant["token"])[0] == 401


def test_a_stray_socket_of_a_killed_daemon_does_not_keep_the_next_from_starting(cluster: Cluster) -> None:
    daemon = cluster.make("again", tcp=False)
    epoch = int(daemon.get("/v1/node")[1]["node"]["epoch"])
    daemon.kill()
    assert daemon.session_socket.exists()
    daemon.start()
    assert int(daemon.get("/v1/node")[1]["node"]["epoch"]) > epoch
    with Client.connect(daemon.session_socket) as client:
        check_works(client)
    twin = cluster.make("again", tcp=False, start=False)
    run = subprocess.run(
        [sys.executable, "-m", "xferd.daemon.cli", "serve", *twin.args], capture_output=True, check=False
    )
    assert run.returncode != 0
    assert daemon.get("/livez")[0] == 200, "the first one was disturbed"
    with pytest.raises(Refused):
        FACES["rest"](daemon, "no spaces")
