"""From the configuration tree to what opens a storage pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.daemon.storage.opening import DirectoryOptions, PoolOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.daemon.config_tree import StoragePoolConfig


def storage_options(pools: Iterable[StoragePoolConfig]) -> list[PoolOptions]:
    """Return the options of all pools."""
    return [
        PoolOptions(
            name=pool.name,
            directories=tuple(DirectoryOptions(each.path, each.weight) for each in pool.directories),
            nbytes=pool.nbytes,
            slab_nbytes=pool.slab_nbytes,
            block_nbytes=pool.block_nbytes,
            has_checksums=pool.checksum == "xxh3",
            verifies=pool.verify,
            scrub_bytes_per_s=pool.scrub_rate,
            movers=pool.movers,
        )
        for pool in pools
    ]
