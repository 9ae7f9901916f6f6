"""What a region's bytes rest on: a piece of a pool, a client's memfd, a client's private memory, an open file.

A backing owns exactly what its ``close`` gives back. The region table keeps backings and never closes one itself:
it hands them out when a region is removed, and the caller closes them, away from the table's lock. Not here: who
may touch a region (``regions.py``), how files are opened (``files.py``), pools (``pool.py``).
"""

from __future__ import annotations

import abc
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import (
    InvalidArgument,
    MoveFailed,
    OutOfBounds,
    PermissionDenied,
    Unavailable,
    XferdError,
)
from xferd.api.types import MemoryKind, RegionSource
from xferd.daemon.memory.mapping import Mapping
from xferd.plugins.base import FileSpace, MappedSpace, ProcessSpace, Space
from xferd.plugins.vectored import copy_process, has_ended, iov_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from xferd.api.types import PeerCredentials
    from xferd.daemon.memory.pool import HostPool

USER_SPACE_END = 1 << 56
"""No user address lies beyond it: 5-level page tables, the widest that Linux has, end user space here."""

_MAPPED = MappedSpace()


class Backing(abc.ABC):
    """What the region table needs to know of any backing. The values never change during its life.

    Attributes:
        kind: the kind of memory.
        source: where the bytes live.
        space: the space in which ``position`` has a meaning.
        position: the region's first byte: an address, or an offset in a file.
        device: number of the GPU, 0 for what has none.
        pool_name: the pool, or "".
        pool_offset: offset in the pool, or 0.
        path: the file's resolved path, or "".
        outlives_client: whether the bytes stay when the client that registered them ends, so that the region can be
            handed over to another one.
        is_persistent: whether the region outlives its session, and the daemon.
    """

    kind: MemoryKind = MemoryKind.DRAM
    source: RegionSource
    space: Space = _MAPPED
    position: int = 0
    device: int = 0
    pool_name: str = ""
    pool_offset: int = 0
    path: str = ""
    outlives_client: bool = False
    is_persistent: bool = False
    _closed = False

    def close(self) -> None:
        """Give back what the backing owns; no byte of it may be moving. Thread-safe against other backings.

        Twice is fine. May block: a pool's pages are wiped, a mapping is torn down; call it from a thread where a
        region has hundreds of MiB.
        """
        if not self._closed:
            self._closed = True
            self._close()

    @abc.abstractmethod
    def _close(self) -> None:
        """Give it back; called once."""


class PoolBacking(Backing):
    """An extent of a pool; ``close`` frees it. ``address`` is the extent's own, not the pool's."""

    source = RegionSource.POOL
    outlives_client = True

    def __init__(self, pool: HostPool, offset: int, address: int) -> None:
        self.pool = pool
        self.pool_name = pool.name
        self.pool_offset = offset
        self.position = address

    def detach(self) -> list[int]:
        """Hand over what ``close`` would free: the extent's offset, or nothing where it was closed before."""
        was_closed, self._closed = self._closed, True
        return [] if was_closed else [self.pool_offset]

    def _close(self) -> None:
        self.pool.free(self.pool_offset)


class MemfdBacking(Backing):
    """A client's memfd, mapped shared into the daemon. Owns the mapping; no fd stays open.

    Made by ``open_memfd``, which checks what a stranger's fd may be. ``writable`` says how it could be mapped. ``host``
    is its number with device workers, which ``DeviceDesk.let_go`` takes back; 0 where they do not know of it.
    """

    source = RegionSource.MEMFD
    outlives_client = True

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.position = mapping.address
        self.nbytes = mapping.nbytes
        self.writable = mapping.writable
        self.host = 0

    def view(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Return the bytes as numpy sees them."""
        return self._mapping.view()

    def _close(self) -> None:
        self._mapping.close()


class PrivateBacking(Backing):
    """A span of a client's private memory. Owns nothing: the pidfd belongs to the session's ``ClientProcess``."""

    source = RegionSource.PRIVATE

    def __init__(self, pid: int, pidfd: int, address: int) -> None:
        self.space = ProcessSpace(pid, pidfd)
        self.position = address

    def _close(self) -> None:
        pass


class FileBacking(Backing):
    """An open regular file; ``close`` closes the fd.

    Args:
        fd: owned by the backing from now on.
        path: resolved, for records.
        source: PATH or FD.
        nbytes: as found when it was opened, or 0.
    """

    kind = MemoryKind.FILE
    outlives_client = True

    def __init__(self, fd: int, path: str, source: RegionSource, nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self.space = FileSpace(fd, path)
        self.path = path
        self.source = source
        self.fd = fd

    def _close(self) -> None:
        os.close(self.fd)


@dataclass(slots=True)
class ClientProcess:
    """The process behind a session, pinned by a pidfd; the session owns it and closes it after its regions.

    All private regions of a session share the pidfd, so that they are one space to the planner.
    """

    pid: int
    uid: int
    pidfd: int

    @classmethod
    def open(cls, credentials: PeerCredentials) -> ClientProcess:
        """Pin the process that the kernel named at the other end of the socket.

        Raises:
            Unavailable: it has gone already.
        """
        try:
            pidfd = os.pidfd_open(credentials.pid)
        except ProcessLookupError as exc:
            raise Unavailable(f"process {credentials.pid} has gone", remedy="open a new session") from exc
        return cls(credentials.pid, credentials.uid, pidfd)

    def close(self) -> None:
        """Let go of the process. Twice is fine."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def close_backings(backings: Iterable[Backing]) -> None:
    """Close many at once: extents of one pool are freed as a group, which is far quicker than one by one.

    Blocks as ``Backing.close`` does.
    """
    extents: dict[HostPool, list[int]] = {}
    for backing in backings:
        if isinstance(backing, PoolBacking):
            extents.setdefault(backing.pool, []).extend(backing.detach())
        else:
            backing.close()
    for pool, offsets in extents.items():
        pool.free_group(offsets)


def open_memfd(fd: int, nbytes: int = 0) -> MemfdBacking:
    """Map the first ``nbytes`` bytes of a client's memfd, 0 for all of it. The fd stays the caller's, to be closed.

    A memfd that can shrink is refused: touching a page that has gone would kill the daemon with SIGBUS. The seal is
    added here where the client has not.

    Raises:
        InvalidArgument: not a memfd, or one that cannot be sealed, or empty.
        OutOfBounds: smaller than ``nbytes``.
    """
    _seal(fd)
    size = os.fstat(fd).st_size
    wanted = _checked_size(nbytes, size, "memfd", "ftruncate it before registering")
    try:
        mapping = Mapping(fd, wanted)
    except PermissionError:  # opened read-only, or sealed against writing
        mapping = _mapped_read_only(fd, wanted)
    return MemfdBacking(mapping)


def open_passed_fd(fd: int, nbytes: int = 0, *, writable: bool) -> FileBacking:
    """Check a client's fd of a regular file and take it over; ``nbytes`` 0 takes the file's present size.

    The backing owns the fd once this returns; where it raises, the fd stays the caller's.

    Raises:
        InvalidArgument: not a regular file, opened the wrong way, or empty.
        OutOfBounds: the file is smaller than ``nbytes``.
    """
    status, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
    if not stat.S_ISREG(status.st_mode) or flags & os.O_PATH:
        raise InvalidArgument(
            "the file descriptor is not an open regular file",
            limit="regular files",
            remedy="open the file with O_RDONLY or O_RDWR; memfds are registered as memfds",
        )
    mode = flags & os.O_ACCMODE
    if mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
        raise InvalidArgument(
            f"the file is opened {'write-only' if mode == os.O_WRONLY else 'read-only'}",
            limit="O_RDWR" if writable else "O_RDONLY or O_RDWR",
            remedy="open it O_RDWR, or register it with writable=false",
        )
    if writable and flags & os.O_APPEND:  # Linux appends then, wherever pwrite was told to write
        raise InvalidArgument("the file is opened O_APPEND", limit="no O_APPEND", remedy="open it without O_APPEND")
    size = _checked_size(nbytes, status.st_size, "file", "extend it before registering")
    return FileBacking(fd, str(Path(f"/proc/self/fd/{fd}").readlink()), RegionSource.FD, size)


def open_private(process: ClientProcess, address: int, nbytes: int) -> PrivateBacking:
    """Check a span of a client's memory; reads one byte at both ends, which blocks for microseconds.

    The bytes are not written back to try writing: a racing client would lose its own write. That a page is
    read-only is found at the first transfer that writes to it.

    Raises:
        InvalidArgument: empty, or outside user space.
        PermissionDenied: another user's process, or the kernel refuses (ptrace scope).
        OutOfBounds: an end is not mapped.
        Unavailable: the process has gone.
    """
    if nbytes <= 0 or address <= 0 or address + nbytes > USER_SPACE_END:
        raise InvalidArgument(
            f"span of {nbytes} bytes at {address:#x}",
            limit=f"at least 1 byte, below {USER_SPACE_END:#x}",
            remedy="register memory that the process has mapped",
        )
    if os.geteuid() not in (0, process.uid):
        raise PermissionDenied(
            f"process {process.pid} runs as uid {process.uid} and the daemon as {os.geteuid()}",
            limit="same user",
            remedy="run both as one user, or allocate from a pool",
        )
    for at in (address, address + nbytes - 1):
        _probe(process, at, nbytes)
    return PrivateBacking(process.pid, process.pidfd, address)


def _mapped_read_only(fd: int, nbytes: int) -> Mapping:
    try:
        return Mapping(fd, nbytes, writable=False)
    except PermissionError as exc:  # Linux before 6.7 refuses any shared mapping under F_SEAL_WRITE
        raise InvalidArgument(
            "the memfd cannot be mapped, not even for reading",
            limit="no F_SEAL_WRITE on this kernel",
            remedy="seal it with F_SEAL_FUTURE_WRITE instead",
        ) from exc


def _checked_size(nbytes: int, size: int, what: str, remedy: str) -> int:
    """Return ``nbytes``, or ``size`` for 0, after checking it against what the fd has."""
    if nbytes < 0 or not size:
        raise InvalidArgument(f"{nbytes} bytes of a {what} of {size}", limit="at least 1 byte", remedy=remedy)
    if nbytes > size:
        raise OutOfBounds(f"{nbytes} bytes of a {what} of {size}", limit=f"{size} bytes", remedy=remedy)
    return nbytes or size


def _probe(process: ClientProcess, at: int, nbytes: int) -> None:
    byte = bytearray(1)
    here = iov_of(byte)
    there = here.copy()
    there[0, 0] = at
    try:
        copy_process(here, there, process.pid, write=False, pidfd=process.pidfd)
    except MoveFailed as exc:
        raise _translated(exc, process, at, nbytes) from exc


def _translated(failure: MoveFailed, process: ClientProcess, at: int, nbytes: int) -> XferdError:
    code = failure.__cause__.errno if isinstance(failure.__cause__, OSError) else None
    if code == errno.ESRCH or has_ended(process.pidfd):
        return Unavailable(f"process {process.pid} has gone", remedy="open a new session")
    if code == errno.EPERM:
        return PermissionDenied(
            f"the kernel does not let the daemon read process {process.pid}",
            limit="ptrace access",
            remedy="call prctl(PR_SET_PTRACER, pid of the daemon) in the client, or allocate from a pool",
        )
    return OutOfBounds(
        f"address {at:#x} of process {process.pid}, an end of the span of {nbytes} bytes, cannot be read",
        limit="memory that the process has mapped",
        remedy="check address and nbytes",
    )


def _seal(fd: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise InvalidArgument(
            "the file descriptor is not a memfd", limit="memfd_create(2)", remedy="register files as files"
        ) from exc
    if seals & fcntl.F_SEAL_SHRINK:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as exc:
        raise InvalidArgument(
            "the memfd is not sealed against shrinking, and the seal cannot be added",
            limit="F_SEAL_SHRINK",
            remedy="create it with MFD_ALLOW_SEALING and open it for writing, or seal it yourself",
        ) from exc
