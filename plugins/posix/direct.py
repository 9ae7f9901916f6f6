"""Files past the page cache: which are moved so, what O_DIRECT wants of addresses and offsets, and memory to bounce in.

A file is opened once more, with O_DIRECT, for each chunk: 10 us, and nothing stays open that its region has let go. A
descriptor of a client is never changed, because its flags are the client's too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from pathlib import PurePath
from typing import TYPE_CHECKING, Self

import numpy as np
import structlog

from xferd.api.errors import MoveFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.plugins.base import FileSpace

PAGE_NBYTES = 4096
"""What is assumed of a file system that does not tell."""

MAX_UNIT = 16 << 10
"""A file system that wants more is not moved past its cache: bounce memory has room for a piece and two units."""

MAX_BLOCK_NBYTES = 64 << 10
"""Largest block of a file system; what it reports beyond is a size that it likes."""

MAX_REFUSALS = 256
"""Directories of which it is remembered that O_DIRECT does not work there."""

_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_DIO_AT = 152  # of stx_dio_mem_align in struct statx; stx_dio_offset_align follows
_libc = ctypes.CDLL(None, use_errno=True)

log = structlog.get_logger(__name__)


class DirectFile:
    """A file open with O_DIRECT for one chunk, and without where that is needed. Closed by ``with``.

    Attributes:
        fd: with O_DIRECT.
        offset_unit: what offsets and lengths must be multiples of; a power of two.
        memory_unit: what addresses must be multiples of; a power of two.
        write_unit: what is written past the page cache in whole: a page of it, or a block of the file system.
    """

    __slots__ = ("_opened", "_plain", "_space", "fd", "memory_unit", "offset_unit", "write_unit")

    def __init__(self, space: FileSpace) -> None:
        self._space = space
        self._opened: list[int] = []
        flags = fcntl.fcntl(space.fd, fcntl.F_GETFL)
        self._plain = -1 if flags & os.O_DIRECT else space.fd
        self.fd = space.fd if self._plain < 0 else self._open(os.O_DIRECT)
        try:
            self.memory_unit, self.offset_unit, block_nbytes = _units(self.fd)
        except OSError:
            self.close()
            raise
        self.write_unit = max(self.memory_unit, self.offset_unit, mmap.PAGESIZE, min(block_nbytes, MAX_BLOCK_NBYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plain(self) -> int:
        """Return a descriptor without O_DIRECT, good until ``close``.

        Raises:
            MoveFailed: a client's descriptor has O_DIRECT, and the file cannot be opened without.
        """
        if self._plain < 0:
            try:
                self._plain = self._open(0)
            except OSError as exc:
                raise MoveFailed(
                    f"{self._space.path} is open with O_DIRECT, and cannot be opened without it: {exc.strerror}",
                    limit=f"multiples of {self.offset_unit} bytes",
                    remedy="align offsets and lengths, or let the daemon's user open the file",
                ) from exc
        return self._plain

    def close(self) -> None:
        """Close what was opened here. Twice is fine."""
        while self._opened:
            os.close(self._opened.pop())

    def _open(self, flag: int) -> int:
        mode = fcntl.fcntl(self._space.fd, fcntl.F_GETFL) & os.O_ACCMODE
        fd = os.open(f"/proc/self/fd/{self._space.fd}", mode | flag | os.O_CLOEXEC | os.O_NONBLOCK)
        self._opened.append(fd)
        return fd


class DirectPolicy:
    """Decides which files are moved past the page cache, and remembers where that does not work. Thread-safe.

    Args:
        every: all files.
        below: files below these directories.
    """

    def __init__(self, *, every: bool, below: Sequence[str] = ()) -> None:
        self._every = every
        self._below = tuple(path.rstrip("/") + "/" for path in below)
        self._refusals: dict[str, str] = {}

    def wants(self, space: FileSpace) -> bool:
        """Return whether the configuration asks for it."""
        return self._every or space.path.startswith(self._below or ("\0",))

    def refusal(self, space: FileSpace) -> str:
        """Return why a file that should be is not moved past the cache, as far as is known; or ""."""
        return self._refusals.get(_directory(space), "")

    def open(self, space: FileSpace) -> DirectFile | None:
        """Open a file for one chunk; None where it goes through the page cache. The caller closes it."""
        try:
            is_asked = bool(fcntl.fcntl(space.fd, fcntl.F_GETFL) & os.O_DIRECT)
        except (OSError, ValueError):
            return None  # no descriptor at all: whoever reads or writes it will say so
        if not (is_asked or (self.wants(space) and not self.refusal(space))):
            return None
        try:
            return DirectFile(space)
        except OSError as exc:
            self.refuse(space, exc.strerror or str(exc))
            return None

    def refuse(self, space: FileSpace, reason: str) -> None:
        """Remember that a file cannot be moved past the cache, for its whole directory; said once in the log."""
        directory = _directory(space)
        if directory not in self._refusals and len(self._refusals) < MAX_REFUSALS:
            self._refusals[directory] = reason
            log.warning("direct_refused", directory=directory, reason=reason, instead="through the page cache")


class BounceMemory:
    """Aligned memory of each mover thread, for what O_DIRECT does not take as it lies. Made when first needed.

    Args:
        nbytes: of one thread, in whole pages.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._own = threading.local()
        self._made: list[mmap.mmap] = []

    @property
    def held_nbytes(self) -> int:
        """What all threads together hold."""
        return self.nbytes * len(self._made)

    def address(self) -> int:
        """Return where this thread's memory is; it stays there until ``close``."""
        found: int | None = getattr(self._own, "address", None)
        if found is None:
            memory = mmap.mmap(-1, self.nbytes)
            self._made.append(memory)
            self._own.address = found = np.frombuffer(memory, np.uint8).ctypes.data
        return found

    def close(self) -> None:
        """Unmap all of it; no thread uses it any more. Twice is fine."""
        while self._made:
            self._made.pop().close()


def _directory(space: FileSpace) -> str:
    return str(PurePath(space.path).parent)


def _units(fd: int) -> tuple[int, int, int]:
    """Return what memory and offsets must be multiples of, and the block size; raises OSError where there is no way."""
    found = (ctypes.c_uint32 * 64)()  # struct statx: the mask comes first, then the block size
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    block = 1 << (max(int(found[1]), 1) - 1).bit_length()
    if not found[0] & _STATX_DIOALIGN:
        return PAGE_NBYTES, PAGE_NBYTES, block  # before Linux 6.1, and file systems that do not say
    memory, offset = int(found[_DIO_AT // 4]), int(found[_DIO_AT // 4 + 1])
    if not memory or not offset or max(memory, offset) > MAX_UNIT or (memory & (memory - 1)) or (offset & (offset - 1)):
        raise OSError(errno.EOPNOTSUPP, f"the file system gives no alignment that can be used ({memory}, {offset})")
    return memory, offset, block
