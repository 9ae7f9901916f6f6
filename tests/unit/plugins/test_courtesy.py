"""Threads that make way: what the kernel says of them afterwards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from xferd.plugins.courtesy import give_way


def nice_of_a_thread_after(nice: int) -> int:
    """Return the nice value of a new thread that gave way."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(give_way, nice).result()
        return threads.submit(os.getpriority, os.PRIO_PROCESS, 0).result()


@pytest.mark.parametrize("nice", [0, 3])
def test_a_thread_gives_way_by_its_nice_value_and_no_other_does(nice: int) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice_of_a_thread_after(nice) == mine + nice
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


def test_a_thread_that_may_not_give_way_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    assert nice_of_a_thread_after(2) == os.getpriority(os.PRIO_PROCESS, 0)
