"""The one function of ``_pieces.c``, where it was compiled when xferd was built."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from xferd.plugins.vectored import total_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import IovTable

PAST_CACHE_NBYTES = 1 << 20
"""Bytes of a call from which on the target is not brought into the cache: what one core's second-level cache holds."""


CopyPieces: TypeAlias = "Callable[[IovTable, IovTable], Callable[[], int]]"
"""Makes a call that copies (source, target), tables of the same total, which must not change as long as it is used."""


def load() -> CopyPieces | None:
    """Return what makes copies by the loop of C, without the interpreter lock; None where there is none.

    What it makes returns the bytes copied, all of them. Both sides must be mapped and stay whole.
    """
    spec = find_spec("xferd.plugins.local._pieces")  # not imported: it is a library of C, not a module
    if spec is None or spec.origin is None:
        return None
    function = ctypes.CDLL(spec.origin).xferd_copy_pieces
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = None

    def made(source: IovTable, target: IovTable) -> Callable[[], int]:
        nbytes, rows = total_nbytes(source), len(source)
        past_cache = int(nbytes >= PAST_CACHE_NBYTES)
        # An address is looked up once: numpy takes a microsecond for it.
        start, place = source.ctypes.data, target.ctypes.data

        def copy(_tables: tuple[IovTable, IovTable] = (source, target)) -> int:  # which it keeps alive
            function(place, start, rows, past_cache)
            return nbytes

        return copy

    return made
