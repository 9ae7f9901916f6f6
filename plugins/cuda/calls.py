"""CUDA's driver library, by ctypes: the calls that a worker makes, and what their errors mean here.

Not through cuda-bindings: its calls make an object for each argument, which costs more than the driver itself takes to
start a kernel; here arguments are made once and used again. Names and signatures are those of ``cuda.h``, in the
versions that every driver since CUDA 12 has.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from xferd.api.errors import DeviceLost, PoolExhausted, Unavailable, Unsupported, XferdError

LIBRARY: Final = "libcuda.so.1"
HANDLE_NBYTES: Final = 64

# CUresult
SUCCESS: Final = 0
OUT_OF_MEMORY: Final = 2
NO_DEVICE: Final = 100
NOT_READY: Final = 600

LOST: Final = frozenset(
    {
        4,  # DEINITIALIZED
        46,  # DEVICE_UNAVAILABLE
        214,  # ECC_UNCORRECTABLE
        220,  # NVLINK_UNCORRECTABLE
        226,  # CONTAINED
        700,  # ILLEGAL_ADDRESS
        702,  # LAUNCH_TIMEOUT
        709,  # CONTEXT_IS_DESTROYED
        710,  # ASSERT
        714,  # HARDWARE_STACK_ERROR
        715,  # ILLEGAL_INSTRUCTION
        716,  # MISALIGNED_ADDRESS
        717,  # INVALID_ADDRESS_SPACE
        718,  # INVALID_PC
        719,  # LAUNCH_FAILED
        721,  # TENSOR_MEMORY_LEAK
        806,  # MPS_RPC_FAILURE
        810,  # MPS_CLIENT_TERMINATED
        911,  # EXTERNAL_DEVICE
        999,  # UNKNOWN
    }
)
"""Errors after which every call fails in this process: the context is of no more use."""

# Device attributes
PROCESSORS: Final = 16
MAJOR: Final = 75
MINOR: Final = 76
HOST_POINTERS: Final = 91  # registered host memory has the same address on the device

# Flags
STREAM_NON_BLOCKING: Final = 1
EVENT_DISABLE_TIMING: Final = 2
EVENT_INTERPROCESS: Final = 4
REGISTER_PORTABLE: Final = 1
REGISTER_DEVICEMAP: Final = 2
REGISTER_READ_ONLY: Final = 8
IPC_LAZY_ENABLE_PEER_ACCESS: Final = 1
CONTEXT_BLOCKING_SYNC: Final = 4
HANDLE_IS_FD: Final = 1
LOCATION_DEVICE: Final = 1
ACCESS_READ_WRITE: Final = 3
ALLOCATION_PINNED: Final = 1


class Handle(ctypes.Structure):
    """``CUipcMemHandle`` and ``CUipcEventHandle``, which travel by value."""

    _fields_ = (("raw", ctypes.c_ubyte * HANDLE_NBYTES),)


class Uuid(ctypes.Structure):
    """``CUuuid``."""

    _fields_ = (("raw", ctypes.c_ubyte * 16),)


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Properties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Cuda:
    """The library. Calls return a ``CUresult`` as int; ``check`` raises what it means.

    Arguments are ctypes objects, or ints where C has an int.
    """

    def __init__(self, name: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(name)
        except OSError as exc:
            raise Unsupported(
                f"there is no NVIDIA driver: {exc}",
                remedy="install it, or leave [backends.cuda] out; driver = 'simulated' needs none",
            ) from exc

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        setattr(self, name, function)
        return function

    def call(
        self,
        name: str,
        *arguments: object,
        otherwise: type[XferdError] = Unavailable,
        about: str = "",
        remedy: str = "",
    ) -> None:
        """Call what is called rarely; see ``check``."""
        code = getattr(self, name)(*arguments)
        if code:
            self.check(code, about or name, otherwise, remedy)

    def check(self, code: int, about: str, otherwise: type[XferdError] = Unavailable, remedy: str = "") -> None:
        """Raise what a ``CUresult`` means, if it is an error.

        Raises:
            DeviceLost: the context is of no more use.
            PoolExhausted: out of memory.
            otherwise: anything else.
        """
        if code == SUCCESS:
            return
        message = f"{about}: {self.name_of(code)}"
        if code in LOST:
            raise DeviceLost(message, remedy="try again: another worker is started")
        if code == OUT_OF_MEMORY:
            raise PoolExhausted(message, remedy="use less GPU memory, here or in other processes")
        raise otherwise(message, remedy=remedy or "see the CUDA documentation of this error")

    def lock_host(self, address: int, nbytes: int, *, is_writable: bool = True) -> None:
        """Register host memory, for all contexts and at its own address.

        Raises:
            DeviceLost: the context is of no more use.
            Unavailable: the system does not let so much be locked; CUDA calls that out of memory.
        """
        flags = REGISTER_PORTABLE | REGISTER_DEVICEMAP | (0 if is_writable else REGISTER_READ_ONLY)
        about = f"locking {nbytes} bytes of host memory"
        try:
            self.call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags, about=about)
        except DeviceLost:
            raise
        except XferdError as error:
            raise Unavailable(
                error.message, remedy="raise LimitMEMLOCK of the unit, or use less host memory"
            ) from error

    def unlock_host(self, address: int) -> None:
        """Undo ``lock_host``."""
        self.call("cuMemHostUnregister", ctypes.c_void_p(address))

    def name_of(self, code: int) -> str:
        """Return CUDA's name for an error and what it says of it."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if getattr(self, function)(code, ctypes.byref(text)) == SUCCESS and text.value:
                texts.append(text.value.decode("utf-8", "replace"))
        return f"{texts[0]} ({code}): {texts[1]}" if len(texts) == 2 else f"CUDA error {code}"
