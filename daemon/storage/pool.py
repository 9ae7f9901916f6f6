"""A storage pool: memory on disks that the daemon owns, over one or several directories.

A group of extents lies in one directory, so that it is there whole or not at all after a crash. What is persistent
outlives its session and the daemon; the rest ends with its session, and after a crash with the next start.

Not here: whose regions the extents are (``desk.py``), proof of their bytes (``sealing.py``), opening (``opening.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api.errors import PoolExhausted
from xferd.api.types import MemoryKind, PoolInfo, StorageDirectoryInfo, StorageInfo
from xferd.daemon.storage.scrub import Scrubber
from xferd.daemon.storage.sealing import ProofCounters, Sealing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.volume import Volume, Wanted
    from xferd.plugins.movers import MoverPool


class StoragePool:
    """Allocates and frees extents. Used from one event loop; owns its volumes and its threads.

    Args:
        name: as configured.
        volumes: at least one.
        movers: threads for what blocks.
        has_checksums: whether sealed blocks get an xxh3.
        verifies: whether every read is compared with them.
        block_nbytes: of a block.
        scrub_bytes_per_s: how fast the scrubber reads; 0 for not at all.
    """

    kind = MemoryKind.FILE

    def __init__(
        self,
        name: str,
        volumes: Sequence[Volume],
        movers: MoverPool,
        *,
        has_checksums: bool,
        verifies: bool,
        block_nbytes: int,
        scrub_bytes_per_s: int,
    ) -> None:
        self.name = name
        self.volumes = tuple(volumes)
        self.has_checksums = has_checksums
        self.verifies = verifies
        self.block_nbytes = block_nbytes
        self.counters = ProofCounters()
        self.sealings = tuple(Sealing(volume, self.counters, has_checksums=has_checksums) for volume in volumes)
        self.scrubber = Scrubber(self, bytes_per_s=scrub_bytes_per_s if has_checksums else 0)
        self._movers = movers
        self._peak_nbytes = 0
        self._failed = 0

    async def allocate(self, sizes: Sequence[int], wanted: Wanted) -> tuple[Volume, list[Extent]]:
        """Return extents for a group, all in one volume and reading as zeros, or none.

        Raises:
            PoolExhausted: no directory has room for the whole group.
            MoveFailed: a disk failed.
        """
        refusal: PoolExhausted | None = None
        for volume in sorted(self.volumes, key=lambda each: each.load):
            try:
                extents = await volume.allocate(sizes, wanted)
            except PoolExhausted as error:
                refusal = error
                continue
            self._peak_nbytes = max(self._peak_nbytes, sum(each.directory.used_nbytes for each in self.volumes))
            return volume, extents
        self._failed += 1
        assert refusal is not None
        raise refusal

    async def free(self, extents: Iterable[tuple[Volume, Extent]]) -> None:
        """Take extents back; raises as ``Volume.free``, after trying all volumes."""
        by_volume: dict[Volume, list[Extent]] = {}
        for volume, extent in extents:
            by_volume.setdefault(volume, []).append(extent)
        errors = []
        for volume, group in by_volume.items():
            try:
                await volume.free(group)
            except Exception as error:  # noqa: BLE001 - the other volumes' extents are freed all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def offset_of(self, volume: Volume, extent: Extent) -> int:
        """Return an extent's offset in the pool, whose directories and slabs stand one behind the other."""
        before = sum(each.directory.nbytes for each in self.volumes[: self.volumes.index(volume)])
        return before + sum(slab.nbytes for slab in volume.directory.slabs[: extent.slab]) + extent.offset

    def info(self) -> PoolInfo:
        """Return statistics; cheap."""
        slabs = [slab.allocator.statistics() for volume in self.volumes for slab in volume.directory.slabs]
        nbytes, used = sum(now.nbytes for now in slabs), sum(now.used_nbytes for now in slabs)
        largest = max(now.largest_free_nbytes for now in slabs)
        free = nbytes - used
        return PoolInfo(
            name=self.name,
            kind=MemoryKind.FILE,
            nbytes=nbytes,
            used_nbytes=used,
            free_nbytes=free,
            largest_free_nbytes=largest,
            fragmentation=1 - largest / free if free else 0.0,
            allocations=sum(now.allocations for now in slabs),
            peak_used_nbytes=max(self._peak_nbytes, used),
            failed_allocations=self._failed,
            mappable=False,
        )

    def statistics(self) -> StorageInfo:
        """Return what a disk pool has beyond a pool; cheap."""
        scrub = self.scrubber.progress
        return StorageInfo(
            pool=self.name,
            checksum="xxh3" if self.has_checksums else "off",
            verify=self.verifies,
            block_nbytes=self.block_nbytes,
            extents=sum(len(volume.extents) for volume in self.volumes),
            persistent_extents=sum(volume.persistent for volume in self.volumes),
            extents_nbytes=sum(volume.extents_nbytes for volume in self.volumes),
            sealed_nbytes=sum(volume.sealed_nbytes for volume in self.volumes),
            damaged_blocks=sum(volume.damaged_blocks for volume in self.volumes),
            sealed_total_nbytes=self.counters.sealed_nbytes,
            verified_total_nbytes=self.counters.verified_nbytes,
            mismatches=self.counters.mismatches,
            scrub_bytes_per_s=self.scrubber.bytes_per_s,
            scrub_passes=scrub.passes,
            scrubbed_total_nbytes=scrub.nbytes,
            scrub_pass_ended_at=scrub.pass_ended_at,
            directories=tuple(_directory_info(volume) for volume in self.volumes),
        )

    async def aclose(self) -> None:
        """Close the volumes, then the threads. Twice is fine. All transfers have come to rest before."""
        try:
            await self.scrubber.aclose()
            for volume in self.volumes:
                await volume.aclose()
        finally:
            await self._movers.aclose()

    def check_invariants(self) -> None:
        """Raise AssertionError or IntegrityError where the books do not agree."""
        for volume in self.volumes:
            volume.check_invariants()


def _directory_info(volume: Volume) -> StorageDirectoryInfo:
    directory = volume.directory
    found = directory.recovery
    return StorageDirectoryInfo(
        path=str(directory.path),
        uuid=directory.superblock.uuid,
        weight=volume.weight,
        nbytes=directory.nbytes,
        used_nbytes=directory.used_nbytes,
        slabs=len(directory.slabs),
        extents=len(volume.extents),
        journal_nbytes=directory.journal_nbytes,
        journal_batches=directory.journal_batches,
        failure=directory.failure,
        was_clean=found.was_clean,
        torn_nbytes=found.torn_nbytes,
        recovered_extents=found.extents,
        unsealed_extents=found.unsealed_extents,
    )
