"""The scrubber: reads all sealed blocks again and again, slowly, to find damage before a reader does.

It reads past the page cache, because what it asks about is the disk, and a piece at a time, each paid for with the
time that the configured rate allows for it. It holds nothing: an extent that is freed or written to meanwhile is
passed over.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import Closed, IntegrityError, XferdError
from xferd.daemon.storage.catalogue import SUMMED, runs_of_equal
from xferd.daemon.storage.checksums import DirectReader
from xferd.daemon.storage.touching import BlockSpan
from xferd.plugins.movers import MoverPool

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from xferd.daemon.storage.catalogue import Extent
    from xferd.daemon.storage.pool import StoragePool
    from xferd.daemon.storage.sealing import Sealing
    from xferd.daemon.storage.volume import Volume

log = structlog.get_logger(__name__)

PIECE_NBYTES = 1 << 20
"""Bytes read at a time: half a millisecond of a fast disk, which no client notices."""

NICE = 10
"""Of the scrubber's thread, against all others of the daemon."""

IDLE_S = 60.0
"""Least time from one pass's begin to the next one's, so that a small pool is not read without end."""


@dataclass(frozen=True, slots=True)
class ScrubProgress:
    """Passes that ended, bytes that were read, and when the last pass ended (UNIX time, 0.0: none has)."""

    passes: int = 0
    nbytes: int = 0
    pass_ended_at: float = 0.0


class Scrubber:
    """Goes over a pool's sealed blocks. ``run`` is a task of the pool's owner.

    Args:
        pool: whose blocks.
        bytes_per_s: most that it reads in a second; 0: ``run`` returns at once, ``scrub_once`` is not slowed.
    """

    def __init__(self, pool: StoragePool, *, bytes_per_s: int) -> None:
        self._pool = pool
        self.bytes_per_s = bytes_per_s
        self.progress = ScrubProgress()
        self._movers = MoverPool(f"scrub-{pool.name}", 1, nice=NICE)

    async def run(self) -> None:
        """Pass over the pool until cancelled."""
        while self.bytes_per_s:
            began = time.monotonic()
            try:
                damaged = await self.scrub_once()
            except Closed:
                return
            except XferdError as error:
                log.error("storage_scrub_failed", pool=self._pool.name, error=str(error))
            else:
                log.debug("storage_scrubbed", pool=self._pool.name, damaged=damaged)
            await asyncio.sleep(max(began + IDLE_S - time.monotonic(), 0.0))

    async def aclose(self) -> None:
        """End the thread, after ``run`` has ended. Twice is fine."""
        await self._movers.aclose()

    async def scrub_once(self) -> int:
        """Pass over all sealed blocks once, and return how many pieces with damage were found.

        Damage is counted and logged, and raises nothing.

        Raises:
            MoveFailed, ShortTransfer: a slab cannot be read.
        """
        damaged = 0
        for volume, sealing in zip(self._pool.volumes, self._pool.sealings, strict=True):
            readers: dict[int, DirectReader] = {}
            try:
                for extent in sorted(volume.extents.values(), key=lambda e: (e.slab, e.offset)):
                    damaged += await self._scrub_extent(volume, sealing, extent, readers)
            finally:
                for reader in readers.values():
                    reader.close()
        now = self.progress
        self.progress = replace(now, passes=now.passes + 1, pass_ended_at=time.time())
        return damaged

    async def _scrub_extent(
        self, volume: Volume, sealing: Sealing, extent: Extent, readers: dict[int, DirectReader]
    ) -> int:
        reader = readers.get(extent.slab)
        if reader is None:
            path = volume.directory.slabs[extent.slab].path
            reader = readers[extent.slab] = await self._movers.run(DirectReader, path)
        damaged = 0
        for span in _pieces(extent):
            if volume.extents.get(extent.id) is not extent:
                break
            if not _is_at_rest(span):
                continue
            opens = extent.opens[span.first : span.stop].copy()
            found: NDArray[np.uint64] = await self._movers.run(reader.sums, *span)
            if volume.extents.get(extent.id) is extent:
                try:
                    sealing.compare(span, opens, found)
                except IntegrityError:  # counted and logged where it was found
                    damaged += 1
            await self._pay(extent.span(span.first, span.stop)[1])
        return damaged

    async def _pay(self, nbytes: int) -> None:
        self.progress = replace(self.progress, nbytes=self.progress.nbytes + nbytes)
        if self.bytes_per_s:
            await asyncio.sleep(nbytes / self.bytes_per_s)


def _pieces(extent: Extent) -> Iterable[BlockSpan]:
    """Yield pieces of an extent's blocks that have a checksum now, each looked at as it is read."""
    step = max(PIECE_NBYTES // extent.block_nbytes, 1)
    for at in range(0, extent.blocks, step):
        state = extent.state[at : at + step] == SUMMED
        for start, stop in runs_of_equal(state):
            if state[start]:
                yield BlockSpan(extent, at + start, at + stop)


def _is_at_rest(span: BlockSpan) -> bool:
    """Whether nobody writes to the blocks, and all have a checksum: what is read from now on can be compared."""
    extent, first, stop = span
    return bool((extent.state[first:stop] == SUMMED).all() and not extent.writers[first:stop].any())
