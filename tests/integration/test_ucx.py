"""Two daemons that move bytes over UCX: every byte in place, and a peer that dies or stands still harms nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ucx_rig import take_a_place

from xferd.api.errors import Cancelled, DeadlineExceeded, NoRoute, PeerLost, Unsupported
from xferd.api.types import Access, TransferState
from xferd.clients import Client
from xferd.plugins.ucx.library import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess

try:
    load("")
except Unsupported as exc:
    pytest.skip(str(exc), allow_module_level=True)

pytestmark = pytest.mark.slow

SHARED = Access.READ_WRITE
NBYTES = 64 << 20
TRANSPORTS = {"tcp": "tcp,self", "shared-memory": "posix,sysv,cma,self"}


def settings(transports: str, *more: str) -> tuple[str, ...]:
    pools = 'pools=[{name="host", nbytes="384MiB"}]'
    return (pools, f'backends.ucx={{transports="{transports}", keepalive="500ms", quiesce_timeout="1s"}}', *more)


def lines_of(status) -> list[str]:
    return [hop.backend for hop in status.telemetry.route]


@pytest.fixture(params=list(TRANSPORTS))
def nodes(request: pytest.FixtureRequest, cluster: Cluster) -> tuple[DaemonProcess, DaemonProcess]:
    b = cluster.make("b", settings=settings(TRANSPORTS[request.param]))
    return cluster.make("a", peers=(b,), settings=settings(TRANSPORTS[request.param])), b


@pytest.fixture
def clients(nodes) -> Iterator[tuple[Client, Client]]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(Client.connect(node.session_socket, agent=f"of-{node.name}")) for node in nodes)


def pattern(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def scattered(total: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and sizes of disjoint spans in random order, within twice their total."""
    rng = np.random.default_rng(seed)
    edges = np.concatenate(([0], np.sort(rng.choice(np.arange(1, total), count - 1, replace=False)), [total]))
    sizes, order = np.diff(edges), rng.permutation(count)
    starts = np.zeros(count, dtype=np.int64)
    starts[order] = np.cumsum(sizes[order] * 2) - sizes[order] * 2
    return starts, sizes


def gathered(memory: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([memory[start : start + size] for start, size in zip(starts, sizes, strict=True)])


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_scattered_and_large_lists_arrive_whole(clients, nodes, no_leaks: Callable[..., None], op: str) -> None:
    a, b = clients
    here, there = a.allocate(NBYTES), b.allocate(NBYTES, access=SHARED)
    remote = a.region(there.info)
    move = a.read if op == "READ" else a.write
    source, target = (there, here) if op == "READ" else (here, there)
    assert lines_of(move(here, remote, backend="ucx")) == ["ucx"]  # endpoints are opened once and kept
    no_leaks(*nodes)
    for count, total in ((1, NBYTES), (700, 1 << 20), (1, 5), (4000, 24 << 20)):
        source.array()[:] = pattern(NBYTES, count)
        target.array()[:] = 0
        src = scattered(total, count, 1) if count > 1 else (np.array([0]), np.array([total]))
        dst = scattered(total, count, 2) if count > 1 else src
        mine, theirs = (dst, src) if op == "READ" else (src, dst)
        status = move(here.rows(*mine), remote.rows(*theirs), backend="ucx")
        assert (status.state, lines_of(status)) == (TransferState.DONE, ["ucx"])
        assert status.telemetry.moved_nbytes == total
        assert np.array_equal(gathered(target.array(), *dst), gathered(source.array(), *src))
        assert int(np.count_nonzero(target.array())) == int(np.count_nonzero(gathered(target.array(), *dst)))
    for region in (here, there):
        region.free()


def test_files_and_private_memory_of_a_peer_go_through_its_staging(clients, nodes) -> None:
    a, b = clients
    nbytes = 12 << 20
    path = nodes[1].files / "data"
    path.write_bytes(pattern(nbytes, 3).tobytes())
    private = pattern(nbytes, 4)
    here = a.allocate(nbytes)
    for region, wanted in (
        (b.register_file(str(path), writable=True, access=SHARED), pattern(nbytes, 3)),
        (b.register(private, access=SHARED), private.copy()),
    ):
        a.read(here, a.region(region.info), backend="ucx")
        assert np.array_equal(here.array(), wanted)
        here.array()[:] = pattern(nbytes, 5)
        a.write(here, a.region(region.info), backend="ucx")
    assert np.array_equal(private, pattern(nbytes, 5))
    assert path.read_bytes() == pattern(nbytes, 5).tobytes()


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_a_peer_killed_in_flight_fails_what_ran_and_comes_back(clients, nodes, op: str) -> None:
    a, b = clients
    here = a.allocate(NBYTES)
    remote = a.region(b.allocate(NBYTES, access=SHARED).info)
    a.read(here, remote, backend="ucx")
    running = [a.transfer(op, here, remote, backend="ucx") for _ in range(12)]
    nodes[1].kill()
    killed_at = time.monotonic()
    ended = a.wait_many(running, timeout_s=15.0)
    assert time.monotonic() - killed_at < 4.0
    failed = [status for status in ended if status.state is TransferState.FAILED]
    assert failed, "all of it was faster than the kill"
    assert {status.error.code for status in failed} <= {PeerLost.code}
    rested = here.array().copy()
    nodes[1].start()
    with Client.connect(nodes[1].session_socket) as again:
        theirs = again.allocate(NBYTES, access=SHARED)
        theirs.array()[:] = 9
        mine = a.allocate(NBYTES)
        assert lines_of(a.read(mine, a.region(theirs.info), backend="ucx")) == ["ucx"]
        assert mine.array().min() == 9
    assert np.array_equal(here.array(), rested)
    assert nodes[0].process.poll() is None


def test_a_peer_killed_while_it_wrote_into_the_queue_of_all_peers_blocks_none(cluster: Cluster) -> None:
    kinds = settings("posix,self")
    b, c = (cluster.make(name, settings=kinds) for name in "bc")
    node = cluster.make("a", peers=(b, c), settings=kinds)
    with ExitStack() as stack:
        a, of_b, of_c = (stack.enter_context(Client.connect(one.session_socket)) for one in (node, b, c))
        here = a.allocate(NBYTES)
        lost, kept = (a.region(one.allocate(NBYTES, access=SHARED).info) for one in (of_b, of_c))
        for remote in (lost, kept):
            a.read(here, remote, backend="ucx")
        os.kill(b.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, b.process.pid, os.WSTOPPED)
        take_a_place(node.process.pid)
        b.kill()
        b.start()
        again = stack.enter_context(Client.connect(b.session_socket))
        theirs = again.allocate(NBYTES, access=SHARED)
        theirs.array()[:] = 9
        assert lines_of(a.read(here, a.region(theirs.info), backend="ucx", timeout_s=20.0)) == ["ucx"]
        assert here.array().min() == 9
        assert lines_of(a.write(here, kept, backend="ucx", timeout_s=20.0)) == ["ucx"]
    assert "has left the queue of all peers blocked" in node.log()


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_a_peer_that_stands_still_costs_a_transfer_its_deadline(clients, nodes, op: str) -> None:
    a, b = clients
    here, there = a.allocate(NBYTES), b.allocate(NBYTES, access=SHARED)
    remote = a.region(there.info)
    a.read(here, remote, backend="ucx")
    nodes[1].process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, nodes[1].process.pid, os.WSTOPPED)
    try:
        began_at = time.monotonic()
        with pytest.raises((DeadlineExceeded, PeerLost)):
            (a.read if op == "READ" else a.write)(here, remote, backend="ucx", timeout_s=1.0)
        assert time.monotonic() - began_at < 12.0
        rested = here.array().copy()
    finally:
        nodes[1].process.send_signal(signal.SIGCONT)
    there.array()[:] = 5
    mine = a.allocate(NBYTES)

    assert lines_of(_tried(lambda: a.read(mine, remote, backend="ucx"))) == ["ucx"]
    assert mine.array().min() == 5
    assert np.array_equal(here.array(), rested)


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_cancelled_in_flight_nothing_moves_any_more_and_the_next_one_does(clients, op: str) -> None:
    a, b = clients
    here, there = a.allocate(NBYTES), b.allocate(NBYTES, access=SHARED)
    remote = a.region(there.info)
    source, target = (there, here) if op == "READ" else (here, there)
    for round_number in range(4):
        source.array()[:] = round_number + 1
        target.array()[:] = 0
        transfer = a.transfer(op, here, remote, backend="ucx")
        transfer.cancel()
        with suppress(Cancelled):
            transfer.wait(10.0)
        rested = target.array().copy()
        source.array()[:] = 99
        small = a.allocate(4096)
        a.read(small, remote.rows([0], [4096]), backend="ucx")  # behind whatever might still be under way
        assert np.array_equal(target.array(), rested if target is here else np.where(rested == 99, 99, rested))
    status = (a.read if op == "READ" else a.write)(here, remote, backend="ucx")
    assert (status.state, lines_of(status)) == (TransferState.DONE, ["ucx"])
    assert np.array_equal(here.array(), there.array())


def test_a_peer_without_ucx_is_reached_by_tcp(cluster: Cluster) -> None:
    b = cluster.make("b")
    node = cluster.make("a", peers=(b,), settings=settings("tcp,self", 'backends.ucx.bandwidth="900GiB"'))
    with Client.connect(node.session_socket) as a, Client.connect(b.session_socket) as bob:
        here, remote = a.allocate(NBYTES >> 3), a.region(bob.allocate(NBYTES >> 3, access=SHARED).info)
        for _ in range(3):
            assert lines_of(a.read(here, remote)) == ["tcp"]
        with pytest.raises(NoRoute, match="'b' has no ucx backend"):
            a.read(here, remote, backend="ucx")


def test_a_daemon_without_the_library_says_what_to_install(cluster: Cluster) -> None:
    broken = cluster.make("a", settings=('backends.ucx={library="/nowhere/libucp.so.0"}',), start=False)
    ended = subprocess.run(
        [sys.executable, "-m", "xferd.daemon.cli", "serve", *broken.args], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode != 0
    assert "/nowhere/libucp.so.0" in ended.stdout + ended.stderr
    assert "xferd[ucx]" in ended.stdout + ended.stderr


def _tried(call, times: int = 40):
    """Call until the peer, which was lost while it stood still, is connected again."""
    for _ in range(times):
        try:
            return call()
        except PeerLost:
            time.sleep(0.1)
    return call()
