"""One move between a file and mapped memory, in a mover thread: through the page cache, or past it.

What is read and is in the page cache already is copied from a mapping of the file (``mapping.py``).

Past it, what O_DIRECT takes as it lies goes straight from or to memory. The rest:

* Memory that is not aligned, and the ends of a span that is read, pass through bounce memory.
* The ends of a span that is written, up to a whole page, go through the page cache, before the rest. Reading a block,
  changing it and writing it back would lose what somebody else writes to its other bytes meanwhile. A page is never
  written both ways by one move, and not by its neighbours either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xferd.plugins import vectored
from xferd.plugins.posix import xxh3
from xferd.plugins.posix.engines import settle
from xferd.plugins.posix.pieces import Pieces, pieces_of, shortened, without_edges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xferd.plugins.base import BlockSums, FileSpace, IovTable
    from xferd.plugins.posix.direct import BounceMemory, DirectFile, DirectPolicy
    from xferd.plugins.posix.engines import Engine, Stop
    from xferd.plugins.posix.mapping import Mappings

FEW_SPANS = 8
"""Spans up to which plain calls take a file through the page cache: columns for an engine would cost more than they."""


class FileMover:
    """Moves spans of files. Used by all mover threads.

    Args:
        engine: how requests reach the kernel.
        policy: which files are moved past the page cache.
        bounce: memory for what is not aligned; a thread has room for at least two pieces.
        piece_nbytes: most that one request moves; a power of two.
        mappings: what reads from the page cache as long as it can; None leaves that to the engine.
    """

    def __init__(
        self,
        engine: Engine,
        policy: DirectPolicy,
        bounce: BounceMemory,
        piece_nbytes: int,
        mappings: Mappings | None = None,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._bounce = bounce
        self._piece_nbytes = piece_nbytes
        self._mappings = mappings
        self._summer = xxh3.load()

    def move(
        self,
        space: FileSpace,
        spans: IovTable,
        memory: IovTable,
        sums: BlockSums | None,
        *,
        write: bool,
        stop: Stop,
    ) -> int:
        """Read spans of a file into memory of the same total, or write them; returns the bytes moved, all of them.

        ``sums`` are filled in where the bytes pass the processor, which is on their way through the page cache.
        Nothing is under way when this returns or raises.

        Raises:
            ShortTransfer: the file ends before.
            MoveFailed: the system refused, for example ENOSPC or EIO; ``__cause__`` is the OSError.
            Cancelled: it was asked to stop.
        """
        stop.check()
        file = self._policy.open(space)
        if file is None:
            self._through_cache(space.fd, spans, memory, sums, write=write, stop=stop)
        else:
            with file:
                past = _Past(file, self._engine, self._bounce, self._piece_nbytes, write=write, stop=stop)
                past.move(spans, memory)
            if past.is_refused:
                self._policy.refuse(space, "EINVAL for requests that are aligned")
        return vectored.total_nbytes(memory)

    def _through_cache(
        self, fd: int, spans: IovTable, memory: IovTable, sums: BlockSums | None, *, write: bool, stop: Stop
    ) -> None:
        if not write and self._mappings is not None and self._mappings.read(fd, spans, memory, sums):
            return
        if write and sums is not None and self._is_written(fd, spans, memory, sums, stop):
            return
        if len(spans) <= FEW_SPANS:
            (vectored.write_file_spans if write else vectored.read_file_spans)(fd, spans, memory)
            return
        pieces = pieces_of(shortened(spans, self._piece_nbytes), memory).bounded()
        results = self._engine.perform(fd, pieces, write=write, stop=stop)
        settle(results, pieces.nbytes, pieces, lambda: fd, write=write, is_direct=False, stop=stop)

    def _is_written(self, fd: int, spans: IovTable, memory: IovTable, sums: BlockSums, stop: Stop) -> bool:
        """Write what is to be summed; False where it has to be written without, all of it."""
        if self._summer is None or not len(sums.begin):
            return False
        is_done = self._summer.write(fd, spans, memory, sums, stop.flag)
        stop.check()
        return is_done


class _Past:
    """One move past the page cache."""

    def __init__(
        self, file: DirectFile, engine: Engine, bounce: BounceMemory, piece_nbytes: int, *, write: bool, stop: Stop
    ) -> None:
        self._file = file
        self._engine = engine
        self._bounce = bounce
        self._piece_nbytes = piece_nbytes
        self._write = write
        self._stop = stop
        self.is_refused = False

    def move(self, spans: IovTable, memory: IovTable) -> None:
        unit = self._file.write_unit
        if self._write:
            spans = without_edges(spans, unit)
        pieces = pieces_of(shortened(spans, self._piece_nbytes), memory)
        fits = pieces.aligned(self._file.offset_unit, self._file.memory_unit)
        bounced = ~fits
        if self._write:
            is_edge = ((pieces.offset | pieces.nbytes) & np.uint64(unit - 1)) != 0
            self._move_edges(pieces.take(is_edge))
            fits, bounced = fits & ~is_edge, bounced & ~is_edge
        self._move_aligned(pieces.take(fits))
        self._move_bounced(pieces.take(bounced))

    def _move_edges(self, pieces: Pieces) -> None:
        if len(pieces):
            pieces, fd = pieces.bounded(), self._file.plain()
            results = self._engine.perform(fd, pieces, write=self._write, stop=self._stop)
            self._settle(results, pieces.nbytes, pieces, is_direct=False)

    def _move_aligned(self, pieces: Pieces) -> None:
        if len(pieces):
            pieces = pieces.bounded()
            self._settle(self._perform(pieces), pieces.nbytes, pieces)

    def _move_bounced(self, pieces: Pieces) -> None:
        for part in self._rounds(pieces):
            wide, within = self._widened(part)
            if self._write:
                vectored.copy_local(part.parts, within)
            self._settle(self._perform(wide), within[:, 0] - wide.parts[:, 0] + within[:, 1], wide)
            if not self._write:
                vectored.copy_local(within, part.parts)

    def _rounds(self, pieces: Pieces) -> Iterator[Pieces]:
        """Cut into what the bounce memory holds at a time."""
        if not len(pieces):
            return
        ends = np.cumsum(self._outer(pieces)[1])
        first, start = 0, 0
        while first < len(pieces):
            last = int(np.searchsorted(ends, np.uint64(start + self._bounce.nbytes), side="right"))
            yield pieces.span(first, last)
            first, start = last, int(ends[last - 1])

    def _widened(self, pieces: Pieces) -> tuple[Pieces, IovTable]:
        """Return requests that are aligned into bounce memory, and where in there the wanted bytes are."""
        begin, sizes = self._outer(pieces)
        table = np.empty((len(pieces), 2), np.uint64)
        table[:, 0] = np.uint64(self._bounce.address()) + np.cumsum(sizes) - sizes
        table[:, 1] = sizes
        within = np.empty_like(table)
        within[:, 0], within[:, 1] = table[:, 0] + pieces.offset - begin, pieces.nbytes
        return Pieces(begin, sizes, table, np.arange(len(pieces) + 1)), within

    def _outer(self, pieces: Pieces) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return where each piece begins and how long it is when widened to whole units of the file."""
        mask = np.uint64(max(self._file.offset_unit, self._file.memory_unit) - 1)
        begin = pieces.offset & ~mask
        end = (pieces.offset + pieces.nbytes + mask) & ~mask
        return begin, end - begin

    def _perform(self, pieces: Pieces) -> NDArray[np.int32]:
        return self._engine.perform(self._file.fd, pieces, write=self._write, stop=self._stop)

    def _settle(
        self, results: NDArray[np.int32], needed: NDArray[np.uint64], pieces: Pieces, *, is_direct: bool = True
    ) -> None:
        if not settle(
            results, needed, pieces, self._file.plain, write=self._write, is_direct=is_direct, stop=self._stop
        ):
            self.is_refused = True
