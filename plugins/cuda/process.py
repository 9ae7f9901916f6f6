"""One device worker as the daemon sees it: a child process, its queues, its socket, and when it is given up.

Used on the event loop. What a worker is asked for and by whom is ``manager.py``; the other end is ``worker.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import structlog

from xferd.api.errors import DeviceLost, Unavailable, XferdError
from xferd.api.timeouts import timeout
from xferd.plugins.cuda import control
from xferd.plugins.cuda.layout import (
    COMMANDS,
    NO_TABLE,
    TABLES,
    TOTAL_NBYTES,
    Engine,
    Outcome,
    SharedQueues,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import Extent
    from xferd.plugins.cuda.layout import Side
    from xferd.plugins.cuda.options import CudaOptions

REPLY_TIMEOUT_S = 10.0
"""For a request over the socket, beside what a large one takes; ``Close`` has less (``CLOSE_TIMEOUT_S``)."""

CLOSE_TIMEOUT_S = 1.0
"""A worker that does not let go of memory so quickly is killed: who exported it has gone, or wants it back."""

STOP_TIMEOUT_S = 2.0

_GIB = float(1 << 30)

log = structlog.get_logger(__name__)


class Told(NamedTuple):
    """How a command ended. ``lost`` is set where the worker ended before it said so."""

    outcome: Outcome
    nbytes: int
    device_ns: int
    engine: Engine
    text: str
    lost: DeviceLost | None = None


class Command(NamedTuple):
    """What a worker is to move; ``table_id`` 0 is not kept."""

    source: Extent
    target: Extent
    source_side: Side
    target_side: Side
    nbytes: int
    table_id: int
    wait_event: int
    done_event: int
    source_device: int
    file: int = 0


class _Pending(NamedTuple):
    done: Callable[[Told], None]
    deadline: float
    table_slot: int
    table_id: int


class WorkerProcess:
    """A worker of one device for one owner. ``start`` once, then anything, then ``stop`` or ``kill``.

    Attributes:
        opened: allocations that it has mapped.
        segments: host memory that it has mapped.
        events: numbers of the events that it knows.
        ready: what it said when it was ready.
        pinned_nbytes: host memory that the driver has locked for it, as it said last.
        free_nbytes: of the device, as it said last.
    """

    def __init__(
        self,
        device: int,
        owner: str,
        options: CudaOptions,
        on_end: Callable[[WorkerProcess], None],
        *,
        with_files: bool = False,
    ) -> None:
        self.device = device
        self.owner = owner
        self.opened: set[int] = set()
        self.segments: set[int] = set()
        self.events: set[int] = set()
        self.pinned_nbytes = 0
        self.free_nbytes = 0
        self._options = options
        self._on_end = on_end
        self._with_files = with_files
        self._tables: set[int] = set()
        self._free_slots = list(range(TABLES - 1, -1, -1))
        self._pending: dict[int, _Pending] = {}
        self._backlog: deque[tuple[Command, Callable[[Told], None]]] = deque()
        self._replies: deque[asyncio.Future[control.Ready | control.Reply]] = deque()
        self._cookie = 0
        self._spin_s = options.daemon_spin_s
        self._awake_until = 0.0
        self._is_awake = False
        self._late = 0  # commands that ``run_now`` has not waited for to the end
        self._deadline: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self.end_reason = ""
        self.is_wanted = False  # its end
        self._lost: DeviceLost | None = None
        self._ended: asyncio.Future[None] | None = None
        self._reaping: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "lost" if self._lost else f"{len(self._pending)} under way"
        return f"<WorkerProcess device {self.device} of {self.owner or 'the daemon'} {state}>"

    @property
    def is_lost(self) -> bool:
        """Whether it is given up: nothing may be asked of it any more."""
        return self._lost is not None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    # ------------------------------------------------------------------------------------ life

    async def start(self) -> control.Ready:
        """Start the process and return what it says of its device.

        Raises:
            Unsupported, NotFound, Unavailable: what it said instead; it has ended.
            DeviceLost: it ended without a word, or took too long.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._open()
        except OSError as exc:
            raise Unavailable(
                f"a worker for GPU {self.device} cannot be started: {exc}",
                limit="RLIMIT_NOFILE and RLIMIT_NPROC",
                remedy="raise LimitNOFILE= and TasksMax= of the daemon's unit",
            ) from exc
        self._ended = self._loop.create_future()
        self._reaping = self._loop.create_task(self._reap(), name=f"device worker {self._process.pid}")
        self._loop.add_reader(self._socket.fileno(), self._on_reply)
        self._loop.add_reader(self._told, self._on_told)
        try:
            said = await self._reply(self._options.start_timeout)
            if isinstance(said, control.Reply):
                said.check()
                raise DeviceLost(f"{self!r} said {said}", remedy="see the node's log")
        except XferdError:
            await self.kill("it did not start")
            raise
        except asyncio.CancelledError:
            self._give_up("its start was cancelled")
            raise
        self.ready = said
        self.free_nbytes = said.free_nbytes
        return said

    def _open(self) -> None:
        """Make what is shared, and the process, which takes a millisecond or two; where that fails nothing is left."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(self._socket.close)
            theirs.callback(other.close)
            self._socket.setblocking(False)
            self._wake = self._eventfd(ours)
            self._told = self._eventfd(ours)
            memory = os.memfd_create(f"xferd:worker:{self.device}", os.MFD_CLOEXEC)
            theirs.callback(os.close, memory)
            os.ftruncate(memory, TOTAL_NBYTES)
            self._queues = SharedQueues(memory)
            fds = (other.fileno(), memory, self._wake, self._told)
            self._process = subprocess.Popen(self._argv(*fds), stdin=subprocess.DEVNULL, pass_fds=fds)
            ours.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            ours.pop_all()

    @staticmethod
    def _eventfd(stack: contextlib.ExitStack) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, fd)
        return fd

    async def kill(self, reason: str, *, is_wanted: bool = False) -> None:
        """End it now. When this returns it has gone, and with it all that it had mapped. Twice is fine."""
        self.is_wanted = self.is_wanted or is_wanted
        self._give_up(reason)
        if self._ended is not None:
            await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """Let it end by itself, with nothing under way; kill it if it does not."""
        self.is_wanted = True
        if self._lost is None and self._ended is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(TimeoutError):
                async with timeout(STOP_TIMEOUT_S):
                    await asyncio.shield(self._ended)
        await self.kill("the daemon is stopping")

    # ------------------------------------------------------------------------------------ requests

    async def request(
        self, message: control.Request, fd: int = -1, *, timeout_s: float = REPLY_TIMEOUT_S
    ) -> control.Reply:
        """Ask over the socket. A worker that does not answer in time is killed; a cancelled call is answered still.

        Raises:
            DeviceLost: it has ended, or was killed for this.
            Others: what it said.
        """
        if self._lost is not None:
            raise self._lost
        control.send(self._socket, message, fd)
        said = await self._reply(timeout_s)
        if not isinstance(said, control.Reply):
            raise DeviceLost(f"{self!r} answered {type(said).__name__}", remedy="see the node's log")
        self.free_nbytes, self.pinned_nbytes = said.free_nbytes or self.free_nbytes, said.pinned_nbytes
        return said.check()

    async def _reply(self, timeout_s: float) -> control.Ready | control.Reply:
        future: asyncio.Future[control.Ready | control.Reply] = self._loop.create_future()
        self._replies.append(future)
        try:
            async with timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError as exc:
            reason = f"it did not answer within {timeout_s:g} s"
            await self.kill(reason)
            raise self._lost or DeviceLost(reason) from exc
        finally:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to look

    def _on_reply(self) -> None:
        while True:
            try:
                received = control.receive(self._socket)
            except BlockingIOError:
                return
            except (OSError, ValueError, KeyError, TypeError) as exc:
                self._give_up(f"its socket: {exc}")
                return
            if received is None:  # it is ending, and its status says more
                self._loop.remove_reader(self._socket.fileno())
                self._end_timer = self._loop.call_later(STOP_TIMEOUT_S, self._give_up, "it closed its socket")
                return
            for fd in received.fds:
                os.close(fd)
            if self._replies and isinstance(received.message, control.Ready | control.Reply):
                future = self._replies.popleft()
                if not future.done():
                    future.set_result(received.message)

    # ------------------------------------------------------------------------------------ commands

    def submit(self, command: Command, done: Callable[[Told], None]) -> None:
        """Send a command; ``done`` is called on the event loop, once, when no byte of it moves any more."""
        if self._ended is not None and self._ended.done():
            done(self._told_lost())
            return
        if self._lost is not None:
            assert self._ended is not None
            self._ended.add_done_callback(lambda _: done(self._told_lost()))
            return
        if self._backlog or self._late or not self._free_slots or len(self._pending) >= COMMANDS:
            self._backlog.append((command, done))
            return
        self._send(command, done)
        self._ring()
        if self._spin_s:
            self._stay_awake()

    def run_now(self, command: Command, budget_s: float) -> Told | None:
        """Send a command and look for its end without sleeping; None where that did not come in time, or cannot be had.

        What is submitted later waits until a command that came late has ended, so that nobody who then sends the same
        bytes again is told of their end before.
        """
        if self._lost is not None or self._pending or self._backlog or not self._free_slots:
            return None
        ends: list[Told] = []
        is_late = False

        def done(told: Told) -> None:
            ends.append(told)
            if is_late:
                self._late -= 1

        self._send(command, done)
        self._ring()
        self._stay_awake()
        stop = time.perf_counter() + budget_s
        while not ends:
            if self._queues.has_completion():
                self._take_completions()
            elif time.perf_counter() > stop:
                is_late = True
                self._late += 1
                return None
        return ends[0]

    def _send(self, command: Command, done: Callable[[Told], None]) -> None:
        rows, others = len(command.source.iov), len(command.target.iov)
        slot = NO_TABLE
        if command.table_id not in self._tables:
            slot = self._free_slots.pop()
            table = self._queues.tables[slot]
            table[:rows] = command.source.iov
            table[rows : rows + others] = command.target.iov
            if command.table_id:
                self._tables.add(command.table_id)
        self._cookie += 1
        limit_s = self._options.command_timeout + command.nbytes / _GIB
        deadline = self._loop.time() + limit_s
        self._pending[self._cookie] = _Pending(done, deadline, slot, command.table_id)
        self._queues.put_command(
            self._cookie,
            command.table_id,
            command.nbytes,
            rows,
            others,
            command.source_side,
            command.target_side,
            0,
            slot,
            command.wait_event,
            command.done_event,
            command.source_device,
            command.file,
        )
        if self._deadline is None:
            self._deadline = self._loop.call_at(deadline, self._check_deadlines)

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _on_told(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._told)
        self._take_completions()
        sent = False
        while (
            self._backlog
            and not self._late
            and self._free_slots
            and len(self._pending) < COMMANDS
            and self._lost is None
        ):
            self._send(*self._backlog.popleft())
            sent = True
        if sent:
            self._ring()

    def _stay_awake(self) -> None:
        """Keep the event loop from sleeping for a while: it looks here in each of its turns, and serves all others.

        A loop that sleeps has to be woken, for the answer and again for the client's next command, and a core that has
        gone idle takes longer for that than a GPU for a small move.
        """
        self._awake_until = time.perf_counter() + self._spin_s
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_awake = time.perf_counter() < self._awake_until and self._lost is None
        if self._is_awake:
            self._loop.call_soon(self._look)
            if self._pending and self._queues.has_completion():
                self._on_told()
                self._stay_awake()

    def _take_completions(self) -> None:
        while (completion := self._queues.take_completion()) is not None:
            cookie, nbytes, device_ns, outcome, engine, text = completion
            pending = self._pending.pop(cookie)
            if pending.table_slot != NO_TABLE:
                self._free_slots.append(pending.table_slot)
            if outcome != Outcome.DONE and pending.table_id:
                self._tables.discard(pending.table_id)  # sent along the next time: it was not kept, or is no more
            pending.done(Told(Outcome(outcome), nbytes, device_ns, Engine(engine), text))

    def _check_deadlines(self) -> None:
        self._deadline = None
        if not self._pending:
            return
        earliest = min(pending.deadline for pending in self._pending.values())
        if earliest > self._loop.time():
            self._deadline = self._loop.call_at(earliest, self._check_deadlines)
        else:
            self._give_up(f"a command was not done within its time ({self._options.command_timeout:g} s and more)")

    # ------------------------------------------------------------------------------------ the end

    def _give_up(self, reason: str) -> None:
        if self._lost is not None or self._ended is None:
            return
        self.end_reason = reason
        self._lost = DeviceLost(
            f"the worker of GPU {self.device} for {self.owner or 'the daemon'} (pid {self.pid}) was lost: {reason}",
            remedy="submit again: the next use starts another worker",
        )
        self._process.kill()

    async def _reap(self) -> None:
        """Wait for the process's end; only then is it sure that nothing of it moves, and its commands are told so."""
        exited: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, _finish, exited)
        await exited
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()  # at once
        self._give_up(f"it ended with {_status(status)}")
        assert self._lost is not None
        assert self._ended is not None
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._told)
        self._take_completions()  # what it had told before
        self._socket.close()
        os.close(self._wake)
        os.close(self._told)
        if self._deadline is not None:
            self._deadline.cancel()
        self._ended.set_result(None)
        pending, self._pending = list(self._pending.values()), {}
        backlog, self._backlog = list(self._backlog), deque()
        self._on_end(self)
        for one in pending:
            one.done(self._told_lost())
        for _, done in backlog:
            done(self._told_lost())
        for future in self._replies:
            if not future.done():
                future.set_exception(self._lost)
        self._replies.clear()

    def _told_lost(self) -> Told:
        assert self._lost is not None
        return Told(Outcome.FAILED, 0, 0, Engine.NONE, self._lost.message, self._lost)

    def _argv(self, theirs: int, memory: int, wake: int, told: int) -> list[str]:
        options = self._options
        values = {
            "device": self.device,
            "driver": options.driver,
            "spin": options.worker_spin_s,
            "socket": theirs,
            "memory": memory,
            "wake": wake,
            "told": told,
            "simulated-nbytes": options.simulated_nbytes,
            "simulated-devices": options.simulated_devices,
        }
        flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
        if self._with_files:
            flags.append("--files")
        return [sys.executable, "-m", "xferd.plugins.cuda.worker", *flags]


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _status(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"
