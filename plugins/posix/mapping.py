"""Reads of what is in the page cache: the file is mapped, and copied from without a system call a block.

A file may be cut while it is read, and the kernel then sends SIGBUS, which ends a process. ``_native.c`` catches it in
the thread that copies, and the bytes are read again by calls, which can say what is wrong. For the same reason whatever
is out of the ordinary is left to calls: files that are not sure to be in the cache, file systems of other machines,
anything but regular files.

Blocks that are to be summed are summed on the way: what is stored to the target and what is summed are the same loads.
So a page that changes meanwhile (a transfer writes to it; the disk's bytes are read anew; somebody else writes to the
file) changes what arrives and what is summed alike. What happens to the target afterwards is not seen.

A mapping is kept for a moment after its last use, because its first pages cost as much as copying them. It holds on to
the file (also to one that is deleted, and to its mount), and so it has an end: ``IDLE_S``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.plugins.posix import xxh3
from xferd.plugins.vectored import total_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import BlockSums, IovTable
    from xferd.plugins.posix.native import Native

MIN_NBYTES = 256 << 10
"""Least that is read by a mapping: what comes before the copy takes 10 us."""

MAX_FILE_NBYTES = 1 << 40
MAX_FILES = 64
"""Mappings at most, of files of at most so many bytes: half of a process's addresses."""

IDLE_S = 2.0
"""A mapping is kept so long after its last use, up to twice that."""

PAST_CACHE_NBYTES = 1 << 20
"""Bytes of a copy from which on the target is not brought into the processor's cache, as in ``local``."""

PROBES = 8
"""Spans of a read that are looked up in the page cache. Where half of a file is there, 255 reads in 256 are found
out; the one that is not is done by page faults, slowly and right."""

_LOCAL = frozenset({0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0xF2F5_2010})
"""File systems of this machine alone (ext4, XFS, Btrfs, tmpfs, F2FS): nobody else changes a page of theirs."""

_CACHESTAT = 451  # the same on every architecture; Linux 6.5
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long] * 6
_syscall.restype = ctypes.c_long
# Not mmap.mmap, which keeps a descriptor of its own.
_mmap = _libc.mmap64
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


@dataclass(slots=True, eq=False)
class _Mapping:
    """A file as it is mapped. ``users`` are reads under way; the last one of a mapping that was dropped unmaps it."""

    address: int
    nbytes: int
    used_at: float = 0.0
    users: int = 0
    is_dropped: bool = False


class Mappings:
    """Mappings of files that were read lately. Thread-safe.

    Args:
        native: what copies.
        clock: in seconds.
    """

    def __init__(self, native: Native, clock: Callable[[], float] = time.monotonic) -> None:
        self._native = native
        self._summer = xxh3.load()
        self._clock = clock
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], _Mapping] = OrderedDict()  # by device and inode

    @property
    def held(self) -> int:
        """Number of files that are mapped."""
        return len(self._held)

    def read(self, fd: int, spans: IovTable, memory: IovTable, sums: BlockSums | None = None) -> bool:
        """Read spans of a file into memory of the same total; False where calls have to do it, all of it.

        ``sums`` are made on the way, where there is a library for it.
        """
        nbytes = total_nbytes(spans)
        if nbytes < MIN_NBYTES:
            return False
        spans, memory = np.ascontiguousarray(spans), np.ascontiguousarray(memory)
        end = int((spans[:, 0] + spans[:, 1]).max())
        mapping = self._take(fd, end)
        if mapping is None:
            return False
        asked = spans.ctypes.data, len(spans), end, PROBES
        room = np.empty_like(spans)
        tables = room.ctypes.data, memory.ctypes.data
        wish = self._summer.wish(sums) if self._summer and sums and len(sums.begin) else None
        try:
            if self._native.read_mapped(
                fd, mapping.address, *asked, *tables, nbytes >= PAST_CACHE_NBYTES, wish and ctypes.byref(wish)
            ):
                return False
        finally:
            self._give_back(mapping)
        if sums is not None and wish is not None:
            sums.is_known[:] = True
        return True

    def drop_idle(self) -> bool:
        """Unmap what nobody has used for a while; returns whether mappings are left. May take milliseconds."""
        before = self._clock() - IDLE_S
        with self._lock:
            idle = [key for key, mapping in self._held.items() if not mapping.users and mapping.used_at <= before]
            dropped = [self._held.pop(key) for key in idle]
            is_left = bool(self._held)
        for mapping in dropped:
            _unmap(mapping)
        return is_left

    def close(self) -> None:
        """Unmap all; no read is under way. Twice is fine."""
        while self._held:
            _unmap(self._held.popitem()[1])

    def _take(self, fd: int, end: int) -> _Mapping | None:
        """Return the mapping of a file, up to ``end`` at least, for one read; None where there can be none."""
        try:
            facts = os.fstat(fd)
        except OSError:
            return None
        if facts.st_size < end or not stat.S_ISREG(facts.st_mode):
            return None
        key = facts.st_dev, facts.st_ino
        with self._lock:
            mapping = self._held.get(key)
            if mapping is None or mapping.nbytes < end:
                mapping = _map(fd, facts.st_size)
                if mapping is None:
                    return None
                self._drop(key)
                while len(self._held) >= MAX_FILES:
                    self._drop(next(iter(self._held)))
                self._held[key] = mapping
            self._held.move_to_end(key)
            mapping.users += 1
            return mapping

    def _give_back(self, mapping: _Mapping) -> None:
        with self._lock:
            mapping.users -= 1
            mapping.used_at = self._clock()
            is_last = mapping.is_dropped and not mapping.users
        if is_last:
            _unmap(mapping)

    def _drop(self, key: tuple[int, int]) -> None:
        mapping = self._held.pop(key, None)
        if mapping is not None:
            mapping.is_dropped = True
            if not mapping.users:
                _unmap(mapping)


def _map(fd: int, nbytes: int) -> _Mapping | None:
    if nbytes > MAX_FILE_NBYTES or _kind_of(fd) not in _LOCAL:
        return None
    address = _mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    return None if address in (None, _FAILED) else _Mapping(address, nbytes)  # no addresses left, for example


def _unmap(mapping: _Mapping) -> None:
    _munmap(mapping.address, mapping.nbytes)


def _kind_of(fd: int) -> int:
    """Return the number of a file system's kind, 0 where there is no telling."""
    found = (ctypes.c_long * 32)()  # struct statfs: the kind comes first
    return 0 if _libc.fstatfs(fd, found) else int(found[0]) & 0xFFFF_FFFF


def is_possible() -> bool:
    """Return whether the kernel tells what is in the page cache; without that, cold files would be read by faults."""
    probe = np.zeros(2, np.uint64)
    answer = _syscall(_CACHESTAT, -1, probe.ctypes.data, 0, 0, 0)
    return bool(answer < 0 and ctypes.get_errno() == errno.EBADF)
