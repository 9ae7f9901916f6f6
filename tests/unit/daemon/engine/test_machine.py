"""The machine ends every transfer exactly once, never DONE with a byte missing, and never with a chunk in flight."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidState,
    MoveFailed,
    PermissionDenied,
    ShortTransfer,
)
from xferd.api.types import ENDED, Hop, Notification, Priority, SessionId, TransferId, TransferOp, TransferState
from xferd.daemon.engine import machine as machine_module
from xferd.daemon.engine.machine import (
    AbortChunks,
    Ended,
    SendNotification,
    Settle,
    StartChunk,
    Transfer,
    TransferMachine,
)
from xferd.daemon.engine.plan import ChunkRef, Leg, Plan, Route
from xferd.daemon.engine.scheduler import Scheduler
from xferd.plugins.base import Extent, MappedSpace

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def route(name: str, *, slots: int = 2, restartable: bool = True) -> Route:
    return Route((Hop(name, "here", "there", "test"),), 1.0, (name, ""), slots, restartable)


def plan(*legs: tuple[int, tuple[Route, ...]], chunk_nbytes: int = 10) -> Plan:
    made = []
    for chunks, routes in legs:
        nbytes = chunks * chunk_nbytes
        extent = Extent(MappedSpace(), np.array([[4096, nbytes]], dtype=np.uint64))
        made.append(Leg(extent, extent, tuple(range(0, nbytes + 1, chunk_nbytes)), routes))
    total = sum(leg.cuts[-1] for leg in made)
    return Plan(tuple(made), total, 2, 2, (), (), (), "")


def transfer(a_plan: Plan, name: str = "t", notification: Notification | None = None) -> Transfer:
    return Transfer(
        id=TransferId(name),
        session=SessionId("s"),
        agent="a",
        key="",
        op=TransferOp.READ,
        priority=Priority.NORMAL,
        cause_id="c",
        local_node="n",
        remote_node="n",
        timeout_s=1.0,
        notification=notification,
        plan=a_plan,
        created_at=0.0,
    )


@pytest.fixture
def machine():
    machine = TransferMachine(Scheduler())
    yield machine
    machine.check_invariants()


def started(instructions) -> list[ChunkRef]:
    return [i.chunk for i in instructions if isinstance(i, StartChunk)]


def ended(instructions) -> bool:
    return any(isinstance(i, Ended) for i in instructions)


def test_chunks_are_started_as_slots_allow_and_the_last_one_ends_it(machine) -> None:
    t = transfer(plan((3, (route("r"),))))
    machine.add(t)
    first = machine.post(t, 1.0)
    assert started(first) == [ChunkRef(0, 0), ChunkRef(0, 1)]
    assert t.state is TransferState.RUNNING
    then = machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0)
    assert started(then) == [ChunkRef(0, 2)]
    assert not ended(machine.chunk_done(t, ChunkRef(0, 2), 10, 3.0))
    assert ended(machine.chunk_done(t, ChunkRef(0, 1), 10, 4.0))
    status = t.status()
    assert (status.state, status.telemetry.moved_nbytes) == (TransferState.DONE, 30)
    assert (status.telemetry.first_byte_at, status.telemetry.moving_s) == (2.0, 3.0)


def test_what_a_chunk_costs_does_not_grow_with_the_number_of_legs() -> None:
    """A write of many objects has a leg for each: those that are done must not be looked at for each of the others."""

    def lines_run(legs: int) -> int:
        machine, lines = TransferMachine(Scheduler()), 0
        t = transfer(plan(*[(1, (route("r", slots=1),))] * legs))
        machine.add(t)
        before = sys.gettrace()

        def count(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
            nonlocal lines
            lines += event == "line" and frame.f_code.co_filename == machine_module.__file__
            return count

        chunks = started(machine.post(t, 1.0))
        sys.settrace(count)
        try:
            while chunks:
                chunks = started(machine.chunk_done(t, chunks[0], 10, 2.0))
        finally:
            sys.settrace(before)
        assert t.state is TransferState.DONE
        return lines

    assert lines_run(400) < 5 * lines_run(100)


def test_a_wrong_count_is_not_believed(machine) -> None:
    t = transfer(plan((1, (route("r"),))))
    machine.add(t)
    machine.post(t, 1.0)
    assert ended(machine.chunk_done(t, ChunkRef(0, 0), 9, 2.0))
    assert t.state is TransferState.FAILED
    assert isinstance(t.verdict, ShortTransfer)


def test_a_failed_route_gives_way_to_the_next_and_both_are_told_when_none_is_left(machine) -> None:
    t = transfer(plan((2, (route("one"), route("two")))))
    machine.add(t)
    machine.post(t, 1.0)
    again = machine.chunk_failed(t, ChunkRef(0, 0), MoveFailed("broken"), 2.0)
    assert [i.route.name for i in again] == ["two"]
    # The other chunk of the first route may still succeed.
    machine.chunk_done(t, ChunkRef(0, 1), 10, 2.5)
    assert ended(machine.chunk_failed(t, ChunkRef(0, 0), MoveFailed("broken too"), 3.0))
    assert t.verdict.routes_tried == ("one: broken", "two: broken too")


def test_a_failover_that_works_is_done(machine) -> None:
    t = transfer(plan((1, (route("one"), route("two")))))
    machine.add(t)
    machine.post(t, 1.0)
    machine.chunk_failed(t, ChunkRef(0, 0), MoveFailed("broken"), 2.0)
    assert ended(machine.chunk_done(t, ChunkRef(0, 0), 10, 3.0))
    assert t.state is TransferState.DONE
    assert [hop.backend for hop in t.status().telemetry.route] == ["two"]


def test_a_request_that_is_wrong_is_not_tried_elsewhere(machine) -> None:
    t = transfer(plan((1, (route("one"), route("two")))))
    machine.add(t)
    machine.post(t, 1.0)
    assert ended(machine.chunk_failed(t, ChunkRef(0, 0), PermissionDenied("no"), 2.0))
    assert isinstance(t.verdict, PermissionDenied)


def test_a_route_that_cannot_restart_ends_the_transfer(machine) -> None:
    t = transfer(plan((1, (route("one", restartable=False), route("two")))))
    machine.add(t)
    machine.post(t, 1.0)
    assert ended(machine.chunk_failed(t, ChunkRef(0, 0), MoveFailed("broken"), 2.0))


def test_cancel_ends_only_after_every_chunk_came_to_rest(machine) -> None:
    t = transfer(plan((5, (route("r"),))))
    machine.add(t)
    machine.post(t, 1.0)
    instructions = machine.cancel(t, 2.0)
    assert [type(i) for i in instructions] == [AbortChunks]
    assert t.state is TransferState.RUNNING
    assert not ended(machine.chunk_failed(t, ChunkRef(0, 0), Cancelled("stopped"), 3.0))
    # A chunk that ended well in the meantime changes nothing.
    assert ended(machine.chunk_done(t, ChunkRef(0, 1), 10, 4.0))
    assert t.state is TransferState.CANCELLED


def test_cancel_of_a_held_transfer_and_post_again(machine) -> None:
    t = transfer(plan((1, (route("r"),))))
    machine.add(t)
    assert ended(machine.cancel(t, 1.0))
    machine.post(t, 2.0)
    with pytest.raises(InvalidState):
        machine.post(t, 2.0)
    assert ended(machine.chunk_done(t, ChunkRef(0, 0), 10, 3.0))
    assert machine.cancel(t, 4.0) == []
    assert t.state is TransferState.DONE
    first_wire_id, routes = t.wire_id, t.last_routes
    machine.post(t, 5.0)
    assert t.last_routes is routes, "rings know routes by their tuple"
    assert t.wire_id != first_wire_id
    assert t.status().telemetry.posts == 2
    machine.chunk_done(t, ChunkRef(0, 0), 10, 6.0)


def test_a_deadline_of_an_earlier_post_means_nothing(machine) -> None:
    t = transfer(plan((1, (route("r"),))))
    machine.add(t)
    machine.post(t, 1.0)
    machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0)
    machine.post(t, 3.0)
    assert machine.deadline(t, 1, 4.0) == []
    machine.deadline(t, 2, 5.0)
    machine.chunk_failed(t, ChunkRef(0, 0), Cancelled("stopped"), 6.0)
    assert t.state is TransferState.FAILED
    assert isinstance(t.verdict, DeadlineExceeded)


def test_the_notification_follows_the_last_byte(machine) -> None:
    t = transfer(plan((2, (route("r"),))), notification=Notification("b@n", b"\0"))
    machine.add(t)
    machine.post(t, 1.0)
    assert not [i for i in machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0) if isinstance(i, SendNotification)]
    (send,) = machine.chunk_done(t, ChunkRef(0, 1), 10, 3.0)
    assert isinstance(send, SendNotification)
    assert t.state is TransferState.RUNNING
    assert ended(machine.notified(t, None, 4.0))
    assert t.state is TransferState.DONE


def test_a_transfer_waiting_for_a_slot_starts_when_another_fails(machine) -> None:
    one = transfer(plan((2, (route("r", slots=1),))), "one")
    two = transfer(plan((1, (route("r", slots=1),))), "two")
    machine.add(one)
    machine.add(two)
    machine.post(one, 1.0)
    assert started(machine.post(two, 1.0)) == []
    instructions = machine.chunk_failed(one, ChunkRef(0, 0), PermissionDenied("no"), 2.0)
    assert ended(instructions)
    assert [i.transfer.id for i in instructions if isinstance(i, StartChunk)] == ["two"]
    machine.chunk_done(two, ChunkRef(0, 0), 10, 3.0)


def test_what_surrounds_the_chunks_is_committed_before_the_notification_and_the_end(machine) -> None:
    t = transfer(plan((1, (route("r"),))), notification=Notification("b@n", b"\0"))
    t.is_enclosed = True
    machine.add(t)
    machine.post(t, 1.0)
    assert machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0) == [Settle(t, commit=True)]
    assert t.state is TransferState.RUNNING
    [send] = machine.settled(t, committed=True, error=None, now=3.0)
    assert isinstance(send, SendNotification)
    assert ended(machine.notified(t, None, 4.0))


def test_a_commit_that_fails_fails_the_transfer(machine) -> None:
    t = transfer(plan((1, (route("r"),))))
    t.is_enclosed = True
    machine.add(t)
    machine.post(t, 1.0)
    machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0)
    assert ended(machine.settled(t, committed=True, error=MoveFailed("no room"), now=3.0))
    assert t.state is TransferState.FAILED


def test_a_cancel_during_the_commit_comes_too_late(machine) -> None:
    t = transfer(plan((1, (route("r"),))))
    t.is_enclosed = True
    machine.add(t)
    machine.post(t, 1.0)
    machine.chunk_done(t, ChunkRef(0, 0), 10, 2.0)
    assert machine.cancel(t, 2.5) == []
    assert t.is_active
    assert ended(machine.settled(t, committed=True, error=None, now=3.0))
    assert t.state is TransferState.DONE


def test_a_failed_transfer_is_dropped_before_its_end_and_can_be_posted_again(machine) -> None:
    t = transfer(plan((2, (route("r", restartable=False),))))
    t.is_enclosed = True
    machine.add(t)
    machine.post(t, 1.0)
    [abort] = machine.chunk_failed(t, ChunkRef(0, 0), MoveFailed("broken"), 2.0)
    assert isinstance(abort, AbortChunks)
    assert machine.chunk_failed(t, ChunkRef(0, 1), Cancelled("stopped"), 2.0) == [Settle(t, commit=False)]
    assert ended(machine.settled(t, committed=False, error=None, now=3.0))
    assert t.state is TransferState.FAILED
    assert len(started(machine.post(t, 4.0))) == 2
    machine.chunk_done(t, ChunkRef(0, 0), 10, 5.0)
    assert machine.chunk_done(t, ChunkRef(0, 1), 10, 5.0) == [Settle(t, commit=True)]
    machine.settled(t, committed=True, error=None, now=6.0)
    assert t.state is TransferState.DONE


@given(st.data())
def test_any_order_of_events_ends_every_transfer_once_with_nothing_in_flight(data: st.DataObject) -> None:
    machine = TransferMachine(Scheduler())
    routes = (route("one"), route("two"))
    live = [
        transfer(
            plan(*[(data.draw(st.integers(1, 4)), routes[: data.draw(st.integers(1, 2))]) for _ in range(2)]),
            f"t{n}",
            Notification("b@n", b"x") if data.draw(st.booleans()) else None,
        )
        for n in range(3)
    ]
    flying: list[tuple[Transfer, ChunkRef]] = []
    notifying: list[Transfer] = []
    settling: list[Settle] = []
    committed: dict[TransferId, list[bool]] = {t.id: [] for t in live}
    ends = dict.fromkeys((t.id for t in live), 0)

    def perform(instructions) -> None:
        for i in instructions:
            match i:
                case StartChunk():
                    flying.append((i.transfer, i.chunk))
                case SendNotification():
                    notifying.append(i.transfer)
                case Settle():
                    assert not any(t is i.transfer for t, _ in flying)
                    settling.append(i)
                case Ended():
                    ends[i.transfer.id] += 1

    for t in live:
        t.is_enclosed = data.draw(st.booleans())
        machine.add(t)
        perform(machine.post(t, 0.0))
    for now in range(200):
        machine.check_invariants()
        choices = ["done"] * bool(flying) + ["fail"] * bool(flying) + ["cancel", "deadline"]
        choices += ["notified"] * bool(notifying) + ["settled", "unsettled"] * bool(settling)
        if all(t.state in ENDED for t in live):
            break
        match data.draw(st.sampled_from(choices)):
            case "done":
                t, chunk = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
                perform(machine.chunk_done(t, chunk, 10, float(now)))
            case "fail":
                t, chunk = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
                perform(machine.chunk_failed(t, chunk, MoveFailed("broken"), float(now)))
            case "notified":
                perform(machine.notified(notifying.pop(), None, float(now)))
            case "settled" | "unsettled" as how:
                settle = settling.pop()
                error = MoveFailed("the store") if how == "unsettled" else None
                committed[settle.transfer.id].append(settle.commit and error is None)
                perform(machine.settled(settle.transfer, committed=settle.commit, error=error, now=float(now)))
            case "cancel":
                perform(machine.cancel(data.draw(st.sampled_from(live)), float(now)))
            case "deadline":
                t = data.draw(st.sampled_from(live))
                perform(machine.deadline(t, t.posts, float(now)))
    machine.check_invariants()
    assert not flying
    for t in live:
        assert len(committed[t.id]) == t.is_enclosed
        # What was committed is told as DONE, unless its notification could not be delivered; nothing else is.
        if t.is_enclosed and t.state is TransferState.DONE:
            assert committed[t.id] == [True]
        if committed[t.id] == [True] and t.notification is None:
            assert t.state is TransferState.DONE
    assert all(count == 1 for count in ends.values()), ends
