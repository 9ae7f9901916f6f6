"""The client's side of a ring, against a daemon's side that is the test: entries, room, order, and what is told."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from ring_stub import CANCELLED, DONE, FAILED, POSTED, PREPARED, SMALL, RingStub

from xferd.api import ring as layout, types as t, wire
from xferd.api.errors import (
    InvalidState,
    NotFound,
    OutOfBounds,
    ProtocolViolation,
    Stale,
    Unavailable,
    XferdError,
)
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.proto.session_v1_pb2 import RingOptions
from xferd.api.ring import CompletionFlag, Kind, Opcode, RingSizes, RingState, SubmissionFlag
from xferd.clients._ring import Arena, Ring
from xferd.clients._ring_base import RingBase, needs_poll
from xferd.clients._ring_tracks import Ask, CutNote, RingHome, Track
from xferd.clients.transfers import PreparedBase

HOPS = (t.Hop("local", "DRAM@node-a", "DRAM@node-a", "near"),)


def route_detail(hops: tuple[t.Hop, ...] = HOPS) -> bytes:
    telemetry = pb.Telemetry(route=wire.hops_to_messages(hops))
    return pb.TransferStatus(telemetry=telemetry).SerializeToString()


def failed_detail(track_id: str, error: XferdError, state: t.TransferState = t.TransferState.FAILED) -> bytes:
    telemetry = t.Telemetry(1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 4096, 17, 2, 2, 1, 1, HOPS)
    status = t.TransferStatus(
        t.TransferId(track_id),
        "",
        t.TransferOp.READ,
        state,
        t.Priority.NORMAL,
        "c",
        "node-a",
        "node-b",
        "me",
        error if state is t.TransferState.FAILED else None,
        telemetry,
    )
    return wire.status_to_message(status).SerializeToString()


@pytest.fixture
def stub():
    with RingStub() as stub:
        yield stub


@pytest.fixture
def ring(stub):
    ring = stub.ring()
    yield ring
    ring.close()


def new_track(ring: Ring, **changes: str) -> Track:
    fields = {"remote_node": "node-b", "key": "", "cause_id": ""} | changes
    return Track(ring.home, t.TransferOp.READ, t.Priority.HIGH, **fields)


def put_submit(ring: Ring, ask: Ask | None = None, **fields: object) -> bool:
    return ring.put(ask, int(Opcode.SUBMIT), 5, 6, 1, **fields)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ opening


def test_what_is_no_ring_is_refused_and_its_descriptors_closed(stub):
    def fds() -> list[int]:
        return [os.dup(fd) for fd in stub.client_fds]

    def refused(given: list[int], nbytes: int) -> None:
        with pytest.raises(ProtocolViolation):
            Ring(given, nbytes, RingHome("n", "a"))
        for fd in given:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    refused(fds()[:2], stub.layout.nbytes)
    refused(fds(), stub.layout.nbytes + 4096)  # more than the memfd has: touching it would kill
    refused(fds(), stub.layout.nbytes - 4096)
    refused(fds(), 100)
    stub.memory[0:1] = b"x"
    refused(fds(), stub.layout.nbytes)
    for fd in stub.client_fds:
        os.close(fd)


def test_closing_gives_back_mapping_and_descriptors(stub):
    before = len(list(Path("/proc/self/fd").iterdir()))
    ring = stub.ring()
    ring.close()
    ring.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - len(stub.client_fds)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum("stub-ring" in line for line in maps) == 1  # the stub's own


# ------------------------------------------------------------------------------------ submissions


def test_a_submission_stands_as_the_page_says(stub, ring):
    index = np.array([77, 3], dtype="<u4")
    assert put_submit(ring, Ask(), local=np.array([0, 1], dtype="<u4"), remote=index, options=b"opt", timeout_ms=250)
    assert stub.doorbells() == 0
    ring.ring()
    assert stub.doorbells() == 1
    [entry] = stub.take()
    user_data, opcode, op, priority, flags, timeout_ms, a, b, at, n, remote_at, m, options_at, k, number = entry
    assert (opcode, op, priority, flags, timeout_ms, a, b, number) == (1, 1, 0, 0, 250, 5, 6, 1)
    assert user_data in ring.asks
    assert stub.arena(at, 4 * n) == np.array([0, 1], dtype="<u4").tobytes()
    assert stub.arena(remote_at, 4 * m) == index.tobytes()
    assert stub.arena(options_at, k) == b"opt"
    assert at % 4 == remote_at % 4 == 0


def test_slots_are_used_again_only_when_they_are_free(stub, ring):
    for _ in range(4):
        assert put_submit(ring)
    assert not put_submit(ring)
    assert len(stub.take(1)) == 1
    assert put_submit(ring)
    assert not put_submit(ring)
    assert [entry[-1] for entry in stub.take()] == [2, 3, 4, 5]


def test_arena_that_the_daemon_has_not_passed_is_not_used_again(stub, ring):
    rows = np.arange(600, dtype="<u4")  # 2400 of 4096 bytes
    assert put_submit(ring, remote=rows)
    assert not put_submit(ring, remote=rows)
    [entry] = stub.take()
    assert put_submit(ring, remote=rows + 1)
    assert stub.arena(entry[10], 2400) == (rows + 1).tobytes()  # it is the client's again, all of it


@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 3)), max_size=60))
@example([(2048, 0), (2040, 0), (16, 1)])  # less is left before the end than is wanted
def test_rooms_in_the_arena_never_overlap(steps):
    arena = Arena(4096)
    passed = number = 0
    live: dict[int, range] = {}
    for nbytes, taken in steps:
        passed = min(passed + taken, number)
        live = {n: room for n, room in live.items() if n > passed}
        place = arena.take(nbytes, number + 1, passed)
        if place < 0:
            assert live, "an empty arena has room for all that fits"
            continue
        number += 1
        room = range(place, place + nbytes)
        assert place >= 0
        assert room.stop <= 4096
        assert place % 8 == 0
        assert all(room.stop <= other.start or other.stop <= room.start for other in live.values())
        live[number] = room


# ------------------------------------------------------------------------------------ completions


def test_a_completion_is_there_with_its_number_and_not_before(stub, ring):
    ask = Ask(new_track(ring))
    put_submit(ring, ask)
    stub.tell(1, signals=False)
    at = stub.layout.cq_at + layout.NUMBER_OF_COMPLETION_AT
    stub.set_word(at, 0)
    assert ring.reap() == 0
    stub.set_word(at, 9)  # of another round
    assert ring.reap() == 0
    stub.set_word(at, 1)
    assert ring.reap() == 1
    assert ask.is_over
    assert stub.read == 1


def test_reading_at_rest_makes_no_system_call(stub, ring, monkeypatch):
    ask = Ask(new_track(ring))
    put_submit(ring, ask)
    ring.ring()
    stub.take()
    stub.tell(1)

    def fail(*_: object) -> None:
        raise AssertionError("a system call")

    with monkeypatch.context() as patch:
        for name in ("read", "write", "fstat", "getpid"):
            patch.setattr(os, name, fail)
        assert ring.reap() == 1
        assert ask.track is not None
        assert ask.track.status.state is t.TransferState.DONE


def test_the_doorbell_is_rung_again_when_the_daemon_lags_behind(stub, ring):
    for _ in range(3):
        put_submit(ring)
    ring.ring()
    stub.take(2)
    stub.doorbells()
    stub.tell(1)
    ring.reap()
    assert stub.doorbells() == 1
    stub.take()
    stub.tell(2)
    ring.reap()
    assert stub.doorbells() == 0


def test_many_rounds_of_both_queues(stub, ring):
    for turn in range(50):
        asks = [Ask(new_track(ring)) for _ in range(3)]
        assert all(put_submit(ring, ask) for ask in asks)
        for entry in reversed(stub.take()):
            stub.tell(entry[0], transfer=entry[-1])
        assert ring.reap() == 3
        assert all(ask.is_over for ask in asks)
        assert stub.read == 3 * (turn + 1)
        assert [int(ask.track.id, 16) for ask in asks if ask.track] == [3 * turn + 1, 3 * turn + 2, 3 * turn + 3]
    assert not ring.asks


def test_an_end_carries_all_numbers_and_the_route_is_told_once(stub, ring):
    first, second = Ask(new_track(ring)), Ask(new_track(ring, key="k", cause_id="why"))
    put_submit(ring, first)
    put_submit(ring, second)
    stub.tell(1, flags=CompletionFlag.ROUTE, route=1, detail=route_detail())
    stub.tell(2, transfer=0xDEF, route=1)
    ring.reap()
    assert first.track is not None
    assert second.track is not None
    assert first.track.status == t.TransferStatus(
        t.TransferId("0000000000000abc"),
        "",
        t.TransferOp.READ,
        t.TransferState.DONE,
        t.Priority.HIGH,
        "0000000000000abc",
        "node-a",
        "node-b",
        "me",
        None,
        t.Telemetry(1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 4096, 4096, 2, 2, 1, 1, HOPS),
    )
    status = second.track.status
    assert (status.key, status.cause_id, status.telemetry.route) == ("k", "why", HOPS)
    assert not needs_poll(first.track)
    assert not needs_poll(second.track)


def test_a_route_without_a_number_is_told_each_time(stub, ring):
    asks = [Ask(new_track(ring)) for _ in range(2)]
    for ask in asks:
        put_submit(ring, ask)
    stub.tell(1, flags=CompletionFlag.ROUTE, detail=route_detail())
    stub.tell(2)
    ring.reap()
    assert [ask.track.status.telemetry.route for ask in asks if ask.track] == [HOPS, ()]
    assert ring.home.routes == {}


def test_a_failure_is_told_whole(stub, ring):
    ask = Ask(new_track(ring))
    put_submit(ring, ask)
    error = OutOfBounds("row 3", limit="2", remedy="count again")
    stub.tell(1, state=FAILED, flags=CompletionFlag.STATUS, detail=failed_detail("0000000000000abc", error))
    ring.reap()
    assert ask.track is not None
    status = ask.track.status
    assert (status.state, str(status.error), status.telemetry.moved_nbytes) == (t.TransferState.FAILED, str(error), 17)
    assert not needs_poll(ask.track)


@pytest.mark.parametrize(
    ("state", "flags", "detail", "route"),
    [
        (FAILED, CompletionFlag.CUT, b"", 0),
        (CANCELLED, CompletionFlag.CUT, b"", 0),
        (DONE, CompletionFlag.CUT, b"", 0),
        (DONE, CompletionFlag(0), b"", 7),  # a number that was never told
        (FAILED, CompletionFlag.STATUS, b"\xff\xff", 0),  # no message
        (DONE, CompletionFlag.ROUTE, b"\xff", 0),
    ],
)
def test_what_does_not_fit_is_asked_for(stub, ring, state, flags, detail, route):
    ask = Ask(new_track(ring))
    put_submit(ring, ask)
    stub.tell(1, state=state, flags=flags, detail=detail, route=route)
    ring.reap()
    track = ask.track
    assert track is not None
    assert track.has_ended
    assert needs_poll(track)
    assert (track.status.error is not None) == (state == FAILED)
    whole = wire.status_from_message(
        pb.TransferStatus.FromString(failed_detail(track.id, NotFound("x"), track.status.state))
    )
    track.status = whole
    assert track.status == whole


def test_an_acceptance_tells_the_id_and_no_end(stub, ring):
    ask = Ask(new_track(ring))
    held = Ask(new_track(ring), is_held=True)
    put_submit(ring, ask, flags=int(SubmissionFlag.TELL_ACCEPTED))
    put_submit(ring, held, flags=int(SubmissionFlag.HOLD))
    stub.tell(1, Kind.ACCEPTED, state=DONE)  # it is over already; that is told next
    stub.tell(2, Kind.ACCEPTED, state=PREPARED, transfer=2)
    ring.reap()
    assert (ask.is_accepted, ask.is_over) == (True, False)
    assert (held.is_accepted, held.is_over) == (True, True)
    assert ask.track is not None
    assert held.track is not None
    assert ask.track.status.state is t.TransferState.POSTED
    assert not ask.track.has_ended
    assert held.track.status.state is t.TransferState.PREPARED
    stub.tell(1)
    ring.reap()
    assert ask.track.has_ended
    assert not ring.asks


def test_a_post_shows_as_posted_until_the_ring_tells_its_own_end(stub, ring):
    track = new_track(ring)
    first = Ask(track)
    put_submit(ring, first)
    stub.tell(1)
    ring.reap()
    again = Ask(track)
    track.post(again)
    assert (track.status.state, track.has_ended) == (t.TransferState.POSTED, False)
    assert (track.status.telemetry.posts, track.status.telemetry.moved_nbytes) == (2, 0)
    ring.put(again, int(Opcode.POST), 0xABC)
    stub.tell(2, Kind.ACCEPTED, state=POSTED)
    ring.reap()
    assert track.status.state is t.TransferState.POSTED
    running = track.status
    stub.tell(2, posts=2)
    ring.reap()
    track.status = running  # what gRPC had said a moment before
    assert (track.status.state, track.status.telemetry.posts) == (t.TransferState.DONE, 2)


def test_a_refused_post_leaves_the_transfer_as_it_was(stub, ring):
    base = RingBase(ring)
    track = new_track(ring)
    put_submit(ring, Ask(track))
    stub.tell(1)
    ring.reap()
    before = track.status
    ask = Ask(track)
    track.post(ask)
    ring.put(ask, int(Opcode.POST), 0xABC)
    stub.tell(2, Kind.REFUSED, detail=wire.error_to_detail(Stale("gone")).SerializeToString())
    ring.reap()
    with pytest.raises(Stale, match="gone"):
        base._is_posted(track, ask)
    assert track.status == before


def test_completions_that_nobody_asked_for_are_passed_over(stub, ring):
    stub.tell(99)
    stub.tell(0, Kind.REFUSED, detail=b"\xff")
    stub.tell(5, Kind(4), detail=pb.Notification(payload=b"x").SerializeToString())
    assert ring.reap() == 3
    assert len(ring.notes) == 1


def test_notifications_come_in_their_order_with_those_that_do_not_fit(stub, ring):
    base = RingBase(ring)
    for payload in (b"1", b"2"):
        stub.tell(1, Kind.NOTIFICATION, detail=pb.Notification(payload=payload).SerializeToString())
    stub.tell(1, Kind.NOTIFICATION, flags=CompletionFlag.CUT)
    stub.tell(1, Kind.NOTIFICATION, detail=pb.Notification(payload=b"4").SerializeToString())
    ring.reap()
    taken, cut = base._take_notes(1)
    assert ([n.payload for n in taken], cut) == ([b"1"], None)
    taken, cut = base._take_notes(100)
    assert ([n.payload for n in taken], cut) == ([b"2"], None)
    taken, cut = base._take_notes(100)
    assert taken == []
    assert isinstance(cut, CutNote)
    assert base._take_notes(100)[1] is cut  # until gRPC has taken it
    base.forget_cut(cut)
    base.forget_cut(cut)  # another thread that did the same takes nothing away
    taken, cut = base._take_notes(100)
    assert ([n.payload for n in taken], cut) == ([b"4"], None)


def test_leave_for_notifications_is_renewed_before_it_is_used_up(stub, ring):
    base = RingBase(ring)
    assert base._credits_wanted() == 2  # a quarter of eight
    ring.allowed += 2
    assert base._credits_wanted() == 0
    for _ in range(2):
        stub.tell(1, Kind.NOTIFICATION, detail=pb.Notification(payload=b"x").SerializeToString())
    ring.reap()
    assert base._credits_wanted() == 0  # nobody has taken them
    base._take_notes(10)
    assert base._credits_wanted() == 2


# ------------------------------------------------------------------------------------ the end


def test_a_closed_ring_names_the_reason_and_loses_what_was_asked(stub, ring):
    answered, lost = Ask(new_track(ring)), Ask(new_track(ring))
    put_submit(ring, answered)
    put_submit(ring, lost)
    stub.tell(1)
    stub.set_state(RingState.CLOSED, wire.error_to_detail(ProtocolViolation("opcode 9")).SerializeToString())
    assert not put_submit(ring)
    error = ring.check()
    assert isinstance(error, Unavailable)
    assert "opcode 9" in str(error)
    assert isinstance(error.__cause__, ProtocolViolation)
    assert answered.is_over
    assert not answered.is_lost
    assert lost.is_lost
    assert ring.arrival.is_lost
    assert not ring.is_session_over
    with pytest.raises(Unavailable):
        put_submit(ring)


@pytest.mark.parametrize("reason", [b"\xff\xff\xff", b"\0" * 3000])
def test_a_reason_that_cannot_be_read_is_no_harm(stub, ring, reason):
    stub.set_state(RingState.CLOSED, reason)
    assert isinstance(ring.check(), Unavailable)


def test_a_length_of_the_reason_that_lies_is_no_harm(stub, ring):
    stub.set_word(layout.STATE_AT, 2 | 0xFFFFFFFF << 32)
    assert isinstance(ring.check(), Unavailable)


def test_a_ring_closed_without_a_reason_is_a_session_at_its_end(stub, ring):
    stub.set_state(RingState.CLOSED)
    assert ring.check() is not None
    assert ring.is_session_over


def test_the_end_of_the_signals_is_seen(stub, ring):
    assert ring.drain()
    stub.wake()
    assert ring.drain()
    stub.hang_up()
    assert not ring.drain()
    ring.ring()  # nobody reads it: no matter


def test_a_full_doorbell_is_as_good_as_a_rung_one(stub, ring):
    for _ in range(70_000):
        ring.ring()
    assert stub.doorbells()


@settings(max_examples=50)
@given(
    st.lists(st.binary(min_size=1, max_size=128), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, SMALL.cq_entries * 128 - 1), st.binary(min_size=1, max_size=64)), max_size=20),
)
def test_rubbish_from_the_daemon_raises_nothing_strange(details, patches):
    with RingStub() as stub:
        ring = stub.ring()
        try:
            tracks = [new_track(ring) for _ in details]
            for number, (track, detail) in enumerate(zip(tracks, details, strict=True), 1):
                ask = Ask(track)
                ring.asks[number] = ask
                stub.tell(
                    number, Kind(1 + number % 4), flags=CompletionFlag(number % 8), detail=detail, route=number % 3
                )
            for at, data in patches:
                place = stub.layout.cq_at + min(at, SMALL.cq_entries * 128 - len(data))
                stub.memory[place : place + len(data)] = data
            ring.reap()
            for track in tracks:
                if track.has_ended:
                    assert isinstance(track.status, t.TransferStatus)
        finally:
            ring.close()


# ------------------------------------------------------------------------------------ what goes over it


@pytest.fixture
def base(ring):
    base = RingBase(ring)
    for handle, node in ((5, "node-a"), (6, "node-b")):
        base.know_list(t.PreparedInfo(t.PreparedHandle(handle), node, 1, 100, 409600))
    return base


def prepared(handle: int) -> PreparedBase:
    return PreparedBase(t.PreparedInfo(t.PreparedHandle(handle), "node-b", 1, 100, 409600))


def test_a_request_becomes_a_submission_with_its_options(base, ring):
    options = {
        "key": "k",
        "timeout_s": 0.25,
        "priority": t.Priority.HIGH,
        "notification": ("bob@b", b"done"),
        "backend": "tcp",
        "durable": True,
    }
    made = base._submission("WRITE", prepared(5), prepared(6).select([3, 4]), options, 2)
    assert made is not None
    track, (opcode, a, b, op, priority, flags, timeout_ms, local, remote, extra) = made
    assert (opcode, a, b, op, priority, flags, timeout_ms, local) == (1, 5, 6, 2, 3, 2, 250, None)
    assert remote.tolist() == [3, 4]
    message = RingOptions.FromString(extra)
    assert (message.key, message.backend, message.notification.payload) == ("k", "tcp", b"done")
    assert (message.verify, message.durable) == (False, True)
    assert (track.remote_node, track.key, track.priority) == ("node-b", "k", t.Priority.HIGH)
    made = base._submission(t.TransferOp.READ, prepared(5), prepared(6), {}, 0)
    assert made is not None
    assert made[1][-1] == b""


@pytest.mark.parametrize(
    ("local", "remote", "options"),
    [
        (prepared(5), prepared(7), {}),  # not of this client, or released
        (prepared(7), prepared(6), {}),
        (prepared(5).select(np.zeros(0, int)), prepared(6), {}),  # 0 rows would be all of them
        (prepared(5).select(np.zeros(600, int)), prepared(6).select(np.zeros(600, int)), {}),  # larger than the arena
        (prepared(5), prepared(6), {"notification": ("b", bytes(5000))}),
        (prepared(5), prepared(6), {"timeout_s": 0.0001}),  # not a number of milliseconds
        (prepared(5), prepared(6), {"timeout_s": 0.0015}),
        (prepared(5), prepared(6), {"timeout_s": -1.0}),
        (prepared(5), prepared(6), {"timeout_s": float("nan")}),
        (prepared(5), prepared(6), {"timeout_s": 5_000_000.0}),
        (prepared(5), prepared(6), {"key": 7}),
        (prepared(5), prepared(6), {"key": "k", "cause_id": "c"}),
    ],
)
def test_what_does_not_fit_is_left_to_grpc(base, local, remote, options):
    assert base._submission("READ", local, remote, options, 0) is None


def test_a_released_list_is_left_to_grpc(base):
    assert base._submission("READ", prepared(5), prepared(6), {}, 0) is not None
    base.forget_list(6)
    assert base._submission("READ", prepared(5), prepared(6), {}, 0) is None


def test_a_child_of_fork_does_not_touch_its_parents_ring(stub, ring):
    put_submit(ring, Ask(new_track(ring)))
    stub.tell(1)
    pid = os.fork()
    if not pid:  # only looks and leaves: nothing of pytest may run here
        status = 1
        try:
            ring.put(None, int(Opcode.POST), 1)
        except InvalidState:
            status = 0 if ring.reap() == 0 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ring.reap() == 1


def test_submitting_and_reading_from_two_threads(stub, ring):
    """The daemon's side runs in a third: nothing is lost and nothing is told twice."""
    count = 2000
    asks = [Ask(new_track(ring)) for _ in range(count)]
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if stub.told - stub.read < SMALL.cq_entries:
                for entry in stub.take(1):
                    stub.tell(entry[0], transfer=entry[-1], signals=False)
            time.sleep(0)  # gives the interpreter away; so below

    def read() -> None:
        while not all(ask.is_over for ask in asks) and not stop.is_set():
            ring.reap()
            time.sleep(0)

    threads = [threading.Thread(target=work) for work in (serve, read)]
    for thread in threads:
        thread.start()
    try:
        for ask in asks:
            while not put_submit(ring, ask):
                time.sleep(0)
        threads[1].join(60)
        assert not threads[1].is_alive()
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert [int(ask.track.id, 16) for ask in asks if ask.track] == list(range(1, count + 1))


def test_sizes_reach_the_layout():
    sizes = RingSizes(sq_entries=2, cq_entries=2, detail_nbytes=256, arena_nbytes=4096)
    with RingStub(sizes) as stub:
        ring = stub.ring()
        assert ring.layout.sizes == sizes
        ring.close()
