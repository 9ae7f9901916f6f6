"""The interface between the daemon and GPUs: what can be asked of them beside moving bytes.

No implementation is here; the ``cuda`` backend is one. Positions in GPU memory are ``DeviceSpace``'s, in ``base.py``.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xferd.api.types import DeviceInfo


@dataclass(frozen=True, slots=True)
class DeviceExport:
    """How an allocation of GPU memory is opened by another process.

    Attributes:
        device_uuid: which GPU, 16 bytes: numbers differ between processes, UUIDs do not.
        nbytes: of the whole allocation.
        handle: CUDA's IPC handle, 64 bytes; b"" where ``fd`` is given.
        fd: a VMM allocation's file descriptor, which stays the giver's; -1 where ``handle`` is given.
    """

    device_uuid: bytes
    nbytes: int
    handle: bytes = b""
    fd: int = -1


class DeviceMemory(abc.ABC):
    """What can be asked of GPUs beside moving bytes. The ``cuda`` backend is one, as well as a ``Backend``.

    ``owner`` is the agent whose process exported memory, or "" for the daemon itself. All coroutines are cancel-safe,
    and all may raise ``DeviceLost`` (the worker died or hung) and ``Unavailable`` (the device cannot be used).
    """

    @abc.abstractmethod
    def facts(self) -> tuple[DeviceInfo, ...]:
        """Return what is known of each configured device; cheap, called at each scrape."""

    @abc.abstractmethod
    async def open(self, owner: str, export: DeviceExport) -> tuple[int, int]:
        """Open a client's allocation in its owner's worker; returns (device index, allocation number).

        The same handle opened again by the same owner costs nothing and counts once more.

        Raises:
            InvalidArgument: no such handle, of a process that has gone, or smaller than ``nbytes``.
            NotFound: no configured device has the UUID; the message names those there are.
        """

    @abc.abstractmethod
    async def allocate(self, device: int, nbytes: int) -> tuple[int, DeviceExport]:
        """Allocate memory of the daemon's own; returns (allocation number, how others open it).

        Raises:
            PoolExhausted: the device has not so much.
        """

    @abc.abstractmethod
    async def close(self, allocation: int) -> None:
        """Take one count off an allocation; at the last, every worker lets go of it, or is killed. Does not raise."""

    @abc.abstractmethod
    async def cut(self, allocation: int) -> None:
        """Kill every worker that has an allocation open: its owner has gone, and commands in it do not end.

        Does not raise. The allocation stays known until it is closed.
        """

    @abc.abstractmethod
    async def wipe(self, allocation: int, offset: int, nbytes: int) -> None:
        """Fill a span of the daemon's own memory with zeros."""

    @abc.abstractmethod
    async def end_owner(self, owner: str) -> None:
        """Kill an owner's workers, so that the driver takes all that they mapped back. Does not raise."""

    @abc.abstractmethod
    async def open_event(self, owner: str, device: int, handle: bytes) -> int:
        """Open a client's IPC event for transfers to wait for; returns its number, good until the owner ends."""

    @abc.abstractmethod
    async def make_event(self, owner: str, device: int) -> tuple[int, bytes]:
        """Make an IPC event that transfers record when they have ended; returns (number, IPC handle)."""

    @abc.abstractmethod
    def is_lost(self, allocation: int) -> bool:
        """Whether an allocation went with the worker that owned it: the daemon's own memory after a crash."""

    @abc.abstractmethod
    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        """Tell of host memory mapped here, so that workers may map it too; returns a number. ``fd`` is duplicated."""

    @abc.abstractmethod
    async def drop_host(self, number: int) -> None:
        """Let workers forget host memory; its bytes are at rest. Does not raise."""
