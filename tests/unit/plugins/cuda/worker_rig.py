"""The daemon's side of one device worker, in a test's hands: no event loop, no registry, one call at a time.

``plugins/cuda/process.py`` is the real one. Also used by ``tools/gpu_worker_check.py``.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time

import numpy as np

from xferd.api.mapping import map_shared
from xferd.plugins.base import ALLOCATION_SHIFT
from xferd.plugins.cuda import control
from xferd.plugins.cuda.layout import NO_TABLE, TOTAL_NBYTES, Outcome, SharedQueues, Side


def at(allocation, offset=0):
    """A position in GPU memory."""
    return allocation << ALLOCATION_SHIFT | offset


class Host:
    """Memory as the daemon has it, which workers can map."""

    def __init__(self, nbytes):
        self.fd = os.memfd_create("host")
        os.ftruncate(self.fd, nbytes)
        self.array = map_shared(self.fd, nbytes)
        self.address = int(self.array.ctypes.data)
        self.nbytes = nbytes

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self.fd)

    def fill(self, seed):
        """Fill it with random bytes, and return a copy of them."""
        self.array[:] = np.random.default_rng(seed).integers(0, 256, self.nbytes, dtype=np.uint8)
        return self.array.copy()

    def map_in(self, rig, number):
        """Let a worker map it."""
        assert rig.ask(control.MapHost(number, self.address, self.nbytes), self.fd).check()


class Told:
    """A completion."""

    def __init__(self, cookie, nbytes, device_ns, outcome, engine, text):
        self.cookie = cookie
        self.nbytes = nbytes
        self.device_ns = device_ns
        self.outcome = Outcome(outcome)
        self.engine = engine
        self.text = text

    def __repr__(self):
        return f"<Told {self.cookie} {self.outcome.name} {self.nbytes} {self.text!r}>"


class WorkerRig:
    """A worker process and its queues. Ends with it (``with``)."""

    def __init__(self, *, device=0, driver="simulated", spin_s=200e-6, env=None, simulated_nbytes=1 << 30, devices=2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        memory = os.memfd_create("worker_rig")
        os.ftruncate(memory, TOTAL_NBYTES)
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        fds = {"socket": theirs.fileno(), "memory": memory, "wake": self.wake, "told": self.told}
        values = {"device": device, "driver": driver, "spin": spin_s, **fds}
        values |= {"simulated-nbytes": simulated_nbytes, "simulated-devices": devices}
        argv = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xferd.plugins.cuda.worker", *argv],
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(fds.values()),
            env={**os.environ, **(env or {})},
        )
        theirs.close()
        self.queues = SharedQueues(memory)
        os.close(memory)
        self.cookie = 0
        self.socket.settimeout(30)
        received = control.receive(self.socket)
        self.ready = received.message if received else None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.socket.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for fd in (self.wake, self.told):
            os.close(fd)

    def ask(self, message, fd=-1):
        """Ask, and return the answer without looking at it."""
        control.send(self.socket, message, fd)
        received = control.receive(self.socket)
        assert received is not None, f"the worker has ended with {self.process.wait(5)}"
        return received.message

    def put(self, source, target, *, sides=(Side.DEVICE, Side.DEVICE), table_id=0, slot=0, wait=0, done=0, file=0):
        """Put a command with its table into the queue; returns its cookie."""
        rows = self.queues.tables[slot]
        source, target = (np.asarray(side, dtype=np.uint64).reshape(-1, 2) for side in (source, target))
        rows[: len(source)] = source
        rows[len(source) : len(source) + len(target)] = target
        nbytes = int(source[:, 1].sum())
        return self._put(table_id, nbytes, len(source), len(target), sides, slot, wait, done, file)

    def put_again(self, table_id, *, wait=0, done=0):
        """Put a command whose table the worker has kept."""
        return self._put(table_id, 0, 0, 0, (Side.DEVICE, Side.DEVICE), NO_TABLE, wait, done, 0)

    def _put(self, table_id, nbytes, rows, others, sides, slot, wait, done, file):
        self.cookie += 1
        self.queues.put_command(
            self.cookie, table_id, nbytes, rows, others, sides[0], sides[1], 0, slot, wait, done, 0, file
        )
        os.eventfd_write(self.wake, 1)
        return self.cookie

    def take(self, timeout_s=20.0):
        """Wait for the next completion."""
        deadline = time.monotonic() + timeout_s
        while (completion := self.queues.take_completion()) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.told], [], [], left)[0]:
                raise TimeoutError("no completion came")
            os.eventfd_read(self.told)
        return Told(*completion)

    def poll(self, timeout_s=20.0):
        """The same, without sleeping: for measurements."""
        deadline = time.monotonic() + timeout_s
        while (completion := self.queues.take_completion()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no completion came")
        return Told(*completion)

    def move(self, source, target, **how):
        """Put a command and wait for its end."""
        self.put(source, target, **how)
        return self.take()
