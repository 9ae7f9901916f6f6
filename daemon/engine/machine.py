"""The transfers themselves, sans I/O: events in, instructions out.

``TransferMachine`` owns every transfer's state. Its methods are the events; each returns the instructions that
``runner.py`` performs, feeding results back as further events. Nothing here waits, sleeps, reads a clock or touches
a byte, so that every order of events can be tried in a unit test.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from xferd.api.errors import (
    Cancelled,
    DeadlineExceeded,
    IntegrityError,
    InternalError,
    InvalidState,
    MoveFailed,
    Overloaded,
    PeerLost,
    ProtocolViolation,
    ShortTransfer,
    Unsupported,
    XferdError,
)
from xferd.api.types import Telemetry, TransferState, TransferStatus
from xferd.daemon.engine.plan import ChunkRef
from xferd.daemon.engine.states import ACTIVE, Event, Step, next_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import Notification, Priority, SessionId, TransferId, TransferOp
    from xferd.daemon.engine.plan import Plan, Route
    from xferd.daemon.engine.scheduler import Scheduler, SlotKey

ROUTE_FAULTS = (
    MoveFailed,
    PeerLost,
    ProtocolViolation,
    ShortTransfer,
    IntegrityError,
    Unsupported,
    Overloaded,
    InternalError,
)
"""Errors that another route may not have. All others are about the request, and end the transfer."""


@dataclass(slots=True)
class Transfer:
    """One transfer. Only the machine writes to it.

    ``quick``, where it is set, moves all of the plan's bytes within one short call; see ``moved_at_once``.
    ``is_enclosed`` says that something surrounds the chunks of each post, which must be settled before the end
    (``passage.py``); ``verify``, that what is read must be proven; ``durable``, that files are flushed before DONE.
    """

    id: TransferId
    session: SessionId
    agent: str
    key: str
    op: TransferOp
    priority: Priority
    cause_id: str
    local_node: str
    remote_node: str
    timeout_s: float
    notification: Notification | None
    plan: Plan | None
    created_at: float
    state: TransferState = TransferState.PREPARED
    posts: int = 0
    reroutes: int = 0
    verdict: XferdError | None = None
    todo: dict[int, deque[int]] = field(default_factory=dict)
    in_flight: dict[ChunkRef, tuple[SlotKey, int]] = field(default_factory=dict)
    route_index: dict[int, int] = field(default_factory=dict)
    routes_tried: list[str] = field(default_factory=list)
    moved_nbytes: int = 0
    verify: bool = False
    durable: bool = False
    wait_event: int = 0
    done_event: int = 0
    is_enclosed: bool = False
    is_settling: bool = False
    is_settled: bool = False
    is_notifying: bool = False
    is_notified: bool = False
    posted_at: float = 0.0
    started_at: float = 0.0
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    total_nbytes: int = 0
    descriptors: int = 0
    pieces: int = 0
    chunks: int = 0
    last_routes: tuple[Route, ...] = ()
    quick: Callable[[], int] | None = None
    story: deque[Step | str] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def wire_id(self) -> str:
        """The id that peers see: another one for each post and each change of route.

        A peer that was told to let a transfer rest refuses its id for ever; what is tried again needs another.
        """
        return f"{self.id}#{self.posts}.{self.reroutes}"

    @property
    def is_active(self) -> bool:
        """Whether bytes of it may move now."""
        return self.state in ACTIVE

    def status(self) -> TransferStatus:
        """Return what a client is told."""
        moving_s = (self.ended_at - self.started_at) if self.started_at and self.ended_at else 0.0
        hops = tuple(hop for route in self.last_routes for hop in route.hops)
        return TransferStatus(
            self.id,
            self.key,
            self.op,
            self.state,
            self.priority,
            self.cause_id,
            self.local_node,
            self.remote_node,
            self.agent,
            self.verdict if self.state is TransferState.FAILED else None,
            Telemetry(
                created_at=self.created_at,
                posted_at=self.posted_at,
                first_byte_at=self.first_byte_at,
                ended_at=self.ended_at,
                queued_s=max(self.started_at - self.posted_at, 0.0) if self.started_at else 0.0,
                moving_s=max(moving_s, 0.0),
                total_nbytes=self.total_nbytes,
                moved_nbytes=self.moved_nbytes,
                descriptors=self.descriptors,
                pieces=self.pieces,
                chunks=self.chunks,
                posts=self.posts,
                route=hops,
            ),
        )


@dataclass(frozen=True, slots=True)
class StartChunk:
    """Move a chunk by a route, then report ``chunk_done`` or ``chunk_failed``."""

    transfer: Transfer
    chunk: ChunkRef
    route: Route
    start: int
    stop: int

    @property
    def leg_nbytes(self) -> int:
        """Bytes of the whole leg."""
        assert self.transfer.plan is not None
        return self.transfer.plan.legs[self.chunk.leg].cuts[-1]


@dataclass(frozen=True, slots=True)
class AbortChunks:
    """Cancel what is in flight of a transfer; each chunk reports ``chunk_failed`` once no byte of it moves."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class SendNotification:
    """Deliver the transfer's notification, then report ``notified``."""

    transfer: Transfer
    notification: Notification


@dataclass(frozen=True, slots=True)
class Settle:
    """Commit what surrounds the chunks, or drop it, then report ``settled``; no chunk is in flight."""

    transfer: Transfer
    commit: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """Release what the transfer holds and tell who waits."""

    transfer: Transfer


Instruction: TypeAlias = StartChunk | AbortChunks | SendNotification | Settle | Ended


class TransferMachine:
    """All transfers of the node. Every event method returns the instructions to perform, in order."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.transfers: dict[TransferId, Transfer] = {}

    # ------------------------------------------------------------------------------------ events

    def add(self, transfer: Transfer) -> None:
        """Take in a new transfer, PREPARED."""
        assert transfer.plan is not None
        plan = transfer.plan
        transfer.total_nbytes, transfer.descriptors = plan.total_nbytes, plan.descriptors
        transfer.pieces, transfer.chunks = plan.pieces, plan.chunks
        self.transfers[transfer.id] = transfer

    def forget(self, transfer: Transfer) -> None:
        """Drop a transfer that is not active."""
        if transfer.is_active:
            raise InvalidState(f"transfer {transfer.id} is {transfer.state.value}", remedy="cancel it first")
        self.transfers.pop(transfer.id, None)

    def post(self, transfer: Transfer, now: float) -> list[Instruction]:
        """POST: start over, from PREPARED or any ended state."""
        if transfer.plan is None and not transfer.is_active:
            raise InvalidState(
                f"transfer {transfer.id} ended long ago and its plan was dropped",
                limit="transfers.keep_plans",
                remedy="submit it again, or raise the limit",
            )
        self._step(transfer, Event.POST, now)
        assert transfer.plan is not None
        transfer.posts += 1
        transfer.verdict = None
        transfer.is_notified = transfer.is_settling = transfer.is_settled = False
        transfer.moved_nbytes = 0
        transfer.posted_at = now
        transfer.started_at = transfer.first_byte_at = transfer.ended_at = 0.0
        transfer.routes_tried = []
        transfer.route_index = dict.fromkeys(range(len(transfer.plan.legs)), 0)
        routes = tuple([leg.routes[0] for leg in transfer.plan.legs])
        if routes != transfer.last_routes:  # the same ones stay the same tuple, by which rings know them
            transfer.last_routes = routes
        transfer.todo = {number: deque(range(leg.chunks)) for number, leg in enumerate(transfer.plan.legs)}
        for leg in transfer.todo:
            self._enqueue(transfer, leg)
        return self.starts(now)

    def check_post(self, transfer: Transfer) -> None:
        """Raise ``InvalidState`` if the transfer cannot be posted now."""
        next_state(f"transfer {transfer.id}", transfer.state, Event.POST, transfer.story)

    def moved_at_once(self, transfer: Transfer, posted_at: float, now: float) -> None:
        """POST, START, all bytes and FINISH in one event: a backend moved them within one uninterrupted call.

        For plans of one chunk whose move is shorter than giving it to a thread would be. Takes no slot, has no
        deadline, and nothing of it was ever under way when another event is looked at.
        """
        assert transfer.plan is not None
        transfer.posts += 1
        transfer.verdict = None
        transfer.posted_at = transfer.started_at = posted_at
        transfer.first_byte_at = transfer.ended_at = now
        transfer.moved_nbytes = transfer.total_nbytes
        if transfer.posts == 1 or transfer.routes_tried:
            transfer.routes_tried = []
            transfer.last_routes = (transfer.plan.legs[0].routes[0],)
        transfer.state = TransferState.DONE
        transfer.story.append("moved at once")

    def starts(self, now: float) -> list[Instruction]:
        """Give free slots to waiting transfers."""
        instructions: list[Instruction] = []
        for key, transfer_id in self._scheduler.take():
            transfer = self.transfers[transfer_id]
            leg = self._leg_for(transfer, key)
            if leg is None:
                raise InternalError(f"transfer {transfer.id} was scheduled on {key} with nothing to start")
            todo = transfer.todo[leg]
            number = todo.popleft()
            if not todo:  # a transfer of many legs must not look at those that are done for each chunk
                del transfer.todo[leg]
            chunk, index = ChunkRef(leg, number), transfer.route_index[leg]
            transfer.in_flight[chunk] = (key, index)
            self._requeue(transfer, key)
            if transfer.state is TransferState.POSTED:
                self._step(transfer, Event.START, now)
                transfer.started_at = now
            assert transfer.plan is not None
            plan_leg = transfer.plan.legs[leg]
            instructions.append(
                StartChunk(transfer, chunk, plan_leg.routes[index], plan_leg.cuts[number], plan_leg.cuts[number + 1])
            )
        return instructions

    def chunk_done(self, transfer: Transfer, chunk: ChunkRef, moved: int, now: float) -> list[Instruction]:
        """A backend says that all of a chunk is in place; its count is believed only if it is the right one."""
        assert transfer.plan is not None
        cuts = transfer.plan.legs[chunk.leg].cuts
        want = cuts[chunk.number + 1] - cuts[chunk.number]
        if moved != want:
            error = ShortTransfer(
                f"transfer {transfer.id}: chunk {chunk.number} moved {moved} of {want} bytes",
                remedy="the backend miscounts; see the node's log",
            )
            return self.chunk_failed(transfer, chunk, error, now)
        self._land(transfer, chunk)
        transfer.moved_nbytes += moved
        transfer.first_byte_at = transfer.first_byte_at or now
        return self._continue(transfer, now)

    def chunk_failed(self, transfer: Transfer, chunk: ChunkRef, error: XferdError, now: float) -> list[Instruction]:
        """A chunk came to rest without having moved in full: by an error, or because it was aborted."""
        _key, index = self._land(transfer, chunk)
        assert transfer.plan is not None
        leg = transfer.plan.legs[chunk.leg]
        route = leg.routes[index]
        transfer.story.append(f"chunk {chunk.leg}.{chunk.number} by {route.name}: {error.code}")
        if transfer.verdict is not None:
            return self._continue(transfer, now)
        if isinstance(error, ROUTE_FAULTS):
            tried = f"{route.name}: {error.message}"
            if transfer.route_index[chunk.leg] == index:
                transfer.routes_tried.append(tried)
            if route.is_restartable and self._has_next_route(transfer, chunk.leg, index):
                transfer.route_index[chunk.leg] = max(transfer.route_index[chunk.leg], index + 1)
                transfer.reroutes += 1
                transfer.last_routes = self._present_routes(transfer)
                transfer.todo.setdefault(chunk.leg, deque()).append(chunk.number)
                self._scheduler.remove(transfer.id)
                for leg_number in transfer.todo:
                    self._enqueue(transfer, leg_number)
                return self.starts(now)
            error.routes_tried = tuple(transfer.routes_tried)
            if route.pin:
                error.limit = error.limit or f"pinned to backend {route.pin!r}"
                error.remedy = error.remedy or "leave the backend open, so that another route is tried"
        return self.fail(transfer, error, now)

    def fail(self, transfer: Transfer, error: XferdError, now: float) -> list[Instruction]:
        """Bring an active transfer to rest with an error; the first verdict stands."""
        if not transfer.is_active or transfer.verdict is not None:
            return []
        transfer.verdict = error
        return self._stop(transfer, now)

    def cancel(self, transfer: Transfer, now: float) -> list[Instruction]:
        """Bring a transfer to rest because its owner wants that; one that has ended keeps its state."""
        if transfer.state is TransferState.PREPARED:
            return self._end(transfer, Event.CANCEL, now)
        return self.fail(transfer, Cancelled(f"transfer {transfer.id} was cancelled"), now)

    def deadline(self, transfer: Transfer, post: int, now: float) -> list[Instruction]:
        """The deadline of a post passed; an old post's deadline means nothing."""
        if transfer.posts != post:
            return []
        return self.fail(
            transfer,
            DeadlineExceeded(
                f"transfer {transfer.id} moved {transfer.moved_nbytes} of {transfer.total_nbytes} bytes",
                limit=f"timeout_s {transfer.timeout_s}",
                remedy="give it more time, or see `explain` for the route's speed",
            ),
            now,
        )

    def settled(
        self, transfer: Transfer, *, committed: bool, error: XferdError | None, now: float
    ) -> list[Instruction]:
        """What surrounds the chunks is committed, or dropped, or could not be.

        A verdict that came while it was being committed came too late: the bytes are in place, as a whole.
        """
        transfer.is_settling, transfer.is_settled = False, True
        if committed:
            transfer.verdict = error
        return self._conclude(transfer, now) + self.starts(now)

    def notified(self, transfer: Transfer, error: XferdError | None, now: float) -> list[Instruction]:
        """The notification was delivered, or could not be."""
        transfer.is_notifying, transfer.is_notified = False, error is None
        if transfer.verdict is None:
            transfer.verdict = error
        return self._conclude(transfer, now)

    # ------------------------------------------------------------------------------------ internals

    def _step(self, transfer: Transfer, event: Event, now: float) -> None:
        transfer.state = next_state(f"transfer {transfer.id}", transfer.state, event, transfer.story)
        transfer.story.append(Step(now, event, transfer.state))

    def _enqueue(self, transfer: Transfer, leg: int) -> None:
        assert transfer.plan is not None
        route = transfer.plan.legs[leg].routes[transfer.route_index[leg]]
        self._scheduler.enqueue(route.slot_key, route.slots, transfer.id, transfer.priority)

    def _requeue(self, transfer: Transfer, key: SlotKey) -> None:
        """Queue up for another turn at a slot key if any leg has chunks left for it."""
        leg = self._leg_for(transfer, key)
        if leg is not None:
            self._enqueue(transfer, leg)

    def _leg_for(self, transfer: Transfer, key: SlotKey) -> int | None:
        """Return a leg with chunks to start whose present route competes for this slot; None where there is none."""
        assert transfer.plan is not None
        for number in transfer.todo:
            if transfer.plan.legs[number].routes[transfer.route_index[number]].slot_key == key:
                return number
        return None

    def _has_next_route(self, transfer: Transfer, leg: int, index: int) -> bool:
        assert transfer.plan is not None
        return max(transfer.route_index[leg], index + 1) < len(transfer.plan.legs[leg].routes)

    def _present_routes(self, transfer: Transfer) -> tuple[Route, ...]:
        assert transfer.plan is not None
        return tuple(leg.routes[transfer.route_index[n]] for n, leg in enumerate(transfer.plan.legs))

    def _land(self, transfer: Transfer, chunk: ChunkRef) -> tuple[SlotKey, int]:
        key, index = transfer.in_flight.pop(chunk)
        self._scheduler.free(key)
        return key, index

    def _continue(self, transfer: Transfer, now: float) -> list[Instruction]:
        """After a chunk came to rest: conclude if it was the last, and use the slot that it left."""
        instructions: list[Instruction] = []
        if not transfer.in_flight and (transfer.verdict is not None or not transfer.todo):
            instructions = self._conclude(transfer, now)
        return instructions + self.starts(now)

    def _stop(self, transfer: Transfer, now: float) -> list[Instruction]:
        self._scheduler.remove(transfer.id)
        transfer.todo = {}
        if transfer.is_settling:
            return []  # what is half committed must come to its end first
        if transfer.in_flight or transfer.is_notifying:
            return [AbortChunks(transfer)]
        return self._conclude(transfer, now) + self.starts(now)

    def _conclude(self, transfer: Transfer, now: float) -> list[Instruction]:
        """Nothing is in flight: settle first, then notify, then end."""
        verdict = transfer.verdict
        if transfer.is_enclosed and not transfer.is_settled:
            transfer.is_settling = True
            return [Settle(transfer, commit=verdict is None)]
        if verdict is not None:
            return self._end(transfer, Event.CANCEL if isinstance(verdict, Cancelled) else Event.FAIL, now)
        if transfer.notification is not None and not transfer.is_notified:
            transfer.is_notifying = True
            return [SendNotification(transfer, transfer.notification)]
        return self._end(transfer, Event.FINISH, now)

    def _end(self, transfer: Transfer, event: Event, now: float) -> list[Instruction]:
        self._step(transfer, event, now)
        transfer.ended_at = now
        return [Ended(transfer)]

    def check_invariants(self) -> None:
        """Assert what must always hold between events."""
        self._scheduler.check_invariants()
        busy: dict[SlotKey, int] = {}
        for transfer in self.transfers.values():
            for key, _ in transfer.in_flight.values():
                busy[key] = busy.get(key, 0) + 1
            if not transfer.is_active:
                assert not transfer.in_flight, transfer.story
                assert not transfer.todo, transfer.story
            if transfer.state is TransferState.DONE:
                assert transfer.moved_nbytes == transfer.total_nbytes, transfer.story
        assert busy == {key: count for key, count in self._scheduler.busy().items() if count}, busy
