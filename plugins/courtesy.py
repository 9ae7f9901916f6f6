"""How threads that move much make way for those that wait for little: the event loops, and clients.

A nice value says how cores are shared, not how soon somebody who wakes up gets one: that one may have to wait until the
slice of a thread that copies is over, some milliseconds. Linux 6.12 and later let a thread say how long its slice is.
One with a long slice is interrupted by everybody who wakes up with a shorter one and has not had its share, and that is
all others. Its share stays what the nice value makes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import threading

SLICE_NS = 100_000_000
"""The longest slice that the kernel takes."""

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` in its first version: size, policy, flags, nice, priority, runtime, deadline, period."""


def give_way(nice: int) -> None:
    """Add to the nice value of the calling thread and let all others interrupt it; with 0 it stays as it is.

    Where the system refuses, as in a container that may not come back to a lower nice value, the thread goes on as it
    is. An older kernel takes the nice value alone.
    """
    if not nice:
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + nice)
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        _ask_for_slice(SLICE_NS)


def _ask_for_slice(nanoseconds: int) -> None:
    """Ask for a slice of the calling thread's; nothing happens where the kernel does not know that."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, ctypes.c_char_p(attributes), 0)
