"""Proof of bytes: blocks opened before they are written, sealed before DONE is told, and compared when they are read.

Order of a write: ``begin`` (on the disk: these blocks are not proven any more), the bytes move, ``prove`` (the bytes on
the disk, then their checksums), DONE. A crash in between leaves blocks open, never sealed with other bytes.

Blocks are proven each by itself. Where two transfers write to one block at a time, the one that ends last seals it;
if that one fails, the block stays open, until somebody writes to it again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import structlog

from xferd.api.errors import IntegrityError
from xferd.daemon.storage import records as r
from xferd.daemon.storage.catalogue import OPEN, SEALED, SUMMED, runs_of_equal, seals_of
from xferd.daemon.storage.checksums import sums_of
from xferd.daemon.storage.touching import BlockSpan, by_extent, spans_of
from xferd.plugins.posix import xxh3

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.passing import Passed
    from xferd.daemon.storage.reading import Arriving
    from xferd.daemon.storage.volume import Volume
    from xferd.plugins.base import BlockSums, IovTable

log = structlog.get_logger(__name__)

_NOTHING_KNOWN: Mapping[tuple[Extent, int], int] = MappingProxyType({})
_NOTHING_DONE: Mapping[Extent, NDArray[np.bool_]] = MappingProxyType({})

SUM_NBYTES = 32 << 20
"""Bytes that one mover thread sums in one call, so that several share a large span."""


@dataclass(slots=True)
class ProofCounters:
    """What was done, since the start."""

    sealed_nbytes: int = 0
    verified_nbytes: int = 0
    mismatches: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Writing:
    """Blocks that one transfer writes to.

    Attributes:
        spans: the blocks.
        opens: how often each had been opened, this transfer's own time included.
        alone: which had no other writer then. Where both still hold at the end, nobody else has written.
        sums: what was summed as it passed, by extent and block; None for a block that must be read back.
    """

    spans: tuple[BlockSpan, ...]
    opens: tuple[NDArray[np.uint32], ...]
    alone: tuple[NDArray[np.bool_], ...]
    sums: dict[Extent, dict[int, int | None]] = field(default_factory=dict)

    def note(self, chunk: Passed, sums: Iterable[NDArray[np.uint64]]) -> None:
        """Take down what a chunk has written; a block that several chunks touch is read back."""
        for whole, values in zip(chunk.whole, sums, strict=True):
            known = self.sums.setdefault(whole.extent, {})
            for number, value in zip(whole.numbers.tolist(), values.tolist(), strict=True):
                known[number] = None if number in known else value
        for extent, numbers in chunk.partial:
            self.sums.setdefault(extent, {}).update(dict.fromkeys(numbers))

    def known(self) -> dict[tuple[Extent, int], int]:
        """Return the sums that still hold, looked at after this writing has ended."""
        found = {}
        for (extent, first, stop), opens, alone in zip(self.spans, self.opens, self.alone, strict=True):
            sums = self.sums.get(extent, {})
            holds = alone & (extent.opens[first:stop] == opens) & (extent.writers[first:stop] == 0)
            for number in (np.flatnonzero(holds) + first).tolist():
                value = sums.get(number)
                if value is not None:
                    found[extent, number] = value
        return found


class Sealing:
    """Opens, seals and checks the blocks of one volume. Used from one event loop.

    Args:
        volume: whose extents.
        has_checksums: whether sealed blocks get one; an attribute, too.
        counters: of the pool.
    """

    def __init__(self, volume: Volume, counters: ProofCounters, *, has_checksums: bool) -> None:
        self._volume = volume
        self._counters = counters
        self.has_checksums = has_checksums

    async def begin(self, spans: Sequence[BlockSpan]) -> Writing:
        """Void the proof of blocks that are about to be written; on the disk when this returns.

        Costs no I/O where none of them is sealed. Where it raises, or is cancelled, the blocks have no writer.

        Raises:
            PoolExhausted, MoveFailed: the journal; no byte may be written.
        """
        voided: list[r.BlockRange] = []
        opens, alone = [], []
        for extent, first, stop in spans:
            extent.opens[first:stop] += 1
            extent.writers[first:stop] += 1
            sealed = extent.state[first:stop] != OPEN
            if sealed.any():
                if extent.is_persistent:
                    voided += [
                        r.BlockRange(extent.id, first + start, end - start)
                        for start, end in runs_of_equal(sealed)
                        if sealed[start]
                    ]
                self._volume.sealed_nbytes += extent.set_state(first, stop, OPEN)
            self._mend(BlockSpan(extent, first, stop))
            opens.append(extent.opens[first:stop].copy())
            alone.append(extent.writers[first:stop] == 1)
        writing = Writing(tuple(spans), tuple(opens), tuple(alone))
        if voided:
            try:
                await self._volume.committer.commit([r.Dirty(tuple(voided))])
            except BaseException:
                self.abandon(writing)
                raise
        return writing

    async def complete(self, sums: BlockSums, memory: IovTable) -> None:
        """Sum in a thread what a backend has not summed, in the memory where it is now."""
        if not sums.is_known.all():
            await self._volume.movers.run(xxh3.sum_memory, sums, memory, xxh3.load())

    async def prove(self, writing: Writing) -> None:
        """Prove blocks that were written: on the disk when this returns, checksums and all.

        The writing that ``begin`` began was ended by ``abandon`` in the same step. Where this raises or is cancelled,
        the blocks stay open. Blocks that others write to now are left to them.

        Raises:
            PoolExhausted, MoveFailed, ShortTransfer: the slab or the journal; nobody may be told DONE.
        """
        spans = writing.spans
        mine = [part for span in spans for part in _parts(span, span.extent.writers[span.first : span.stop] == 0)]
        opens = [span.extent.opens[span.first : span.stop].copy() for span in mine]
        slabs = sorted({span.extent.slab for span in spans if span.extent.is_persistent})
        sums = await self._sums(mine, slabs, known=writing.known())
        sealed: list[BlockSpan] = []
        written: list[r.Record] = []
        state = SUMMED if self.has_checksums else SEALED
        for span, before, found in zip(mine, opens, sums, strict=True):
            for extent, first, stop in _parts(span, _untouched(span, before)):
                extent.sums[first:stop] = found[first - span.first : stop - span.first]
                self._volume.sealed_nbytes += extent.set_state(first, stop, state)
                self._counters.sealed_nbytes += extent.span(first, stop)[1]
                sealed.append(BlockSpan(extent, first, stop))
                if extent.is_persistent:
                    written += seals_of(extent, first, stop)
        if written:
            try:
                await self._volume.committer.commit(written)
            except BaseException:
                self._void(sealed)
                raise

    def abandon(self, writing: Writing) -> None:
        """End the writing that ``begin`` began; the blocks stay open until they are proven."""
        for extent, first, stop in writing.spans:
            extent.writers[first:stop] -= 1

    async def compare_arrived(
        self, arriving: Arriving, opens: Mapping[Extent, NDArray[np.uint32]]
    ) -> list[tuple[Extent, NDArray[np.int64]]]:
        """Compare blocks that were summed as they arrived, or where; returns which.

        Args:
            arriving: the blocks, of a leg all of which has moved.
            opens: of each extent's blocks, before the first byte was read.

        Raises:
            IntegrityError: a block is not what was sealed.
        """
        compared = []
        for (extent, numbers, begin, end), sums in arriving.by_extent():
            same = (extent.opens[numbers] == opens[extent][numbers]) & (extent.writers[numbers] == 0)
            wrong = same & (extent.state[numbers] == SUMMED) & (extent.sums[numbers] != sums)
            self._counters.verified_nbytes += int((end - begin)[~wrong].sum())
            if wrong.any():
                await self._blame(extent, numbers[wrong].tolist())
            compared.append((extent, numbers))
        return compared

    async def verify(
        self,
        spans: Sequence[BlockSpan],
        *,
        is_asked: bool,
        done: Mapping[Extent, NDArray[np.bool_]] = _NOTHING_DONE,
    ) -> None:
        """Compare the bytes of sealed blocks with their checksums. Blocks that are being written are passed over.

        Args:
            spans: what was read.
            done: which blocks of an extent were compared where they arrived.
            is_asked: the caller wants proof of every block, so that an open one is an error too.

        Raises:
            IntegrityError: a block is not what was sealed, or has no proof.
            MoveFailed, ShortTransfer: the slab cannot be read.
        """
        known: list[BlockSpan] = []
        for extent, numbers in by_extent(spans):
            if is_asked:
                _check_proven(extent, numbers, self._place(extent.slab))
            left = (extent.state[numbers] == SUMMED) & (extent.writers[numbers] == 0)
            if extent in done:
                left &= ~done[extent][numbers]
            known += spans_of(extent, numbers[left])
        opens = [span.extent.opens[span.first : span.stop].copy() for span in known]
        for span, before, found in zip(known, opens, await self._sums(known, always=True), strict=True):
            self.compare(span, before, found)

    def compare(self, span: BlockSpan, opens: NDArray[np.uint32], found: NDArray[np.uint64]) -> None:
        """Compare what was read of blocks, which stood at ``opens`` then, with what was sealed; see ``verify``."""
        extent, first, stop = span
        self._counters.verified_nbytes += extent.span(first, stop)[1]
        wrong = (extent.sums[first:stop] != found) & _untouched(span, opens) & (extent.state[first:stop] == SUMMED)
        if not wrong.any():
            return
        numbers = (np.flatnonzero(wrong) + first).tolist()
        fresh = set(numbers) - extent.damaged
        extent.damaged |= fresh
        self._volume.damaged_blocks += len(fresh)
        self._counters.mismatches += len(numbers)
        block = numbers[0]
        offset, nbytes = extent.span(block, block + 1)
        path = self._place(extent.slab)
        log.error("storage_block_damaged", path=path, extent=extent.id, blocks=numbers[:16], count=len(numbers))
        raise IntegrityError(
            f"block {block} of {extent} ({nbytes} bytes at {offset} of {path}) has checksum "
            f"{int(found[block - first]):016x}, and {int(extent.sums[block]):016x} was sealed"
            + (f"; {len(numbers) - 1} more blocks differ" if len(numbers) > 1 else ""),
            remedy="write the block again from another copy, and look at the disk",
        )

    async def _blame(self, extent: Extent, numbers: list[int]) -> None:
        """Raise for blocks that arrived with other bytes, after looking whether the disk has them."""
        await self.verify([BlockSpan(extent, number, number + 1) for number in numbers], is_asked=False)
        self._counters.mismatches += len(numbers)
        raise IntegrityError(
            f"block {numbers[0]} of {extent} arrived with other bytes than were sealed, which "
            f"{self._place(extent.slab)} still has",
            remedy="see that nobody writes to the target while a transfer does; else look at this machine's memory",
        )

    async def _sums(
        self,
        spans: Sequence[BlockSpan],
        slabs: Iterable[int] = (),
        *,
        known: Mapping[tuple[Extent, int], int] = _NOTHING_KNOWN,
        always: bool = False,
    ) -> list[NDArray[np.uint64]]:
        """Return each span's checksums, and put slabs on the disk meanwhile, with several threads.

        Blocks that are ``known`` are not read. The checksums are zeros where the pool keeps none. Where one call
        fails, all have come to an end.
        """
        sums = [np.zeros(stop - first, np.uint64) for _, first, stop in spans]
        missing: list[tuple[NDArray[np.uint64], BlockSpan]] = []
        if self.has_checksums or always:
            for made, span in zip(sums, spans, strict=True):
                values = [known.get((span.extent, number)) for number in range(span.first, span.stop)] if known else []
                made[: len(values)] = [value or 0 for value in values]
                unread = np.array([value is None for value in values] or [True] * len(made))
                for part in _parts(span, unread):
                    missing += [(made[p.first - span.first : p.stop - span.first], p) for p in _pieces(part)]
        syncs = [functools.partial(self._sync, slab) for slab in slabs]
        reads = [functools.partial(self._read, piece) for _, piece in missing]
        if not syncs and not reads:
            return sums
        found = await self._volume.movers.run_all([*syncs, *reads])
        for (place, _), read in zip(missing, found[len(syncs) :], strict=True):
            place[:] = read
        return sums

    def _sync(self, slab: int) -> NDArray[np.uint64]:
        self._volume.directory.sync(slab)
        return np.empty(0, np.uint64)

    def _read(self, span: BlockSpan) -> NDArray[np.uint64]:
        slab = self._volume.directory.slabs[span.extent.slab]
        return sums_of(slab.fd, slab.path, span.extent, span.first, span.stop)

    def _void(self, spans: Iterable[BlockSpan]) -> None:
        for extent, first, stop in spans:
            if self._volume.extents.get(extent.id) is extent:
                self._volume.sealed_nbytes += extent.set_state(first, stop, OPEN)

    def _mend(self, span: BlockSpan) -> None:
        """Forget damage that is about to be written over."""
        extent, first, stop = span
        if extent.damaged:
            gone = {number for number in extent.damaged if first <= number < stop}
            extent.damaged -= gone
            self._volume.damaged_blocks -= len(gone)

    def _place(self, slab: int) -> str:
        return self._volume.directory.slabs[slab].path


def _check_proven(extent: Extent, numbers: NDArray[np.int64], path: str) -> None:
    bare = (extent.state[numbers] != SUMMED) & (extent.writers[numbers] == 0)
    if bare.any():
        block = int(numbers[np.argmax(bare)])
        offset, nbytes = extent.span(block, block + 1)
        raise IntegrityError(
            f"block {block} of {extent} ({nbytes} bytes at {offset} of {path}) has no checksum: no transfer that "
            "wrote to it was DONE",
            remedy="write it again, or read it without asking for proof",
        )


def _untouched(span: BlockSpan, opens: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which blocks nobody has opened since ``opens`` was taken."""
    extent, first, stop = span
    untouched: NDArray[np.bool_] = (extent.opens[first:stop] == opens) & (extent.writers[first:stop] == 0)
    return untouched


def _parts(span: BlockSpan, mask: NDArray[np.bool_]) -> list[BlockSpan]:
    """Return the parts of a span whose blocks a mask names."""
    extent, first, _ = span
    return [BlockSpan(extent, first + start, first + stop) for start, stop in runs_of_equal(mask) if mask[start]]


def _pieces(span: BlockSpan) -> Iterable[BlockSpan]:
    extent, first, stop = span
    step = max(SUM_NBYTES // extent.block_nbytes, 1)
    return (BlockSpan(extent, at, min(at + step, stop)) for at in range(first, stop, step))
