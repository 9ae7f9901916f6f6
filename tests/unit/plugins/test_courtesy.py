"""Threads that make way: what the kernel says of them afterwards."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from xferd.plugins.courtesy import SLICE_NS, give_way

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
LINUX = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def schedule() -> tuple[int, int, int]:
    """Return policy, nice value and slice in nanoseconds of the calling thread."""
    memory = ctypes.create_string_buffer(56)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(SCHED_GETATTR[platform.machine()], 0, memory, len(memory), 0) == 0, ctypes.get_errno()
    _, policy, _, nice, _, runtime, _, _ = struct.unpack_from("=IIQiIQQQ", memory.raw)
    return policy, nice, runtime


def in_a_thread(nice: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the schedule of a new thread before and after it gave way."""
    with ThreadPoolExecutor(1) as threads:
        before = threads.submit(schedule).result()
        threads.submit(give_way, nice).result()
        return before, threads.submit(schedule).result()


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="number of the system call not known here")
@pytest.mark.skipif(LINUX < (6, 12), reason="the kernel has no slices of a thread's own")
def test_a_thread_gives_way_by_its_nice_value_and_by_a_long_slice():
    mine = schedule()
    (policy, nice, slice_ns), after = in_a_thread(3)
    assert slice_ns < SLICE_NS
    assert after == (policy, nice + 3, SLICE_NS)
    assert schedule() == mine


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="number of the system call not known here")
def test_a_thread_that_is_to_give_no_way_stays_as_it_is():
    before, after = in_a_thread(0)
    assert after == before


def test_where_the_kernel_does_not_know_slices_the_nice_value_is_left(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with ThreadPoolExecutor(1) as threads:
        threads.submit(give_way, 2).result()
        assert threads.submit(os.getpriority, os.PRIO_PROCESS, 0).result() == os.getpriority(os.PRIO_PROCESS, 0) + 2
