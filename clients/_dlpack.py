"""DLPack by ctypes: reading a capsule of any library without importing it, and making capsules of memory of ours.

The layout is that of dlpack.h, 0.x ("dltensor") and 1.x ("dltensor_versioned"). A capsule that is read is not consumed:
whoever made it takes its memory back when the capsule goes, so it is kept as long as the memory is used.
"""

from __future__ import annotations

import ctypes as c
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xferd.api.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
CUDA_MANAGED: Final = 13

_OLD_NAME, _NAME = b"dltensor", b"dltensor_versioned"
_VERSION = (1, 0)
_READ_ONLY = 1
_BFLOAT = 4
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}

BFLOAT16: Final = "bfloat16"
"""As a dtype: numpy has none of it, DLPack does."""


class _Tensor(c.Structure):
    _fields_ = (
        ("data", c.c_void_p),
        ("device_type", c.c_int),
        ("device_id", c.c_int),
        ("ndim", c.c_int),
        ("code", c.c_uint8),
        ("bits", c.c_uint8),
        ("lanes", c.c_uint16),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    )


class _Managed(c.Structure):
    _fields_ = (("tensor", _Tensor), ("context", c.c_void_p), ("deleter", c.c_void_p))


class _ManagedVersioned(c.Structure):
    _fields_ = (
        ("major", c.c_uint32),
        ("minor", c.c_uint32),
        ("context", c.c_void_p),
        ("deleter", c.c_void_p),
        ("flags", c.c_uint64),
        ("tensor", _Tensor),
    )


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of Python's C API; made anew, because its types are set on the function itself."""
    return c.PYFUNCTYPE(result, *arguments)((name, c.pythonapi))


_capsule_name = _python("PyCapsule_GetName", c.c_char_p, c.py_object)
_capsule_pointer = _python("PyCapsule_GetPointer", c.c_void_p, c.py_object, c.c_char_p)
_new_capsule = _python("PyCapsule_New", c.py_object, c.c_void_p, c.c_char_p, c.c_void_p)
# In a capsule's destructor its count is 0 already, so it must not become a Python object again.
_dying_is_valid = _python("PyCapsule_IsValid", c.c_int, c.c_void_p, c.c_char_p)
_dying_pointer = _python("PyCapsule_GetPointer", c.c_void_p, c.c_void_p, c.c_char_p)
_incref = _python("Py_IncRef", None, c.py_object)
_decref = _python("Py_DecRef", None, c.c_void_p)


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Capsule:
    """What a capsule says. The address counts the byte offset in; ``strides`` are in elements, None: C-contiguous."""

    address: int
    device_type: int
    device_id: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    element_nbits: int
    is_read_only: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.element_nbits // 8

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie as C orders them, without gaps."""
        return self.strides is None or is_c_contiguous(self.shape, self.strides)


def is_c_contiguous(shape: Sequence[int], strides: Sequence[int], step: int = 1) -> bool:
    """Say whether strides are those of C, in units of ``step``; what has one element, or none, lies right anyhow."""
    if not math.prod(shape):
        return True
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def capsule_of(array: Any) -> Any:
    """Ask an array for a capsule, of version 1 where it can, and without making it wait for its stream."""
    on_device = array.__dlpack_device__()[0] != CPU
    stream = {"stream": -1} if on_device else {}  # -1: nobody waits; order between streams is for events
    try:
        return array.__dlpack__(**stream, max_version=_VERSION)
    except TypeError:  # from before version 1
        return array.__dlpack__(**stream)


def read(capsule: Any) -> Capsule:
    """Read a capsule, which stays as it is.

    Raises:
        InvalidArgument: it is none, or was consumed, or is of a version to come.
    """
    try:
        name = _capsule_name(capsule)
    except ValueError as exc:
        raise InvalidArgument(f"{type(capsule).__name__} is no DLPack capsule") from exc
    is_read_only = False
    if name == _NAME:
        managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, _NAME))
        if managed.major != _VERSION[0]:
            raise InvalidArgument(f"a DLPack capsule of version {managed.major}.{managed.minor}", limit="version 1")
        is_read_only = bool(managed.flags & _READ_ONLY)
        tensor = managed.tensor
    elif name == _OLD_NAME:
        tensor = _Managed.from_address(_capsule_pointer(capsule, _OLD_NAME)).tensor
    else:
        raise InvalidArgument(f"a capsule named {name!r}", limit="dltensor, dltensor_versioned, not used before")
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    return Capsule(
        address=(tensor.data or 0) + tensor.byte_offset,
        device_type=tensor.device_type,
        device_id=tensor.device_id,
        shape=shape,
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.ndim and tensor.strides else None,
        element_nbits=tensor.bits * tensor.lanes,
        is_read_only=is_read_only,
    )


# --------------------------------------------------------------------------------------- making


class _Held:
    """A capsule's structure and what it keeps alive; lives by a count of its own until the deleter is called."""

    def __init__(self, keep: object, shape: tuple[int, ...]) -> None:
        self.keep = keep
        lengths = (c.c_int64 * len(shape))(*shape)
        steps = (c.c_int64 * len(shape))(*(math.prod(shape[i + 1 :]) for i in range(len(shape))))
        self.shape, self.strides = lengths, steps
        self.managed: _Managed | _ManagedVersioned | None = None


def _drop_old(pointer: int) -> None:
    _decref(_Managed.from_address(pointer).context)


def _drop(pointer: int) -> None:
    _decref(_ManagedVersioned.from_address(pointer).context)


def _drop_unused(capsule: int) -> None:
    """Take memory back of a capsule that nobody consumed; a consumer renames it."""
    if _dying_is_valid(capsule, _NAME):
        _drop(_dying_pointer(capsule, _NAME))
    elif _dying_is_valid(capsule, _OLD_NAME):
        _drop_old(_dying_pointer(capsule, _OLD_NAME))


# C holds these, so they live as long as the process.
_CALLED_WITH_POINTER = c.CFUNCTYPE(None, c.c_void_p)
_delete_old, _delete = _CALLED_WITH_POINTER(_drop_old), _CALLED_WITH_POINTER(_drop)
_capsule_dies = _CALLED_WITH_POINTER(_drop_unused)


def make(
    address: int,
    device: tuple[int, int],
    dtype: np.dtype[Any] | str,
    shape: tuple[int, ...],
    keep: object,
    *,
    is_read_only: bool,
    max_version: tuple[int, int] | None,
) -> Any:
    """Return a capsule; ``keep`` lives until the capsule's consumer has let go, or the capsule went unused.

    Raises:
        BufferError: the memory is read-only, which a consumer from before version 1 cannot be told.
    """
    held = _Held(keep, shape)
    is_versioned = max_version is not None and max_version[0] >= _VERSION[0]
    managed = _ManagedVersioned() if is_versioned else _Managed()
    held.managed = managed
    if isinstance(managed, _ManagedVersioned):
        managed.major, managed.minor = _VERSION
        managed.flags = _READ_ONLY if is_read_only else 0
    elif is_read_only:
        raise BufferError("this memory may not be written, which DLPack before version 1 cannot say")
    tensor = managed.tensor
    tensor.data, (tensor.device_type, tensor.device_id), tensor.ndim = address, device, len(shape)
    tensor.code, tensor.bits = _kind(dtype)
    tensor.lanes = 1
    tensor.shape = c.cast(held.shape, c.POINTER(c.c_int64))
    tensor.strides = c.cast(held.strides, c.POINTER(c.c_int64))
    managed.deleter = c.cast(_delete if is_versioned else _delete_old, c.c_void_p).value
    managed.context = id(held)
    capsule = _new_capsule(
        c.addressof(managed), _NAME if is_versioned else _OLD_NAME, c.cast(_capsule_dies, c.c_void_p)
    )
    _incref(held)
    return capsule


def _kind(dtype: np.dtype[Any] | str) -> tuple[int, int]:
    """Return DLPack's (code, bits).

    Raises:
        BufferError: DLPack has no such type.
    """
    if isinstance(dtype, str):
        return _BFLOAT, 16
    if dtype.kind not in _CODES or dtype.byteorder == ">":
        raise BufferError(f"DLPack has no {dtype}")
    return _CODES[dtype.kind], dtype.itemsize * 8
