"""The calls of the CUDA driver that a client makes, against a library that answers as NVIDIA's does."""

# ruff: noqa: N802 - functions of the library have its names for them

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pytest

from xferd.api.errors import InvalidArgument, NotFound, PoolExhausted, Unavailable, Unsupported
from xferd.api.types import DeviceHandle
from xferd.clients import _cuda
from xferd.clients._cuda import Cuda, stream_number
from xferd.clients._device_driver import Allocation
from xferd.clients.devices import DeviceSpan

UUIDS = [bytes([number]) * 16 for number in (7, 8)]
BASE = 0x7F0000000000
NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 201: b"CUDA_ERROR_INVALID_CONTEXT"}


class Function:
    """A function of the library: called with what ctypes would pass."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.argtypes: tuple[Any, ...] = ()
        self.restype: object = None

    def __call__(self, *values: Any) -> int:
        assert len(values) == len(self.argtypes), f"{self.work.__name__} takes {len(self.argtypes)}"
        return int(self.work(*(getattr(value, "_obj", value) for value in values)) or 0)


@dataclass
class Library:
    """One allocation of 1 MiB at ``BASE`` on device 1; ``attributes`` are those of its pointers."""

    attributes: dict[int, int] = field(default_factory=lambda: {2: 2, 7: 99, 8: 0, 9: 1, 10: 1, 17: 0})
    fail: dict[str, int] = field(default_factory=dict)
    missing: str = ""
    handle_types: int = 1
    contexts: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    released: int = 0

    def __getattr__(self, name: str) -> Function:
        if name == self.missing or not name.startswith("cu"):
            raise AttributeError(name)
        work = getattr(type(self), "_" + name, lambda *_: None)

        def run(*values: Any) -> int:
            self.calls.append(name)
            return self.fail.get(name) or int(work(self, *values) or 0)

        function = Function(run)
        self.__dict__[name] = function
        return function

    def _cuGetErrorName(self, code: int, out: Any) -> int:
        out.value = NAMES.get(code)
        return 0 if code in NAMES else 1

    def _cuDeviceGetCount(self, out: Any) -> None:
        out.value = len(UUIDS)

    def _cuDeviceGet(self, out: Any, ordinal: int) -> None:
        out.value = ordinal + 100

    def _cuDeviceGetUuid_v2(self, out: Any, device: int) -> None:
        ctypes.memmove(ctypes.addressof(out), UUIDS[device - 100], 16)

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        out.value = device * 10

    def _cuCtxPushCurrent_v2(self, context: Any) -> None:
        self.contexts.append(context.value)

    def _cuCtxPopCurrent_v2(self, out: Any) -> None:
        self.contexts.pop()

    def _cuPointerGetAttribute(self, out: Any, attribute: int, address: int) -> int:
        if address - BASE >= 1 << 20:
            return 1
        out.value = self.attributes[attribute]
        return 0

    def _cuMemGetAddressRange_v2(self, base: Any, nbytes: Any, address: int) -> None:
        assert self.contexts == [1010], "needs a context of the pointer's device"
        base.value, nbytes.value = BASE, 1 << 20

    def _cuIpcGetMemHandle(self, out: Any, address: int) -> None:
        ctypes.memmove(ctypes.addressof(out), address.to_bytes(64, "little"), 64)

    def _cuMemRetainAllocationHandle(self, out: Any, address: int) -> None:
        out.value = 5

    def _cuMemGetAllocationPropertiesFromHandle(self, out: Any, handle: Any) -> None:
        assert handle.value == 5
        out.requested_handle_types = self.handle_types

    def _cuMemExportToShareableHandle(self, out: Any, handle: Any, kind: int, flags: int) -> None:
        assert (handle.value, kind, flags) == (5, 1, 0)
        out.value = 42

    def _cuMemRelease(self, handle: Any) -> None:
        self.released += 1

    def _cuIpcOpenMemHandle_v2(self, out: Any, handle: Any, flags: int) -> None:
        assert (bytes(handle), flags) == (b"h" * 64, 1)
        out.value = 0x1000

    def _cuEventCreate(self, out: Any, flags: int) -> None:
        assert flags == 6
        out.value = 0x77

    def _cuEventRecord(self, *_: object) -> None:
        assert self.contexts == [1010], "needs a context of the event's device"

    def _cuStreamWaitEvent(self, *_: object) -> None:
        self._cuEventRecord()

    def _cuEventDestroy_v2(self, *_: object) -> None:
        self._cuEventRecord()


def span(offset: int = 256, nbytes: int = 4096) -> DeviceSpan:
    return DeviceSpan("cuda", BASE + offset, nbytes, True, None)


def driver(**changes: Any) -> tuple[Cuda, Library]:
    attributes = changes.pop("attributes", {})
    library = Library(**changes)
    library.attributes |= attributes
    return Cuda(library), library


def test_memory_of_cudamalloc_goes_by_handle_of_its_allocation():
    cuda, library = driver()
    allocation = cuda.allocation_of(span())
    assert allocation == Allocation(BASE, 1 << 20, 99, UUIDS[1])
    exported = cuda.export(allocation)
    assert (exported.handle, exported.fd) == (BASE.to_bytes(64, "little"), -1)
    assert library.contexts == [], "nobody's current context has changed"
    assert library.calls.count("cuDevicePrimaryCtxRetain") == 1, "kept for the next call"


def test_vmm_memory_goes_by_fd_and_its_handle_is_let_go():
    cuda, library = driver(attributes={10: 0})
    assert cuda.export(cuda.allocation_of(span())).fd == 42
    assert library.released == 1


@pytest.mark.parametrize(
    ("attributes", "changes", "says", "remedy"),
    [
        ({10: 0}, {"handle_types": 0}, "without file descriptors", "expandable_segments:False"),
        ({10: 0}, {"handle_types": 8}, "without file descriptors", "expandable_segments:False"),
        ({10: 0, 17: 123}, {}, "cudaMallocAsync", "PYTORCH_CUDA_ALLOC_CONF=backend:native"),
        ({8: 1}, {}, "managed memory", "cudaMalloc"),
    ],
)
def test_memory_that_cannot_be_exported_says_what_to_set(attributes, changes, says, remedy):
    cuda, library = driver(attributes=attributes, **changes)
    with pytest.raises(Unsupported, match=says) as caught:
        cuda.export(cuda.allocation_of(span()))
    assert remedy in caught.value.remedy
    assert library.contexts == []
    assert library.released == (1 if changes else 0)


def test_a_span_over_several_allocations_says_what_to_set():
    with pytest.raises(Unsupported, match="several allocations") as caught:
        driver()[0].allocation_of(span((1 << 20) - 100, 101))
    assert "expandable_segments:False" in caught.value.remedy
    assert driver()[0].allocation_of(span((1 << 20) - 100, 100))


def test_memory_of_the_host_is_to_be_registered_as_such():
    with pytest.raises(InvalidArgument, match="no memory of a device") as caught:
        driver(attributes={2: 1})[0].allocation_of(span())
    assert "register()" in caught.value.remedy
    with pytest.raises(InvalidArgument, match=r"CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver()[0].allocation_of(span(1 << 20))


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (1, InvalidArgument, r"cuIpcOpenMemHandle_v2 says CUDA_ERROR_INVALID_VALUE \(1\)"),
        (2, PoolExhausted, "OUT_OF_MEMORY"),
        (201, InvalidArgument, "INVALID_CONTEXT"),
        (999, Unavailable, r"unknown \(999\)"),
    ],
)
def test_errors_of_the_driver_have_its_name_for_them(code, error, says):
    cuda, library = driver(fail={"cuIpcOpenMemHandle_v2": code})
    with pytest.raises(error, match=says):
        cuda.open(DeviceHandle(UUIDS[0], b"h" * 64, 4096, 0, "cuda"))
    assert library.contexts == []


def test_closing_does_not_raise():
    handle = DeviceHandle(UUIDS[0], b"h" * 64, 4096, 0, "cuda")
    cuda, library = driver(fail={"cuIpcCloseMemHandle": 1})
    address = cuda.open(handle)
    assert address == 0x1000
    cuda.close(handle, address)
    assert library.calls.count("cuIpcCloseMemHandle") == 1


def test_a_device_that_this_process_does_not_see_is_named():
    with pytest.raises(NotFound, match=bytes(16).hex()) as caught:
        driver()[0].ordinal(bytes(16))
    assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy
    assert UUIDS[1].hex() in caught.value.limit


def test_a_driver_that_is_too_old_says_so():
    with pytest.raises(Unsupported, match="has no cuMemRetainAllocationHandle"):
        Cuda(Library(missing="cuMemRetainAllocationHandle"))


def test_events_are_made_on_their_device_and_dropped_once():
    cuda, library = driver()
    event = cuda.make_event(UUIDS[1])
    assert (event, library.contexts) == (0x77, [])
    cuda.record(event, 5)
    cuda.wait(event, 5)
    cuda.synchronize(event)
    cuda.drop_event(event)
    cuda.drop_event(event)
    assert library.calls.count("cuEventDestroy_v2") == 1


def test_streams_of_all_libraries_are_taken():
    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 11

    class Torch:
        cuda_stream = 12

    class Cupy:
        ptr = 13

    assert [stream_number(s) for s in (Protocol(), Torch(), Cupy(), 0, 14)] == [11, 12, 13, 0, 14]
    with pytest.raises(InvalidArgument, match="is no CUDA stream"):
        stream_number("default")


def test_nothing_is_loaded_before_it_is_wanted():
    assert _cuda.LIBRARY == "libcuda.so.1"
    assert all(name.startswith("cu") for name in _cuda._SIGNATURES)
