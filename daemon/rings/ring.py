"""One ring at work: submissions taken and performed, completions told, room kept for each of them.

A ring belongs to a session and runs on the event loop, when its client rings the doorbell or when something ends. What
the client writes is checked here and in ``memory.py``; what cannot be a client's honest mistake closes this ring, and
nothing else. Opening rings, and closing them with their sessions, is in ``desk.py``; docs/ring.md is for clients.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

from xferd.api import wire
from xferd.api.descriptors import PreparedRef
from xferd.api.errors import InternalError, InvalidArgument, ProtocolViolation, XferdError
from xferd.api.proto.session_v1_pb2 import RingOptions
from xferd.api.ring import Opcode, RingState, SubmissionFlag
from xferd.api.types import PreparedHandle, Priority, TransferId, TransferRequest
from xferd.daemon.rings.completions import Completions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from xferd.api.types import Caller
    from xferd.daemon.engine.desk import TransferDesk
    from xferd.daemon.engine.machine import Transfer
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.rings.memory import RingMemory

BATCH = 32
"""Submissions taken in one turn of the event loop: a full queue of one client must not keep the others waiting."""

_DRAIN_NBYTES = 4096

# Plain numbers: to look up a member of an enumeration takes longer than to compare it.
_SUBMIT, _POST, _CANCEL, _LISTEN = (code.value for code in (Opcode.SUBMIT, Opcode.POST, Opcode.CANCEL, Opcode.LISTEN))
_TELL_ACCEPTED = SubmissionFlag.TELL_ACCEPTED.value

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class RingCounters:
    """What all rings of the node did since the start."""

    submissions: int = 0
    completions: int = 0
    violations: int = 0


class Ring:
    """Serves one session's ring.

    ``doorbell`` is the end of a pipe to read, ``signal`` that of another to write; both do not block, and are owned.
    """

    def __init__(
        self,
        caller: Caller,
        memory: RingMemory,
        doorbell: int,
        signal: int,
        transfers: TransferDesk,
        inboxes: Inboxes,
        *,
        check_open: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        counters: RingCounters,
    ) -> None:
        self._caller = caller
        self._memory = memory
        self._doorbell, self._signal = doorbell, signal
        self._transfers = transfers
        self._inboxes = inboxes
        self._check_open = check_open
        self._spawn = spawn
        self._counters = counters
        self._completions = Completions(memory.layout.sizes.detail_nbytes)
        self._room = memory.layout.sizes.cq_entries
        self._taken = 0  # submissions
        self._told = 0  # completions
        self._read = 0  # completions that the client has read, as far as it said so
        self._owed = 0  # completions that were promised room and are to come
        self._credits: list[list[int]] = []  # [user_data, notifications] of each LISTEN
        self._cut: object = None  # the notification that the client was told to take by a call
        self._is_taking = False
        self._is_due = False  # to take the rest in the next turn of the event loop
        self._is_closed = False
        self._is_unsignalled = False
        self._perform = {
            _SUBMIT: self._submit,
            _POST: self._post,
            _CANCEL: self._cancel,
            _LISTEN: self._listen,
        }

    def start(self) -> None:
        """Listen to the doorbell and to the inbox."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._doorbell, self._on_doorbell)
        self._inboxes.listen(self._caller.agent, self._pump)

    def close(self, error: XferdError | None = None) -> None:
        """Serve no more, tell the client why, and let go of memory and pipes. Twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._doorbell)
        self._inboxes.listen(self._caller.agent, None)
        reason = b"" if error is None else wire.error_to_detail(error).SerializeToString()
        self._memory.set_state(RingState.CLOSED, reason)
        self._wake_client()
        self._memory.close()
        os.close(self._doorbell)
        os.close(self._signal)
        if error is not None:
            self._counters.violations += 1
            log.warning(
                "ring_closed",
                session=self._caller.session,
                agent=self._caller.agent,
                code=error.code,
                error=error.message,
            )

    # ------------------------------------------------------------------------------------ submissions

    def _on_doorbell(self) -> None:
        if not self._is_due:
            self._take()
        if self._is_closed:
            return
        try:
            if not os.read(self._doorbell, _DRAIN_NBYTES):
                self._loop.remove_reader(self._doorbell)  # the client closed its end: nothing will come any more
        except BlockingIOError:
            return
        # What came after the first look may have rung, too, and that was just read.
        if not self._is_due and self._memory.has_changed(self._taken, self._read):
            self._take()

    def _take_rest(self) -> None:
        self._is_due = False
        self._take()

    def _take(self) -> None:
        """Take what is there, as far as there is room to tell of it."""
        if self._is_closed:
            return
        self._is_taking = True
        try:
            is_over = self._take_batch()
        except ProtocolViolation as error:
            self.close(error)
            return
        except Exception as caught:  # a bug that one client meets ends its ring, and is told and logged
            log.exception("ring_bug", session=self._caller.session)
            self.close(InternalError(f"{type(caught).__name__} in the daemon", remedy="see the daemon's log"))
            return
        finally:
            self._is_taking = False
        if self._is_unsignalled:
            self._wake_client()
        if not is_over:
            self._is_due = True
            self._loop.call_soon(self._take_rest)

    def _take_batch(self) -> bool:
        """Take up to a batch; returns whether nothing more can be taken until the next doorbell."""
        memory, before = self._memory, self._taken
        self._look_at_reads()
        is_over = False
        while self._taken - before < BATCH:
            entry = memory.submission(self._taken + 1)
            if entry is None:
                is_over = True
                break
            promised = self._promised(entry)
            if self._told - self._read + self._owed + promised > self._room:
                is_over = True
                break
            self._taken += 1
            self._owed += promised
            self._take_one(entry, promised)
        if self._taken != before:
            self._counters.submissions += self._taken - before
            memory.taken(self._taken)
        if is_over:
            self._pump()
        return is_over

    def _look_at_reads(self) -> None:
        read = self._memory.read_completions()
        if not self._read <= read <= self._told:
            raise ProtocolViolation(
                f"{read} completions were read",
                limit=f"{self._read} to {self._told}",
                remedy="store how many completions were read since the ring was opened",
            )
        self._read = read

    def _promised(self, entry: tuple[int, ...]) -> int:
        """Return how many completions a submission brings at most."""
        if entry[1] in (_SUBMIT, _POST):
            return 2 if entry[4] & 3 == _TELL_ACCEPTED else 1
        if entry[1] == _LISTEN and 0 < entry[6] <= self._room // 2:
            return entry[6]
        return 1

    def _take_one(self, entry: tuple[int, ...], promised: int) -> None:
        perform = self._perform.get(entry[1])
        if perform is None:
            raise ProtocolViolation(f"opcode {entry[1]}", limit="1 to 4", remedy="see docs/ring.md")
        try:
            perform(entry)
        except XferdError as error:
            self._owed -= promised - 1
            self._tell(*self._completions.refused(entry[0], error))

    def _post(self, entry: tuple[int, ...]) -> None:
        self._check_open()
        user_data, transfer = entry[0], self._transfers.owned(self._caller, _transfer_id(entry))
        # It may end before this returns, and a client that then finds submissions not taken rings once more.
        self._memory.taken(self._taken)
        self._transfers.post_heard(transfer, lambda ended: self._tell_ended(user_data, ended))
        if entry[4] & 3 == _TELL_ACCEPTED:
            if transfer.is_active:
                self._tell(*self._completions.accepted(user_data, transfer))
            else:
                self._owed -= 1  # ENDED was told, which says it too

    def _cancel(self, entry: tuple[int, ...]) -> None:
        user_data, transfer = entry[0], self._transfers.owned(self._caller, _transfer_id(entry))
        self._transfers.listen(transfer, lambda ended: self._tell_ended(user_data, ended))
        self._transfers.begin_cancel(transfer)

    def _listen(self, entry: tuple[int, ...]) -> None:
        if not 0 < entry[6] <= self._room // 2:
            raise InvalidArgument(
                f"LISTEN for {entry[6]} notifications",
                limit=f"1 to {self._room // 2}, half of the completion queue",
                remedy="listen again when they have come",
            )
        self._credits.append([entry[0], entry[6]])  # told as ``_pump`` finds them

    def _submit(self, entry: tuple[int, ...]) -> None:
        self._check_open()
        submission = _Submission(self, entry[0], SubmissionFlag(entry[4] & 3))
        request = self._request(entry)
        transfer = self._transfers.submit_now(self._caller, request, submission.created)
        if transfer is None:
            self._spawn(self._submit_later(submission, request), f"ring submit {self._caller.session}")
        else:
            submission.submitted(transfer)

    async def _submit_later(self, submission: _Submission, request: TransferRequest) -> None:
        """Submit what needs a peer or a thread."""
        try:
            transfer = await self._transfers.submit_one(self._caller, request, submission.created)
        except XferdError as error:
            submission.refused(error)
        else:
            submission.submitted(transfer)

    def _request(self, entry: tuple[int, ...]) -> TransferRequest:
        _, _, op, priority, flags, timeout_ms, local, remote, *places, _ = entry
        local_at, local_count, remote_at, remote_count, options_at, options_nbytes = places
        options = RingOptions()
        if options_nbytes:
            try:
                options.ParseFromString(self._memory.arena(options_at, options_nbytes))
            except DecodeError as exc:
                raise InvalidArgument(
                    f"{options_nbytes} bytes of options are no RingOptions", remedy="serialize one, or leave it out"
                ) from exc
        return TransferRequest(
            op=wire.op_from_wire(op),
            local=PreparedRef(PreparedHandle(local), self._memory.index(local_at, local_count)),
            remote=PreparedRef(PreparedHandle(remote), self._memory.index(remote_at, remote_count)),
            key=options.key,
            timeout_s=timeout_ms / 1e3,
            priority=wire.priority_from_wire(priority) if priority else Priority.NORMAL,
            cause_id=options.cause_id,
            notification=wire.notification_from_message(options.notification)
            if options.HasField("notification")
            else None,
            backend=options.backend,
            verify=options.verify,
            durable=options.durable,
            wait_event=options.wait_event,
            done_event=options.done_event,
            hold=bool(flags & SubmissionFlag.HOLD),
        )

    # ------------------------------------------------------------------------------------ completions

    def _tell_ended(self, user_data: int, transfer: Transfer) -> None:
        if not self._is_closed:
            self._tell(*self._completions.ended(user_data, transfer))

    def _tell(self, fields: tuple[float, ...], detail: bytes) -> None:
        """Write one of the completions that room was promised for."""
        if self._is_closed:
            return
        self._owed -= 1
        self._told += 1
        self._counters.completions += 1
        self._memory.complete(self._told, fields, detail)
        if self._is_taking:
            self._is_unsignalled = True
        else:
            self._wake_client()

    def _wake_client(self) -> None:
        self._is_unsignalled = False
        try:
            os.write(self._signal, b"\1")
        except (BlockingIOError, BrokenPipeError):  # full: it is awake; or gone: its session ends
            return

    def _pump(self) -> None:
        """Hand over notifications, as far as the client gave leave."""
        agent = self._caller.agent
        while self._credits and not self._is_closed and (first := self._inboxes.first(agent)) is not None:
            if first is self._cut:
                return
            told = self._completions.notification(self._credits[0][0], first)
            if told is None:
                self._cut = first
                told = self._completions.cut_notification(self._credits[0][0])
            else:
                self._inboxes.drop_first(agent)
            self._credits[0][1] -= 1
            if not self._credits[0][1]:
                self._credits.pop(0)
            self._tell(*told)


class _Submission:
    """A SUBMIT on its way: sees to it that ACCEPTED comes before ENDED, and that either comes once."""

    __slots__ = ("_flags", "_is_accepted", "_ring", "_transfer", "_user_data")

    def __init__(self, ring: Ring, user_data: int, flags: SubmissionFlag) -> None:
        self._ring = ring
        self._user_data = user_data
        self._flags = flags
        self._transfer: Transfer | None = None
        self._is_accepted = not flags  # nothing to tell

    def created(self, transfer: Transfer) -> None:
        """Hear of the transfer before it can end."""
        self._transfer = transfer
        if not self._flags & SubmissionFlag.HOLD:
            self._ring._transfers.listen(transfer, self.ended)

    def ended(self, transfer: Transfer) -> None:
        """Tell its end."""
        self._accept(transfer)
        self._ring._tell_ended(self._user_data, transfer)

    def submitted(self, transfer: Transfer) -> None:
        """Tell that it exists, and listen to one that an earlier request of the same key made."""
        self._accept(transfer)
        if self._transfer is None:
            self.created(transfer)

    def refused(self, error: XferdError) -> None:
        """Tell that it does not exist."""
        if not self._ring._is_closed:
            self._ring._owed -= bool(self._flags == SubmissionFlag.TELL_ACCEPTED)
            self._ring._tell(*self._ring._completions.refused(self._user_data, error))

    def _accept(self, transfer: Transfer) -> None:
        if not self._is_accepted and not self._ring._is_closed:
            self._is_accepted = True
            self._ring._tell(*self._ring._completions.accepted(self._user_data, transfer))


def _transfer_id(entry: tuple[int, ...]) -> TransferId:
    return TransferId(f"{entry[6]:016x}")
