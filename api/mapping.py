"""Shared memory as a numpy array, at an address that 2 MiB pages can back. For clients and the daemon alike.

The kernel puts mappings of memory files anywhere on 4 KiB, and a huge page can only be mapped where address and offset
agree modulo 2 MiB. So a span of address space is reserved first, and the file is mapped at the right place in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HUGE_PAGE_NBYTES = 2 << 20
"""Size of the smaller huge page, on x86-64 and on arm64 with 4 KiB pages."""

_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value

_mmap = ctypes.CDLL(None, use_errno=True).mmap64
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p


class _Span:
    """A mapping that lives as long as an array over it: numpy keeps it by the array interface."""

    def __init__(self, reserved: mmap.mmap, address: int, nbytes: int, *, writable: bool) -> None:
        self._reserved = reserved  # unmaps all of it when it goes
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, not writable),
        }


def map_shared(fd: int, nbytes: int, *, writable: bool = True) -> NDArray[np.uint8]:
    """Map the first ``nbytes`` bytes of a file, or anonymous memory for fd -1, shared.

    The mapping lives as long as the array or a view of it; the fd is not needed any more. An array of a mapping that
    is not writable is read-only.

    Raises:
        OSError: as mmap(2).
    """
    page = (
        mmap.PAGESIZE if fd < 0 else max(mmap.PAGESIZE, os.fstat(fd).st_blksize)
    )  # a huge page where the file has such
    step = max(page, HUGE_PAGE_NBYTES) if nbytes >= HUGE_PAGE_NBYTES else page
    # Private and read-only, so that it counts towards no limit on memory; only on that of address space.
    reserved = mmap.mmap(-1, -(-nbytes // step) * step + step, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    start = np.frombuffer(reserved, dtype=np.uint8).ctypes.data
    address = -(-start // step) * step
    flags = mmap.MAP_SHARED | _MAP_FIXED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if _mmap(address, nbytes, prot, flags, fd, 0) == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return np.asarray(_Span(reserved, address, nbytes, writable=writable))
