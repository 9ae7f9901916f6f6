"""Staging memory: a bounded number of equal slots for bytes on their way between two hops.

Two sides share the slots: transfers of two hops wait for one on the event loop (``acquire``, ``lease``), and lanes that
serve peers block for one in their thread (``borrow``). Each side has a reserved minimum that the other cannot take.
Without it a transfer here could hold every slot while it waits for a peer, whose lane waits here for a slot: with
it, each side always gets on.

Who comes first is served first, on either side, except that a waiter whose side may take no more is passed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import Closed, ConfigError, InvalidArgument, LimitExceeded, Overloaded
from xferd.api.types import HoldInfo
from xferd.daemon.memory.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable


@dataclass(frozen=True, slots=True, eq=False)
class StagingSlot:
    """One loan of a slot; a later loan of the same memory is another object."""

    index: int
    address: int
    nbytes: int
    view: NDArray[np.uint8]

    def iov(self, nbytes: int) -> IovTable:
        """Return a one-row table over the first ``nbytes`` bytes."""
        return np.array([[self.address, nbytes]], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class StagingStatistics:
    """Slots in all, on loan to each side, and how many wait on each side."""

    slots: int
    slot_nbytes: int
    acquired: int
    borrowed: int
    waiting_acquire: int
    waiting_borrow: int
    refused: int


@dataclass(slots=True, eq=False)
class _Waiter:
    """Someone in the queue. ``wake`` is called once, with the pool's lock held, after ``slot`` or ``closed`` is set."""

    holder: str
    borrows: bool
    wake: Callable[[], object]
    slot: StagingSlot | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Loan:
    slot: StagingSlot
    holder: str
    borrows: bool
    since: float


class StagingPool:
    """``nbytes // slot_nbytes`` slots of a memfd, so that device workers may map them too. Thread-safe.

    Pages are touched on first use.

    Attributes:
        fd: the memfd; the pool owns it.
        address: of the first slot in this process.
        nbytes: of all slots together.

    Args:
        nbytes: of all slots together.
        slot_nbytes: of one; a chunk must fit.
        clock: UNIX time, for listings.

    Raises:
        ConfigError: fewer than two slots.
    """

    def __init__(self, nbytes: int, slot_nbytes: int, *, clock: Callable[[], float] = time.time) -> None:
        count = nbytes // slot_nbytes if slot_nbytes > 0 else 0
        if count < 2:
            raise ConfigError(
                f"staging memory of {nbytes} bytes has {count} slots of {slot_nbytes} bytes",
                limit="at least 2 slots",
                remedy="raise transfers.staging to twice transfers.chunk or more",
            )
        self.slot_nbytes = slot_nbytes
        self.count = count
        self._reserve = max(1, count // 4)  # for each side: enough to get on, half stays for whoever needs it
        self.nbytes = count * slot_nbytes
        self.fd = os.memfd_create("xferd:staging", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        self._mapping = Mapping(self.fd, self.nbytes)
        self.address = self._mapping.address
        self._clock = clock
        self._lock = threading.Lock()
        self._free = list(range(count - 1, -1, -1))  # a stack: warm pages are used again first
        self._loans: dict[int, _Loan] = {}
        self._taken = {False: 0, True: 0}
        self._waiters: deque[_Waiter] = deque()
        self._refused = 0
        self._is_closed = False

    async def acquire(self, holder: str) -> StagingSlot:
        """Return a slot when it is this caller's turn. Cancel-safe: a cancelled call holds nothing.

        Raises:
            Closed: the pool was closed, also while waiting.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiter = _Waiter(holder, borrows=False, wake=lambda: _wake_threadsafe(loop, future))
        if not self._enqueue(waiter):
            try:
                await future
            except asyncio.CancelledError:
                self._withdraw(waiter)
                raise
        return _granted(waiter)

    @contextlib.asynccontextmanager
    async def lease(self, holder: str, nbytes: int) -> AsyncGenerator[IovTable, None]:
        """Borrow a table over ``nbytes`` bytes of one slot for a block of code.

        Raises:
            LimitExceeded: more than a slot has.
            Closed: the pool was closed.
        """
        if nbytes > self.slot_nbytes:
            raise LimitExceeded(
                f"{nbytes} bytes do not fit a staging slot",
                limit=f"{self.slot_nbytes} bytes",
                remedy="cut the transfer into smaller chunks",
            )
        slot = await self.acquire(holder)
        try:
            yield slot.iov(nbytes)
        finally:
            self.release(slot)

    def borrow(self, timeout_s: float, holder: str = "lane") -> StagingSlot:
        """Return a slot, blocking this thread until it is its turn. Never call it on the event loop.

        Raises:
            Overloaded: no slot within ``timeout_s``.
            Closed: the pool was closed, also while waiting.
        """
        event = threading.Event()
        waiter = _Waiter(holder, borrows=True, wake=event.set)
        if not self._enqueue(waiter) and not event.wait(timeout_s):
            with self._lock:
                if waiter in self._waiters:  # else it was served in the last moment
                    self._waiters.remove(waiter)
                    self._refused += 1
                    raise Overloaded(
                        f"no staging slot for {holder} within {timeout_s:g} s; all {self.count} are in use",
                        limit=f"{self.count} slots of {self.slot_nbytes} bytes",
                        remedy="try again, or raise transfers.staging",
                    )
        return _granted(waiter)

    def release(self, slot: StagingSlot) -> None:
        """Give a slot back, from any thread, and serve the next in the queue.

        Raises:
            InvalidArgument: the slot is not on loan (given back twice).
        """
        with self._lock:
            self._take_back(slot)
            self._serve()

    def give_back(self, slot: StagingSlot) -> None:
        """Give back what ``borrow`` returned; the same as ``release``."""
        self.release(slot)

    def holds(self) -> list[HoldInfo]:
        """List the slots on loan."""
        with self._lock:
            loans = list(self._loans.values())
        return [
            HoldInfo(
                "staging",
                f"slot {loan.slot.index} of {self.slot_nbytes} bytes",
                loan.holder,
                "serving a peer" if loan.borrows else "a transfer of two hops",
                loan.since,
                0.0,
            )
            for loan in loans
        ]

    def statistics(self) -> StagingStatistics:
        """Return how the slots are used now."""
        with self._lock:
            borrowing = sum(waiter.borrows for waiter in self._waiters)
            return StagingStatistics(
                slots=self.count,
                slot_nbytes=self.slot_nbytes,
                acquired=self._taken[False],
                borrowed=self._taken[True],
                waiting_acquire=len(self._waiters) - borrowing,
                waiting_borrow=borrowing,
                refused=self._refused,
            )

    def close(self) -> None:
        """Refuse all who wait and come later, and unmap. No slot may be in use by a system call. Twice is fine.

        Memory on loan stays mapped until its loan is let go of.
        """
        with self._lock:
            self._is_closed = True
            for waiter in self._waiters:
                waiter.closed = True
                waiter.wake()
            self._waiters.clear()
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self._mapping.close()

    async def aclose(self) -> None:
        """Close; for an exit stack."""
        self.close()

    def check_invariants(self) -> None:
        """Raise AssertionError where slots do not add up, or one waits that could be served."""
        with self._lock:
            assert sorted([*self._free, *self._loans]) == list(range(self.count)), "slots do not add up"
            for borrows in (False, True):
                taken = sum(loan.borrows is borrows for loan in self._loans.values())
                assert taken == self._taken[borrows], "loans do not add up"
                assert taken <= self.count - self._reserve, "a side has eaten the other's reserve"
            assert not any(self._may_take(waiter.borrows) for waiter in self._waiters), "one waits for nothing"

    # ------------------------------------------------------------------------- below: with the lock held

    def _enqueue(self, waiter: _Waiter) -> bool:
        """Queue and serve; returns whether the waiter was served at once."""
        with self._lock:
            if self._is_closed:
                raise Closed("the staging memory was closed", remedy="the daemon is stopping")
            self._waiters.append(waiter)
            self._serve()
            return waiter.slot is not None

    def _withdraw(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.slot is not None:  # served, and cancelled before it could take notice
                self._take_back(waiter.slot)
            elif not waiter.closed:
                self._waiters.remove(waiter)
            self._serve()

    def _may_take(self, borrows: bool) -> bool:
        kept_for_other = max(0, self._reserve - self._taken[not borrows])
        return len(self._free) > kept_for_other

    def _serve(self) -> None:
        while self._waiters and self._free:
            waiter = next((w for w in self._waiters if self._may_take(w.borrows)), None)
            if waiter is None:
                return
            self._waiters.remove(waiter)
            waiter.slot = self._lend(waiter)
            waiter.wake()

    def _lend(self, waiter: _Waiter) -> StagingSlot:
        index = self._free.pop()
        offset = index * self.slot_nbytes
        view = self._mapping.view(offset, self.slot_nbytes)
        slot = StagingSlot(index, self._mapping.address + offset, self.slot_nbytes, view)
        self._loans[index] = _Loan(slot, waiter.holder, waiter.borrows, self._clock())
        self._taken[waiter.borrows] += 1
        return slot

    def _take_back(self, slot: StagingSlot) -> None:
        loan = self._loans.get(slot.index)
        if loan is None or loan.slot is not slot:
            raise InvalidArgument(
                f"staging slot {slot.index} is not on this loan", limit="once", remedy="give a slot back once"
            )
        del self._loans[slot.index]
        self._taken[loan.borrows] -= 1
        self._free.append(slot.index)


def _wake_threadsafe(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits there any more
        loop.call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _granted(waiter: _Waiter) -> StagingSlot:
    if waiter.slot is None:
        raise Closed("the staging memory was closed while waiting", remedy="the daemon is stopping")
    return waiter.slot
