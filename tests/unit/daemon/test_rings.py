"""A ring does what is submitted, tells each end once, keeps room for it, and closes over what no client means."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from xferd.api import ring as layout, wire
from xferd.api.errors import InvalidArgument, InvalidState, LimitExceeded, NotFound, Unavailable, Unsupported
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.proto.session_v1_pb2 import RingOptions
from xferd.api.ring import CompletionFlag, Kind, Opcode, RingLayout, RingSizes, RingState
from xferd.api.types import Caller, Hop, Notification, SessionId, TransferState
from xferd.daemon.engine.notifications import Inboxes
from xferd.daemon.engine.plan import Route
from xferd.daemon.rings.desk import RingDesk
from xferd.daemon.rings.ring import BATCH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from xferd.api.types import TransferRequest

SIZES = RingSizes(sq_entries=128, cq_entries=8, detail_nbytes=256, arena_nbytes=4096)
CALLER = Caller(SessionId("s"), "agent")


class Transfer:
    """What a ring reads of a transfer."""

    def __init__(self, number: int) -> None:
        self.id = f"{number:016x}"
        self.state = TransferState.DONE
        self.last_routes: tuple[Route, ...] = ()
        self.total_nbytes = self.moved_nbytes = 4096
        self.created_at = self.posted_at = self.started_at = self.first_byte_at = self.ended_at = 1.0
        self.descriptors = self.pieces = 2
        self.chunks = self.posts = 1


class Transfers:
    """An engine whose transfers end when the test says so, or at once."""

    def __init__(self) -> None:
        self.known = {f"{n:016x}": Transfer(n) for n in range(1, 40)}
        self.waiting: list[tuple[Transfer, Callable[[Any], None]]] = []
        self.requests: list[TransferRequest] = []
        self.at_once = True

    def owned(self, _: Caller, name: str) -> Transfer:
        if name not in self.known:
            raise NotFound(f"no transfer {name}", remedy="x" * 2000)
        return self.known[name]

    def post_heard(self, transfer: Transfer, ended: Callable[[Any], None]) -> None:
        if self.at_once:
            ended(transfer)
        else:
            self.waiting.append((transfer, ended))

    listen = post_heard

    def begin_cancel(self, transfer: Transfer) -> None:
        transfer.state = TransferState.CANCELLED

    def submit_now(self, _: Caller, request: TransferRequest, created: Callable[[Any], None]) -> Transfer:
        self.requests.append(request)
        created(self.known[f"{1:016x}"])
        return self.known[f"{1:016x}"]


class Client:
    """The other end, by struct alone."""

    def __init__(self, fds: tuple[int, int, int], nbytes: int) -> None:
        self.fd, self.bell, self.signal = fds
        self.map = mmap.mmap(self.fd, nbytes)
        self.layout = RingLayout.from_header(self.map[: layout.HEADER.size])
        self.sent = self.read = 0

    def put(
        self, opcode: int, a: int = 0, b: int = 0, *, number: int | None = None, rest: tuple[int, ...] = ()
    ) -> None:
        self.sent += 1
        at = self.layout.sq_at + (self.sent - 1) % self.layout.sizes.sq_entries * layout.SUBMISSION_NBYTES
        op, flags, places = (*rest[:2], *(0, 0))[0:1], (rest[1] if len(rest) > 1 else 0), (*rest[2:], *[0] * 6)[:6]
        fields = (self.sent, opcode, op[0], 0, flags, 0, a, b, *places)
        layout.SUBMISSION.pack_into(self.map, at, *fields, self.sent if number is None else number)

    async def ring(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the ring is closed
            os.write(self.bell, b"\1")
        for _ in range(12):
            await asyncio.sleep(0)

    def take(self) -> list[tuple[Any, ...]]:
        """Return (fields, detail) of what has come."""
        found = []
        while True:
            slot = self.read % self.layout.sizes.cq_entries
            fields = layout.COMPLETION.unpack_from(self.map, self.layout.cq_at + slot * layout.COMPLETION_NBYTES)
            if fields[-1] != self.read + 1:
                break
            at = self.layout.details_at + slot * self.layout.sizes.detail_nbytes
            found.append((fields, self.map[at : at + fields[5]]))
            self.read += 1
        self.map[layout.CQ_HEAD_AT : layout.CQ_HEAD_AT + 8] = self.read.to_bytes(8, "little")
        return found

    @property
    def taken(self) -> int:
        return int.from_bytes(self.map[layout.SQ_HEAD_AT : layout.SQ_HEAD_AT + 8], "little")

    @property
    def state(self) -> int:
        return int.from_bytes(self.map[layout.STATE_AT : layout.STATE_AT + 4], "little")

    def close(self) -> None:
        self.map.close()
        for fd in (self.fd, self.bell, self.signal):
            os.close(fd)


class Rig:
    def __init__(self) -> None:
        self.transfers = Transfers()
        self.inboxes = Inboxes("n", max_nbytes=1 << 20, max_payload_nbytes=1 << 16)
        self.inboxes.open("agent")
        self.refusal = ""
        self.desk = RingDesk(
            cast("Any", self.transfers), self.inboxes, check_open=self._check, enabled=True, max_nbytes=1 << 20
        )

    def _check(self) -> None:
        if self.refusal:
            raise Unavailable(self.refusal)

    @contextlib.contextmanager
    def client(self, sizes: RingSizes = SIZES) -> Iterator[Client]:
        nbytes, fds = self.desk.open_ring(CALLER, layout.VERSION, sizes)
        client = Client(fds, nbytes)
        try:
            yield client
        finally:
            self.desk.close_session(CALLER.session)
            client.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    async with made.desk:
        yield made
    assert made.desk.holds() == []


async def test_a_post_is_told_with_its_numbers_and_its_route_once(rig: Rig) -> None:
    with rig.client() as client:
        client.put(Opcode.POST, 5)
        client.put(Opcode.POST, 5)
        await client.ring()
        first, second = client.take()
        fields, detail = first
        assert fields[:6] == (1, 5, Kind.ENDED, 4, CompletionFlag.ROUTE if detail else 0, len(detail))
        assert fields[6:8] == (4096, 4096)
        assert second[0][0] == 2
        assert not second[0][4]
        assert os.read(client.signal, 100)
        assert client.taken == 2


async def test_a_route_that_says_the_same_has_the_same_number(rig: Rig) -> None:
    with rig.client() as client:
        for reason in ("one", "one", "other", "one"):
            hop = Hop("local", "here", "there", reason)
            rig.transfers.known[f"{5:016x}"].last_routes = (Route((hop,), 1.0, ("local", ""), 1, True),)
            client.put(Opcode.POST, 5)
            await client.ring()
        ends = [fields for fields, _ in client.take()]
    routes, flags = [end[18] for end in ends], [end[4] for end in ends]
    assert routes == [routes[0], routes[0], routes[2], routes[0]]
    assert routes[0] != routes[2]
    assert flags == [CompletionFlag.ROUTE, 0, CompletionFlag.ROUTE, 0]


async def test_what_cannot_be_done_is_refused_and_the_ring_goes_on(rig: Rig) -> None:
    with rig.client() as client:
        client.put(Opcode.POST, 999)
        client.put(Opcode.LISTEN, 0)
        client.put(Opcode.LISTEN, 1 << 40)
        client.put(Opcode.SUBMIT, 1, 2, rest=(9,))
        client.put(Opcode.SUBMIT, 1, 2, rest=(1, 0, 4092, 2))  # the index passes the arena's end
        client.put(Opcode.SUBMIT, 1, 2, rest=(1, 0, 0, 0, 0, 0, 0, 8))
        client.map[client.layout.arena_at : client.layout.arena_at + 8] = b"\xff" * 8
        await client.ring()
        told = client.take()
        assert [fields[2] for fields, _ in told] == [Kind.REFUSED] * 6
        codes = [wire.error_from_detail(pb.ErrorDetail.FromString(detail)).code for _, detail in told]
        assert codes[0] == NotFound.code
        assert set(codes[1:]) == {InvalidArgument.code}
        rig.refusal = "draining"
        client.put(Opcode.POST, 1)
        await client.ring()
        assert client.take()[0][0][2] == Kind.REFUSED
        assert client.state == RingState.OPEN


async def test_a_submit_carries_all_that_a_request_has(rig: Rig) -> None:
    options = RingOptions(key="k", backend="local", verify=True, durable=True)
    options.notification.CopyFrom(pb.Notification(target="b", payload=b"x"))
    raw = options.SerializeToString()
    with rig.client() as client:
        arena = client.layout.arena_at
        client.map[arena : arena + 8] = (7).to_bytes(4, "little") + (9).to_bytes(4, "little")
        client.map[arena + 64 : arena + 64 + len(raw)] = raw
        client.put(Opcode.SUBMIT, 3, 4, rest=(2, 2, 0, 2, 4, 1, 64, len(raw)))
        await client.ring()
        accepted, ended = client.take()
        assert (accepted[0][2], ended[0][2]) == (Kind.ACCEPTED, Kind.ENDED)
        [request] = rig.transfers.requests
        assert (request.local.handle, list(request.local.index)) == (3, [7, 9])
        assert (request.remote.handle, list(request.remote.index)) == (4, [9])
        assert (request.key, request.backend, request.hold) == ("k", "local", False)
        assert (request.verify, request.durable) == (True, True)
        assert request.notification == Notification("b", b"x")


async def test_nothing_is_taken_that_there_is_no_room_to_tell_of(rig: Rig) -> None:
    rig.transfers.at_once = False
    with rig.client() as client:
        for _ in range(12):
            client.put(Opcode.POST, 1)
        await client.ring()
        assert (client.taken, len(rig.transfers.waiting)) == (8, 8)
        for transfer, ended in rig.transfers.waiting[:8]:
            ended(transfer)
        assert len(client.take()) == 8
        assert client.taken == 8  # until the client rings again
        await client.ring()
        assert client.taken == 12


async def test_a_full_queue_is_taken_in_turns(rig: Rig) -> None:
    with rig.client(RingSizes(128, 128, 256, 4096)) as client:
        for _ in range(100):
            client.put(Opcode.POST, 1)
        os.write(client.bell, b"\1")
        seen = []
        while client.taken < 100:
            await asyncio.sleep(0)
            seen.append(client.taken)
        assert BATCH in seen
        assert len(client.take()) == 100


async def test_who_sees_an_end_finds_its_post_taken(rig: Rig) -> None:
    seen = []
    with rig.client() as client:

        def post_heard(transfer: Transfer, ended: Callable[[Any], None]) -> None:
            ended(transfer)
            seen.append((len(client.take()), client.taken))

        rig.transfers.post_heard = post_heard  # type: ignore[method-assign]
        for _ in range(3):
            client.put(Opcode.POST, 1)
        await client.ring()
    assert seen == [(1, 1), (1, 2), (1, 3)]  # else it would ring for nothing


@pytest.mark.parametrize("what", ["submission", "rubbish", "reads"])
async def test_what_comes_while_the_doorbell_is_read_is_seen(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with rig.client() as client:
        for _ in range(12):
            client.put(Opcode.POST, 1)
        await client.ring()
        assert len(client.take()) == 8
        await client.ring()
        assert len(client.take()) == 4
        left = [what]

        def read(fd: int, nbytes: int) -> bytes:
            if left and fd not in (client.bell, client.signal):
                match left.pop():
                    case "submission":
                        client.put(Opcode.POST, 3)
                    case "rubbish":
                        client.put(Opcode.POST, 3, number=77)
                    case "reads":
                        client.map[layout.CQ_HEAD_AT : layout.CQ_HEAD_AT + 8] = (1 << 40).to_bytes(8, "little")
                os.write(client.bell, b"\1")
            return os_read(fd, nbytes)

        os_read = os.read
        monkeypatch.setattr("xferd.daemon.rings.ring.os.read", read)
        await client.ring()
        monkeypatch.undo()
        assert not left
        assert (client.taken, client.state) == {
            "submission": (13, RingState.OPEN),
            "rubbish": (12, RingState.CLOSED),
            "reads": (12, RingState.CLOSED),
        }[what]


async def test_notifications_come_as_far_as_there_is_leave(rig: Rig) -> None:
    with rig.client() as client:
        rig.inboxes.deliver("agent", Notification("agent", b"one", "x@n"))
        client.put(Opcode.LISTEN, 3)
        await client.ring()
        rig.inboxes.deliver("agent", Notification("agent", b"L" * 300, "x@n"))
        rig.inboxes.deliver("agent", Notification("agent", b"three", "x@n"))
        one, cut = client.take()
        assert pb.Notification.FromString(one[1]).payload == b"one"
        assert cut[0][4] == CompletionFlag.CUT
        [large] = await rig.inboxes.take("agent", 1, 0.0)
        assert large.payload == b"L" * 300
        [three] = client.take()
        assert pb.Notification.FromString(three[1]).payload == b"three"
        rig.inboxes.deliver("agent", Notification("agent", b"four", "x@n"))
        assert client.take() == []  # the leave is used up
        assert len(await rig.inboxes.take("agent", 9, 0.0)) == 1


@pytest.mark.parametrize("how", ["opcode", "number", "reads"])
async def test_what_no_client_means_closes_the_ring_and_says_why(rig: Rig, how: str) -> None:
    with rig.client() as client:
        if how == "reads":
            client.map[layout.CQ_HEAD_AT : layout.CQ_HEAD_AT + 8] = (5).to_bytes(8, "little")
        client.put(77 if how == "opcode" else Opcode.POST, 1, number=500 if how == "number" else None)
        await client.ring()
        assert client.state == RingState.CLOSED
        nbytes = int.from_bytes(client.map[layout.STATE_AT + 4 : layout.STATE_AT + 8], "little")
        reason = pb.ErrorDetail.FromString(client.map[layout.REASON_AT : layout.REASON_AT + nbytes])
        assert wire.error_from_detail(reason).code == "protocol_violation"
        assert os.read(client.signal, 10)  # who waits is woken
        assert rig.desk.counters.violations == 1


async def test_a_session_has_one_ring_within_the_limits(rig: Rig) -> None:
    with rig.client():
        with pytest.raises(InvalidState):
            rig.desk.open_ring(CALLER, layout.VERSION, SIZES)
        assert [hold.kind for hold in rig.desk.holds()] == ["ring"]
    with pytest.raises(LimitExceeded, match=r"rings\.max_nbytes"):
        rig.desk.open_ring(CALLER, layout.VERSION, RingSizes(arena_nbytes=1 << 30))
    with pytest.raises(Unsupported):
        rig.desk.open_ring(CALLER, 9, SIZES)
    with pytest.raises(InvalidArgument):
        rig.desk.open_ring(CALLER, layout.VERSION, RingSizes(sq_entries=3))


async def test_ends_that_come_after_the_ring_closed_are_let_go(rig: Rig) -> None:
    rig.transfers.at_once = False
    with rig.client() as client:
        client.put(Opcode.POST, 1)
        await client.ring()
    [(transfer, ended)] = rig.transfers.waiting
    ended(transfer)


async def test_a_client_that_closes_its_pipe_harms_nobody(rig: Rig) -> None:
    nbytes, (memfd, bell, signal) = rig.desk.open_ring(CALLER, layout.VERSION, SIZES)
    assert nbytes
    os.close(signal)
    os.write(bell, b"\1")
    os.close(bell)
    await asyncio.sleep(0.01)
    rig.desk.close_session(CALLER.session)
    os.close(memfd)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rubbish=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=96)), min_size=1, max_size=8))
async def test_rubbish_anywhere_is_refused_or_closes_the_ring(rubbish: list[tuple[int, bytes]]) -> None:
    rig = Rig()
    async with rig.desk:
        with rig.client() as client:
            for at, data in rubbish:
                place = at % (client.layout.nbytes - len(data))
                client.map[place : place + len(data)] = data
                client.put(at % 6, at)
                await client.ring()
        assert len(rig.desk) == 0
