"""The ring with real daemons: by the book, by the client, by nobody's book; and that what dies takes nothing along."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster import eventually
from ring_by_the_book import (
    ACCEPTED,
    CANCEL,
    CUT,
    DONE,
    ENDED,
    HOLD,
    LISTEN,
    NOTIFICATION,
    POST,
    READ,
    REFUSED,
    ROUTE,
    SUBMIT,
    TELL_ACCEPTED,
    WRITE,
    Attached,
    BookRing,
    Refused,
    field,
    fields,
)

from xferd.api.errors import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    SizeMismatch,
    Stale,
    Unavailable,
    Unsupported,
    XferdError,
)
from xferd.api.ring import RingSizes
from xferd.api.types import Access, Priority, TransferState
from xferd.clients import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess

BLOCK = 4096
ROWS = 64
TINY = RingSizes(sq_entries=4, cq_entries=4, detail_nbytes=256, arena_nbytes=4096)


def counters(daemon: DaemonProcess) -> dict[str, float]:
    """Return the daemon's counters of rings."""
    text = daemon.get("/metrics")[1].decode()
    lines = (line.split() for line in text.splitlines() if line.startswith("xferd_ring"))
    return {name: float(value) for name, value in lines}


class Blocks:
    """Two regions of a client as prepared lists of blocks, and their bytes."""

    def __init__(self, client: Client) -> None:
        self.source, self.target = client.allocate([ROWS * BLOCK, ROWS * BLOCK])
        self.bytes = self.source.array(np.uint8, (ROWS, BLOCK))
        self.bytes[:] = np.arange(ROWS, dtype=np.uint8)[:, None] + 1
        self.got = self.target.array(np.uint8, (ROWS, BLOCK))
        self.a = client.prepare(self.source.blocks(np.arange(ROWS), BLOCK))
        self.b = client.prepare(self.target.blocks(np.arange(ROWS), BLOCK))


@pytest.fixture
def client(daemon: DaemonProcess, no_leaks: Callable[..., None]) -> Iterator[Client]:
    no_leaks(daemon)
    with Client.connect(daemon.session_socket, ring=True) as client:
        yield client


@pytest.fixture
def blocks(client: Client) -> Blocks:
    return Blocks(client)


# ------------------------------------------------------------------------------------ by the book


@pytest.fixture
def book(daemon: DaemonProcess, no_leaks: Callable[..., None]) -> Iterator[tuple[Attached, BookRing]]:
    no_leaks(daemon)
    with Attached(str(daemon.session_socket)) as session, BookRing(session) as ring:
        yield session, ring


def test_a_client_written_from_the_page_moves_bytes(book) -> None:
    session, ring = book
    source, source_bytes = session.allocate(ROWS * BLOCK)
    target, target_bytes = session.allocate(ROWS * BLOCK)
    for row in range(ROWS):
        source_bytes[row * BLOCK : (row + 1) * BLOCK] = bytes([row + 1]) * BLOCK
    offsets = [row * BLOCK for row in range(ROWS)]
    remote, local = session.prepare(source, offsets, BLOCK), session.prepare(target, offsets, BLOCK)
    picked = ring.put_index(0, [0, 1]), ring.put_index(8, [60, 3])
    ring.put(7, SUBMIT, local, remote, op=READ, local=picked[0], remote=picked[1])
    ring.ring()
    [told] = ring.completions(1)
    assert (told.user_data, told.kind, told.state, told.moved_nbytes) == (7, ENDED, DONE, 2 * BLOCK)
    assert (target_bytes[0], target_bytes[BLOCK], target_bytes[2 * BLOCK]) == (61, 4, 0)
    assert told.flags == ROUTE
    telemetry = fields(fields(told.detail)[10][0])  # type: ignore[arg-type]
    assert fields(telemetry[13][0])[1] == [b"local"]  # type: ignore[arg-type]
    assert told.created_at <= told.posted_at <= told.ended_at <= time.time()

    ring.put(8, SUBMIT, local, remote, op=READ, flags=HOLD)
    ring.ring()
    [held] = ring.completions(1)
    assert (held.kind, held.state, held.total_nbytes) == (ACCEPTED, 1, ROWS * BLOCK)
    ring.put(9, POST, held.transfer)
    ring.ring()
    [whole] = ring.completions(1)
    assert (whole.user_data, whole.kind, whole.state, whole.transfer) == (9, ENDED, DONE, held.transfer)
    assert bytes(target_bytes) == bytes(source_bytes)
    ring.put(10, POST, held.transfer)
    ring.ring()
    [again] = ring.completions(1)
    ring.put(11, CANCEL, held.transfer)
    ring.ring()
    [cancelled] = ring.completions(1)
    assert (again.posts, cancelled.user_data, cancelled.state) == (2, 11, DONE)
    known = {0} if not told.route else {told.route, whole.route}
    assert again.flags == (0 if again.route in known else ROUTE)  # a route is told when its number is new
    status = session.call("TransferService/Poll", field(1, f"{held.transfer:016x}"))
    assert fields(status[1][0])[4] == [DONE]  # type: ignore[arg-type]


def test_refusals_are_those_of_grpc_and_close_nothing(book) -> None:
    session, ring = book
    region, _ = session.allocate(ROWS * BLOCK)
    whole = session.prepare(region, [0], ROWS * BLOCK)
    rows = session.prepare(region, [0, BLOCK], BLOCK)
    index = ring.put_index(0, [0, 5])
    ring.memory[ring.arena_at + 64 : ring.arena_at + 68] = b"\xff" * 4
    cases: list[tuple[dict[str, object], str]] = [
        ({"opcode": SUBMIT, "a": 999, "b": whole, "op": READ}, "not_found"),
        ({"opcode": SUBMIT, "a": whole, "b": rows, "op": READ}, "size_mismatch"),
        ({"opcode": SUBMIT, "a": whole, "b": whole, "op": 9}, "invalid_argument"),
        ({"opcode": SUBMIT, "a": whole, "b": whole, "op": READ, "priority": 77}, "invalid_argument"),
        ({"opcode": SUBMIT, "a": whole, "b": whole, "op": READ, "local": (ring.arena - 4, 2)}, "invalid_argument"),
        ({"opcode": SUBMIT, "a": rows, "b": rows, "op": READ, "local": index, "remote": index}, "out_of_bounds"),
        ({"opcode": SUBMIT, "a": whole, "b": whole, "op": READ, "options": (64, 4)}, "invalid_argument"),
        ({"opcode": POST, "a": 1}, "not_found"),
        ({"opcode": CANCEL, "a": 1}, "not_found"),
        ({"opcode": LISTEN, "a": 0}, "invalid_argument"),
        ({"opcode": LISTEN, "a": ring.cq}, "invalid_argument"),
    ]
    for number, (entry, _) in enumerate(cases):
        ring.put(number, **entry)  # type: ignore[arg-type]
    ring.ring()
    for number, told in enumerate(ring.completions(len(cases))):
        assert (told.kind, told.user_data) == (REFUSED, number)
        assert Refused(told.detail).code == cases[number][1], cases[number]
    assert ring.state == 1


def test_room_for_completions_is_kept_and_nothing_is_lost(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)
    with Attached(str(daemon.session_socket)) as session, BookRing(session, sq=16, cq=4, detail=256) as ring:
        region, _ = session.allocate(2 * BLOCK)
        one, two = session.prepare(region, [0], BLOCK), session.prepare(region, [BLOCK], BLOCK)
        for number in range(16):
            flags = TELL_ACCEPTED if number % 2 else 0
            ring.put(number, SUBMIT, one, two, op=READ, flags=flags)
        ring.ring()
        for _ in range(50):  # it takes no more than it has room for, however often it is asked
            ring.ring()
            session.call("TransferService/Poll", b"")
        assert 2 <= ring.taken <= 4
        told = list(ring.completions(24))  # 8 of one and 8 of two; reading rings the doorbell
        ends = [c.user_data for c in told if c.kind == ENDED]
        assert sorted(ends) == list(range(16))
        for number in range(1, 16, 2):
            assert [c.kind for c in told if c.user_data == number] == [ACCEPTED, ENDED]
        assert ring.taken == 16
        assert ring.poll() is None


def test_opening_is_refused_by_the_rules(daemon: DaemonProcess, cluster: Cluster) -> None:
    with Attached(str(daemon.session_socket)) as session:
        for sizes, code in (
            ({"sq": 3}, "invalid_argument"),
            ({"cq": 1 << 20}, "invalid_argument"),
            ({"detail": 100}, "invalid_argument"),
            ({"arena": 5}, "invalid_argument"),
            ({"arena": 1 << 30}, "limit_exceeded"),
        ):
            with pytest.raises(Refused) as caught:
                BookRing(session, **sizes)
            assert caught.value.code == code
        with pytest.raises(Refused) as caught:
            session.ask(field(6, field(1, 2)))
        assert caught.value.code == "unsupported"
        with BookRing(session):
            with pytest.raises(Refused) as caught:
                BookRing(session)
            assert caught.value.code == "invalid_state"
    without = cluster.make("without", tcp=False, settings=("rings.enabled=false",))
    with pytest.raises(Unsupported, match="turned off"):
        Client.connect(without.session_socket, ring=True)
    with Client.connect(without.session_socket) as client:
        assert not client.uses_ring
        blocks = Blocks(client)
        client.write(blocks.a, blocks.b)
        np.testing.assert_array_equal(blocks.got, blocks.bytes)


# ------------------------------------------------------------------------------------ rubbish


def rubbish_entry(rng: random.Random, handles: list[int]) -> bytes:
    """Return an entry of which each field is right, or nearly, or anything."""

    def number(bits: int, *likely: int) -> int:
        return rng.choice([*likely, 0, 1, (1 << bits) - 1, rng.getrandbits(bits), rng.randrange(64)])

    opcode = rng.choice([SUBMIT, SUBMIT, SUBMIT, POST, CANCEL, LISTEN])
    op, priority, flags = number(8, READ, WRITE), number(8, 2), number(8, HOLD, TELL_ACCEPTED)
    places = [number(32, 0, 8, 64, 4092, 4096) for _ in range(6)]
    a, b = number(64, *handles), number(64, *handles)
    head = struct.pack("<QBBBBIQQ", rng.getrandbits(64), opcode, op, priority, flags, number(32), a, b)
    return head + struct.pack("<6I", *places)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rubbish_in_the_ring_harms_only_itself(daemon: DaemonProcess, no_leaks) -> None:
    """3,000 entries of rubbish, and rubbish in every other part, while another session's transfers go on unharmed."""
    no_leaks(daemon)
    rng = random.Random(20)
    stop = threading.Event()
    problems: list[str] = []
    rounds = 0

    def honest() -> None:
        nonlocal rounds
        with Client.connect(daemon.session_socket, "honest", ring=True) as client:
            blocks = Blocks(client)
            while not stop.is_set():
                order = np.random.default_rng(rounds).permutation(ROWS)
                client.read(blocks.b, blocks.a.select(order))
                if not np.array_equal(blocks.got, blocks.bytes[order]):
                    problems.append(f"wrong bytes in round {rounds}")
                rounds += 1
            if not client.uses_ring:
                problems.append("the honest client lost its ring")

    before = counters(daemon)["xferd_ring_violations_total"]
    witness = threading.Thread(target=honest)
    witness.start()
    try:
        entries = closed = 0
        while entries < 3000:
            with Attached(str(daemon.session_socket)) as session, BookRing(session, 32, 64, 256, 4096) as ring:
                region, _ = session.allocate(ROWS * BLOCK)
                handles = [session.prepare(region, [i * BLOCK for i in range(ROWS)], BLOCK) for _ in range(2)]
                for _ in range(20):
                    while ring.poll():
                        pass
                    if ring.state != 1:
                        break
                    ring.memory[ring.arena_at : ring.arena_at + 4096] = rng.randbytes(4096)
                    ring.memory[ring.details_at : ring.details_at + 4096] = rng.randbytes(4096)
                    for _ in range(min(16, ring.taken + ring.sq - ring.sent)):
                        ring.put_raw(rubbish_entry(rng, handles))
                        entries += 1
                    ring.ring()
                spoil(rng, ring)
                ring.ring()
                session.call("TransferService/Poll", b"")  # the session lives, whatever became of its ring
                closed += ring.state == 2
    finally:
        stop.set()
        witness.join(60)
    assert not witness.is_alive()
    assert not problems
    assert rounds > 10
    assert daemon.process.poll() is None
    assert closed > 3
    assert counters(daemon)["xferd_ring_violations_total"] - before >= closed


def spoil(rng: random.Random, ring: BookRing) -> None:
    """Break the rules outright, each time in another way."""
    match rng.randrange(6):
        case 0:
            ring.words[24] = rng.getrandbits(64)  # CQ_HEAD
        case 1:
            ring.words[16] = rng.getrandbits(64)  # SQ_HEAD is the daemon's
            ring.memory[0:128] = rng.randbytes(128)
        case 2:
            if ring.taken == ring.sent:
                ring.put_raw(struct.pack("<QB47x", 1, rng.choice([0, 5, 255])))
        case 3:
            at = ring.sq_at + ring.sent % ring.sq * 64
            ring.words[(at + 56) // 8] = rng.getrandbits(64)
        case 4:
            nbytes = ring.cq * 128
            ring.memory[ring.cq_at : ring.cq_at + nbytes] = rng.randbytes(nbytes)
        case 5:
            ring.memory[0 : ring.nbytes] = rng.randbytes(ring.nbytes)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda ring: ring.put_raw(struct.pack("<QB47x", 1, 9)), "opcode 9"),
        (lambda ring: ring.words.__setitem__(24, 5), "5 completions were read"),
        (lambda ring: ring.words.__setitem__((ring.sq_at + 56) // 8, 7), "submission 7 stands in the slot"),
    ],
)
def test_a_ring_that_is_closed_says_why_and_the_session_goes_on(book, harm, said) -> None:
    session, ring = book
    harm(ring)
    ring.ring()
    assert ring.wait() is None
    assert ring.state == 2
    assert said in str(ring.reason())
    session.allocate(4096)
    with pytest.raises(Refused):
        BookRing(session)


def test_the_client_goes_on_by_grpc_when_its_ring_is_closed(client: Client, blocks: Blocks) -> None:
    big = client.allocate([64 << 20, 64 << 20])
    running = client.transfer("WRITE", client.prepare(big[0]), client.prepare(big[1]))
    again = client.transfer("WRITE", blocks.a, blocks.b, hold=True)
    ring = client._ring._ring  # type: ignore[union-attr] # as a client with a bug would
    ring._words[24] = 1 << 40
    ring.ring()
    assert running.wait(20).state is TransferState.DONE
    eventually(lambda: (client.write(blocks.a, blocks.b), not client.uses_ring)[1])
    assert again.post(wait_s=10).state is TransferState.DONE
    client.read(blocks.b, blocks.a)
    client.notify(client.agent, b"x")
    assert [n.payload for n in client.notifications(5)] == [b"x"]


# ------------------------------------------------------------------------------------ the same results


def comparable(status) -> object:
    """Return a status without what differs between any two transfers."""
    telemetry = dataclasses.replace(
        status.telemetry, created_at=0, posted_at=0, first_byte_at=0, ended_at=0, queued_s=0, moving_s=0, route=()
    )
    cause = "own" if status.cause_id == status.id else status.cause_id
    hops = tuple((hop.backend, hop.source, hop.target) for hop in status.telemetry.route)
    return dataclasses.replace(status, id="", agent="", cause_id=cause, error=None, telemetry=telemetry), hops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key": "k"},
        {"cause_id": "because"},
        {"key": "k2", "cause_id": "because"},
        {"priority": Priority.HIGH, "timeout_s": 2.5},
        {"backend": "local"},
        {"timeout_s": 20.0125},
    ],
    ids=str,
)
def test_both_ways_tell_the_same(daemon: DaemonProcess, no_leaks, options) -> None:
    no_leaks(daemon)
    told = []
    for is_ring in (False, True):
        with Client.connect(daemon.session_socket, ring=is_ring) as client:
            blocks = Blocks(client)
            order = np.arange(ROWS)[::-1]
            transfer = client.transfer("WRITE", blocks.a.select(order), blocks.b, **options)
            ended = transfer.wait(20)
            np.testing.assert_array_equal(blocks.got, blocks.bytes[::-1])
            asked = Client.poll_many(client, [transfer.id])[0]
            assert asked == ended, "what the ring has told is what the daemon says"
            posted = transfer.post(wait_s=10)
            same = client.transfer("WRITE", blocks.a.select(order), blocks.b, **options).wait(20)
            assert (same.id == transfer.id) == ("key" in options)
            done = client.write(blocks.a, blocks.b, **({} if "key" in options else options))
            told.append([comparable(status) for status in (ended, posted, same, done)])
    assert told[0] == told[1]


def failing(client: Client, blocks: Blocks) -> Iterator[Callable[[], object]]:
    held = client.transfer("WRITE", blocks.a, blocks.b, hold=True)
    gone = client.prepare(blocks.target)
    gone.release()
    region = client.allocate(ROWS * BLOCK)
    freed = client.prepare(region)
    kept = client.transfer("WRITE", blocks.a, freed, hold=True)
    region.free()
    ended = client.transfer("WRITE", blocks.a, blocks.b)
    ended.wait(20)
    ended.release()
    yield ended.poll
    yield ended.post
    yield lambda: ended.wait(1)
    yield lambda: client.wait_many([ended], 1)
    yield lambda: client.write(blocks.a.select([0]), blocks.b)
    yield lambda: client.write(gone, blocks.b)
    yield lambda: client.write(blocks.a, freed)
    yield lambda: kept.post()
    yield lambda: kept.post(wait_s=5)
    yield lambda: client.write(blocks.a, blocks.b, backend="nothing")
    yield lambda: client.write(blocks.a, blocks.b, notification=("nobody", b"x"))
    yield lambda: client.write(blocks.a, blocks.b, notification=("", b"x"))
    yield lambda: client.write(blocks.a, blocks.b, timeout_s=-1.0)
    yield lambda: client.write(blocks.a.select([]), blocks.b.select([]))
    yield lambda: client.post_many([kept])
    yield lambda: (held.release(), held.poll())
    yield lambda: held.post()
    yield lambda: held.wait(1)
    yield lambda: client.cancel([held])


def test_both_ways_fail_the_same(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)
    told = []
    for is_ring in (False, True):
        with Client.connect(daemon.session_socket, ring=is_ring) as client:
            mine = []
            for attempt in failing(client, Blocks(client)):
                with pytest.raises(XferdError) as caught:
                    attempt()
                mine.append((type(caught.value), caught.value.limit, caught.value.remedy))
            assert client.uses_ring == is_ring
            told.append(mine)
    assert told[0] == told[1]
    assert {kind for kind, _, _ in told[0]} >= {SizeMismatch, NotFound, InvalidArgument}


def test_what_does_not_fit_goes_by_grpc(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)
    with Client.connect(daemon.session_socket, ring=TINY) as client:
        blocks = Blocks(client)
        rows = client.prepare(blocks.source.blocks(np.arange(2048) % 64, 64))
        into = client.prepare(blocks.target.blocks(np.arange(2048), 64))
        before = counters(daemon)["xferd_ring_submissions_total"]
        index = np.arange(2048)
        client.read(into.select(index), rows.select(index))  # 16 KiB of index into an arena of 4
        client.read(blocks.target, blocks.source)  # not prepared
        assert counters(daemon)["xferd_ring_submissions_total"] == before
        client.read(blocks.b, blocks.a)
        assert counters(daemon)["xferd_ring_submissions_total"] == before + 1
        # The reason of this failure is longer than a detail of 256 bytes.
        long = "x" * 300
        with pytest.raises(XferdError) as caught:
            client.read(blocks.b, blocks.a, notification=(long, b""))
        assert long in str(caught.value)
        assert client.uses_ring


def test_deadlines_and_cancels_by_ring(client: Client) -> None:
    big = client.allocate([64 << 20, 64 << 20])
    a, b = (client.prepare(region) for region in big)
    with pytest.raises(DeadlineExceeded, match="of 67108864 bytes"):
        client.write(a, b, timeout_s=0.001)
    transfer = client.transfer("WRITE", a, b, priority=Priority.LOW)
    status = transfer.cancel()
    assert status.state in (TransferState.CANCELLED, TransferState.DONE)
    big[0].array()[:] = 7
    before = big[1].array().copy()
    np.testing.assert_array_equal(big[1].array(), before)
    if status.state is TransferState.CANCELLED:
        with pytest.raises(Cancelled):
            transfer.wait()
        assert transfer.poll().state is TransferState.CANCELLED
    transfer.post()
    with pytest.raises(DeadlineExceeded, match="goes on"):
        transfer.wait(0.0001)
    assert not transfer.is_ended
    assert transfer.wait().state is TransferState.DONE
    assert big[1].array().min() == 7


def test_polling_sees_the_end_with_no_call(client: Client, blocks: Blocks) -> None:
    transfer = client.transfer("WRITE", blocks.a, blocks.b, hold=True)
    transfer.post()
    deadline = time.monotonic() + 20
    while not transfer.is_ended:
        assert time.monotonic() < deadline
    assert transfer.status.telemetry.moved_nbytes == ROWS * BLOCK
    assert client._ring.tracks_to_wait([transfer])  # type: ignore[union-attr] # so that poll asks nobody
    assert transfer.poll() is transfer.status


# ------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("sizes", [True, TINY], ids=["usual", "tiny"])
def test_many_threads_share_a_ring(daemon: DaemonProcess, no_leaks, sizes) -> None:
    no_leaks(daemon)
    problems: list[str] = []
    with Client.connect(daemon.session_socket, ring=sizes) as client:
        blocks = Blocks(client)

        def work(thread: int) -> None:
            rows = range(thread * 8, thread * 8 + 8)
            for turn in range(25):
                for row in rows:
                    blocks.bytes[row] = (turn * 7 + row) % 256
                if turn % 2:
                    for row in rows:
                        client.write(blocks.a.select([row]), blocks.b.select([row]))
                else:
                    started = [client.transfer("WRITE", blocks.a.select([row]), blocks.b.select([row])) for row in rows]
                    client.wait_many(started, 60)
                if any(blocks.got[row].min() != (turn * 7 + row) % 256 for row in rows):
                    problems.append(f"thread {thread}, turn {turn}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        assert client.uses_ring
    assert not problems


@pytest.mark.parametrize("sizes", [True, TINY], ids=["usual", "tiny"])
async def test_many_tasks_share_a_ring(daemon: DaemonProcess, no_leaks, sizes) -> None:
    no_leaks(daemon)
    async with AsyncClient.connect(daemon.session_socket, ring=sizes) as client:
        source, target = await client.allocate([ROWS * BLOCK, ROWS * BLOCK])
        source.array(np.uint8, (ROWS, BLOCK))[:] = np.arange(ROWS, dtype=np.uint8)[:, None] + 1
        a = await client.prepare(source.blocks(np.arange(ROWS), BLOCK))
        b = await client.prepare(target.blocks(np.arange(ROWS), BLOCK))
        done = await asyncio.gather(*(client.write(a.select([i]), b.select([i])) for i in range(ROWS)))
        assert {status.state for status in done} == {TransferState.DONE}
        np.testing.assert_array_equal(source.array(), target.array())
        held = [await client.transfer("READ", a.select([i]), b.select([i]), hold=True) for i in range(ROWS)]
        source.array()[:] = 0
        await client.post_many(held)
        assert {status.state for status in await client.wait_many(held, 20)} == {TransferState.DONE}
        np.testing.assert_array_equal(source.array(), target.array())
        big = [await client.prepare(region) for region in await client.allocate([64 << 20, 64 << 20])]
        transfer = await client.transfer("WRITE", *big)
        assert (await transfer.cancel()).state in (TransferState.CANCELLED, TransferState.DONE)
        waiting = asyncio.ensure_future(client.notifications(20))
        await asyncio.sleep(0)
        await client.notify(client.agent, b"tick")
        assert [n.payload for n in await waiting] == [b"tick"]
        assert client.uses_ring


# ------------------------------------------------------------------------------------ notifications


def test_notifications_by_ring_keep_their_order_and_their_bytes(client: Client, daemon: DaemonProcess) -> None:
    assert client.notifications() == []  # from here on they come by the ring
    rng = np.random.default_rng(3)
    sizes = [0, 10, 5000, 3, 900, 1100, 60_000, 1, *rng.integers(0, 3000, 200).tolist()]
    sent = [rng.bytes(size) for size in sizes]
    with Client.connect(daemon.session_socket, "sender") as sender:

        def send() -> None:
            for payload in sent:
                sender.notify(client.agent, payload)

        sending = threading.Thread(target=send)
        sending.start()
        got: list[bytes] = []
        while len(got) < len(sent):
            taken = client.notifications(20, limit=7)
            assert 0 < len(taken) <= 7
            got += [n.payload for n in taken]
        sending.join(20)
    assert got == sent
    assert client.notifications(0.01) == []
    client.notify(client.agent, b"now")  # it is there before its sender is told
    assert [n.payload for n in client.notifications()] == [b"now"]


def test_the_book_takes_a_long_notification_by_call(book) -> None:
    session, ring = book
    me = session.call("AdminService/ListSessions", b"")[1][-1]
    agent = bytes(fields(me)[2][0]).decode()  # type: ignore[arg-type]
    for payload in (b"short", b"x" * 2000, b"after"):
        session.call("NotificationService/Send", field(2, agent) + field(3, payload))
    ring.put(5, LISTEN, 10)
    ring.ring()
    first, second = ring.completions(2)
    assert (first.kind, first.user_data, fields(first.detail)[3]) == (NOTIFICATION, 5, [b"short"])
    assert (second.kind, second.flags, second.detail) == (NOTIFICATION, CUT, b"")
    with pytest.raises(TimeoutError):
        ring.wait(0.05)  # no further one until that is taken
    taken = session.call("NotificationService/Receive", field(1, 1))
    assert len(fields(taken[1][0])[3][0]) == 2000  # type: ignore[arg-type]
    [third] = ring.completions(1)
    assert fields(third.detail)[3] == [b"after"]


# ------------------------------------------------------------------------------------ death


HOLDER = """
    import sys, numpy as np
    from xferd.clients import Client
    client = Client.connect(sys.argv[1], "victim", ring=True)
    big = client.allocate([64 << 20, 64 << 20])
    a, b = (client.prepare(region) for region in big)
    transfer = client.transfer("WRITE", a, b)
    print("ready", flush=True)
    while True:
        transfer.wait()
        transfer.post()
"""


def test_a_killed_client_leaves_nothing(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)
    victim = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(daemon.session_socket)], stdout=subprocess.PIPE
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    assert counters(daemon)["xferd_rings_open"] == 1
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    victim.stdout.close()
    eventually(lambda: counters(daemon)["xferd_rings_open"] == 0, what="the ring to be let go")


@pytest.mark.parametrize("how", ["kill", "end"])
def test_a_daemon_that_goes_is_noticed_at_once(cluster: Cluster, how: str) -> None:
    daemon = cluster.make("gone", tcp=False)
    with Client.connect(daemon.session_socket, ring=True) as client:
        blocks = Blocks(client)
        client.write(blocks.a, blocks.b)
        big = client.allocate([64 << 20, 64 << 20])
        transfer = client.transfer("WRITE", client.prepare(big[0]), client.prepare(big[1]), hold=True)
        errors: list[object] = []

        def wait() -> None:
            try:
                while True:
                    client.notifications(20)
            except XferdError as error:
                errors.append(error)

        def work() -> None:
            try:
                while True:
                    transfer.post()
                    transfer.wait()
            except XferdError as error:
                errors.append(error)

        threads = [threading.Thread(target=wait), threading.Thread(target=work)]
        for thread in threads:
            thread.start()
        eventually(lambda: counters(daemon)["xferd_ring_submissions_total"] > 5)
        began = time.monotonic()
        if how == "kill":
            daemon.process.kill()
        else:
            [session] = client.admin.sessions()
            client.admin.end_session(session.session)
        for thread in threads:
            thread.join(15)
            assert not thread.is_alive()
        assert time.monotonic() - began < 10
        assert len(errors) == 2
        for error in errors:
            assert isinstance(error, (Unavailable, Cancelled)), error
        with pytest.raises(Unavailable):
            client.write(blocks.a, blocks.b)
        assert not client.uses_ring
    if how == "kill":
        daemon.process.wait(10)
        cluster.daemons.remove(daemon)


def test_closing_gives_all_back_and_ends_waits(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)

    def held() -> tuple[int, int]:
        """Return mappings of rings, and descriptors of pipes, of which gRPC opens none."""
        maps = Path("/proc/self/maps").read_text().count("xferd-ring")
        pipes = 0
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                pipes += str(path.readlink()).startswith("pipe:")
        return maps, pipes

    for _ in range(3):
        before = held()
        client = Client.connect(daemon.session_socket, ring=True)
        assert held() == (before[0] + 1, before[1] + 2)
        blocks = Blocks(client)
        outcome: list[object] = []

        def wait(client: Client = client, outcome: list[object] = outcome) -> None:
            try:
                outcome.append(client.notifications(20))
            except XferdError as error:
                outcome.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        client.write(blocks.a, blocks.b)
        eventually(lambda client=client: client._ring.is_listening)
        client.close()
        waiting.join(10)
        assert not waiting.is_alive()
        assert isinstance(outcome[0], Closed), outcome
        assert held() == before


FORKER = """
    import os, sys, numpy as np
    from xferd.api.errors import InvalidState
    from xferd.clients import Client
    with Client.connect(sys.argv[1], ring=True) as client:
        region, other = client.allocate([4096, 4096])
        a, b = client.prepare(region), client.prepare(other)
        transfer = client.transfer("WRITE", a, b, hold=True)
        transfer.post()
        pid = os.fork()
        if not pid:
            try:
                for use in (lambda: client.write(a, b), transfer.wait, transfer.cancel, transfer.post):
                    try:
                        use()
                        os._exit(2)
                    except InvalidState as error:
                        assert "belongs to process" in str(error)
                os._exit(0)
            except BaseException:
                os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        transfer.wait(20)
        region.array()[:] = 9
        client.write(a, b)
        assert other.array().min() == 9 and client.uses_ring
"""


def test_a_forked_child_leaves_its_parents_ring_alone(daemon: DaemonProcess, no_leaks) -> None:
    no_leaks(daemon)
    environ = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}
    command = [sys.executable, "-c", textwrap.dedent(FORKER), str(daemon.session_socket)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.returncode == 0, done.stderr


def test_across_nodes_by_ring(pair: tuple[DaemonProcess, DaemonProcess], no_leaks) -> None:
    no_leaks(*pair)
    with ExitStack() as stack:
        a, b = (stack.enter_context(Client.connect(daemon.session_socket, ring=True)) for daemon in pair)
        theirs = b.allocate(ROWS * BLOCK, access=Access.READ, label="ring-theirs")
        theirs.array()[:] = 5
        [remote] = a.regions(node="b", label="ring-theirs")
        mine = a.allocate(ROWS * BLOCK)
        local, far = a.prepare(mine), a.prepare(remote)
        status = a.read(local, far, notification=(b.address, b"fetched"))
        assert (status.remote_node, status.telemetry.route[0].backend) == ("b", "tcp")
        assert mine.array().min() == 5
        assert [n.payload for n in b.notifications(20)] == [b"fetched"]
        theirs.free()
        with pytest.raises((Stale, NotFound)):
            a.read(local, far)
        assert a.uses_ring
