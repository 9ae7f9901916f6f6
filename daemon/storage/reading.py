"""Sums of the blocks that a leg reads, as its chunks bring them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.daemon.storage.passing import WholeBlocks
from xferd.plugins.base import BlockSums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xferd.daemon.storage.footprints import Footprint


class Arriving:
    """The sums of blocks that one post of a leg reads whole, as far as they have arrived."""

    def __init__(self, leg: Footprint) -> None:
        self._leg = leg
        count = len(leg.covered.begin)
        self._values = np.zeros(count, np.uint64)
        self._is_known = np.zeros(count, np.bool_)
        self._has_arrived = np.zeros(count, np.bool_)

    def chunk(self, start: int, stop: int) -> ArrivingChunk | None:
        """Return the blocks within a span of the leg's bytes; None where there are none.

        One that comes twice counts as it comes last.
        """
        part = self._leg.part(start, stop)
        if part is None:
            return None
        is_known = self._is_known[part.blocks]
        is_known[:] = False
        return ArrivingChunk(self, part.blocks, BlockSums(part.begin, part.end, self._values[part.blocks], is_known))

    def note(self, blocks: slice) -> None:
        """Be told that a chunk has arrived."""
        self._has_arrived[blocks] = True

    def by_extent(self) -> Iterator[tuple[WholeBlocks, NDArray[np.uint64]]]:
        """Yield the blocks that have arrived, with their sums."""
        values, has_arrived = np.empty_like(self._values), np.empty_like(self._has_arrived)
        whole, order, _, _ = self._leg.covered
        values[order], has_arrived[order] = self._values, self._has_arrived
        at = 0
        for extent, *columns in whole:
            part = slice(at, at + len(columns[0]))
            at = part.stop
            came = has_arrived[part]
            yield WholeBlocks(extent, *(column[came] for column in columns)), values[part][came]


@dataclass(frozen=True, slots=True)
class ArrivingChunk:
    """A chunk's share of ``Arriving``: which of its blocks; ``sums`` may be filled in by a backend."""

    leg: Arriving
    blocks: slice
    sums: BlockSums

    def note(self) -> None:
        """Be told that the chunk has arrived, and that all sums are known."""
        self.leg.note(self.blocks)
