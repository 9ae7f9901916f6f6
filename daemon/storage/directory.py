"""One directory of a storage pool: opened and checked at a start, its slabs, and what is written down about them.

Bookkeeping (``place``, ``give_back``) is quick and does no I/O; the rest blocks and is called from threads, ``append``
and ``compact`` by one at a time. ``pool.py`` sees to both.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError, IntegrityError, PoolExhausted, XferdError
from xferd.daemon.memory.allocator import ExtentAllocator
from xferd.daemon.storage import files, layout, records
from xferd.daemon.storage.catalogue import ALIGN_NBYTES, Extent
from xferd.daemon.storage.journal import Journal, write_snapshot
from xferd.daemon.storage.layout import Superblock
from xferd.daemon.storage.loading import Loaded, load

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

COMPACT_NBYTES = 4 << 20
"""A journal is folded into a new snapshot once it has so many bytes, and more than the snapshot it goes on from."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a start found.

    Attributes:
        was_clean: the last user of the directory ended in order, or there was none.
        torn_nbytes: bytes cut off the journal, of what was never acknowledged.
        torn_reason: what was wrong with them, or "".
        extents: how many there are.
        unsealed_extents: those with a block whose bytes are not proven.
    """

    was_clean: bool
    torn_nbytes: int
    torn_reason: str
    extents: int
    unsealed_extents: int


class Slab:
    """A slab file and where its bytes go. ``fd`` is the directory's."""

    __slots__ = ("allocator", "fd", "has_unsynced_wipes", "nbytes", "number", "path")

    def __init__(self, number: int, path: Path, fd: int, nbytes: int) -> None:
        self.number = number
        self.path = str(path)
        self.fd = fd
        self.nbytes = nbytes
        self.allocator = ExtentAllocator(nbytes, ALIGN_NBYTES)
        self.has_unsynced_wipes = False


class StorageDirectory:
    """An open directory. Owns its lock, its slabs' fds and its journal.

    Args:
        path: of the directory; it is there.
        pool: name of the pool that it is of.
        node: name of this node; a directory of another one is refused.
        node_id: of this node, written down for people.
        nbytes: of all its slabs; may grow from one start to the next.
        slab_nbytes: of one slab, for those that are made now.

    Raises:
        ConfigError: missing, read-only, in use, another pool's or daemon's, something else's, or no room.
        IntegrityError: its files are damaged.
    """

    def __init__(self, path: Path, *, pool: str, node: str, node_id: str, nbytes: int, slab_nbytes: int) -> None:
        self.path = path
        self.slabs: list[Slab] = []
        self._journal: Journal | None = None
        files.must_exist(path)
        self._lock_fd = files.lock_directory(path)
        self.compact_nbytes = COMPACT_NBYTES
        self._allocating = threading.Lock()
        self._snapshot_nbytes = 0
        self._compaction_failed_at = 0
        self._batches = 0
        try:
            is_new = self._is_new()
            self.superblock = self._made(pool, node, node_id) if is_new else self._checked(pool, node)
            self._open_slabs(nbytes, slab_nbytes, is_new=is_new)
            loaded = self._loaded()
            self.catalogue = loaded.catalogue
            self.recovery = self._recover(loaded, is_new=is_new)
        except BaseException:
            self._close_files()
            raise

    # ----------------------------------------------------------------------------------- bookkeeping

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self.slabs)

    @property
    def used_nbytes(self) -> int:
        """Bytes that extents take."""
        return sum(slab.allocator.statistics().used_nbytes for slab in self.slabs)

    @property
    def journal_nbytes(self) -> int:
        """Size of the journal, 0 once it is closed."""
        return self._journal.nbytes if self._journal else 0

    @property
    def journal_batches(self) -> int:
        """How many batches were written since the start."""
        return self._batches

    @property
    def failure(self) -> str:
        """Why nothing can be written down any more, or ""."""
        return self._journal.failure if self._journal else ""

    @property
    def journal(self) -> Journal:
        """The open journal."""
        assert self._journal is not None
        return self._journal

    def place(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (slab, offset) for each size, all or none; in one slab where that goes.

        Raises:
            PoolExhausted: no room for the whole group.
        """
        with self._allocating:
            for slab in self.slabs:
                free = slab.allocator.statistics()
                if sum(sizes) <= free.free_nbytes and max(sizes) <= free.largest_free_nbytes:
                    with contextlib.suppress(PoolExhausted):
                        return [(slab.number, offset) for offset in slab.allocator.allocate_group(sizes)]
            return self._scatter(sizes)

    def give_back(self, places: Iterable[tuple[int, int]]) -> None:
        """Take (slab, offset) places back for others; their bytes are wiped already."""
        by_slab: dict[int, list[int]] = {}
        for slab, offset in places:
            by_slab.setdefault(slab, []).append(offset)
        with self._allocating:
            for number, offsets in by_slab.items():
                self.slabs[number].allocator.free_group(offsets)

    # ----------------------------------------------------------------------------- blocking, in threads

    def append(self, batch: Sequence[records.Record]) -> None:
        """Write records down, on the disk when this returns; raises as ``Journal.append``."""
        self.journal.append(batch)
        self._batches += 1

    def wants_compaction(self) -> bool:
        """Whether the journal has grown enough to be folded."""
        return self.journal.nbytes > max(self.compact_nbytes, self._snapshot_nbytes, self._compaction_failed_at * 2)

    def compact(self) -> None:
        """Fold the journal into a new snapshot, made from what is on the disk and not from what is in memory.

        Where it fails before the new snapshot is in place, the old journal goes on.

        Raises:
            PoolExhausted, PermissionDenied, MoveFailed: the file system.
            IntegrityError: what is on the disk is damaged.
        """
        try:
            self._compact(load(self.path))
        except XferdError:
            self._compaction_failed_at = self.journal.nbytes
            raise
        self._compaction_failed_at = 0

    def wipe(self, extents: Iterable[Extent]) -> None:
        """Make extents that are no longer anybody's read as zeros; neighbours in one call.

        Raises:
            MoveFailed, PoolExhausted: the file system refuses; the extents must not be given out again.
        """
        for slab, offset, nbytes in _joined(extents):
            self._wipe(self.slabs[slab], offset, nbytes)

    def sync_wipes(self, slabs: Iterable[int]) -> None:
        """Put wiping on the disk, where some is not: what a persistent extent will show after a power cut."""
        for number in set(slabs):
            slab = self.slabs[number]
            if slab.has_unsynced_wipes:
                slab.has_unsynced_wipes = False
                self.sync(number)

    def sync(self, slab: int) -> None:
        """Put a slab's bytes on the disk.

        Raises:
            MoveFailed: the disk failed; what of it is there is not known.
        """
        try:
            os.fdatasync(self.slabs[slab].fd)
        except OSError as exc:
            raise files.translated(exc, f"putting {self.slabs[slab].path} on the disk") from exc

    def close(self, *, is_clean: bool) -> None:
        """Close all files. Twice is fine.

        Args:
            is_clean: all that was freed has been wiped; the next start is told so.

        Raises:
            PoolExhausted, MoveFailed: the next start cannot be told; all is closed still.
        """
        try:
            if is_clean and self._journal is not None:
                self.append([records.Close()])
        finally:
            self._close_files()

    def check_invariants(self) -> None:
        """Raise AssertionError or IntegrityError where books and catalogue do not agree."""
        self.catalogue.check([slab.nbytes for slab in self.slabs])
        for slab in self.slabs:
            slab.allocator.check_invariants()
            offsets = sorted(e.offset for e in self.catalogue.extents.values() if e.slab == slab.number)
            slab.allocator.check_allocated(offsets)

    # ------------------------------------------------------------------------------------------ opening

    def _is_new(self) -> bool:
        """Whether nobody has finished making this directory; one that holds anything else is refused."""
        names = os.listdir(self.path)  # noqa: PTH208 - names, not paths
        strangers = [name for name in names if not layout.is_ours(name)]
        if layout.SUPERBLOCK in names:
            return False
        if layout.numbers_of(names, "journal"):  # the first one is made after the superblock
            raise IntegrityError(
                f"storage directory {self.path} has lost its superblock", remedy="restore it from a copy, or empty it"
            )
        if strangers:
            raise ConfigError(
                f"storage directory {self.path} holds {', '.join(sorted(strangers)[:3])}",
                limit="an empty directory, or one of a storage pool",
                remedy="name a directory of its own",
            )
        return True

    def _made(self, pool: str, node: str, node_id: str) -> Superblock:
        for name in os.listdir(self.path):  # noqa: PTH208 - names, not paths
            if name not in (layout.LOCK, "lost+found"):  # a first start that was cut off
                (self.path / name).unlink()
        return Superblock(pool, uuid.uuid4().hex, node, node_id, (), time.time())

    def _checked(self, pool: str, node: str) -> Superblock:
        path = self.path / layout.SUPERBLOCK
        found = Superblock.from_bytes(files.read_whole(path), str(path))
        if (found.pool, found.node) != (pool, node):
            raise ConfigError(
                f"storage directory {self.path} is of pool {found.pool!r} of node {found.node!r} (id {found.node_id}), "
                f"and this is pool {pool!r} of node {node!r}",
                limit="a directory belongs to one pool of one node",
                remedy="name another directory, or hand it over with `xferctl fsck --adopt`",
            )
        return found

    def _open_slabs(self, nbytes: int, slab_nbytes: int, *, is_new: bool) -> None:
        present = self.superblock.slabs
        sizes = layout.cut_into_slabs(nbytes, slab_nbytes, present)
        for number, size in enumerate(sizes):
            path = self.path / layout.slab_name(number)
            made = files.create_slab if number >= len(present) else files.open_slab
            self.slabs.append(Slab(number, path, made(path, size), size))
        if is_new:
            write_snapshot(self.path / layout.snapshot_name(0), uuid.UUID(self.superblock.uuid).bytes, (), 0)
        if sizes != present:
            self.superblock = replace(self.superblock, slabs=sizes)
            self._write_superblock()

    def _write_superblock(self) -> None:
        try:
            files.replace_whole(self.path / layout.SUPERBLOCK, self.superblock.to_bytes())
        except XferdError as error:
            raise ConfigError(error.message, limit=error.limit, remedy=error.remedy) from error

    def _loaded(self) -> Loaded:
        loaded = load(self.path)
        if loaded.catalogue.pool_uuid.hex() != self.superblock.uuid:
            raise ConfigError(
                f"storage directory {self.path} has a snapshot of another pool, {loaded.catalogue.pool_uuid.hex()}",
                limit=f"pool {self.superblock.uuid}",
                remedy="put back the files that belong together",
            )
        loaded.catalogue.check(self.superblock.slabs)
        return loaded

    def _recover(self, loaded: Loaded, *, is_new: bool) -> Recovery:
        """Cut the journal's torn end, place the extents, wipe what may have been left unwiped, and begin."""
        extents = loaded.catalogue.extents.values()
        for slab in self.slabs:
            slab.allocator.take_over((e.offset, e.room) for e in extents if e.slab == slab.number)
        was_clean = is_new or loaded.catalogue.is_closed
        if not was_clean:
            for slab in self.slabs:
                for offset, nbytes in slab.allocator.gaps():
                    self._wipe(slab, offset, nbytes)
        self._snapshot_nbytes = loaded.snapshot_nbytes
        self._journal = Journal(self.path / layout.journal_name(loaded.number), loaded.journal_nbytes, loaded.sequence)
        self._remove_others(loaded.number)
        self.append([records.Start(time.time())])
        if self.wants_compaction():
            self.compact()
        unsealed = sum(e.sealed_nbytes() < e.nbytes for e in extents)
        return Recovery(was_clean, loaded.torn_nbytes, loaded.torn_reason, len(extents), unsealed)

    def _compact(self, loaded: Loaded) -> None:
        number = loaded.number + 1
        path = self.path / layout.snapshot_name(number)
        start = records.Start(time.time())
        sequence = write_snapshot(
            path, uuid.UUID(self.superblock.uuid).bytes, (start, *loaded.catalogue.snapshot()), loaded.sequence
        )
        try:
            fresh = Journal(self.path / layout.journal_name(number), 0, sequence)
        except XferdError:
            path.unlink()  # or the next start would go on from it, without what the old journal is told from now on
            raise
        self.journal.close()
        self._journal, self._snapshot_nbytes = fresh, path.stat().st_size
        self._remove_others(number)

    def _remove_others(self, number: int) -> None:
        """Remove what compactions and cut-off writing left behind; what stays is removed the next time."""
        keep = {layout.snapshot_name(number), layout.journal_name(number)}
        for name in os.listdir(self.path):  # noqa: PTH208 - names, not paths
            is_old = name.startswith(("snapshot.", "journal.")) and name not in keep
            if is_old or (name.endswith(layout.TEMPORARY) and layout.is_ours(name)):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()

    def _close_files(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        for slab in self.slabs:
            if slab.fd >= 0:
                os.close(slab.fd)
                slab.fd = -1
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # ------------------------------------------------------------------------------------------ placing

    def _scatter(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Place members of a group one by one over all slabs, the largest first; on failure give all back."""
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        placed: dict[int, tuple[int, int]] = {}
        for index in order:
            for slab in self.slabs:
                if slab.allocator.statistics().largest_free_nbytes >= sizes[index]:
                    placed[index] = (slab.number, slab.allocator.allocate_group((sizes[index],))[0])
                    break
            else:
                for number, offset in placed.values():
                    self.slabs[number].allocator.free(offset)
                raise self._exhausted(sizes)
        return [placed[index] for index in range(len(sizes))]

    def _exhausted(self, sizes: Sequence[int]) -> PoolExhausted:
        free = [slab.allocator.statistics() for slab in self.slabs]
        return PoolExhausted(
            f"no room for {len(sizes)} extents of {sum(sizes)} bytes together, the largest {max(sizes)}, in "
            f"{self.path}: {sum(now.free_nbytes for now in free)} bytes are free, at most "
            f"{max(now.largest_free_nbytes for now in free)} in one piece",
            limit=f"{self.nbytes} bytes, in slabs of at most {max(slab.nbytes for slab in self.slabs)}",
            remedy="free regions, raise the pool's nbytes, or slab_nbytes for larger regions",
        )

    def _wipe(self, slab: Slab, offset: int, nbytes: int) -> None:
        try:
            files.wipe(slab.fd, offset, nbytes)
        except OSError as exc:
            raise files.translated(exc, f"wiping {nbytes} bytes of {slab.path} at {offset}") from exc
        slab.has_unsynced_wipes = True


def _joined(extents: Iterable[Extent]) -> list[tuple[int, int, int]]:
    """Return (slab, offset, nbytes) of extents' room, with neighbours joined."""
    runs: list[tuple[int, int, int]] = []
    for extent in sorted(extents, key=lambda e: (e.slab, e.offset)):
        if runs and runs[-1][0] == extent.slab and runs[-1][1] + runs[-1][2] == extent.offset:
            slab, offset, nbytes = runs[-1]
            runs[-1] = (slab, offset, nbytes + extent.room)
        else:
            runs.append((extent.slab, extent.offset, extent.room))
    return runs
