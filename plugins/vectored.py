"""The one way CPU bytes move: whole iovec tables handed to vectored system calls, with the GIL released.

A table is a numpy array of shape (n, 2), u64: it *is* an array of ``struct iovec``, so no row is ever looked at by
the interpreter while a call succeeds in full. Only where a call stops short (a page border of a dying process, a
full socket buffer) is the table advanced by the bytes that moved. See ``process_vm_readv(2)``, ``readv(2)``.

Measured on two cores: 1024 blocks of 4 KiB between two processes in 0.7 ms.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import pair
from xferd.api.errors import MoveFailed, PeerLost, ShortTransfer, XferdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import IovTable

IOV_MAX = 1024
"""Rows that one system call takes (``UIO_MAXIOV``)."""

MEMMOVE_MAX_PIECES = 4
MEMMOVE_MIN_NBYTES = 4 << 20
"""When ``copy_mapped`` takes ``memmove``: at most so many pieces, of at least so many bytes on average."""

MAX_CALL_NBYTES = 0x7FFF_F000
"""Bytes that one system call moves at most (``MAX_RW_COUNT``)."""

_libc = ctypes.CDLL(None, use_errno=True)
_ssize, _ulong, _int, _ptr, _off = (
    ctypes.c_ssize_t,
    ctypes.c_ulong,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int64,
)

_process_vm_readv = _libc.process_vm_readv
_process_vm_readv.argtypes = [_int, _ptr, _ulong, _ptr, _ulong, _ulong]
_process_vm_readv.restype = _ssize
_process_vm_writev = _libc.process_vm_writev
_process_vm_writev.argtypes = [_int, _ptr, _ulong, _ptr, _ulong, _ulong]
_process_vm_writev.restype = _ssize
_preadv = _libc.preadv64
_preadv.argtypes = [_int, _ptr, _int, _off]
_preadv.restype = _ssize
_pwritev = _libc.pwritev64
_pwritev.argtypes = [_int, _ptr, _int, _off]
_pwritev.restype = _ssize
_sendmsg = _libc.sendmsg
_sendmsg.argtypes = [_int, _ptr, _int]
_sendmsg.restype = _ssize
_recvmsg = _libc.recvmsg
_recvmsg.argtypes = [_int, _ptr, _int]
_recvmsg.restype = _ssize
_recv = _libc.recv
_recv.argtypes = [_int, _ptr, _ulong, _int]
_recv.restype = _ssize


class _MessageHeader(ctypes.Structure):
    """``struct msghdr`` of a 64-bit Linux; only the iovec part is ever set here."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_memmove = _libc.memmove
_memmove.argtypes = [_ptr, _ptr, ctypes.c_size_t]
_memmove.restype = _ptr


def advance(iov: IovTable, moved: int) -> IovTable:
    """Return the rest of a table after its first ``moved`` bytes; the input is not changed."""
    if moved == 0:
        return iov
    ends = np.cumsum(iov[:IOV_MAX, 1])  # what one call moved is within these; only others look further
    if moved > int(ends[-1]):
        ends = np.cumsum(iov[:, 1])
    first = int(np.searchsorted(ends, np.uint64(moved), side="right"))  # a plain int would turn ends into floats
    if first == len(ends):
        return iov[first:]
    skip = np.uint64(moved - (int(ends[first]) - int(iov[first, 1])))
    if not skip:
        return iov[first:]
    rest = iov[first:].copy()
    rest[0, 0] += skip
    rest[0, 1] -= skip
    return rest


def split(iov: IovTable, nbytes: int) -> tuple[IovTable, IovTable]:
    """Return a table's first ``nbytes`` bytes and the rest, cutting a row where the border falls into one.

    ``0 <= nbytes <= total_nbytes(iov)``; the input is not changed, and may be shared with the result.
    """
    rest = advance(iov, nbytes)
    if not len(rest):
        return iov, rest
    count = len(iov) - len(rest)
    cut = int(iov[count, 1]) - int(rest[0, 1])
    if not cut:
        return iov[:count], rest
    head = iov[: count + 1].copy()
    head[count, 1] = cut
    return head, rest


def total_nbytes(iov: IovTable) -> int:
    """Return the sum of a table's rows."""
    return int(iov[:, 1].sum())


def copy_process(local: IovTable, remote: IovTable, pid: int, *, write: bool, pidfd: int = -1) -> int:
    """Copy between this process and process ``pid`` (which may be this one); returns the bytes copied, all of them.

    Args:
        local: spans of this process.
        remote: spans of ``pid``; totals are equal, rows need not pair up.
        pid: the other process.
        write: True copies local to remote, False remote to local.
        pidfd: of ``pid``, to make sure that it still is the same process; -1 for this process.

    Raises:
        MoveFailed: the kernel refused: EFAULT (not mapped), EPERM (ptrace scope, another user), ESRCH (gone).
    """
    call = _process_vm_writev if write else _process_vm_readv
    want, done = total_nbytes(local), 0
    while done < want:
        mine, theirs = local[:IOV_MAX], remote[:IOV_MAX]
        moved = call(pid, mine.ctypes.data, len(mine), theirs.ctypes.data, len(theirs), 0)
        code = ctypes.get_errno() if moved < 0 else 0
        if pidfd >= 0 and has_ended(pidfd):
            raise MoveFailed(
                f"process {pid} ended while its memory was being {'written' if write else 'read'}",
                remedy="register the memory again from the new process",
            )
        if moved <= 0:
            raise _failed("process_vm_writev" if write else "process_vm_readv", code or errno.EFAULT, done, want)
        done += moved
        if done < want:
            local, remote = advance(local, moved), advance(remote, moved)
    return done


def copy_local(source: IovTable, target: IovTable) -> int:
    """Copy within this process; an unmapped page is an error, where a memcpy would be killed by SIGBUS."""
    return copy_process(target, source, os.getpid(), write=False)


def copy_mapped(source: IovTable, target: IovTable) -> int:
    """Copy between mappings of this process that are sure to stay whole; returns the bytes copied, all of them.

    Few large pieces go by ``memmove``: 14 GB/s for one of 256 MiB where ``process_vm_readv`` makes 9.7, a tenth to a
    quarter more for pieces of 8 MiB, less than it for pieces of 2. Many pieces do not: each call takes the
    interpreter lock again, which beside a busy thread cost 255 ms for 128 pieces, where one vectored call took 7.

    Whole means: a memory file that backs a mapping must be sealed against shrinking, or the process is killed.
    """
    rows = len(source) + len(target) - 1
    nbytes = total_nbytes(source)
    if rows > MEMMOVE_MAX_PIECES or nbytes < rows * MEMMOVE_MIN_NBYTES:
        return copy_local(source, target)
    cuts = pair(source[:, 1], target[:, 1])
    starts = source[cuts.left, 0] + cuts.left_skip
    places = target[cuts.right, 0] + cuts.right_skip
    for place, start, size in zip(places.tolist(), starts.tolist(), cuts.nbytes.tolist(), strict=True):
        _memmove(place, start, size)
    return nbytes


def read_file(fd: int, offset: int, target: IovTable) -> int:
    """Read ``target``'s bytes from one place of a file into memory; returns their number, all of them.

    Raises:
        ShortTransfer: the file ends before.
        MoveFailed: the read failed.
    """
    want, done = total_nbytes(target), 0
    while done < want:
        part = target[:IOV_MAX]
        moved = _preadv(fd, part.ctypes.data, len(part), offset + done)
        if moved < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise _failed("preadv", code, done, want)
        if moved == 0:
            raise ShortTransfer(
                f"the file {_path_of(fd)} ended after {done} of {want} bytes at offset {offset}",
                limit=f"file size {os.fstat(fd).st_size}",
                remedy="the file is shorter than its region: it was cut after it was registered",
            )
        done += moved
        if done < want:
            target = advance(target, moved)
    return done


def write_file(fd: int, offset: int, source: IovTable) -> int:
    """Write ``source``'s bytes to one place of a file; returns their number, all of them.

    Raises:
        MoveFailed: the write failed, for example ENOSPC.
    """
    want, done = total_nbytes(source), 0
    while done < want:
        part = source[:IOV_MAX]
        moved = _pwritev(fd, part.ctypes.data, len(part), offset + done)
        if moved <= 0:
            code = ctypes.get_errno() if moved < 0 else errno.EIO
            if code == errno.EINTR:
                continue
            raise _failed("pwritev", code, done, want)
        done += moved
        if done < want:
            source = advance(source, moved)
    return done


def send_all(sock_fd: int, source: IovTable) -> int:
    """Send a table's bytes on a blocking stream socket; returns their number, all of them.

    To break it off from another thread, shut the socket down.

    Raises:
        PeerLost: the connection broke; part of the bytes may have arrived.
        MoveFailed: the memory cannot be read. The stream is out of step then, and good for nothing more.
    """
    want, done, message = total_nbytes(source), 0, _MessageHeader()
    while done < want:
        part = source[:IOV_MAX]
        message.iov, message.iovlen = part.ctypes.data, len(part)
        moved = _sendmsg(sock_fd, ctypes.byref(message), socket.MSG_NOSIGNAL)
        if moved < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise _socket_failed("sendmsg", code, done, want)
        done += moved
        if done < want:
            source = advance(source, moved)
    return done


def recv_all(sock_fd: int, target: IovTable) -> int:
    """Fill a table from a blocking stream socket; returns the bytes received, all of them.

    ``MSG_WAITALL`` makes the kernel fill up to 1024 rows in one call: that the stream comes in small pieces costs
    no trips through the interpreter. To break it off from another thread, shut the socket down.

    Raises:
        PeerLost: the connection broke or ended before; part of the bytes may be in place.
        MoveFailed: the memory cannot be written. The stream is out of step then, and good for nothing more.
    """
    want, done, message = total_nbytes(target), 0, _MessageHeader()
    while done < want:
        part = target[:IOV_MAX]
        message.iov, message.iovlen = part.ctypes.data, len(part)
        moved = _recvmsg(sock_fd, ctypes.byref(message), socket.MSG_WAITALL)
        if moved <= 0:
            code = ctypes.get_errno() if moved < 0 else 0
            if code == errno.EINTR:
                continue
            raise _socket_failed("recvmsg", code, done, want)
        done += moved
        if done < want:
            target = advance(target, moved)
    return done


def discard(sock_fd: int, nbytes: int) -> int:
    """Drop bytes from a blocking TCP socket inside the kernel, with no copy and no buffer; returns their number.

    Raises:
        PeerLost: the connection broke or ended before.
    """
    done = 0
    while done < nbytes:
        moved = _recv(sock_fd, None, min(nbytes - done, MAX_CALL_NBYTES), socket.MSG_TRUNC)
        if moved <= 0:
            code = ctypes.get_errno() if moved < 0 else 0
            if code == errno.EINTR:
                continue
            raise _socket_failed("recv", code, done, nbytes)
        done += moved
    return done


def read_file_spans(fd: int, spans: IovTable, target: IovTable) -> int:
    """Read spans of a file, in order, into memory of the same total; returns the bytes read, all of them.

    Errors as with ``read_file``. One system call per 1024 rows of memory within a span, at least one a span.
    """
    return _move_spans(fd, spans, target, _preadv, read_file)


def write_file_spans(fd: int, spans: IovTable, source: IovTable) -> int:
    """Write memory to spans of a file of the same total, in order; returns the bytes written, all of them.

    Errors as with ``write_file``.
    """
    return _move_spans(fd, spans, source, _pwritev, write_file)


def _move_spans(
    fd: int,
    spans: IovTable,
    memory: IovTable,
    call: Callable[[int, int, int, int], int],
    slowly: Callable[[int, int, IovTable], int],
) -> int:
    """Cut memory at the borders of the spans once, for all spans; then a system call for each span.

    A span that one call did not move in full is done (again, from its start) by ``slowly``, which can tell why.
    """
    cuts = pair(spans[:, 1], memory[:, 1])
    parts = np.empty((len(cuts.nbytes), 2), dtype=np.uint64)
    parts[:, 0] = memory[cuts.right, 0] + cuts.right_skip
    parts[:, 1] = cuts.nbytes
    borders = np.searchsorted(cuts.left, np.arange(len(spans) + 1)).tolist()
    base, done = parts.ctypes.data, 0
    for (offset, nbytes), first, last in zip(spans.tolist(), borders, borders[1:], strict=False):
        rows = last - first
        moved = call(fd, base + first * parts.strides[0], rows, offset) if rows <= IOV_MAX else 0
        done += moved if moved == nbytes else slowly(fd, offset, parts[first:last])
    return done


def has_ended(pidfd: int) -> bool:
    """Return whether the process of a pidfd has ended; does not wait."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def iov_of(buffer: memoryview | bytearray | bytes) -> IovTable:
    """Return a one-row table over a contiguous buffer; the caller keeps the buffer alive while it is used."""
    view = np.frombuffer(buffer, dtype=np.uint8)
    return np.array([[view.ctypes.data, view.nbytes]], dtype=np.uint64)


def _path_of(fd: int) -> str:
    """Return the path of an open file for a message; asked for in failure only."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"of descriptor {fd}"


def _failed(call: str, code: int, done: int, want: int) -> MoveFailed:
    error = OSError(code, os.strerror(code))
    remedies = {
        errno.EFAULT: "the memory is no longer mapped: register it again",
        errno.EPERM: "same user needed, and prctl(PR_SET_PTRACER) where ptrace is restricted",
        errno.ESRCH: "the process has gone",
        errno.ENOSPC: "make room on the file system",
    }
    failure = MoveFailed(
        f"{call}: {errno.errorcode.get(code, code)} after {done} of {want} bytes",
        remedy=remedies.get(code, ""),
    )
    failure.__cause__ = error
    return failure


def _socket_failed(call: str, code: int, done: int, want: int) -> XferdError:
    if code == errno.EFAULT:
        return _failed(call, code, done, want)
    if code == 0:
        return PeerLost(f"the connection ended after {done} of {want} bytes")
    failure = PeerLost(f"{call}: {errno.errorcode.get(code, code)} after {done} of {want} bytes")
    failure.__cause__ = OSError(code, os.strerror(code))
    return failure
