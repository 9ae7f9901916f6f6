"""Memory and events of the simulated GPUs that a daemon may have in place of real ones: what ``_cuda.py`` is to CUDA.

For tests, and for trying things out on a machine without a GPU. ``api/simulated.py`` has the format of handles.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
import weakref
from typing import TYPE_CHECKING, Any

from xferd.api import simulated as format_
from xferd.api.errors import InvalidArgument, NotFound, Unsupported
from xferd.api.mapping import map_shared
from xferd.clients._device_driver import SIMULATED, Allocation, Exported

if TYPE_CHECKING:
    from typing import Self

    from xferd.api.types import DeviceHandle
    from xferd.clients.devices import DeviceSpan
    from xferd.clients.memory import ByteArray

_LOOK_S = 50e-6
"""Between two looks at an event: it is a word in shared memory, which nothing can sleep on."""


@functools.cache
def simulated() -> SimulatedDriver:
    """Return this process's driver of simulated devices."""
    return SimulatedDriver()


class SimulatedBuffer:
    """Memory of a simulated GPU: what an engine would get of ``cudaMalloc``. Slices of it are spans of the same memory.

    Attributes:
        array: its bytes.
        allocation: the whole of what was allocated, also for a slice.
    """

    def __init__(self, nbytes: int, device: int = 0, *, is_vmm: bool = False) -> None:
        """Allocate on a device; with ``is_vmm`` the memory is exported by fd, as that of ``cuMemCreate``."""
        if nbytes <= 0:
            raise InvalidArgument(f"a buffer of {nbytes} bytes", limit="at least 1 byte", remedy="ask for bytes")
        self._fd = os.memfd_create(f"simulated-gpu-{device}", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, nbytes)
        self._whole: SimulatedBuffer | None = None
        self.is_vmm = is_vmm
        self.array: ByteArray = map_shared(self._fd, nbytes)
        uuid = format_.device_uuid(device)
        self.allocation = Allocation(self.address, nbytes, simulated().number(), uuid)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return int(self.array.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Size."""
        return self.array.nbytes

    def __getitem__(self, span: Any) -> Self:
        if not isinstance(span, slice) or span.step not in (None, 1) or not len(self.array[span]):
            raise InvalidArgument(f"{span!r} of a buffer", limit="a slice without a step, not empty")
        part = object.__new__(type(self))
        part.array, part.allocation, part.is_vmm = self.array[span], self.allocation, self.is_vmm
        part._fd, part._whole = self._fd, self.whole
        return part

    @property
    def whole(self) -> SimulatedBuffer:
        """What it is a slice of, or itself; it owns the memory."""
        return self if self._whole is None else self._whole

    def export(self) -> Exported:
        """Return the handle, or for VMM memory a copy of the fd."""
        if self.is_vmm:
            return Exported(fd=os.dup(self._fd))
        return Exported(handle=format_.export_fd(self._fd, self.allocation.nbytes))


class SimulatedStream:
    """A stream whose work a test says is over: until ``finish``, events that were recorded on it are not."""

    def __init__(self) -> None:
        self._begun: list[_Event] = []

    def add(self, event: _Event) -> None:
        """Note an event that is over when this stream is done."""
        self._begun.append(event)

    def finish(self) -> None:
        """Say that all work put on it so far is over."""
        begun, self._begun = self._begun, []
        for event in begun:
            event.end()


class _Event:
    """A memfd of one page; ``begun`` and ``ended`` count its records."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self._page = map_shared(fd, format_.EVENT_NBYTES).data

    def counts(self) -> tuple[int, int]:
        begun, ended = format_.EVENT.unpack_from(self._page)
        return begun, ended

    def begin(self) -> None:
        begun, ended = self.counts()
        format_.EVENT.pack_into(self._page, 0, begun + 1, ended)

    def end(self) -> None:
        begun, ended = self.counts()
        format_.EVENT.pack_into(self._page, 0, begun, ended + 1)

    def wait(self) -> None:
        wanted = self.counts()[0]
        while self.counts()[1] < wanted:
            time.sleep(_LOOK_S)


class SimulatedDriver:
    """Satisfies ``ClientDriver`` over host memory; work on streams is over at once, but for ``SimulatedStream``."""

    name = SIMULATED

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._buffers: weakref.WeakValueDictionary[int, SimulatedBuffer] = weakref.WeakValueDictionary()
        self._opened: dict[int, ByteArray] = {}
        self._events: dict[int, _Event] = {}

    def number(self) -> int:
        """Return a number that was never returned before."""
        return next(self._numbers)

    def allocation_of(self, span: DeviceSpan) -> Allocation:
        """Return the allocation that holds a span."""
        if not isinstance(span.owner, SimulatedBuffer):
            raise InvalidArgument(f"{type(span.owner).__name__} is no memory of a simulated device")
        allocation = span.owner.allocation
        self._buffers[allocation.buffer_id] = span.owner.whole
        return allocation

    def export(self, allocation: Allocation) -> Exported:
        """Return an IPC handle, or for VMM memory a file descriptor."""
        return self._buffers[allocation.buffer_id].export()

    def open(self, handle: DeviceHandle) -> int:
        """Map an allocation of another process."""
        fd, nbytes = format_.open_handle(handle.handle)
        try:
            memory = map_shared(fd, nbytes)
        except OSError as exc:
            raise Unsupported(f"{nbytes} bytes cannot be mapped: {exc}", remedy="check RLIMIT_AS") from exc
        finally:
            os.close(fd)
        address = int(memory.ctypes.data)
        self._opened[address] = memory
        return address

    def close(self, handle: DeviceHandle, address: int) -> None:
        """Unmap what ``open`` has mapped."""
        self._opened.pop(address, None)

    def ordinal(self, device_uuid: bytes) -> int:
        """Return the number of a device."""
        number = format_.device_index(device_uuid)
        if number is None:
            raise NotFound(f"{device_uuid.hex()} is no simulated GPU", remedy="use memory of the daemon's own driver")
        return number

    def current_device(self) -> bytes:
        """Return the UUID of device 0."""
        return format_.device_uuid(0)

    def make_event(self, device_uuid: bytes) -> int:
        """Make an event that other processes can open."""
        fd = os.memfd_create(f"simulated-event-{self.ordinal(device_uuid)}", os.MFD_CLOEXEC)
        os.ftruncate(fd, format_.EVENT_NBYTES)
        return self._keep(_Event(fd))

    def event_handle(self, event: int) -> bytes:
        """Return the IPC handle of an event."""
        return format_.export_fd(self._events[event].fd, format_.EVENT_NBYTES, format_.EVENT_MAGIC)

    def open_event(self, device_uuid: bytes, handle: bytes) -> int:
        """Open an event of another process."""
        self.ordinal(device_uuid)
        return self._keep(_Event(format_.open_handle(handle, format_.EVENT_MAGIC)[0]))

    def record(self, event: int, stream: Any) -> None:
        """Record an event; over at once, unless the stream is a ``SimulatedStream``."""
        self._events[event].begin()
        if isinstance(stream, SimulatedStream):
            stream.add(self._events[event])
        else:
            self._events[event].end()

    def wait(self, event: int, stream: Any) -> None:
        """Wait for an event's last record, as all streams are the host's."""
        self.synchronize(event)

    def synchronize(self, event: int) -> None:
        """Wait for an event's last record."""
        self._events[event].wait()

    def drop_event(self, event: int) -> None:
        """Let go of an event."""
        self._events.pop(event, None)

    def _keep(self, event: _Event) -> int:
        number = self.number()
        self._events[number] = event
        return number
