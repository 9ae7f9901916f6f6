"""The one function of ``_pieces.c``, where it was compiled when xferd was built."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import TYPE_CHECKING

from xferd.plugins.vectored import total_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import IovTable

PAST_CACHE_NBYTES = 1 << 20
"""Bytes of a call from which on the target is not brought into the cache: what one core's second-level cache holds."""


def load() -> Callable[[IovTable, IovTable], int] | None:
    """Return a call that copies (source, target), tables of the same total, without the interpreter lock; or None.

    It returns the bytes copied, all of them. Both sides must be mapped and stay whole.
    """
    spec = find_spec("xferd.plugins.local._pieces")  # not imported: it is a library of C, not a module
    if spec is None or spec.origin is None:
        return None
    function = ctypes.CDLL(spec.origin).xferd_copy_pieces
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = None

    def copy(source: IovTable, target: IovTable) -> int:
        nbytes = total_nbytes(source)
        function(target.ctypes.data, source.ctypes.data, len(source), nbytes >= PAST_CACHE_NBYTES)
        return nbytes

    return copy
