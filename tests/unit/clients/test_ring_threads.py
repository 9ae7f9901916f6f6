"""Waiting at the ring: threads that share it, tasks on a loop, deadlines, closing, and a daemon that goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from typing import Self

import pytest
from ring_stub import PREPARED, AsyncStillSocket, RingStub, StillSocket

from xferd.api import types as t, wire
from xferd.api.errors import (
    Closed,
    InvalidState,
    NotFound,
    OutOfBounds,
    ProtocolViolation,
    Stale,
    Unavailable,
    XferdError,
)
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.ring import Kind, Opcode, RingSizes, RingState
from xferd.clients._aio_ring import AsyncRing
from xferd.clients._sync_ring import SyncRing
from xferd.clients.transfers import PreparedBase, TransferBase

SUBMIT, POST, CANCEL, LISTEN = (int(code) for code in Opcode)
READ = t.TransferOp.READ


def prepared(handle: int) -> t.PreparedInfo:
    return t.PreparedInfo(t.PreparedHandle(handle), "node-a", 1, 100, 409600)


LOCAL, REMOTE = PreparedBase(prepared(5)), PreparedBase(prepared(6))


class Server:
    """Answers what comes over a stub, in a thread, by a function from a submission to completions."""

    def __init__(self, stub: RingStub, answer) -> None:
        self.stub = stub
        self.answer = answer
        self.seen: list[tuple[int, ...]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="stub")

    def _serve(self) -> None:
        while not self._stop.is_set():
            for entry in self.stub.take():
                self.seen.append(entry)
                self.answer(self.stub, entry)
            time.sleep(0.0002)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)


def done(stub: RingStub, entry: tuple[int, ...]) -> None:
    """End everything at once, in the order of asking."""
    if entry[4] & 2:
        stub.tell(entry[0], Kind.ACCEPTED, transfer=0x1000 + entry[-1], state=2, signals=False)
    if entry[4] & 1:
        stub.tell(entry[0], Kind.ACCEPTED, transfer=0x1000 + entry[-1], state=PREPARED)
    elif entry[1] != LISTEN:
        stub.tell(entry[0], transfer=0x1000 + entry[-1] if entry[1] == SUBMIT else entry[6])


@pytest.fixture
def stub():
    with RingStub(RingSizes(16, 64, 256, 4096)) as stub:
        yield stub


@pytest.fixture
def ring(stub):
    ring = SyncRing(stub.ring(), StillSocket())  # type: ignore[arg-type]
    for handle in (5, 6):
        ring.know_list(prepared(handle))
    yield ring
    ring.close()


def in_threads(count: int, work) -> list[object]:
    """Run ``work(i)`` in threads at once; returns results, or typed errors in their place."""
    results: list[object] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except XferdError as exc:
            results[i] = exc

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_each_thread_gets_its_own_answers(stub, ring):
    def work(_: int) -> set[str]:
        return {ring.run(READ, LOCAL, REMOTE, {}).id for _ in range(50)}

    with Server(stub, done) as server:
        ids = in_threads(8, work)
    assert all(isinstance(mine, set) and len(mine) == 50 for mine in ids), ids
    assert len(set().union(*ids)) == 400  # type: ignore[arg-type]
    assert len(server.seen) == 400


def test_the_lead_is_handed_on_when_the_leader_has_its_answer(stub, ring):
    """The first to wait is answered first; those behind it must be woken by somebody else."""
    order: list[int] = []
    waiting = threading.Barrier(4)

    def work(i: int) -> None:
        waiting.wait(20)
        ring.run(READ, LOCAL, REMOTE, {"priority": t.Priority.HIGH})
        order.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    taken: list[tuple[int, ...]] = []
    while len(taken) < 4:
        taken += stub.take()
        time.sleep(0.001)
    for told, entry in enumerate(taken, 1):
        stub.tell(entry[0], transfer=entry[-1])
        while len(order) < told:
            time.sleep(0.001)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_wait_ends_at_its_deadline_for_leaders_and_followers(stub, ring):
    with Server(stub, lambda stub, e: e[4] & 2 and stub.tell(e[0], Kind.ACCEPTED, transfer=e[-1], state=2)):
        tracks = [ring.start("READ", LOCAL, REMOTE, {}, hold=False, wait_s=0.0) for _ in range(3)]
        began = time.monotonic()
        told = in_threads(3, lambda i: ring.wait([tracks[i]], 0.1, any_of=False))
    assert told == [True] * 3
    assert 0.1 <= time.monotonic() - began < 5
    assert not any(track.has_ended for track in tracks)


def test_any_and_all_of_several(stub, ring):
    with Server(stub, lambda stub, e: stub.tell(e[0], Kind.ACCEPTED, transfer=e[-1], state=2)):
        tracks = [ring.start("READ", LOCAL, REMOTE, {}, hold=False, wait_s=0.0) for _ in range(3)]
    stub.tell(2, transfer=2)
    assert ring.wait(tracks, 20, any_of=True)
    assert [track.has_ended for track in tracks] == [False, True, False]
    late = threading.Timer(0.02, lambda: (stub.tell(3, transfer=3), stub.tell(1, transfer=1)))
    late.start()
    assert ring.wait(tracks, 20, any_of=False)
    assert all(track.has_ended for track in tracks)
    late.join()


def test_a_refusal_is_raised_and_nothing_else_happens(stub, ring):
    detail = wire.error_to_detail(OutOfBounds("row 100", limit="0 to 99")).SerializeToString()
    with Server(stub, lambda stub, e: stub.tell(e[0], Kind.REFUSED, detail=detail)):
        with pytest.raises(OutOfBounds, match="row 100"):
            ring.run(READ, LOCAL, REMOTE, {})
        with pytest.raises(OutOfBounds):
            ring.start("READ", LOCAL, REMOTE, {}, hold=True, wait_s=0.0)
    assert not ring._ring.asks


def test_an_option_that_no_transfer_knows_is_refused_and_not_sent(stub, ring):
    with pytest.raises(TypeError, match=r"'bakend'.*backend, cause_id"):
        ring.run(READ, LOCAL, REMOTE, {"bakend": "local"})
    with pytest.raises(TypeError, match=r"'bakend', 'tmeout'"):
        ring.start("READ", LOCAL, REMOTE, {"verify": True, "tmeout": 1.0, "bakend": ""}, hold=False, wait_s=0.0)
    assert stub.take() == []


def test_posts_go_with_one_doorbell_and_the_first_refusal_is_raised(stub, ring):
    def answer(stub: RingStub, entry: tuple[int, ...]) -> None:
        if entry[1] == POST and entry[6] == 0x1003:
            detail = wire.error_to_detail(Stale("region 9")).SerializeToString()
            stub.tell(entry[0], Kind.REFUSED, detail=detail)
        else:
            done(stub, entry)

    with Server(stub, answer):
        held = [TransferBase(ring.start("READ", LOCAL, REMOTE, {}, hold=True, wait_s=0.0)) for _ in range(10)]
        stub.doorbells()
        assert ring.post_many(held[5:]) == []
        assert stub.doorbells() == 1
        with pytest.raises(Stale, match="region 9"):
            ring.post_many(held[:5])
        assert [x.state.name for x in held] == ["DONE"] * 2 + ["PREPARED"] + ["DONE"] * 7
        assert ring.post_many([held[0], held[0]]) == [held[0], held[0]]  # gRPC says what is wrong with that


def test_a_running_transfer_is_not_posted(stub, ring):
    with Server(stub, lambda stub, e: stub.tell(e[0], Kind.ACCEPTED, transfer=e[-1], state=2)) as server:
        transfer = TransferBase(ring.start("READ", LOCAL, REMOTE, {}, hold=False, wait_s=0.0))
        with pytest.raises(InvalidState, match="cannot be posted"):
            ring.post(transfer, 0.0)
        assert len(server.seen) == 1


def late(stub: RingStub, entry: tuple[int, ...]) -> None:
    """Say nothing of a post's acceptance; refuse the second transfer's when nobody waits for it any more."""
    if entry[1] == POST:
        assert not entry[4] & 2
        if entry[6] == 0x1002:
            time.sleep(0.05)  # longer than it is waited for
            stub.tell(entry[0], Kind.REFUSED, detail=wire.error_to_detail(Stale("gone")).SerializeToString())
    elif entry[1] == CANCEL:
        assert entry[6] == 0
        stub.tell(entry[0], Kind.REFUSED, detail=wire.error_to_detail(NotFound("none")).SerializeToString())
    else:
        done(stub, entry)


def test_a_post_that_waits_is_not_told_of_its_acceptance_and_asks_for_it_when_its_time_is_over(stub, ring):
    """A refusal would have come before the answer to what was submitted later."""
    with Server(stub, late) as server:
        first, second = (TransferBase(ring.start("READ", LOCAL, REMOTE, {}, hold=True, wait_s=0.0)) for _ in range(2))
        track = ring.post(first, 0.01)
        assert track.status.state is t.TransferState.POSTED
        assert [entry[1] for entry in server.seen[2:]] == [POST, CANCEL]
        with pytest.raises(Stale, match="gone"):
            ring.post(second, 0.01)


def test_a_full_queue_is_waited_for(stub, ring):
    """32 submissions at once into 16 slots, of a daemon that takes three at a time."""

    def slow(stub: RingStub) -> None:
        left = 32
        while left:
            for entry in stub.take(3):
                stub.tell(entry[0], transfer=entry[-1], signals=left % 5 == 0)
                left -= 1
            time.sleep(0.001)
        stub.wake()

    daemon = threading.Thread(target=slow, args=(stub,))
    daemon.start()
    results = in_threads(32, lambda _: ring.run(READ, LOCAL, REMOTE, {}).status.state)
    daemon.join(20)
    assert results == [t.TransferState.DONE] * 32


def test_closing_wakes_all_who_wait(stub, ring):
    threads = [
        threading.Thread(target=lambda: outcomes.append(_error(lambda: ring.run(READ, LOCAL, REMOTE, {}))))
        for _ in range(4)
    ]
    outcomes: list[XferdError | None] = []
    for thread in threads:
        thread.start()
    while len(stub.take()) + stub.taken < 4:
        time.sleep(0.001)
    ring.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [type(outcome) for outcome in outcomes] == [Closed] * 4
    with pytest.raises(Closed):
        ring.run(READ, LOCAL, REMOTE, {})
    ring.close()


def _error(work) -> XferdError | None:
    try:
        work()
    except XferdError as exc:
        return exc
    return None


@pytest.mark.parametrize("end", ["closed", "session", "dead"])
def test_a_lost_ring_names_why_and_leaves_known_transfers_to_grpc(stub, ring, end):
    with Server(stub, lambda stub, e: e[4] & 2 and stub.tell(e[0], Kind.ACCEPTED, transfer=e[-1], state=2)):
        known = ring.start("READ", LOCAL, REMOTE, {}, hold=False, wait_s=0.0)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(ring.wait([known], None, any_of=False))),
        threading.Thread(target=lambda: results.append(_error(lambda: ring.run(READ, LOCAL, REMOTE, {})))),
    ]
    for thread in threads:
        thread.start()
    while stub.taken < 2:
        stub.take()
        time.sleep(0.001)
    if end != "dead":
        reason = wire.error_to_detail(ProtocolViolation("opcode 9")).SerializeToString() if end == "closed" else b""
        stub.set_state(RingState.CLOSED, reason)
        stub.wake()
    stub.hang_up()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    [error] = [result for result in results if result is not False]
    assert len(results) == 2
    assert isinstance(error, Unavailable)
    assert ("opcode 9" if end == "closed" else "the daemon stops") in str(error)
    assert not ring.is_usable
    assert ring.run(READ, LOCAL, REMOTE, {}) is None
    assert ring.tracks_to_wait([TransferBase(known)]) is None


def test_a_sleeper_does_not_spin_and_a_spinner_learns_when_not_to(stub):
    ring = SyncRing(stub.ring(), StillSocket(), spin_us=200.0)  # type: ignore[arg-type]
    try:
        for handle in (5, 6):
            ring.know_list(prepared(handle))
        if len(os.sched_getaffinity(0)) > 1:
            assert ring._spin_s == pytest.approx(200e-6)
            with Server(stub, lambda stub, e: (time.sleep(0.005), done(stub, e))):
                for _ in range(12):
                    ring.run(READ, LOCAL, REMOTE, {})
            assert ring._spin_s < 5e-6
    finally:
        ring.close()


def test_notifications_are_waited_for_with_leave_given_once(stub, ring):
    with Server(stub, done) as server:
        ring.listen()
        while not server.seen:
            time.sleep(0.001)
        assert ring.notifications(0.0, 10) == ([], None)
        assert ring.notifications(0.02, 10) == ([], None)
        note = pb.Notification(payload=b"hello").SerializeToString()
        timer = threading.Timer(0.02, lambda: stub.tell(1, Kind.NOTIFICATION, detail=note))
        timer.start()
        taken, cut = ring.notifications(20.0, 10)
        timer.join()
        assert ([n.payload for n in taken], cut) == ([b"hello"], None)
        [(_, opcode, *_)] = server.seen
        assert opcode == LISTEN


# ------------------------------------------------------------------------------------ on a loop


@contextlib.asynccontextmanager
async def on_loop(stub: RingStub):
    ring = AsyncRing(stub.ring(), AsyncStillSocket())  # type: ignore[arg-type]
    for handle in (5, 6):
        ring.know_list(prepared(handle))
    try:
        yield ring
    finally:
        ring.close()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the stub has no events
            await asyncio.sleep(0.001)


async def test_tasks_share_a_doorbell_and_get_their_own_answers(stub):
    async with on_loop(stub) as ring:
        tasks = [asyncio.ensure_future(ring.run(READ, LOCAL, REMOTE, {})) for _ in range(10)]
        await until(lambda: len(ring._ring.asks) == 10)
        assert stub.doorbells() == 1
        for entry in reversed(stub.take()):
            stub.tell(entry[0], transfer=entry[-1])
        tracks = await asyncio.gather(*tasks)
        assert [int(track.id, 16) for track in tracks] == list(range(1, 11))


async def test_an_option_that_no_transfer_knows_is_refused_on_a_loop_too(stub):
    async with on_loop(stub) as ring:
        with pytest.raises(TypeError, match=r"'bakend'.*backend, cause_id"):
            await ring.run(READ, LOCAL, REMOTE, {"bakend": "local"})
        with pytest.raises(TypeError, match="'bakend'"):
            await ring.start("READ", LOCAL, REMOTE, {"bakend": "local"}, hold=True, wait_s=0.0)
        assert stub.take() == []


async def test_more_tasks_than_slots_are_served_in_their_order(stub):
    with Server(stub, done) as server:
        async with on_loop(stub) as ring:
            tracks = await asyncio.gather(
                *(ring.run(READ, LOCAL, REMOTE, {"timeout_s": i / 1000}) for i in range(1, 101))
            )
    assert len({track.id for track in tracks}) == 100
    assert [entry[5] for entry in server.seen] == list(range(1, 101))


async def test_a_post_that_waits_on_a_loop_asks_for_its_acceptance_when_its_time_is_over(stub):
    with Server(stub, late) as server:
        async with on_loop(stub) as ring:
            first, second = [
                TransferBase(await ring.start("READ", LOCAL, REMOTE, {}, hold=True, wait_s=0.0)) for _ in range(2)
            ]
            track = await ring.post(first, 0.01)
            assert track.status.state is t.TransferState.POSTED
            assert [entry[1] for entry in server.seen[2:]] == [POST, CANCEL]
            with pytest.raises(Stale, match="gone"):
                await ring.post(second, 0.01)


async def test_a_cancelled_wait_leaves_the_rest_alone(stub):
    async with on_loop(stub) as ring:
        first, second = (asyncio.ensure_future(ring.run(READ, LOCAL, REMOTE, {})) for _ in range(2))
        await until(lambda: len(ring._ring.asks) == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for entry in stub.take():
            stub.tell(entry[0], transfer=entry[-1])
        assert int((await second).id, 16) == 2
        assert not ring._ring.asks


async def test_any_all_and_deadlines_on_a_loop(stub):
    with Server(stub, lambda stub, e: e[4] & 2 and stub.tell(e[0], Kind.ACCEPTED, transfer=e[-1], state=2)):
        async with on_loop(stub) as ring:
            tracks = [await ring.start("READ", LOCAL, REMOTE, {}, hold=False, wait_s=0.0) for _ in range(3)]
            assert await ring.wait(tracks, 0.02, any_of=False)
            assert await ring.wait(tracks, 0.0, any_of=True)
            assert not any(track.has_ended for track in tracks)
            stub.tell(3, transfer=3)
            assert await ring.wait(tracks, 20, any_of=True)
            assert [track.has_ended for track in tracks] == [False, False, True]
            asyncio.get_running_loop().call_later(0.01, lambda: (stub.tell(1, transfer=1), stub.tell(2, transfer=2)))
            assert await ring.wait(tracks, 20, any_of=False)


@pytest.mark.parametrize("end", ["closed", "session", "dead", "close"])
async def test_a_lost_ring_on_a_loop(stub, end):
    async with on_loop(stub) as ring:
        task = asyncio.ensure_future(ring.run(READ, LOCAL, REMOTE, {}))
        await until(lambda: len(ring._ring.asks) == 1)
        if end == "close":
            ring.close()
            with pytest.raises(Closed):
                await task
            return
        if end != "dead":
            reason = wire.error_to_detail(ProtocolViolation("opcode 9")).SerializeToString() if end == "closed" else b""
            stub.set_state(RingState.CLOSED, reason)
            stub.wake()
        stub.hang_up()
        with pytest.raises(Unavailable, match="opcode 9" if end == "closed" else "the daemon stops"):
            await task
        assert await ring.run(READ, LOCAL, REMOTE, {}) is None


async def test_notifications_on_a_loop(stub):
    async with on_loop(stub) as ring:
        await ring.listen()
        assert await ring.notifications(0.01, 10) == ([], None)
        note = pb.Notification(payload=b"hello").SerializeToString()
        asyncio.get_running_loop().call_later(0.01, lambda: stub.tell(1, Kind.NOTIFICATION, detail=note))
        taken, _ = await ring.notifications(20.0, 10)
        assert [n.payload for n in taken] == [b"hello"]
