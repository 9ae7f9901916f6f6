"""Writing: an object as a whole, by one put or by an upload in parts, visible all at once or not at all.

Chunks are gathered into memory of our own before they are sent. That is one copy more than a store needs, and it is
what lets a cancelled request be dropped at once: whatever obstore still holds, it is never a region's memory.

Memory is waited for with a slot of the scheduler, and perhaps staging memory, in hand. So it is held only for what
comes to its end by itself: a request, or parts that are on their way; never while the next chunk is waited for, which
may need that very slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import LimitExceeded
from xferd.plugins import vectored
from xferd.plugins.base import MappedSpace, ObjectSpace, OpenLeg, ProcessSpace
from xferd.plugins.object.digests import LeafHasher, attribute_of
from xferd.plugins.object.upload import Upload, to_its_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.base import Chunk, Extent
    from xferd.plugins.local.mapped import MappedCopier
    from xferd.plugins.movers import MoverPool
    from xferd.plugins.object.budget import ByteBudget
    from xferd.plugins.object.reading import Moving
    from xferd.plugins.object.store import Store

MAX_PARTS = 10_000
"""Of one object in S3; larger objects get larger parts."""

_MIB = 1 << 20


class Uploads:
    """What all writes share: the bound on their memory, threads, settings and counters.

    Args:
        budget: for bytes that are gathered or under way.
        movers: threads that copy.
        copier: what they do it with.
        part_nbytes: of an upload in parts; an object of at most so many, in one chunk, is put in one request.
        parts: of one upload under way at once, where memory allows.
        checksum: whether objects get a checksum.
        moving: counts a chunk.
    """

    def __init__(
        self,
        budget: ByteBudget,
        movers: MoverPool,
        copier: MappedCopier,
        *,
        part_nbytes: int,
        parts: int,
        checksum: bool,
        moving: Moving,
    ) -> None:
        self.budget = budget
        self.part_nbytes = part_nbytes
        self.moving = moving
        self._movers = movers
        self._copier = copier
        self._parts = parts
        self._checksum = checksum
        self.left_behind = 0

    def open(self, store: Store, target: Extent, source: Extent | None) -> WriteLeg:
        """Begin to write an object; nothing is sent, and nothing waited for.

        Args:
            store: of the object.
            target: the whole object.
            source: all bytes that are going to come, where they lie in memory; None where that is not known.
        """
        assert isinstance(target.space, ObjectSpace)
        store.check_writable()
        part_nbytes, parts = self._shape(target.space)
        return WriteLeg(self, store, target.space, source, part_nbytes, parts)

    def has_checksum(self, store: Store) -> bool:
        """Whether objects of a store get a checksum."""
        return self._checksum and store.has_attributes

    def _shape(self, space: ObjectSpace) -> tuple[int, int]:
        """Return the size of a part and how many may be under way, so that with one gathered and one filled all fit."""
        least = -(-space.nbytes // MAX_PARTS)
        part = max(self.part_nbytes, -(-least // _MIB) * _MIB)
        parts = min(self._parts, self.budget.nbytes // part - 2)
        if parts < 1:
            raise LimitExceeded(
                f"object {space.key!r} of {space.nbytes} bytes needs parts of {part} bytes, three at once",
                limit=f"{self.budget.nbytes} bytes (backends.object.write_memory)",
                remedy="raise the limit",
            )
        return part, parts

    async def gather(self, source: Extent, into: memoryview, hasher: LeafHasher | None = None) -> None:
        """Copy memory into a buffer in a mover thread, and take its digests on the way."""
        await self._movers.run(self._gather, source, into, hasher)

    async def digest(self, source: Extent) -> NDArray[np.uint64]:
        """Return the digests of memory that is about to be sent: metadata goes out before the first byte does."""
        hasher, total = LeafHasher(), source.nbytes
        indexed = source.indexed()
        buffer = bytearray(min(total, self.part_nbytes))
        for start in range(0, total, len(buffer)):
            part = indexed.cut(start, min(total, start + len(buffer)))
            await self.gather(part, memoryview(buffer)[: part.nbytes], hasher)
        return hasher.leaves()

    def _gather(self, source: Extent, into: memoryview, hasher: LeafHasher | None) -> None:
        target = vectored.iov_of(into)
        if isinstance(source.space, ProcessSpace):
            vectored.copy_process(target, source.iov, source.space.pid, write=False, pidfd=source.space.pidfd)
        else:
            assert isinstance(source.space, MappedSpace)
            self._copier.copy(source.iov, target)
        if hasher is not None:
            hasher.update(np.frombuffer(into, dtype=np.uint8))


class WriteLeg(OpenLeg):
    """A leg that writes one object.

    One that comes in a single chunk is put by that chunk's ``move``, and visible then: to keep its bytes until the
    commit would be to hold memory while other chunks are waited for. Else parts are sent as chunks come, and ``commit``
    makes them an object.
    """

    def __init__(
        self, uploads: Uploads, store: Store, space: ObjectSpace, source: Extent | None, part_nbytes: int, parts: int
    ) -> None:
        self._uploads = uploads
        self._store = store
        self._space = space
        self._source = source if source is not None and isinstance(source.space, MappedSpace | ProcessSpace) else None
        self._parts = part_nbytes, parts
        self._upload: Upload | None = None
        self._is_put = False

    async def move(self, chunk: Chunk) -> int:
        """Send a chunk, which is one span of the object."""
        with self._uploads.moving(chunk.nbytes):
            if chunk.nbytes == self._space.nbytes <= self._uploads.part_nbytes:
                await self._put(chunk)
            else:
                if self._upload is None:
                    self._upload = Upload(self._uploads, self._store, self._space, self._source, *self._parts)
                await self._upload.send(chunk)
            return chunk.nbytes

    async def commit(self) -> None:
        """Make the object visible, and have the region mean its new version."""
        if self._is_put:
            return
        assert self._upload is not None, "committed before its chunks moved"
        etag = await to_its_end(self._upload.finish())
        self._space.version.etag, self._space.version.nbytes = etag, self._space.nbytes

    async def abort(self) -> None:
        """Drop what was sent."""
        if self._upload is not None:
            await to_its_end(self._upload.abort())

    async def _put(self, chunk: Chunk) -> None:
        async with self._uploads.budget.lease(chunk.nbytes):
            data = bytearray(chunk.nbytes)
            hasher = LeafHasher() if self._uploads.has_checksum(self._store) else None
            await self._uploads.gather(chunk.source, memoryview(data), hasher)
            attributes = {} if hasher is None else attribute_of(hasher.leaves())
            etag = await self._store.put(self._space.key, data, attributes)
        self._is_put = True
        self._space.version.etag, self._space.version.nbytes = etag, self._space.nbytes
