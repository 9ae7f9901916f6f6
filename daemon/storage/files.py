"""System calls on a storage directory's files, with errors that say what to do. All of them may block.

What is written to the files, and when, is ``journal.py``'s and ``directory.py``'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from xferd.api.errors import (
    ConfigError,
    IntegrityError,
    MoveFailed,
    PermissionDenied,
    PoolExhausted,
    ShortTransfer,
    XferdError,
)
from xferd.daemon.storage import layout

if TYPE_CHECKING:
    from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ZEROS = bytes(1 << 20)
_MODE = 0o600

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


def translated(exc: OSError, what: str) -> XferdError:
    """Return the error for what the system said about a file of a pool."""
    if exc.errno in _FULL:
        return PoolExhausted(
            f"{what}: {exc.strerror}", limit="the file system", remedy="make room on it, or free regions"
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(
            f"{what}: {exc.strerror}", limit=f"uid {os.geteuid()}", remedy="let the daemon's user write there"
        )
    return MoveFailed(f"{what}: {exc.strerror or exc}", remedy="look at the disk; the kernel's log has more")


def must_exist(path: Path) -> None:
    """Raise ConfigError unless the directory is there; it is never made, in case its file system is not mounted."""
    if not path.is_dir():
        raise ConfigError(
            f"storage directory {path} is {'no directory' if path.exists() else 'missing'}",
            remedy="create it, or mount its file system",
        )


def lock_directory(path: Path) -> int:
    """Return an fd that keeps every other process off the directory for as long as it is open.

    Raises:
        ConfigError: the directory is missing, cannot be written, or another process has it.
    """
    try:
        fd = os.open(path / layout.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as exc:
        is_mounted_ro = exc.errno == errno.EROFS
        remedy = "mount its file system for writing" if is_mounted_ro else "let the daemon's user write there"
        raise ConfigError(f"storage directory {path}: {exc.strerror}", remedy=remedy) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise ConfigError(
            f"storage directory {path} is in use, by process {holder or 'unknown'}",
            limit="one daemon a directory",
            remedy="stop that daemon, or name another directory",
        ) from exc
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def read_whole(path: Path) -> bytes:
    """Return a file's bytes; b"" where there is none.

    Raises:
        MoveFailed: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise translated(exc, f"reading {path}") from exc


def replace_whole(path: Path, data: bytes) -> None:
    """Put a file in place as a whole, on the disk when this returns; after a crash there is the old one or the new.

    Raises:
        PoolExhausted, PermissionDenied, MoveFailed: it cannot be; the old one stands.
    """
    temporary = path.with_name(path.name + layout.TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            write_at(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise translated(exc, f"writing {path}") from exc


def sync_directory(path: Path) -> None:
    """Put a directory's names on the disk; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes; raises OSError, with some of them written perhaps."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_into(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Fill a buffer from a file.

    Raises:
        ShortTransfer: the file ends before.
        MoveFailed: it cannot be read.
    """
    at = 0
    while at < len(buffer):
        try:
            got = os.preadv(fd, [buffer[at:]], offset + at)
        except OSError as exc:
            raise translated(exc, f"reading {path} at {offset + at}") from exc
        if not got:
            raise ShortTransfer(
                f"{path} ends at {offset + at}, before {offset + len(buffer)}", remedy="restore the slab file"
            )
        at += got


def create_slab(path: Path, nbytes: int) -> int:
    """Make a slab file with room for all of its bytes, and return its fd.

    Raises:
        ConfigError: no room, or a file system that cannot hold it; nothing is left behind.
    """
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        os.posix_fallocate(fd, 0, nbytes)
        os.fsync(fd)
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
            path.unlink(missing_ok=True)
        raise ConfigError(
            f"slab {path} of {nbytes} bytes cannot be made: {exc.strerror}",
            limit="room on the file system, and its largest file",
            remedy="lower the pool's nbytes or slab_nbytes, or make room",
        ) from exc
    return fd


def open_slab(path: Path, nbytes: int) -> int:
    """Open a slab that is there, and return its fd.

    Raises:
        IntegrityError: it is missing, or not as large as it was made.
        ConfigError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as exc:
        raise IntegrityError(f"slab {path} is missing", remedy="restore it; xferctl fsck says what it held") from exc
    except OSError as exc:
        raise ConfigError(f"slab {path}: {exc.strerror}", remedy="let the daemon's user read and write it") from exc
    size = os.fstat(fd).st_size
    if size != nbytes:
        os.close(fd)
        raise IntegrityError(f"slab {path} has {size} bytes", limit=f"{nbytes} bytes", remedy="restore it from a copy")
    return fd


def wipe(fd: int, offset: int, nbytes: int, *, use_holes: bool = True) -> None:
    """Make a span of a slab read as zeros, its room kept; raises OSError.

    Where the file system can, this changes its books and no bytes. One that cannot (tmpfs) gets a hole that is filled
    again; one without holes, zeros, as with ``use_holes`` False, which is for tests.
    """
    if use_holes and _supported(fd, _ZERO_RANGE | _KEEP_SIZE, offset, nbytes):
        return
    if use_holes and _supported(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes):
        os.posix_fallocate(fd, offset, nbytes)
        return
    end = offset + nbytes
    for at in range(offset, end, len(_ZEROS)):
        write_at(fd, memoryview(_ZEROS)[: end - at], at)


def _supported(fd: int, mode: int, offset: int, nbytes: int) -> bool:
    """Do it, or return False where the file system never can; raises OSError for any other reason."""
    try:
        _fallocate(fd, mode, offset, nbytes)
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return False
        raise
    return True


def reserve(fd: int, nbytes: int) -> None:
    """Take room for a file up to ``nbytes`` without changing its size, where that can be had; never fails."""
    with contextlib.suppress(OSError):
        _fallocate(fd, _KEEP_SIZE, 0, nbytes)


def _fallocate(fd: int, mode: int, offset: int, nbytes: int) -> None:
    while _libc.fallocate(fd, mode, offset, nbytes):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
