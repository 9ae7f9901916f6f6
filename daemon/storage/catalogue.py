"""What a storage directory holds: extents, and for each block whether its bytes are proven. Pure, no I/O.

The same catalogue is rebuilt from the journal at a start, kept while the daemon runs, and looked at by fsck.

A block is SEALED once its bytes were on the disk when a transfer was reported DONE; ``sums`` has its xxh3 then, where
the pool keeps checksums. Writing to it makes it OPEN before the first byte moves, and it stays so if the writer dies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import IntegrityError
from xferd.daemon.storage import records as r

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from xferd.api.types import Access

ALIGN_NBYTES = 4096
"""Of every extent's offset and room: what O_DIRECT asks for on all but rare disks."""

OPEN, SEALED, SUMMED = 0, 1, 2
"""States of a block; SUMMED is sealed with a checksum."""


@dataclass(frozen=True, slots=True)
class CatalogueCounts:
    """Sums over the extents. ``sealed_nbytes`` counts whole blocks, cut at the extent's end."""

    extents: int
    nbytes: int
    sealed_nbytes: int
    summed_nbytes: int


class Extent:
    """One extent; the owner is an agent, by name. Not thread-safe.

    Attributes:
        nbytes: as asked for; ``room`` is what it takes.
        is_persistent: journalled, and here again after a restart.
        state: a block's OPEN, SEALED or SUMMED.
        sums: a block's xxh3 where SUMMED.
        opens: how often a block was opened for writing; tells a reader that its block changed meanwhile.
        writers: how many write to a block now.
        damaged: blocks whose bytes were found not to be what was sealed.
    """

    __slots__ = (
        "access",
        "agent",
        "block_nbytes",
        "created_at",
        "damaged",
        "id",
        "is_persistent",
        "label",
        "nbytes",
        "offset",
        "opens",
        "slab",
        "state",
        "sums",
        "writers",
    )

    def __init__(self, place: r.Placed, made: r.Allocate, *, is_persistent: bool = True) -> None:
        self.id = place.id
        self.slab = place.slab
        self.offset = place.offset
        self.nbytes = place.nbytes
        self.agent = made.agent
        self.label = made.label
        self.access: Access = made.access
        self.block_nbytes = made.block_nbytes
        self.created_at = made.created_at
        self.is_persistent = is_persistent
        blocks = self.blocks
        self.state: NDArray[np.uint8] = np.zeros(blocks, np.uint8)
        self.sums: NDArray[np.uint64] = np.zeros(blocks, np.uint64)
        self.opens: NDArray[np.uint32] = np.zeros(blocks, np.uint32)
        self.writers: NDArray[np.int32] = np.zeros(blocks, np.int32)
        self.damaged: set[int] = set()

    @property
    def blocks(self) -> int:
        """How many blocks, the last one perhaps a part of one."""
        return -(-self.nbytes // self.block_nbytes)

    @property
    def room(self) -> int:
        """Bytes that it takes in its slab."""
        return -(-self.nbytes // ALIGN_NBYTES) * ALIGN_NBYTES

    @property
    def end(self) -> int:
        """Offset in the slab behind the last byte."""
        return self.offset + self.nbytes

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Return (offset in the slab, nbytes) of blocks ``first`` to ``stop - 1``."""
        start = first * self.block_nbytes
        return self.offset + start, min(stop * self.block_nbytes, self.nbytes) - start

    def nbytes_of(self, mask: NDArray[np.bool_], first: int = 0) -> int:
        """Return the bytes of the blocks that a mask names, which begins with block ``first``."""
        full = int(np.count_nonzero(mask)) * self.block_nbytes
        has_last = first + len(mask) == self.blocks and bool(mask[-1:].any())
        return full - (self.blocks * self.block_nbytes - self.nbytes if has_last else 0)

    def sealed_nbytes(self) -> int:
        """Return the bytes of its sealed blocks."""
        return self.nbytes_of(self.state != OPEN)

    def set_state(self, first: int, stop: int, state: int) -> int:
        """Set the state of blocks, and return by how many bytes what is sealed grew."""
        before = self.nbytes_of(self.state[first:stop] != OPEN, first)
        self.state[first:stop] = state
        return (0 if state == OPEN else self.span(first, stop)[1]) - before

    def place(self) -> r.Placed:
        """Return where it lies."""
        return r.Placed(self.id, self.slab, self.offset, self.nbytes)

    def __str__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"extent {self.id}{label} of agent {self.agent}"


class Catalogue:
    """Extents by id, of one directory."""

    def __init__(self) -> None:
        self.extents: dict[int, Extent] = {}
        self.next_id = 1
        self.pool_uuid = b""
        self.is_closed = False
        """Whether the last record says that the daemon ended in order."""

    def apply(self, record: r.Record) -> None:
        """Take a record in.

        Raises:
            IntegrityError: the record does not go with those before it.
        """
        self.is_closed = isinstance(record, r.Close)
        match record:
            case r.Allocate(extents=places):
                for place in places:
                    self._add(place, record)
            case r.Free(ids):
                for id_ in ids:
                    self._extent(id_, "FREE")
                    del self.extents[id_]
            case r.Own(ids, agent, access):
                for id_ in ids:
                    extent = self._extent(id_, "OWN")
                    extent.agent, extent.access = agent, access
            case r.Dirty(ranges):
                for span in ranges:
                    extent = self._blocks(span.id, span.first, span.count, "DIRTY")
                    extent.state[span.first : span.first + span.count] = OPEN
            case r.Seal(id_, first, count, sums):
                extent = self._blocks(id_, first, count, "SEAL")
                extent.state[first : first + count] = SEALED if sums is None else SUMMED
                if sums is not None:
                    extent.sums[first : first + count] = sums
            case r.Snapshot(uuid):
                self.pool_uuid = uuid
            case r.Close() | r.End() | r.Start():
                pass

    def check(self, slabs: Sequence[int]) -> None:
        """Check that extents lie inside their slabs (sizes are given by number) and do not overlap.

        Raises:
            IntegrityError: they do not.
        """
        end_before, slab_before, before = 0, -1, None
        for extent in sorted(self.extents.values(), key=lambda e: (e.slab, e.offset)):
            room = slabs[extent.slab] if extent.slab < len(slabs) else 0
            if extent.offset + extent.room > room or extent.offset % ALIGN_NBYTES:
                raise IntegrityError(
                    f"{extent} lies at {extent.offset} of slab {extent.slab}, {extent.room} bytes",
                    limit=f"{room} bytes in units of {ALIGN_NBYTES}",
                    remedy="restore the slab file, or see xferctl fsck",
                )
            if extent.slab == slab_before and extent.offset < end_before:
                raise IntegrityError(f"{extent} overlaps {before}", remedy="see xferctl fsck")
            end_before, slab_before, before = extent.offset + extent.room, extent.slab, extent

    def snapshot(self) -> Iterator[r.Record]:
        """Yield records that make a catalogue like this one, without those that frame a snapshot."""
        for extent in self.extents.values():
            if extent.is_persistent:
                yield r.Allocate(
                    (extent.place(),), extent.agent, extent.label, extent.access, extent.block_nbytes, extent.created_at
                )
                yield from seals_of(extent, 0, extent.blocks)

    def counts(self) -> CatalogueCounts:
        """Return sums over the extents."""
        extents = self.extents.values()
        return CatalogueCounts(
            extents=len(extents),
            nbytes=sum(e.nbytes for e in extents),
            sealed_nbytes=sum(e.sealed_nbytes() for e in extents),
            summed_nbytes=sum(e.nbytes_of(e.state == SUMMED) for e in extents),
        )

    def _add(self, place: r.Placed, made: r.Allocate) -> None:
        if place.id in self.extents or not place.nbytes or made.block_nbytes < 1:
            raise IntegrityError(f"extent {place.id} is allocated twice, or is empty", remedy="see xferctl fsck")
        self.extents[place.id] = Extent(place, made)
        self.next_id = max(self.next_id, place.id + 1)

    def _extent(self, id_: int, what: str) -> Extent:
        found = self.extents.get(id_)
        if found is None:
            raise IntegrityError(f"a {what} record names extent {id_}, which is not there", remedy="see xferctl fsck")
        return found

    def _blocks(self, id_: int, first: int, count: int, what: str) -> Extent:
        extent = self._extent(id_, what)
        if first + count > extent.blocks:
            raise IntegrityError(
                f"a {what} record names blocks {first} to {first + count - 1} of {extent}",
                limit=f"{extent.blocks} blocks",
                remedy="see xferctl fsck",
            )
        return extent


def seals_of(extent: Extent, first: int, stop: int) -> Iterator[r.Seal]:
    """Yield records that seal what is sealed among some blocks."""
    state = extent.state[first:stop]
    for start, end in runs_of_equal(state):
        if state[start] == OPEN:
            continue
        for at in range(first + start, first + end, r.MAX_SEAL_BLOCKS):
            to = min(at + r.MAX_SEAL_BLOCKS, first + end)
            yield r.Seal(extent.id, at, to - at, extent.sums[at:to].copy() if state[start] == SUMMED else None)


def runs_of_equal(values: NDArray[np.uint8] | NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    """Return (start, stop) of the longest runs of one value, in order."""
    if not len(values):
        return ()
    borders = np.flatnonzero(np.diff(values)) + 1
    return zip([0, *borders.tolist()], [*borders.tolist(), len(values)], strict=True)
