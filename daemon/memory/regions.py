"""The region table: who owns which span, under which generation, who may touch it, and who holds it now.

Every descriptor of the daemon is checked here. Columns stay columns (``slots.py``): a list of 100,000 rows costs a
few gathers and no Python loop. The table is used from the event loop and from lane threads; one lock guards it, and
what is done under it is proportional to slots, never to rows.

Not here: the arithmetic of lists (``resolving.py``); opening, mapping and closing of memory (``backing.py``,
``pool.py``, ``files.py``). Backings of removed regions are handed to the caller, who closes them outside the lock.

Order of a session's end: ``retire`` (no new holds), cancel what ``holders_of`` names, ``wait_idle``,
``remove_retired``, close the backings.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import Busy, Closed, Overloaded, PermissionDenied, Stale, Unsupported
from xferd.api.types import Access, HoldInfo, RegionId, RegionInfo
from xferd.daemon.memory.holding import (
    Actor,
    Hold,
    LocalActor,
    Owned,
    PeerActor,
    Record,
    Standing,
    check_span,
    may_see,
    names_of,
)
from xferd.daemon.memory.resolving import Resolved, only_region, resolve_in, resolve_within, slots_of
from xferd.daemon.memory.slots import SlotTable, slot_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from xferd.api.descriptors import Column, DescriptorList
    from xferd.api.types import RegionQuery, RegionSource, SessionId
    from xferd.daemon.memory.backing import Backing

__all__ = ["Actor", "LocalActor", "PeerActor", "RegionTable", "Resolved", "Standing"]


_REMEMBERED = 1024
"""Ended sessions whose late registrations are refused; none is under way for longer than so many sessions end."""


class RegionTable:
    """All regions of this node. Thread-safe.

    Args:
        node: name of this node, as it stands in records.
        epoch: of this node.
        max_regions: most regions at once.
        first_generation: where generations start; None takes a random 31-bit number.
        clock: UNIX time, for listings.
    """

    def __init__(
        self,
        node: str,
        epoch: int,
        max_regions: int,
        *,
        first_generation: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = SlotTable(max_regions, secrets.randbits(31) if first_generation is None else first_generation)
        self._records: dict[int, Record] = {}
        self._owned: dict[SessionId, Owned] = {}
        self._owner_numbers: list[int] = []  # free ones
        self._holds: dict[str, list[Hold]] = {}
        self._gone: deque[SessionId] = deque(maxlen=_REMEMBERED)
        self._waiting = 0  # calls of wait_idle
        self.revision = 0
        """Grows when a region goes or its rights change: what was checked at the same revision is still good."""

    def __len__(self) -> int:
        return len(self._records)

    # ------------------------------------------------------------------------------------- add and remove

    def add(
        self,
        owner: SessionId,
        agent: str,
        backing: Backing,
        nbytes: int,
        *,
        access: Access = Access.NONE,
        label: str = "",
        writable: bool = True,
    ) -> RegionInfo:
        """Enter one region; see ``add_group``."""
        (info,) = self.add_group(owner, agent, [(backing, nbytes)], access=access, label=label, writable=writable)
        return info

    def add_group(
        self,
        owner: SessionId,
        agent: str,
        backings: Sequence[tuple[Backing, int]],
        *,
        access: Access = Access.NONE,
        label: str = "",
        writable: bool = True,
    ) -> tuple[RegionInfo, ...]:
        """Enter regions of one owner, all or none. The table owns the backings only after it returns.

        Raises:
            Overloaded: the table is full.
            InvalidArgument: a region of 0 bytes, or one that passes the end of what can be addressed.
            Closed: the session is being ended, or has.
        """
        if not backings:
            return ()
        for backing, nbytes in backings:
            check_span(backing, nbytes)
        since = self._clock()
        with self._lock:
            room = self._slots.max_slots - len(self._slots)
            if len(backings) > room:
                raise Overloaded(
                    f"{len(backings)} more regions, and {len(self._slots)} are registered",
                    limit=f"{self._slots.max_slots} regions",
                    remedy="free regions, or raise limits.max_regions",
                )
            self._check_open(owner)
            owned = self._owned.get(owner) or self._own(owner)
            ids = self._slots.add_group(
                [(backing.position, nbytes, backing.space) for backing, nbytes in backings],
                owned.number,
                access,
                writable=writable,
            )
            infos = []
            for region, (backing, nbytes) in zip(ids, backings, strict=True):
                info = self._info_of(region, agent, backing, nbytes, access, label, writable)
                self._records[slot_of(region)] = Record(info, backing, owner, since)
                infos.append(info)
            owned.slots.update(map(slot_of, ids))
            return tuple(infos)

    def remove(self, session: SessionId, ids: Sequence[RegionId]) -> list[Backing]:
        """Take out regions of a session, all or none, and return their backings for the caller to close.

        Raises:
            NotFound, Stale: an id names nothing.
            PermissionDenied: a region of another session.
            Busy: a region is held; the message names the holder.
        """
        wanted = list(dict.fromkeys(ids))
        with self._lock:
            for region in wanted:
                self._check_owned(region, session)
                self._check_idle(region)
            return [self._take_out(slot_of(region)) for region in wanted]

    def hand_over(
        self,
        ids: Sequence[RegionId],
        giver: SessionId | None,
        taker: SessionId,
        agent: str,
        *,
        access: Access | None = None,
        announce: Callable[[tuple[RegionInfo, ...]], None] = lambda _infos: None,
    ) -> tuple[RegionInfo, ...]:
        """Make regions another session's, all or none; ids, bytes and backings stay. Returns their new records.

        Args:
            ids: of the regions; a repeated one counts once.
            giver: whose they must be; None takes them from whoever has them.
            taker: the session that gets them.
            agent: of the taker.
            access: what others may do from now on; None leaves it as it is.
            announce: called with the new records once all is checked and before anything changes. What it raises is
                raised here, and nothing has changed. It runs under the table's lock, so it must not use the table.

        Raises:
            NotFound, Stale, PermissionDenied, Busy: as ``remove``; ``Stale`` too where the owner's session ends.
            Unsupported: memory that ends with its client.
            Closed: the taker has ended or is ending.
        """
        since = self._clock()
        with self._lock:
            slots = [slot_of(region) for region in dict.fromkeys(ids)]
            for region in ids:
                self._check_givable(region, giver)
            self._check_open(taker)
            before = [self._records[slot] for slot in slots]
            kept = [record.info.access if access is None else access for record in before]
            infos = tuple(replace(r.info, agent=agent, access=new) for r, new in zip(before, kept, strict=True))
            given = [Record(info, r.backing, taker, since) for info, r in zip(infos, before, strict=True)]
            announce(infos)
            self._change_owner(slots, given, taker, access)
            return infos

    def move(self, ids: Sequence[RegionId], owner: SessionId) -> None:
        """Make regions another owner's for the same agent, held or not; records and holds stay. Gone ones are fine."""
        with self._lock:
            slots = [slot_of(region) for region in ids if self._slots.is_alive(region)]
            moved = [replace(self._records[slot], owner=owner) for slot in slots]
            self._change_owner(slots, moved, owner, None)

    def retire(self, session: SessionId) -> None:
        """Begin a session's end: its regions take no new holds and are no longer listed to others. Twice is fine."""
        with self._lock:
            owned = self._owned.get(session) or self._own(session)
            owned.retired = True
            self._slots.closing[owned.as_array()] = True
            self.revision += 1

    def remove_retired(self, session: SessionId) -> list[Backing]:
        """Take out all regions of a retired session and return their backings for the caller to close.

        Raises:
            Busy: one is held still; ``wait_idle`` comes first.
        """
        with self._lock:
            owned = self._owned.get(session)
            if owned is None:
                return []
            if not owned.retired:
                raise Busy(f"session {session} is alive", remedy="retire it first")
            for slot in owned.slots:
                self._check_idle(int(self._slots.ids[slot]))
            backings = [self._take_out(slot) for slot in tuple(owned.slots)]
            self._forget(session)
            self._gone.append(session)
            return backings

    # ---------------------------------------------------------------------------------------- look at it

    def info(self, region_id: RegionId) -> RegionInfo:
        """Return a region's record.

        Raises:
            NotFound, Stale: the id names nothing.
        """
        with self._lock:
            return self._record(region_id).info

    def backing(self, region_id: RegionId) -> Backing:
        """Return what a region rests on, which stays the table's.

        Raises:
            NotFound, Stale: the id names nothing.
        """
        with self._lock:
            return self._record(region_id).backing

    def owned_by(self, session: SessionId) -> tuple[RegionInfo, ...]:
        """Return the regions of a session, in order of their slots."""
        with self._lock:
            owned = self._owned.get(session)
            return tuple(self._records[slot].info for slot in sorted(owned.slots)) if owned else ()

    def visible(self, actor: Actor | None, query: RegionQuery) -> tuple[RegionInfo, ...]:
        """Return the regions that an actor may see and the query asks for; None is an operator, who sees all.

        Others than the owner see a region where its access is not NONE. Ids that name nothing are left out.
        """
        with self._lock:
            if query.regions:
                records = [self._records[slot_of(i)] for i in query.regions if self._slots.is_alive(i)]
            else:
                records = list(self._records.values())
            retired = {session for session, owned in self._owned.items() if owned.retired}
        return tuple(
            record.info
            for record in records
            if may_see(actor, record, retired)
            and query.agent in ("", record.info.agent)
            and query.label in ("", record.info.label)
        )

    def resolve(self, descriptors: DescriptorList) -> Resolved:
        """Turn (region, offset) into positions, after checking that regions exist and spans lie within them.

        Takes no holds: what was resolved is good only while the regions are held.

        Raises:
            NotFound: a row names a region that never was.
            Stale: a row names a region of another generation.
            OutOfBounds: a span passes the end of its region.
        """
        if (one := self._resolve_in_one(descriptors)) is not None:
            return one
        slots = slots_of(descriptors.region)
        first, last = int(slots.min()), int(slots.max())
        with self._lock:
            window = self._slots.window(first, last)
        found = resolve_in(window, slots, descriptors)
        if isinstance(found, Resolved):
            return found
        with self._lock:
            absence = self._slots.absence(int(descriptors.region[found]))
        raise type(absence)(f"descriptor {found}: {absence.message}", remedy=absence.remedy)

    def _resolve_in_one(self, descriptors: DescriptorList) -> Resolved | None:
        """Resolve a list within one region without a copy of the table, or leave it to the way that knows why not."""
        if (region := only_region(descriptors)) is None:
            return None
        with self._lock:
            span = self._slots.span_of(region)
        return None if span is None else resolve_within(region, span, descriptors)

    # --------------------------------------------------------------------------------------------- holds

    def hold(self, regions: Sequence[RegionId], holder: str, reason: str, actor: Actor, *, write: bool) -> None:
        """Hold regions for ``holder``, all or none: until it releases them they cannot be removed.

        A holder may hold more than once, and the same region again.

        Raises:
            NotFound, Stale: a region has gone, or is going with its session.
            PermissionDenied: the actor may not read (or write) one of them.
        """
        ids = self._ids_of(regions)
        if not len(ids):
            return
        slots = slots_of(ids)
        hold = Hold(ids, slots, reason, self._clock())
        needed = Access.WRITE if write else Access.READ
        with self._lock:
            if not (len(ids) == 1 and self._is_granted(int(ids[0]), actor, needed)):
                self._check_alive(ids, slots)
                self._check_rights(slots, actor, needed)
            self._count(hold, 1)
            self._holds.setdefault(holder, []).append(hold)

    def check(self, regions: Sequence[RegionId], actor: Actor, *, write: bool) -> None:
        """Check what ``hold`` checks, and hold nothing: good for bytes that move before the event loop goes on.

        Raises as ``hold`` does.
        """
        ids, needed = self._ids_of(regions), Access.WRITE if write else Access.READ
        with self._lock:
            if len(ids) and not (len(ids) == 1 and self._is_granted(int(ids[0]), actor, needed)):
                slots = slots_of(ids)
                self._check_alive(ids, slots)
                self._check_rights(slots, actor, needed)

    def standing(self, holder: str) -> Standing:
        """Return what a holder holds now, for ``hold_again`` once it has let go of it."""
        with self._lock:
            return Standing(holder, tuple(self._holds.get(holder, ())), self.revision)

    def hold_again(self, standing: Standing) -> bool:
        """Hold what was held before; False, and nothing is held, where a region or its rights may have changed since.

        The holder holds nothing now.
        """
        with self._lock:
            if standing.revision != self.revision:
                return False
            now = self._clock()
            for hold in standing.holds:
                hold.since = now
                self._count(hold, 1)
            self._holds[standing.holder] = list(standing.holds)
            return True

    def release(self, holder: str) -> None:
        """Let go of all that a holder holds, and wake who waits for idle regions. An unknown holder is fine."""
        with self._lock:
            for hold in self._holds.pop(holder, ()):
                self._count(hold, -1)
            if self._waiting:
                for owned in self._owned.values():
                    if owned.waiters and self._is_idle(owned):
                        self._wake(owned)

    async def wait_idle(self, session: SessionId) -> None:
        """Return when no region of a session is held; at once for an unknown session. Cancel-safe.

        Only after ``retire`` does it stay so.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            owned = self._owned.get(session)
            if owned is None or self._is_idle(owned):
                return
            waiter = (loop, loop.create_future())
            owned.waiters.append(waiter)
            self._waiting += 1
        try:
            await waiter[1]
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._waiting -= 1
                owned.waiters.remove(waiter)

    def holders(self, region_id: RegionId) -> tuple[str, ...]:
        """Return who holds a region, in order of their first hold."""
        with self._lock:
            return self._holders_of_slots(np.array([slot_of(region_id)])) if self._slots.is_alive(region_id) else ()

    def holders_of(self, session: SessionId, source: RegionSource | None = None) -> tuple[str, ...]:
        """Return who holds any region of a session: what must come to rest before the session's memory goes.

        ``source`` looks at regions of that source only.
        """
        with self._lock:
            owned = self._owned.get(session)
            if owned is None:
                return ()
            slots = owned.as_array()
            if source is not None:
                slots = slots[[self._records[slot].info.source is source for slot in slots.tolist()]]
            return self._holders_of_slots(slots) if len(slots) else ()

    def holds(self) -> list[HoldInfo]:
        """List what is held, one entry for each call of ``hold``."""
        with self._lock:
            held = [(holder, hold) for holder, holds in self._holds.items() for hold in holds]
        return [HoldInfo("regions", names_of(hold.ids), holder, hold.reason, hold.since, 0.0) for holder, hold in held]

    def registrations(self) -> list[HoldInfo]:
        """List the regions themselves as things that sessions hold."""
        with self._lock:
            records = list(self._records.values())
        return [
            HoldInfo("region", str(r.info.id), r.owner, f"{r.info.source.value} {r.info.nbytes} bytes", r.since, 0.0)
            for r in records
        ]

    def check_invariants(self) -> None:
        """Raise AssertionError where records, owners and holds do not agree."""
        with self._lock:
            self._slots.check_invariants()
            assert len(self._records) == len(self._slots), "records and slots do not add up"
            owners = {slot: session for session, owned in self._owned.items() for slot in owned.slots}
            assert owners == {slot: record.owner for slot, record in self._records.items()}, "owners do not agree"
            assert all(self._slots.is_alive(record.info.id) for record in self._records.values()), "a dead record"
            numbers = [owned.number for owned in self._owned.values()]
            assert sorted([*numbers, *self._owner_numbers]) == list(range(len(numbers) + len(self._owner_numbers)))
            counts = np.zeros(self._slots.used, dtype=np.int32)
            for holds in self._holds.values():
                for hold in holds:
                    assert (self._slots.ids[hold.slots] == hold.ids).all(), "a removed region is held"
                    counts[hold.slots] += 1
            live = list(self._records)
            assert (self._slots.held[live] == counts[live]).all(), "hold counts do not add up"

    # --------------------------------------------------------------------- below: with the lock held

    def _info_of(
        self, region: RegionId, agent: str, backing: Backing, nbytes: int, access: Access, label: str, writable: bool
    ) -> RegionInfo:
        return RegionInfo(
            id=region,
            node=self._node,
            epoch=self._epoch,
            kind=backing.kind,
            source=backing.source,
            device=backing.device,
            nbytes=nbytes,
            agent=agent,
            access=access,
            writable=writable,
            label=label,
            pool=backing.pool_name,
            pool_offset=backing.pool_offset,
            path=backing.path,
            persistent=backing.is_persistent,
        )

    def _own(self, session: SessionId) -> Owned:
        number = self._owner_numbers.pop() if self._owner_numbers else len(self._owned)
        owned = self._owned[session] = Owned(number)
        return owned

    def _record(self, region: int) -> Record:
        if not self._slots.is_alive(region):
            raise self._slots.absence(region)
        return self._records[slot_of(region)]

    def _check_open(self, session: SessionId) -> None:
        owned = self._owned.get(session)
        if session in self._gone or (owned is not None and owned.retired):
            raise Closed(f"session {session} has ended or is ending", remedy="open a new session")

    def _check_owned(self, region: RegionId, session: SessionId) -> None:
        record = self._record(region)
        if record.owner != session:
            raise PermissionDenied(
                f"region {region} belongs to another session, of agent {record.info.agent}",
                remedy="a region is freed or given away by its owner only, and ends with the owner's session",
            )

    def _check_givable(self, region: RegionId, giver: SessionId | None) -> None:
        if giver is not None:
            self._check_owned(region, giver)
        record = self._record(region)
        if not record.backing.outlives_client:
            raise Unsupported(
                f"region {region} is {record.info.source.value} memory of agent {record.info.agent} and ends with it",
                limit="regions of pools, memfds and files",
                remedy="write the bytes into a region of a pool and hand that over",
            )
        if self._owned[record.owner].retired:
            raise Stale(f"region {region} is going: its session ends", remedy="hand over before the session ends")
        self._check_idle(region)

    def _change_owner(
        self, slots: Sequence[int], records: Sequence[Record], taker: SessionId, access: Access | None
    ) -> None:
        self.revision += 1
        givers = {self._records[slot].owner for slot in slots}
        for slot, record in zip(slots, records, strict=True):
            self._owned[self._records[slot].owner].slots.discard(slot)
            self._records[slot] = record
        gains = self._owned.get(taker) or self._own(taker)
        gains.slots.update(slots)
        self._slots.change_owner(slots, gains.number, access)
        for giver in givers:
            if not self._owned[giver].slots:
                self._forget(giver)

    def _take_out(self, slot: int) -> Backing:
        record = self._records.pop(slot)
        self.revision += 1
        self._slots.remove(slot)
        owned = self._owned[record.owner]
        owned.slots.discard(slot)
        if not owned.slots and not owned.retired:
            self._forget(record.owner)
        return record.backing

    def _forget(self, session: SessionId) -> None:
        owned = self._owned.pop(session)
        self._owner_numbers.append(owned.number)
        self._wake(owned)

    def _count(self, hold: Hold, change: int) -> None:
        held, slots = self._slots.held, hold.slots
        if len(slots) == 1:  # by far the most, and an index array costs ten times as much as an index
            held[slots[0]] += change
        else:
            held[slots] += change

    def _ids_of(self, regions: Sequence[RegionId]) -> Column:
        try:
            ids = np.array(regions, dtype=np.uint64)
            return ids if len(ids) == 1 else np.unique(ids)
        except OverflowError:
            bad = next(region for region in regions if not 0 <= region < 1 << 64)
            raise self._slots.absence(bad) from None

    def _is_granted(self, region: int, actor: Actor, needed: Access) -> bool:
        """Whether one region is there for an actor: what the two below check of many, without their arrays."""
        slot = slot_of(region)
        if not self._slots.is_alive(region) or self._slots.closing[slot]:
            return False
        owned = self._owned.get(actor.session) if isinstance(actor, LocalActor) else None
        is_own = owned is not None and self._slots.owner[slot] == owned.number
        rights = self._slots.own_rights[slot] if is_own else self._slots.other_rights[slot]
        return bool(rights & needed.value)

    def _check_alive(self, ids: Column, slots: NDArray[np.intp]) -> None:
        known = slots < self._slots.used
        bad = ~known
        bad[known] = self._slots.ids[slots[known]] != ids[known]
        if bad.any():
            raise self._slots.absence(int(ids[np.argmax(bad)]))
        closing = self._slots.closing[slots]
        if closing.any():
            raise Stale(
                f"region {int(ids[np.argmax(closing)])} is going: its session ends",
                remedy="ask the owner's next session for a new region",
            )

    def _check_rights(self, slots: NDArray[np.intp], actor: Actor, needed: Access) -> None:
        rights = self._slots.other_rights[slots]
        owned = self._owned.get(actor.session) if isinstance(actor, LocalActor) else None
        if owned is not None:
            rights = np.where(self._slots.owner[slots] == owned.number, self._slots.own_rights[slots], rights)
        bad = (rights & needed.value) == 0
        if not bad.any():
            return
        info = self._records[int(slots[np.argmax(bad)])].info
        if needed is Access.WRITE and not info.writable:
            raise PermissionDenied(
                f"region {info.id} of agent {info.agent} is read-only",
                limit="writable=false",
                remedy="the owner must register it as writable",
            )
        who = "this session" if isinstance(actor, LocalActor) else f"node {actor.node}"
        raise PermissionDenied(
            f"region {info.id} of agent {info.agent} does not grant {needed.name} to {who}",
            limit=f"access {info.access.name}",
            remedy=f"the owner must register it with access {needed.name} or READ_WRITE",
        )

    def _check_idle(self, region: int) -> None:
        if not self._slots.held[slot_of(region)]:
            return
        names = self._holders_of_slots(np.array([slot_of(region)]))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise Busy(
            f"region {region} is held by {', '.join(names[:3])}{more}",
            remedy="wait until the holder has ended, or cancel it",
        )

    def _is_idle(self, owned: Owned) -> bool:
        return not self._slots.held[owned.as_array()].any()

    def _holders_of_slots(self, slots: NDArray[np.intp]) -> tuple[str, ...]:
        wanted = np.zeros(self._slots.used, dtype=np.bool_)
        wanted[slots] = True
        return tuple(name for name, holds in self._holds.items() if any(wanted[hold.slots].any() for hold in holds))

    @staticmethod
    def _wake(owned: Owned) -> None:
        for loop, future in owned.waiters:
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits there any more
                loop.call_soon_threadsafe(_finish, future)
        owned.waiters.clear()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
