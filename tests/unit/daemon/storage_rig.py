"""Storage pools for tests, without a daemon: opened in a directory, written to as the engine does, looked into."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.types import Access
from xferd.daemon.storage import records as r
from xferd.daemon.storage.backing import StorageBacking
from xferd.daemon.storage.catalogue import Extent as StoredExtent
from xferd.daemon.storage.opening import DirectoryOptions, PoolOptions, open_pool
from xferd.daemon.storage.sealer import StorageSealer
from xferd.daemon.storage.volume import Wanted
from xferd.plugins.base import Extent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from xferd.daemon.storage.pool import StoragePool

KIB = 1 << 10
NODE = "node-a"


def options(
    *paths: Path,
    name: str = "ssd",
    nbytes: int = 1 << 20,
    slab_nbytes: int = 1 << 20,
    block_nbytes: int = 4 * KIB,
    has_checksums: bool = True,
    verifies: bool = False,
    scrub_bytes_per_s: int = 0,
    weights: Sequence[float] = (),
) -> PoolOptions:
    """Return a small pool's options."""
    shares = weights or [1.0] * len(paths)
    return PoolOptions(
        name,
        tuple(DirectoryOptions(str(path), weight) for path, weight in zip(paths, shares, strict=True)),
        nbytes,
        slab_nbytes,
        block_nbytes,
        has_checksums,
        verifies,
        scrub_bytes_per_s,
        movers=2,
    )


def wanted(agent: str = "agent", label: str = "", *, persistent: bool = True) -> Wanted:
    """Return what an agent asks for."""
    return Wanted(agent, label, Access.READ, persistent)


def pattern(seed: int, nbytes: int) -> bytes:
    """Return bytes that are a seed's own."""
    return np.random.default_rng(seed).bytes(nbytes)


def extent(id_: int, offset: int, nbytes: int, block_nbytes: int) -> StoredExtent:
    """Return an extent of slab 0 that no pool has."""
    place = r.Placed(id_, 0, offset, nbytes)
    return StoredExtent(place, r.Allocate((place,), "a", "", Access.NONE, block_nbytes, 0.0))


class Rig:
    """An open pool, with the engine's way of writing to it."""

    def __init__(self, pool: StoragePool) -> None:
        self.pool = pool
        self.sealer = StorageSealer()
        self.sealer.add(pool)

    async def allocate(self, *sizes: int, agent: str = "agent", label: str = "", persistent: bool = True):
        """Return backings."""
        volume, extents = await self.pool.allocate(sizes, wanted(agent, label, persistent=persistent))
        return [StorageBacking(self.pool, volume, extent) for extent in extents]

    async def write(self, backing: StorageBacking, data: bytes, offset: int = 0, *, fails: bool = False) -> None:
        """Write as a transfer does: announced, moved, sealed; or moved and failed."""
        extents = [span(backing, offset, len(data))]
        ticket = await self.sealer.begin(extents)
        os.pwrite(backing.space.fd, data, backing.position + offset)
        if fails:
            self.sealer.abandon(ticket)
        else:
            await self.sealer.seal(ticket)

    async def verify(self, backing: StorageBacking, offset: int = 0, nbytes: int = 0, *, is_asked: bool = True) -> None:
        """Verify as a reader who asked for it."""
        await self.sealer.verify([span(backing, offset, nbytes or backing.extent.nbytes)], is_asked=is_asked)

    async def free(self, *backings: StorageBacking) -> None:
        """Free them."""
        await self.pool.free((backing.volume, backing.extent) for backing in backings)

    def backings(self) -> list[StorageBacking]:
        """Return backings of all extents."""
        return [
            StorageBacking(self.pool, volume, extent)
            for volume in self.pool.volumes
            for extent in volume.extents.values()
        ]


def span(backing: StorageBacking, offset: int, nbytes: int) -> Extent:
    """Return a span of a backing as the engine has it."""
    return Extent(backing.space, np.array([[backing.position + offset, nbytes]], dtype=np.uint64))


def read(backing: StorageBacking, offset: int = 0, nbytes: int = 0) -> bytes:
    """Return bytes of a backing."""
    return os.pread(backing.space.fd, nbytes or backing.extent.nbytes, backing.position + offset)


def damage(backing: StorageBacking, offset: int) -> None:
    """Change one byte on the disk behind the pool's back."""
    (byte,) = os.pread(backing.space.fd, 1, backing.position + offset)
    os.pwrite(backing.space.fd, bytes([byte ^ 0x40]), backing.position + offset)
    os.fsync(backing.space.fd)


@asynccontextmanager
async def opened(*paths: Path, node: str = NODE, **kwargs) -> AsyncIterator[Rig]:
    """Open a pool for the length of a block, which ends in order."""
    pool = await open_pool(options(*paths, **kwargs), node=node, node_id="0" * 32)
    try:
        yield Rig(pool)
        pool.check_invariants()
    finally:
        await pool.aclose()


def facts(extents: dict[int, StoredExtent]) -> dict[int, tuple[object, ...]]:
    """Return what a catalogue says, to be compared."""
    return {
        e.id: (
            e.slab,
            e.offset,
            e.nbytes,
            e.agent,
            e.label,
            e.access,
            e.state.tobytes(),
            e.sums[e.state == 2].tobytes(),
        )
        for e in extents.values()
        if e.is_persistent
    }
