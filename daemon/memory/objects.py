"""Objects of configured stores as regions, and what is asked of files and objects without moving a byte.

Who moves an object's bytes and who speaks to the stores is the ``object`` backend, known here by its catalog only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.api.errors import (
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OutOfBounds,
    Unsupported,
    XferdError,
)
from xferd.api.types import MemoryKind, ObjectEntry, ObjectPage, QueryResult, RegionSource
from xferd.daemon.memory.backing import Backing
from xferd.daemon.memory.files import check_flags
from xferd.daemon.sessions.caller import session_of
from xferd.plugins.base import ObjectSpace, ObjectVersion

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xferd.api.types import Caller, ObjectQuery, QueryItem, RegionInfo, RegisterObjectRequest
    from xferd.daemon.memory.files import FileRoots
    from xferd.daemon.memory.regions import RegionTable
    from xferd.plugins.base import ObjectCatalog, ObjectFacts

MAX_PAGE = 1000
"""Objects of one page of a listing; as S3 has it."""

AT_ONCE = 64
"""Items of one query that are looked at together; stores have bounds of their own besides."""


class ObjectBacking(Backing):
    """An object at a version. Owns nothing: stores keep no hold."""

    kind = MemoryKind.OBJECT
    source = RegionSource.OBJECT

    def __init__(self, space: ObjectSpace) -> None:
        self.space = space
        self.path = f"{space.store}/{space.key}"

    def _close(self) -> None:
        pass


class ObjectDesk:
    """Registers objects, and answers about objects and files.

    Args:
        regions: the table that records go into.
        roots: where files may be looked at.
        catalog: of the stores; None where no backend has any.
        max_items: of one query, and keys of one delete.
    """

    def __init__(
        self, regions: RegionTable, roots: FileRoots, catalog: ObjectCatalog | None, *, max_items: int
    ) -> None:
        self._regions = regions
        self._roots = roots
        self.catalog = catalog
        self.max_items = max_items

    async def register_object(self, caller: Caller, request: RegisterObjectRequest) -> RegionInfo:
        """Register an object at its present version."""
        session, catalog = session_of(caller), self._stores()
        check_flags(request, "an object that is to be created")
        if request.writable:
            catalog.check_writable(request.store)
        facts = await catalog.find_object(request.store, request.key)
        nbytes = _size(request, facts)
        version = ObjectVersion() if facts is None else ObjectVersion(facts.etag, facts.nbytes)
        backing = ObjectBacking(ObjectSpace(request.store, request.key, nbytes, version))
        return self._regions.add(
            session,
            caller.agent,
            backing,
            nbytes,
            access=request.access,
            label=request.label,
            writable=request.writable,
        )

    async def query(self, caller: Caller, items: Sequence[QueryItem]) -> list[QueryResult]:
        """Look at files and objects, several at once; one that cannot be looked at has the error in its result."""
        _check_caller(caller)
        self._check_count(len(items), "items")
        results: list[QueryResult | None] = [None] * len(items)
        left = iter(enumerate(items))

        async def work(left: Iterator[tuple[int, QueryItem]]) -> None:
            for number, item in left:
                results[number] = await self._look(item)

        async with asyncio.TaskGroup() as group:
            for number in range(min(AT_ONCE, len(items))):
                group.create_task(work(left), name=f"query {number}")
        return [result for result in results if result is not None]

    async def delete_objects(self, caller: Caller, store: str, keys: Sequence[str]) -> None:
        """Delete objects; absent ones are fine."""
        _check_caller(caller)
        self._check_count(len(keys), "keys")
        if keys:
            await self._stores().delete_objects(store, keys)

    async def list_objects(self, caller: Caller, query: ObjectQuery) -> ObjectPage:
        """Return a page of a listing."""
        _check_caller(caller)
        if query.limit > MAX_PAGE:
            raise LimitExceeded(
                f"a page of {query.limit} objects", limit=f"{MAX_PAGE}", remedy="ask for page after page, with `after`"
            )
        limit = query.limit or MAX_PAGE
        found = await self._stores().list_objects(query.store, query.prefix, query.after, limit)
        entries = tuple(ObjectEntry(facts.key, facts.nbytes, facts.modified_at, facts.etag) for facts in found)
        return ObjectPage(entries, entries[-1].key if len(entries) == limit else "")

    # ------------------------------------------------------------------------------------ internals

    def _stores(self) -> ObjectCatalog:
        if self.catalog is None:
            raise Unsupported(
                "no object stores are configured",
                limit="backends without 'object'",
                remedy="install xferd[object] and configure [backends.object.stores.NAME]",
            )
        return self.catalog

    def _check_count(self, count: int, what: str) -> None:
        if count > self.max_items:
            raise LimitExceeded(
                f"{count} {what} in one call",
                limit=f"{self.max_items} (limits.max_group)",
                remedy="ask in several calls",
            )

    async def _look(self, item: QueryItem) -> QueryResult:
        try:
            if item.path and (item.store or item.key):
                raise InvalidArgument(
                    f"path {item.path!r} and an object in one item",
                    limit="a path, or store and key",
                    remedy="ask twice",
                )
            if item.store or item.key:
                facts = await self._stores().find_object(item.store, item.key)
                if facts is None:
                    return QueryResult(False)
                return QueryResult(True, facts.nbytes, facts.modified_at, facts.etag)
            status = await asyncio.to_thread(self._roots.look, item.path)
            return QueryResult(False) if status is None else QueryResult(True, status.st_size, status.st_mtime)
        except XferdError as error:
            return QueryResult(False, error=error)


def _check_caller(caller: Caller) -> None:
    if not caller.admin:
        session_of(caller)


def _size(request: RegisterObjectRequest, facts: ObjectFacts | None) -> int:
    """Return the region's size."""
    where = f"object {request.key!r} of store {request.store!r}"
    if facts is None:
        if request.create:
            return request.nbytes
        raise NotFound(f"there is no {where}", remedy="write it first, or register it with create")
    if request.nbytes > facts.nbytes and not request.writable:
        raise OutOfBounds(
            f"{request.nbytes} bytes of {where} of {facts.nbytes}",
            limit=f"{facts.nbytes} bytes",
            remedy="register its present size, or register it as writable to replace it",
        )
    return request.nbytes or facts.nbytes
