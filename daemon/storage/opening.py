"""Opening a storage pool at the daemon's start: its directories, all of them or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import ConfigError, XferdError
from xferd.daemon.storage.directory import StorageDirectory
from xferd.daemon.storage.pool import StoragePool
from xferd.daemon.storage.volume import Volume
from xferd.plugins.movers import MoverPool

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DirectoryOptions:
    """A directory, and its share of the pool against the others'."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """A pool as configured; ``nbytes`` of all directories together."""

    name: str
    directories: tuple[DirectoryOptions, ...]
    nbytes: int
    slab_nbytes: int
    block_nbytes: int
    has_checksums: bool
    verifies: bool
    scrub_bytes_per_s: int
    movers: int


def shares(options: PoolOptions) -> list[int]:
    """Return the bytes of each directory, by weight, in whole pages."""
    total = sum(each.weight for each in options.directories)
    return [int(options.nbytes * each.weight / total) // 4096 * 4096 for each in options.directories]


async def open_pool(options: PoolOptions, *, node: str, node_id: str) -> StoragePool:
    """Open a pool; its owner closes it.

    Raises:
        ConfigError: a directory is missing, read-only, full, in use, or somebody else's.
        IntegrityError: a directory's files are damaged.
    """
    movers = MoverPool(f"storage-{options.name}", options.movers)
    volumes: list[Volume] = []
    try:
        for each, nbytes in zip(options.directories, shares(options), strict=True):
            directory = await movers.run(_open, each, nbytes, options, node, node_id)
            volumes.append(Volume(directory, each.weight, movers, block_nbytes=options.block_nbytes))
            _tell(options.name, directory)
    except BaseException:
        await _close(volumes, movers)
        raise
    return StoragePool(
        options.name,
        volumes,
        movers,
        has_checksums=options.has_checksums,
        verifies=options.verifies,
        block_nbytes=options.block_nbytes,
        scrub_bytes_per_s=options.scrub_bytes_per_s,
    )


def _open(each: DirectoryOptions, nbytes: int, options: PoolOptions, node: str, node_id: str) -> StorageDirectory:
    try:
        return StorageDirectory(
            Path(each.path),
            pool=options.name,
            node=node,
            node_id=node_id,
            nbytes=nbytes,
            slab_nbytes=options.slab_nbytes,
        )
    except OSError as exc:
        raise ConfigError(f"storage directory {each.path}: {exc.strerror}", remedy="look at it and its disk") from exc


def _tell(pool: str, directory: StorageDirectory) -> None:
    found = directory.recovery
    say = log.info if found.was_clean and not found.torn_nbytes else log.warning
    say(
        "storage_directory_opened",
        pool=pool,
        directory=str(directory.path),
        nbytes=directory.nbytes,
        extents=found.extents,
        was_clean=found.was_clean,
        torn_nbytes=found.torn_nbytes,
        torn_reason=found.torn_reason or None,
        unsealed_extents=found.unsealed_extents,
    )


async def _close(volumes: Sequence[Volume], movers: MoverPool) -> None:
    for volume in volumes:
        try:
            await volume.aclose()
        except XferdError as error:
            log.warning("storage_close_failed", directory=str(volume.directory.path), error=str(error))
    await movers.aclose()
