"""GPU memory as a client has it: what an array of any library spans, arrays of what the daemon hands out, and events.

torch, cupy and others are not imported: their arrays say by ``__cuda_array_interface__`` or DLPack where they are, and
take ours by the same. Registering and opening are in ``_device_regions.py``; the drivers are behind
``_device_driver.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xferd.api.errors import InvalidArgument, OutOfBounds, Unsupported
from xferd.clients import _dlpack as dlpack
from xferd.clients._device_driver import CUDA, SIMULATED
from xferd.clients._simulated_device import SimulatedBuffer, SimulatedStream

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from xferd.clients._device_driver import ClientDriver

__all__ = ["DeviceArray", "DeviceSpan", "Event", "SimulatedBuffer", "SimulatedStream", "device_span"]


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """Memory of a device, without gaps.

    Attributes:
        driver: "cuda" or "simulated".
        address: of the first byte, in this process.
        nbytes: size.
        writable: whether its owner lets it be written.
        owner: what keeps the memory alive.
    """

    driver: str
    address: int
    nbytes: int
    writable: bool
    owner: object


def device_span(array: Any) -> DeviceSpan:
    """Return where an array of a GPU lies: of torch, cupy or anything with ``__cuda_array_interface__`` or DLPack.

    Raises:
        InvalidArgument: it is no array of a GPU, has gaps or a mask, or is empty.
    """
    if isinstance(array, SimulatedBuffer):
        return DeviceSpan(SIMULATED, array.address, array.nbytes, True, array)
    source = array.detach() if getattr(array, "requires_grad", False) else array  # torch: gradients know nothing of us
    try:
        interface = source.__cuda_array_interface__
    except (AttributeError, TypeError, RuntimeError):  # none, or none for this dtype (torch's bfloat16 once)
        span = _span_by_dlpack(source)
    else:
        span = _span_by_interface(interface, source)
    if not span.nbytes:
        raise InvalidArgument("an array of no bytes", limit="at least 1 byte", remedy="give memory")
    return span


def _span_by_interface(interface: dict[str, Any], owner: object) -> DeviceSpan:
    if interface.get("mask") is not None:
        raise InvalidArgument("a masked array", limit="arrays without a mask", remedy="register data and mask apart")
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    itemsize = np.dtype(interface["typestr"]).itemsize
    if strides is not None and not dlpack.is_c_contiguous(shape, strides, itemsize):
        raise _gaps(shape, tuple(strides))
    address, is_read_only = interface["data"]
    return DeviceSpan(CUDA, address, math.prod(shape) * itemsize, not is_read_only, owner)


def _span_by_dlpack(array: Any) -> DeviceSpan:
    try:
        device_type = array.__dlpack_device__()[0]
    except AttributeError as exc:
        raise InvalidArgument(
            f"{type(array).__name__} is no array of a GPU",
            limit="arrays with __cuda_array_interface__ or DLPack",
            remedy="use register() for memory of the host",
        ) from exc
    if int(device_type) != dlpack.CUDA:
        where = {dlpack.CPU: "of the host", dlpack.CUDA_HOST: "pinned", dlpack.CUDA_MANAGED: "managed"}
        raise InvalidArgument(
            f"memory that is {where.get(int(device_type), f'of DLPack device type {int(device_type)}')}",
            limit="memory of cudaMalloc",
            remedy="use register() for memory of the host",
        )
    capsule = dlpack.capsule_of(array)
    found = dlpack.read(capsule)
    if not found.is_contiguous:
        raise _gaps(found.shape, found.strides)
    # The capsule as well: it may be of memory that was made for it alone.
    return DeviceSpan(CUDA, found.address, found.nbytes, not found.is_read_only, (array, capsule))


def _gaps(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> InvalidArgument:
    return InvalidArgument(
        f"an array of shape {shape} and strides {strides} is not contiguous",
        limit="C-contiguous arrays",
        remedy="register the whole array and name parts by offset, or make it contiguous",
    )


class DeviceArray:
    """Memory of a region on a device, for torch, cupy and others to take without a copy.

    Made by ``region.dlpack``. Whoever takes it keeps the memory mapped; that the region's bytes stay the region's is
    for the region's owner to see to.

    Attributes:
        address: of the first byte in this process.
        shape: in elements.
        dtype: a numpy dtype, or "bfloat16".
    """

    def __init__(
        self, address: int, device: tuple[int, int], elements: ElementShape, keep: object, *, is_read_only: bool
    ) -> None:
        """``device`` is DLPack's (device type, device id); ``keep`` lives as long as anybody uses the memory."""
        self.address = address
        self.dtype = elements.dtype
        self.shape = elements.shape
        self._device = device
        self._keep = keep
        self._is_read_only = is_read_only

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's (device type, device id)."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Return a capsule. ``stream`` is not made to wait: transfers that are DONE have written all they write.

        Raises:
            BufferError: another device, or a copy, is asked for; or what was allowed to be read only would be written.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("memory of a region is given as it lies, not as a copy")
        return dlpack.make(
            self.address,
            self._device,
            self.dtype,
            self.shape,
            self._keep,
            is_read_only=self._is_read_only,
            max_version=max_version,
        )

    def _interface(self) -> dict[str, object]:
        """Return what numpy's and CUDA's array interface have in common."""
        if isinstance(self.dtype, str):
            raise AttributeError(f"array interfaces have no {self.dtype}; take it by DLPack")
        data = (self.address, self._is_read_only)
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": None}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape} of {self.dtype} at {self.address:#x}>"


class CudaArray(DeviceArray):
    """Memory of a GPU, for ``torch.as_tensor``, ``cupy.asarray`` and all that know DLPack."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3."""
        return self._interface() | {"stream": None}


class SimulatedArray(DeviceArray):
    """Memory of a simulated GPU, which numpy can take."""

    @property
    def __array_interface__(self) -> dict[str, object]:
        """Version 3."""
        return self._interface()


@dataclass(frozen=True, slots=True)
class ElementShape:
    """What a user wants to see in a region's bytes: checked elements."""

    dtype: np.dtype[Any] | str
    shape: tuple[int, ...]


def element_shape(nbytes: int, dtype: DTypeLike, shape: int | tuple[int, ...] | None) -> ElementShape:
    """Return what ``dtype`` and ``shape`` ask for of ``nbytes``; None takes all whole elements.

    Raises:
        OutOfBounds: it is larger.
        InvalidArgument: a negative length.
    """
    is_bfloat = isinstance(dtype, str) and dtype == dlpack.BFLOAT16
    kind: np.dtype[Any] | str = dlpack.BFLOAT16 if is_bfloat else np.dtype(dtype)
    itemsize = 2 if isinstance(kind, str) else kind.itemsize
    if shape is None:
        return ElementShape(kind, (nbytes // itemsize,))
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(length < 0 for length in lengths):
        raise InvalidArgument(f"shape {lengths}", limit="lengths of at least 0", remedy="write every length out")
    if math.prod(lengths) * itemsize > nbytes:
        raise OutOfBounds(
            f"shape {lengths} of {kind} takes {math.prod(lengths) * itemsize} bytes",
            limit=f"{nbytes} bytes in the region",
            remedy="allocate more, or take a smaller shape",
        )
    return ElementShape(kind, lengths)


class Event:
    """An event of a GPU that the daemon knows too, to order transfers and work on streams.

    Give it as ``wait_event`` or ``done_event`` of transfers. An event tells of its last record only: one that was never
    recorded, or whose record is not made yet, holds nobody up.

    Attributes:
        number: the daemon's name for it, good until the session ends.
    """

    def __init__(self, number: int, driver: ClientDriver | None, event: int = 0, owner: object = None) -> None:
        """``driver`` None: the event is ``owner``'s, of another library, which records it."""
        self.number = number
        self._driver = driver
        self._event = event
        self._owner = owner

    def record(self, stream: object = 0) -> None:
        """Record it: transfers that are posted afterwards and wait for it wait for what is on the stream now.

        ``stream`` is a number, or a stream of torch, cupy or cuda-core.
        """
        self._known().record(self._event, stream)

    def wait(self, stream: object = 0) -> None:
        """Let what is put on a stream from now on wait for the event's last record."""
        self._known().wait(self._event, stream)

    def synchronize(self) -> None:
        """Wait for the event's last record."""
        self._known().synchronize(self._event)

    def drop(self) -> None:
        """Let go of this process's side of it; the daemon's goes with the session."""
        driver, self._driver = self._driver, None
        if driver is not None and self._event:
            driver.drop_event(self._event)

    def _known(self) -> ClientDriver:
        if self._driver is None:
            raise Unsupported(
                f"event {self.number} was opened by another library's event, or has been dropped",
                remedy="record and wait with that event itself",
            )
        return self._driver

    def __repr__(self) -> str:
        return f"<Event {self.number}>"


def handle_of(event: Any) -> tuple[bytes, int]:
    """Return the IPC handle of another library's event, or else its number: (handle, 0) or (b"", number).

    Raises:
        InvalidArgument: it is no event.
    """
    if isinstance(event, bytes):
        return event, 0
    if hasattr(event, "ipc_handle"):  # torch, for events made with interprocess=True
        return bytes(event.ipc_handle()), 0
    for name in ("ptr", "handle"):  # cupy; cuda-core
        if hasattr(event, name):
            return b"", int(getattr(event, name))
    if isinstance(event, int) and event:
        return b"", event
    raise InvalidArgument(
        f"{type(event).__name__} is no event", limit="torch, cupy and cuda-core events, handles of 64 bytes"
    )
