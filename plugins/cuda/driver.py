"""What a device worker asks of the driver of its GPU. ``nvidia.py`` is CUDA; ``simulated.py`` is host memory.

Runs in worker processes only: the daemon never has a CUDA context. One thread uses it. Addresses are those of this
process. Errors are ``XferdError``: those of the driver are translated here, by name. Any call may raise ``DeviceLost``:
the device or its context is of no more use to this process, which says so and ends.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xferd.api.errors import XferdError
    from xferd.plugins.cuda.control import Ready
    from xferd.plugins.cuda.layout import Engine


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What one command moves.

    Attributes:
        table: u64 (n, 3): source address, target address, nbytes; no piece is empty, none overlaps another's target.
        nbytes: sum of the pieces.
        on_host: whether source or target is host memory (which ``lock_host`` has locked).
    """

    table: NDArray[np.uint64]
    nbytes: int
    on_host: bool


class Plan(abc.ABC):
    """Pieces made ready to be moved any number of times, one at a time or many at once."""

    nbytes: int
    engine: Engine
    on_host: bool = False
    """Whether host memory takes part: such moves have a speed of their own."""

    def drop(self) -> None:  # noqa: B027 - most have nothing to drop
        """Give back what it holds; nothing of it is under way."""


class Flight(abc.ABC):
    """A plan under way."""

    @abc.abstractmethod
    def is_done(self) -> bool:
        """Whether no byte moves any more. Does not wait.

        Raises:
            MoveFailed: this one failed, and the device can go on.
            DeviceLost: no byte moves any more on the whole device, as far as this process is concerned.
        """

    @abc.abstractmethod
    def device_ns(self) -> int:
        """Return how long the device was at it; called after ``is_done``."""


class ThreadFlight(Flight):
    """A plan that a thread of this process moves: it sets ``error`` or moves all, and ``end`` last of all."""

    def __init__(self) -> None:
        self.error: XferdError | None = None
        self.taken_ns = 0
        self.end = False

    def is_done(self) -> bool:
        """Whether the thread has ended with it."""
        if self.end and self.error is not None:
            raise self.error
        return self.end

    def device_ns(self) -> int:
        """Return how long the thread was at it."""
        return self.taken_ns


class Driver(abc.ABC):
    """One GPU, or what behaves like one."""

    @abc.abstractmethod
    def start(self, device: int) -> Ready:
        """Make the context.

        Raises:
            Unsupported: there is no driver, or the package for it is missing; the remedy says what to install.
            NotFound: no such device; the message says how many there are.
            Unavailable: the device refuses a context.
        """

    @abc.abstractmethod
    def free_nbytes(self) -> int:
        """Return the device's free memory."""

    @abc.abstractmethod
    def open(self, nbytes: int, handle: bytes, fd: int) -> int:
        """Map an allocation that another process exported, of any GPU; returns its address. ``fd`` is the caller's.

        It comes by ``handle``, or by ``fd`` where that is not -1.

        Raises:
            InvalidArgument: not a handle of a living process, or of fewer bytes.
        """

    @abc.abstractmethod
    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Allocate; returns (address, IPC handle).

        Raises:
            PoolExhausted: the device has not so much.
        """

    @abc.abstractmethod
    def close(self, address: int) -> None:
        """Unmap or free what ``open`` or ``allocate`` returned."""

    @abc.abstractmethod
    def wipe(self, address: int, nbytes: int) -> None:
        """Fill with zeros, and return when that has ended."""

    @abc.abstractmethod
    def lock_host(self, address: int, nbytes: int, *, is_writable: bool) -> None:
        """Make host memory reachable by the device, until ``unlock_host``.

        Raises:
            Unavailable: the system does not let so much be locked.
        """

    @abc.abstractmethod
    def unlock_host(self, address: int) -> None:
        """Undo ``lock_host``."""

    @abc.abstractmethod
    def compile(self, pieces: Pieces) -> Plan:
        """Choose how pieces are moved (copy engines or a kernel), and upload what that needs."""

    @abc.abstractmethod
    def begin(self, plan: Plan, wait_event: int, done_event: int) -> Flight:
        """Start a plan, and return at once. Events are what ``open_event`` and ``make_event`` returned; 0: none."""

    @abc.abstractmethod
    def open_event(self, handle: bytes) -> int:
        """Open another process's event.

        Raises:
            InvalidArgument: not an event of a living process.
        """

    @abc.abstractmethod
    def make_event(self) -> tuple[int, bytes]:
        """Make an event that other processes can open; returns (event, IPC handle)."""
