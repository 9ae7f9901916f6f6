"""Where sessions begin and end. What they hold is let go in order: transfers, lists, inbox, regions, name.

The table is bookkeeping (``table.py``); connections call ``open`` and ``end`` (``socket.py``, the faces).
"""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Self

import structlog

from xferd.api.errors import NotFound, Stale, Unauthenticated, Unavailable, XferdError
from xferd.api.timeouts import timeout
from xferd.api.types import Caller, RegionSource, SessionGrant, SessionInfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xferd.api.types import Limits, PeerCredentials, PoolInfo, SessionId, Transport
    from xferd.daemon.engine.desk import TransferDesk
    from xferd.daemon.engine.lists import ListBook
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.memory.desk import MemoryDesk
    from xferd.daemon.memory.devices import DeviceDesk
    from xferd.daemon.memory.regions import RegionTable
    from xferd.daemon.rings.desk import RingDesk
    from xferd.daemon.sessions.table import SessionTable
    from xferd.daemon.storage.desk import StorageDesk

log = structlog.get_logger(__name__)


class SessionDesk:
    """Opens and ends sessions.

    Args:
        limits: the daemon's present limits, told to each client.
        pools: the daemon's pools.
        refusal: why no new session is taken, or "".
        abort_holder: asked to bring a peer's hold on a dying session's regions to rest.
        agents_changed: told when the set of agents changed.
    """

    def __init__(
        self,
        node: str,
        epoch: int,
        table: SessionTable,
        transfers: TransferDesk,
        rings: RingDesk,
        storage: StorageDesk,
        lists: ListBook,
        inboxes: Inboxes,
        memory: MemoryDesk,
        regions: RegionTable,
        devices: DeviceDesk,
        *,
        limits: Callable[[], Limits],
        pools: Callable[[], list[PoolInfo]],
        grpc_target: str,
        admin_token: str,
        refusal: Callable[[], str],
        abort_holder: Callable[[str], Awaitable[None]],
        agents_changed: Callable[[], None],
        quiesce_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._table = table
        self._transfers = transfers
        self._rings = rings
        self._storage = storage
        self._lists = lists
        self._inboxes = inboxes
        self._memory = memory
        self._regions = regions
        self._devices = devices
        self._limits = limits
        self._pools = pools
        self._grpc_target = grpc_target
        self._admin_token = admin_token
        self._refusal = refusal
        self._abort_holder = abort_holder
        self._agents_changed = agents_changed
        self.quiesce_timeout_s = quiesce_timeout_s
        self._clock = clock
        self._ended: dict[SessionId, asyncio.Future[str]] = {}
        self._ending: dict[SessionId, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()
        self._expiry: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End what sessions are left."""
        if self._expiry is not None:
            self._expiry.cancel()
        for session in self._table.live():
            self._begin_end(session.id, "the daemon is stopping")
        await self._group.__aexit__(None, None, None)

    @property
    def max_sessions(self) -> int:
        """Most sessions at once; lowering it ends none."""
        return self._table.max_sessions

    @max_sessions.setter
    def max_sessions(self, value: int) -> None:
        self._table.max_sessions = value

    # ------------------------------------------------------------------------------------ who calls

    def authenticate(self, token: str) -> Caller:
        """Return the caller that has a token, and renew its session."""
        session = self._table.by_token(token)
        self._table.renew(session.id, self._clock())
        return Caller(session.id, session.agent)

    def authenticate_admin(self, token: str) -> Caller:
        """Return an admin caller, if the token is right or none is configured."""
        if self._admin_token and not hmac.compare_digest(token.encode(), self._admin_token.encode()):
            raise Unauthenticated(
                "the admin token is missing or wrong" if token else "no admin token was sent",
                remedy="send `authorization: Bearer <token>` with the content of the configured token file",
            )
        return Caller(None, "admin", admin=True)

    # ------------------------------------------------------------------------------------ begin

    async def open(
        self, agent: str, transport: Transport, *, credentials: PeerCredentials | None, ttl_s: float
    ) -> SessionGrant:
        """Open a session."""
        refusal = self._refusal()
        if refusal:
            raise Unavailable(f"node {self._node} takes no new sessions: {refusal}", remedy="use another node")
        session, token = self._table.open(agent, transport, credentials, ttl_s, self._clock())
        try:
            self._memory.open_session(session.id, credentials)
        except BaseException:
            self._table.finish_close(session.id)
            raise
        self._storage.adopt(session.id, session.agent)
        self._inboxes.open(session.agent)
        self._ended[session.id] = asyncio.get_running_loop().create_future()
        self._arm_expiry()
        self._agents_changed()
        log.info("session_opened", session=session.id, agent=session.agent, transport=transport.value, pid=session.pid)
        return SessionGrant(
            session.id,
            token,
            session.agent,
            self._node,
            self._epoch,
            self._limits(),
            self._grpc_target,
            tuple(self._pools()),
        )

    async def wait_end(self, session: SessionId) -> str:
        """Return the reason when a session begins to end, at once if it has."""
        future = self._ended.get(session)
        return "the session has ended" if future is None else await asyncio.shield(future)

    def sessions(self) -> list[SessionInfo]:
        """List sessions, those that are ending too."""
        return [
            SessionInfo(
                session.id,
                session.agent,
                session.transport,
                session.pid,
                max(session.uid, 0),
                session.opened_at,
                session.expires_at,
                len(regions := self._regions.owned_by(session.id)),
                sum(region.nbytes for region in regions),
                self._transfers.count(session.id),
                self._lists.count(session.id),
            )
            for session in self._table.live()
        ]

    def agents(self) -> tuple[str, ...]:
        """Return the names of agents with an open session."""
        return tuple(self._table.agents())

    # ------------------------------------------------------------------------------------ end

    async def end(self, session: SessionId, reason: str) -> None:
        """End a session and return when all that it held is free. Twice is fine; a cancelled call ends it still."""
        task = self._begin_end(session, reason)
        if task is not None:
            await asyncio.shield(task)

    async def end_by_admin(self, session: SessionId, reason: str) -> None:
        """End a session that an operator names.

        Raises:
            NotFound: there is none.
        """
        if all(session != live.id for live in self._table.live()):
            raise NotFound(f"no session {session!r}", remedy="list the sessions for those that live")
        await self.end(session, reason)

    def _begin_end(self, session: SessionId, reason: str) -> asyncio.Task[None] | None:
        if self._table.begin_close(session, reason):
            future = self._ended[session]
            if not future.done():
                future.set_result(reason)
            self._agents_changed()
            self._ending[session] = self._group.create_task(self._end(session, reason), name=f"end session {session}")
        return self._ending.get(session)

    async def _end(self, session: SessionId, reason: str) -> None:
        agent = self._table.get(session).agent
        log.info("session_ending", session=session, agent=agent, reason=reason)
        try:
            self._storage.keep(session)
            self._regions.retire(session)
            await self._stop_moving(session, agent)
            self._rings.close_session(session)
            self._lists.release_session(session)
            self._inboxes.close(agent)
            await self._release_regions(session)
            await self._devices.end_owner(session, agent)  # once more: of a registration that was under way
        finally:
            self._table.finish_close(session)
            self._ended.pop(session, None)
            self._ending.pop(session, None)
        log.info("session_ended", session=session, agent=agent, reason=reason)

    async def _stop_moving(self, session: SessionId, agent: str) -> None:
        """Bring to rest what the session moves, and what others move in its GPU memory, which goes with it.

        Its device workers are killed at once, and not after their commands have ended: one may wait for an event of a
        process that has died, and as long as any worker has a dead process's memory mapped the driver cannot take it
        back. How a client ended is not known yet: its sockets close before it is gone.
        """
        holders = self._regions.holders_of(session, RegionSource.DEVICE)
        self._transfers.fail_holders(
            holders,
            session,
            lambda: Stale(
                f"GPU memory of agent {agent} went with its session", remedy="use a region of a session that lives"
            ),
        )
        async with asyncio.TaskGroup() as group:
            # Cancelled first, so that what its workers' end does to its transfers is not taken for a failure.
            group.create_task(self._transfers.end_session(session), name=f"end transfers of {session}")
            group.create_task(self._devices.end_owner(session, agent), name=f"end workers of {agent}")
            group.create_task(self._devices.end_memory(session), name=f"end GPU memory of {session}")
            for holder in holders:
                group.create_task(self._abort(session, holder), name=f"abort {holder}")

    async def _abort(self, session: SessionId, holder: str) -> None:
        """Cut off a peer that holds regions of a session that ends; what is no peer's hold is fine. Does not raise."""
        try:
            await self._abort_holder(holder)
        except XferdError as error:
            log.warning("hold_not_aborted", session=session, holder=holder, error=error.message)

    async def _release_regions(self, session: SessionId) -> None:
        """Wait for peers that read or write the regions; those that take too long are cut off."""
        try:
            async with timeout(self.quiesce_timeout_s):
                await self._regions.wait_idle(session)
        except TimeoutError:
            for holder in self._regions.holders_of(session):
                log.warning("hold_aborted", session=session, holder=holder, after_s=self.quiesce_timeout_s)
                await self._abort(session, holder)
        await self._memory.close_session(session)

    # ------------------------------------------------------------------------------------ expiry

    def _arm_expiry(self) -> None:
        """Set a timer for the earliest expiry; there is none while no session has one."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        at = self._table.next_expiry()
        if at is not None:
            delay_s = max(at - self._clock(), 0.0) + 0.001
            self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        for session in self._table.expired(self._clock()):
            self._begin_end(session, "no call within its time to live")
        self._arm_expiry()
