"""Reading: gets of ranges, several at once within bounds, each put in place by one vectored copy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import NotFound
from xferd.plugins import vectored
from xferd.plugins.base import MappedSpace, ObjectSpace, OpenLeg, ProcessSpace
from xferd.plugins.object.digests import WholeCheck, leaves_of
from xferd.plugins.object.ranges import covers, plan_gets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from xferd.plugins.base import Chunk, Space
    from xferd.plugins.local.mapped import MappedCopier
    from xferd.plugins.movers import MoverPool
    from xferd.plugins.object.budget import ByteBudget
    from xferd.plugins.object.ranges import Get
    from xferd.plugins.object.store import Got, Store


class Reader:
    """Moves bytes of objects into memory.

    Args:
        budget: for bytes that were received and are not in place yet.
        movers: threads that copy.
        copier: what they do it with.
        merge_gap: bytes between two rows that are read for nothing rather than asking twice.
        max_nbytes: of one get.
        checksum: whether whole reads are verified.
    """

    def __init__(
        self,
        budget: ByteBudget,
        movers: MoverPool,
        copier: MappedCopier,
        *,
        merge_gap: int,
        max_nbytes: int,
        checksum: bool,
    ) -> None:
        self._budget = budget
        self._copier = copier
        self._movers = movers
        self._merge_gap = merge_gap
        self._max_nbytes = max_nbytes
        self._checksum = checksum
        self.verified = 0
        self.mismatches = 0

    def check_of(self, space: ObjectSpace, nbytes: int) -> WholeCheck | None:
        """Return a check for a read of ``nbytes`` of an object, None where those are not all or nothing is compared."""
        if not self._checksum or not nbytes or nbytes != space.version.nbytes:
            return None
        return WholeCheck(f"object {space.key!r} of store {space.store!r}", nbytes)

    async def read(self, store: Store, chunk: Chunk, check: WholeCheck | None) -> int:
        """Read one chunk. Once this is over, however it ends, nothing is put into the target any more.

        Args:
            store: of the object.
            chunk: from an object to memory.
            check: of the leg that the chunk is a part of; None verifies a chunk that is a whole object.
        """
        space = chunk.source.space
        assert isinstance(space, ObjectSpace)
        if not space.version.etag and not space.version.nbytes:
            raise NotFound(
                f"object {space.key!r} of store {space.store!r} has not been written yet",
                remedy="write it first: it was registered to be created",
            )
        gets = plan_gets(chunk.source.iov, chunk.target.iov, merge_gap=self._merge_gap, max_nbytes=self._max_nbytes)
        alone = None
        if check is None and covers(gets, space.version.nbytes):
            check = alone = self.check_of(space, space.version.nbytes)
        await self._read_all(store, space, gets, chunk.target.space, check)
        if alone is not None:
            self.verify(alone)
        return chunk.nbytes

    def verify(self, check: WholeCheck) -> None:
        """Compare, and count how that ended."""
        try:
            self.verified += check.verify()
        except Exception:
            self.mismatches += 1
            raise

    async def _read_all(
        self, store: Store, space: ObjectSpace, gets: list[Get], target: Space, check: WholeCheck | None
    ) -> None:
        if len(gets) == 1:
            await self._read_one(store, space, gets[0], target, check)
            return
        left = iter(gets)
        workers = min(len(gets), store.options.max_concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(workers):
                    work = self._work(store, space, left, target, check)
                    group.create_task(work, name=f"object get {space.store} {number}")
        except BaseExceptionGroup as failed:
            first: BaseException = failed
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        else:
            return
        raise first

    async def _work(
        self, store: Store, space: ObjectSpace, left: Iterator[Get], target: Space, check: WholeCheck | None
    ) -> None:
        for get in left:
            await self._read_one(store, space, get, target, check)

    async def _read_one(
        self, store: Store, space: ObjectSpace, get: Get, target: Space, check: WholeCheck | None
    ) -> None:
        async with self._budget.lease(get.stop - get.start):
            got = await store.get(space.key, get.start, get.stop, space.version.etag)
            hashes = check is not None and check.wants(get.start, get.stop)
            leaves = await self._movers.run(self._place, got, get, target, hashes=hashes)
            if check is not None and leaves is not None:
                check.add(get.start, leaves, got.attributes)

    def _place(self, got: Got, get: Get, target: Space, *, hashes: bool) -> NDArray[np.uint64] | None:
        """Copy a range's spans to where they go; return digests of the range if wanted. Runs in a mover thread."""
        data = np.frombuffer(memoryview(got.data), dtype=np.uint8)
        source, places = get.tables(int(data.ctypes.data))
        if isinstance(target, ProcessSpace):
            vectored.copy_process(source, places, target.pid, write=True, pidfd=target.pidfd)
        else:
            assert isinstance(target, MappedSpace)
            self._copier.copy(source, places)
        return leaves_of(data) if hashes else None


class ReadLeg(OpenLeg):
    """A leg that reads; ``commit`` verifies it where it was a whole object."""

    def __init__(self, reader: Reader, store: Store, check: WholeCheck | None, moving: Moving) -> None:
        self._reader = reader
        self._store = store
        self._check = check
        self._moving = moving

    async def move(self, chunk: Chunk) -> int:
        """Read a chunk; in any order."""
        with self._moving(chunk.nbytes):
            return await self._reader.read(self._store, chunk, self._check)

    async def commit(self) -> None:
        """Verify what was read.

        Raises:
            IntegrityError: the object is not what was written.
        """
        if self._check is not None:
            self._reader.verify(self._check)

    async def abort(self) -> None:
        """Do nothing: what was read stays where it is, as with any transfer that failed."""


if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    Moving = Callable[[int], AbstractContextManager[None]]
