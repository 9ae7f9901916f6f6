"""Copies between mappings of this process: which way for which shape.

Where ``_pieces.c`` was compiled, its loop is taken for all: no page lookups, no equal blocks needed, no interpreter.
What follows is about the ways without it.

Measured on two cores of AMD EPYC with one thread, blocks at random places of 256 MiB, median GB/s of 31 visits in turn,
on a busy machine. "Huge" are pools whose pages were collapsed into 2 MiB ones. The ways: ``process_vm_readv`` on
oneself, and numpy (``blocks.py``) from blocks to blocks, from a span to blocks, from blocks to a span.

| blocks        | process_vm | numpy | huge: process_vm | huge: numpy | span to blocks, huge | blocks to span, huge |
|---------------|-----------:|------:|-----------------:|------------:|---------------------:|---------------------:|
| 512 B x 8192  |        0.5 |   1.8 |              0.4 |         2.5 |           1.9 to 2.8 |           0.6 to 4.2 |
| 4 KiB x 1024  |        2.9 |   3.1 |              3.7 |         4.2 |           6.9 to 8.4 |           3.7 to 7.5 |
| 8 KiB x 1024  |        3.8 |   4.2 |              4.5 |         4.8 |           8.1 to 9.6 |           5.0 to 8.6 |
| 16 KiB x 512  |        4.8 |   5.0 |              6.1 |         5.3 |          9.0 to 10.6 |           5.5 to 8.1 |
| 64 KiB x 128  |        6.9 |   6.1 |             10.1 |         6.5 |         12.3 to 13.9 |          9.6 to 12.5 |

In the last two columns the first figure is process_vm and the second numpy. ``memcpy`` of 256 MiB made 13 in that run.

Few large pieces go by ``memmove``: 14 GB/s for one of 256 MiB where process_vm makes 9.7, a tenth to a quarter more for
pieces of 8 MiB. Many pieces do not: each call takes the interpreter lock again, which beside a busy thread cost 255 ms
for 128 pieces, where one vectored call took 7.

Tried and left: ``io_submit`` of reads on the memory file, as fast as process_vm, and it needs the file; a loop over
memoryviews, which keeps the interpreter lock; ``memmove`` a block through ctypes, for the reason above.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from xferd.api.descriptors import pair
from xferd.plugins.local.blocks import BlockCopier
from xferd.plugins.vectored import copy_local, total_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import IovTable
    from xferd.plugins.local.native import CopyPieces

MEMMOVE_MAX_PIECES = 4
MEMMOVE_MIN_NBYTES = 4 << 20
"""When ``memmove`` is taken: at most so many pieces, of at least so many bytes on average."""

_memmove = ctypes.CDLL(None).memmove  # through CDLL, unlike ctypes.memmove, for sure without the interpreter lock
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = ctypes.c_void_p


class MappedCopier:
    """Copies between mappings that are sure to stay whole. Thread-safe.

    Whole means: a memory file that backs a mapping must be sealed against shrinking, or the process is killed.

    Args:
        native: as ``native.load`` returns it; None takes the ways that need no compiler.
    """

    def __init__(self, native: CopyPieces | None = None) -> None:
        self._native = native
        self._blocks = BlockCopier()

    @property
    def is_native(self) -> bool:
        """Whether it has the loop of C, to which all shapes are alike."""
        return self._native is not None

    def made(self, source: IovTable, target: IovTable) -> Callable[[], int]:
        """Return a call that copies between tables of the same total; what it returns is the bytes copied, all of them.

        It may be called again and again; the tables must not change meanwhile.
        """
        return functools.partial(self.copy, source, target) if self._native is None else self._native(source, target)

    def copy(self, source: IovTable, target: IovTable) -> int:
        """Copy between tables of the same total; returns the bytes copied, all of them."""
        if self._native is not None:
            return self._native(source, target)()
        rows = len(source) + len(target) - 1
        nbytes = total_nbytes(source)
        if rows <= MEMMOVE_MAX_PIECES and nbytes >= rows * MEMMOVE_MIN_NBYTES:
            return _copy_pieces(source, target)
        return self._blocks.copy(source, target) or copy_local(source, target)


def _copy_pieces(source: IovTable, target: IovTable) -> int:
    cuts = pair(source[:, 1], target[:, 1])
    starts = source[cuts.left, 0] + cuts.left_skip
    places = target[cuts.right, 0] + cuts.right_skip
    for place, start, size in zip(places.tolist(), starts.tolist(), cuts.nbytes.tolist(), strict=True):
        _memmove(place, start, size)
    return int(cuts.nbytes.sum())
