"""The ``object`` backend: objects of configured stores to and from host memory, and what can be asked of the stores.

Reading is ``reading.py``, writing ``writing.py``, one store's requests ``store.py``. Files and other nodes' memory
reach objects by staging memory, which the planner arranges.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from xferd.api.errors import Closed, InvalidArgument, NotFound, Unsupported
from xferd.plugins.base import (
    Backend,
    LegScope,
    ObjectCatalog,
    ObjectSpace,
    ObjectsSpace,
    OpenLeg,
    SlotClass,
    SpaceKind,
)
from xferd.plugins.local import native
from xferd.plugins.local.mapped import MappedCopier
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.object.budget import ByteBudget
from xferd.plugins.object.digests import LEAF_NBYTES
from xferd.plugins.object.options import ObjectOptions
from xferd.plugins.object.placing import Placer
from xferd.plugins.object.ranges import in_object_order
from xferd.plugins.object.reading import Reader, ReadLeg
from xferd.plugins.object.store import Store
from xferd.plugins.object.writing import Uploads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.plugins.base import BackendStatistics, Chunk, Extent, ObjectFacts, Space

# Guesses for a store in the same region: 20 ms to the first byte, 1 GB/s with many requests at once. The engine learns
# better ones from the first transfers.
_START_S = 20e-3
_PIECE_S = 5e-6
_NBYTES_PER_S = 1e9

_MEMORY = (SpaceKind.MAPPED, SpaceKind.PROCESS)
_PAIRS = frozenset(pair for kind in _MEMORY for pair in ((SpaceKind.OBJECT, kind), (kind, SpaceKind.OBJECT)))


class ObjectBackend(Backend, ObjectCatalog):
    """Reads ranges and writes wholes.

    A chunk is not tried again after a failure: obstore has tried each request again by then, and an upload cannot go
    back to a part.
    """

    name: ClassVar[str] = "object"
    options: ClassVar[type[ObjectOptions]] = ObjectOptions
    is_restartable: ClassVar[bool] = False
    is_transactional: ClassVar[bool] = True

    def __init__(self, options: ObjectOptions) -> None:
        self._options = options
        self._movers = MoverPool(self.name, options.movers)
        self._counter = MoveCounter()
        self.read_budget = ByteBudget(options.read_memory)
        self.write_budget = ByteBudget(options.write_memory)
        self._stores: dict[str, Store] = {}
        self._closed = False
        copier = MappedCopier(native.load())
        self._reader = Reader(
            self.read_budget,
            Placer(self._movers, copier),
            merge_gap=options.merge_gap,
            max_nbytes=options.read_range // LEAF_NBYTES * LEAF_NBYTES,
            checksum=options.checksum,
        )
        self._uploads = Uploads(
            self.write_budget,
            self._movers,
            copier,
            part_nbytes=options.part,
            parts=options.upload_parts,
            checksum=options.checksum,
            moving=self._counter.moving,
        )

    # ------------------------------------------------------------------------------------ Backend

    async def start(self) -> None:
        """Make a client for each store; nothing is sent.

        Raises:
            ConfigError: a store's section, or a file that it names, is wrong.
        """
        self._stores = {name: Store(name, options) for name, options in self._options.stores.items()}

    async def aclose(self) -> None:
        """Wait for copies under way, then end the threads; requests that are still under way place nothing."""
        self._closed = True
        for store in self._stores.values():
            await store.aclose()
        await self._movers.aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return OBJECT with memory of this node in both directions."""
        return _PAIRS

    def refusal(self, source: Space, target: Space) -> str:
        """Return why not; also where the store of an object is not configured, or is read only."""
        reason = Backend.refusal(self, source, target)
        if reason:
            return reason
        for space in (source, target):
            if isinstance(space, ObjectSpace | ObjectsSpace) and space.store not in self._options.stores:
                return f"no store {space.store!r} is configured"
        if isinstance(target, ObjectsSpace):
            return "several objects are written one by one"
        if isinstance(target, ObjectSpace) and self._options.stores[target.store].read_only:
            return f"store {target.store!r} is read only"
        return ""

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a linear guess; the engine learns better ones."""
        return _START_S + pieces * _PIECE_S + nbytes / _NBYTES_PER_S

    def slots(self, source: Space, target: Space) -> int:
        """Return how many requests the store takes at once."""
        space = source if source.kind is SpaceKind.OBJECT else target
        assert isinstance(space, ObjectSpace | ObjectsSpace)
        return self._options.stores[space.store].max_concurrency

    def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
        """Return a class for each store and direction: chunks of an upload that wait their turn delay no read."""
        space, way = (source, "read") if source.kind is SpaceKind.OBJECT else (target, "write")
        assert isinstance(space, ObjectSpace | ObjectsSpace)
        return SlotClass(f"{way} {space.store}", self.slots(source, target))

    def arrange(self, source: Extent, target: Extent) -> tuple[Extent, Extent]:
        """Return a write in the order of the object's bytes.

        Raises:
            InvalidArgument: it is not the whole object.
        """
        if isinstance(target.space, ObjectSpace):
            return in_object_order(source, target)
        return source, target

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        """Begin a read, to be verified at its end, or an upload.

        Raises:
            InvalidArgument: a write that is not the whole object, in the order of its bytes.
        """
        self._check_open()
        if scope.target is not None and isinstance(scope.target.space, ObjectSpace):
            return self._open_write(scope.target, scope.source)
        assert scope.source is not None
        space = scope.source.space
        assert isinstance(space, ObjectSpace | ObjectsSpace)
        checks = self._reader.checks_of(scope.source)
        return ReadLeg(self._reader, self._store(space.store), checks, self._counter.moving)

    async def move(self, chunk: Chunk) -> int:
        """Move a chunk by itself: a read of any spans, or a write of a whole object.

        A cancelled read puts nothing in place afterwards; a cancelled write has left the object as it was.

        Raises:
            InvalidArgument: a write of a part.
            Stale: the object has changed since it was registered.
            ShortTransfer: it is shorter than the read.
            IntegrityError: a whole read whose bytes are not those that were written.
            NotFound, PermissionDenied, Unauthenticated, Overloaded, MoveFailed: as the store says.
        """
        self._check_open()
        match chunk.source.space, chunk.target.space:
            case (ObjectSpace() | ObjectsSpace()) as space, _:
                with self._counter.moving(chunk.nbytes):
                    return await self._reader.read(self._store(space.store), chunk, None)
            case _, ObjectSpace():
                return await self._write_whole(chunk)
            case _:
                raise Unsupported(
                    f"object cannot move {chunk.source.space} to {chunk.target.space}", remedy="ask the planner"
                )

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        slots = sum(store.options.max_concurrency for store in self._stores.values())
        return dataclasses.replace(self._counter.snapshot(slots), integrity_failures=self._reader.mismatches)

    @property
    def verified_reads(self) -> int:
        """How many whole reads were compared with the object's checksum, and agreed."""
        return self._reader.verified

    @property
    def uploads_left_behind(self) -> int:
        """How many uploads ended so that parts of them may still be in a store."""
        return self._uploads.left_behind

    async def _write_whole(self, chunk: Chunk) -> int:
        try:
            source, target = in_object_order(chunk.source, chunk.target)
        except InvalidArgument:
            self._counter.failures += 1
            raise
        leg = self._open_write(target, source)
        try:
            moved = await leg.move(dataclasses.replace(chunk, source=source, target=target))
        except BaseException:
            await leg.abort()
            raise
        await leg.commit()
        return moved

    def _open_write(self, target: Extent, source: Extent | None) -> OpenLeg:
        space = target.space
        assert isinstance(space, ObjectSpace)
        if len(target.iov) != 1 or int(target.iov[0, 0]) != 0 or int(target.iov[0, 1]) != space.nbytes:
            raise InvalidArgument(
                f"object {space.key!r} of store {space.store!r} is written as a whole or not at all, from one kind of "
                f"memory and in the order of its bytes: this is {target.nbytes} of {space.nbytes} in "
                f"{len(target.iov)} spans",
                limit=f"one span of {space.nbytes} bytes",
                remedy="write all of it in one transfer",
            )
        return self._uploads.open(self._store(space.store), target, source)

    # ------------------------------------------------------------------------------------ ObjectCatalog

    def stores(self) -> tuple[str, ...]:
        """Return the names of the configured stores."""
        return tuple(self._options.stores)

    def check_writable(self, store: str) -> None:
        """Raise ``PermissionDenied`` where the store is configured to be read only."""
        self._store(store).check_writable()

    async def find_object(self, store: str, key: str) -> ObjectFacts | None:
        """Return the facts of an object; None where there is none of this key."""
        return await self._store(store).find(key)

    async def delete_objects(self, store: str, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are fine."""
        found = self._store(store)
        found.check_writable()
        await found.delete(keys)

    async def list_objects(self, store: str, prefix: str, after: str, limit: int) -> tuple[ObjectFacts, ...]:
        """Return a page of a listing, in key order."""
        return await self._store(store).page(prefix, after, limit)

    def _store(self, name: str) -> Store:
        self._check_open()
        try:
            return self._stores[name]
        except KeyError:
            raise NotFound(
                f"no store {name!r}",
                limit=f"stores: {', '.join(self._stores) or 'none'}",
                remedy="name one of them, or configure it under [backends.object.stores]",
            ) from None

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the object backend was closed", remedy="the daemon is stopping")
