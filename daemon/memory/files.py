"""Opening of files by path, under configured roots and nowhere else.

The kernel walks the path (``openat2``: beneath the root, no symlink, no other mount), so that there is no moment
between a check and the opening in which a directory could be swapped for a symlink. Where ``openat2`` is missing
(before Linux 5.6, or behind a filter) each component is opened by itself with ``O_NOFOLLOW``.

Everything here may block on storage: call it from a thread. Files by passed fd are in ``backing.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xferd.api.errors import (
    Busy,
    InvalidArgument,
    LimitExceeded,
    MoveFailed,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    PoolExhausted,
    XferdError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.api.types import RegisterFileRequest, RegisterObjectRequest

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_RETRIES = 16
"""openat2 reports EAGAIN when the tree is renamed while it walks; it is told so by a writer each time."""

_CREATE_MODE = 0o640

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class OpenedFile(NamedTuple):
    """A checked open file: the fd (the receiver's to close), the region's size, and the resolved path."""

    fd: int
    nbytes: int
    path: str


class FileRoots:
    """The directories below which clients may name files.

    A root may be a symlink itself; below it none is followed. A file system mounted below a root is not entered: it
    is a root of its own where it is listed.

    Args:
        roots: absolute directories; a relative path of a client is below the first.
        use_openat2: False takes the road of old kernels, for tests.
    """

    def __init__(self, roots: Iterable[str | os.PathLike[str]] = (), *, use_openat2: bool = True) -> None:
        self._open_below = _openat2 if use_openat2 else _open_stepwise
        self._roots: tuple[Path, ...] = ()
        self.reload(roots)

    @property
    def roots(self) -> tuple[str, ...]:
        """The roots, as configured."""
        return tuple(str(root) for root in self._roots)

    def reload(self, roots: Iterable[str | os.PathLike[str]]) -> None:
        """Take other roots from now on; files that are open stay open.

        Raises:
            InvalidArgument: a root that is not absolute; nothing is changed.
        """
        paths = tuple(Path(root) for root in roots)
        for path in paths:
            if not path.is_absolute():
                raise InvalidArgument(
                    f"files root {str(path)!r} is not absolute", limit="absolute paths", remedy="start it with /"
                )
        self._roots = paths

    def open_path(self, request: RegisterFileRequest) -> OpenedFile:
        """Open the regular file that a request names, and create or extend it where it says so. Blocks.

        With ``create`` the file has at least ``nbytes`` bytes afterwards, with room for them taken on the file system.
        What was created is removed again, and what was extended is cut again, where that fails.

        Raises:
            PermissionDenied: no roots, a path outside them, ``..``, a symlink, another mount, or no rights.
            NotFound: no such file.
            InvalidArgument: not a regular file, an empty one, or contradicting flags.
            OutOfBounds: the file is smaller than ``nbytes``, and ``create`` is not set.
            PoolExhausted: the file system is full.
        """
        check_flags(request, "a created file")
        root_fd, parts = self._open_root(request.path)
        try:
            fd, created = self._open(root_fd, parts, request)
            try:
                nbytes = _sized(fd, request)
            except BaseException:
                os.close(fd)
                if created:
                    self._unlink(root_fd, parts)
                raise
        finally:
            os.close(root_fd)
        return OpenedFile(fd, nbytes, str(Path(f"/proc/self/fd/{fd}").readlink()))

    def look(self, path: str) -> os.stat_result | None:
        """Return the status of a regular file below a root, None where there is none. Blocks.

        Raises:
            PermissionDenied: as ``open_path`` does.
            InvalidArgument: it is not a regular file.
        """
        root_fd, parts = self._open_root(path)
        try:
            # O_PATH asks for no right to the file itself, as stat does not; of a symlink it opens the link.
            fd = self._open_below(root_fd, parts, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._translated(exc, path) from exc
        finally:
            os.close(root_fd)
        status = os.fstat(fd)
        os.close(fd)
        if stat.S_ISLNK(status.st_mode):
            raise self._outside(path, "a symlink is on the way")
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path)
        return status

    def _open_root(self, path: str) -> tuple[int, tuple[str, ...]]:
        """Open the root of a path; return the descriptor, for the caller to close, and the components below it."""
        root, parts = self._place(path)
        try:
            return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), parts
        except OSError as exc:
            raise NotFound(
                f"the files root {root} cannot be opened: {exc.strerror}", remedy="create it, or change files.roots"
            ) from exc

    def _place(self, path: str) -> tuple[Path, tuple[str, ...]]:
        """Return the root of a path, and the components below it; purely by names."""
        if not self._roots:
            raise PermissionDenied(
                f"file {path!r}: no files roots are configured",
                limit="files.roots = []",
                remedy="list directories under files.roots",
            )
        if not path or "\0" in path:
            raise InvalidArgument(f"file path {path!r}", limit="a name without NUL", remedy="name a file")
        wanted = Path(path)
        if ".." in wanted.parts:
            raise self._outside(path, "it contains '..'")
        if not wanted.is_absolute():
            return self._roots[0], wanted.parts
        names = {spelling: root for root in self._roots for spelling in (root, Path(os.path.realpath(root)))}
        for spelling in sorted(names, key=lambda name: len(name.parts), reverse=True):
            if wanted.is_relative_to(spelling) and wanted != spelling:
                return names[spelling], wanted.relative_to(spelling).parts
        raise self._outside(path, "it is outside the roots")

    def _open(self, root_fd: int, parts: tuple[str, ...], request: RegisterFileRequest) -> tuple[int, bool]:
        # O_NONBLOCK: a fifo must not make the daemon wait for its other end; regular files do not care.
        flags = (os.O_RDWR if request.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            if request.create:
                with contextlib.suppress(FileExistsError):
                    return self._open_below(root_fd, parts, flags | os.O_CREAT | os.O_EXCL), True
            return self._open_below(root_fd, parts, flags), False
        except OSError as exc:
            raise self._translated(exc, request.path) from exc

    def _unlink(self, root_fd: int, parts: tuple[str, ...]) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # it went by itself: nothing to clean up
            parent = self._open_below(root_fd, parts[:-1], flags) if parts[:-1] else os.dup(root_fd)
            try:
                os.unlink(parts[-1], dir_fd=parent)
            finally:
                os.close(parent)

    def _outside(self, path: str, why: str) -> PermissionDenied:
        return PermissionDenied(
            f"file {path!r} is not allowed: {why}",
            limit=f"files.roots = {list(self.roots)}",
            remedy="name a file below a root, without '..' and symlinks",
        )

    def _translated(self, exc: OSError, path: str) -> XferdError:
        code = exc.errno
        if code in (errno.EXDEV, errno.ELOOP):
            why = "a symlink is on the way" if code == errno.ELOOP else "another file system is mounted on the way"
            return self._outside(path, why)
        if code == errno.ENOENT:
            return NotFound(f"no file {path!r} below the roots", remedy="create it, or register it with create")
        if code in (errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
            return _not_regular(path)
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            return PermissionDenied(
                f"file {path!r} cannot be opened: {exc.strerror}",
                limit=f"uid {os.geteuid()}",
                remedy="give the daemon's user rights to it, or pass an fd over the session socket",
            )
        if code in (errno.EMFILE, errno.ENFILE):
            return Overloaded(
                "no file descriptors are left", limit="RLIMIT_NOFILE", remedy="free file regions, or raise LimitNOFILE"
            )
        if code in (errno.ENOSPC, errno.EDQUOT):
            return _full(exc, path)
        if code == errno.EAGAIN:
            return Busy(f"file {path!r} is leased, or its directories keep changing", remedy="try again")
        return InvalidArgument(f"file {path!r}: {exc.strerror}", limit="a regular file", remedy="check the path")


def check_flags(request: RegisterFileRequest | RegisterObjectRequest, created: str) -> None:
    """Check that size and flags of a registration do not contradict each other; ``created`` names what may be made.

    Raises:
        InvalidArgument: they do.
    """
    if request.nbytes < 0 or request.nbytes >= 1 << 63:
        raise InvalidArgument(f"nbytes {request.nbytes}", limit="0 to 2**63 - 1", remedy="give the size in bytes")
    if request.create and not (request.writable and request.nbytes):
        raise InvalidArgument(
            f"create with writable={request.writable} and nbytes={request.nbytes}",
            limit="writable and nbytes",
            remedy=f"{created} needs writable=true and its size",
        )


def _sized(fd: int, request: RegisterFileRequest) -> int:
    """Return the region's size after checking, and where asked extending, the file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(request.path)
    size = status.st_size
    if request.nbytes > size and request.create:
        _extend(fd, size, request)
    elif request.nbytes > size:
        raise OutOfBounds(
            f"{request.nbytes} bytes of file {request.path!r} of {size}",
            limit=f"{size} bytes",
            remedy="register it with create to extend it",
        )
    elif not size:
        raise InvalidArgument(
            f"file {request.path!r} is empty", limit="at least 1 byte", remedy="give nbytes and create"
        )
    return request.nbytes or size


def _extend(fd: int, size: int, request: RegisterFileRequest) -> None:
    try:
        os.posix_fallocate(fd, size, request.nbytes - size)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(exc, request.path) from exc
        if exc.errno in (errno.EFBIG, errno.EINVAL):
            raise LimitExceeded(
                f"file {request.path!r} cannot have {request.nbytes} bytes: {exc.strerror}",
                limit="the file system's largest file",
                remedy="use several files",
            ) from exc
        raise MoveFailed(f"file {request.path!r} cannot be extended: {exc.strerror}") from exc


def _not_regular(path: str) -> InvalidArgument:
    return InvalidArgument(
        f"{path!r} is not a regular file", limit="regular files", remedy="name a file, not a directory or device"
    )


def _full(exc: OSError, path: str) -> PoolExhausted:
    return PoolExhausted(
        f"no room for file {path!r}: {exc.strerror}", limit="the file system", remedy="make room, or ask for less"
    )


# ------------------------------------------------------------------------------------ below a directory


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(root_fd: int, parts: tuple[str, ...], flags: int) -> int:
    """Open a path below a directory in one system call; raises OSError, EXDEV where it would leave."""
    how = _OpenHow(flags, _CREATE_MODE if flags & os.O_CREAT else 0, _RESOLVE)
    path = os.fsencode("/".join(parts))
    code = errno.EAGAIN
    for _ in range(_RETRIES):
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(root_fd),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM) and not _has_openat2():
            return _open_stepwise(root_fd, parts, flags)
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code))


def _has_openat2() -> bool:
    """Whether the system call works at all; a filter may answer EPERM for it, where a path would too."""
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, 0)
    fd = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(-100),  # AT_FDCWD
        ctypes.c_char_p(b"/"),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        return False
    os.close(int(fd))
    return True


def _open_stepwise(root_fd: int, parts: tuple[str, ...], flags: int) -> int:
    """Open a path below a directory component by component; raises OSError as ``_openat2`` does."""
    device = os.fstat(root_fd).st_dev
    at = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            # O_PATH with O_NOFOLLOW opens a symlink itself, so the directory is asked for with O_RDONLY's errors.
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
            status = os.fstat(at)
            if stat.S_ISLNK(status.st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if not stat.S_ISDIR(status.st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if status.st_dev != device:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        fd = os.open(parts[-1], flags | os.O_NOFOLLOW, _CREATE_MODE, dir_fd=at)
    finally:
        os.close(at)
    if os.fstat(fd).st_dev != device:
        os.close(fd)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return fd
