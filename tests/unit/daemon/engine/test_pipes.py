"""The shares of all chunks add up to the time in which the pipe was busy, whoever they belong to."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.daemon.engine.pipes import Pipes

PIPE = ("local", "")


def test_a_chunk_alone_had_all_of_the_time_and_two_at_once_had_half_each() -> None:
    pipes = Pipes()
    alone = pipes.enter(PIPE, 10.0)
    assert pipes.leave(alone, 12.0) == pytest.approx(2.0)
    first, second = pipes.enter(PIPE, 20.0), pipes.enter(PIPE, 20.0)
    other = pipes.enter(("tcp", "b"), 20.0)
    assert pipes.leave(first, 24.0) == pytest.approx(2.0)
    assert pipes.leave(second, 25.0) == pytest.approx(3.0)  # alone for the last second
    assert pipes.leave(other, 25.0) == pytest.approx(5.0)  # another pipe is no company
    early = pipes.enter(PIPE, 30.0)
    late = pipes.enter(PIPE, 34.0)
    assert pipes.leave(early, 38.0) == pytest.approx(6.0)  # what went by before the other came was its own
    assert pipes.leave(late, 38.0) == pytest.approx(2.0)
    assert len(pipes) == 0


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans(), st.integers(0, 7)), max_size=60))
def test_shares_add_up_to_the_busy_time(steps: list[tuple[float, bool, int]]) -> None:
    pipes, inside = Pipes(), []
    now = busy_s = shares_s = 0.0
    for wait_s, comes, which in steps:
        now += wait_s
        busy_s += wait_s if inside else 0.0
        if comes:
            inside.append(pipes.enter(PIPE, now))
        elif inside:
            shares_s += pipes.leave(inside.pop(which % len(inside)), now)
        pipes.check_invariants()
    for stay in inside:
        now += 1.0
        busy_s += 1.0
        shares_s += pipes.leave(stay, now)
    assert shares_s == pytest.approx(busy_s)
    assert len(pipes) == 0
