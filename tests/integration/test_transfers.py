"""Bytes arrive whole and in place between every two kinds of memory, on one node and across two, by every list form.

All of it by gRPC and, with lists that are prepared first, by the ring: the same tests, and the same results.
"""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

from xferd.api.descriptors import DescriptorList, Run
from xferd.api.errors import (
    AgentUnknown,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidState,
    NotFound,
    PermissionDenied,
    Stale,
)
from xferd.api.types import Access, Priority, TransferState
from xferd.clients import Client, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess

    Daemons = tuple[DaemonProcess, DaemonProcess]

KINDS = ("pool", "memfd", "private", "path", "fd")
NBYTES = 3 << 20
SHARED = Access.READ_WRITE


class PreparingClient(Client):
    """A client that prepares every list, so that its transfers go over the ring."""

    def transfer(self, op, local, remote, **options):
        return super().transfer(op, self.ready(local), self.ready(remote), **options)

    def read(self, local, remote, **options):
        return super().read(self.ready(local), self.ready(remote), **options)

    def write(self, local, remote, **options):
        return super().write(self.ready(local), self.ready(remote), **options)

    def ready(self, spec):
        """Return a prepared list; the same region's is the same, so that a request can be repeated."""
        if not isinstance(spec, (Region, DescriptorList)):
            return spec
        name = spec.id if isinstance(spec, Region) else id(spec)
        made = self.__dict__.setdefault("made", {})
        if name not in made:
            made[name] = spec, self.prepare(spec)
        return made[name][1]


@pytest.fixture(params=["grpc", "ring"])
def clients(
    request: pytest.FixtureRequest, pair: Daemons, no_leaks: Callable[..., None]
) -> Iterator[tuple[Client, Client]]:
    no_leaks(*pair)
    is_ring = request.param == "ring"
    maker = PreparingClient if is_ring else Client
    with (
        maker.connect(pair[0].session_socket, agent="alice", ring=is_ring) as a,
        maker.connect(pair[1].session_socket, agent="bob", ring=is_ring) as b,
    ):
        yield a, b
        assert a.uses_ring == b.uses_ring == is_ring  # no daemon has found fault with a ring


class Memory:
    """A region of a kind, with a way to look at its bytes that does not go through xferd."""

    def __init__(self, client: Client, daemon: DaemonProcess, kind: str, name: str, stack: ExitStack) -> None:
        self.kind = kind
        self._path = daemon.files / name
        match kind:
            case "pool":
                self.region = client.allocate(NBYTES, access=SHARED)
                self._view = self.region.array()
            case "memfd":
                self.region = client.register_memfd(NBYTES, access=SHARED)
                self._view = self.region.array()
            case "private":
                self._view = np.zeros(NBYTES + 1, dtype=np.uint8)[1:]  # not aligned
                self.region = client.register(self._view, access=SHARED)
            case "path":
                self._path.write_bytes(bytes(NBYTES))
                self.region = client.register_file(str(self._path), writable=True, access=SHARED)
            case "fd":
                self._path.write_bytes(bytes(NBYTES))
                file = stack.enter_context(self._path.open("r+b"))
                self.region = client.register_fd(file.fileno(), writable=True, access=SHARED)

    def put(self, data: np.ndarray) -> None:
        if self.kind in ("path", "fd"):
            self._path.write_bytes(data.tobytes())
        else:
            self._view[:] = data

    def get(self) -> np.ndarray:
        if self.kind in ("path", "fd"):
            return np.frombuffer(self._path.read_bytes(), dtype=np.uint8)
        return self._view.copy()


def pattern(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, NBYTES, dtype=np.uint8)


def scattered(seed: int, total: int = 1 << 20) -> tuple[list[int], list[int]]:
    """Return (offsets, sizes) of random disjoint spans that add up to ``total``."""
    rng = np.random.default_rng(seed)
    edges = np.unique(np.concatenate(([0, total], rng.integers(1, total, 300))))
    sizes = np.diff(edges)
    order = rng.permutation(len(sizes))
    gaps = rng.integers(0, 3000, len(sizes))
    starts = np.zeros(len(sizes), dtype=np.int64)
    starts[order] = np.cumsum(sizes[order] + gaps[order]) - sizes[order]
    return starts.tolist(), sizes.tolist()


def expect(
    source: np.ndarray, before: np.ndarray, src: tuple[list[int], list[int]], dst: tuple[list[int], list[int]]
) -> np.ndarray:
    stream = np.concatenate([source[o : o + n] for o, n in zip(*src, strict=True)])
    wanted = before.copy()
    at = 0
    for offset, size in zip(*dst, strict=True):
        wanted[offset : offset + size] = stream[at : at + size]
        at += size
    return wanted


@pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize("where", ["same node", "across nodes"])
def test_scattered_blocks_between_all_kinds(clients, pair, where: str, op: str, mine: str, theirs: str) -> None:
    a, b = clients
    owner, daemon = (a, pair[0]) if where == "same node" else (b, pair[1])
    with ExitStack() as stack:
        local = Memory(a, pair[0], mine, "local", stack)
        remote = Memory(owner, daemon, theirs, "remote", stack)
        ends = {"READ": (remote, local), "WRITE": (local, remote)}[op]
        data, before = pattern(1), pattern(2)
        ends[0].put(data)
        ends[1].put(before)
        src, dst = scattered(3), scattered(4)
        lists = {id(ends[0]): ends[0].region.rows(*src), id(ends[1]): ends[1].region.rows(*dst)}
        status = (a.read if op == "READ" else a.write)(lists[id(local)], lists[id(remote)])
        assert status.state is TransferState.DONE
        assert status.telemetry.moved_nbytes == 1 << 20
        np.testing.assert_array_equal(ends[1].get(), expect(data, before, src, dst))
        np.testing.assert_array_equal(ends[0].get(), data)


def test_every_list_form_names_the_same_bytes(clients) -> None:
    a, _ = clients
    source, target = a.allocate([NBYTES, NBYTES])
    source.array()[:] = pattern(5)
    rows = 64
    columns = source.rows(np.arange(rows) * 8192, 4096)
    strided = DescriptorList.from_runs([Run(source.id, 0, 4096, 8192, rows)])
    with a.prepare(source.rows(np.arange(rows)[::-1] * 8192, 4096)) as prepared:
        seen = []
        for form in (columns, strided, prepared.select(np.arange(rows)[::-1])):
            target.array()[:] = 0
            a.write(form, target.rows([0], [rows * 4096]))
            seen.append(target.array()[: rows * 4096].copy())
    wanted = source.array()[: rows * 8192].reshape(rows, 8192)[:, :4096].reshape(-1)
    for got in seen:
        np.testing.assert_array_equal(got, wanted)


def test_loopback_by_name_is_the_same_node(clients, pair) -> None:
    a, _ = clients
    source, target = a.allocate([4096, 4096])
    source.array()[:] = 7
    remote = DescriptorList.from_columns(source.id, [0], [4096], node=pair[0].name, epoch=source.info.epoch)
    assert a.read(target, remote).telemetry.route[0].backend == "local"
    assert target.array().min() == 7


def test_a_held_transfer_is_posted_and_posted_again(clients) -> None:
    a, _ = clients
    source, target = a.allocate([4096, 4096])
    transfer = a.transfer("WRITE", source, target, hold=True)
    assert transfer.poll().state is TransferState.PREPARED
    for value in (1, 2):
        source.array()[:] = value
        transfer.post()
        assert transfer.wait().state is TransferState.DONE
        assert target.array().min() == value
    assert transfer.poll().telemetry.posts == 2


def test_the_same_key_is_the_same_transfer_and_names_one_request_only(clients) -> None:
    a, _ = clients
    source, target = a.allocate([8192, 8192])
    one = a.transfer("WRITE", source, target, key="k")
    two = a.transfer("WRITE", source, target, key="k")
    assert one.id == two.id
    with pytest.raises(AlreadyExists, match="another request"):
        a.transfer("READ", source, target, key="k")
    one.wait()
    one.release()
    assert a.transfer("READ", source, target, key="k").id != one.id


def test_many_are_waited_for_polled_and_streamed_at_once(clients) -> None:
    a, _ = clients
    source, target = a.allocate([1 << 20, 1 << 20])
    transfers = [
        a.transfer("WRITE", source.rows([i * 4096], [4096]), target.rows([i * 4096], [4096])) for i in range(50)
    ]
    done = a.wait_many(transfers, timeout_s=20)
    assert {status.state for status in done} == {TransferState.DONE}
    assert [status.id for status in a.poll_many(transfers)] == [transfer.id for transfer in transfers]
    assert {status.id for status in a.completions(transfers)} == {transfer.id for transfer in transfers}


def test_notifications_follow_their_data_and_carry_any_bytes(clients, pair) -> None:
    a, b = clients
    inbox = a.allocate(1 << 20, access=Access.WRITE, label="inbox")
    mine = b.allocate(1 << 20)
    mine.array()[:] = 9
    seen = []

    def receive() -> None:
        (notification,) = a.notifications(timeout_s=20)
        seen.append((notification, int(inbox.array().min())))

    waiting = threading.Thread(target=receive)
    waiting.start()
    (remote,) = b.regions(node="a", label="inbox")
    b.write(mine, remote, notification=("alice@a", b"\0all\0"))
    waiting.join(20)
    ((notification, lowest),) = seen
    assert (notification.payload, notification.source, lowest) == (b"\0all\0", "bob@b", 9)
    assert notification.transfer
    a.notify("bob@b", b"")
    assert [n.payload for n in b.notifications(timeout_s=20)] == [b""]
    with pytest.raises(AgentUnknown, match="nobody"):
        b.notify("nobody@a", b"x")
    # The bytes are there, and the transfer says that nobody was told.
    with pytest.raises(AgentUnknown):
        b.write(mine, remote, notification=("nobody@a", b"x"))


def test_access_rights_are_kept_on_the_node_and_across(clients, pair) -> None:
    a, b = clients
    secret, readable = a.allocate(4096, label="s"), a.allocate(4096, access=Access.READ, label="r")
    with Client.connect(pair[0].session_socket, agent="carol") as carol:
        mine = carol.allocate(4096)
        carol.read(mine, carol.region(readable.info))
        for op, region in (("READ", secret), ("WRITE", secret), ("WRITE", readable)):
            with pytest.raises(PermissionDenied, match="access"):
                carol.transfer(op, mine, DescriptorList.from_columns(region.id, [0], [4096])).wait()
        with pytest.raises(PermissionDenied):
            carol.free([carol.region(readable.info)])
    theirs = b.allocate(4096)
    b.read(theirs, DescriptorList.from_columns(readable.id, [0], [4096], node="a"))
    with pytest.raises(PermissionDenied):
        b.write(theirs, DescriptorList.from_columns(readable.id, [0], [4096], node="a"))
    # Seen before anything is sent: `explain` moves nothing, so the other node is not asked to refuse.
    with pytest.raises(PermissionDenied, match="does not grant WRITE"):
        b.explain("WRITE", theirs, DescriptorList.from_columns(readable.id, [0], [4096], node="a"))
    with pytest.raises((PermissionDenied, NotFound)):
        b.read(theirs, DescriptorList.from_columns(secret.id, [0], [4096], node="a"))


def test_freed_regions_and_other_epochs_are_stale(clients) -> None:
    a, b = clients
    region, target = a.allocate(4096, access=Access.READ), b.allocate(4096)
    prepared = b.prepare(DescriptorList.from_columns(region.id, [0], [4096], node="a", epoch=region.info.epoch))
    b.read(target, prepared)
    region.free()
    again = a.allocate(4096, access=Access.READ)  # the same slot, another generation
    with pytest.raises((Stale, NotFound)):
        b.read(target, prepared)
    with pytest.raises(Stale, match="epoch"):
        b.read(target, DescriptorList.from_columns(again.id, [0], [4096], node="a", epoch=region.info.epoch - 1))


def test_a_deadline_ends_a_transfer_and_a_cancel_brings_it_to_rest(clients) -> None:
    a, b = clients
    source = b.allocate(64 << 20, access=Access.READ)
    target = a.allocate(64 << 20)
    (remote,) = [r for r in a.regions(node="b") if r.id == source.id]
    with pytest.raises(DeadlineExceeded, match="of 67108864 bytes"):
        a.read(target, remote, timeout_s=0.002)
    transfer = a.transfer("READ", target, remote, priority=Priority.LOW)
    status = transfer.cancel()
    assert status.state in (TransferState.CANCELLED, TransferState.DONE)
    # Quiesced: whatever is in the target now stays.
    source.array()[:] = 0xAA
    before = target.array().copy()
    a.read(a.allocate(4096), remote.rows([0], [4096]))
    np.testing.assert_array_equal(target.array(), before)
    if status.state is TransferState.CANCELLED:
        with pytest.raises(Cancelled):
            transfer.wait()
    transfer.post()
    assert transfer.wait().state is TransferState.DONE
    assert target.array().min() == 0xAA


def test_a_running_transfer_keeps_its_regions_from_being_freed(clients) -> None:
    a, b = clients
    source, target = b.allocate(64 << 20, access=Access.READ), a.allocate(64 << 20)
    (remote,) = [r for r in a.regions(node="b") if r.id == source.id]
    transfer = a.transfer("READ", target, remote)
    with pytest.raises(InvalidState):
        transfer.post()
    status = transfer.wait()
    assert status.state is TransferState.DONE
    target.free()
    with pytest.raises((Stale, NotFound)):
        transfer.post()


@pytest.mark.parametrize("which", ["source", "target"])
def test_a_small_transfer_is_not_posted_again_into_memory_that_was_freed(clients, which: str) -> None:
    a, _ = clients
    source, target = a.allocate([4096, 4096])
    with a.transfer("WRITE", source, target, hold=True) as transfer:
        for _ in range(2):  # the second needs no check any more
            transfer.post(wait_s=5)
            assert transfer.status.state is TransferState.DONE
        {"source": source, "target": target}[which].free()
        others = a.allocate(4096)  # the same bytes, perhaps, and somebody else's
        others.array()[:] = 7
        with pytest.raises((Stale, NotFound)):
            transfer.post(wait_s=5)
        assert others.array().min() == 7


def test_what_is_posted_again_and_again_is_not_forgotten_as_the_oldest(cluster) -> None:
    node = cluster.make("few", tcp=False, settings=("limits.max_transfers=3",))
    with Client.connect(node.session_socket, agent="poster") as client:
        source, target = client.allocate([4096, 4096])
        often = client.transfer("WRITE", source, target, hold=True)
        for _ in range(6):
            often.post(wait_s=5)
            assert often.status.state is TransferState.DONE
            client.write(source, target)


def test_the_plan_of_what_is_posted_again_and_again_is_not_dropped_as_the_oldest(cluster) -> None:
    node = cluster.make("brief", tcp=False, settings=("transfers.keep_plans=100",))  # three small plans
    with Client.connect(node.session_socket, agent="poster") as client:
        source, target = client.allocate([4096, 4096])
        often = client.transfer("WRITE", source, target, hold=True)
        for _ in range(12):
            often.post(wait_s=5)
            assert often.status.state is TransferState.DONE
            client.write(source, target)


def test_explain_and_estimate_change_nothing(clients) -> None:
    a, b = clients
    source, target = b.allocate(1 << 20, access=Access.READ), a.allocate(1 << 20)
    (remote,) = [r for r in a.regions(node="b") if r.id == source.id]
    explanation = a.explain("READ", target, remote)
    assert [hop.backend for hop in explanation.route] == ["tcp"]
    assert any("local" in line for line in explanation.considered)
    assert a.estimate("READ", target, remote).duration_s > 0
    assert target.array().max() == 0


def test_metadata_travels_as_a_blob(cluster: Cluster) -> None:
    one, two = cluster.make("one"), cluster.make("two")
    with Client.connect(one.session_socket, agent="x") as x, Client.connect(two.session_socket, agent="y") as y:
        source = x.allocate(4096, access=Access.READ, label="shared")
        x.allocate(4096)
        source.array()[:] = 3
        imported = y.import_metadata(x.export_metadata())
        assert imported.node.name == "one"
        (remote,) = y.regions(node="one", label="shared")
        target = y.allocate(4096)
        y.read(target, remote)
        assert target.array().min() == 3
        y.invalidate("one")
