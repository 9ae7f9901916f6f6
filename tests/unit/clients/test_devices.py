"""GPU memory as a client sees it, without a GPU: spans of other libraries' arrays, our arrays, events, the cache."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api import simulated
from xferd.api.errors import Busy, InvalidArgument, NotFound, OutOfBounds, Unsupported
from xferd.api.types import (
    Access,
    DeviceEvent,
    DeviceHandle,
    DeviceInfo,
    MemoryKind,
    RegionId,
    RegionInfo,
    RegionSource,
)
from xferd.clients import _device_regions as device_regions, _dlpack as dlpack
from xferd.clients._device_driver import driver_named
from xferd.clients._device_regions import DeviceBook
from xferd.clients.devices import (
    CudaArray,
    SimulatedArray,
    SimulatedBuffer,
    SimulatedStream,
    device_span,
    element_shape,
    handle_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Interface:
    """An array that says where it is, as cupy's do."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {"version": 3, "typestr": "<f4", "data": (4096, False)} | interface


class ByDlpack:
    """A numpy array that says it is on a GPU; ``versions``: whether its library knows DLPack 1."""

    def __init__(self, array: np.ndarray[Any, Any], *, versions: bool = True, device: int = dlpack.CUDA) -> None:
        self.array, self.versions, self.device = array, versions, device
        self.asked: list[dict[str, object]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 3

    def __dlpack__(self, **options: object) -> object:
        self.asked.append(options)
        if "max_version" in options and not self.versions:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**{k: v for k, v in options.items() if k != "stream"})  # type: ignore[arg-type]


class Weird(ByDlpack):
    """torch's way with dtypes that it has no interface for, and with gradients."""

    requires_grad = True

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")

    def detach(self) -> ByDlpack:
        return ByDlpack(self.array)


# -- spans


def test_a_span_is_what_the_interface_says():
    span = device_span(Interface(shape=(3, 5), data=(8192, True)))
    assert (span.driver, span.address, span.nbytes, span.writable) == ("cuda", 8192, 60, False)
    assert device_span(Interface(shape=(3, 5), strides=(20, 4))).nbytes == 60
    assert device_span(Interface(shape=(1, 5), strides=(999, 4))).nbytes == 20  # one row lies right anyhow
    assert device_span(Interface(shape=(), typestr="<f8")).nbytes == 8


@pytest.mark.parametrize(
    ("interface", "says"),
    [
        ({"shape": (3, 5), "strides": (40, 4)}, "not contiguous"),
        ({"shape": (3, 5), "strides": (4, 12)}, "not contiguous"),
        ({"shape": (3,), "strides": (-4,)}, "not contiguous"),
        ({"shape": (0, 4)}, "no bytes"),
        ({"shape": (4,), "mask": object()}, "masked"),
    ],
)
def test_what_has_gaps_or_a_mask_is_refused(interface, says):
    with pytest.raises(InvalidArgument, match=says):
        device_span(Interface(**interface))


@pytest.mark.parametrize("versions", [True, False])
def test_a_span_is_what_a_capsule_says_and_nobody_waits_for_a_stream(versions):
    array = np.zeros((4, 6), np.int16)
    source = ByDlpack(array[1:], versions=versions)
    span = device_span(source)
    assert (span.address, span.nbytes, span.writable) == (array.ctypes.data + 12, 36, True)
    assert all(asked["stream"] == -1 for asked in source.asked)


def test_a_capsule_says_what_may_not_be_written():
    array = np.zeros(4)
    array.flags.writeable = False
    assert not device_span(ByDlpack(array)).writable


def test_memory_of_a_capsule_lives_with_the_span_and_no_longer():
    source = ByDlpack(np.zeros(16))
    alive = weakref.ref(source.array)
    span = device_span(source)
    source.array = np.zeros(1)
    gc.collect()
    assert alive() is not None, "the capsule keeps it"
    del span
    gc.collect()
    assert alive() is None, "its maker's deleter was called"


def test_strides_of_a_capsule_are_looked_at():
    with pytest.raises(InvalidArgument, match="not contiguous"):
        device_span(ByDlpack(np.zeros((4, 6))[:, ::2]))


def test_a_tensor_with_gradients_and_without_an_interface_is_taken():
    array = np.ones(8)
    assert device_span(Weird(array)).address == array.ctypes.data


@pytest.mark.parametrize("where", [dlpack.CPU, dlpack.CUDA_HOST, dlpack.CUDA_MANAGED, 42])
def test_memory_of_other_places_is_refused(where):
    with pytest.raises(InvalidArgument, match="memory that is"):
        device_span(ByDlpack(np.zeros(4), device=where))


@pytest.mark.parametrize("thing", [b"bytes", 5, None, [1]])
def test_what_is_no_array_is_refused(thing):
    with pytest.raises(InvalidArgument, match="no array of a GPU"):
        device_span(thing)


def test_a_capsule_that_was_used_and_what_is_none_are_refused():
    class Taker:
        capsule = np.zeros(3).__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **_: object) -> object:
            return self.capsule

    np.from_dlpack(Taker())
    with pytest.raises(InvalidArgument, match="used_dltensor"):
        dlpack.read(Taker.capsule)
    with pytest.raises(InvalidArgument, match="no DLPack capsule"):
        dlpack.read("rubbish")


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    dtype=st.sampled_from(["u1", "i2", "f4", "f8", "c16", "?"]),
    step=st.sampled_from([1, 2]),
    order=st.sampled_from("CF"),
    versioned=st.booleans(),
)
def test_capsules_are_read_as_numpy_means_them(shape, dtype, step, order, versioned):
    array = np.zeros(shape, dtype, order=order)[..., ::step] if shape else np.zeros(shape, dtype)
    read = dlpack.read(array.__dlpack__(max_version=(1, 0)) if versioned else array.__dlpack__())
    assert (read.address, read.shape, read.nbytes) == (array.ctypes.data, array.shape, array.nbytes)
    assert read.is_contiguous == array.flags.c_contiguous


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_byte_offset_counts(version):
    array = np.zeros(64, np.uint8)
    capsule = array.__dlpack__(max_version=version)
    name = b"dltensor_versioned" if version else b"dltensor"
    kind = dlpack._ManagedVersioned if version else dlpack._Managed
    kind.from_address(dlpack._capsule_pointer(capsule, name)).tensor.byte_offset = 24
    assert dlpack.read(capsule).address == array.ctypes.data + 24


def test_lanes_count_and_a_version_to_come_is_refused():
    capsule = np.zeros(64, np.uint8).__dlpack__(max_version=(1, 0))
    told = dlpack._ManagedVersioned.from_address(dlpack._capsule_pointer(capsule, b"dltensor_versioned"))
    told.tensor.lanes = 2
    assert dlpack.read(capsule).nbytes == 128
    told.major = 2
    with pytest.raises(InvalidArgument, match="version 2"):
        dlpack.read(capsule)


# -- arrays of ours


def made(array: np.ndarray[Any, Any], keep: object, *, is_read_only: bool = False) -> SimulatedArray:
    elements = element_shape(array.nbytes, array.dtype, array.shape)
    return SimulatedArray(array.ctypes.data, (dlpack.CPU, 0), elements, keep, is_read_only=is_read_only)


class Keep:
    """Something whose end can be seen."""


@pytest.mark.parametrize("take", [np.from_dlpack, np.asarray, lambda given: np.asarray(given)[1:, 2:]])
def test_memory_is_kept_until_the_last_consumer_let_go(take: Callable[[object], np.ndarray[Any, Any]]):
    memory = np.arange(24, dtype=np.float32).reshape(4, 6)
    keep = Keep()
    alive = weakref.ref(keep)
    given_array = made(memory, keep)
    first, second = take(given_array), take(given_array)
    assert np.shares_memory(first, memory)
    del keep, given_array, first
    gc.collect()
    assert alive() is not None
    del second
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_that_nobody_took_lets_go_too(version):
    keep = Keep()
    alive = weakref.ref(keep)
    capsule = made(np.zeros(4), keep).__dlpack__(max_version=version)
    del keep
    assert alive() is not None
    del capsule
    assert alive() is None


def test_torch_takes_ours_and_lets_go():
    torch = pytest.importorskip("torch")
    keep = Keep()
    alive = weakref.ref(keep)
    memory = np.zeros((2, 4), np.uint16)
    ours = SimulatedArray(
        memory.ctypes.data, (dlpack.CPU, 0), element_shape(16, "bfloat16", (2, 4)), keep, is_read_only=False
    )
    tensor = torch.from_dlpack(ours)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (2, 4))
    tensor[1, 3] = 1.0
    assert memory[1, 3] == 0x3F80
    assert not hasattr(ours, "__array_interface__"), "numpy has no bfloat16"
    del keep, ours, tensor
    gc.collect()
    assert alive() is None


def test_read_only_memory_says_so_or_is_not_given():
    ours = made(np.zeros(4), None, is_read_only=True)
    assert not np.from_dlpack(ours).flags.writeable
    assert not np.asarray(ours).flags.writeable
    with pytest.raises(BufferError, match="may not be written"):
        ours.__dlpack__()


def test_a_copy_or_another_device_is_not_given():
    ours = made(np.zeros(4), None)
    for options in ({"copy": True}, {"dl_device": (dlpack.CUDA, 0)}):
        with pytest.raises(BufferError, match="not as a copy"):
            ours.__dlpack__(**options)
    assert ours.__dlpack__(dl_device=(dlpack.CPU, 0), copy=False)


def test_memory_of_a_gpu_has_the_interface_of_cuda_and_not_that_of_numpy():
    ours = CudaArray(4096, (dlpack.CUDA, 1), element_shape(64, np.float32, (2, 4)), None, is_read_only=False)
    interface = ours.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["data"]) == ((2, 4), "<f4", (4096, False))
    assert ours.__dlpack_device__() == (2, 1)
    assert not hasattr(ours, "__array_interface__")
    assert not hasattr(made(np.zeros(4), None), "__cuda_array_interface__")
    assert device_span(ours).address == 4096
    capsule = dlpack.read(ours.__dlpack__(stream=7, max_version=(1, 1)))
    assert (capsule.device_type, capsule.device_id, capsule.shape) == (2, 1, (2, 4))


@pytest.mark.parametrize(
    ("dtype", "shape", "found"), [("bfloat16", None, (32,)), ("<f8", 3, (3,)), (bool, (8, 8), (8, 8))]
)
def test_elements_fit_the_region(dtype, shape, found):
    assert element_shape(64, dtype, shape).shape == found


@pytest.mark.parametrize("dtype", [">f4", "M8[s]"])
def test_elements_that_dlpack_has_not_are_not_given(dtype):
    ours = CudaArray(4096, (dlpack.CUDA, 0), element_shape(64, dtype, None), None, is_read_only=False)
    with pytest.raises(BufferError, match="DLPack has no"):
        ours.__dlpack__(max_version=(1, 0))


def test_elements_that_do_not_fit_are_refused():
    with pytest.raises(OutOfBounds, match="takes 72 bytes"):
        element_shape(64, np.float64, 9)
    with pytest.raises(InvalidArgument):
        element_shape(64, np.uint8, (-1,))


# -- the simulated driver


def test_slices_of_a_buffer_are_of_its_allocation():
    buffer = SimulatedBuffer(8192, device=2)
    part = buffer[4096:][16:32]
    wanted = device_regions.wanted(part, Access.NONE, "", None)
    assert (wanted.key.offset, wanted.key.nbytes) == (4112, 16)
    assert wanted.allocation == buffer.allocation
    assert wanted.allocation.device_uuid == simulated.device_uuid(2)
    for wrong in (slice(5, 5), slice(0, 8, 2), 3):
        with pytest.raises(InvalidArgument):
            buffer[wrong]


def test_a_freed_buffer_leaves_no_fd_and_its_handle_is_of_no_use(open_fds):
    before = open_fds()
    buffer = SimulatedBuffer(4096)
    handle = buffer.export().handle
    part = buffer[10:20]
    del buffer
    gc.collect()
    fd, nbytes = simulated.open_handle(handle)
    assert nbytes == 4096, "a slice keeps it"
    os.close(fd)
    del part
    assert open_fds() == before
    with pytest.raises(InvalidArgument):
        simulated.open_handle(handle)


def test_an_event_is_over_when_its_stream_is():
    driver = driver_named("simulated")
    event = driver.make_event(simulated.device_uuid(0))
    other = driver.open_event(simulated.device_uuid(0), driver.event_handle(event))
    driver.synchronize(other)  # never recorded: holds nobody up
    stream = SimulatedStream()
    driver.record(event, stream)
    fd, _ = simulated.open_handle(driver.event_handle(event), simulated.EVENT_MAGIC)
    with mmap.mmap(fd, simulated.EVENT_NBYTES) as page:
        os.close(fd)
        assert simulated.EVENT.unpack_from(page) == (1, 0)
        stream.finish()
        assert simulated.EVENT.unpack_from(page) == (1, 1)
    driver.synchronize(other)
    driver.record(other, 0)
    driver.wait(event, 0)
    driver.drop_event(event)
    driver.drop_event(other)
    driver.drop_event(other)


def test_an_unknown_driver_says_so():
    with pytest.raises(Unsupported, match="rocm"):
        driver_named("rocm")


# -- the cache


def record(number: int, *, kind: MemoryKind = MemoryKind.VRAM, **changes: Any) -> RegionInfo:
    values: dict[str, Any] = {"access": Access.NONE, "writable": True, "pool": ""} | changes
    source = RegionSource.POOL if values["pool"] else RegionSource.DEVICE
    access, writable, pool = values["access"], values["writable"], values["pool"]
    return RegionInfo(RegionId(number), "node-a", 7, kind, source, 0, 4096, "me", access, writable, pool=pool)


def want(buffer: SimulatedBuffer, access: Access = Access.NONE, writable: bool | None = None, label: str = "") -> Any:
    return device_regions.wanted(buffer, access, label, writable)


def test_the_same_memory_is_the_same_region_until_the_last_is_freed():
    book, buffer = DeviceBook(), SimulatedBuffer(8192)
    first = want(buffer[:4096])
    assert book.again(first.key) is None
    book.add(first, record(5))
    again = book.again(want(buffer[0:4096]).key)
    assert again is not None
    assert again.id == 5
    for different in (
        want(buffer[:4095]),
        want(buffer[1:4096]),
        want(buffer[:4096], Access.READ),
        want(buffer[:4096], writable=False),
        want(buffer[:4096], label="x"),
        want(SimulatedBuffer(8192)[:4096]),
    ):
        assert book.again(different.key) is None
    with book.freeing([RegionId(5)]) as last:
        assert last == []
    with book.freeing([RegionId(5), RegionId(9)]) as last:
        assert sorted(last) == [5, 9], "what is not of a GPU is freed as it is asked for"
    assert book.again(first.key) is None


def test_two_of_one_region_can_be_freed_at_once():
    book, buffer = DeviceBook(), SimulatedBuffer(4096)
    book.add(want(buffer), record(5))
    assert book.again(want(buffer).key) is not None
    with book.freeing([RegionId(5), RegionId(5)]) as last:
        assert last == [5]


def test_memory_that_two_threads_registered_at_once_is_found_until_the_first_region_is_freed():
    book, buffer = DeviceBook(), SimulatedBuffer(4096)
    for number in (5, 6):
        book.add(want(buffer), record(number))
    with book.freeing([RegionId(6)]) as last:
        assert last == [6]
    again = book.again(want(buffer).key)
    assert again is not None
    assert again.id == 5


def test_what_could_not_be_freed_is_registered_still():
    book, buffer = DeviceBook(), SimulatedBuffer(4096)
    book.add(want(buffer), record(5))

    def refused() -> None:
        with book.freeing([RegionId(5)]) as last:
            assert last == [5]
            assert book.again(want(buffer).key) is None, "while it is being freed, nobody gets it"
            raise Busy("a transfer moves bytes of it")

    with pytest.raises(Busy):
        refused()
    assert book.again(want(buffer).key) is not None
    with book.freeing([RegionId(5)]) as last:
        assert last == []


def test_registered_memory_lives_until_it_is_freed_or_the_session_ends(open_fds):
    before = open_fds()
    book = DeviceBook()

    def freed() -> None:
        with book.freeing([RegionId(5)]) as last:
            assert last == [5]

    for end in (freed, book.clear):
        book.add(want(SimulatedBuffer(4096)), record(5))
        assert open_fds() != before
        end()
        assert open_fds() == before


def test_memory_of_a_freed_address_is_other_memory():
    keys = set()
    for _ in range(3):
        buffer = SimulatedBuffer(4096)
        keys.add(want(buffer).key.buffer_id)
        del buffer
        gc.collect()
    assert len(keys) == 3


def test_a_pool_is_mapped_once_and_stays_while_the_client_is_attached():
    theirs = SimulatedBuffer(1 << 16)
    theirs.array[:] = np.arange(1 << 16, dtype=np.uint64).astype(np.uint8)
    book = DeviceBook()
    handle = theirs.export().handle
    mapped = len(driver_named("simulated")._opened)  # type: ignore[attr-defined]

    def array(offset: int, **changes: Any) -> Any:
        at = DeviceHandle(theirs.allocation.device_uuid, handle, 1 << 16, offset, "simulated")
        return book.array(record(6, pool="gpu", **changes), at, element_shape(4096, np.uint8, None), "me")

    first, second = np.asarray(array(4096)), np.asarray(array(12288))
    assert second.ctypes.data - first.ctypes.data == 8192
    first[7] = 99
    assert theirs.array[4096 + 7] == 99
    assert second.tobytes() == theirs.array[12288:16384].tobytes()
    assert not np.asarray(array(0, writable=False)).flags.writeable
    [mapping] = book._pools.values()
    alive = weakref.ref(mapping)
    del mapping, first
    book.clear()
    gc.collect()
    opened = driver_named("simulated")._opened  # type: ignore[attr-defined]
    assert alive() is not None, "a consumer has it"
    assert len(opened) == mapped + 1
    del second
    gc.collect()
    assert alive() is None
    assert len(opened) == mapped, "and it is unmapped"


def test_a_pool_that_was_made_anew_is_mapped_anew():
    book, elements = DeviceBook(), element_shape(16, np.uint8, None)
    mapped = []
    for _ in range(2):
        theirs = SimulatedBuffer(4096)
        at = DeviceHandle(theirs.allocation.device_uuid, theirs.export().handle, 4096, 0, "simulated")
        mapped.append((theirs, np.asarray(book.array(record(6, pool="gpu"), at, elements, "me"))))
    mapped[0][0].array[0], mapped[1][0].array[0] = 1, 2
    assert [array[0] for _, array in mapped] == [1, 2]


def test_own_memory_is_given_as_it_is():
    book, buffer = DeviceBook(), SimulatedBuffer(4096)
    book.add(want(buffer[256:]), record(5))
    ours = book.own_array(RegionId(5), element_shape(3840, np.uint8, 16))
    assert ours is not None
    np.asarray(ours)[:] = 3
    assert buffer.array[256:272].tolist() == [3] * 16
    assert book.own_array(RegionId(6), element_shape(16, np.uint8, 16)) is None


def test_only_gpu_memory_of_this_node_is_given():
    with pytest.raises(Unsupported, match="no GPU memory"):
        device_regions.check_exportable(record(5, kind=MemoryKind.DRAM), "node-a")
    with pytest.raises(Unsupported, match="no GPU memory"):
        device_regions.check_exportable(record(5), "node-b")


# -- events


def gpu(index: int, uuid: bytes, reason: str = "") -> DeviceInfo:
    return DeviceInfo(index, uuid, "", "simulated", reason, 0, 0, 0, 0, 0, 0, 0.0, 0.0)


def test_an_event_is_made_on_the_device_in_use_or_on_the_one_that_is_named():
    devices = [gpu(4, simulated.device_uuid(1)), gpu(5, simulated.device_uuid(0)), gpu(6, b"", "broken")]
    assert device_regions.wanted_event(devices, None, None).device == 5
    wanted = device_regions.wanted_event(devices, None, 4)
    assert wanted.device == 4
    assert wanted.handle[:4] == simulated.EVENT_MAGIC
    with pytest.raises(NotFound, match="device 9"):
        device_regions.wanted_event(devices, None, 9)
    for none in ([], [gpu(7, simulated.device_uuid(0), "no longer there")]):
        with pytest.raises(NotFound, match="this thread"):
            device_regions.wanted_event(none, None, None)


def test_events_of_other_libraries_are_known_by_what_they_have():
    class Torch:
        def ipc_handle(self) -> bytes:
            return b"h" * 64

    class Cupy:
        ptr = 77

    assert handle_of(Torch()) == (b"h" * 64, 0)
    assert handle_of(Cupy()) == (b"", 77)
    assert handle_of(b"x" * 64) == (b"x" * 64, 0)
    assert handle_of(12) == (b"", 12)
    for rubbish in (0, "event", None):
        with pytest.raises(InvalidArgument, match="is no event"):
            handle_of(rubbish)


def test_an_event_of_another_library_is_recorded_by_it():
    wanted = device_regions.wanted_event([gpu(0, simulated.device_uuid(0))], b"x" * 64, 0)
    event = wanted.opened(DeviceEvent(3))
    assert event.number == 3
    with pytest.raises(Unsupported, match="another library"):
        event.record()


def test_a_driver_that_is_not_there_says_what_to_do():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(Unsupported, match="driver cannot be loaded"):
            device_regions.wanted(Interface(shape=(4,)), Access.NONE, "", None)
    else:
        pytest.skip("there is a driver")
