"""The tcp backend over real loopback sockets: bytes arrive exactly, refusals are typed, and what ends is at rest.

Run as a program, this file is a peer for the tests that kill or stop one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from xferd.api.errors import (
    AlreadyExists,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    LimitExceeded,
    MoveFailed,
    NotFound,
    OutOfBounds,
    Overloaded,
    PeerLost,
    PermissionDenied,
    ProtocolViolation,
    Stale,
    Unauthenticated,
    Unavailable,
)
from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.api.types import NodeInfo, TransferOp
from xferd.plugins import vectored
from xferd.plugins.base import Chunk, Extent, MappedSpace, PeerIdentity, RemoteSpace
from xferd.plugins.tcp import TcpBackend, TcpOptions
from xferd.plugins.tcp.frames import FrameLimits, FrameType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from numpy.typing import NDArray

    from xferd.api.errors import XferdError
    from xferd.plugins.tcp.streams import BlockingStream

    Bytes = NDArray[np.uint8]
    MakeNode = Callable[..., Awaitable["Node"]]

SECRET = b"a cluster secret of the tests"
MIB = 1 << 20


# ------------------------------------------------------------------------------------------ a small node


class ArrayGrant:
    """Windows over numpy memory, with the handler's faults built in."""

    def __init__(self, handler: MemoryHandler, iov: NDArray[np.uint64]) -> None:
        self.nbytes = vectored.total_nbytes(iov)
        self._handler = handler
        self._iov = iov
        self.closed = False

    def windows(self) -> Iterator[NDArray[np.uint64]]:
        rest, step, number = self._iov, self._handler.window_nbytes, 0
        while len(rest):
            if self._handler.fail_at == number:
                raise self._handler.fail_with
            if self._handler.gate_at == number:
                self._handler.entered.set()
                self._handler.gate.wait()
            window, rest = vectored.split(rest, min(step, vectored.total_nbytes(rest)))
            yield window
            number += 1
        if self._handler.fail_at == number:
            raise self._handler.fail_with

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._handler.open_grants -= 1


@dataclass
class MemoryHandler:
    """Regions that are numpy arrays; ``gate_at`` and ``fail_at`` name the window before which it happens."""

    epoch: int
    regions: dict[int, Bytes] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    window_nbytes: int = 4 * MIB
    gate_at: int = -1
    fail_at: int = -1
    fail_with: XferdError = field(default_factory=lambda: MoveFailed("the disk is on fire"))
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    open_grants: int = 0
    connected: list[PeerIdentity] = field(default_factory=list)
    lost: list[tuple[PeerIdentity, str]] = field(default_factory=list)
    lost_event: asyncio.Event = field(default_factory=asyncio.Event)
    quiesced: list[str] = field(default_factory=list)
    transport: TcpBackend | None = None

    async def handle(self, peer: PeerIdentity, request: pb.PeerRequest) -> pb.PeerReply:
        kind = request.WhichOneof("request")
        if kind == "quiesce":
            assert self.transport is not None
            await self.transport.wait_quiesced(peer, request.quiesce.transfer_id)
            self.quiesced.append(request.quiesce.transfer_id)
            return pb.PeerReply(done=pb.Done())
        if kind == "get_node":
            return pb.PeerReply(node=xferd_pb.Node(name="from-handler", epoch=self.epoch))
        if kind == "get_regions":
            if request.get_regions.label == "bug":
                raise RuntimeError("a bug of the handler")
            if request.get_regions.label == "wait":
                await self.answering.wait()
            return pb.PeerReply(regions=xferd_pb.RegionList(node=request.get_regions.label))
        if kind == "goodbye":
            return pb.PeerReply(done=pb.Done())
        raise NotFound(f"no {kind} here", remedy="ask for something else")

    def open_grant(self, peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> ArrayGrant:
        if request.epoch != self.epoch:
            raise Stale(f"epoch {request.epoch}", limit=str(self.epoch))
        region, offset, nbytes = (
            np.frombuffer(raw, dtype="<u8") for raw in (request.region, request.offset, request.nbytes)
        )
        iov = np.empty((len(region), 2), dtype=np.uint64)
        iov[:, 1] = nbytes
        for number in np.unique(region):
            memory = self.regions.get(int(number))
            if memory is None or int(number) in self.refused:
                raise PermissionDenied(f"region {number} may not be touched")
            rows = region == number
            if (offset[rows] + nbytes[rows] > memory.nbytes).any():
                raise OutOfBounds(f"region {number} has {memory.nbytes} bytes")
            iov[rows, 0] = offset[rows] + np.uint64(memory.ctypes.data)
        self.open_grants += 1
        return ArrayGrant(self, iov)

    def peer_connected(self, peer: PeerIdentity) -> None:
        self.connected.append(peer)

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        self.lost.append((peer, reason))
        self.lost_event.set()


@dataclass
class Node:
    """A backend with its handler, at an address."""

    backend: TcpBackend
    handler: MemoryHandler
    name: str
    epoch: int
    address: str

    async def connect(self, other: Node) -> PeerIdentity:
        return await self.backend.connect(other.address, name=other.name, epoch=other.epoch)


async def start_node(
    secret_file: Path, name: str, *, epoch: int = 1, listen: str = "127.0.0.1:0", node_id: str = "", **options: object
) -> Node:
    settings = {"listen": listen, "secret_file": str(secret_file), **options}
    backend = TcpBackend(TcpOptions.model_validate(settings))
    handler = MemoryHandler(epoch)
    handler.transport = backend
    await backend.start()
    me = NodeInfo(name, node_id or f"id-{name}-{epoch}", epoch, "test", (), ("tcp",), (), (), 0.0)
    addresses = await backend.listen(me, handler)
    return Node(backend, handler, name, epoch, addresses[0])


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("xferd-tcp")]


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    return path


@pytest.fixture
async def make_node(secret_file: Path) -> AsyncIterator[MakeNode]:
    """Make nodes; at the end all are closed, and no thread, fd, task or grant of theirs may be left."""
    nodes: list[Node] = []
    tasks_before = asyncio.all_tasks()
    fds_before = open_sockets()

    async def make(name: str, **options: object) -> Node:
        node = await start_node(secret_file, name, **options)  # type: ignore[arg-type]  # options by name
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.handler.gate.set()
        node.handler.answering.set()
    for node in nodes:
        await node.backend.aclose()
        await node.backend.aclose()
    await asyncio.sleep(0)  # lets closed transports drop their sockets
    assert lane_threads() == []
    assert [task.get_name() for task in asyncio.all_tasks() - tasks_before - {asyncio.current_task()}] == []
    assert open_sockets() <= fds_before
    assert [node.handler.open_grants for node in nodes] == [0] * len(nodes)


def open_sockets() -> int:
    """Count sockets and pipes; an event loop may keep other descriptors of its own."""
    links = []
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208  # a Path would keep no less and read no better
        with contextlib.suppress(OSError):  # the listing's own descriptor has gone
            links.append(os.readlink(f"/proc/self/fd/{entry}"))  # noqa: PTH115
    return sum(link.startswith(("socket:", "pipe:")) for link in links)


def noise(nbytes: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def table(memory: Bytes, offset: object, nbytes: object) -> NDArray[np.uint64]:
    starts = np.atleast_1d(np.asarray(offset, dtype=np.uint64))
    iov = np.empty((len(starts), 2), dtype=np.uint64)
    iov[:, 0] = starts + np.uint64(memory.ctypes.data)
    iov[:, 1] = nbytes
    return iov


def local_extent(memory: Bytes, offset: object = 0, nbytes: object = None) -> Extent:
    return Extent(MappedSpace(), table(memory, offset, memory.nbytes if nbytes is None else nbytes))


def remote_extent(node: Node, offset: object, nbytes: object, *, region: int = 1, epoch: int = 0) -> Extent:
    starts = np.atleast_1d(np.asarray(offset, dtype=np.uint64))
    iov = np.empty((len(starts), 2), dtype=np.uint64)
    iov[:, 0], iov[:, 1] = starts, nbytes
    return Extent(RemoteSpace(node.name, epoch or node.epoch), iov, np.full(len(starts), region, dtype=np.uint64))


def chunk(source: Extent, target: Extent, transfer_id: str = "t-1") -> Chunk:
    assert source.nbytes == target.nbytes
    return Chunk(source, target, source.nbytes, transfer_id, "cause-1", "agent@a")


async def pair_of(make_node: MakeNode, memory: Bytes, **options: object) -> tuple[Node, Node]:
    """Return a connected pair: a calls, b has ``memory`` as region 1."""
    a, b = await make_node("a", **options), await make_node("b", **options)
    b.handler.regions[1] = memory
    await a.connect(b)
    return a, b


# --------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_scattered_blocks_arrive_exactly(make_node: MakeNode, op: str) -> None:
    theirs, mine = noise(16 * MIB), np.zeros(16 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    rng = np.random.default_rng(5)
    there, here = rng.permutation(4096)[:1024] * 4096, rng.permutation(4096)[:1024] * 4096
    remote, local = remote_extent(b, there, 4096), local_extent(mine, here, 4096)
    pages, my_pages = theirs.reshape(-1, 4096), mine.reshape(-1, 4096)
    if op == "READ":
        assert await a.backend.move(chunk(remote, local)) == 4 * MIB
    else:
        my_pages[:] = noise(16 * MIB, 2).reshape(-1, 4096)
        assert await a.backend.move(chunk(local, remote)) == 4 * MIB
    np.testing.assert_array_equal(my_pages[here // 4096], pages[there // 4096])
    untouched = np.delete(my_pages, here // 4096, axis=0)
    if op == "READ":
        assert not untouched.any()
    link = a.backend.link("b")
    assert (link.received_nbytes if op == "READ" else link.sent_nbytes) == 4 * MIB
    assert link.lanes == 2  # control and one data lane
    statistics = a.backend.statistics()
    assert (statistics.moved_nbytes, statistics.chunks, statistics.failures, statistics.busy) == (4 * MIB, 1, 0, 0)


@pytest.mark.parametrize("window_nbytes", [4096, 10_007, MIB, 64 * MIB])
async def test_shapes_may_differ_and_windows_fall_anywhere(make_node: MakeNode, window_nbytes: int) -> None:
    theirs, mine = noise(2 * MIB), np.zeros(2 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    b.handler.window_nbytes = window_nbytes
    sizes = np.array([1, 65_535, 3, 4096, 100_001, 777], dtype=np.uint64)
    total = int(sizes.sum())
    offsets = np.concatenate(([5], (np.cumsum(sizes)[:-1] + 7 * np.arange(1, 6, dtype=np.uint64)))).astype(np.uint64)
    want = np.concatenate([theirs[int(o) : int(o + n)] for o, n in zip(offsets, sizes, strict=True)])
    assert await a.backend.move(chunk(remote_extent(b, offsets, sizes), local_extent(mine, 11, total))) == total
    np.testing.assert_array_equal(mine[11 : 11 + total], want)
    assert not mine[:11].any()
    assert not mine[11 + total :].any()
    back = noise(total, 9)
    assert await a.backend.move(chunk(local_extent(back), remote_extent(b, offsets, sizes))) == total
    got = np.concatenate([theirs[int(o) : int(o + n)] for o, n in zip(offsets, sizes, strict=True)])
    np.testing.assert_array_equal(got, back)


@pytest.mark.slow
async def test_one_large_block_there_and_back(make_node: MakeNode) -> None:
    nbytes = 256 * MIB
    theirs, mine = np.tile(noise(MIB), 256), np.zeros(nbytes, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    assert await a.backend.move(chunk(remote_extent(b, 0, nbytes), local_extent(mine))) == nbytes
    assert np.array_equal(mine, theirs)
    mine[::4096] += 1
    assert await a.backend.move(chunk(local_extent(mine), remote_extent(b, 0, nbytes))) == nbytes
    assert np.array_equal(mine, theirs)


async def test_many_chunks_share_the_lanes(make_node: MakeNode) -> None:
    theirs, mine = noise(4 * MIB), np.zeros(4 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=3, small_lanes=0)
    step = 4 * MIB // 64
    chunks = [chunk(remote_extent(b, i * step, step), local_extent(mine, i * step, step), f"t-{i}") for i in range(64)]
    assert await asyncio.gather(*map(a.backend.move, chunks)) == [step] * 64
    np.testing.assert_array_equal(mine, theirs)
    assert a.backend.link("b").lanes == 4
    assert len(lane_threads()) == 6


async def test_both_nodes_may_call_each_other(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB))
    a.handler.regions[1] = noise(MIB, 3)
    await b.connect(a)
    one, two = np.zeros(MIB, dtype=np.uint8), np.zeros(MIB, dtype=np.uint8)
    await asyncio.gather(
        a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(one))),
        b.backend.move(chunk(remote_extent(a, 0, MIB), local_extent(two))),
    )
    np.testing.assert_array_equal(one, b.handler.regions[1])
    np.testing.assert_array_equal(two, a.handler.regions[1])
    assert [peer.node for peer in a.handler.connected] == ["b"]
    assert [peer.node for peer in b.handler.connected] == ["a"]


# ------------------------------------------------------------------------------------------- refusals


async def test_a_refused_request_leaves_the_lane_good(make_node: MakeNode) -> None:
    theirs, mine = noise(8 * MIB), noise(8 * MIB, 2)
    a, b = await pair_of(make_node, theirs, lanes=1)
    before = theirs.copy()
    remote, local = remote_extent(b, 0, 8 * MIB), local_extent(mine)
    b.handler.refused.add(1)
    with pytest.raises(PermissionDenied, match="region 1"):
        await a.backend.move(chunk(local, remote))
    with pytest.raises(PermissionDenied, match="region 1"):
        await a.backend.move(chunk(remote, local))
    b.handler.refused.clear()
    with pytest.raises(OutOfBounds):
        await a.backend.move(chunk(local, remote_extent(b, 1, 8 * MIB)))
    np.testing.assert_array_equal(theirs, before)
    threads = lane_threads()
    assert await a.backend.move(chunk(local, remote)) == 8 * MIB
    assert lane_threads() == threads
    np.testing.assert_array_equal(theirs, mine)
    assert a.backend.statistics().failures == 3


async def test_a_stale_epoch_is_refused_before_anything_is_sent(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(4096))
    mine = np.zeros(4096, dtype=np.uint8)
    with pytest.raises(Stale, match="epoch 1, the regions are of epoch 7"):
        await a.backend.move(chunk(remote_extent(b, 0, 4096, epoch=7), local_extent(mine)))
    assert a.backend.link("b").lanes == 1
    b.handler.epoch = 2
    with pytest.raises(Stale):
        await a.backend.move(chunk(remote_extent(b, 0, 4096), local_extent(mine)))


@pytest.mark.parametrize("op", ["READ", "WRITE"])
@pytest.mark.parametrize("fail_at", [0, 2, 8])
async def test_an_error_between_windows_is_in_band(make_node: MakeNode, op: str, fail_at: int) -> None:
    theirs, mine = noise(8 * MIB), noise(8 * MIB, 2)
    a, b = await pair_of(make_node, theirs, lanes=1)
    b.handler.window_nbytes, b.handler.fail_at = MIB, fail_at
    remote, local = remote_extent(b, 0, 8 * MIB), local_extent(mine)
    work = chunk(remote, local) if op == "READ" else chunk(local, remote)
    with pytest.raises(MoveFailed, match="the disk is on fire"):
        await a.backend.move(work)
    threads = lane_threads()
    b.handler.fail_at = -1
    assert await a.backend.move(work) == 8 * MIB
    assert lane_threads() == threads
    np.testing.assert_array_equal(mine, theirs)


async def test_a_grant_of_another_size_is_an_error_and_no_hang(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB), lanes=1)
    honest = b.handler.open_grant

    def liar(peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> ArrayGrant:
        grant = honest(peer, op, request)
        grant.nbytes -= 1
        return grant

    b.handler.open_grant = liar  # type: ignore[method-assign]
    mine = np.zeros(MIB, dtype=np.uint8)
    with pytest.raises(InternalError, match="a grant of"):
        await a.backend.move(chunk(local_extent(mine), remote_extent(b, 0, MIB)))


async def test_too_many_rows_or_bytes_are_refused_here(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a = await make_node("a")
    b = await make_node("b", max_descriptors=10, max_frame="64KiB")
    b.handler.regions[1] = theirs
    await a.connect(b)
    rows = np.arange(11) * 8192
    with pytest.raises(LimitExceeded, match="limit: 10, set there"):
        await a.backend.move(chunk(remote_extent(b, rows, 4096), local_extent(mine, rows, 4096)))
    with pytest.raises(LimitExceeded, match="limit: 65536, set there"):
        await a.backend.move(chunk(local_extent(mine), remote_extent(b, 0, MIB)))
    assert await a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(mine))) == MIB
    np.testing.assert_array_equal(mine, theirs)


async def test_moving_needs_a_connection(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b")
    mine = np.zeros(4096, dtype=np.uint8)
    work = chunk(remote_extent(b, 0, 4096), local_extent(mine))
    with pytest.raises(PeerLost, match="not connected"):
        await a.backend.move(work)
    await b.connect(a)
    with pytest.raises(PeerLost, match="has called us"):
        await a.backend.move(work)


# ----------------------------------------------------------------------------------------- connecting


async def test_connect_is_idempotent_and_single_flight(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b", epoch=4)
    wanted = [a.backend.connect(b.address), a.connect(b), a.backend.connect(b.address, name="b"), a.connect(b)]
    assert set(await asyncio.gather(*wanted)) == {PeerIdentity("b", "id-b-4", 4)}
    assert a.backend.link("b").lanes == 1
    assert b.backend.link("a").lanes == 1
    other_name = b.address.replace("127.0.0.1", "localhost")
    if socket.getaddrinfo("localhost", None)[0][0] == socket.AF_INET:
        assert (await a.backend.connect(other_name)).node == "b"
    assert len(a.handler.connected) == 1
    with pytest.raises(Stale, match="epoch 4, and 5 was expected"):
        await a.backend.connect(b.address, epoch=5)


@pytest.mark.parametrize(("name", "epoch"), [("c", 0), ("b", 9), ("c", 1)])
async def test_another_node_than_expected_is_stale(make_node: MakeNode, name: str, epoch: int) -> None:
    a, b = await make_node("a"), await make_node("b")
    with pytest.raises(Stale, match="was expected"):
        await a.backend.connect(b.address, name=name, epoch=epoch)
    assert a.handler.connected == b.handler.connected == []


async def test_a_wrong_secret_is_noticed_on_both_sides(make_node: MakeNode, tmp_path: Path) -> None:
    b = await make_node("b")
    other = tmp_path / "other"
    other.write_bytes(b"not the secret of the cluster")
    other.chmod(0o600)
    stranger = await start_node(other, "stranger")
    try:
        with pytest.raises(Unauthenticated, match="secret"):
            await stranger.connect(b)
    finally:
        await stranger.backend.aclose()
    assert b.backend.refusals["unauthenticated"] == 1
    assert b.handler.connected == []


async def test_nobody_there_and_nobody_who_talks(make_node: MakeNode) -> None:
    a = await make_node("a", connect_timeout="200ms")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(PeerLost, match="no handshake"):
            await a.backend.connect(f"tcp://127.0.0.1:{port}")
    with pytest.raises(PeerLost, match="cannot connect"):
        await a.backend.connect(f"tcp://127.0.0.1:{port}")


async def test_our_own_name_is_refused(make_node: MakeNode) -> None:
    a, twin = await make_node("a"), await make_node("a", epoch=2)
    with pytest.raises(AlreadyExists, match="both nodes are called 'a'"):
        await a.backend.connect(twin.address)


async def test_a_later_epoch_replaces_and_an_older_one_is_stale(make_node: MakeNode) -> None:
    b = await make_node("b")
    old, new = await make_node("a", epoch=1), await make_node("a", epoch=2)
    await old.connect(b)
    await new.connect(b)
    await asyncio.wait_for(old.handler.lost_event.wait(), 5)
    assert [peer.epoch for peer in b.handler.connected] == [1, 2]
    assert [(peer.epoch, reason) for peer, reason in b.handler.lost] == [(1, "the node came back with epoch 2")]
    with pytest.raises(Stale, match="epoch 1, and 2 is connected"):
        await old.connect(b)


async def test_too_many_lanes_are_refused(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await make_node("a", lanes=2), await make_node("b", max_lanes=1)
    b.handler.regions[1] = theirs
    b.handler.gate_at = 0
    await a.connect(b)
    work = chunk(remote_extent(b, 0, MIB), local_extent(mine))
    first = asyncio.create_task(a.backend.move(work))
    await asyncio.to_thread(b.handler.entered.wait)
    with pytest.raises(Overloaded, match="max_lanes 1"):
        await a.backend.move(work)
    b.handler.gate.set()
    assert await first == MIB


async def test_one_peer_cannot_take_the_lanes_of_another(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    greedy, other = await make_node("greedy", lanes=3), await make_node("other")
    b = await make_node("b", max_lanes=3, max_peer_lanes=2)
    b.handler.regions[1] = theirs
    b.handler.gate_at = 0
    await greedy.connect(b)
    await other.connect(b)
    work = chunk(remote_extent(b, 0, MIB), local_extent(mine))
    held = []
    for _ in range(2):
        held.append(asyncio.create_task(greedy.backend.move(work)))
        await asyncio.to_thread(b.handler.entered.wait)
        b.handler.entered.clear()
    with pytest.raises(Overloaded, match="max_peer_lanes 2"):
        await greedy.backend.move(work)
    b.handler.gate.set()
    assert await other.backend.move(work) == MIB
    assert await asyncio.gather(*held) == [MIB, MIB]


# ---------------------------------------------------------------------------------------- small lanes


SMALL = 64 << 10


def small_lanes(node: Node, peer: str) -> int:
    pool = node.backend._connected(peer).small
    return len(pool.lanes) if pool is not None else 0


@pytest.mark.parametrize(
    ("nbytes", "rows", "is_small"),
    [(1, 1, True), (SMALL, 1, True), (SMALL + 1, 1, False), (SMALL, 128, True), (SMALL, 129, False)],
)
@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_small_chunks_of_few_rows_take_the_small_lane(
    make_node: MakeNode, op: str, nbytes: int, rows: int, is_small: bool
) -> None:
    theirs, mine = noise(2 * MIB), noise(2 * MIB, 2)
    a, b = await pair_of(make_node, theirs)
    sizes = np.diff(np.linspace(0, nbytes, rows + 1).astype(np.uint64))
    starts = np.arange(rows, dtype=np.uint64) * np.uint64(8192)
    remote, local = remote_extent(b, starts, sizes), local_extent(mine, starts, sizes)
    source, target = (remote, local) if op == "READ" else (local, remote)
    want = "small" if is_small else ""
    assert a.backend.slot_class(source.space, target.space, nbytes, 2 * rows).name == want
    assert await a.backend.move(chunk(source, target)) == nbytes
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        np.testing.assert_array_equal(mine[start : start + size], theirs[start : start + size])
    assert small_lanes(a, "b") == is_small
    assert len(lane_threads()) == (1 if is_small else 2)  # a small lane has no thread here
    link = a.backend.link("b")
    assert (link.received_nbytes if op == "READ" else link.sent_nbytes) == nbytes


async def test_threads_that_move_large_chunks_give_way(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB), nice=3)
    mine = np.zeros(MIB, dtype=np.uint8)
    await a.backend.move(chunk(remote_extent(b, 0, SMALL), local_extent(mine, 0, SMALL)))

    def nice() -> list[int]:
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("xferd-tcp")]
        return sorted(os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) - os.nice(0) for thread in threads)

    assert nice() == [0]  # the peer's thread of the small lane
    await a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(mine)))
    assert nice() == [0, 3, 3]


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_a_small_chunk_passes_bulk_that_stands_still(make_node: MakeNode, op: str) -> None:
    theirs, mine = noise(8 * MIB), np.zeros(8 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=2)
    b.handler.window_nbytes, b.handler.gate_at = MIB, 1
    bulk = [
        asyncio.create_task(a.backend.move(chunk(remote_extent(b, 0, 8 * MIB), local_extent(mine)))) for _ in range(4)
    ]
    await asyncio.to_thread(b.handler.entered.wait)
    remote, here = remote_extent(b, 0, 4096), np.zeros(4096, dtype=np.uint8)
    work = chunk(remote, local_extent(here)) if op == "READ" else chunk(local_extent(here), remote)
    assert await asyncio.wait_for(a.backend.move(work), 10) == 4096
    np.testing.assert_array_equal(here, theirs[:4096])
    assert not any(task.done() for task in bulk)
    b.handler.gate.set()
    assert await asyncio.gather(*bulk) == [8 * MIB] * 4


async def test_a_refused_small_chunk_leaves_its_lane_good_and_its_memory_alone(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB), small_lanes=1)
    mine = np.full(SMALL, 7, dtype=np.uint8)
    for source, target in (
        (remote_extent(b, MIB, SMALL), local_extent(mine)),
        (local_extent(mine), remote_extent(b, MIB, SMALL)),
    ):
        with pytest.raises(OutOfBounds):
            await a.backend.move(chunk(source, target))
        assert (mine == 7).all()
    lane = next(iter(a.backend._connected("b").small.lanes))  # type: ignore[union-attr]  # it was just used
    assert await a.backend.move(chunk(remote_extent(b, 0, SMALL), local_extent(mine))) == SMALL
    assert list(a.backend._connected("b").small.lanes) == [lane]  # type: ignore[union-attr]


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_a_cancelled_small_chunk_is_at_rest_on_both_sides(make_node: MakeNode, op: str) -> None:
    theirs, mine = noise(SMALL), np.zeros(SMALL, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, abort_grace="10ms")
    b.handler.gate_at = 0
    remote, local = remote_extent(b, 0, SMALL), local_extent(mine)
    source, target = (remote, local) if op == "READ" else (local, remote)
    moving = asyncio.create_task(a.backend.move(chunk(source, target)))
    await asyncio.to_thread(b.handler.entered.wait)
    moving.cancel()
    done, _ = await asyncio.wait([moving], timeout=0.3)
    assert not done  # the peer's grant is open
    b.handler.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(moving, 10)
    assert b.handler.open_grants == 0
    assert b.handler.quiesced == ["t-1"]
    assert await a.backend.move(chunk(source, target, "t-2")) == SMALL


async def test_a_small_lane_that_ends_fails_its_chunk_and_is_dialled_again(make_node: MakeNode) -> None:
    theirs, mine = noise(SMALL), np.zeros(SMALL, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, small_lanes=1)
    b.handler.gate_at = 0
    work = chunk(remote_extent(b, 0, SMALL), local_extent(mine))
    moving = asyncio.create_task(a.backend.move(work))
    await asyncio.to_thread(b.handler.entered.wait)
    for served in list(b.backend._threads):
        served.abort("test")
    with pytest.raises(PeerLost, match="node 'b'"):
        await asyncio.wait_for(moving, 10)
    b.handler.gate.set()
    assert small_lanes(a, "b") == 0
    assert await a.backend.move(work) == SMALL
    np.testing.assert_array_equal(mine, theirs)


async def test_a_full_socket_does_not_stop_a_small_write(make_node: MakeNode) -> None:
    nbytes = 128 << 10  # many times what the buffers hold, and each time that they are full takes milliseconds
    theirs, mine = np.zeros(nbytes, dtype=np.uint8), noise(nbytes)
    a, b = await pair_of(make_node, theirs, small="1MiB", sndbuf="4KiB", rcvbuf="4KiB")
    assert await a.backend.move(chunk(local_extent(mine), remote_extent(b, 0, nbytes))) == nbytes
    np.testing.assert_array_equal(mine, theirs)
    theirs[:] = 0
    assert await a.backend.move(chunk(remote_extent(b, 0, nbytes), local_extent(mine))) == nbytes
    assert not mine.any()
    assert small_lanes(a, "b") == 1


# ------------------------------------------------------------------------------------------- requests


async def test_requests_go_both_ways_over_one_lane(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b")
    await a.connect(b)
    ask = pb.PeerRequest(cause_id="c", get_node=pb.GetNode())
    assert (await a.backend.request("b", ask, timeout_s=5)).node.name == "from-handler"
    assert (await b.backend.request("a", ask, timeout_s=5)).node.name == "from-handler"
    ping = pb.PeerRequest(ping=pb.Ping())
    assert (await a.backend.request("b", ping, timeout_s=5)).WhichOneof("reply") == "pong"
    with pytest.raises(NotFound, match="remedy: ask for something else"):
        await a.backend.request("b", pb.PeerRequest(notify=pb.Notify()), timeout_s=5)
    with pytest.raises(InternalError, match="RuntimeError in the peer"):
        await a.backend.request("b", pb.PeerRequest(get_regions=pb.GetRegions(label="bug")), timeout_s=5)
    with pytest.raises(PeerLost, match="not connected"):
        await a.backend.request("c", ping, timeout_s=5)


async def test_requests_overtake_each_other_and_have_deadlines(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b", max_requests=2)
    await a.connect(b)

    def ask(label: str) -> pb.PeerRequest:
        return pb.PeerRequest(get_regions=pb.GetRegions(label=label))

    slow = asyncio.create_task(a.backend.request("b", ask("wait"), timeout_s=30))
    assert (await a.backend.request("b", ask("quick"), timeout_s=5)).regions.node == "quick"
    with pytest.raises(DeadlineExceeded, match=r"limit: 0\.05 s"):
        await a.backend.request("b", ask("wait"), timeout_s=0.05)
    with pytest.raises(Overloaded, match="max_requests 2"):
        await a.backend.request("b", ask("quick"), timeout_s=5)
    b.handler.answering.set()
    assert (await slow).regions.node == "wait"
    assert (await a.backend.request("b", ask("quick"), timeout_s=5)).regions.node == "quick"


async def test_a_request_never_waits_behind_data(make_node: MakeNode) -> None:
    theirs, mine = noise(8 * MIB), np.zeros(8 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    b.handler.window_nbytes, b.handler.gate_at = MIB, 2
    moving = asyncio.create_task(a.backend.move(chunk(remote_extent(b, 0, 8 * MIB), local_extent(mine))))
    await asyncio.to_thread(b.handler.entered.wait)
    ask = pb.PeerRequest(get_node=pb.GetNode())
    assert (await a.backend.request("b", ask, timeout_s=5)).node.name == "from-handler"
    b.handler.gate.set()
    assert await moving == 8 * MIB


async def test_disconnect_says_why(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b")
    await a.connect(b)
    await a.backend.disconnect("b", "we have quarrelled")
    await asyncio.wait_for(b.handler.lost_event.wait(), 5)
    assert b.handler.lost[0][1] == "the peer said goodbye: we have quarrelled"
    assert a.handler.lost == [(PeerIdentity("b", "id-b-1", 1), "we have quarrelled")]
    await a.backend.disconnect("b", "again")
    await a.connect(b)
    assert len(a.handler.connected) == 2


# ---------------------------------------------------------------------------------------- coming to rest


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_a_cancelled_chunk_is_at_rest_on_both_sides(make_node: MakeNode, op: str) -> None:
    theirs, mine = noise(32 * MIB), np.zeros(32 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, abort_grace="10ms")
    b.handler.window_nbytes, b.handler.gate_at = MIB, 3
    remote, local = remote_extent(b, 0, 32 * MIB), local_extent(mine)
    moving = asyncio.create_task(a.backend.move(chunk(remote, local) if op == "READ" else chunk(local, remote)))
    await asyncio.to_thread(b.handler.entered.wait)
    moving.cancel()
    done, _ = await asyncio.wait([moving], timeout=0.3)
    assert not done  # the peer's grant is open: it has not come to rest
    moving.cancel()  # a second cancellation does not hurry it
    b.handler.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(moving, 10)
    assert b.handler.open_grants == 0
    assert b.handler.quiesced == ["t-1"]
    b.handler.gate_at = -1
    mine[:], theirs[:] = 1, 2
    with pytest.raises(Cancelled, match="t-1 was quiesced"):
        await a.backend.move(chunk(local, remote))
    assert (theirs == 2).all()
    assert await a.backend.move(chunk(local, remote, "t-1#2")) == 32 * MIB
    assert (theirs == 1).all()


async def test_a_cancelled_chunk_that_ends_within_the_grace_costs_no_lane(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, abort_grace="30s")
    b.handler.gate_at = 0
    moving = asyncio.create_task(a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(mine))))
    await asyncio.to_thread(b.handler.entered.wait)
    threads = lane_threads()
    moving.cancel()
    b.handler.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await moving
    assert lane_threads() == threads
    assert b.handler.quiesced == []
    assert (mine == theirs).all()


async def test_a_chunk_cancelled_while_it_waits_for_a_lane_never_starts(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=1)
    b.handler.gate_at = 0
    works = [chunk(remote_extent(b, 0, MIB), local_extent(mine), name) for name in ("t-1", "t-2")]
    first, second = (asyncio.create_task(a.backend.move(work)) for work in works)
    await asyncio.to_thread(b.handler.entered.wait)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    b.handler.gate.set()
    assert await first == MIB
    assert await a.backend.move(works[1]) == MIB


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_chunks_of_one_transfer_in_line_on_a_lane_all_arrive(make_node: MakeNode, op: str) -> None:
    """They end in order, over one lane, with requests larger than the sockets' buffers: nobody waits for ever."""
    count = 12
    theirs, mine = noise(count * MIB), noise(count * MIB, seed=2)
    a, b = await pair_of(make_node, theirs, lanes=1, sndbuf="64KiB", rcvbuf="64KiB")
    ended: list[int] = []

    async def move(number: int) -> None:
        remote = remote_extent(b, number * MIB + np.arange(0, MIB, 64), 64)  # 384 KiB of columns
        local = local_extent(mine[number * MIB :][:MIB])
        assert await a.backend.move(chunk(remote, local) if op == "READ" else chunk(local, remote)) == MIB
        ended.append(number)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(move(number))
    assert ended == list(range(count))
    assert np.array_equal(mine, theirs)
    assert a.backend.statistics().slots == 1


async def test_a_read_may_stand_in_line_before_a_write(make_node: MakeNode) -> None:
    """The payload of a WRITE behind a READ's request would have both sides send and neither receive."""
    theirs, mine = noise(32 * MIB), noise(32 * MIB, seed=2)
    expected = mine[16 * MIB :].copy()
    a, b = await pair_of(make_node, theirs, lanes=1, sndbuf="64KiB", rcvbuf="64KiB")
    pull = chunk(remote_extent(b, 0, 16 * MIB), local_extent(mine[: 16 * MIB]))
    push = chunk(local_extent(mine[16 * MIB :]), remote_extent(b, 16 * MIB, 16 * MIB))
    async with asyncio.timeout(60):
        assert await asyncio.gather(*map(a.backend.move, (pull, push, pull))) == [16 * MIB] * 3
    assert np.array_equal(mine[: 16 * MIB], theirs[: 16 * MIB])
    assert np.array_equal(theirs[16 * MIB :], expected)


async def test_a_chunk_in_line_on_a_lane_is_withdrawn_and_the_lane_stays(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=1)
    b.handler.gate_at = 0
    work = chunk(remote_extent(b, 0, MIB), local_extent(mine))
    moving = [asyncio.create_task(a.backend.move(work)) for _ in range(3)]
    await asyncio.to_thread(b.handler.entered.wait)
    moving[2].cancel()  # the request of the second is sent, this one is in line behind it
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(moving[2], 0.3)  # less than the grace after which a lane is cut
    b.handler.gate_at = -1
    b.handler.gate.set()
    assert await asyncio.gather(*moving[:2]) == [MIB, MIB]
    assert b.handler.quiesced == []


async def test_transfers_do_not_share_a_lane(make_node: MakeNode) -> None:
    """Who waits for a lane is served before chunks of the transfer that has it, and is not harmed when that is cut."""
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=1, abort_grace="100ms")
    b.handler.gate_at = 0
    work, other = (chunk(remote_extent(b, 0, MIB), local_extent(mine), name) for name in ("t-1", "t-2"))
    moving = [asyncio.create_task(a.backend.move(work)) for _ in range(2)]
    await asyncio.to_thread(b.handler.entered.wait)
    waiting = asyncio.create_task(a.backend.move(other))
    behind = asyncio.create_task(a.backend.move(work))
    for task in (*moving, behind):
        task.cancel()
    await asyncio.to_thread(b.handler.gate.wait, 0.3)  # past the grace: the lane is cut
    b.handler.gate_at = -1
    b.handler.gate.set()
    for task in (*moving, behind):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await waiting == MIB
    assert np.array_equal(mine, theirs)


async def test_lanes_within_a_host_do_not_pace(make_node: MakeNode) -> None:
    """Both ends use Reno by themselves, what is configured when something is, and the system's when that is wanted."""
    with socket.socket() as fresh:
        system = fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    mine = np.zeros(MIB, dtype=np.uint8)
    for number, (setting, expected) in enumerate({"auto": b"reno", "": system, "reno": b"reno"}.items()):
        a = await make_node(f"a{number}", lanes=1, congestion=setting)
        b = await make_node(f"b{number}", lanes=1, congestion=setting)
        b.handler.regions[1] = noise(MIB)
        await a.connect(b)
        await a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(mine)))
        lanes = [*a.backend._threads, *b.backend._threads]
        used = {lane.stream._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) for lane in lanes}
        assert len(lanes) == 2
        assert {name.rstrip(b"\0") for name in used} == {expected.rstrip(b"\0")}


async def test_an_unknown_congestion_control_is_told_at_the_start(make_node: MakeNode) -> None:
    with pytest.raises(ConfigError, match="congestion 'nosuch'"):
        await make_node("a", congestion="nosuch")


@pytest.mark.parametrize("op", ["READ", "WRITE"])
async def test_disconnecting_fails_chunks_under_way(make_node: MakeNode, op: str) -> None:
    theirs, mine = noise(64 * MIB), np.zeros(64 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    b.handler.window_nbytes, b.handler.gate_at = MIB, 1
    remote, local = remote_extent(b, 0, 64 * MIB), local_extent(mine)
    work = chunk(remote, local) if op == "READ" else chunk(local, remote)
    moving = [asyncio.create_task(a.backend.move(work)) for _ in range(4)]
    await asyncio.to_thread(b.handler.entered.wait)
    await a.backend.disconnect("b", "operator")
    for task in moving:
        with pytest.raises(PeerLost, match="operator"):
            await asyncio.wait_for(task, 10)
    b.handler.gate.set()


async def test_a_lane_that_broke_while_idle_is_dialled_again(make_node: MakeNode) -> None:
    theirs, mine = noise(MIB), np.zeros(MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=1)
    work = chunk(remote_extent(b, 0, MIB), local_extent(mine))
    await a.backend.move(work)
    served = next(iter(b.backend._threads))
    served.abort("test")
    await served.left
    assert await a.backend.move(work) == MIB
    assert a.backend.statistics().failures == 0
    assert a.backend.link("b").received_nbytes == 2 * MIB


async def test_closing_in_the_middle_fails_chunks_and_leaves_nothing(make_node: MakeNode) -> None:
    theirs, mine = noise(64 * MIB), np.zeros(64 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs)
    b.handler.window_nbytes, b.handler.gate_at = MIB, 1
    moving = asyncio.create_task(a.backend.move(chunk(remote_extent(b, 0, 64 * MIB), local_extent(mine))))
    await asyncio.to_thread(b.handler.entered.wait)
    closing = asyncio.create_task(b.backend.aclose())
    with pytest.raises(PeerLost, match="node 'b'"):
        await asyncio.wait_for(moving, 10)
    assert not closing.done()  # a grant is still open
    b.handler.gate.set()
    await closing
    await asyncio.wait_for(a.handler.lost_event.wait(), 5)
    assert a.handler.lost[0][1] == "the peer said goodbye: the node is stopping"


# ------------------------------------------------------------------------------------- a peer that suffers


class Subprocess:
    """A peer in a process of its own, with 64 MiB as region 1."""

    def __init__(self, secret_file: Path) -> None:
        self._secret_file = secret_file
        self._process: asyncio.subprocess.Process | None = None
        self.node: Node | None = None

    async def start(self) -> Node:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            str(self._secret_file),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        said = json.loads(await self._process.stdout.readline())
        return Node(None, None, "far", 1, said["address"])  # type: ignore[arg-type]  # it lives elsewhere

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


@pytest.fixture
async def far(secret_file: Path, make_node: MakeNode) -> AsyncIterator[Subprocess]:
    # Depends on make_node only to be stopped before that looks for leaks.
    process = Subprocess(secret_file)
    yield process
    await process.stop()


async def moving_without_end(a: Node, far_node: Node, mine: Bytes, started: asyncio.Event) -> None:
    work = chunk(remote_extent(far_node, 0, 64 * MIB), local_extent(mine))
    while True:
        await a.backend.move(work)
        started.set()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_that_dies_or_stands_still_is_lost(
    far: Subprocess, make_node: MakeNode, number: signal.Signals
) -> None:
    far_node = await far.start()
    a = await make_node("a", ping_interval="100ms", peer_timeout="500ms")
    mine = np.zeros(64 * MIB, dtype=np.uint8)
    await a.connect(far_node)
    started = asyncio.Event()
    moves = [asyncio.create_task(moving_without_end(a, far_node, mine, started)) for _ in range(3)]
    await started.wait()
    at = time.monotonic()
    far.signal(number)
    for move in moves:
        with pytest.raises(PeerLost):
            await asyncio.wait_for(move, 10)
    assert time.monotonic() - at < 5
    await asyncio.wait_for(a.handler.lost_event.wait(), 5)
    assert [peer.node for peer, _ in a.handler.lost] == ["far"]
    if number is signal.SIGSTOP:
        assert "silent for" in a.handler.lost[0][1]
    with pytest.raises(PeerLost, match="not connected"):
        await a.backend.move(chunk(remote_extent(far_node, 0, 4096), local_extent(mine, 0, 4096)))


@pytest.mark.slow
async def test_an_idle_connection_stays_up(far: Subprocess, make_node: MakeNode) -> None:
    far_node = await far.start()
    a = await make_node("a", ping_interval="20ms", peer_timeout="300ms")
    await a.connect(far_node)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(a.handler.lost_event.wait(), 1.0)
    assert a.backend.link("far").lanes == 1


# ------------------------------------------------------------------------------------------ strangers


async def talk(address: str, said: bytes, *, half_close: bool = True) -> bytes:
    """Say something on the peer port and return all that comes back until it is closed."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(said)
    if half_close:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def error_in(raw: bytes) -> xferd_pb.ErrorDetail:
    assert raw[:8] == b"XFRD\x01\x00\x05\x00", raw[:32].hex()
    return xferd_pb.ErrorDetail.FromString(raw[32 : 32 + int.from_bytes(raw[8:12], "little")])


def header(type_value: int, control: int = 0, payload: int = 0, *, magic: bytes = b"XFRD", version: int = 1) -> bytes:
    return (
        magic
        + version.to_bytes(2, "little")
        + type_value.to_bytes(2, "little")
        + control.to_bytes(4, "little")
        + bytes(4)
        + payload.to_bytes(8, "little")
        + bytes(8)
    )


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (noise(4096).tobytes(), "magic"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "474554"),
        (header(1, 10, version=9), "version 9"),
        (header(77, 10), "unknown type 77"),
        (header(1, 1 << 30), "control part of 1073741824"),
        (header(1, 10, payload=1 << 40), "payload"),
        (header(32, 10), "DATA_REQUEST is not allowed"),
        (header(3, 0), "PROOF"),
        (header(1, 4) + b"\xff\xff\xff\xff", "no xferd.peer.v1.Hello"),
        (header(1, 0), "versions 0 to 0"),
    ],
)
async def test_rubbish_is_answered_and_harms_nobody(make_node: MakeNode, said: bytes, match: str) -> None:
    a, b = await make_node("a"), await make_node("b")
    await a.connect(b)
    detail = error_in(await talk(b.address, said))
    assert detail.code == "protocol_violation"
    assert match in detail.message + detail.limit
    assert b.backend.refusals["protocol_violation"] == 1
    assert (await a.backend.request("b", pb.PeerRequest(ping=pb.Ping()), timeout_s=5)).HasField("pong")
    assert b.handler.lost == []


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33])
async def test_half_a_frame_then_close(make_node: MakeNode, length: int) -> None:
    b = await make_node("b")
    await talk(b.address, (header(1, 100) + bytes(100))[:length])
    assert b.handler.connected == []


async def test_strangers_cannot_hold_the_port(make_node: MakeNode) -> None:
    a = await make_node("a")
    b = await make_node("b", max_handshakes=2, connect_timeout="300ms")
    host, _, port = b.address.removeprefix("tcp://").rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    assert await talk(b.address, b"", half_close=False) == b""  # accepted after those two, and turned away at once
    assert b.backend.refusals["overloaded"] == 1
    for reader, writer in silent:
        assert error_in(await reader.read()).code == "deadline_exceeded"
        writer.close()
        await writer.wait_closed()
    while b.backend._handshakes:  # noqa: ASYNC110  # nothing announces that a refused stranger has left
        await asyncio.sleep(0)
    assert (await a.connect(b)).node == "b"


async def test_a_data_lane_needs_a_control_lane(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b")
    await a.connect(b)
    peer = a.backend._connected("b")
    await a.backend.disconnect("b", "test")
    await asyncio.wait_for(b.handler.lost_event.wait(), 5)
    assert peer.pool is not None
    with pytest.raises(Unavailable, match="no control lane"):
        await peer.pool._dial()


async def test_an_oversize_frame_ends_the_control_lane_with_a_reason(make_node: MakeNode) -> None:
    a, b = await make_node("a"), await make_node("b")
    await a.connect(b)
    control = a.backend._connected("b").control
    assert control is not None
    assert control._writer is not None
    control._writer.write(header(16, (16 << 20) + 1))
    await asyncio.wait_for(a.handler.lost_event.wait(), 5)
    assert "control part of 16777217 bytes" in a.handler.lost[0][1]
    assert "control part of 16777217 bytes" in b.handler.lost[0][1]


async def test_a_payload_of_the_wrong_size_ends_the_data_lane_with_a_reason(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB), lanes=1)
    peer = a.backend._connected("b")
    assert peer.pool is not None
    lane = await peer.pool.acquire()
    request = pb.DataRequest(op=xferd_pb.TRANSFER_OP_WRITE, total_nbytes=100)
    work = await asyncio.to_thread(_send_raw, lane.stream, request)
    assert "has a payload of 99" in work.message
    lane.is_good = False
    peer.pool.release(lane)
    mine = np.zeros(MIB, dtype=np.uint8)
    assert await a.backend.move(chunk(remote_extent(b, 0, MIB), local_extent(mine))) == MIB


def _send_raw(stream: BlockingStream, request: pb.DataRequest) -> xferd_pb.ErrorDetail:
    payload = bytes(99)
    stream.send(FrameType.DATA_REQUEST, request, request_id=1, payload=vectored.iov_of(payload))
    head = stream.receive_head(FrameLimits.of(()))
    assert head is not None
    return xferd_pb.ErrorDetail.FromString(head[1])


async def test_a_lying_server_is_a_violation(make_node: MakeNode) -> None:
    """A peer that sends more than was asked does not get a byte past the memory it was asked for."""
    theirs, mine = noise(MIB), np.zeros(2 * MIB, dtype=np.uint8)
    a, b = await pair_of(make_node, theirs, lanes=1)
    honest = b.handler.open_grant

    def liar(peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> ArrayGrant:
        grant = honest(peer, op, request)
        grant._iov = np.concatenate((grant._iov, grant._iov))
        return grant

    b.handler.open_grant = liar  # type: ignore[method-assign]
    b.handler.window_nbytes = 4 * MIB
    with pytest.raises(ProtocolViolation, match="payload of 1048576 bytes"):
        await a.backend.move(chunk(remote_extent(b, 0, MIB // 2), local_extent(mine, 0, MIB // 2)))
    assert not mine.any()


async def test_threads_and_fds_of_a_hundred_connections_go_away(make_node: MakeNode) -> None:
    a, b = await pair_of(make_node, noise(MIB))
    mine = np.zeros(MIB, dtype=np.uint8)
    works = [chunk(remote_extent(b, 0, size), local_extent(mine, 0, size)) for size in (4096, MIB)]
    process = psutil.Process()
    counts = []
    for number in range(100):
        if number:
            await a.connect(b)
        for work in works:
            await a.backend.move(work)
        b.handler.lost_event.clear()
        await a.backend.disconnect("b", "round")
        await b.handler.lost_event.wait()
        await lane_threads_gone()
        counts.append(process.num_fds())
    assert max(counts[50:]) <= max(counts[:50])


async def lane_threads_gone() -> None:
    """Return when the threads of lanes that were ended have left, and so closed their sockets.

    They leave in their own time: on a busy machine the lanes of the last round are open in the next.
    """
    for thread in threading.enumerate():
        if thread.name.startswith("xferd-tcp"):
            await asyncio.to_thread(thread.join)


# ---------------------------------------------------------------------------------------- as a program


async def serve(secret_file: str) -> None:
    node = await start_node(Path(secret_file), "far")
    node.handler.regions[1] = np.ones(64 * MIB, dtype=np.uint8)
    print(json.dumps({"address": node.address}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.backend.aclose()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
