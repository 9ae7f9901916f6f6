"""The functions of ``_native.c``, where it was compiled when xferd was built."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Queue(ctypes.Structure):
    """``struct queue``: an io_uring as it is mapped."""

    _fields_ = (
        ("fd", ctypes.c_int),
        ("depth", ctypes.c_uint),
        ("entries", ctypes.c_uint),
        ("completions", ctypes.c_uint),
        ("sq_tail", ctypes.c_void_p),
        ("requests", ctypes.c_void_p),
        ("cq_head", ctypes.c_void_p),
        ("cq_tail", ctypes.c_void_p),
        ("completed", ctypes.c_void_p),
    )


class Summing(ctypes.Structure):
    """``struct summing``: which blocks of a stream of bytes are summed, and by what."""

    _fields_ = (
        ("whole", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("sums", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Native:
    """What was compiled. All release the interpreter lock.

    Attributes:
        guard: take SIGBUS over for the process; 0, or -1. Not thread-safe, again is fine.
        read_mapped: see ``xferd_read_mapped``.
        sum_pieces: see ``xferd_sum_pieces``: a ``Summing``, rows of memory; 0.
        write_summing: see ``xferd_write_summing``: a ``Summing``; 0, or -1 where calls have to write all of it again.
        run_ring: see ``xferd_run_ring``: queue, requests, their number, results, batch, stop, under way.
    """

    guard: Callable[[], int]
    read_mapped: Callable[..., int]
    sum_pieces: Callable[..., int]
    write_summing: Callable[..., int]
    run_ring: Callable[..., int]


@functools.cache
def load() -> Native | None:
    """Return what was compiled, or None."""
    spec = find_spec("xferd.plugins.posix._native")  # not imported: it is a library of C, not a module
    return None if spec is None or spec.origin is None else load_from(spec.origin)


def load_from(path: str) -> Native:
    """Return what was compiled to a library elsewhere."""
    library = ctypes.CDLL(path, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.xferd_guard.argtypes = []
    position = ctypes.c_uint64
    library.xferd_read_mapped.argtypes = [ctypes.c_int, position, pointer, size, position, size, pointer, pointer]
    library.xferd_read_mapped.argtypes += [ctypes.c_int, ctypes.POINTER(Summing)]
    library.xferd_sum_pieces.argtypes = [ctypes.POINTER(Summing), pointer]
    library.xferd_write_summing.argtypes = [ctypes.c_int, pointer, size, pointer, ctypes.POINTER(Summing), pointer]
    library.xferd_run_ring.argtypes = [pointer, pointer, size, pointer, ctypes.c_uint, pointer, pointer]
    functions = ("guard", "read_mapped", "sum_pieces", "write_summing", "run_ring")
    found = [getattr(library, f"xferd_{name}") for name in functions]
    for function in found:
        function.restype = ctypes.c_int
    return Native(*found)
