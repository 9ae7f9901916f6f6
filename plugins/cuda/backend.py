"""The ``cuda`` backend: GPU memory to GPU memory and to host memory, by worker processes.

The daemon has no CUDA context and maps no libcuda: a stuck call, a crash, a dead client's mapping all end with a
worker. Files, objects, private memory and other nodes reach GPU memory through staging memory, which the planner
arranges.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from xferd.api.errors import (
    Cancelled,
    Closed,
    DeviceLost,
    InvalidArgument,
    MoveFailed,
    Unavailable,
    WouldBlock,
    XferdError,
)
from xferd.plugins.base import Backend, Begun, Chunk, DeviceSpace, FileSpace, MappedSpace, SpaceKind
from xferd.plugins.begun import told
from xferd.plugins.cuda.bounce import HostBounce
from xferd.plugins.cuda.layout import MAX_ROWS, Engine, Outcome, Side
from xferd.plugins.cuda.manager import PEERS, DeviceManager, allocations_of
from xferd.plugins.cuda.options import CudaOptions
from xferd.plugins.cuda.process import Command, Told
from xferd.plugins.devices import DeviceMemory
from xferd.plugins.movers import MoveCounter
from xferd.plugins.pairs import ByPair

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from xferd.api.types import DeviceInfo
    from xferd.plugins.base import BackendStatistics, Extent, Space
    from xferd.plugins.cuda.manager import Segment
    from xferd.plugins.cuda.process import WorkerProcess
    from xferd.plugins.devices import DeviceExport

# Assumed until chunks were timed; seen on one H100 on 2026-11-23: a kernel over 1024 x 4 KiB in 35 us with its table;
# 720 GB/s for 64 KiB x 1024, 50 over the bus.
_START_S = 60e-6
_PIECE_S = 15e-9
_DEVICE_NBYTES_PER_S = 700e9
_HOST_NBYTES_PER_S = 45e9

MAX_CHUNK_NBYTES = 256 << 20
MAX_CHUNK_ROWS = MAX_ROWS // 2  # of either side
"""A chunk of less would cost more to start than to move, and tables of parts are not kept."""

MAX_TRIES = 8
"""Times that one chunk is sent: a worker may miss memory, then not have kept its table; each miss is provided for."""

NOW_DEVICE_NBYTES = 64 << 20
NOW_HOST_NBYTES = 1 << 20
"""Largest moves that are waited for on the event loop: 65 us within an H100, 30 over its bus."""

NOW_BUDGET_S = 300e-6
"""Time after which such a move is given to the long way, which then waits for it: the GPU is busy with others."""

_PAIRS = frozenset(
    {
        (SpaceKind.DEVICE, SpaceKind.DEVICE),
        (SpaceKind.DEVICE, SpaceKind.MAPPED),
        (SpaceKind.MAPPED, SpaceKind.DEVICE),
    }
)

_MENDABLE = (Outcome.MISSING, Outcome.UNKNOWN_TABLE)
"""Answers after which a command is sent again: nothing moved, and what it lacks can be provided."""

_SIDES = {SpaceKind.MAPPED: Side.HOST, SpaceKind.DEVICE: Side.DEVICE, SpaceKind.FILE: Side.FILE}


class CudaBackend(Backend, DeviceMemory):
    """Sends chunks to the worker of the agent that they are moved for, and tells it what it misses.

    Args:
        options: as configured.
        now_budget_s: how long the event loop waits for a small move, where it does.
    """

    name: ClassVar[str] = "cuda"
    options: ClassVar[type[CudaOptions]] = CudaOptions

    def __init__(self, options: CudaOptions, *, now_budget_s: float = NOW_BUDGET_S) -> None:
        self._options = options
        self.manager = DeviceManager(options)
        self._bounce = HostBounce()
        self._tables: ByPair[int] = ByPair()
        self._table_ids = itertools.count(1)
        self._moved: dict[int, int] = {}
        self._seconds: dict[tuple[int, Engine], float] = {}
        self._counter = MoveCounter()
        self._now_budget_s = now_budget_s
        self._closed = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._tasks: set[asyncio.Task[int]] = set()

    # ------------------------------------------------------------------------------------ Backend

    async def start(self) -> None:
        """Look at the devices. One that cannot be used leaves the others and the host's memory alone."""
        await self.manager.start()

    async def aclose(self) -> None:
        """Wait for moves under way, then end all workers."""
        self._closed = True
        await self._quiet.wait()
        await self._bounce.aclose()
        await self.manager.aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return DEVICE with DEVICE, and DEVICE with MAPPED in both directions."""
        return _PAIRS

    def refusal(self, source: Space, target: Space) -> str:
        """Return why not; also where a GPU cannot be used."""
        reason = Backend.refusal(self, source, target)
        if reason:
            return reason
        for space in (source, target):
            if isinstance(space, DeviceSpace) and (why := self.manager.refusal(space.device)):
                return f"GPU {space.device}: {why}"
        return ""

    def manner(self, source: Space, target: Space) -> str:
        """Say what sort of device it is where it is none."""
        return "a simulated device" if self._options.driver == "simulated" else ""

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a linear guess from measurements on one GPU; the engine learns better ones."""
        is_inside = isinstance(source, DeviceSpace) and isinstance(target, DeviceSpace)
        return _START_S + pieces * _PIECE_S + nbytes / (_DEVICE_NBYTES_PER_S if is_inside else _HOST_NBYTES_PER_S)

    def slots(self, source: Space, target: Space) -> int:
        """Return how many chunks a device takes at once."""
        return self._options.slots

    def chunk_limits(self, source: Space, target: Space) -> tuple[int, int] | None:
        """Return (nbytes, rows) of a chunk: a millisecond between GPU memories, five over the bus."""
        return MAX_CHUNK_NBYTES, MAX_CHUNK_ROWS

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk; a cancelled call has come to rest before it raises.

        Raises:
            DeviceLost: the worker ended, or took too long and was killed.
            InvalidArgument: the process that exported the memory has gone.
            MoveFailed: the device failed.
        """
        return await told(functools.partial(self._start, chunk))

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        """Send a chunk to its worker, where there is one; what the worker turns out to miss is provided in a task."""
        return None if self._closed or self._at_hand(chunk) is None else self._start(chunk, done)

    def move_now(self, source: Extent, target: Extent, agent: str = "") -> Callable[[], int] | None:
        """Return a call that waits for a GPU on the event loop, where that is the shorter way: for small moves.

        Only where there are cores enough to spin. It raises where the worker is busy, is not there, misses something or
        takes too long, and the long way does it.
        """
        spaces = source.space, target.space
        limit = NOW_DEVICE_NBYTES if all(isinstance(space, DeviceSpace) for space in spaces) else NOW_HOST_NBYTES
        rows = max(len(source.iov), len(target.iov))
        if not self._options.daemon_spin_s or source.nbytes > limit or rows > MAX_CHUNK_ROWS:
            return None
        chunk = Chunk(source, target, source.nbytes, "now", "now", agent)
        device, owner = _device_of(chunk), _owner_of(chunk)

        def now() -> int:
            worker = self.manager.live(device, owner)
            if worker is None or self._closed or self.manager.lost:
                raise WouldBlock(f"GPU {device} has no worker at hand", remedy="move it the long way")
            ended = worker.run_now(self._command(chunk), self._now_budget_s)
            if ended is None or ended.outcome is not Outcome.DONE:
                raise WouldBlock(f"GPU {device} is busy", remedy="move it the long way")
            self._counter.chunks += 1
            self._counter.moved_nbytes += ended.nbytes
            self._count(device, ended)
            return ended.nbytes

        return now

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        return self._counter.snapshot(self._options.slots * max(len(self.manager.facts()), 1))

    # ------------------------------------------------------------------------------------ DeviceMemory

    def facts(self) -> tuple[DeviceInfo, ...]:
        """Return what is known of each device, with what it has moved."""
        return tuple(
            replace(
                facts,
                moved_nbytes=self._moved.get(facts.index, 0),
                kernel_s=self._seconds.get((facts.index, Engine.KERNEL), 0.0),
                copy_s=self._seconds.get((facts.index, Engine.COPY), 0.0),
            )
            for facts in self.manager.facts()
        )

    async def open(self, owner: str, export: DeviceExport) -> tuple[int, int]:
        """Open a client's allocation in its owner's worker."""
        return await self.manager.open(owner, export)

    async def allocate(self, device: int, nbytes: int) -> tuple[int, DeviceExport]:
        """Allocate memory of the daemon's own."""
        return await self.manager.allocate(device, nbytes)

    async def close(self, allocation: int) -> None:
        """Take one count off an allocation."""
        await self.manager.close(allocation)

    async def cut(self, allocation: int) -> None:
        """Kill the workers that have an allocation open."""
        await self.manager.cut(allocation)

    async def wipe(self, allocation: int, offset: int, nbytes: int) -> None:
        """Fill a span with zeros."""
        await self.manager.wipe(allocation, offset, nbytes)

    async def end_owner(self, owner: str) -> None:
        """Kill an owner's workers."""
        await self.manager.end_owner(owner)

    async def open_event(self, owner: str, device: int, handle: bytes) -> int:
        """Open a client's event."""
        return await self.manager.open_event(owner, device, handle)

    async def make_event(self, owner: str, device: int) -> tuple[int, bytes]:
        """Make an event."""
        return await self.manager.make_event(owner, device)

    def is_lost(self, allocation: int) -> bool:
        """Whether an allocation went with its worker."""
        return self.manager.is_lost(allocation)

    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        """Note host memory."""
        return self.manager.add_host(address, nbytes, fd)

    async def drop_host(self, number: int) -> None:
        """Forget host memory."""
        await self.manager.drop_host(number)

    # ------------------------------------------------------------------------------------ internals

    def _at_hand(self, chunk: Chunk) -> WorkerProcess | None:
        """Return the worker that a chunk can be sent to at once."""
        worker = self.manager.live(_device_of(chunk), _owner_of(chunk))
        return None if worker is None or worker.is_lost else worker

    def _start(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun:
        """Send a chunk to its worker; by a task where that must be started, or misses something."""
        if self._closed:
            raise Closed("the GPU backend was closed", remedy="the daemon is stopping")
        self._check_there(chunk)
        flight = _Flight()

        def end(outcome: int | Exception) -> None:
            self._counter.ended(chunk.nbytes, outcome)
            if not self._counter.busy:
                self._quiet.set()
            done(outcome)

        def hear(how: Told) -> None:
            if how.outcome is Outcome.DONE:
                self._count(_device_of(chunk), how)
                end(how.nbytes)
            elif how.outcome in _MENDABLE:
                flight.go_on(self._spawn(self._move(chunk, first=how), end))
            else:
                end(_error_of(_device_of(chunk), how))

        self._counter.busy += 1
        self._quiet.clear()
        worker = self._at_hand(chunk)
        if worker is None:
            flight.go_on(self._spawn(self._move(chunk), end))
        else:
            worker.submit(self._command(chunk), hear)
        return flight

    async def _move(self, chunk: Chunk, first: Told | None = None) -> int:
        """Send a chunk until it has moved, after providing what the worker misses; ``first`` is its first answer."""
        self._check_there(chunk)
        command = self._command(chunk)
        device, owner = _device_of(chunk), _owner_of(chunk)
        for _ in range(MAX_TRIES):
            worker = self.manager.live(device, owner) or await self.manager.worker(device, owner)
            how, first = first or await _run(worker, command), None
            match how.outcome:
                case Outcome.DONE:
                    self._count(device, how)
                    return how.nbytes
                case Outcome.MISSING:
                    segments = self._segments(chunk)
                    if segments is None:
                        return await self._bounce.move(chunk, self.manager, self._move)
                    await self._provide(worker, chunk, segments)
                case Outcome.UNKNOWN_TABLE:
                    continue  # it goes along the next time
                case _:
                    raise _error_of(device, how)
        raise Unavailable(f"the worker of GPU {device} does not keep what it is told", remedy="see the node's log")

    async def _provide(self, worker: WorkerProcess, chunk: Chunk, segments: list[Segment]) -> None:
        sides = [e for e in (chunk.source, chunk.target) if isinstance(e.space, DeviceSpace)]
        allocations = sorted({number for extent in sides for number in allocations_of(extent.iov)})
        events = [event for event in (chunk.wait_event, chunk.done_event) if event]
        await self.manager.provide(worker, allocations, segments, events)

    def _segments(self, chunk: Chunk) -> list[Segment] | None:
        """Return the host memory of a chunk; None where some is not memory that workers can map."""
        for extent in (chunk.source, chunk.target):
            if isinstance(extent.space, MappedSpace):
                return self.manager.segments_of(extent.iov)
        return []

    def _check_there(self, chunk: Chunk) -> None:
        """Refuse memory of a pool whose worker has died: other workers may have it mapped still, and it is nobody's."""
        if not self.manager.lost:
            return
        for extent in (chunk.source, chunk.target):
            if isinstance(extent.space, DeviceSpace) and not self.manager.lost.isdisjoint(allocations_of(extent.iov)):
                raise DeviceLost(
                    f"memory of a pool of GPU {extent.space.device} went with the worker that held it",
                    remedy="free the region, and allocate another one",
                )

    def _command(self, chunk: Chunk) -> Command:
        files = [e.space.fd for e in (chunk.source, chunk.target) if isinstance(e.space, FileSpace)]
        return Command(
            chunk.source,
            chunk.target,
            _SIDES[chunk.source.space.kind],
            _SIDES[chunk.target.space.kind],
            chunk.nbytes,
            0 if files else self._table_of(chunk.source, chunk.target),
            chunk.wait_event,
            chunk.done_event,
            chunk.source.space.device if isinstance(chunk.source.space, DeviceSpace) else 0,
            files[0] if files else 0,
        )

    def _table_of(self, source: Extent, target: Extent) -> int:
        """Return the id under which a worker keeps a pair of lists from its second time on; 0 for the first."""
        known = self._tables.get(source, target)
        if known:
            return known
        table_id = 0 if known is None else next(self._table_ids)
        self._tables.put(source, target, table_id)
        return table_id

    def _spawn(self, move: Coroutine[None, None, int], end: Callable[[int | Exception], None]) -> asyncio.Task[int]:
        """Run a move that could not be begun without a task; its end is told whatever becomes of it."""

        def ended(task: asyncio.Task[int]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                end(Cancelled("the chunk was stopped"))
            else:
                error = task.exception()
                end(error if isinstance(error, Exception) else task.result())

        task = asyncio.get_running_loop().create_task(move, name="provide for a device worker")
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def _count(self, device: int, how: Told) -> None:
        self._moved[device] = self._moved.get(device, 0) + how.nbytes
        key = device, how.engine
        self._seconds[key] = self._seconds.get(key, 0.0) + how.device_ns * 1e-9


async def _run(worker: WorkerProcess, command: Command) -> Told:
    """Send a command and wait for its end, also when cancelled."""

    def start(done: Callable[[Told | Exception], None]) -> Begun:
        worker.submit(command, done)
        return _Flight()

    return await told(start)


class _Flight(Begun):
    """A chunk that a worker has. It cannot be stopped: a GPU finishes what it was given, in milliseconds.

    What can be stopped is the task that goes on with it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[int] | None = None
        self._is_aborted = False

    def go_on(self, task: asyncio.Task[int]) -> None:
        """Take over a task."""
        self._task = task
        if self._is_aborted:
            task.cancel()

    def abort(self) -> None:
        """Stop the task, now or when it comes."""
        self._is_aborted = True
        if self._task is not None:
            self._task.cancel()


def _error_of(device: int, how: Told) -> XferdError:
    if how.lost is not None:
        return how.lost
    if how.outcome is Outcome.REFUSED:
        return InvalidArgument(f"GPU {device}: {how.text}", remedy="check the regions and their offsets")
    return MoveFailed(f"GPU {device}: {how.text}", remedy="see the node's log")


def _owner_of(chunk: Chunk) -> str:
    """Return whose worker moves a chunk: the agent's; agents of other nodes share one."""
    return chunk.agent if chunk.agent and "@" not in chunk.agent else PEERS


def _device_of(chunk: Chunk) -> int:
    return device_of(chunk.source.space, chunk.target.space)


def device_of(source: Space, target: Space) -> int:
    """Return the GPU whose worker moves between two spaces: the target's where both are of one.

    Raises:
        InvalidArgument: neither is.
    """
    for space in (target, source):
        if isinstance(space, DeviceSpace):
            return space.device
    raise InvalidArgument("a chunk without GPU memory", remedy="use another backend")
