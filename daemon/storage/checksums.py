"""xxh3 of blocks, read from a slab. Blocks in system calls and in hashing, both without the GIL: for mover threads."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from xferd.daemon.storage import files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.daemon.storage.catalogue import Extent

READ_NBYTES = 256 << 10
"""Bytes of one read: what is hashed is then still in the processor's cache, and the copy costs next to nothing."""


class DirectReader:
    """Reads a slab past the page cache, so that what is checked is what the disk has. Owns its fd and buffer.

    Where the file system has no O_DIRECT (tmpfs), it reads through the cache. Not thread-safe.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._buffer = mmap.mmap(-1, READ_NBYTES)  # page-aligned, which O_DIRECT wants
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except OSError:
            self._fd = os.open(path, flags)

    def sums(self, extent: Extent, first: int, stop: int) -> NDArray[np.uint64]:
        """Return the xxh3 of blocks; raises as ``files.read_into``."""
        sums = np.empty(stop - first, np.uint64)
        if extent.block_nbytes > len(self._buffer):
            self._buffer.close()
            self._buffer = mmap.mmap(-1, extent.block_nbytes)
        with memoryview(self._buffer) as view:
            for number in range(first, stop):
                offset, nbytes = extent.span(number, number + 1)
                room = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # an extent's room is whole pages
                files.read_into(self._fd, view[:room], offset, self.path)
                sums[number - first] = xxhash.xxh3_64_intdigest(view[:nbytes])
        return sums

    def close(self) -> None:
        """Close the file. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._buffer.close()


def sums_of(fd: int, path: str, extent: Extent, first: int, stop: int) -> NDArray[np.uint64]:
    """Return the xxh3 of blocks ``first`` to ``stop - 1``, through the page cache, where a writer has just put them.

    Raises:
        ShortTransfer: the slab ends before.
        MoveFailed: it cannot be read.
    """
    sums = np.empty(stop - first, np.uint64)
    size = extent.block_nbytes
    buffer = memoryview(bytearray(min(max(READ_NBYTES, size), extent.span(first, stop)[1])))
    per_read = max(len(buffer) // size, 1)
    for at in range(first, stop, per_read):
        to = min(at + per_read, stop)
        offset, nbytes = extent.span(at, to)
        files.read_into(fd, buffer[:nbytes], offset, path)
        for number in range(at, to):
            begin = (number - at) * size
            sums[number - first] = xxhash.xxh3_64_intdigest(buffer[begin : min(begin + size, nbytes)])
    return sums
