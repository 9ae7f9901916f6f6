"""Group commit: records of many callers go to the disk together, and each caller waits for its own.

While one batch is being written the next one gathers, so that a hundred callers cost two or three flushes and not a
hundred. Used from one event loop; the flush itself runs in a mover thread, one at a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import Closed, XferdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.storage.directory import StorageDirectory
    from xferd.daemon.storage.records import Record
    from xferd.plugins.movers import MoverPool

log = structlog.get_logger(__name__)


class Committer:
    """Writes one directory's records down, in the order in which they were handed in.

    Args:
        directory: whose journal it is; nobody else appends to it meanwhile.
        movers: threads for the flush.
    """

    def __init__(self, directory: StorageDirectory, movers: MoverPool) -> None:
        self._directory = directory
        self._movers = movers
        self._gathering: _Batch | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def commit(self, records: Sequence[Record]) -> None:
        """Return when the records are on the disk.

        Where this raises an error, none of the batch counts. A cancelled call waits all the same, so that
        ``CancelledError`` means: they are on the disk.

        Raises:
            PoolExhausted: no room for the journal.
            MoveFailed: the disk failed.
            Closed: the pool was closed.
        """
        if self._closed:
            raise Closed(f"storage directory {self._directory.path} was closed", remedy="the daemon is stopping")
        batch = self._gathering
        if batch is None:
            batch = self._gathering = _Batch()
        batch.records.extend(records)
        cancelled: asyncio.CancelledError | None = None
        while not batch.is_over:
            try:
                # Whoever gets the turn first writes for all; the others find the batch over when their turn comes.
                async with self._turn:
                    if not batch.is_over:
                        await self._write(batch)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if batch.error is not None:
            raise type(batch.error)(
                batch.error.message, limit=batch.error.limit, remedy=batch.error.remedy
            ) from batch.error
        if cancelled is not None:
            raise cancelled

    async def aclose(self) -> None:
        """Refuse new records and wait for those under way. Twice is fine."""
        self._closed = True
        async with self._turn:
            pass

    async def _write(self, batch: _Batch) -> None:
        if self._gathering is batch:
            self._gathering = None  # what comes from here on waits for the next turn
        try:
            await self._movers.run(self._flush, batch)
        except XferdError as error:
            batch.error = error
            batch.is_over = True

    def _flush(self, batch: _Batch) -> None:
        """Write a batch, in a thread; marks it over itself, so that a cancelled writer leaves no doubt."""
        try:
            self._directory.append(batch.records)
        except XferdError as error:
            batch.error = error
        batch.is_over = True
        if batch.error is None and self._directory.wants_compaction():
            try:
                self._directory.compact()
            except XferdError as error:  # the journal goes on growing, and this is tried again with the next batch
                log.warning("storage_compaction_failed", directory=str(self._directory.path), error=str(error))


class _Batch:
    """Records that go to the disk together."""

    __slots__ = ("error", "is_over", "records")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.is_over = False
        self.error: XferdError | None = None
