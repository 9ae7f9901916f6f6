"""Performs what the machine instructs: moves chunks, keeps deadlines, delivers notifications, wakes who waits.

The only place between the sans-I/O machine and the event loop. Every chunk is a task of one task group; a chunk
that fails reports to the machine and leaves the group alone.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import structlog

from xferd.api.errors import Cancelled, InternalError, XferdError
from xferd.api.types import ENDED
from xferd.daemon.engine.machine import AbortChunks, Ended, SendNotification, Settle, StartChunk
from xferd.daemon.engine.passage import Passage, is_needed
from xferd.plugins.base import Chunk, Extent, MappedSpace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from xferd.api.types import Notification, SessionId, TransferId
    from xferd.daemon.engine.costs import CostModel
    from xferd.daemon.engine.machine import Instruction, Transfer, TransferMachine
    from xferd.daemon.engine.passage import Move
    from xferd.daemon.engine.plan import Plan
    from xferd.daemon.engine.sealing import Sealer
    from xferd.plugins.base import Backend, IovTable

_Outcome: TypeAlias = int | XferdError
"""Bytes moved, or why not."""

log = structlog.get_logger(__name__)


class Staging(Protocol):
    """Bounded staging memory, of which a slot holds a whole chunk; ``daemon/memory/staging.py`` has it."""

    def lease(self, holder: str, nbytes: int) -> AbstractAsyncContextManager[IovTable]:
        """Borrow a table over ``nbytes`` of this process's memory, waiting in turn. Cancel-safe."""


class Runner:
    """Runs transfers.

    Args:
        machine: owner of all transfers.
        backends: by name.
        costs: told of every chunk, when it starts and how it came to rest.
        staging: memory for routes of two hops.
        sealer: keeps the proof of what lies in storage pools.
        deliver: delivers a notification, here or on another node.
        on_ended: called when a transfer has come to rest, before anyone who waits is woken.
        clock: monotonic seconds plus an offset that makes them UNIX time.
    """

    def __init__(
        self,
        machine: TransferMachine,
        backends: Mapping[str, Backend],
        costs: CostModel,
        staging: Staging,
        *,
        sealer: Sealer,
        deliver: Callable[[Notification], Awaitable[None]],
        on_ended: Callable[[Transfer], None],
        clock: Callable[[], float],
    ) -> None:
        self._machine = machine
        self._backends = backends
        self._costs = costs
        self._staging = staging
        self._sealer = sealer
        self._passages: dict[TransferId, Passage] = {}
        self._deliver = deliver
        self._on_ended = on_ended
        self.clock = clock
        self._group = asyncio.TaskGroup()
        self._tasks: dict[TransferId, set[asyncio.Task[_Outcome]]] = {}
        self._deadlines: dict[TransferId, asyncio.TimerHandle] = {}
        self._waiters: dict[TransferId, list[asyncio.Future[None]]] = {}
        self._watchers: dict[SessionId, list[asyncio.Queue[Transfer]]] = {}
        self._listeners: dict[TransferId, list[Callable[[Transfer], None]]] = {}

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Cancel what still runs and wait until it has come to rest."""
        for transfer in list(self._machine.transfers.values()):
            self.cancel(transfer)
        await self._group.__aexit__(None, None, None)
        for handle in self._deadlines.values():
            handle.cancel()

    # ------------------------------------------------------------------------------------ what clients do

    def post(self, transfer: Transfer) -> None:
        """Post a transfer and arm its deadline."""
        instructions = self._machine.post(transfer, self.clock())
        if transfer.is_enclosed:
            self._passages[transfer.id] = Passage(transfer, self._backends, self._sealer)
        self._deadlines[transfer.id] = asyncio.get_running_loop().call_later(
            transfer.timeout_s, self._deadline, transfer, transfer.posts
        )
        self.perform(instructions)

    def quick(self, plan: Plan) -> Callable[[], int] | None:
        """Return a call that moves all of a plan's bytes at once; None where they need a thread or a peer.

        Only where the planner's first choice offers it, and in one chunk.
        """
        if len(plan.legs) != 1:
            return None
        [leg] = plan.legs
        route = leg.routes[0]
        if leg.chunks != 1 or route.is_staged:
            return None
        return self._backends[route.backends[0]].move_now(leg.source, leg.target)

    def is_enclosed(self, plan: Plan) -> bool:
        """Whether something must be opened before a plan's chunks move, and settled afterwards."""
        return is_needed(plan, self._backends, self._sealer)

    def post_quick(self, transfer: Transfer) -> bool:
        """Post a transfer by its quick move; False if that failed, and nothing has happened to its state.

        Raises:
            InvalidState: it cannot be posted now.
        """
        assert transfer.quick is not None
        self._machine.check_post(transfer)
        posted_at = self.clock()
        try:
            moved = transfer.quick()
        except XferdError:
            return False  # the long way tries again, and tells what is wrong
        if moved != transfer.total_nbytes:
            return False
        self._ended(self._machine.moved_at_once(transfer, posted_at, self.clock()).transfer)
        return True

    def listen(self, transfer: Transfer, listener: Callable[[Transfer], None]) -> None:
        """Call ``listener`` once, when the transfer ends, before others are woken."""
        self._listeners.setdefault(transfer.id, []).append(listener)

    def unlisten(self, transfer: Transfer, listener: Callable[[Transfer], None]) -> None:
        """Take a listener back; fine if it has been called."""
        listeners = self._listeners.get(transfer.id, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(transfer.id, None)

    def unlisten_all(self, transfer: Transfer) -> None:
        """Forget who listens: the transfer is forgotten too."""
        self._listeners.pop(transfer.id, None)

    def cancel(self, transfer: Transfer) -> None:
        """Begin to cancel; ``wait`` returns when it has come to rest."""
        self.perform(self._machine.cancel(transfer, self.clock()))

    def fail(self, transfer: Transfer, error: XferdError) -> None:
        """Begin to fail a transfer for a reason from outside, for example a lost peer."""
        self.perform(self._machine.fail(transfer, error, self.clock()))

    async def wait(self, transfers: Sequence[Transfer], timeout_s: float | None, *, any_of: bool = False) -> None:
        """Return when all (or any) of the transfers have ended, or the time is over. Cancel-safe."""
        pending = [transfer for transfer in transfers if transfer.state not in ENDED]
        if not pending or (any_of and len(pending) < len(transfers)) or timeout_s == 0:
            return
        loop = asyncio.get_running_loop()
        futures = [self._waiter(loop, transfer) for transfer in pending]
        try:
            await asyncio.wait(
                futures,
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED if any_of else asyncio.ALL_COMPLETED,
            )
        finally:
            for transfer, future in zip(pending, futures, strict=True):
                self._drop_waiter(transfer, future)

    def watch(self, session: SessionId) -> asyncio.Queue[Transfer]:
        """Return a queue that gets each of the session's transfers as it ends; ``unwatch`` it afterwards."""
        queue: asyncio.Queue[Transfer] = asyncio.Queue()
        self._watchers.setdefault(session, []).append(queue)
        return queue

    def unwatch(self, session: SessionId, queue: asyncio.Queue[Transfer]) -> None:
        """Stop filling a queue."""
        watchers = self._watchers.get(session, [])
        watchers.remove(queue)
        if not watchers:
            self._watchers.pop(session, None)

    # ------------------------------------------------------------------------------------ instructions

    def perform(self, instructions: Iterable[Instruction]) -> None:
        """Perform instructions in order; those that they give rise to come after them."""
        queue = deque(instructions)
        while queue:
            match queue.popleft():
                case StartChunk() as start:
                    name = f"chunk {start.transfer.id} {start.chunk.leg}.{start.chunk.number}"
                    self._spawn(start.transfer, self._move(start), name, functools.partial(self._moved, start))
                case SendNotification(transfer, notification):
                    name = f"notify {transfer.id}"
                    self._spawn(
                        transfer,
                        self._notify(notification),
                        name,
                        functools.partial(self._notified, transfer),
                    )
                case Settle(transfer, commit):
                    name = f"settle {transfer.id}"
                    report = functools.partial(self._settled, transfer, commit)
                    self._spawn(transfer, self._settle(transfer, commit=commit), name, report)
                case AbortChunks(transfer):
                    for task in self._tasks.get(transfer.id, ()):
                        task.cancel()
                case Ended(transfer):
                    self._ended(transfer)

    def _spawn(
        self,
        transfer: Transfer,
        coroutine: Coroutine[Any, Any, _Outcome],
        name: str,
        report: Callable[[_Outcome], None],
    ) -> None:
        """Start a task whose outcome is reported whatever becomes of it, even if it is cancelled before it began."""
        task: asyncio.Task[_Outcome] = self._group.create_task(coroutine, name=name)
        tasks = self._tasks.setdefault(transfer.id, set())
        tasks.add(task)

        def done(ended: asyncio.Task[_Outcome]) -> None:
            tasks.discard(ended)
            if not tasks and self._tasks.get(transfer.id) is tasks:
                del self._tasks[transfer.id]
            report(Cancelled(f"transfer {transfer.id} was stopped") if ended.cancelled() else ended.result())

        task.add_done_callback(done)

    async def _move(self, start: StartChunk) -> _Outcome:
        outcome: _Outcome | None = None
        metered = self._costs.begin(start.route, start.stop - start.start, start.leg_nbytes)
        try:
            outcome = await self._move_chunk(start)
        except XferdError as error:
            outcome = error
        except Exception as caught:
            # A backend's bug ends its chunk, not the daemon.
            transfer = start.transfer
            log.exception("backend_bug", transfer=transfer.id, route=start.route.name, cause_id=transfer.cause_id)
            bug = InternalError(f"{start.route.name}: {type(caught).__name__}: {caught}", remedy="see the node's log")
            bug.__cause__ = caught
            outcome = bug
        finally:
            self._costs.end(metered, outcome)  # of a cancelled one too
        return outcome

    def _moved(self, start: StartChunk, outcome: _Outcome) -> None:
        now = self.clock()
        if isinstance(outcome, XferdError):
            self.perform(self._machine.chunk_failed(start.transfer, start.chunk, outcome, now))
        else:
            self.perform(self._machine.chunk_done(start.transfer, start.chunk, outcome, now))

    async def _move_chunk(self, start: StartChunk) -> int:
        transfer, route = start.transfer, start.route
        assert transfer.plan is not None
        leg = transfer.plan.legs[start.chunk.leg]
        whole = start.start == 0 and start.stop == leg.cuts[-1]
        source = leg.source if whole else leg.source.cut(start.start, start.stop)
        target = leg.target if whole else leg.target.cut(start.start, start.stop)
        nbytes = start.stop - start.start
        passage = self._passages.get(transfer.id)
        if passage is None:
            moves: list[Move] = [self._backends[name].move for name in route.backends]
        else:
            moves = await passage.moves(start.chunk.leg, route)
        if not route.is_staged:
            return await moves[0](self._chunk(transfer, source, target, nbytes))
        async with self._staging.lease(f"transfer {transfer.id}", nbytes) as table:
            staged = Extent(MappedSpace(), table)
            first, second = moves
            moved = await first(self._chunk(transfer, source, staged, nbytes))
            if moved != nbytes:
                return moved
            return await second(self._chunk(transfer, staged, target, nbytes))

    @staticmethod
    def _chunk(transfer: Transfer, source: Extent, target: Extent, nbytes: int) -> Chunk:
        return Chunk(source, target, nbytes, transfer.wire_id, transfer.cause_id, transfer.agent)

    async def _settle(self, transfer: Transfer, *, commit: bool) -> _Outcome:
        passage = self._passages.pop(transfer.id)
        try:
            await (passage.commit() if commit else passage.abandon())
        except XferdError as error:
            return error
        except Exception as caught:
            log.exception("backend_bug", transfer=transfer.id, cause_id=transfer.cause_id)
            bug = InternalError(f"{type(caught).__name__}: {caught}", remedy="see the node's log")
            bug.__cause__ = caught
            return bug
        return 0

    def _settled(self, transfer: Transfer, commit: bool, outcome: _Outcome) -> None:
        error = outcome if isinstance(outcome, XferdError) else None
        self.perform(self._machine.settled(transfer, committed=commit, error=error, now=self.clock()))

    async def _notify(self, notification: Notification) -> _Outcome:
        try:
            await self._deliver(notification)
        except XferdError as error:
            return error
        return 0

    def _notified(self, transfer: Transfer, outcome: _Outcome) -> None:
        error = outcome if isinstance(outcome, XferdError) else None
        self.perform(self._machine.notified(transfer, error, self.clock()))

    def _deadline(self, transfer: Transfer, post: int) -> None:
        self.perform(self._machine.deadline(transfer, post, self.clock()))

    def _ended(self, transfer: Transfer) -> None:
        deadline = self._deadlines.pop(transfer.id, None)
        if deadline is not None:
            deadline.cancel()
        self._on_ended(transfer)
        for listener in self._listeners.pop(transfer.id, ()):
            listener(transfer)
        for future in self._waiters.pop(transfer.id, []):
            if not future.done():
                future.set_result(None)
        for queue in self._watchers.get(transfer.session, []):
            queue.put_nowait(transfer)

    def _waiter(self, loop: asyncio.AbstractEventLoop, transfer: Transfer) -> asyncio.Future[None]:
        future = loop.create_future()
        self._waiters.setdefault(transfer.id, []).append(future)
        return future

    def _drop_waiter(self, transfer: Transfer, future: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(transfer.id)
        if waiters is not None and future in waiters:
            waiters.remove(future)
            if not waiters:
                del self._waiters[transfer.id]
