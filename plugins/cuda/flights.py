"""Plans and flights of the NVIDIA driver: what is prepared once, so that beginning a move is a few calls of C.

A flight has a lane to itself: a stream and an event. So no move waits for another, nor for another's event. Tables live
in slots, device memory with locked host memory of the same size; a plan has one as long as it lives, and its table is
uploaded by its first flight.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from xferd.api.errors import DeviceLost, XferdError
from xferd.api.mapping import map_shared
from xferd.plugins.cuda import calls
from xferd.plugins.cuda.driver import Flight, Plan
from xferd.plugins.cuda.kernel import THREADS
from xferd.plugins.cuda.layout import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.cuda.calls import Cuda
    from xferd.plugins.cuda.driver import Pieces
    from xferd.plugins.cuda.kernel import Shape

MIN_SLOT_NBYTES: Final = 4 << 10
CHUNK_NBYTES: Final = 2 << 20
"""Slots are made so many bytes at a time, or one at a time where they are larger."""

_NO_EVENT: Final = ctypes.c_void_p()


class Lane:
    """A stream and the event that ends a flight on it; with ``timed``, also one that begins it."""

    __slots__ = ("begun", "event", "stream")

    def __init__(self, cuda: Cuda, *, timed: bool) -> None:
        self.stream = ctypes.c_void_p()
        self.event = ctypes.c_void_p()
        self.begun = ctypes.c_void_p()
        cuda.call("cuStreamCreate", ctypes.byref(self.stream), calls.STREAM_NON_BLOCKING)
        flags = 0 if timed else calls.EVENT_DISABLE_TIMING
        cuda.call("cuEventCreate", ctypes.byref(self.event), flags)
        if timed:
            cuda.call("cuEventCreate", ctypes.byref(self.begun), flags)


class Slot:
    """Room for a table: device memory, locked host memory, and the kernel's arguments."""

    __slots__ = ("arguments", "device", "host", "nbytes", "params", "size", "staged")

    def __init__(self, size: int, device: int, host: NDArray[np.uint8]) -> None:
        self.size = size
        self.device = ctypes.c_uint64(device)
        self.host = host.view(np.uint64)
        self.staged = ctypes.c_void_p(int(host.ctypes.data))
        self.nbytes = ctypes.c_size_t()
        self.arguments = (ctypes.c_uint32 * 3)()
        first = ctypes.addressof(self.arguments)
        self.params = (ctypes.c_void_p * 4)(ctypes.addressof(self.device), first, first + 4, first + 8)

    def fill(self, shape: Shape) -> None:
        """Put a table and how it is started into it."""
        flat = shape.table.reshape(-1)
        self.host[: len(flat)] = flat
        self.nbytes.value = flat.nbytes
        self.arguments[0], self.arguments[1], self.arguments[2] = shape.work, shape.tiles, shape.tile_nbytes


class Slots:
    """Free slots by size, a power of two. They are made when none is free, and kept until the end."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[Slot]] = {}
        self._chunks: list[tuple[ctypes.c_uint64, NDArray[np.uint8]]] = []

    def take(self, nbytes: int) -> Slot:
        """Return one of at least ``nbytes``.

        Raises:
            PoolExhausted: the device has no memory for it.
            Unavailable: the system does not let host memory for it be locked.
        """
        size = max(1 << (nbytes - 1).bit_length(), MIN_SLOT_NBYTES)
        free = self._free.setdefault(size, [])
        if not free:
            self._make(size, free)
        return free.pop()

    def give(self, slot: Slot) -> None:
        """Take one back."""
        self._free[slot.size].append(slot)

    def close(self) -> None:
        """Free all."""
        for device, host in self._chunks:
            self._cuda.unlock_host(int(host.ctypes.data))
            self._cuda.call("cuMemFree_v2", device)
        self._chunks.clear()
        self._free.clear()

    def _make(self, size: int, free: list[Slot]) -> None:
        total = max(size, CHUNK_NBYTES)
        device = ctypes.c_uint64()
        self._cuda.call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(total), about="memory for tables")
        host = map_shared(-1, total)
        try:
            self._cuda.lock_host(int(host.ctypes.data), total)
        except XferdError:
            self._cuda.cuMemFree_v2(device)
            raise
        self._chunks.append((device, host))
        free.extend(Slot(size, device.value + at, host[at : at + size]) for at in range(0, total, size))


class NvidiaPlan(Plan):
    """Pieces for the kernel or for the copy engines."""

    def __init__(self, pieces: Pieces) -> None:
        self.nbytes = pieces.nbytes
        self.on_host = pieces.on_host

    def enqueue(self, cuda: Cuda, lane: Lane) -> int:
        """Put the work on a lane's stream; returns a ``CUresult``."""
        raise NotImplementedError


class KernelPlan(NvidiaPlan):
    """Many pieces: one start of the kernel. ``first`` is the flight that uploads the table."""

    engine = Engine.KERNEL

    def __init__(self, pieces: Pieces, shape: Shape, function: ctypes.c_void_p, slots: Slots) -> None:
        super().__init__(pieces)
        self.first: NvidiaFlight | None = None
        self._function = function
        self._blocks = shape.blocks
        self._slots = slots
        self._slot = slots.take(shape.table.nbytes)
        self._slot.fill(shape)

    def upload(self, cuda: Cuda, lane: Lane) -> int:
        """Send the table ahead of the first start."""
        slot = self._slot
        return int(cuda.cuMemcpyHtoDAsync_v2(slot.device, slot.staged, slot.nbytes, lane.stream))

    def enqueue(self, cuda: Cuda, lane: Lane) -> int:
        """Start the kernel."""
        return int(
            cuda.cuLaunchKernel(
                self._function, self._blocks, 1, 1, THREADS, 1, 1, 0, lane.stream, self._slot.params, _NO_EVENT
            )
        )

    def drop(self) -> None:
        """Give the slot back."""
        self._slots.give(self._slot)


class CopyPlan(NvidiaPlan):
    """Few large pieces: a copy for each."""

    engine = Engine.COPY

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces)
        self._copies = [
            (ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
            for source, target, nbytes in pieces.table.tolist()
        ]

    def enqueue(self, cuda: Cuda, lane: Lane) -> int:
        """Start the copies, in order."""
        for target, source, nbytes in self._copies:
            code = cuda.cuMemcpyAsync(target, source, nbytes, lane.stream)
            if code:
                return int(code)
        return calls.SUCCESS


class Lanes:
    """Begins plans on lanes that nothing else uses, and makes lanes as they are needed."""

    def __init__(self, cuda: Cuda, *, timed: bool) -> None:
        self._cuda = cuda
        self._timed = timed
        self._free = [Lane(cuda, timed=timed)]

    def begin(self, plan: NvidiaPlan, wait_event: ctypes.c_void_p | None, done_event: ctypes.c_void_p | None) -> Flight:
        """Start a plan.

        Raises:
            DeviceLost, MoveFailed: CUDA says no.
        """
        cuda = self._cuda
        lane = self._free.pop() if self._free else Lane(cuda, timed=self._timed)
        flight = NvidiaFlight(self, lane)
        if wait_event is not None:
            self._check(cuda.cuStreamWaitEvent(lane.stream, wait_event, 0), "cuStreamWaitEvent")
        if self._timed:
            self._check(cuda.cuEventRecord(lane.begun, lane.stream), "cuEventRecord")
        if isinstance(plan, KernelPlan):
            if plan.first is None:
                self._check(plan.upload(cuda, lane), "uploading a table")
                plan.first = flight
            elif not plan.first.is_over:
                self._check(cuda.cuStreamWaitEvent(lane.stream, plan.first.lane.event, 0), "cuStreamWaitEvent")
        self._check(plan.enqueue(cuda, lane), "starting a move")
        if done_event is not None:
            self._check(cuda.cuEventRecord(done_event, lane.stream), "cuEventRecord")
        self._check(cuda.cuEventRecord(lane.event, lane.stream), "cuEventRecord")
        return flight

    def is_over(self, lane: Lane) -> bool:
        """Whether a lane's flight has ended; it is free then."""
        code = self._cuda.cuEventQuery(lane.event)
        if code == calls.NOT_READY:
            return False
        self._check(code, "a move")
        self._free.append(lane)
        return True

    def elapsed_ns(self, lane: Lane) -> int | None:
        """Return how long the flight that was seen to end last was on the device; None where it was not timed."""
        if not self._timed:
            return None
        elapsed_ms = ctypes.c_float()
        self._check(
            self._cuda.cuEventElapsedTime(ctypes.byref(elapsed_ms), lane.begun, lane.event), "cuEventElapsedTime"
        )
        return int(elapsed_ms.value * 1e6)

    def close(self) -> None:
        """Destroy what is free."""
        for lane in self._free:
            self._cuda.cuEventDestroy_v2(lane.event)
            if self._timed:
                self._cuda.cuEventDestroy_v2(lane.begun)
            self._cuda.cuStreamDestroy_v2(lane.stream)
        self._free.clear()

    def _check(self, code: int, about: str) -> None:
        """Raise on any error: part of a move may be under way, so that nothing less than the worker's end is safe."""
        if code:
            raise DeviceLost(f"{about}: {self._cuda.name_of(code)}", remedy="try again: another worker is started")


class NvidiaFlight(Flight):
    """A plan on its lane."""

    __slots__ = ("_begun_ns", "_device_ns", "_lanes", "is_over", "lane")

    def __init__(self, lanes: Lanes, lane: Lane) -> None:
        self._lanes = lanes
        self.lane = lane
        self.is_over = False
        self._begun_ns = time.perf_counter_ns()
        self._device_ns = 0

    def is_done(self) -> bool:
        """Whether the lane's event has come."""
        if not self._lanes.is_over(self.lane):
            return False
        elapsed_ns = self._lanes.elapsed_ns(self.lane)
        self._device_ns = time.perf_counter_ns() - self._begun_ns if elapsed_ns is None else elapsed_ns
        self.is_over = True
        return True

    def device_ns(self) -> int:
        """Return how long it took: on the device where that was timed, else from its begin until it was seen to end."""
        return self._device_ns
