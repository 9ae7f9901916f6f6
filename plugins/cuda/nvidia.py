"""The driver of an NVIDIA GPU: its context, memory and events. How moves are started is in ``flights.py``.

The context is the device's primary one, so that libraries in the same process (kvikio) share it. Memory of other
processes comes by IPC handle, or by file descriptor where it was made by the virtual memory calls; our own is of whole
2 MiB pages, because an IPC handle opens whatever shares the page. Host memory has the same address on the device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from xferd.api.errors import InvalidArgument, NotFound, Unavailable, XferdError
from xferd.plugins.cuda import calls
from xferd.plugins.cuda.calls import LIBRARY, Access, Cuda, Handle, Location, Properties, Uuid
from xferd.plugins.cuda.control import Ready
from xferd.plugins.cuda.driver import Driver, Flight, Pieces, Plan
from xferd.plugins.cuda.flights import CopyPlan, KernelPlan, Lane, Lanes, NvidiaPlan, Slots
from xferd.plugins.cuda.kernel import NAME, Tuning, cubin, shape

PAGE_NBYTES: Final = 2 << 20

_EXPORT_AGAIN: Final = "export the memory again, from a process that lives and keeps it"


@dataclass(frozen=True, slots=True)
class _Mapping:
    """What ``close`` is to undo: ``kind`` is "own", "ipc" or "vmm"."""

    kind: str
    nbytes: int


class NvidiaDriver(Driver):
    """One GPU. ``start`` makes the context, in the thread that makes all other calls too."""

    def __init__(self, tuning: Tuning | None = None, library: str = LIBRARY) -> None:
        self._tuning = tuning or Tuning()
        self._cuda = Cuda(library)
        self._device = ctypes.c_int()
        self._mappings: dict[int, list[_Mapping]] = {}
        self._events: list[ctypes.c_void_p | None] = [None]

    # -- life

    def start(self, device: int) -> Ready:
        """Make the context, load the kernel and start it once, so that the first move does not wait for either."""
        cuda = self._cuda
        count = self._count(device)
        cuda.call("cuDeviceGet", ctypes.byref(self._device), device, otherwise=NotFound)
        context = ctypes.c_void_p()
        try:
            cuda.call("cuDevicePrimaryCtxSetFlags_v2", self._device, calls.CONTEXT_BLOCKING_SYNC)
            cuda.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device, about="making a context")
            cuda.call("cuCtxSetCurrent", context)
        except XferdError as error:  # out of memory, exclusive mode, a broken device: whatever it is, not usable now
            raise Unavailable(
                f"GPU {device} refuses a context: {error.message}",
                remedy="see nvidia-smi: memory, compute mode, errors",
            ) from error
        if not self._attribute(calls.HOST_POINTERS):
            raise Unavailable(
                f"GPU {device} cannot reach registered host memory at its own address",
                limit="unified addressing",
                remedy="leave it out of backends.cuda.devices",
            )
        self._processors = self._attribute(calls.PROCESSORS)
        self._load()
        self._lanes = Lanes(cuda, timed=self._tuning.timed)
        self._slots = Slots(cuda)
        self._service = Lane(cuda, timed=False)
        self._warm_up()
        uuid, name, total = Uuid(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        cuda.call("cuDeviceGetUuid_v2", ctypes.byref(uuid), self._device)
        cuda.call("cuDeviceGetName", name, len(name), self._device)
        cuda.call("cuDeviceTotalMem_v2", ctypes.byref(total), self._device)
        text = name.value.decode("utf-8", "replace")
        return Ready(count, bytes(uuid.raw).hex(), text, total.value, self.free_nbytes())

    def stop(self) -> None:
        """Let go of all that was mapped or made here, and of the context.

        Workers end without it, and the driver library takes all back; it is for a process that goes on.
        """
        cuda = self._cuda
        for address, mappings in list(self._mappings.items()):
            for _ in list(mappings):
                self.close(address)
        self._slots.close()
        self._lanes.close()
        for event in self._events[1:]:
            cuda.call("cuEventDestroy_v2", event)
        cuda.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _count(self, device: int) -> int:
        cuda, count = self._cuda, ctypes.c_int()
        code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
        if code == calls.NO_DEVICE:
            raise NotFound("the NVIDIA driver shows no GPU", remedy="see nvidia-smi, and CUDA_VISIBLE_DEVICES")
        if code in calls.LOST:
            raise Unavailable(f"the NVIDIA driver: {cuda.name_of(code)}", remedy="see nvidia-smi")
        cuda.check(code, "the NVIDIA driver", remedy="see nvidia-smi")
        if not 0 <= device < count.value:
            raise NotFound(
                f"there is no GPU {device}",
                limit=f"the driver shows {count.value}",
                remedy="see nvidia-smi -L, and CUDA_VISIBLE_DEVICES",
            )
        return count.value

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._cuda.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _load(self) -> None:
        cuda, version, module = self._cuda, ctypes.c_int(), ctypes.c_void_p()
        cuda.call("cuDriverGetVersion", ctypes.byref(version))
        arch = f"sm_{self._attribute(calls.MAJOR)}{self._attribute(calls.MINOR)}"
        code = cubin(arch, version.value, self._tuning)
        if cuda.cuModuleLoadData(ctypes.byref(module), code):  # whole, and yet not what this driver takes
            code = cubin(arch, version.value, self._tuning, anew=True)
            cuda.call("cuModuleLoadData", ctypes.byref(module), code, about="loading the kernel")
        self._function = ctypes.c_void_p()
        cuda.call("cuModuleGetFunction", ctypes.byref(self._function), module, NAME.encode())

    def _warm_up(self) -> None:
        """Start the kernel with nothing to do: modules load at their first start."""
        nothing = (ctypes.c_uint64 * 4)(0, 0, 1, 1 << 10)
        first = ctypes.addressof(nothing)
        params = (ctypes.c_void_p * 4)(first, first + 8, first + 16, first + 24)
        stream = self._service.stream
        self._cuda.call("cuLaunchKernel", self._function, 1, 1, 1, 32, 1, 1, 0, stream, params, ctypes.c_void_p())
        self._cuda.call("cuStreamSynchronize", stream)

    # -- memory

    def free_nbytes(self) -> int:
        """Return the device's free memory, over all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._cuda.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def open(self, nbytes: int, handle: bytes, fd: int) -> int:
        """Map an allocation by its IPC handle or its file descriptor; of another GPU through peer access."""
        return self._import(nbytes, fd) if fd >= 0 else self._open_handle(nbytes, handle)

    def _open_handle(self, nbytes: int, handle: bytes) -> int:
        made, address = _handle(handle), ctypes.c_uint64()
        self._cuda.call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            made,
            calls.IPC_LAZY_ENABLE_PEER_ACCESS,
            otherwise=InvalidArgument,
            about="opening an IPC handle",
            remedy=_EXPORT_AGAIN,
        )
        self._note(address.value, _Mapping("ipc", nbytes))
        base, found = ctypes.c_uint64(), ctypes.c_size_t()
        code = self._cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(found), address)
        if code == calls.SUCCESS and found.value < nbytes:
            self.close(address.value)
            raise InvalidArgument(
                f"the allocation has {found.value} bytes, and {nbytes} were asked for",
                limit=f"{found.value} bytes",
                remedy="give the size of the allocation that was exported",
            )
        return address.value

    def _import(self, nbytes: int, fd: int) -> int:
        cuda, allocation, address = self._cuda, ctypes.c_uint64(), ctypes.c_uint64()
        cuda.call(
            "cuMemImportFromShareableHandle",
            ctypes.byref(allocation),
            ctypes.c_void_p(fd),
            calls.HANDLE_IS_FD,
            otherwise=InvalidArgument,
            about="importing GPU memory by its file descriptor",
            remedy=_EXPORT_AGAIN,
        )
        # What is mapped keeps the allocation; the handle is not needed any more.
        try:
            step = self._granularity()
            room = ctypes.c_size_t(-(-nbytes // step) * step)
            cuda.call(
                "cuMemAddressReserve", ctypes.byref(address), room, ctypes.c_size_t(0), ctypes.c_uint64(0), _U64_0
            )
            try:
                self._map(address, room, allocation)
            except XferdError:
                cuda.cuMemAddressFree(address, room)
                raise
        finally:
            cuda.cuMemRelease(allocation)
        self._note(address.value, _Mapping("vmm", room.value))
        return address.value

    def _map(self, address: ctypes.c_uint64, room: ctypes.c_size_t, allocation: ctypes.c_uint64) -> None:
        cuda = self._cuda
        about = f"mapping {room.value} bytes of GPU memory"
        remedy = "give the size of the allocation that was exported"
        cuda.call(
            "cuMemMap",
            address,
            room,
            ctypes.c_size_t(0),
            allocation,
            _U64_0,
            otherwise=InvalidArgument,
            about=about,
            remedy=remedy,
        )
        access = Access(Location(calls.LOCATION_DEVICE, self._device.value), calls.ACCESS_READ_WRITE)
        try:
            cuda.call(
                "cuMemSetAccess",
                address,
                room,
                ctypes.byref(access),
                ctypes.c_size_t(1),
                otherwise=InvalidArgument,
                about=about,
                remedy=remedy,
            )
        except XferdError:
            cuda.cuMemUnmap(address, room)
            raise

    def _granularity(self) -> int:
        properties = Properties(
            calls.ALLOCATION_PINNED, calls.HANDLE_IS_FD, Location(calls.LOCATION_DEVICE, self._device.value)
        )
        found = ctypes.c_size_t()
        self._cuda.call("cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(properties), 0)
        return found.value

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Allocate whole pages, and export them."""
        room = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
        address, handle = ctypes.c_uint64(), Handle()
        self._cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(room), about=f"allocating {room} bytes")
        self._note(address.value, _Mapping("own", room))
        try:
            self._cuda.call("cuIpcGetMemHandle", ctypes.byref(handle), address, about="exporting GPU memory")
        except XferdError:
            self.close(address.value)
            raise
        return address.value, bytes(handle.raw)

    def close(self, address: int) -> None:
        """Unmap or free; a handle that was opened twice has one address, and is closed twice."""
        mappings = self._mappings[address]
        mapping = mappings.pop()
        if not mappings:
            del self._mappings[address]
        pointer = ctypes.c_uint64(address)
        match mapping.kind:
            case "own":
                self._cuda.call("cuMemFree_v2", pointer)
            case "ipc":
                self._cuda.call("cuIpcCloseMemHandle", pointer)
            case _:
                room = ctypes.c_size_t(mapping.nbytes)
                self._cuda.call("cuMemUnmap", pointer, room)
                self._cuda.call("cuMemAddressFree", pointer, room)

    def _note(self, address: int, mapping: _Mapping) -> None:
        self._mappings.setdefault(address, []).append(mapping)

    def wipe(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        stream = self._service.stream
        self._cuda.call("cuMemsetD8Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(nbytes), stream)
        self._cuda.call("cuStreamSynchronize", stream)

    def lock_host(self, address: int, nbytes: int, *, is_writable: bool) -> None:
        """Register host memory: 50 ms a GiB."""
        self._cuda.lock_host(address, nbytes, is_writable=is_writable)

    def unlock_host(self, address: int) -> None:
        """Unregister it."""
        self._cuda.unlock_host(address)

    # -- moves

    def compile(self, pieces: Pieces) -> Plan:
        """Choose copy engines for few large pieces, and the kernel for all else."""
        tuning = self._tuning
        if tuning.is_for_copy_engines(len(pieces.table), pieces.nbytes, on_host=pieces.on_host):
            return CopyPlan(pieces)
        how = shape(pieces.table, pieces.nbytes, self._processors, tuning, on_host=pieces.on_host)
        return KernelPlan(pieces, how, self._function, self._slots)

    def begin(self, plan: Plan, wait_event: int, done_event: int) -> Flight:
        """Start a plan on a stream of its own."""
        assert isinstance(plan, NvidiaPlan)
        return self._lanes.begin(plan, self._events[wait_event], self._events[done_event])

    # -- events

    def open_event(self, handle: bytes) -> int:
        """Open another process's event."""
        event = ctypes.c_void_p()
        self._cuda.call(
            "cuIpcOpenEventHandle",
            ctypes.byref(event),
            _handle(handle),
            otherwise=InvalidArgument,
            about="opening an event",
            remedy="export it again, from a process that lives; with interprocess=True and no timing",
        )
        return self._enter(event)

    def make_event(self) -> tuple[int, bytes]:
        """Make an event and export it."""
        event, handle = ctypes.c_void_p(), Handle()
        flags = calls.EVENT_DISABLE_TIMING | calls.EVENT_INTERPROCESS
        self._cuda.call("cuEventCreate", ctypes.byref(event), flags)
        self._cuda.call("cuIpcGetEventHandle", ctypes.byref(handle), event, about="exporting an event")
        return self._enter(event), bytes(handle.raw)

    def _enter(self, event: ctypes.c_void_p) -> int:
        self._events.append(event)
        return len(self._events) - 1


_U64_0: Final = ctypes.c_uint64(0)


def _handle(raw: bytes) -> Handle:
    if len(raw) != calls.HANDLE_NBYTES:
        raise InvalidArgument(
            f"the IPC handle has {len(raw)} bytes", limit=f"{calls.HANDLE_NBYTES} bytes", remedy=_EXPORT_AGAIN
        )
    return Handle.from_buffer_copy(raw)
