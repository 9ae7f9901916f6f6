"""An extent of a storage pool as a region's backing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api.types import MemoryKind, RegionSource
from xferd.daemon.memory.backing import Backing
from xferd.plugins.base import FileSpace

if TYPE_CHECKING:
    from xferd.api.types import RegionId
    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.pool import StoragePool
    from xferd.daemon.storage.volume import Volume


class StorageBacking(Backing):
    """An extent of a storage pool: a span of a slab, whose fd is the pool's.

    ``region`` is the id under which the table has it. ``close`` does nothing, because giving an extent back waits for
    the disk: ``StorageDesk.free`` does it.
    """

    kind = MemoryKind.FILE
    source = RegionSource.POOL
    outlives_client = True

    def __init__(self, pool: StoragePool, volume: Volume, extent: Extent) -> None:
        slab = volume.directory.slabs[extent.slab]
        self.pool = pool
        self.volume = volume
        self.extent = extent
        self.space = FileSpace(slab.fd, slab.path)
        self.position = extent.offset
        self.pool_name = pool.name
        self.pool_offset = pool.offset_of(volume, extent)
        self.path = slab.path
        self.is_persistent = extent.is_persistent
        self.region: RegionId | None = None

    def _close(self) -> None:
        pass
