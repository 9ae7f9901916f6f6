"""When a UCX worker that has nothing to do and cannot rest counts as stuck for good."""

from __future__ import annotations

import pytest

from xferd.plugins.ucx.stalls import CERTAIN_S, LONGEST_S, LOOKS, PAUSE_S, Stall


def wasted(stall: Stall, seconds: float, *, since: float = 0.0, looks: int = 100) -> float:
    """Look in vain for some time; returns when."""
    for look in range(looks + 1):
        stall.busy(since + seconds * look / looks)
    return since + seconds


@pytest.fixture
def stall() -> Stall:
    made = Stall()
    made.suspect("b")
    return made


def test_time_for_nothing_after_a_loss_is_a_fault(stall: Stall) -> None:
    now = wasted(stall, CERTAIN_S * 0.9)
    assert not stall.is_certain
    wasted(stall, CERTAIN_S * 0.2, since=now)
    assert stall.is_certain
    assert stall.suspects == {"b"}


def test_without_a_loss_it_is_a_slow_peer() -> None:
    stall = Stall()
    now = wasted(stall, CERTAIN_S * 100)
    assert not stall.is_certain
    stall.suspect("b")
    now = wasted(stall, CERTAIN_S * 0.6, since=now)
    stall.suspect("c")
    assert not stall.is_certain
    wasted(stall, CERTAIN_S * 0.6, since=now)
    assert stall.is_certain


def test_what_was_lost_before_the_queue_was_seen_empty_has_harmed_nothing(stall: Stall) -> None:
    now = wasted(stall, CERTAIN_S * 0.9)
    stall.armed()
    wasted(stall, CERTAIN_S * 100, since=now)
    assert not stall.is_certain
    assert not stall.suspects


def test_other_transports_that_move_hide_nothing_and_their_time_does_not_count(stall: Stall) -> None:
    now = 0.0
    for _ in range(10):
        now = wasted(stall, CERTAIN_S * 0.09, since=now, looks=10)
        stall.moved()
        now += CERTAIN_S * 5  # they were at work
    assert not stall.is_certain
    for _ in range(2):
        now = wasted(stall, CERTAIN_S * 0.09, since=now, looks=10)
        stall.moved()
    assert stall.is_certain


def test_a_thread_that_was_stopped_itself_blames_nobody(stall: Stall) -> None:
    stall.busy(0.0)
    stall.busy(1000.0)
    assert not stall.is_certain
    wasted(stall, CERTAIN_S - 2 * LONGEST_S, since=1000.0)
    assert not stall.is_certain
    wasted(stall, 2 * LONGEST_S, since=1000.0 + CERTAIN_S)
    assert stall.is_certain


def test_the_thread_pauses_only_after_some_looks_in_a_row(stall: Stall) -> None:
    for _ in range(3):
        assert {stall.busy(0.0) for _ in range(LOOKS)} == {0.0}
        assert stall.busy(0.0) == PAUSE_S
        stall.moved()
    stall.armed()
    assert stall.busy(0.0) == 0.0
