"""Where storage pools meet sessions: extents as regions, and what becomes of persistent ones when a session ends.

A persistent region belongs to an agent, by name. While the agent has a session, the region is that session's like any
other; when the session ends, it goes to the keeper, an owner without a session, and keeps its id. The agent's next
session gets it back. After a restart all persistent regions are the keeper's, with new ids.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import structlog

from xferd.api.errors import NotFound, XferdError
from xferd.api.types import SessionId
from xferd.daemon.storage.backing import StorageBacking
from xferd.daemon.storage.opening import open_pool
from xferd.daemon.storage.sealer import StorageSealer
from xferd.daemon.storage.volume import Wanted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xferd.api.types import Access, AllocateRequest, PoolInfo, RegionId, RegionInfo, StorageInfo
    from xferd.daemon.memory.regions import RegionTable
    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.opening import PoolOptions
    from xferd.daemon.storage.pool import StoragePool
    from xferd.daemon.storage.volume import Volume

log = structlog.get_logger(__name__)

KEEPER = SessionId("(persistent)")
"""Owner of persistent regions whose agent has no session; no session has such an id."""


class StorageDesk:
    """Owns the storage pools. A context manager: entering opens the pools, and leaving closes them.

    Args:
        regions: the region table; leaving comes after all sessions have ended.
        pools: as configured.
        node: name of this node.
        node_id: of this node.
    """

    def __init__(self, regions: RegionTable, pools: Sequence[PoolOptions], *, node: str, node_id: str) -> None:
        self._regions = regions
        self._options = tuple(pools)
        self._node = node
        self._node_id = node_id
        self._pools: dict[str, StoragePool] = {}
        self._kept: dict[RegionId, StorageBacking] = {}
        self._scrubbers: list[asyncio.Task[None]] = []
        self._group = asyncio.TaskGroup()
        self.sealer = StorageSealer()

    async def __aenter__(self) -> Self:
        try:
            for options in self._options:
                pool = await open_pool(options, node=self._node, node_id=self._node_id)
                self._pools[pool.name] = pool
                self.sealer.add(pool)
                self._enter(pool)
        except BaseException:
            await self._close_pools()
            raise
        await self._group.__aenter__()
        for pool in self._pools.values():
            self._scrubbers.append(self._group.create_task(pool.scrubber.run(), name=f"scrub {pool.name}"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for scrubber in self._scrubbers:
            scrubber.cancel()
        try:
            await self._group.__aexit__(None, None, None)
        finally:
            await self._close_pools()

    def has(self, pool: str) -> bool:
        """Whether a storage pool has this name."""
        return pool in self._pools

    # ------------------------------------------------------------------------------------ regions

    async def allocate(self, session: SessionId, agent: str, request: AllocateRequest) -> tuple[RegionInfo, ...]:
        """Allocate a group from a storage pool, all or none; persistent regions are on the disk when this returns.

        Raises:
            PoolExhausted: no directory has room for the whole group, or for its journal.
            MoveFailed: a disk failed.
            Overloaded, Closed: the region table.
        """
        pool = self._pools[request.pool]
        wanted = Wanted(agent, request.label, request.access, request.persistent)
        volume, extents = await pool.allocate(request.nbytes, wanted)
        try:
            return self._add(session, pool, volume, extents)
        except BaseException:
            await pool.free((volume, extent) for extent in extents)
            raise

    async def free(self, backings: Iterable[StorageBacking]) -> None:
        """Give back the extents of regions that were taken out of the table.

        Raises:
            PoolExhausted, MoveFailed: it cannot be written down; persistent regions are there again after a restart.
        """
        by_pool: dict[StoragePool, list[tuple[Volume, Extent]]] = {}
        for backing in backings:
            by_pool.setdefault(backing.pool, []).append((backing.volume, backing.extent))
            if backing.region is not None:
                self._kept.pop(backing.region, None)
        errors: list[XferdError] = []
        for pool, extents in by_pool.items():
            try:
                await pool.free(extents)
            except XferdError as error:
                log.error("storage_free_failed", pool=pool.name, extents=len(extents), error=str(error))
                errors.append(error)
        if errors:
            raise errors[0]

    def keep(self, session: SessionId) -> None:
        """Take a session's persistent regions over, before it retires."""
        kept = [info.id for info in self._regions.owned_by(session) if info.persistent]
        if kept:
            self._regions.move(kept, KEEPER)

    def adopt(self, session: SessionId, agent: str) -> None:
        """Give a new session the persistent regions of its agent."""
        mine = [info.id for info in self._regions.owned_by(KEEPER) if info.agent == agent]
        if mine:
            self._regions.move(mine, session)

    async def handed_over(self, infos: Iterable[RegionInfo]) -> None:
        """Write down that persistent regions have another agent.

        Raises:
            PoolExhausted, MoveFailed: it cannot be; after a restart the former agent has them.
        """
        changed: dict[tuple[Volume, str, Access], list[Extent]] = {}
        for info in infos:
            backing = self._kept.get(info.id)
            if backing is not None:
                changed.setdefault((backing.volume, info.agent, info.access), []).append(backing.extent)
        for (volume, agent, access), extents in changed.items():
            await volume.own(extents, agent, access)

    # ------------------------------------------------------------------------------------ look

    def infos(self) -> list[PoolInfo]:
        """Return the pools as pools."""
        return [pool.info() for pool in self._pools.values()]

    def statistics(self) -> list[StorageInfo]:
        """Return what storage pools have beyond that."""
        return [pool.statistics() for pool in self._pools.values()]

    async def scrub(self, name: str) -> StorageInfo:
        """Read all sealed blocks of a pool now.

        Raises:
            NotFound: no storage pool has the name.
            MoveFailed, ShortTransfer: it cannot be read.
        """
        pool = self._pools.get(name)
        if pool is None:
            raise NotFound(
                f"no storage pool {name!r}",
                limit=f"storage pools: {', '.join(self._pools) or 'none'}",
                remedy="name one of them, or configure it under [[storage_pools]]",
            )
        await pool.scrubber.scrub_once()
        return pool.statistics()

    # ------------------------------------------------------------------------------------ internals

    def _enter(self, pool: StoragePool) -> None:
        """Enter what an earlier start has left, for the keeper."""
        for volume in pool.volumes:
            for extent in list(volume.extents.values()):
                self._add(KEEPER, pool, volume, [extent])

    def _add(
        self, owner: SessionId, pool: StoragePool, volume: Volume, extents: Sequence[Extent]
    ) -> tuple[RegionInfo, ...]:
        backings = [StorageBacking(pool, volume, extent) for extent in extents]
        first = extents[0]
        infos = self._regions.add_group(
            owner,
            first.agent,
            [(backing, backing.extent.nbytes) for backing in backings],
            access=first.access,
            label=first.label,
        )
        for info, backing in zip(infos, backings, strict=True):
            backing.region = info.id
            if backing.is_persistent:
                self._kept[info.id] = backing
        return infos

    async def _close_pools(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
