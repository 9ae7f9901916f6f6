"""A driver whose GPU memory is host memory in memfds: for tests, and for machines without a GPU.

It behaves as CUDA does where the rest of a worker can tell: handles open in other processes and die with the one that
made them, moves run beside the worker's loop, events order them with other processes' work, allocating past the
device's size fails, and a device breaks when it is told to. It is no faster or slower than memory is. How it
is told to break is in ``faults.py``, what moves its bytes in ``simulated_device.py``.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api import simulated as handles
from xferd.api.errors import DeviceLost, InvalidArgument, MoveFailed, NotFound, PoolExhausted, Unavailable
from xferd.api.mapping import map_shared
from xferd.plugins.cuda.control import Ready
from xferd.plugins.cuda.driver import Driver, Flight, Pieces, Plan
from xferd.plugins.cuda.faults import FAULTS
from xferd.plugins.cuda.simulated_device import Copier, SimulatedEvent, SimulatedFlight, SimulatedPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xferd.plugins.cuda.faults import Faults


@dataclass(slots=True, eq=False)
class _Memory:
    array: NDArray[np.uint8]
    fd: int = -1  # of memory of our own, so that others can open it


class SimulatedDriver(Driver):
    """One simulated GPU of ``nbytes`` bytes, of ``devices``. What other workers allocate is not counted here."""

    def __init__(self, nbytes: int, devices: int, faults: Faults) -> None:
        self._nbytes = nbytes
        self._devices = devices
        self._faults = faults
        self._memory: dict[int, _Memory] = {}
        self._allocated_nbytes = 0
        self._locked: set[int] = set()
        self._events: dict[int, SimulatedEvent] = {}
        self._moves = 0
        self._copier = Copier(faults.delay)

    def start(self, device: int) -> Ready:
        """Start the thread that moves."""
        if not 0 <= device < self._devices:
            raise NotFound(
                f"there is no simulated GPU {device}",
                limit=f"{self._devices} of them",
                remedy="raise backends.cuda.simulated_devices",
            )
        if self._faults.unusable:
            raise Unavailable(f"simulated GPU {device} refuses a context", remedy=f"unset {FAULTS}")
        self._copier.start()
        return Ready(
            self._devices,
            handles.device_uuid(device).hex(),
            f"simulated GPU {device}",
            self._nbytes,
            self.free_nbytes(),
        )

    # -- memory

    def free_nbytes(self) -> int:
        """Return what this process has not allocated."""
        return self._nbytes - self._allocated_nbytes

    def open(self, nbytes: int, handle: bytes, fd: int) -> int:
        """Map another process's memfd."""
        if fd >= 0:
            found = os.fstat(fd).st_size
            return self._map(fd, nbytes, found)
        opened, found = handles.open_handle(handle)
        try:
            return self._map(opened, nbytes, found)
        finally:
            os.close(opened)

    def _map(self, fd: int, nbytes: int, found: int) -> int:
        if nbytes > found:
            raise InvalidArgument(
                f"the allocation has {found} bytes, and {nbytes} were asked for",
                limit=f"{found} bytes",
                remedy="give the size of the allocation that was exported",
            )
        try:
            array = map_shared(fd, nbytes)
        except OSError as exc:
            raise InvalidArgument(f"the allocation cannot be mapped: {exc.strerror}") from exc
        address = int(array.ctypes.data)
        self._memory[address] = _Memory(array)
        return address

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Make a memfd."""
        if self._faults.oom or nbytes > self.free_nbytes():
            raise PoolExhausted(
                f"the simulated GPU cannot allocate {nbytes} bytes",
                limit=f"{0 if self._faults.oom else self.free_nbytes()} bytes are free",
                remedy="use less of it, or raise backends.cuda.simulated_nbytes",
            )
        fd = os.memfd_create("xferd:simulated", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, nbytes)
            array = map_shared(fd, nbytes)
        except OSError as exc:
            os.close(fd)
            raise PoolExhausted(f"{nbytes} bytes of host memory: {exc.strerror}", remedy="use less") from exc
        address = int(array.ctypes.data)
        self._memory[address] = _Memory(array, fd)
        self._allocated_nbytes += nbytes
        return address, handles.export_fd(fd, nbytes)

    def close(self, address: int) -> None:
        """Unmap; what others have mapped stays theirs."""
        memory = self._memory.pop(address)
        if memory.fd >= 0:
            os.close(memory.fd)
            self._allocated_nbytes -= memory.array.nbytes

    def wipe(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        ctypes.memset(address, 0, nbytes)

    def lock_host(self, address: int, nbytes: int, *, is_writable: bool) -> None:
        """Note it: host memory is within reach as it is."""
        self._locked.add(address)

    def unlock_host(self, address: int) -> None:
        """Forget it."""
        self._locked.remove(address)

    # -- moves

    def compile(self, pieces: Pieces) -> Plan:
        """Make the tables that the copier takes."""
        return SimulatedPlan(pieces)

    def begin(self, plan: Plan, wait_event: int, done_event: int) -> Flight:
        """Hand a move to the copier."""
        assert isinstance(plan, SimulatedPlan)
        self._moves += 1
        wait = done = None
        if wait_event:
            event = self._events[wait_event]
            wait = event, event.recorded
        if done_event:
            event = self._events[done_event]
            done = event, event.record()
        flight = SimulatedFlight(plan, wait, done)
        if not self._strike(flight):
            self._copier.flights.put(flight)
        return flight

    def _strike(self, flight: SimulatedFlight) -> bool:
        """Let faults strike; returns whether the move is never to end."""
        count, faults = self._moves, self._faults
        if faults.strikes("crash", count):
            signal.raise_signal(signal.SIGKILL)
        if faults.strikes("hang", count):
            while True:
                signal.pause()
        if faults.strikes("fail", count):
            flight.error = MoveFailed(f"move {count} failed, as {FAULTS} says")
        if faults.strikes("lost", count):
            flight.error = DeviceLost(f"the device was lost at move {count}, as {FAULTS} says")
        return faults.strikes("stall", count)

    # -- events

    def open_event(self, handle: bytes) -> int:
        """Map another process's event."""
        fd, _ = handles.open_handle(handle, handles.EVENT_MAGIC)
        try:
            return self._enter_event(fd)
        finally:
            os.close(fd)

    def make_event(self) -> tuple[int, bytes]:
        """Make an event, whose fd stays open for others."""
        fd = os.memfd_create("xferd:event", os.MFD_CLOEXEC)
        os.ftruncate(fd, handles.EVENT_NBYTES)
        return self._enter_event(fd), handles.export_fd(fd, handles.EVENT_NBYTES, handles.EVENT_MAGIC)

    def _enter_event(self, fd: int) -> int:
        number = len(self._events) + 1
        self._events[number] = SimulatedEvent(map_shared(fd, handles.EVENT_NBYTES).data)
        return number
