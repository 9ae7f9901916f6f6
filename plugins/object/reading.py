"""Reading: gets of ranges, several at once within bounds, put in place by ``placing.py``."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, NamedTuple

from xferd.api.errors import NotFound
from xferd.plugins.base import MappedSpace, ObjectSpace, ObjectsSpace, OpenLeg
from xferd.plugins.object.digests import WholeCheck
from xferd.plugins.object.direct import Ask
from xferd.plugins.object.fetching import Range
from xferd.plugins.object.placing import Arrival
from xferd.plugins.object.ranges import by_object, covers, plan_gets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    from xferd.plugins.base import Chunk, Extent, IovTable, Space
    from xferd.plugins.object.budget import ByteBudget
    from xferd.plugins.object.placing import Placer
    from xferd.plugins.object.ranges import Get
    from xferd.plugins.object.store import Store

    Checks: TypeAlias = dict[int, WholeCheck]
    Moving: TypeAlias = Callable[[int], AbstractContextManager[None]]


class _Job(NamedTuple):
    """One get, of which object, and the check that its digests go into."""

    space: ObjectSpace
    get: Get
    check: WholeCheck | None


class Reader:
    """Moves bytes of objects into memory.

    Args:
        budget: for bytes that were received and are not in place yet.
        placer: puts them in place.
        merge_gap: bytes between two rows that are read for nothing rather than asking twice.
        max_nbytes: of one get.
        checksum: whether whole reads are verified.
    """

    def __init__(
        self,
        budget: ByteBudget,
        placer: Placer,
        *,
        merge_gap: int,
        max_nbytes: int,
        checksum: bool,
    ) -> None:
        self._budget = budget
        self._placer = placer
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

    def checks_of(self, source: Extent) -> Checks:
        """Return the checks of a read, by the object's number; of those objects that it takes whole, in one span."""
        space = source.space
        assert isinstance(space, ObjectSpace | ObjectsSpace)
        first = source.iov[:, 0] == 0
        sizes = source.iov[first, 1].tolist()
        numbers = [0] * len(sizes) if source.region is None else source.region[first].tolist()
        checks: Checks = {}
        for number, nbytes in zip(numbers, sizes, strict=True):
            check = self.check_of(space.members[number] if isinstance(space, ObjectsSpace) else space, nbytes)
            if check is not None:
                checks[number] = check
        return checks

    async def read(self, store: Store, chunk: Chunk, checks: Checks | None) -> int:
        """Read one chunk. Once this is over, however it ends, nothing is put into the target any more.

        Args:
            store: of the objects.
            chunk: from one object, or several, to memory.
            checks: of the leg that the chunk is a part of; an object without one is verified here, if all of it comes.
        """
        jobs: list[_Job] = []
        alone: list[WholeCheck] = []
        for number, space, spans, places in _objects(chunk):
            _check_written(space)
            gets = plan_gets(spans, places, merge_gap=self._merge_gap, max_nbytes=self._max_nbytes)
            check = None if checks is None else checks.get(number)
            if check is None and covers(gets, space.version.nbytes):
                check = self.check_of(space, space.version.nbytes)
                if check is not None:
                    alone.append(check)
            jobs += [_Job(space, get, check) for get in gets]
        await self._read_all(store, jobs, chunk.target.space)
        for check in alone:
            self.verify(check)
        return chunk.nbytes

    def verify(self, check: WholeCheck) -> None:
        """Compare, and count how that ended."""
        try:
            self.verified += check.verify()
        except Exception:
            self.mismatches += 1
            raise

    async def _read_all(self, store: Store, jobs: list[_Job], target: Space) -> None:
        if store.direct is not None and isinstance(target, MappedSpace):
            jobs = await self._read_straight(store, jobs)
        if not jobs:
            return
        if len(jobs) == 1:
            await self._read_one(store, jobs[0], target)
            return
        left = iter(jobs)
        workers = min(len(jobs), store.options.max_concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(workers):
                    group.create_task(self._work(store, left, target), name=f"object get {store.name} {number}")
        except BaseExceptionGroup as failed:
            first: BaseException = failed
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        else:
            return
        raise first

    async def _read_straight(self, store: Store, jobs: list[_Job]) -> list[_Job]:
        """Have bytes put in place as they are received, where that can be; returns what has to come another way."""
        straight: list[_Job] = []
        left: list[_Job] = []
        for job in jobs:
            (straight if job.get.is_dense else left).append(job)
        received = await store.get_into([_ask(job) for job in straight])
        for job, got in zip(straight, received, strict=True):
            if got is None:
                left.append(job)
            elif job.check is not None and got.leaves is not None:
                job.check.add(job.get.start, got.leaves, got.attributes)
        return left

    async def _work(self, store: Store, left: Iterator[_Job], target: Space) -> None:
        for job in left:
            await self._read_one(store, job, target)

    async def _read_one(self, store: Store, job: _Job, target: Space) -> None:
        space, get, check = job
        taken = await self._budget.take(get.stop - get.start)
        try:
            got = await store.get(space.key, get.start, get.stop, space.version.etag)
            attributes = got.attributes if check is not None else {}
            hashes = _wants_digests(check, get, attributes)
            leaves = await self._placer.place(Arrival(got.data, get, target, hashes=hashes))
            if check is not None and leaves is not None:
                check.add(get.start, leaves, attributes)
        finally:
            self._budget.give_back(taken)


class ReadLeg(OpenLeg):
    """A leg that reads; ``commit`` verifies those of its objects that it took whole."""

    def __init__(self, reader: Reader, store: Store, checks: Checks, moving: Moving) -> None:
        self._reader = reader
        self._store = store
        self._checks = checks
        self._moving = moving

    async def move(self, chunk: Chunk) -> int:
        """Read a chunk; in any order."""
        with self._moving(chunk.nbytes):
            return await self._reader.read(self._store, chunk, self._checks)

    async def commit(self) -> None:
        """Verify what was read.

        Raises:
            IntegrityError: an object is not what was written.
        """
        for check in self._checks.values():
            self._reader.verify(check)

    async def abort(self) -> None:
        """Do nothing: what was read stays where it is, as with any transfer that failed."""


def _ask(job: _Job) -> Ask:
    space, get, check = job
    wanted = Range(get.start, get.stop, get.target)
    return Ask(space.key, space.version.etag, wanted, functools.partial(_wants_digests, check, get))


def _wants_digests(check: WholeCheck | None, get: Get, attributes: Mapping[str, str]) -> bool:
    return check is not None and check.expects(attributes) and check.wants(get.start, get.stop)


def _objects(chunk: Chunk) -> list[tuple[int, ObjectSpace, IovTable, IovTable]]:
    """Return each object of a chunk: its number, the object, its spans and where they go."""
    space = chunk.source.space
    if isinstance(space, ObjectSpace):
        return [(0, space, chunk.source.iov, chunk.target.iov)]
    assert isinstance(space, ObjectsSpace)
    return [(n, space.members[n], spans, places) for n, spans, places in by_object(chunk.source, chunk.target.iov)]


def _check_written(space: ObjectSpace) -> None:
    if not space.version.etag and not space.version.nbytes:
        raise NotFound(
            f"object {space.key!r} of store {space.store!r} has not been written yet",
            remedy="write it first: it was registered to be created",
        )
