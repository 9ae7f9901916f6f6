"""Where transfers are handed in, looked at, cancelled and forgotten.

Planning is ``intake.py``'s, moving the runner's, deciding the machine's; ``keys.py``, ``holds.py`` and ``kept.py`` have
the books. ``daemon/service.py`` puts the faces' protocol on top.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import structlog

from xferd.api.errors import NotFound, Overloaded, PeerLost, PermissionDenied, XferdError
from xferd.api.types import ENDED, TransferId, TransferState
from xferd.daemon.engine.holds import TransferHolds, holder_of
from xferd.daemon.engine.intake import Intake
from xferd.daemon.engine.kept import KeptPlans
from xferd.daemon.engine.keys import KeyBook, digest_of
from xferd.daemon.engine.machine import Transfer
from xferd.daemon.sessions.caller import session_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from xferd.api.types import Caller, Notification, SessionId, TransferRequest, TransferStatus
    from xferd.daemon.engine.lists import ListBook
    from xferd.daemon.engine.machine import TransferMachine
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.engine.plan import Plan
    from xferd.daemon.engine.planner import Planner
    from xferd.daemon.engine.runner import Runner
    from xferd.daemon.memory.regions import RegionTable

log = structlog.get_logger(__name__)


CheckEvents: TypeAlias = "Callable[[SessionId, Sequence[int], frozenset[int]], None]"


def _unheard(transfer: Transfer) -> None:
    """Hear of a new transfer, and do nothing."""


class TransferCounters:
    """How transfers ended since the start, for status and metrics."""

    def __init__(self) -> None:
        self.ended = dict.fromkeys(ENDED, 0)
        self.moved_nbytes = 0


class TransferDesk:
    """Takes in transfers of sessions and answers for them.

    Args:
        check_events: raises unless events are a session's, and of a GPU whose memory a plan touches.
        max_transfers: transfers that one session may have, ended ones included; beyond it the oldest ended one is
            forgotten, and if none has ended the submit is refused.
        keep_plans_nbytes: memory for plans of ended transfers, so that they can be posted again.
    """

    def __init__(
        self,
        node: str,
        machine: TransferMachine,
        runner: Runner,
        lists: ListBook,
        planner: Planner,
        regions: RegionTable,
        inboxes: Inboxes,
        *,
        check_events: CheckEvents,
        default_timeout_s: float,
        max_transfers: int,
        keep_plans_nbytes: int,
    ) -> None:
        self._node = node
        self._machine = machine
        self._runner = runner
        self._planner = planner
        self._intake = Intake(node, lists, planner, inboxes)
        self._holds = TransferHolds(regions)
        self._check_events = check_events
        self.default_timeout_s = default_timeout_s
        self.max_transfers = max_transfers
        self._kept = KeptPlans(machine.transfers, keep_plans_nbytes)
        self._by_session: dict[SessionId, OrderedDict[TransferId, Transfer]] = {}
        self._keys = KeyBook()
        self.counters = TransferCounters()

    # ------------------------------------------------------------------------------------ submit

    async def submit(self, caller: Caller, request: TransferRequest) -> TransferStatus:
        """Create a transfer and, unless ``hold``, post it."""
        return (await self.submit_one(caller, request)).status()

    async def submit_one(
        self, caller: Caller, request: TransferRequest, created: Callable[[Transfer], None] = _unheard
    ) -> Transfer:
        """As ``submit``; ``created`` is told of a new transfer before it is posted, and so before it can end."""
        session = session_of(caller)
        digest = b""
        if request.key:
            digest = digest_of(request)
            known = self._known(session, request.key, digest)
            if known is not None:
                return known
        plan = await self._intake.plan(caller, request, explore=True)
        return self._enter(caller, session, request, plan, digest, created)

    def submit_now(
        self, caller: Caller, request: TransferRequest, created: Callable[[Transfer], None] = _unheard
    ) -> Transfer | None:
        """As ``submit_one``, in one step of the event loop; None where planning must wait for a peer or a thread."""
        session = session_of(caller)
        digest = digest_of(request) if request.key else b""
        known = self._known(session, request.key, digest) if request.key else None
        if known is not None:
            return known
        plan = self._intake.plan_now(session, request)
        return None if plan is None else self._enter(caller, session, request, plan, digest, created)

    async def plan(self, caller: Caller, request: TransferRequest) -> Plan:
        """Check a request's lists and rights and plan it, changing nothing."""
        return await self._intake.plan(caller, request)

    def post(self, caller: Caller, transfer_id: TransferId) -> TransferStatus:
        """Post a held transfer, or an ended one again."""
        transfer = self.owned(caller, transfer_id)
        self._post(transfer)
        return transfer.status()

    def post_heard(self, transfer: Transfer, ended: Callable[[Transfer], None]) -> None:
        """Post, with ``ended`` called once it has ended, which may be before this returns.

        Raises as ``post`` does, and then ``ended`` is not called.
        """
        if transfer.is_active:
            self._machine.check_post(transfer)  # raises: whoever waits for the running post must not hear of this one
        self._runner.ends.listen(transfer, ended)
        try:
            self._post(transfer)
        except XferdError:
            self._runner.ends.unlisten(transfer, ended)
            raise

    def listen(self, transfer: Transfer, ended: Callable[[Transfer], None]) -> None:
        """Have ``ended`` called once: when the transfer ends, or now if it has ended."""
        if transfer.state in ENDED:
            ended(transfer)
        else:
            self._runner.ends.listen(transfer, ended)

    def begin_cancel(self, transfer: Transfer) -> None:
        """Begin to cancel; an ended one keeps its state. ``listen`` tells when it has come to rest."""
        self._runner.cancel(transfer)

    # ------------------------------------------------------------------------------------ look

    def poll(self, caller: Caller, ids: Sequence[TransferId]) -> list[TransferStatus]:
        """Return the status of each."""
        return [self.owned(caller, transfer_id).status() for transfer_id in ids]

    async def wait(
        self, caller: Caller, ids: Sequence[TransferId], timeout_s: float, *, any_of: bool
    ) -> list[TransferStatus]:
        """Wait for all or any to end; the timeout is no error."""
        transfers = [self.owned(caller, transfer_id) for transfer_id in ids]
        await self._runner.ends.wait(transfers, timeout_s, any_of=any_of)
        return [transfer.status() for transfer in transfers]

    async def watch(self, caller: Caller, ids: Sequence[TransferId]) -> AsyncIterator[TransferStatus]:
        """Yield transfers as they end, those that had ended first."""
        session = session_of(caller)
        wanted = {transfer_id: self.owned(caller, transfer_id) for transfer_id in ids}
        queue = self._runner.ends.watch(session)
        # Looked at in this very step: one that ends from here on comes by the queue, and by nothing else.
        mine = wanted.values() if ids else self._by_session.get(session, {}).values()
        over = [transfer for transfer in mine if transfer.state in ENDED]
        try:
            for transfer in over:
                wanted.pop(transfer.id, None)
                yield transfer.status()
            while wanted or not ids:
                transfer = await queue.get()
                if not ids or wanted.pop(transfer.id, None) is not None:
                    yield transfer.status()
        finally:
            self._runner.ends.unwatch(session, queue)

    def transfers(self, *, active_only: bool = False, agent: str = "") -> list[TransferStatus]:
        """List transfers of all sessions."""
        return [
            transfer.status()
            for transfer in self._machine.transfers.values()
            if (transfer.is_active or not active_only) and agent in ("", transfer.agent)
        ]

    def count(self, session: SessionId) -> int:
        """Return how many transfers a session has, ended ones included."""
        return len(self._by_session.get(session, ()))

    @property
    def active(self) -> list[Transfer]:
        """Transfers whose bytes may move now."""
        return [transfer for transfer in self._machine.transfers.values() if transfer.is_active]

    # ------------------------------------------------------------------------------------ end

    async def cancel(self, caller: Caller, ids: Sequence[TransferId]) -> list[TransferStatus]:
        """Cancel and wait until no byte moves any more."""
        transfers = [self.owned(caller, transfer_id) for transfer_id in ids]
        for transfer in transfers:
            self._runner.cancel(transfer)
        await self._runner.ends.wait(transfers, None)
        return [transfer.status() for transfer in transfers]

    async def release(self, caller: Caller, ids: Sequence[TransferId]) -> None:
        """Cancel what runs, then forget."""
        await self.cancel(caller, ids)
        for transfer_id in ids:
            transfer = self._machine.transfers.get(transfer_id)
            if transfer is not None and not transfer.is_active:
                self._forget(transfer)

    async def end_session(self, session: SessionId) -> None:
        """Cancel all transfers of a session, wait until they have come to rest, forget them."""
        transfers = list(self._by_session.get(session, {}).values())
        for transfer in transfers:
            self._runner.cancel(transfer)
        await self._runner.ends.wait(transfers, None)
        for transfer in transfers:
            self._forget(transfer)
        self._by_session.pop(session, None)

    def fail_peer(self, node: str, reason: str) -> int:
        """Begin to fail all active transfers with another node, those that wait for their turn too.

        Returns how many; other nodes' go on.
        """
        lost = [transfer for transfer in self.active if transfer.remote_node == node]
        for transfer in lost:
            self._runner.fail(
                transfer,
                PeerLost(
                    f"node {node!r} was lost while transfer {transfer.id} was {transfer.state.value}: {reason}",
                    remedy="submit it again once the node is back, or use another node",
                ),
            )
        return len(lost)

    def fail_holders(self, holders: Collection[str], spared: SessionId, error: Callable[[], XferdError]) -> None:
        """Begin to fail active transfers that hold regions, by the names of their holds, but for ``spared``'s own."""
        for transfer in self.active:
            if holder_of(transfer) in holders and transfer.session != spared:
                self._runner.fail(transfer, error())

    async def wait_all(self, timeout_s: float) -> None:
        """Return when nothing is active, or the time is over."""
        await self._runner.ends.wait(self.active, timeout_s)

    def on_ended(self, transfer: Transfer) -> None:
        """Take note that a transfer has come to rest; the runner calls it before anyone who waits goes on."""
        self._holds.release(transfer)
        self.counters.ended[transfer.state] += 1
        self.counters.moved_nbytes += transfer.moved_nbytes
        for lost in self._kept.keep(transfer):
            self._holds.forget(lost)
        if transfer.state is TransferState.FAILED:
            log.warning(
                "transfer_failed",
                transfer=transfer.id,
                agent=transfer.agent,
                cause_id=transfer.cause_id,
                code=transfer.verdict.code if transfer.verdict else "",
                error=str(transfer.verdict),
            )

    def owned(self, caller: Caller, transfer_id: TransferId) -> Transfer:
        """Return a transfer that the caller may act on.

        Raises:
            NotFound: there is none of this id.
            PermissionDenied: it is another session's.
        """
        transfer = self._machine.transfers.get(transfer_id)
        if transfer is None:
            raise NotFound(
                f"no transfer {transfer_id!r}", remedy="ended ones are forgotten with their session or by release"
            )
        if transfer.session != caller.session and not caller.admin:
            raise PermissionDenied(f"transfer {transfer_id} belongs to another session", remedy="act on your own")
        return transfer

    # ------------------------------------------------------------------------------------ internals

    def _enter(
        self,
        caller: Caller,
        session: SessionId,
        request: TransferRequest,
        plan: Plan,
        digest: bytes,
        created: Callable[[Transfer], None],
    ) -> Transfer:
        """Make the transfer of a plan and post it, unless it is held or another request of its key was faster."""
        if request.key:
            # Planning may have waited for a peer; the same key may have come in meanwhile.
            known = self._known(session, request.key, digest)
            if known is not None:
                return known
        transfer = self._create(caller, session, request, plan)
        if request.key:
            self._keys.enter(session, request.key, transfer.id, digest)
        try:
            created(transfer)
            if not request.hold:
                self._post(transfer)
        except XferdError:
            self._forget(transfer)
            raise
        return transfer

    def _post(self, transfer: Transfer) -> None:
        """Hold the local regions, then post; the holds end with the post."""
        # What is posted again and again must not be forgotten as the oldest.
        self._by_session[transfer.session].move_to_end(transfer.id)
        if transfer.quick is not None and self._post_quick(transfer):
            return
        if not transfer.is_active and transfer.plan is not None:
            if transfer.posts:
                transfer.plan = self._planner.reordered(transfer.plan)
            self._holds.take(transfer)
        try:
            self._runner.post(transfer)
        except XferdError:
            if not transfer.is_active:
                self._holds.release(transfer)
            raise

    def _post_quick(self, transfer: Transfer) -> bool:
        """Move all bytes now, if that works. The regions need not be held: nothing else runs meanwhile."""
        self._holds.check(transfer)
        return self._runner.post_quick(transfer)

    def _create(self, caller: Caller, session: SessionId, request: TransferRequest, plan: Plan) -> Transfer:
        has_events = bool(request.wait_event or request.done_event)
        if has_events:
            self._check_events(session, (request.wait_event, request.done_event), plan.devices)
        mine = self._by_session.setdefault(session, OrderedDict())
        if len(mine) >= self.max_transfers:
            oldest = next((transfer for transfer in mine.values() if not transfer.is_active), None)
            if oldest is None:
                raise Overloaded(
                    f"agent {caller.agent} has {len(mine)} transfers under way",
                    limit=f"{self.max_transfers} transfers (limits.max_transfers)",
                    remedy="wait for some to end, or put more descriptors into each",
                )
            self._forget(oldest)
        transfer_id = TransferId(secrets.token_hex(8))
        is_enclosed = self._runner.is_enclosed(plan, durable=request.durable)
        is_plain = request.notification is None and not has_events and not is_enclosed
        transfer = Transfer(
            id=transfer_id,
            session=session,
            agent=caller.agent,
            key=request.key,
            op=request.op,
            priority=request.priority,
            cause_id=request.cause_id or transfer_id,
            local_node=self._node,
            remote_node=plan.remote_node or self._node,
            timeout_s=request.timeout_s or self.default_timeout_s,
            notification=self._addressed(caller, request, transfer_id),
            plan=plan,
            created_at=self._runner.clock(),
            verify=request.verify,
            durable=request.durable,
            wait_event=request.wait_event,
            done_event=request.done_event,
            is_enclosed=is_enclosed,
            quick=self._runner.quick(plan, caller.agent) if is_plain else None,
        )
        self._machine.add(transfer)
        mine[transfer_id] = transfer
        return transfer

    def _addressed(self, caller: Caller, request: TransferRequest, transfer_id: TransferId) -> Notification | None:
        if request.notification is None:
            return None
        source = f"{caller.agent}@{self._node}"
        return replace(request.notification, source=source, transfer=transfer_id)

    def _known(self, session: SessionId, key: str, digest: bytes) -> Transfer | None:
        """Return the transfer that this key made before."""
        known = self._keys.known(session, key, digest)
        return None if known is None else self._machine.transfers.get(known)

    def _forget(self, transfer: Transfer) -> None:
        self._machine.forget(transfer)
        self._kept.drop(transfer.id)
        self._runner.ends.unlisten_all(transfer)
        self._holds.forget(transfer.id)
        self._by_session.get(transfer.session, OrderedDict()).pop(transfer.id, None)
        if transfer.key:
            self._keys.forget(transfer.session, transfer.key)
