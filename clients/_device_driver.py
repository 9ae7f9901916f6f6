"""What the client needs of a GPU's driver. ``_cuda.py`` is CUDA's; ``_simulated_device.py`` is host memory.

Which one it is follows from the memory that is registered, and for what the daemon hands out, from the daemon's word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from xferd.api.errors import Unsupported

if TYPE_CHECKING:
    from xferd.api.types import DeviceHandle
    from xferd.clients.devices import DeviceSpan

CUDA: Final = "cuda"
SIMULATED: Final = "simulated"


@dataclass(frozen=True, slots=True)
class Allocation:
    """The allocation that a span of device memory lies in.

    ``buffer_id`` is this process's name for it that is never given twice: an address that was freed and allocated again
    has another.
    """

    address: int
    nbytes: int
    buffer_id: int
    device_uuid: bytes


@dataclass(frozen=True, slots=True)
class Exported:
    """How another process opens an allocation: an IPC ``handle``, or an ``fd`` that is the receiver's to close."""

    handle: bytes = b""
    fd: int = -1


class ClientDriver(Protocol):
    """One process's driver. Safe between threads. Events and addresses are numbers of this process.

    All methods may raise ``Unsupported`` (no driver here), ``InvalidArgument`` and ``Unavailable`` (the driver's own).
    """

    name: str

    def allocation_of(self, span: DeviceSpan) -> Allocation:
        """Return the allocation that holds a span.

        Raises:
            InvalidArgument: it is no memory of a device, or reaches over several allocations.
        """

    def export(self, allocation: Allocation) -> Exported:
        """Make an allocation known to other processes.

        Raises:
            Unsupported: memory of this kind cannot be; the remedy says which can.
        """

    def open(self, handle: DeviceHandle) -> int:
        """Map an allocation of another process and return its address."""

    def close(self, handle: DeviceHandle, address: int) -> None:
        """Unmap what ``open`` has mapped. Does not raise: nobody is left who could do something about it."""

    def ordinal(self, device_uuid: bytes) -> int:
        """Return this process's number of a device.

        Raises:
            NotFound: this process does not see it.
        """

    def current_device(self) -> bytes:
        """Return the UUID of the device that this thread uses now."""

    def make_event(self, device_uuid: bytes) -> int:
        """Make an event that other processes can open."""

    def event_handle(self, event: int) -> bytes:
        """Return the IPC handle of an event."""

    def open_event(self, device_uuid: bytes, handle: bytes) -> int:
        """Open an event of another process."""

    def record(self, event: int, stream: Any) -> None:
        """Record an event: it is over when all that was put on the stream before is."""

    def wait(self, event: int, stream: Any) -> None:
        """Let what is put on the stream from now on wait for an event's last record."""

    def synchronize(self, event: int) -> None:
        """Wait for an event's last record."""

    def drop_event(self, event: int) -> None:
        """Let go of an event that ``make_event`` or ``open_event`` returned. Does not raise."""


def driver_named(name: str) -> ClientDriver:
    """Return this process's driver of a name; they are loaded when first wanted, and never let go.

    Raises:
        Unsupported: there is none of that name, or it cannot be had here.
    """
    if name == CUDA:
        from xferd.clients._cuda import cuda  # loads libcuda

        return cuda()
    if name == SIMULATED:
        from xferd.clients._simulated_device import simulated

        return simulated()
    raise Unsupported(f"memory of a {name!r} driver", limit=f"{CUDA}, {SIMULATED}", remedy="use a newer client")
