"""Bytes that say where they belong and when they were written, and the check that reads them.

Each 8-byte word is ``(visit << 48 | source << 40 | position) * ODD``: the position is that of the word in its source
region, the source is whose region that is (several clients may write into one target), the visit is unique in a run.
The multiplier spreads them over all bits, and has an inverse, so that a wrong word tells what happened to it. No word
is ever 0, so 0 means that nothing arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xferd.api.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xferd.clients.memory import ByteArray

Words: TypeAlias = NDArray[np.uint64]
Rows: TypeAlias = NDArray[np.int64]

WORD_NBYTES = 8
_SOURCE_SHIFT, _VISIT_SHIFT = 40, 48
_MAX_SOURCES = 1 << (_VISIT_SHIFT - _SOURCE_SHIFT)
_MAX_VISITS = (1 << (64 - _VISIT_SHIFT)) - 1
_ODD = 0x9E37_79B9_7F4A_7C15
_INVERSE = pow(_ODD, -1, 1 << 64)
_PIECE_WORDS = 1 << 17  # 1 MiB: stays in a core's cache between making and comparing


@dataclass(frozen=True, slots=True)
class Fault:
    """The first wrong word found, and what is wrong with it: "missing", "misplaced", "stale", "stray", "corrupt"."""

    kind: str
    block: int
    word: int

    def __str__(self) -> str:
        return f"{self.kind} bytes at word {self.word} of target block {self.block}"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a target region was given: blocks ``source_rows`` of a source, into its own blocks ``rows``."""

    rows: Rows
    source_rows: Rows
    source: int = 0


class Blocks:
    """A region cut into blocks, seen as words.

    Raises:
        InvalidArgument: blocks that are no whole number of words.
    """

    def __init__(self, memory: ByteArray, block_nbytes: int) -> None:
        if block_nbytes <= 0 or block_nbytes % WORD_NBYTES:
            raise InvalidArgument(
                f"blocks of {block_nbytes} bytes", limit=f"multiples of {WORD_NBYTES}", remedy="choose another size"
            )
        self.count = len(memory) // block_nbytes
        self.block_words = block_nbytes // WORD_NBYTES
        self.words: Words = memory[: self.count * block_nbytes].view(np.uint64).reshape(self.count, -1)

    def stamp(self, rows: Rows, visit: int, source: int = 0) -> None:
        """Write this visit's pattern into blocks of the source region with this number."""
        for part, first, last in self._pieces(rows):
            self.words[part, first:last] = self._pattern(part, first, last, visit, source)

    def clear(self) -> None:
        """Fill the region with zeros, which no pattern has."""
        self.words[:] = 0

    def fault(self, rows: Rows, source_rows: Rows, visit: int) -> Fault | None:
        """Return what is wrong with a region that was cleared and then got ``source_rows`` into ``rows``, or None."""
        return self.fault_of([Arrival(rows, source_rows)], visit)

    def fault_of(self, arrivals: Sequence[Arrival], visit: int) -> Fault | None:
        """Return what is wrong with a region that was cleared and then got blocks of several sources, or None.

        Every byte of these rows is compared with the pattern itself and not with the source, which may be wrong too;
        and outside of them nothing may have been written.
        """
        for arrival in arrivals:
            if fault := self._wrong(arrival, visit):
                return fault
        if int(np.count_nonzero(self.words)) == sum(len(arrival.rows) for arrival in arrivals) * self.block_words:
            return None
        outside: NDArray[np.bool_] = np.asarray(self.words.any(axis=1))
        outside[np.concatenate([arrival.rows for arrival in arrivals])] = False
        block = int(np.argmax(outside))
        return Fault("stray", block, int(np.argmax(self.words[block] != 0)))

    def _wrong(self, arrival: Arrival, visit: int) -> Fault | None:
        pieces = zip(self._pieces(arrival.rows), self._pieces(arrival.source_rows), strict=True)
        for (part, first, last), (origin, _, _) in pieces:
            wrong = self.words[part, first:last] != self._pattern(origin, first, last, visit, arrival.source)
            if wrong.any():
                row, word = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
                block = int(part[row])
                return Fault(self._diagnose(int(self.words[block, first + word]), visit), block, int(first + word))
        return None

    def _diagnose(self, found: int, visit: int) -> str:
        if found == 0:
            return "missing"
        value = found * _INVERSE % (1 << 64)
        of_visit, position = value >> _VISIT_SHIFT, value & ((1 << _SOURCE_SHIFT) - 1)
        if of_visit == visit:
            return "misplaced" if position < self.words.size else "corrupt"
        return "stale" if 0 < of_visit < visit and position < self.words.size else "corrupt"

    def _pattern(self, rows: Rows, first: int, last: int, visit: int, source: int) -> Words:
        if not 0 < visit <= _MAX_VISITS:
            raise InvalidArgument(f"visit {visit}", limit=f"1 to {_MAX_VISITS}", remedy="start a new run")
        if not 0 <= source < _MAX_SOURCES:
            raise InvalidArgument(f"source {source}", limit=f"0 to {_MAX_SOURCES - 1}", remedy="use fewer clients")
        stamp = np.uint64(visit << _VISIT_SHIFT | source << _SOURCE_SHIFT)
        starts = rows.astype(np.uint64) * np.uint64(self.block_words) + stamp
        odd = np.uint64(_ODD)  # products wrap around, as they should
        made: Words = (starts * odd)[:, None] + (np.arange(first, last, dtype=np.uint64) * odd)[None, :]
        return made

    def _pieces(self, rows: Rows) -> Iterator[tuple[Rows, int, int]]:
        """Yield (blocks, first word, last word) so that each piece fits a cache."""
        step = max(_PIECE_WORDS // self.block_words, 1)
        for start in range(0, len(rows), step):
            for first in range(0, self.block_words, _PIECE_WORDS):
                yield rows[start : start + step], first, min(first + _PIECE_WORDS, self.block_words)
