"""What rows of a slab touch and cover, looked up once for lists that come again.

A prepared transfer is posted again and again, and to look that up costs as much event loop as moving a chunk does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from xferd.daemon.storage.passing import WholeBlocks, covered, in_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from xferd.daemon.storage.touching import BlockSpan, ExtentIndex
    from xferd.plugins.base import Extent, IovTable


class Covered(NamedTuple):
    """Blocks that rows cover whole.

    Attributes:
        whole: the blocks, by extent.
        order: which of them, taken together, come one after the other in the rows' bytes.
        begin: i64 (n,) where each begins in the rows' bytes, ascending.
        end: i64 (n,) where it ends.
    """

    whole: tuple[WholeBlocks, ...]
    order: NDArray[np.intp]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


class Part(NamedTuple):
    """Those of the covered blocks that lie in a part of the rows' bytes, and where they begin and end in it."""

    blocks: slice
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


class Footprint:
    """What rows of one slab touch (``spans``), and what they cover."""

    def __init__(self, file: IovTable, spans: Sequence[BlockSpan]) -> None:
        self.spans = tuple(spans)
        self._file = file
        self._parts: dict[tuple[int, int], Part | None] = {}

    @functools.cached_property
    def covered(self) -> Covered:
        """The blocks that they cover; worked out when it is first wanted, which for most writes is never."""
        whole = covered(self.spans, self._file).whole
        return Covered(whole, *in_order(whole))

    def part(self, start: int, stop: int) -> Part | None:
        """Return the covered blocks within a part of the rows' bytes; None where there are none."""
        if (start, stop) not in self._parts:
            _, _, begin, end = self.covered
            first = int(begin.searchsorted(start))
            last = int(end.searchsorted(stop, side="right"))
            blocks = slice(first, last)
            found = Part(blocks, begin[blocks] - start, end[blocks] - start)
            self._parts[start, stop] = found if first < last else None
        return self._parts[start, stop]


class Footprints:
    """Those of lists that somebody still holds, by the list. Used on the event loop."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Extent, tuple[ExtentIndex, int, Footprint]] = WeakKeyDictionary()

    def of(self, file: Extent, index: ExtentIndex) -> Footprint:
        """Return what ``file`` touches in the slab that ``index`` is of, as its extents are now."""
        known = self._known.get(file)
        if known is not None and known[0] is index and known[1] == index.version:
            return known[2]
        found = Footprint(file.iov, index.touched(file.iov))
        self._known[file] = index, index.version, found
        return found
