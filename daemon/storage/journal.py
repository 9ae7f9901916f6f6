"""The journal file: records appended in batches, each batch on the disk before anyone is told.

Used by one thread at a time, which may block. What the records mean is ``catalogue.py``'s business, gathering them
from many callers ``committing.py``'s.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xferd.api.errors import MoveFailed
from xferd.daemon.storage import files, layout, records

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

RESERVE_NBYTES = 1 << 20
"""Room taken ahead, so that what frees memory can be written down on a file system that is full."""


class Journal:
    """An open journal. Owns its fd.

    Args:
        path: of the file, which is created where it is missing.
        good_nbytes: where its good records end; what is behind is cut off.
        sequence: number of the last good record, of the snapshot's where it has none.

    Attributes:
        nbytes: where its good records end.
        sequence: number of the last one.
        failure: why no batch can be written any more, or "".

    Raises:
        PoolExhausted, PermissionDenied, MoveFailed: it cannot be opened.
    """

    def __init__(self, path: Path, good_nbytes: int, sequence: int) -> None:
        self.path = path
        self.nbytes = good_nbytes
        self.sequence = sequence
        self.failure = ""
        self._reserved = 0
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.ftruncate(self._fd, good_nbytes)
            os.fsync(self._fd)
            files.sync_directory(path.parent)
        except OSError as exc:
            self.close()
            raise files.translated(exc, f"opening {path}") from exc
        self._reserve()

    def append(self, batch: Sequence[records.Record]) -> None:
        """Write records and put them on the disk: all of them when this returns, none that counts when it raises.

        Raises:
            PoolExhausted: no room; the journal is as it was, and a later batch may find room.
            MoveFailed: the disk failed. Nobody knows what is on it then, so that every later batch fails too.
        """
        if self.failure:
            raise MoveFailed(f"{self.path} failed before: {self.failure}", remedy="look at the disk, and restart")
        first = self.sequence + 1
        data = b"".join(records.encode(record, first + i, self.sequence) for i, record in enumerate(batch))
        try:
            files.write_at(self._fd, data, self.nbytes)
        except OSError as exc:
            self._cut()
            raise files.translated(exc, f"writing {self.path}") from exc
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            # The kernel has dropped the pages perhaps, and would report success the next time.
            self.failure = exc.strerror or str(exc)
            raise MoveFailed(
                f"{self.path} cannot be put on the disk: {exc.strerror}", remedy="look at the disk, and restart"
            ) from exc
        self.nbytes += len(data)
        self.sequence += len(batch)
        self._reserve()

    def close(self) -> None:
        """Close the file. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _cut(self) -> None:
        """Take back what was written of a batch that failed."""
        self._reserved = 0
        try:
            os.ftruncate(self._fd, self.nbytes)
        except OSError as exc:
            self.failure = f"cutting it failed: {exc.strerror}"

    def _reserve(self) -> None:
        if self.nbytes + RESERVE_NBYTES // 2 > self._reserved:
            self._reserved = self.nbytes + RESERVE_NBYTES
            files.reserve(self._fd, self._reserved)


def write_snapshot(path: Path, pool_uuid: bytes, content: Iterable[records.Record], sequence: int) -> int:
    """Write a snapshot whose last record has the number after all of the content; returns that number.

    Raises:
        PoolExhausted, PermissionDenied, MoveFailed: as ``files.replace_whole``; nothing is left behind.
    """
    parts = [records.encode(records.Snapshot(pool_uuid), sequence + 1, sequence)]
    for number, record in enumerate(content, sequence + 2):
        parts.append(records.encode(record, number, sequence))
    last = sequence + len(parts) + 1
    parts.append(records.encode(records.End(len(parts)), last, sequence))
    files.replace_whole(path, b"".join(parts))
    return last


def highest(names: list[str]) -> int:
    """Return the number of the newest snapshot among file names, -1 where there is none."""
    return max(layout.numbers_of(names, "snapshot"), default=-1)
