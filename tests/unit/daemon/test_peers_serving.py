"""What a peer may do here: real regions of all spaces, real system calls; the transport is stood in for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import (
    AgentUnknown,
    DeadlineExceeded,
    InvalidDescriptor,
    LimitExceeded,
    MoveFailed,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    ProtocolViolation,
    ShortTransfer,
    SizeMismatch,
    Stale,
    Unavailable,
    XferdError,
)
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.types import (
    Access,
    MemoryKind,
    NodeInfo,
    Notification,
    RegionId,
    RegionSource,
    SessionId,
    TransferOp,
)
from xferd.api.wire import node_to_message, notification_to_message
from xferd.daemon.memory.backing import Backing, FileBacking, PrivateBacking
from xferd.daemon.memory.regions import RegionTable
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.serving import PeerServing
from xferd.plugins.base import PeerIdentity, PeerLinkStatistics, PeerTransport
from xferd.plugins.fabric import PeerService
from xferd.plugins.vectored import copy_local, iov_of, total_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xferd.daemon.peers.grants import PeerGrant
    from xferd.plugins.base import IovTable, PeerHandler

EPOCH = 7
PAGE = 4096
NBYTES = 4 * PAGE
OWNER = SessionId("s1")
PEER = PeerIdentity("peer", "peer-id", 3)
ME = NodeInfo(
    name="me",
    id="my-id",
    epoch=EPOCH,
    version="0",
    addresses=(),
    backends=(),
    kinds=(MemoryKind.DRAM,),
    agents=(),
    started_at=0.0,
)


class Transport(PeerTransport):
    """Serves a transfer as long as it is in ``busy``; ``asked`` tells that it was told to let one rest."""

    def __init__(self) -> None:
        self.busy: dict[str, asyncio.Event] = {}
        self.asked = asyncio.Event()

    def serve(self, transfer_id: str) -> asyncio.Event:
        """Serve a transfer until the event is set."""
        self.busy[transfer_id] = asyncio.Event()
        return self.busy[transfer_id]

    async def listen(self, me: NodeInfo, handler: PeerHandler) -> tuple[str, ...]:
        raise NotImplementedError

    async def connect(self, address: str, *, name: str = "", epoch: int = 0) -> PeerIdentity:
        raise NotImplementedError

    async def request(self, node: str, request: peer_pb.PeerRequest, *, timeout_s: float) -> peer_pb.PeerReply:
        raise NotImplementedError

    async def disconnect(self, node: str, reason: str) -> None:
        raise NotImplementedError

    async def wait_quiesced(self, peer: PeerIdentity, transfer_id: str) -> None:
        self.asked.set()
        if transfer_id in self.busy:
            await self.busy[transfer_id].wait()

    def link(self, node: str) -> PeerLinkStatistics:
        raise NotImplementedError


class OwnMemory(Backing):
    """Memory of this process, as a pool's or a memfd's is; the test owns it."""

    source = RegionSource.POOL

    def __init__(self, address: int) -> None:
        self.position = address

    def _close(self) -> None:
        pass


class House:
    """A node's serving side with a region of each space, all of ``NBYTES`` bytes, and their bytes at hand."""

    def __init__(self, tmp_path: Path, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.regions = RegionTable("me", EPOCH, 100)
        self.staging = StagingPool(4 * PAGE, PAGE)  # four slots, each a quarter of a region
        stack.callback(self.staging.close)
        self.transport = Transport()
        self.heard: list[tuple[str, str]] = []
        self.learned: list[NodeInfo] = []
        self.inbox: list[Notification] = []
        self.serving = self.make()
        rng = np.random.default_rng(5)
        self.contents = {name: rng.integers(0, 256, NBYTES, dtype=np.uint8) for name in ("mapped", "process", "file")}
        self.mapped = self.contents["mapped"].copy()
        mapped = OwnMemory(self.mapped.ctypes.data)
        self.private = self.contents["process"].copy()
        pidfd = os.pidfd_open(os.getpid())
        stack.callback(os.close, pidfd)
        process = PrivateBacking(os.getpid(), pidfd, self.private.ctypes.data)
        self.path = tmp_path / "file"
        self.path.write_bytes(self.contents["file"].tobytes())
        file = FileBacking(os.open(self.path, os.O_RDWR), str(self.path), RegionSource.PATH)
        stack.callback(file.close)
        self.ids = {
            name: self.regions.add(OWNER, "prefill", backing, NBYTES, access=Access.READ_WRITE).id
            for name, backing in (("mapped", mapped), ("process", process), ("file", file))
        }

    def make(self, **changes: object) -> PeerServing:
        settings = {
            "me": lambda: ME,
            "regions": self.regions,
            "staging": self.staging,
            "learn": self.learned.append,
            "deliver": self.deliver,
            "transport": self.transport,
            "events": self,
            "staging_timeout_s": 0.05,
        }
        return PeerServing(**{**settings, **changes})  # type: ignore[arg-type]

    def deliver(self, notification: Notification) -> None:
        if notification.target == "nobody@me":
            raise AgentUnknown("no agent nobody")
        self.inbox.append(notification)

    def peer_connected(self, peer: PeerIdentity) -> None:
        self.heard.append(("connected", peer.node))

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        self.heard.append(("lost", reason))

    def peer_leaving(self, peer: PeerIdentity, reason: str) -> None:
        self.heard.append(("leaving", reason))

    def request(self, *rows: tuple[str, int, int], transfer: str = "t1", **changes: object) -> peer_pb.DataRequest:
        descriptors = DescriptorList.from_rows([(self.ids[name], offset, nbytes) for name, offset, nbytes in rows])
        fields = {
            "transfer_id": transfer,
            "cause_id": "why",
            "epoch": EPOCH,
            "region": descriptors.region.tobytes(),
            "offset": descriptors.offset.tobytes(),
            "nbytes": descriptors.nbytes.tobytes(),
            "total_nbytes": descriptors.total_nbytes,
            "agent": "decode",
        }
        return peer_pb.DataRequest(**{**fields, **changes})  # type: ignore[arg-type]

    def bytes_now(self, name: str) -> bytes:
        if name == "file":
            return self.path.read_bytes()
        return (self.mapped if name == "mapped" else self.private).tobytes()

    def expected(self, rows: list[tuple[str, int, int]]) -> bytes:
        return b"".join(self.bytes_now(name)[offset : offset + nbytes] for name, offset, nbytes in rows)

    def check_idle(self) -> None:
        assert self.serving.open_grants() == 0
        assert self.regions.holds() == []
        assert self.staging.holds() == []


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        made = House(tmp_path, stack)
        yield made
        made.check_idle()
        made.regions.check_invariants()


def read_all(grant: PeerGrant) -> tuple[bytes, list[IovTable]]:
    """Do as a lane does that sends: copy each window before the next is asked for."""
    parts, tables = [], []
    for window in grant.windows():
        part = bytearray(total_nbytes(window))
        copy_local(window, iov_of(part))
        parts.append(bytes(part))
        tables.append(window)
    return b"".join(parts), tables


def write_all(grant: PeerGrant, payload: bytes) -> None:
    """Do as a lane does that receives: fill each window before the next is asked for."""
    rest = payload
    for window in grant.windows():
        nbytes = total_nbytes(window)
        part = rest[:nbytes]
        copy_local(iov_of(part), window)
        rest = rest[nbytes:]
    assert not rest


# ------------------------------------------------------------------------------------------ moving bytes


@pytest.mark.parametrize("name", ["mapped", "process", "file"])
def test_a_read_sees_the_bytes_in_list_order(house: House, name: str) -> None:
    rows = [(name, 3 * PAGE, PAGE), (name, 0, 10), (name, 10, 20), (name, 5000, 1)]
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(*rows))
    assert read_all(grant)[0] == house.expected(rows)
    grant.close()


@pytest.mark.parametrize("name", ["mapped", "process", "file"])
def test_a_write_changes_those_bytes_and_no_others(house: House, name: str) -> None:
    before = house.bytes_now(name)
    grant = house.serving.open_grant(PEER, TransferOp.WRITE, house.request((name, 9000, 7000), (name, 1, 2)))
    payload = np.random.default_rng(6).bytes(7002)
    write_all(grant, payload)
    grant.close()
    assert house.bytes_now(name) == before[:1] + payload[7000:] + before[3:9000] + payload[:7000] + before[16000:]


def test_mapped_memory_is_one_table_with_neighbours_merged(house: House) -> None:
    rows = [("mapped", 64 * number, 64) for number in range(200)] + [("mapped", 0, 1)]
    with contextlib.closing(house.serving.open_grant(PEER, TransferOp.READ, house.request(*rows))) as grant:
        data, tables = read_all(grant)
    assert data == house.expected(rows)
    assert [table[:, 1].tolist() for table in tables] == [[64 * 200, 1]]


ROWS = st.lists(
    st.tuples(st.sampled_from(["mapped", "process", "file"]), st.integers(0, NBYTES - 1), st.integers(1, 2 * PAGE)).map(
        lambda row: (row[0], row[1], min(row[2], NBYTES - row[1]))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS)
def test_any_mixed_list_reads_in_order(house: House, rows: list[tuple[str, int, int]]) -> None:
    with contextlib.closing(house.serving.open_grant(PEER, TransferOp.READ, house.request(*rows))) as grant:
        assert read_all(grant)[0] == house.expected(rows)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, seed=st.integers(0, 1 << 32))
def test_any_mixed_list_is_written_in_order(house: House, rows: list[tuple[str, int, int]], seed: int) -> None:
    """Rows that overlap end as the last of them; what no row names stays."""
    wanted = {name: bytearray(house.bytes_now(name)) for name in house.ids}
    payload = np.random.default_rng(seed).bytes(sum(nbytes for _, _, nbytes in rows))
    at = 0
    for name, offset, nbytes in rows:
        wanted[name][offset : offset + nbytes] = payload[at : at + nbytes]
        at += nbytes
    with contextlib.closing(house.serving.open_grant(PEER, TransferOp.WRITE, house.request(*rows))) as grant:
        write_all(grant, payload)
    assert {name: house.bytes_now(name) for name in house.ids} == wanted


def test_a_window_that_was_not_passed_is_not_written(house: House) -> None:
    before = house.bytes_now("file")
    grant = house.serving.open_grant(PEER, TransferOp.WRITE, house.request(("file", 0, NBYTES)))
    window = next(grant.windows())
    zeros = bytes(PAGE)
    copy_local(iov_of(zeros), window)
    grant.close()
    assert house.bytes_now("file") == before


def test_a_file_that_was_cut_is_a_short_transfer(house: House) -> None:
    os.truncate(house.path, 100)
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("file", 0, NBYTES)))
    with pytest.raises(ShortTransfer, match="100 of 4096"):
        read_all(grant)
    grant.close()


def test_memory_of_a_process_that_died_is_a_failure(house: House) -> None:
    code = "import numpy as np; a = np.zeros(8192, np.uint8); print(a.ctypes.data, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        address = int(child.stdout.readline())
        pidfd = os.pidfd_open(child.pid)
        house.stack.callback(os.close, pidfd)
        backing = PrivateBacking(child.pid, pidfd, address)
        house.ids["child"] = house.regions.add(OWNER, "x", backing, 8192, access=Access.READ).id
        grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("child", 0, 8192)))
        windows = grant.windows()
        assert total_nbytes(next(windows)) == PAGE
        child.send_signal(signal.SIGKILL)
        child.wait()
        with pytest.raises(MoveFailed, match="ended"):
            next(windows)
        grant.close()


def test_staging_that_is_used_up_is_overloaded(house: House) -> None:
    slots = [house.staging.borrow(1.0) for _ in range(3)]  # the fourth is kept for transfers of this node
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("file", 0, 10)))
    with pytest.raises(Overloaded, match="t1"):
        next(grant.windows())
    for slot in slots:
        house.staging.give_back(slot)
    assert read_all(grant)[0] == house.expected([("file", 0, 10)])
    grant.close()
    grant.close()


# ------------------------------------------------------------------------------------------------ rights


def test_an_open_grant_holds_its_regions_and_says_for_whom(house: House) -> None:
    first = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1), ("file", 0, 1)))
    second = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1)))
    holders = house.regions.holders(house.ids["mapped"])
    assert len(set(holders)) == 2, "two requests of one transfer are told apart"
    assert all(holder.startswith("peer peer transfer t1") for holder in holders)
    assert {hold.reason for hold in house.regions.holds()} == {"READ by decode@peer, cause why"}
    with pytest.raises(XferdError, match="peer peer transfer t1"):
        house.regions.remove(OWNER, [house.ids["mapped"]])
    assert house.serving.open_grants() == 2
    first.close()
    assert house.regions.holders(house.ids["file"]) == ()
    second.close()


@pytest.mark.parametrize(
    ("access", "op", "allowed"),
    [
        (Access.NONE, TransferOp.READ, False),
        (Access.NONE, TransferOp.WRITE, False),
        (Access.READ, TransferOp.READ, True),
        (Access.READ, TransferOp.WRITE, False),
        (Access.WRITE, TransferOp.READ, False),
        (Access.WRITE, TransferOp.WRITE, True),
    ],
)
def test_access_decides(house: House, access: Access, op: TransferOp, allowed: bool) -> None:
    backing = PrivateBacking(os.getpid(), -1, house.private.ctypes.data)
    house.ids["own"] = house.regions.add(OWNER, "x", backing, 10, access=access).id
    refused: contextlib.AbstractContextManager[object] = pytest.raises(PermissionDenied)
    with contextlib.nullcontext() if allowed else refused:
        house.serving.open_grant(PEER, op, house.request(("own", 0, 10))).close()


def refusals(house: House) -> dict[str, tuple[type[XferdError], peer_pb.DataRequest]]:
    row = ("mapped", 0, 8)
    top = (1 << 64) - 1
    freed = house.regions.add(OWNER, "x", PrivateBacking(os.getpid(), -1, 4096), 10, access=Access.READ).id
    house.regions.remove(OWNER, [freed])

    def packed(*numbers: int) -> bytes:
        return np.array(numbers, dtype="<u8").tobytes()

    return {
        "epoch": (Stale, house.request(row, epoch=EPOCH - 1)),
        "no epoch": (Stale, house.request(row, epoch=0)),
        "freed": (Stale, house.request(row, region=packed(freed))),
        "never there": (NotFound, house.request(row, region=packed(99))),
        "past the end": (OutOfBounds, house.request(("mapped", NBYTES - 7, 8))),
        "far past the end": (OutOfBounds, house.request(row, offset=packed(top - 8))),
        "wraps": (InvalidDescriptor, house.request(row, offset=packed(top))),
        "length 0": (InvalidDescriptor, house.request(row, nbytes=packed(0))),
        "misaligned": (InvalidDescriptor, house.request(row, nbytes=b"1234567")),
        "unequal": (InvalidDescriptor, house.request(row, row, row, nbytes=packed(8, 8))),
        "empty": (InvalidDescriptor, house.request(row, region=b"", offset=b"", nbytes=b"")),
        "total": (SizeMismatch, house.request(row, total_nbytes=9)),
        "too many": (LimitExceeded, house.request(*[row] * 101)),
    }


@pytest.mark.parametrize(
    "case",
    [
        "epoch",
        "no epoch",
        "freed",
        "never there",
        "past the end",
        "far past the end",
        "wraps",
        "length 0",
        "misaligned",
        "unequal",
        "empty",
        "total",
        "too many",
    ],
)
def test_a_wrong_request_is_refused_and_holds_nothing(house: House, case: str) -> None:
    house.serving = house.make(max_descriptors=100)
    error, request = refusals(house)[case]
    with pytest.raises(XferdError) as caught:
        house.serving.open_grant(PEER, TransferOp.READ, request)
    assert type(caught.value) is error
    house.check_idle()


def test_a_draining_node_refuses_new_transfers_and_lets_those_under_way_go_on(house: House) -> None:
    rows = [("mapped", 0, 100)]

    def open_grant(transfer: str) -> PeerGrant:
        return house.serving.open_grant(PEER, TransferOp.READ, house.request(*rows, transfer=transfer))

    grant = open_grant("old")
    house.serving.refuse("draining")
    with pytest.raises(Unavailable, match="draining"):
        open_grant("new")
    assert read_all(grant)[0] == house.expected(rows)
    grant.close()
    open_grant("old").close()  # its next chunk
    with pytest.raises(Unavailable, match="draining"):
        open_grant("new")
    house.serving.refuse("")
    open_grant("new").close()


async def test_a_transfer_is_over_some_time_after_its_last_grant(house: House) -> None:
    serving = house.make(linger_s=0.05)
    request = house.request(("mapped", 0, 100))
    assert await serving.wait_idle(5.0) == 0
    grant = serving.open_grant(PEER, TransferOp.READ, request)
    assert await serving.wait_idle(0.0) == 1
    async with asyncio.TaskGroup() as group:
        idle = group.create_task(serving.wait_idle(5.0))
        await asyncio.to_thread(grant.close)
    assert idle.result() == 0
    serving.refuse("draining")
    with pytest.raises(Unavailable, match="draining"):
        serving.open_grant(PEER, TransferOp.READ, request)


def test_lanes_open_and_close_grants_at_the_same_time(house: House) -> None:
    failures: list[BaseException] = []

    def lane() -> None:
        try:
            for _ in range(50):
                rows = [("file", 0, 5000), ("mapped", 7, 9)]
                with contextlib.closing(house.serving.open_grant(PEER, TransferOp.READ, house.request(*rows))) as grant:
                    assert read_all(grant)[0] == house.expected(rows)
        except BaseException as exc:  # noqa: BLE001 -- the test's own thread looks at it
            failures.append(exc)

    threads = [threading.Thread(target=lane) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------------------------------- control requests


async def ask(house: House, **request: object) -> peer_pb.PeerReply:
    return await house.serving.handle(PEER, peer_pb.PeerRequest(cause_id="why", **request))  # type: ignore[arg-type]


async def test_ping(house: House) -> None:
    assert (await ask(house, ping=peer_pb.Ping())).HasField("pong")


async def test_get_node_exchanges_records(house: House) -> None:
    theirs = NodeInfo("peer", "peer-id", 3, "0", ("tcp://x",), (), (), (), 0.0)
    reply = await ask(house, get_node=peer_pb.GetNode(mine=node_to_message(theirs)))
    assert (reply.node.name, reply.node.epoch) == ("me", EPOCH)
    assert house.learned == [theirs]
    await ask(house, get_node=peer_pb.GetNode())
    assert len(house.learned) == 1


@pytest.mark.parametrize("forged", [("other", "peer-id", 3), ("peer", "other", 3), ("peer", "peer-id", 4)])
async def test_a_peer_speaks_only_for_itself(house: House, forged: tuple[str, str, int]) -> None:
    node = NodeInfo(*forged, "0", (), (), (), (), 0.0)
    with pytest.raises(ProtocolViolation, match="only speak for itself"):
        await ask(house, get_node=peer_pb.GetNode(mine=node_to_message(node)))
    assert house.learned == []


async def test_get_regions_shows_what_access_allows(house: House) -> None:
    backing = PrivateBacking(os.getpid(), -1, 4096)
    hidden = house.regions.add(OWNER, "prefill", backing, 10).id
    reply = await ask(house, get_regions=peer_pb.GetRegions(agent="prefill"))
    assert (reply.regions.node, reply.regions.epoch) == ("me", EPOCH)
    assert {region.id for region in reply.regions.regions} == set(house.ids.values())
    wanted = [house.ids["file"], hidden, 12345]
    reply = await ask(house, get_regions=peer_pb.GetRegions(region=wanted))
    assert [RegionId(region.id) for region in reply.regions.regions] == [house.ids["file"]]


async def test_notify_delivers_or_raises(house: House) -> None:
    sent = Notification("decode@me", b"\0", source="prefill@peer", transfer="t1")
    assert (await ask(house, notify=peer_pb.Notify(notification=notification_to_message(sent)))).HasField("done")
    assert house.inbox == [sent]
    lost = Notification("nobody@me", b"", source="prefill@peer")
    with pytest.raises(AgentUnknown):
        await ask(house, notify=peer_pb.Notify(notification=notification_to_message(lost)))


@pytest.mark.parametrize("source", ["", "prefill", "prefill@me", "prefill@peer@other"])
async def test_a_notification_from_elsewhere_is_denied(house: House, source: str) -> None:
    forged = Notification("decode@me", b"", source=source)
    with pytest.raises(PermissionDenied, match="'peer'"):
        await ask(house, notify=peer_pb.Notify(notification=notification_to_message(forged)))
    assert house.inbox == []


async def test_goodbye_and_connections_are_passed_on(house: House) -> None:
    house.serving.peer_connected(PEER)
    assert (await ask(house, goodbye=peer_pb.Goodbye(reason="stopping"))).HasField("done")
    house.serving.peer_lost(PEER, "closed")
    assert house.heard == [("connected", "peer"), ("leaving", "stopping"), ("lost", "closed")]


async def test_an_unknown_request_is_a_violation(house: House) -> None:
    with pytest.raises(ProtocolViolation, match="does not know"):
        await ask(house)


async def test_quiesce_answers_when_the_transport_is_quiet(house: House) -> None:
    assert (await ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1"))).HasField("done")
    house.transport.asked.clear()
    rest = house.transport.serve("t1")
    asked = asyncio.ensure_future(ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1")))
    await house.transport.asked.wait()
    assert not asked.done()
    rest.set()
    assert (await asked).HasField("done")


async def test_quiesce_waits_for_open_grants_and_is_woken_by_their_end(house: House) -> None:
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1)))
    again = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1)))
    other = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1), transfer="t2"))
    asked = asyncio.ensure_future(ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1")))
    await house.transport.asked.wait()
    for open_grant in (again, grant):
        assert not asked.done()
        thread = threading.Thread(target=open_grant.close)  # as a lane's thread does
        thread.start()
        thread.join()
    assert (await asked).HasField("done")
    other.close()


async def test_quiesce_gives_up_at_its_deadline(house: House) -> None:
    house.serving = house.make(quiesce_timeout_s=0.0)
    house.transport.serve("t1")
    with pytest.raises(DeadlineExceeded, match="t1"):
        await ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1"))


class Fabric(PeerService):
    """A service of one verb, that is quiet when the test says so."""

    verbs = frozenset({"ucx_abort"})

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.is_quiet = asyncio.Event()

    def attach(self, me: NodeInfo, transport: PeerTransport, handler: PeerHandler) -> None:
        raise NotImplementedError

    async def serve(self, peer: PeerIdentity, request: peer_pb.PeerRequest) -> peer_pb.PeerReply:
        self.told.append(("serve", peer.node, str(request.WhichOneof("request"))))
        return peer_pb.PeerReply(done=peer_pb.Done())

    async def quiesce(self, peer: PeerIdentity, transfer_id: str) -> None:
        self.told.append(("quiesce", peer.node, transfer_id))
        await self.is_quiet.wait()

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        self.told.append(("lost", peer.node, reason))


async def test_a_service_answers_its_verbs_comes_to_rest_and_hears_of_lost_peers(house: House) -> None:
    fabric = Fabric()
    house.serving = house.make(services=(fabric,))
    assert (await ask(house, ucx_abort=peer_pb.UcxAbort())).HasField("done")
    with pytest.raises(ProtocolViolation):
        await ask(house, ucx_open=peer_pb.UcxOpen())
    resting = asyncio.ensure_future(ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1")))
    done, _ = await asyncio.wait([resting], timeout=0.02)
    assert not done, "the service still moves bytes"
    fabric.is_quiet.set()
    assert (await resting).HasField("done")
    house.serving.peer_lost(PEER, "gone")
    assert fabric.told == [
        ("serve", "peer", "ucx_abort"),
        ("quiesce", "peer", "t1"),
        ("lost", "peer", "gone"),
    ]
    assert house.heard == [("lost", "gone")]


@pytest.mark.parametrize("verify", [False, True])
async def test_a_peer_that_wants_proof_of_what_it_reads_gets_it(house: House, verify: bool) -> None:
    class Sealer:
        asked: bool | None = None

        def verify(self, _runs: object, *, is_asked: bool) -> None:
            self.asked = is_asked

    sealer = Sealer()
    house.serving = house.make(sealer=sealer)
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 8), verify=verify))
    read_all(grant)
    grant.close()
    assert sealer.asked is verify


class Sealed:
    """Takes every file for one of a storage pool."""

    def concerns(self, _runs: object) -> bool:
        return True

    def begin(self, _runs: object) -> str:
        return "ticket"

    def seal(self, _ticket: object) -> None:
        pass


def device(house: House, path: str) -> None:
    """Register a file that takes no ``fdatasync``."""
    backing = FileBacking(os.open(path, os.O_RDWR), path, RegionSource.PATH)
    house.stack.callback(backing.close)
    house.ids[path] = house.regions.add(OWNER, "prefill", backing, NBYTES, access=Access.READ_WRITE).id


@pytest.mark.parametrize(
    "rows", [[("/dev/null", 0, 2 * PAGE)], [("mapped", 0, 8), ("/dev/null", 0, 8), ("mapped", 8, 8)]]
)
async def test_a_durable_write_to_a_file_is_flushed_before_the_peer_is_answered(
    house: House, rows: list[tuple[str, int, int]]
) -> None:
    """/dev/null takes every byte and no flush: what says so has tried, and told the peer instead of DONE."""
    device(house, "/dev/null")

    def write(**options: object) -> None:
        with contextlib.closing(house.serving.open_grant(PEER, TransferOp.WRITE, house.request(*rows, **options))) as g:
            write_all(g, bytes(g.nbytes))

    write()
    with pytest.raises(MoveFailed, match="fdatasync of /dev/null: Invalid argument"):
        write(durable=True)
    house.serving = house.make(sealer=Sealed())
    write(durable=True)  # sealing flushes


async def test_durable_means_nothing_for_reads_and_for_memory(house: House) -> None:
    device(house, "/dev/zero")  # takes no flush either
    reading = house.serving.open_grant(PEER, TransferOp.READ, house.request(("/dev/zero", 0, 64), durable=True))
    with contextlib.closing(reading):
        assert read_all(reading)[0] == bytes(64)
    rows = ("mapped", 0, 64), ("process", 0, 64)
    with contextlib.closing(house.serving.open_grant(PEER, TransferOp.WRITE, house.request(*rows, durable=True))) as g:
        write_all(g, bytes(128))
    assert house.bytes_now("process")[:64] == bytes(64)


async def test_a_cancelled_quiesce_leaves_nothing(house: House) -> None:
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1)))
    asked = asyncio.ensure_future(ask(house, quiesce=peer_pb.Quiesce(transfer_id="t1")))
    await house.transport.asked.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not house.serving._quiescing
    grant.close()


async def test_an_abort_by_holder_brings_its_grant_to_rest(house: House) -> None:
    await house.serving.abort("nobody")
    grant = house.serving.open_grant(PEER, TransferOp.READ, house.request(("mapped", 0, 1)))
    (hold,) = house.regions.holds()
    aborting = asyncio.ensure_future(house.serving.abort(hold.owner))
    await house.transport.asked.wait()
    grant.close()
    await aborting
    assert not house.regions.holds()
