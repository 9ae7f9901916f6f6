"""Drills with the ``faulty`` backend on a running daemon: what a client sees when a backend fails, lies or dawdles.

Whatever the fault, DONE means that every byte is in place, and after any end no byte moves. That a backend reports
its own failures rightly is the conformance suite's business.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster import eventually
from faces import FACES, row

from xferd.api.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    MoveFailed,
    PeerLost,
    ShortTransfer,
    XferdError,
)
from xferd.api.types import Access, TransferState
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster
    from faces import Face

    from xferd.clients import Region

NBYTES = 64 << 20
CHUNK = 8 << 20
POOLS = 'pools=[{name="host", nbytes="512MiB"}]'


def faulty(inner: str, *faults: str) -> str:
    return f'backends.faulty={{inner="{inner}", faults=[{", ".join("{" + fault + "}" for fault in faults)}]}}'


@pytest.fixture
def drill(cluster: Cluster, no_leaks: Callable[..., None]) -> Iterator[Callable[..., Client]]:
    """Starts a daemon whose ``local`` backend is wrapped, and attaches a client."""
    with ExitStack() as stack:

        def start(*faults: str) -> Client:
            daemon = cluster.make("drill", tcp=False, settings=(POOLS, faulty("local", *faults)))
            no_leaks(daemon)
            return stack.enter_context(Client.connect(daemon.session_socket, agent="alice"))

        yield start


def two_regions(client: Client, nbytes: int = NBYTES) -> tuple:
    source, target = client.allocate([nbytes, nbytes])
    source.array()[:] = np.random.default_rng(1).integers(1, 255, nbytes, np.uint8)
    return source, target


def routes_of(status) -> list[str]:
    return [hop.backend for hop in status.telemetry.route]


@pytest.mark.parametrize(
    "fault",
    [
        'kind="error", limit=1',
        'kind="error", fraction=0',
        'kind="short"',
        'kind="short", mode="lie", every=2',
        'kind="disconnect", after_nbytes="16MiB"',
    ],
)
def test_a_backend_that_fails_is_replaced_on_the_way(drill: Callable[..., Client], fault: str) -> None:
    client = drill(fault)
    source, target = two_regions(client)
    assert [hop.backend for hop in client.explain("WRITE", source, target).route] == ["faulty"]
    status = client.write(source, target)
    assert status.state is TransferState.DONE
    assert routes_of(status) == ["local"], "the telemetry shows the route that was taken in the end"
    assert status.telemetry.moved_nbytes == NBYTES
    np.testing.assert_array_equal(target.array(), source.array())


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ('kind="error"', MoveFailed, "injected by backends.faulty"),
        ('kind="short"', ShortTransfer, "injected by backends.faulty"),
        ('kind="short", mode="lie"', ShortTransfer, "moved 4194304 of 8388608 bytes"),
        ('kind="disconnect"', PeerLost, "injected by backends.faulty"),
    ],
)
def test_a_backend_that_fails_with_nobody_to_replace_it(
    cluster: Cluster, no_leaks: Callable[..., None], fault: str, error: type[XferdError], said: str
) -> None:
    daemon = cluster.make("drill", tcp=False, settings=(POOLS, faulty("local", fault)))
    no_leaks(daemon)
    with ExitStack() as stack:
        client = stack.enter_context(Client.connect(daemon.session_socket, agent="alice"))
        source, target = two_regions(client)
        with pytest.raises(error, match=said) as failed:
            client.write(source, target, backend="faulty")
        assert any(line.startswith("faulty: ") for line in failed.value.routes_tried)
        for kind in FACES:
            face: Face = stack.enter_context(closing(FACES[kind](daemon, kind)))
            (mine,) = face.allocate(2 * CHUNK)
            status = face.submit("WRITE", row(mine, 0, CHUNK), row(mine, CHUNK, CHUNK), backend="faulty")
            assert (status["state"], status["error"]["code"]) == ("FAILED", error.code)
            assert said in status["error"]["message"]
            assert [line.partition(":")[0] for line in status["error"]["routes_tried"]] == ["faulty"]
        infos = {backend["name"]: backend for backend in daemon.get("/v1/backends")[1]["backends"]}
        assert infos["faulty"]["failures"] >= 1 or "lie" in fault
        assert client.write(source, target, backend="local").state is TransferState.DONE


def test_a_fault_of_the_source_fails_on_every_route_and_names_them(drill: Callable[..., Client]) -> None:
    """A file that was cut: no backend can help, and the error says who tried."""
    client = drill('kind="delay", delay=0')
    with pytest.raises(InvalidArgument, match="warp"):
        client.write(*two_regions(client, 4096), backend="warp")
    memory = mmap.mmap(-1, 1 << 20)
    source, target = client.register(memory), client.allocate(1 << 20)
    take_away(source)
    with pytest.raises(MoveFailed) as failed:
        client.read(target, source.whole())
    assert [line.partition(":")[0] for line in failed.value.routes_tried] == ["faulty", "local"]


def take_away(region: Region) -> None:
    """Make the pages of registered memory unreadable, as a client with a bug does."""
    address, nbytes = region.array().ctypes.data, region.nbytes
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0) == 0


def test_a_corrupted_byte_is_the_only_one(drill: Callable[..., Client]) -> None:
    """Nothing checks contents yet: the drill corrupts what it says, and that is all that it does."""
    client = drill('kind="corrupt", limit=1')
    source, target = two_regions(client)
    assert client.write(source, target).state is TransferState.DONE
    different = np.flatnonzero(source.array() != target.array())
    assert len(different) == 1
    assert source.array()[different[0]] ^ target.array()[different[0]] == 0xFF


def test_a_delayed_transfer_is_cancelled_and_rests(drill: Callable[..., Client]) -> None:
    client = drill('kind="delay", delay="30s", after_nbytes="16MiB"')
    source, target = two_regions(client)
    transfer = client.transfer("WRITE", source, target)
    eventually(lambda: transfer.poll().telemetry.moved_nbytes >= 16 << 20 or transfer.status, what="16 MiB")
    began = time.monotonic()
    assert transfer.cancel().state is TransferState.CANCELLED
    assert time.monotonic() - began < 5
    before = target.array().copy()
    source.array()[:] = 0
    client.write(source.rows([0], [1]), source.rows([1], [1]), backend="local")
    np.testing.assert_array_equal(target.array(), before)
    with pytest.raises(Cancelled):
        transfer.wait()
    client.free([source, target])  # nothing holds them


def test_a_deadline_passes_during_a_delay(drill: Callable[..., Client]) -> None:
    client = drill('kind="delay", delay="30s", after_nbytes="16MiB"')
    source, target = two_regions(client)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="of 67108864 bytes") as failed:
        client.write(source, target, timeout_s=0.5)
    assert 0.4 < time.monotonic() - began < 5
    assert "0.5" in failed.value.limit
    client.free([source, target])


def test_a_session_that_ends_during_a_delay_leaves_nothing(drill: Callable[..., Client]) -> None:
    client = drill('kind="delay", delay="30s"')
    source, target = two_regions(client)
    client.transfer("WRITE", source, target)
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 5


def test_a_delayed_transfer_does_not_hold_up_others(drill: Callable[..., Client]) -> None:
    """Slots are shared by turns: those behind a slow one get through by another backend."""
    client = drill('kind="delay", delay="30s"')
    source, target = two_regions(client)
    slow = client.transfer("WRITE", source, target)
    small = client.allocate(8192)
    began = time.monotonic()
    assert (
        client.write(small.rows([0], [4096]), small.rows([4096], [4096]), backend="local").state is TransferState.DONE
    )
    assert time.monotonic() - began < 5
    slow.cancel()


# ------------------------------------------------------------------------------------------- across nodes


@pytest.fixture
def far_drill(cluster: Cluster, no_leaks: Callable[..., None]) -> Iterator[Callable[..., tuple]]:
    """Starts two daemons, of which the asking one's ``tcp`` backend is wrapped; returns a region here and one there."""
    with ExitStack() as stack:

        def start(*faults: str) -> tuple:
            a = cluster.make("a", settings=(POOLS,))
            b = cluster.make("b", peers=(a,), settings=(POOLS, faulty("tcp", *faults)))
            alice = stack.enter_context(Client.connect(a.session_socket, agent="alice"))
            bob = stack.enter_context(Client.connect(b.session_socket, agent="bob"))
            theirs = alice.allocate(NBYTES, access=Access.READ_WRITE)
            theirs.array()[:] = np.random.default_rng(1).integers(1, 255, NBYTES, np.uint8)
            bob.regions(node="a")
            no_leaks(a, b)
            return bob, bob.allocate(NBYTES), theirs

        yield start


@pytest.mark.parametrize(("kind", "op"), [("error", "READ"), ("short", "WRITE"), ("disconnect", "WRITE")])
def test_failover_across_nodes(far_drill: Callable[..., tuple], kind: str, op: str) -> None:
    bob, mine, theirs = far_drill(f'kind="{kind}", every=3')
    if op == "WRITE":
        mine.array()[:] = 7
    status = bob.transfer(op, mine, theirs.whole()).wait(20)
    assert status.state is TransferState.DONE
    assert routes_of(status) == ["tcp"]
    np.testing.assert_array_equal(mine.array(), theirs.array())


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_cancel_across_nodes_during_a_delay_leaves_no_hold(far_drill: Callable[..., tuple], op: str) -> None:
    bob, mine, theirs = far_drill('kind="delay", delay="30s", after_nbytes="16MiB"')
    transfer = bob.transfer(op, mine, theirs.whole())
    eventually(lambda: transfer.poll().telemetry.moved_nbytes >= 16 << 20 or transfer.status, what="16 MiB")
    assert transfer.cancel().state is TransferState.CANCELLED
    here, there = mine.array().copy(), theirs.array().copy()
    theirs.free()  # not busy: the peer has let go
    assert np.array_equal(mine.array(), here)
    assert len(there)


def test_a_route_that_failed_is_tried_last_for_a_while_and_is_listed(drill: Callable[..., Client]) -> None:
    """One failure costs one detour, not one in each transfer; also where an old transfer is posted again."""
    client = drill('kind="error", limit=1')
    source, target = two_regions(client, CHUNK)
    transfer = client.transfer("WRITE", source, target)
    assert routes_of(transfer.wait(10.0)) == ["local"]
    assert client.admin.backends()[-1].failures + client.admin.backends()[0].failures >= 1
    [faulty_row] = [row for row in client.admin.routes() if row.route == "faulty"]
    assert (faulty_row.failures, faulty_row.source, faulty_row.target) == (1, "DRAM", "DRAM")
    assert "injected by backends.faulty" in faulty_row.last_error
    if faulty_row.retry_in_s > 0.2:  # else this machine was too slow to look in time
        considered = client.explain("WRITE", source, target).considered
        assert considered[0].startswith("local: chosen, quickest: "), considered
        assert "tried last for" in considered[1], considered
        assert routes_of(transfer.post(wait_s=10.0)) == ["local"]

    def is_healed() -> object:
        client.write(source, target)
        return [row.failures for row in client.admin.routes() if row.route == "faulty"] == [0] or client.admin.routes()

    eventually(is_healed, what="a success of the route that had failed")
    assert client.estimate("WRITE", source, target).basis == "measured"


def test_a_pinned_backend_that_fails_is_not_replaced_and_an_unknown_one_is_named(drill: Callable[..., Client]) -> None:
    client = drill('kind="error"')
    source, target = two_regions(client, CHUNK)
    with pytest.raises(MoveFailed) as failed:
        client.write(source, target, backend="faulty")
    assert failed.value.limit == "pinned to backend 'faulty'"
    assert "leave the backend open" in failed.value.remedy
    assert [line.partition(":")[0] for line in failed.value.routes_tried] == ["faulty"]
    with pytest.raises(InvalidArgument, match="no backend 'warp'") as unknown:
        client.write(source, target, backend="warp")
    assert "local" in unknown.value.limit
    assert "faulty" in unknown.value.limit
    assert client.write(source, target).state is TransferState.DONE
