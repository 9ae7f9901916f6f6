"""Slots are never overdrawn, classes share by weight, transfers of a class take turns."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InternalError
from xferd.api.types import Priority, TransferId
from xferd.daemon.engine.scheduler import MAX_IDLE, WEIGHTS, Scheduler

KEY = ("local", "")


def test_transfers_of_one_class_take_turns() -> None:
    scheduler = Scheduler()
    for name in "abc":
        scheduler.enqueue(KEY, 1, TransferId(name), Priority.NORMAL)
    order = []
    for _ in range(6):
        (turn,) = list(scheduler.take())
        order.append(turn[1])
        scheduler.enqueue(KEY, 1, turn[1], Priority.NORMAL)
        scheduler.free(KEY)
    assert "".join(order) == "abcabc"


def test_classes_share_by_weight_and_low_is_not_starved() -> None:
    scheduler = Scheduler()
    turns = dict.fromkeys(Priority, 0)
    for priority in Priority:
        scheduler.enqueue(KEY, 1, TransferId(priority.value), priority)
    for _ in range(sum(WEIGHTS.values()) * 3):
        (turn,) = list(scheduler.take())
        priority = Priority(turn[1])
        turns[priority] += 1
        scheduler.enqueue(KEY, 1, turn[1], priority)
        scheduler.free(KEY)
    assert turns[Priority.LOW] == pytest.approx(3 * WEIGHTS[Priority.LOW], abs=1)
    assert turns[Priority.NORMAL] == pytest.approx(3 * WEIGHTS[Priority.NORMAL], abs=1)
    assert turns[Priority.HIGH] == pytest.approx(3 * WEIGHTS[Priority.HIGH], abs=2)


def test_of_classes_that_have_come_as_far_the_highest_goes_first() -> None:
    scheduler = Scheduler()
    for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
        scheduler.enqueue(KEY, 3, TransferId(priority.value), priority)
    assert [turn[1] for turn in scheduler.take()] == ["HIGH", "NORMAL", "LOW"]


def test_an_idle_queue_takes_the_slots_of_who_comes_next_and_few_of_them_stay() -> None:
    scheduler = Scheduler()
    for slots in (1, 2):
        for name in "ab":
            scheduler.enqueue(KEY, slots, TransferId(name), Priority.NORMAL)
        assert len(list(scheduler.take())) == slots
        scheduler.remove(TransferId("b"))
        for _ in range(slots):
            scheduler.free(KEY)
    for peer in range(3 * MAX_IDLE):
        scheduler.enqueue(("tcp", str(peer)), 1, TransferId("t"), Priority.NORMAL)
        list(scheduler.take())
        scheduler.free(("tcp", str(peer)))
    assert len(scheduler.busy()) <= MAX_IDLE


def test_a_class_that_was_idle_gets_no_credit() -> None:
    scheduler = Scheduler()
    scheduler.enqueue(KEY, 1, TransferId("low"), Priority.LOW)
    for _ in range(50):
        list(scheduler.take())
        scheduler.enqueue(KEY, 1, TransferId("low"), Priority.LOW)
        scheduler.free(KEY)
    turns = {"low": 0, "late": 0}
    scheduler.enqueue(KEY, 1, TransferId("late"), Priority.NORMAL)
    for _ in range(18):
        (turn,) = list(scheduler.take())
        turns[turn[1]] += 1
        scheduler.enqueue(KEY, 1, turn[1], Priority.LOW if turn[1] == "low" else Priority.NORMAL)
        scheduler.free(KEY)
    assert 1 <= turns["low"] <= 3


def test_giving_a_slot_back_twice_is_a_bug() -> None:
    scheduler = Scheduler()
    scheduler.enqueue(KEY, 2, TransferId("a"), Priority.HIGH)
    scheduler.enqueue(KEY, 2, TransferId("b"), Priority.HIGH)
    assert len(list(scheduler.take())) == 2
    scheduler.enqueue(KEY, 2, TransferId("c"), Priority.HIGH)
    scheduler.free(KEY)
    scheduler.free(KEY)
    with pytest.raises(InternalError):
        scheduler.free(KEY)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(Priority)), st.booleans()), max_size=60))
def test_slots_are_never_overdrawn(steps: list[tuple[str, Priority, bool]]) -> None:
    scheduler = Scheduler()
    classes: dict[str, Priority] = {}
    busy = 0
    for name, priority, frees in steps:
        scheduler.enqueue(KEY, 2, TransferId(name), classes.setdefault(name, priority))
        busy += len(list(scheduler.take()))
        assert busy <= 2
        scheduler.check_invariants()
        if frees and busy:
            scheduler.free(KEY)
            busy -= 1
