"""The few calls of the CUDA driver that a client needs, by ctypes: no package, and nothing is loaded before it is used.

Contexts are the devices' primary ones, which torch, cupy and the runtime use too; they are pushed for a call and popped
after it, so that nobody's current context changes. The device workers' use of CUDA is in ``plugins/cuda/``.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import functools
import threading
from typing import TYPE_CHECKING, Any, Final

from xferd.api.errors import InvalidArgument, NotFound, PoolExhausted, Unavailable, Unsupported, XferdError
from xferd.clients._device_driver import CUDA, Allocation, Exported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.api.types import DeviceHandle
    from xferd.clients.devices import DeviceSpan

LIBRARY: Final = "libcuda.so.1"

# CUpointer_attribute
_CONTEXT, _MEMORY_TYPE, _BUFFER_ID, _IS_MANAGED, _ORDINAL, _IS_LEGACY_IPC, _MEMPOOL = 1, 2, 7, 8, 9, 10, 17
_MEMORY_TYPE_DEVICE: Final = 2
_HANDLE_TYPE_FD: Final = 1
_EVENT_FLAGS: Final = 2 | 4  # no timing, interprocess
_OPEN_FLAGS: Final = 1  # enables peer access where the memory is on another device

_NO_EXPANDABLE = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False before torch starts, or use cudaMalloc"
_REMEDIES = {
    "CUDA_ERROR_INVALID_CONTEXT": "memory can be opened in other processes than the one that allocated it",
    "CUDA_ERROR_NO_DEVICE": "check CUDA_VISIBLE_DEVICES and nvidia-smi",
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the device",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "use memory of a device that this one reaches",
    "CUDA_ERROR_NOT_SUPPORTED": "use memory of cudaMalloc, which all processes can open",
}
_ERRORS: dict[str, type[XferdError]] = {
    "CUDA_ERROR_INVALID_VALUE": InvalidArgument,
    "CUDA_ERROR_INVALID_HANDLE": InvalidArgument,
    "CUDA_ERROR_INVALID_CONTEXT": InvalidArgument,
    "CUDA_ERROR_OUT_OF_MEMORY": PoolExhausted,
    "CUDA_ERROR_NO_DEVICE": Unsupported,
    "CUDA_ERROR_NOT_SUPPORTED": Unsupported,
    "CUDA_ERROR_NOT_INITIALIZED": Unsupported,
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": Unsupported,
}


class _IpcHandle(c.Structure):
    _fields_ = (("reserved", c.c_char * 64),)


class _Uuid(c.Structure):
    _fields_ = (("bytes", c.c_ubyte * 16),)


class _AllocationProperties(c.Structure):
    _fields_ = (
        ("type", c.c_int),
        ("requested_handle_types", c.c_int),
        ("location_type", c.c_int),
        ("location_id", c.c_int),
        ("win32_metadata", c.c_void_p),
        ("flags", c.c_ubyte * 8),
    )


_p = c.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c.c_uint,),
    "cuGetErrorName": (c.c_int, _p(c.c_char_p)),
    "cuGetErrorString": (c.c_int, _p(c.c_char_p)),
    "cuDeviceGetCount": (_p(c.c_int),),
    "cuDeviceGet": (_p(c.c_int), c.c_int),
    "cuDeviceGetUuid_v2": (_p(_Uuid), c.c_int),
    "cuDevicePrimaryCtxRetain": (_p(c.c_void_p), c.c_int),
    "cuCtxPushCurrent_v2": (c.c_void_p,),
    "cuCtxPopCurrent_v2": (_p(c.c_void_p),),
    "cuCtxGetCurrent": (_p(c.c_void_p),),
    "cuCtxGetDevice": (_p(c.c_int),),
    "cuPointerGetAttribute": (c.c_void_p, c.c_int, c.c_uint64),
    "cuMemGetAddressRange_v2": (_p(c.c_uint64), _p(c.c_size_t), c.c_uint64),
    "cuIpcGetMemHandle": (_p(_IpcHandle), c.c_uint64),
    "cuIpcOpenMemHandle_v2": (_p(c.c_uint64), _IpcHandle, c.c_uint),
    "cuIpcCloseMemHandle": (c.c_uint64,),
    "cuMemRetainAllocationHandle": (_p(c.c_uint64), c.c_uint64),
    "cuMemGetAllocationPropertiesFromHandle": (_p(_AllocationProperties), c.c_uint64),
    "cuMemExportToShareableHandle": (c.c_void_p, c.c_uint64, c.c_int, c.c_uint64),
    "cuMemRelease": (c.c_uint64,),
    "cuEventCreate": (_p(c.c_void_p), c.c_uint),
    "cuEventDestroy_v2": (c.c_void_p,),
    "cuEventRecord": (c.c_void_p, c.c_void_p),
    "cuEventSynchronize": (c.c_void_p,),
    "cuStreamWaitEvent": (c.c_void_p, c.c_void_p, c.c_uint),
    "cuIpcGetEventHandle": (_p(_IpcHandle), c.c_void_p),
    "cuIpcOpenEventHandle": (_p(c.c_void_p), _IpcHandle),
}


@functools.cache
def cuda() -> Cuda:
    """Return the driver.

    Raises:
        Unsupported: there is none on this machine, or it finds no device.
    """
    try:
        library = c.CDLL(LIBRARY)
    except OSError as exc:
        raise Unsupported(
            f"CUDA's driver cannot be loaded: {exc}", remedy="install NVIDIA's driver, or use host memory"
        ) from exc
    return Cuda(library)


def stream_number(stream: Any) -> int:
    """Return the handle of a stream: a number, or what torch, cupy or cuda-core have.

    Raises:
        InvalidArgument: it is none.
    """
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if isinstance(stream, int):
        return stream
    raise InvalidArgument(f"{type(stream).__name__} is no CUDA stream", remedy="give a stream, or its number")


class Cuda:
    """The library. Satisfies ``ClientDriver``."""

    name = CUDA

    def __init__(self, library: Any) -> None:
        """Take the loaded library, or what behaves like it, and initialise it."""
        self._functions: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError as exc:
                raise Unsupported(
                    f"CUDA's driver has no {name}", limit="CUDA 11.4 or newer", remedy="use a newer driver"
                ) from exc
            function.argtypes, function.restype = signature, c.c_int
            self._functions[name] = function
        self._contexts: dict[int, c.c_void_p] = {}
        self._devices: dict[bytes, int] = {}
        self._event_devices: dict[int, int] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)

    # -- memory

    def allocation_of(self, span: DeviceSpan) -> Allocation:
        """Return the allocation that holds a span."""
        kind = self._attribute(span.address, _MEMORY_TYPE, c.c_int)
        if kind != _MEMORY_TYPE_DEVICE:
            raise InvalidArgument(
                f"{span.address:#x} is no memory of a device", limit="memory of cudaMalloc", remedy="use register()"
            )
        if self._attribute(span.address, _IS_MANAGED, c.c_uint):
            raise Unsupported(
                f"{span.address:#x} is managed memory, which no other process can open",
                limit="memory of cudaMalloc",
                remedy="copy it into memory of cudaMalloc (with cupy: leave malloc_managed out)",
            )
        base, nbytes = c.c_uint64(), c.c_size_t()
        ordinal = self._attribute(span.address, _ORDINAL, c.c_int)
        with self._current(ordinal):
            self._call("cuMemGetAddressRange_v2", c.byref(base), c.byref(nbytes), span.address)
        if span.address + span.nbytes > base.value + nbytes.value:
            raise Unsupported(
                f"{span.nbytes} bytes at {span.address:#x} reach over several allocations",
                limit=f"{nbytes.value} bytes at {base.value:#x}",
                remedy=_NO_EXPANDABLE,
            )
        number = self._attribute(span.address, _BUFFER_ID, c.c_uint64)
        return Allocation(base.value, nbytes.value, number, self._uuid(ordinal))

    def export(self, allocation: Allocation) -> Exported:
        """Return an IPC handle, or for VMM memory a file descriptor."""
        with self._current(self.ordinal(allocation.device_uuid)):
            if self._attribute(allocation.address, _IS_LEGACY_IPC, c.c_uint):
                handle = _IpcHandle()
                self._call("cuIpcGetMemHandle", c.byref(handle), allocation.address)
                return Exported(handle=bytes(handle))
            if self._attribute(allocation.address, _MEMPOOL, c.c_uint64):
                raise Unsupported(
                    f"{allocation.address:#x} is memory of cudaMallocAsync, which cannot be exported",
                    limit="memory of cudaMalloc",
                    remedy="torch: set PYTORCH_CUDA_ALLOC_CONF=backend:native; cupy: use its default MemoryPool",
                )
            return Exported(fd=self._export_fd(allocation))

    def _export_fd(self, allocation: Allocation) -> int:
        handle = c.c_uint64()
        self._call("cuMemRetainAllocationHandle", c.byref(handle), allocation.address)
        try:
            properties = _AllocationProperties()
            self._call("cuMemGetAllocationPropertiesFromHandle", c.byref(properties), handle)
            if not properties.requested_handle_types & _HANDLE_TYPE_FD:
                raise Unsupported(
                    f"the VMM allocation at {allocation.address:#x} was made without file descriptors",
                    limit="requestedHandleTypes with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
                    remedy=_NO_EXPANDABLE,
                )
            fd = c.c_int(-1)
            self._call("cuMemExportToShareableHandle", c.byref(fd), handle, _HANDLE_TYPE_FD, 0)
            return fd.value
        finally:
            self._call("cuMemRelease", handle)

    def open(self, handle: DeviceHandle) -> int:
        """Map an allocation of another process."""
        address = c.c_uint64()
        with self._current(self.ordinal(handle.device_uuid)):
            raw = _IpcHandle.from_buffer_copy(handle.handle)
            self._call("cuIpcOpenMemHandle_v2", c.byref(address), raw, _OPEN_FLAGS)
        return address.value

    def close(self, handle: DeviceHandle, address: int) -> None:
        """Unmap what ``open`` has mapped."""
        with contextlib.suppress(XferdError), self._current(self.ordinal(handle.device_uuid)):
            self._call("cuIpcCloseMemHandle", address)

    # -- devices

    def ordinal(self, device_uuid: bytes) -> int:
        """Return this process's number of a device."""
        if device_uuid not in self._devices:
            count = c.c_int()
            self._call("cuDeviceGetCount", c.byref(count))
            self._devices = {self._uuid(number): number for number in range(count.value)}
        number = self._devices.get(device_uuid)
        if number is None:
            raise NotFound(
                f"this process does not see GPU {device_uuid.hex()}",
                limit=f"{len(self._devices)} visible: {', '.join(uuid.hex() for uuid in self._devices)}",
                remedy="check CUDA_VISIBLE_DEVICES of this process",
            )
        return number

    def current_device(self) -> bytes:
        """Return the UUID of the current context's device, that of device 0 where there is no context yet."""
        context, number = c.c_void_p(), c.c_int(0)
        self._call("cuCtxGetCurrent", c.byref(context))
        if context.value:
            self._call("cuCtxGetDevice", c.byref(number))
        return self._uuid(number.value)

    # -- events

    def make_event(self, device_uuid: bytes) -> int:
        """Make an event that other processes can open."""
        event, device = c.c_void_p(), self.ordinal(device_uuid)
        with self._current(device):
            self._call("cuEventCreate", c.byref(event), _EVENT_FLAGS)
        return self._keep(event, device)

    def open_event(self, device_uuid: bytes, handle: bytes) -> int:
        """Open an event of another process."""
        event, device = c.c_void_p(), self.ordinal(device_uuid)
        with self._current(device):
            self._call("cuIpcOpenEventHandle", c.byref(event), _IpcHandle.from_buffer_copy(handle))
        return self._keep(event, device)

    def event_handle(self, event: int) -> bytes:
        """Return the IPC handle of an event."""
        handle = _IpcHandle()
        self._call("cuIpcGetEventHandle", c.byref(handle), event)
        return bytes(handle)

    def record(self, event: int, stream: Any) -> None:
        """Record an event on a stream of its device."""
        with self._current(self._event_devices.get(event, 0)):
            self._call("cuEventRecord", event, stream_number(stream))

    def wait(self, event: int, stream: Any) -> None:
        """Let a stream wait for an event; the stream may be of another device."""
        with self._current(self._event_devices.get(event, 0)):
            self._call("cuStreamWaitEvent", stream_number(stream), event, 0)

    def synchronize(self, event: int) -> None:
        """Wait for an event's last record."""
        self._call("cuEventSynchronize", event)

    def drop_event(self, event: int) -> None:
        """Let go of an event."""
        device = self._event_devices.pop(event, None)
        if device is not None:
            with contextlib.suppress(XferdError), self._current(device):
                self._call("cuEventDestroy_v2", event)

    def _keep(self, event: c.c_void_p, device: int) -> int:
        number = int(event.value or 0)
        self._event_devices[number] = device
        return number

    # -- calling

    @contextlib.contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """Make a device's primary context current for a while; it is retained once and for good."""
        with self._lock:
            context = self._contexts.get(ordinal)
            if context is None:
                context = c.c_void_p()
                self._call("cuDevicePrimaryCtxRetain", c.byref(context), self._device(ordinal))
                self._contexts[ordinal] = context
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", c.byref(c.c_void_p()))

    def _device(self, ordinal: int) -> int:
        device = c.c_int()
        self._call("cuDeviceGet", c.byref(device), ordinal)
        return device.value

    def _uuid(self, ordinal: int) -> bytes:
        uuid = _Uuid()
        self._call("cuDeviceGetUuid_v2", c.byref(uuid), self._device(ordinal))
        return bytes(uuid.bytes)

    def _attribute(self, address: int, attribute: int, kind: type[c.c_int | c.c_uint | c.c_uint64]) -> int:
        value = kind()
        self._call("cuPointerGetAttribute", c.byref(value), attribute, address)
        return int(value.value)

    def _call(self, name: str, *values: Any) -> None:
        code = self._functions[name](*values)
        if code:
            raise self._error(name, code)

    def _error(self, name: str, code: int) -> XferdError:
        texts = []
        for ask in ("cuGetErrorName", "cuGetErrorString"):
            text = c.c_char_p()
            self._functions[ask](code, c.byref(text))
            texts.append((text.value or b"unknown").decode())
        symbol, meaning = texts
        return _ERRORS.get(symbol, Unavailable)(
            f"{name} says {symbol} ({code}): {meaning}", remedy=_REMEDIES.get(symbol, "see the driver's log (dmesg)")
        )
