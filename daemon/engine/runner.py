"""Performs what the machine instructs: moves chunks, keeps deadlines, delivers notifications, tells of ends.

The only place between the sans-I/O machine and the event loop. A chunk of one hop is begun where its backend has
``begin``: a call that starts it and a call that tells its end, and no task, because a task with its callbacks costs as
much as copying 256 KiB. Whatever has to await something on its way is a task of one task group: chunks through staging
memory and those of legs and tickets that must be opened first, and those of backends that only have ``move``. What
fails reports to the machine either way, and leaves the group alone.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import structlog

from xferd.api.errors import Cancelled, InternalError, XferdError
from xferd.daemon.engine.deadlines import Deadlines
from xferd.daemon.engine.ends import Ends
from xferd.daemon.engine.machine import AbortChunks, Ended, SendNotification, Settle, StartChunk
from xferd.daemon.engine.passage import Passage, is_needed
from xferd.plugins.base import Chunk, Extent, MappedSpace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from xferd.api.types import Notification, TransferId
    from xferd.daemon.engine.costs import CostModel, Metered
    from xferd.daemon.engine.machine import Instruction, Transfer, TransferMachine
    from xferd.daemon.engine.passage import Move
    from xferd.daemon.engine.plan import ChunkRef, Plan
    from xferd.daemon.engine.sealing import Sealer
    from xferd.plugins.base import Backend, Begun, IovTable

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
        on_ended: called when a transfer has come to rest, before anyone who waits for it goes on.
        clock: monotonic seconds plus an offset that makes them UNIX time.

    Attributes:
        ends: who is told of ends, beside ``on_ended``.
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
        self._begun: dict[TransferId, dict[ChunkRef, Begun]] = {}
        self._deadlines = Deadlines(clock, self._deadline)
        self.ends = Ends()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Cancel what still runs and wait until it has come to rest."""
        transfers = list(self._machine.transfers.values())
        for transfer in transfers:
            self.cancel(transfer)
        try:
            await self.ends.wait(transfers, None)
        finally:
            await self._group.__aexit__(None, None, None)
            self._deadlines.close()

    # ------------------------------------------------------------------------------------ what clients do

    def post(self, transfer: Transfer) -> None:
        """Post a transfer and arm its deadline."""
        now = self.clock()
        instructions = self._machine.post(transfer, now)
        if transfer.is_enclosed:
            self._passages[transfer.id] = Passage(transfer, self._backends, self._sealer)
        self._deadlines.arm(transfer, now)
        self.perform(instructions)

    def quick(self, plan: Plan, agent: str) -> Callable[[], int] | None:
        """Return a call that moves all of a plan's bytes at once; None where they need a thread or a peer.

        Only where the planner's first choice offers it, and in one chunk.
        """
        if len(plan.legs) != 1:
            return None
        [leg] = plan.legs
        route = leg.routes[0]
        if leg.chunks != 1 or route.is_staged:
            return None
        return self._backends[route.backends[0]].move_now(leg.source, leg.target, agent)

    def is_enclosed(self, plan: Plan, *, durable: bool) -> bool:
        """Whether something must be opened before a plan's chunks move, and settled afterwards."""
        return is_needed(plan, self._backends, self._sealer, durable=durable)

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
        self._machine.moved_at_once(transfer, posted_at, self.clock())
        self._ended(transfer)
        return True

    def cancel(self, transfer: Transfer) -> None:
        """Begin to cancel; ``ends`` tells when it has come to rest."""
        self.perform(self._machine.cancel(transfer, self.clock()))

    def fail(self, transfer: Transfer, error: XferdError) -> None:
        """Begin to fail a transfer for a reason from outside, for example a lost peer."""
        self.perform(self._machine.fail(transfer, error, self.clock()))

    # ------------------------------------------------------------------------------------ instructions

    def perform(self, instructions: Iterable[Instruction]) -> None:
        """Perform instructions in order; those that they give rise to come after them."""
        queue = deque(instructions)
        while queue:
            match queue.popleft():
                case StartChunk() as start:
                    self._start(start)
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
                    for begun in self._begun.get(transfer.id, {}).values():
                        begun.abort()
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

    def _start(self, start: StartChunk) -> None:
        """Start a chunk; its end is reported in a later turn of the event loop, whatever it is."""
        transfer, route = start.transfer, start.route
        metered = self._costs.begin(route, start.stop - start.start, start.leg_nbytes)
        passage = self._passages.get(transfer.id)
        chunk = self._chunk(start)
        if passage is None and not route.is_staged:
            told = functools.partial(self._told, start, metered)
            try:
                begun = self._backends[route.hops[0].backend].begin(chunk, told)
            except Exception as refused:  # noqa: BLE001  # it is looked at where all ends are
                asyncio.get_running_loop().call_soon(told, refused)
                return
            if begun is not None:
                self._begun.setdefault(transfer.id, {})[start.chunk] = begun
                return
        name = f"chunk {transfer.id} {start.chunk.leg}.{start.chunk.number}"
        report = functools.partial(self._moved, start, metered)
        self._spawn(transfer, self._move(start, chunk, passage), name, report)

    def _told(self, start: StartChunk, metered: Metered | None, end: int | Exception) -> None:
        """Hear from a backend how a chunk that was begun came to rest."""
        mine = self._begun.get(start.transfer.id)
        if mine is not None:  # else it was refused, and never begun
            mine.pop(start.chunk, None)
            if not mine:
                del self._begun[start.transfer.id]
        if not isinstance(end, int | XferdError):
            end = self._bug(start.transfer, start.route.name, end)
        self._moved(start, metered, end)

    async def _move(self, start: StartChunk, chunk: Chunk, passage: Passage | None) -> _Outcome:
        try:
            return await self._move_chunk(start, chunk, passage)
        except XferdError as error:
            return error
        except Exception as caught:  # noqa: BLE001  # a backend's bug ends its chunk, not the daemon
            return self._bug(start.transfer, start.route.name, caught)

    def _moved(self, start: StartChunk, metered: Metered | None, outcome: _Outcome) -> None:
        self._costs.end(metered, None if isinstance(outcome, Cancelled) else outcome)
        now = self.clock()
        if isinstance(outcome, XferdError):
            self.perform(self._machine.chunk_failed(start.transfer, start.chunk, outcome, now))
        else:
            self.perform(self._machine.chunk_done(start.transfer, start.chunk, outcome, now))

    async def _move_chunk(self, start: StartChunk, chunk: Chunk, passage: Passage | None) -> int:
        route = start.route
        if passage is None:
            moves: list[Move] = [self._backends[name].move for name in route.backends]
        else:
            moves = await passage.moves(start.chunk.leg, route, start.start)
        if not route.is_staged:
            return await moves[0](chunk)
        async with self._staging.lease(f"transfer {start.transfer.id}", chunk.nbytes) as table:
            staged = Extent(MappedSpace(), table)
            first, second = moves
            moved = await first(replace(chunk, target=staged))
            if moved != chunk.nbytes:
                return moved
            return await second(replace(chunk, source=staged))

    @staticmethod
    def _chunk(start: StartChunk) -> Chunk:
        transfer = start.transfer
        assert transfer.plan is not None
        leg = transfer.plan.legs[start.chunk.leg]
        # One that is posted again is likely to be posted often.
        source, target = leg.part(start.chunk.number, keep=transfer.posts > 1)
        nbytes = start.stop - start.start
        return Chunk(
            source,
            target,
            nbytes,
            transfer.wire_id,
            transfer.cause_id,
            transfer.agent,
            transfer.wait_event,
            transfer.done_event,
            transfer.verify,
            transfer.durable,
        )

    @staticmethod
    def _bug(transfer: Transfer, name: str, caught: Exception) -> InternalError:
        log.error("backend_bug", transfer=transfer.id, route=name, cause_id=transfer.cause_id, exc_info=caught)
        bug = InternalError(f"{name}: {type(caught).__name__}: {caught}", remedy="see the node's log")
        bug.__cause__ = caught
        return bug

    async def _settle(self, transfer: Transfer, *, commit: bool) -> _Outcome:
        passage = self._passages.pop(transfer.id)
        try:
            await (passage.commit() if commit else passage.abandon())
        except XferdError as error:
            return error
        except Exception as caught:  # noqa: BLE001  # as with chunks
            return self._bug(transfer, "settling", caught)
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
        # Told before the books are kept: a client may be looking at its ring in this very moment.
        try:
            self.ends.tell(transfer)
        finally:  # a listener with a bug must not leave regions held
            self._deadlines.drop(transfer)
            self._on_ended(transfer)
