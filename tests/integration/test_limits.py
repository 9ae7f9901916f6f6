"""Every limit is met with an error that names it, and while a list is worked on the daemon answers others.

Also what the daemon costs: memory and CPU when idle, CPU for a list of 100,000 descriptors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
import numpy as np
import psutil
import pytest
from faces import FACES, Refused, Rows, Strides, refuses, row

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import LimitExceeded, OutOfBounds, Overloaded, Unavailable
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.types import Access, TransferState
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess
    from faces import Face

    Daemons = tuple[DaemonProcess, DaemonProcess]

MILLION = 1_000_000
MAX_GAP_S = 1.0
ATTEMPTS = 3
"""A machine that others use too may hold anybody up for a second; a daemon that holds others up does so each time."""


@pytest.fixture(scope="module")
def narrow(module_cluster: Cluster) -> DaemonProcess:
    """A daemon with little room for anything."""
    return module_cluster.make(
        "narrow",
        tcp=False,
        settings=(
            "limits.max_descriptors=1000",
            "limits.max_group=8",
            "limits.max_notification=1KiB",
            "limits.max_inbox=4KiB",
            "limits.max_transfers=3",
            "limits.max_regions=32",
            "limits.max_prepared=4",
            "sessions.max_sessions=5",
            "grpc.max_message=64KiB",
        ),
    )


@pytest.fixture(params=list(FACES))
def open_face(
    narrow: DaemonProcess, no_leaks: Callable[..., None], request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Face]]:
    """Opens sessions of the narrow daemon through one face, and closes them."""
    no_leaks(narrow)
    with ExitStack() as stack:
        yield lambda agent: stack.enter_context(closing(FACES[request.param](narrow, agent)))


@pytest.fixture
def face(open_face: Callable[[str], Face]) -> Face:
    return open_face("alice")


def test_more_descriptors_than_the_limit(face: Face) -> None:
    (mine,) = face.allocate(4096)
    fits = Rows([mine] * 1000, range(1000), [1] * 1000)
    face.release_prepared(face.prepare(fits))
    over = Rows([mine] * 1001, range(1001), [1] * 1001)
    for bad, count in (
        (over, 1001),
        (Strides(mine, 0, 1, 1, 1001), 1001),
        (Strides(mine, 0, 1, 0, (1 << 64) - 1), (1 << 64) - 1),
    ):
        for act in (
            lambda bad=bad: face.prepare(bad),
            lambda bad=bad: face.submit("READ", bad, fits),
            lambda bad=bad: face.submit("READ", fits, bad),
            lambda bad=bad: face.explain("READ", bad, fits),
        ):
            with refuses(LimitExceeded, count, "limits.max_descriptors", limit="1000"):
                act()
    assert face.submit("READ", fits, fits)["state"] == "DONE"


def test_more_regions_than_the_limits(face: Face) -> None:
    with refuses(LimitExceeded, 9, "limits.max_group", limit="8"):
        face.allocate(*[4096] * 9)
    for _ in range(4):
        face.allocate(*[4096] * 8)
    with refuses(Overloaded, "limits.max_regions", limit="32"):
        face.allocate(4096, 4096)


def test_more_prepared_lists_than_the_limit(face: Face) -> None:
    (mine,) = face.allocate(4096)
    for _ in range(4):
        face.prepare(row(mine, 0, 1))
    with refuses(LimitExceeded, 4, "limits.max_prepared", limit="4"):
        face.prepare(row(mine, 0, 1))


def test_notifications_over_the_limits(face: Face, open_face: Callable[[str], Face]) -> None:
    open_face("bob")
    (mine,) = face.allocate(4096)
    face.notify("bob", b"x" * 1024)
    with refuses(LimitExceeded, 1025, "limits.max_notification", limit="1024"):
        face.notify("bob", b"x" * 1025)
    for _ in range(2):  # what a notification costs beside its payload counts too
        face.notify("bob", b"x" * 1024)
    with pytest.raises(Refused) as caught:
        face.notify("bob", b"x" * 1024)
    assert caught.value.code == Overloaded.code
    assert "bob" in caught.value.text
    assert "limits.max_inbox" in caught.value.text
    assert caught.value.remedy
    # A transfer whose notification finds no room has moved its bytes, and says that nobody was told.
    note: object = pb.Notification(target="bob", payload=b"x" * 1024)
    if face.kind == "rest":
        note = {"target": "bob", "payload": "eHh4" * 341}
    status = face.submit("WRITE", row(mine, 0, 64), row(mine, 64, 64), notification=note)
    assert (status["state"], status["error"]["code"]) == ("FAILED", Overloaded.code)
    assert int(status["telemetry"]["moved_nbytes"]) == 64


def test_more_transfers_than_the_limit(face: Face) -> None:
    (mine,) = face.allocate(4096)
    began = time.monotonic()
    held = [face.submit("READ", row(mine, 0, 8), row(mine, 8, 8), hold=True)["id"] for _ in range(3)]
    # Nothing of a held one moves, so the oldest makes room.
    face.submit("READ", row(mine, 0, 8), row(mine, 8, 8), hold=True)
    with pytest.raises(Refused) as caught:
        face.poll(held[0])
    assert caught.value.code == "not_found"
    assert face.poll(held[1])["state"] == "PREPARED"
    assert time.monotonic() - began < 5, "a held transfer was waited for"


def test_more_sessions_than_the_limit(narrow: DaemonProcess, open_face: Callable[[str], Face]) -> None:
    for number in range(5):
        open_face(f"agent-{number}")
    with pytest.raises(Refused) as caught:
        open_face("one-too-many")
    assert caught.value.code == Overloaded.code
    assert "5" in caught.value.limit
    assert "sessions.max_sessions" in caught.value.text
    with pytest.raises((Overloaded, Unavailable), match="max_sessions"):
        Client.connect(narrow.session_socket, agent="one-too-many")


def test_a_grpc_message_over_the_limit(narrow: DaemonProcess, no_leaks: Callable[..., None]) -> None:
    """gRPC itself refuses it, before a byte of it is kept, and names both sizes."""
    no_leaks(narrow)
    with closing(FACES["grpc"](narrow, "alice")) as face:
        big = Rows([1] * 9000, [0] * 9000, [1] * 9000)
        with pytest.raises(Refused) as caught:
            face.prepare(big)
        assert caught.value.status == grpc.StatusCode.RESOURCE_EXHAUSTED.name
        assert "65536" in caught.value.message
        (mine,) = face.allocate(4096)
        assert face.submit("READ", row(mine, 0, 8), row(mine, 8, 8))["state"] == "DONE"


def test_a_rest_body_over_the_limit(narrow: DaemonProcess, no_leaks: Callable[..., None]) -> None:
    no_leaks(narrow)
    with closing(FACES["rest"](narrow, "alice")) as face:
        for size in ((8 << 20) + 1, 64 << 20):
            with refuses(LimitExceeded, limit=str(8 << 20)):
                face.ask("POST", "/v1/prepared", b" " * size)
        (mine,) = face.allocate(4096)
        with refuses(OutOfBounds, 4097, limit="4096"):
            face.write(mine, 0, bytes(4097))
        assert face.read(mine, 0, 4096) == bytes(4096)


# ------------------------------------------------------------------------------------------- a million rows


BYSTANDER = """
import json, socket, sys, threading, time
from xferd.clients import Client

session_socket, admin_socket = sys.argv[1:]
over, longest_s = threading.Event(), {}

def livez():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(admin_socket)
        sock.sendall(b"GET /livez HTTP/1.1\\r\\nHost: xferd\\r\\nConnection: close\\r\\n\\r\\n")
        while sock.recv(65536):
            pass

def measure(name, ask):
    ask()
    longest_s[name] = 0.0
    while not over.is_set():
        began = time.monotonic()
        ask()
        longest_s[name] = max(longest_s[name], time.monotonic() - began)

with Client.connect(session_socket) as client:
    threads = [threading.Thread(target=measure, args=pair) for pair in (("livez", livez), ("grpc", client.node))]
    for thread in threads:
        thread.start()
    print("measuring", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
print(json.dumps(longest_s))
"""


class Bystander:
    """Another client, a process of its own, that calls without pause; ``longest_s`` is how long it had to wait."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._args = [sys.executable, "-c", BYSTANDER, str(daemon.session_socket), str(daemon.admin_socket)]
        self.longest_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._args, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"measuring\n"
        return self

    def __exit__(self, *_: object) -> None:
        said, _ = self._process.communicate(timeout=60)
        self.longest_s = json.loads(said)


def longest_gaps(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the gaps of the first attempt that kept within the bound, or of the last."""
    gaps: dict[str, float] = {}
    for _ in range(ATTEMPTS):
        gaps = measure()
        if max(gaps.values()) < MAX_GAP_S:
            break
    return gaps


@pytest.mark.slow
@pytest.mark.parametrize("where", ["same node", "across nodes"])
def test_a_million_descriptors_do_not_hold_others_up(
    pair: Daemons, no_leaks: Callable[..., None], where: str, record_property: Callable[[str, object], None]
) -> None:
    no_leaks(*pair)
    owner = pair[0] if where == "same node" else pair[1]
    order = np.random.default_rng(1).permutation(MILLION).astype(np.uint64)

    def read_a_million() -> dict[str, float]:
        with (
            Client.connect(pair[0].session_socket, agent="many") as client,
            Client.connect(owner.session_socket, agent="owner") as other,
            Bystander(pair[0]) as near,
            Bystander(pair[1]) as far,
        ):
            source = other.allocate(100 << 20, access=Access.READ)
            target = client.allocate(100 << 20)
            source.array()[:] = np.uint8(7)
            remote, local = source.rows(order * 96, 32), target.rows(np.arange(MILLION, dtype=np.uint64) * 96, 32)
            began = time.monotonic()
            status = client.read(local, remote, timeout_s=60)
            took_s = time.monotonic() - began
            moved = int(np.count_nonzero(target.array()))
        assert status.state is TransferState.DONE
        assert moved == status.telemetry.moved_nbytes == 32 * MILLION
        assert status.telemetry.descriptors == 2 * MILLION
        found = {
            f"{name}.{kind}": s for name, who in (("near", near), ("far", far)) for kind, s in who.longest_s.items()
        }
        record_property("took_s", took_s)
        record_property("gaps_s", found)
        print(where, f"{took_s:.3f} s", found)
        return found

    gaps = longest_gaps(read_a_million)
    assert max(gaps.values()) < MAX_GAP_S, gaps


@pytest.mark.slow
def test_a_million_descriptors_over_rest_are_refused_at_once(pair: Daemons, no_leaks: Callable[..., None]) -> None:
    no_leaks(*pair)
    with closing(FACES["rest"](pair[0], "many")) as face:
        too_large = b'{"columns": {"region": 1, "nbytes": 32, "offset": [' + b"100000000," * (MILLION - 1) + b"1]}}"
        # The largest that fits is worked on without a word to others for no longer than the limit allows.
        (mine,) = face.allocate(4096)
        rows = 600_000
        fits = b'{"columns": {"region": %d, "nbytes": 1, "offset": [' % mine + b"1024," * (rows - 1) + b"0]}}"

        def ask() -> dict[str, float]:
            with Bystander(pair[0]) as bystander:
                with refuses(LimitExceeded, limit=str(8 << 20)):
                    face.ask("POST", "/v1/prepared", too_large)
                face.release_prepared(int(face.ask("POST", "/v1/prepared", fits)["handle"]))
            return bystander.longest_s

        gaps = longest_gaps(ask)
    assert max(gaps.values()) < MAX_GAP_S, gaps


# ------------------------------------------------------------------------------------------- what it costs


def cpu_s(daemon: DaemonProcess) -> float:
    """Return the CPU time of all threads, at the scheduler's resolution of nanoseconds."""
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@pytest.mark.slow
def test_a_hundred_thousand_descriptors_cost_little_cpu(
    pair: Daemons, no_leaks: Callable[..., None], record_property: Callable[[str, object], None]
) -> None:
    """Submitted, checked and coalesced. 30 ms is the aim; the bound here is for machines under load."""
    no_leaks(*pair)
    rows, posts = 100_000, 20
    with Client.connect(pair[0].session_socket, agent="many") as client:
        source, target = client.allocate([rows * 1024, rows * 512])
        order = np.random.default_rng(1).permutation(rows).astype(np.uint64)
        scattered, dense = source.rows(order * 1024, 512), target.rows(np.arange(rows, dtype=np.uint64) * 512, 512)
        costs = {}
        for name, local in (("scattered to dense", dense), ("prepare", None)):
            before = cpu_s(pair[0])
            for _ in range(posts):
                if local is None:
                    client.prepare(scattered).release()
                else:
                    client.transfer("READ", local, scattered, hold=True).release()
            costs[name] = (cpu_s(pair[0]) - before) / posts
    record_property("cpu_s", costs)
    print({name: f"{s * 1e3:.1f} ms" for name, s in costs.items()})
    assert max(costs.values()) < 0.150, costs


@pytest.mark.slow
def test_an_idle_daemon_is_small_and_asleep(cluster: Cluster, record_property: Callable[[str, object], None]) -> None:
    """Two daemons that know each other and a client attached to one; a minute was measured by hand."""
    a = cluster.make("a")
    b = cluster.make("b", peers=(a,))
    with Client.connect(b.session_socket) as client:
        assert client.node("a").name == "a"
        before, began = cpu_s(b), time.monotonic()
        time.sleep(10.0)  # the promise is about passing time
        share = (cpu_s(b) - before) / (time.monotonic() - began)
        rss = max(psutil.Process(daemon.process.pid).memory_info().rss for daemon in (a, b))
    record_property("idle", (share, rss))
    print(f"{share * 100:.3f} % of a CPU, {rss / 1e6:.1f} MB")
    assert share < 0.005
    assert rss <= 120e6


def test_a_list_that_is_the_same_bytes_over_and_over_is_bounded(pair: Daemons, no_leaks: Callable[..., None]) -> None:
    """Totals past 2**63, and more chunks than are worth keeping, are refused by a stated limit."""
    no_leaks(*pair)
    sparse = pair[0].files / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 42)
    with Client.connect(pair[0].session_socket, agent="many") as client:
        region = client.register_file(str(sparse), access=Access.READ)
        rows = 1 << 20
        same = DescriptorList.from_columns(region.id, np.zeros(rows, np.uint64), 1 << 42)
        with pytest.raises(LimitExceeded, match=r"chunks|bytes"):
            client.transfer("READ", same, same)
    sparse.unlink()
