"""Sums of blocks by xxh3, in C where that is possible: while bytes are copied, or from memory.

``_xxh3.c`` sums what is longer than 1 KiB and comes in parts or is copied meanwhile; all else is left to libxxhash. The
extension module of the package ``xxhash`` carries that, and exports it on most platforms, which nobody promises; where
it does not, the system's library is looked for. Both together must give the sums that the package gives. Without any of
it, sums are made by calls of the package, after the bytes have moved.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from xferd.plugins.base import BlockSums
from xferd.plugins.posix import native
from xferd.plugins.posix.native import Summing
from xferd.plugins.vectored import iov_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable
    from xferd.plugins.posix.native import Native

_NAMES = "XXH3_64bits_dispatch", "XXH3_64bits"
"""The one that chooses by the processor at run time comes first: the plain one is compiled for the oldest."""

_SYSTEM_LIBRARY = "libxxhash.so.0"

_PROBES = 1, 17, 240, 241, 1024, 1025, 1100, 5000
"""Sizes that go different ways through xxh3."""


@dataclass(frozen=True, slots=True)
class Summer:
    """What sums in C; ``whole`` is the address of a function of a library, which is kept loaded for good."""

    compiled: Native
    whole: int

    def wish(self, sums: BlockSums) -> Summing:
        """Return what C fills ``sums.values`` by; both must outlive its use."""
        return Summing(
            self.whole,
            sums.begin.ctypes.data,
            sums.stop.ctypes.data,
            len(sums.begin),
            sums.values.ctypes.data,
        )

    def write(self, fd: int, spans: IovTable, memory: IovTable, sums: BlockSums, stop: ctypes.c_int) -> bool:
        """Write memory rows of this process to spans of a file of the same total, summing blocks just before.

        False where calls have to write all of it again: they can tell why. ``stop`` may be set meanwhile.
        """
        spans, memory = np.ascontiguousarray(spans), np.ascontiguousarray(memory)
        tables = spans.ctypes.data, len(spans), memory.ctypes.data
        if self.compiled.write_summing(fd, *tables, ctypes.byref(self.wish(sums)), ctypes.byref(stop)):
            return False
        sums.is_known[:] = True
        return True

    def sum_memory(self, sums: BlockSums, memory: IovTable) -> None:
        """Sum blocks of what lies in memory rows of this process, which stay in place meanwhile."""
        rows = np.ascontiguousarray(memory)
        self.compiled.sum_pieces(ctypes.byref(self.wish(sums)), rows.ctypes.data)


def sum_memory(sums: BlockSums, memory: IovTable, summer: Summer | None) -> None:
    """Make the sums that are missing, from memory rows of this process that stay in place meanwhile. For threads.

    Without a ``summer`` it takes a loop of the interpreter, which for small blocks costs as much as the sums.
    """
    missing = ~sums.is_known
    rest = BlockSums.of(sums.begin[missing], sums.stop[missing])
    if summer is not None:
        summer.sum_memory(rest, memory)
    else:
        rest.values[:] = _sums_by_calls(rest.begin, rest.stop, memory)
    sums.values[missing] = rest.values
    sums.is_known[:] = True


@functools.cache
def load() -> Summer | None:
    """Return what sums in C, or None where something for it is not here."""
    compiled = native.load()
    if compiled is None:
        return None
    spec = find_spec("xxhash._xxhash")
    for name in (spec.origin if spec else None, _SYSTEM_LIBRARY):
        if name is None:
            continue
        try:
            whole = _whole(ctypes.CDLL(name))
        except (OSError, AttributeError):  # no such library, or without these functions
            continue
        found = Summer(compiled, whole)
        if _is_right(found):
            return found
    return None


def _whole(library: ctypes.CDLL) -> int:
    """Return the address of ``XXH3_64bits``, or raise AttributeError."""
    name = next((name for name in _NAMES if hasattr(library, name)), _NAMES[-1])
    return ctypes.cast(library[name], ctypes.c_void_p).value or 0


def _is_right(summer: Summer) -> bool:
    """Compare with the package: each size in one row, and in two."""
    for size in _PROBES:
        data = np.arange(size, dtype=np.uint64).view(np.uint8)[:size].copy()
        wanted = xxhash.xxh3_64_intdigest(data.tobytes())
        for cut in (size, size // 2):
            rows = np.concatenate([iov_of(part.data) for part in (data[:cut], data[cut:]) if len(part)])
            sums = BlockSums.of(np.zeros(1, np.int64), np.array([size], np.int64))
            summer.sum_memory(sums, rows)
            if int(sums.values[0]) != wanted:
                return False
    return True


def _sums_by_calls(begins: NDArray[np.int64], ends: NDArray[np.int64], memory: IovTable) -> list[int]:
    address = memory[:, 0].astype(np.int64)
    end = np.cumsum(memory[:, 1].astype(np.int64))
    start = end - memory[:, 1].astype(np.int64)
    low = int(address.min())
    span = int((address + (end - start)).max()) - low
    # One view over all of it, of which only the rows are ever touched: making one for each would cost more.
    view = memoryview((ctypes.c_char * span).from_address(low)).cast("B")
    first = np.searchsorted(end, begins, side="right").tolist()
    last = np.searchsorted(end, ends, side="left").tolist()
    sums = []
    for begin, stop, i, j in zip(begins.tolist(), ends.tolist(), first, last, strict=True):
        state = xxhash.xxh3_64()
        for row in range(i, j + 1):
            here, there = max(begin, int(start[row])), min(stop, int(end[row]))
            at = int(address[row]) - low + here - int(start[row])
            state.update(view[at : at + there - here])
        sums.append(int(state.intdigest()))
    return sums
