"""Which workers there are, what memory they may map, and what is let go of when one of them or a client ends.

The registry of allocations, host memory and events is here; a worker learns of them when it first needs them, and a new
worker in the place of a lost one learns of them anew in the same way. Used on the event loop. One worker as a process
is ``process.py``; moving bytes is ``backend.py``.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import structlog

from xferd.api.errors import Closed, InvalidArgument, NotFound, Stale, Unavailable, XferdError
from xferd.api.types import DeviceInfo
from xferd.plugins.base import ALLOCATION_SHIFT
from xferd.plugins.cuda import control
from xferd.plugins.cuda.process import CLOSE_TIMEOUT_S, REPLY_TIMEOUT_S, WorkerProcess
from xferd.plugins.devices import DeviceExport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from xferd.plugins.cuda.options import CudaOptions

SELF = ""
"""Owner of the workers that hold the daemon's own memory and do nothing else, so that no transfer can harm it."""

PEERS = "@peers"
"""Owner of the workers that move on behalf of other nodes; no agent's name has an @."""

_GIB_S = 0.2
"""What a GiB adds to the time that a request may take: to lock host memory takes 50 ms, to wipe less."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Allocation:
    """GPU memory known here. ``home`` is the worker that made it, for the daemon's own."""

    number: int
    device: int
    owner: str
    export: DeviceExport
    home: WorkerProcess | None = None
    count: int = 1
    is_closing: bool = False


@dataclass(slots=True, eq=False)
class Segment:
    """Host memory mapped here that workers may map too; the fd is the registry's own."""

    number: int
    address: int
    nbytes: int
    fd: int


@dataclass(slots=True, eq=False)
class Event:
    """An event of an owner. ``home`` is the worker that made it; None for one that the client made."""

    number: int
    owner: str
    device: int
    handle: bytes
    home: WorkerProcess | None = None


@dataclass(slots=True, eq=False)
class _Seat:
    """The place of one worker: who sits there now, and how often it was taken anew."""

    worker: WorkerProcess | None = None
    starting: asyncio.Task[WorkerProcess] | None = None
    starts: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class DeviceManager:
    """Starts workers, and tells each what it needs to know."""

    def __init__(self, options: CudaOptions) -> None:
        self._options = options
        self._facts: dict[int, DeviceInfo] = {}
        self.ready: dict[int, control.Ready] = {}
        """What the first worker of each device said."""
        self._by_uuid: dict[bytes, int] = {}
        self._seats: dict[tuple[int, str], _Seat] = {}
        self._allocations: dict[int, Allocation] = {}
        self._by_handle: dict[tuple[str, bytes, bytes], Allocation] = {}
        self._free_numbers: list[int] = []
        self._segments: dict[int, Segment] = {}
        self._sorted: tuple[NDArray[np.uint64], list[Segment]] = (np.empty(0, np.uint64), [])
        self._events: dict[int, Event] = {}
        self.lost: set[int] = set()
        """Allocations of the daemon's own that went with their worker, and are regions still."""
        self._next = 1
        self._restarts: dict[int, int] = {}
        self._is_closed = False
        self.with_files = False
        """Whether workers are to look for a way between files and their GPU; set before ``start``, by ``gds``."""

    # ------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start a worker for each device, to learn what there is. What cannot be used is noted, and not an error."""
        wanted = self._options.devices or (0,)
        await asyncio.gather(*(self._probe(index) for index in wanted))
        first = self._facts.get(0)
        if not self._options.devices and first is not None and not first.reason:
            seat = self._seats[0, SELF]
            assert seat.worker is not None
            await asyncio.gather(*(self._probe(index) for index in range(1, seat.worker.ready.devices)))

    async def aclose(self) -> None:
        """End all workers; nothing is under way. Twice is fine."""
        self._is_closed = True
        workers = [seat.worker for seat in self._seats.values() if seat.worker is not None]
        starting = [seat.starting for seat in self._seats.values() if seat.starting is not None]
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in workers))
        self._seats.clear()
        for allocation in self._allocations.values():
            _close_fd(allocation.export.fd)
        for segment in self._segments.values():
            os.close(segment.fd)
        self._allocations.clear()
        self._segments.clear()

    async def _probe(self, index: int) -> None:
        self._facts[index] = DeviceInfo(index, driver=self._options.driver, reason="not looked at yet")
        try:
            ready = (await self.worker(index, SELF)).ready
        except XferdError as error:
            self._facts[index] = replace(self._facts[index], reason=error.message)
            log.warning("gpu_unusable", device=index, error=error.message, remedy=error.remedy)
            return
        self.ready[index] = ready
        uuid = bytes.fromhex(ready.device_uuid)
        self._by_uuid[uuid] = index
        self._facts[index] = DeviceInfo(
            index, uuid, ready.name, self._options.driver, "", ready.total_nbytes, ready.free_nbytes
        )
        log.info("gpu_ready", device=index, name=ready.name, total_nbytes=ready.total_nbytes)

    # ------------------------------------------------------------------------------------ workers

    def live(self, device: int, owner: str) -> WorkerProcess | None:
        """Return the worker of an owner where there is one; it may have been lost a moment ago."""
        seat = self._seats.get((device, owner))
        return None if seat is None else seat.worker

    async def worker(self, device: int, owner: str) -> WorkerProcess:
        """Return the worker of an owner, after starting it where there is none. Cancel-safe.

        Raises:
            Unavailable, Unsupported, NotFound, DeviceLost: it cannot be started.
            Closed: the daemon is stopping.
        """
        if self._is_closed:
            raise Closed("the GPU backend was closed", remedy="the daemon is stopping")
        seat = self._seat(device, owner)
        if seat.worker is not None and not seat.worker.is_lost:
            return seat.worker
        if seat.starting is None or seat.starting.done():
            seat.starting = asyncio.get_running_loop().create_task(
                self._start(device, owner, seat), name=f"start worker of GPU {device} for {owner or 'the daemon'}"
            )
        return await asyncio.shield(seat.starting)

    def _seat(self, device: int, owner: str) -> _Seat:
        return self._seats.setdefault((device, owner), _Seat())

    async def _start(self, device: int, owner: str, seat: _Seat) -> WorkerProcess:
        if owner != SELF:
            self._check_usable(device)
        worker = WorkerProcess(device, owner, self._options, self._on_end, with_files=self.with_files)
        await worker.start()
        if seat.starts:
            self._restarts[device] = self._restarts.get(device, 0) + 1
        seat.starts += 1
        seat.worker = worker
        log.info("device_worker_started", device=device, owner=owner or None, pid=worker.pid, restarts=seat.starts - 1)
        return worker

    def _on_end(self, worker: WorkerProcess) -> None:
        seat = self._seats.get((worker.device, worker.owner))
        if seat is not None and seat.worker is worker:
            seat.worker = None
        self.lost.update(number for number, allocation in self._allocations.items() if allocation.home is worker)
        tell = log.info if worker.is_wanted else log.warning
        tell(
            "device_worker_ended",
            device=worker.device,
            owner=worker.owner or None,
            pid=worker.pid,
            reason=worker.end_reason,
        )

    def refusal(self, device: int) -> str:
        """Return why a device cannot be used, or ""."""
        facts = self._facts.get(device)
        return f"no GPU {device} is configured" if facts is None else facts.reason

    def _check_usable(self, device: int) -> None:
        reason = self.refusal(device)
        if reason:
            raise Unavailable(f"GPU {device} cannot be used: {reason}", remedy="see `xferctl devices`")

    def facts(self) -> tuple[DeviceInfo, ...]:
        """Return what is known of each device, but what the backend counts."""
        found = []
        for index, facts in sorted(self._facts.items()):
            workers = [s.worker for (device, _), s in self._seats.items() if device == index and s.worker is not None]
            latest = min((worker.free_nbytes for worker in workers), default=facts.free_nbytes)
            pinned = sum(worker.pinned_nbytes for worker in workers)
            restarts = self._restarts.get(index, 0)
            found.append(
                replace(facts, free_nbytes=latest, workers=len(workers), worker_restarts=restarts, pinned_nbytes=pinned)
            )
        return tuple(found)

    def device_of(self, uuid: bytes) -> int:
        """Return the number of the device with a UUID.

        Raises:
            NotFound: none that is configured and can be used has it.
        """
        if uuid in self._by_uuid:
            return self._by_uuid[uuid]
        known = ", ".join(f"{index}: {known.hex()}" for known, index in self._by_uuid.items())
        raise NotFound(
            f"no GPU with UUID {uuid.hex()}",
            limit=f"GPUs: {known or 'none can be used'}",
            remedy="configure it under backends.cuda.devices; `xferctl devices` says what is wrong with one",
        )

    async def end_owner(self, owner: str) -> None:
        """Kill an owner's workers and forget its events."""
        for key in [key for key in self._seats if key[1] == owner]:
            seat = self._seats.pop(key)  # whoever still waits for its lock finds its worker lost
            if seat.starting is not None and not seat.starting.done():
                seat.starting.cancel()
                await asyncio.gather(seat.starting, return_exceptions=True)
            if seat.worker is not None:
                await seat.worker.kill("its session has ended", is_wanted=True)
        for number in [number for number, event in self._events.items() if event.owner == owner]:
            del self._events[number]

    # ------------------------------------------------------------------------------------ allocations

    async def open(self, owner: str, export: DeviceExport) -> tuple[int, int]:
        """Open a client's allocation; see ``DeviceMemory.open``."""
        device = self.device_of(export.device_uuid)
        async with self._seat(device, owner).lock:  # the same handle may be registered twice at once
            return device, await self._open_once(device, owner, export)

    async def _open_once(self, device: int, owner: str, export: DeviceExport) -> int:
        key = owner, export.device_uuid, export.handle
        known = self._by_handle.get(key) if export.handle else None
        if known is not None and not known.is_closing and known.export.nbytes == export.nbytes:
            known.count += 1
            return known.number
        fd = os.dup(export.fd) if export.fd >= 0 else -1
        allocation = self.enter(device, owner, replace(export, fd=fd))
        try:
            await self._open_in(await self.worker(device, owner), allocation)
        except BaseException:
            await asyncio.shield(self._drop(allocation))
            raise
        if export.handle:
            self._by_handle[key] = allocation
        return allocation.number

    async def allocate(self, device: int, nbytes: int) -> tuple[int, DeviceExport]:
        """Allocate memory of the daemon's own; see ``DeviceMemory.allocate``."""
        self._check_usable(device)
        worker = await self.worker(device, SELF)
        allocation = self.enter(device, SELF, DeviceExport(self._facts[device].device_uuid, nbytes))
        try:
            reply = await worker.request(control.Allocate(allocation.number, nbytes), timeout_s=_time_for(nbytes))
        except BaseException:
            await asyncio.shield(self._drop(allocation))
            raise
        allocation.home = worker
        allocation.export = replace(allocation.export, handle=bytes.fromhex(reply.handle))
        worker.opened.add(allocation.number)
        return allocation.number, allocation.export

    async def close(self, number: int) -> None:
        """Take one count off an allocation, and let go of it at the last."""
        allocation = self._allocations.get(number)
        if allocation is None:
            return
        allocation.count -= 1
        if allocation.count <= 0 and not allocation.is_closing:
            await asyncio.shield(self._drop(allocation))

    async def cut(self, number: int) -> None:
        """Kill the workers that have an allocation open."""
        workers = [s.worker for s in self._seats.values() if s.worker is not None and number in s.worker.opened]
        await asyncio.gather(*(worker.kill("memory that it moves bytes of has lost its owner") for worker in workers))

    async def wipe(self, number: int, offset: int, nbytes: int) -> None:
        """Fill a span of the daemon's own memory with zeros."""
        allocation = self._allocations[number]
        if allocation.home is None or allocation.home.is_lost:
            return  # gone, and never seen again
        await allocation.home.request(control.Wipe(number, offset, nbytes), timeout_s=_time_for(nbytes))

    def is_lost(self, number: int) -> bool:
        """Whether an allocation of the daemon's own went with its worker."""
        allocation = self._allocations.get(number)
        return allocation is None or (allocation.owner == SELF and (allocation.home is None or allocation.home.is_lost))

    def enter(self, device: int, owner: str, export: DeviceExport) -> Allocation:
        """Note an allocation; whoever needs it opens it then."""
        number = self._free_numbers.pop() if self._free_numbers else len(self._allocations) + 1
        allocation = self._allocations[number] = Allocation(number, device, owner, export)
        return allocation

    async def _drop(self, allocation: Allocation) -> None:
        """Let every worker close it; one that does not do so in time is killed, and has closed it thereby."""
        allocation.is_closing = True
        key = allocation.owner, allocation.export.device_uuid, allocation.export.handle
        if self._by_handle.get(key) is allocation:
            del self._by_handle[key]
        workers = [
            s.worker for s in self._seats.values() if s.worker is not None and allocation.number in s.worker.opened
        ]
        await asyncio.gather(*(self._close_in(worker, allocation) for worker in workers))
        _close_fd(allocation.export.fd)
        del self._allocations[allocation.number]
        self.lost.discard(allocation.number)
        self._free_numbers.append(allocation.number)

    @staticmethod
    async def _close_in(worker: WorkerProcess, allocation: Allocation) -> None:
        worker.opened.discard(allocation.number)
        try:
            await worker.request(control.Close(allocation.number), timeout_s=CLOSE_TIMEOUT_S)
        except XferdError as error:
            await worker.kill(f"it did not let go of memory: {error.message}")

    async def _open_in(self, worker: WorkerProcess, allocation: Allocation) -> None:
        if allocation.number in worker.opened:
            return
        if allocation.is_closing or (allocation.owner == SELF and self.is_lost(allocation.number)):
            raise Stale(
                f"GPU memory of {allocation.owner or 'a pool'} has gone", remedy="allocate or register it again"
            )
        export = allocation.export
        wanted = control.Open(allocation.number, export.nbytes, export.handle.hex(), allocation.device)
        await worker.request(wanted, export.fd)
        worker.opened.add(allocation.number)

    # ------------------------------------------------------------------------------------ host memory

    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        """Note host memory that workers may map."""
        number, self._next = self._next, self._next + 1
        self._segments[number] = Segment(number, address, nbytes, os.dup(fd))
        self._sort()
        return number

    async def drop_host(self, number: int) -> None:
        """Let workers forget host memory."""
        segment = self._segments.pop(number, None)
        if segment is None:
            return
        self._sort()
        workers = [s.worker for s in self._seats.values() if s.worker is not None and number in s.worker.segments]
        for worker in workers:
            worker.segments.discard(number)
            try:
                await worker.request(control.DropHost(number), timeout_s=_time_for(segment.nbytes))
            except XferdError as error:
                await worker.kill(f"it did not let go of host memory: {error.message}")
        os.close(segment.fd)

    @staticmethod
    async def _map_in(worker: WorkerProcess, segment: Segment) -> None:
        if segment.number not in worker.segments:
            wanted = control.MapHost(segment.number, segment.address, segment.nbytes)
            await worker.request(wanted, segment.fd, timeout_s=_time_for(segment.nbytes))
            worker.segments.add(segment.number)

    def segments_of(self, rows: NDArray[np.uint64]) -> list[Segment] | None:
        """Return the host memory that (address, nbytes) rows lie in; None where one lies in none that is known."""
        starts, segments = self._sorted
        if not segments:
            return None
        index = np.searchsorted(starts, rows[:, 0], side="right").astype(np.int64) - 1
        wanted = np.unique(index)
        if wanted[0] < 0:
            return None
        ends = np.array([segments[i].address + segments[i].nbytes for i in wanted.tolist()], dtype=np.uint64)
        if (rows[:, 0] + rows[:, 1] > ends[np.searchsorted(wanted, index)]).any():
            return None
        return [segments[i] for i in wanted.tolist()]

    def _sort(self) -> None:
        segments = sorted(self._segments.values(), key=lambda segment: segment.address)
        self._sorted = np.array([segment.address for segment in segments], dtype=np.uint64), segments

    # ------------------------------------------------------------------------------------ events

    async def open_event(self, owner: str, device: int, handle: bytes) -> int:
        """Open a client's event; see ``DeviceMemory.open_event``."""
        event = self._enter_event(owner, device, handle)
        try:
            await self._open_event_in(await self.worker(device, owner), event)
        except BaseException:
            self._events.pop(event.number, None)
            raise
        return event.number

    async def make_event(self, owner: str, device: int) -> tuple[int, bytes]:
        """Make an event; see ``DeviceMemory.make_event``."""
        worker = await self.worker(device, owner)
        event = self._enter_event(owner, device, b"")
        try:
            reply = await worker.request(control.MakeEvent(event.number))
        except BaseException:
            self._events.pop(event.number, None)
            raise
        event.handle, event.home = bytes.fromhex(reply.handle), worker
        worker.events.add(event.number)
        return event.number, event.handle

    def _enter_event(self, owner: str, device: int, handle: bytes) -> Event:
        number, self._next = self._next, self._next + 1
        event = self._events[number] = Event(number, owner, device, handle)
        return event

    def _event_for(self, worker: WorkerProcess, number: int) -> Event:
        event = self._events.get(number)
        if event is None or event.owner != worker.owner:
            raise NotFound(f"no event {number} of {worker.owner}", remedy="open events in the session that uses them")
        if event.device != worker.device:
            raise InvalidArgument(
                f"event {number} is of GPU {event.device}",
                limit=f"events of GPU {worker.device}, which moves the bytes",
                remedy="open one of that GPU",
            )
        return event

    @staticmethod
    async def _open_event_in(worker: WorkerProcess, event: Event) -> None:
        if event.number in worker.events:
            return
        if event.home is not None:
            raise Stale(f"event {event.number} went with the worker that made it", remedy="make another")
        await worker.request(control.OpenEvent(event.number, event.handle.hex()))
        worker.events.add(event.number)

    # ------------------------------------------------------------------------------------ what a command needs

    async def provide(
        self,
        worker: WorkerProcess,
        allocations: Iterable[int],
        segments: Iterable[Segment],
        events: Iterable[int],
    ) -> None:
        """Tell a worker of what it does not know yet.

        Raises:
            Stale, NotFound: something has gone meanwhile.
            InvalidArgument: the process that exported memory has gone.
            DeviceLost: the worker ended.
        """
        async with self._seat(worker.device, worker.owner).lock:  # chunks that miss the same memory come together
            for number in allocations:
                allocation = self._allocations.get(number)
                if allocation is None:
                    raise Stale(f"GPU allocation {number} has gone", remedy="register the memory again")
                await self._open_in(worker, allocation)
            for segment in segments:
                await self._map_in(worker, segment)
            for number in events:
                await self._open_event_in(worker, self._event_for(worker, number))

    def check_invariants(self) -> None:
        """Raise AssertionError where the registry does not agree with itself."""
        for number, allocation in self._allocations.items():
            assert allocation.number == number, "an allocation under another's number"
            assert number not in self._free_numbers, "a number that is used is free"
        for seat in self._seats.values():
            if seat.worker is not None and not seat.worker.is_lost:
                assert seat.worker.opened <= set(self._allocations), "a worker has opened what is not known"


def allocations_of(rows: NDArray[np.uint64]) -> list[int]:
    """Return the numbers of the allocations that rows of a ``DeviceSpace`` lie in."""
    numbers: list[int] = np.unique(rows[:, 0] >> np.uint64(ALLOCATION_SHIFT)).tolist()
    return numbers


def _time_for(nbytes: int) -> float:
    return REPLY_TIMEOUT_S + nbytes / float(1 << 30) * _GIB_S


def _close_fd(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
