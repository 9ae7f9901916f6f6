"""How threads that move much make way for those that wait for little: the event loops, and clients."""

from __future__ import annotations

import contextlib
import os
import threading


def give_way(nice: int) -> None:
    """Add to the nice value of the calling thread, the process's others keeping theirs; with 0 it stays as it is.

    Where the system refuses, as in a container that may not come back to a lower value, the thread goes on as it is.
    """
    if nice:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + nice)
