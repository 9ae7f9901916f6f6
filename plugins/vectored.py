"""The one way CPU bytes move: whole iovec tables handed to vectored system calls, with the GIL released.

A table is a numpy array of shape (n, 2), u64: it *is* an array of ``struct iovec``, so no row is ever looked at by
the interpreter while a call succeeds in full. Only where a call stops short (a page border of a dying process, a
full socket buffer) is the table advanced by the bytes that moved. See ``process_vm_readv(2)``, ``readv(2)``.
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
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable

IOV_MAX = 1024
"""Rows that one system call takes (``UIO_MAXIOV``)."""

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
preadv = _libc.preadv64
preadv.argtypes = [_int, _ptr, _int, _off]
preadv.restype = _ssize
pwritev = _libc.pwritev64
pwritev.argtypes = [_int, _ptr, _int, _off]
pwritev.restype = _ssize
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
    if len(iov) == 1:
        return int(iov[0, 1])
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
            raise call_failed("process_vm_writev" if write else "process_vm_readv", code or errno.EFAULT, done, want)
        done += moved
        if done < want:
            local, remote = advance(local, moved), advance(remote, moved)
    return done


def copy_local(source: IovTable, target: IovTable) -> int:
    """Copy within this process; an unmapped page is an error, where a memcpy would be killed by SIGBUS."""
    return copy_process(target, source, os.getpid(), write=False)


def read_file(fd: int, offset: int, target: IovTable) -> int:
    """Read ``target``'s bytes from one place of a file into memory; returns their number, all of them.

    Raises:
        ShortTransfer: the file ends before.
        MoveFailed: the read failed.
    """
    want, done = total_nbytes(target), 0
    while done < want:
        part = target[:IOV_MAX]
        moved = preadv(fd, part.ctypes.data, len(part), offset + done)
        if moved < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise call_failed("preadv", code, done, want)
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
        moved = pwritev(fd, part.ctypes.data, len(part), offset + done)
        if moved <= 0:
            code = ctypes.get_errno() if moved < 0 else errno.EIO
            if code == errno.EINTR:
                continue
            raise call_failed("pwritev", code, done, want)
        done += moved
        if done < want:
            source = advance(source, moved)
    return done


def flush_file(fd: int, path: str) -> None:
    """Put on the disk what was written to a file, by whichever descriptor (``fdatasync``).

    Waits as long as the disk takes.

    Raises:
        MoveFailed: the disk said no, for example EIO; ``__cause__`` is the OSError.
    """
    try:
        os.fdatasync(fd)
    except OSError as exc:
        raise MoveFailed(f"fdatasync of {path}: {exc.strerror}", remedy="check the file system") from exc


def send_all(sock_fd: int, source: IovTable, *, more: bool = False, turn_nbytes: int = MAX_CALL_NBYTES) -> int:
    """Send a table's bytes on a blocking stream socket; returns their number, all of them.

    To break it off from another thread, shut the socket down. A socket with a send timeout (``SO_SNDTIMEO``) is looked
    at each time that it took nothing for so long: where the other side has hung up, it never will. ``more`` says that
    something follows at once: what does not fill a packet then waits for it, so that the other side is woken once
    (``MSG_MORE``). ``turn_nbytes`` is the most that one call moves; see ``turns``.

    Raises:
        PeerLost: the connection broke; part of the bytes may have arrived.
        MoveFailed: the memory cannot be read. The stream is out of step then, and good for nothing more.
    """
    last = socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
    # Only the last call may end with a packet that is not full.
    return _stream(_sendmsg, sock_fd, source, socket.MSG_NOSIGNAL | socket.MSG_MORE, last, turn_nbytes)


def recv_all(sock_fd: int, target: IovTable, *, turn_nbytes: int = MAX_CALL_NBYTES) -> int:
    """Fill a table from a blocking stream socket; returns the bytes received, all of them.

    A socket with a receive timeout (``SO_RCVTIMEO``) is given up when that runs out. ``MSG_WAITALL`` makes the kernel
    fill up to 1024 rows in one call: that the stream comes in small pieces costs no trips through the interpreter. To
    break it off from another thread, shut the socket down. ``turn_nbytes`` is the most that one call moves; see
    ``turns``.

    Raises:
        PeerLost: the connection broke or ended before; part of the bytes may be in place.
        MoveFailed: the memory cannot be written. The stream is out of step then, and good for nothing more.
    """
    return _stream(_recvmsg, sock_fd, target, socket.MSG_WAITALL, socket.MSG_WAITALL, turn_nbytes)


def turns(table: IovTable, turn_nbytes: int) -> Iterator[IovTable]:
    """Cut a table into successive ones that a system call may take: at most ``IOV_MAX`` rows and ``turn_nbytes``.

    A kernel without preemption runs a call to its end, and a call that copies 8 MiB keeps everybody else off its core
    for 3 ms. So a thread that moves much in the background takes turns.
    """
    if len(table) <= IOV_MAX and total_nbytes(table) <= turn_nbytes:
        yield table
        return
    rows = no_longer_than(table, turn_nbytes)
    ends = np.cumsum(rows[:, 1])
    first, start, count = 0, 0, len(rows)
    while first < count:
        stop = int(np.searchsorted(ends, np.uint64(start + turn_nbytes), side="right"))
        stop = min(max(stop, first + 1), first + IOV_MAX)
        yield rows[first:stop]
        first, start = stop, int(ends[stop - 1])


def no_longer_than(table: NDArray[np.uint64], nbytes: int) -> NDArray[np.uint64]:
    """Return a table whose rows are cut to at most so many bytes, in order; the table itself where none is longer.

    The last column is how many bytes a row has. Those before it are positions, which advance together.
    """
    limit, sizes = np.uint64(nbytes), table[:, -1]
    if not (sizes > limit).any():
        return table
    parts = ((sizes + limit - np.uint64(1)) // limit).astype(np.intp)
    rows = np.repeat(table, parts, axis=0)
    before = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
    skip = before.astype(np.uint64) * limit
    rows[:, :-1] += skip[:, np.newaxis]
    rows[:, -1] = np.minimum(rows[:, -1] - skip, limit)
    return rows


def _stream(
    call: Callable[..., int], sock_fd: int, table: IovTable, flags: int, last_flags: int, turn_nbytes: int
) -> int:
    want, done, message = total_nbytes(table), 0, _MessageHeader()
    for part in turns(table, turn_nbytes):
        size = total_nbytes(part)
        while size:
            message.iov, message.iovlen = part.ctypes.data, len(part)
            moved = call(sock_fd, ctypes.byref(message), last_flags if done + size == want else flags)
            if moved <= 0:
                code = ctypes.get_errno() if moved < 0 else 0
                if code == errno.EINTR:
                    continue
                if code == errno.EAGAIN and call is _sendmsg and not has_hung_up(sock_fd):
                    continue
                raise _socket_failed("sendmsg" if call is _sendmsg else "recvmsg", code, done, want)
            done += moved
            size -= moved
            if size:
                part = advance(part, moved)  # the call stopped short: what is left of the turn
    return done


def send_now(sock_fd: int, source: IovTable) -> IovTable:
    """Send what a stream socket takes without waiting; returns the rest of the table, empty if it took all.

    Errors as with ``send_all``.
    """
    part, message = source[:IOV_MAX], _MessageHeader()
    message.iov, message.iovlen = part.ctypes.data, len(part)
    return _after_call(_sendmsg, sock_fd, message, source)


def recv_now(sock_fd: int, target: IovTable) -> IovTable:
    """Fill a table with what a stream socket holds, without waiting; returns the rest, empty if there was enough.

    Errors as with ``recv_all``.
    """
    part, message = target[:IOV_MAX], _MessageHeader()
    message.iov, message.iovlen = part.ctypes.data, len(part)
    return _after_call(_recvmsg, sock_fd, message, target)


def _after_call(call: Callable[..., int], sock_fd: int, message: _MessageHeader, table: IovTable) -> IovTable:
    moved = call(sock_fd, ctypes.byref(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if moved > 0:
        return advance(table, moved)
    code = ctypes.get_errno() if moved < 0 else 0
    if code in (errno.EAGAIN, errno.EINTR):
        return table
    raise _socket_failed("sendmsg" if call is _sendmsg else "recvmsg", code, 0, total_nbytes(table))


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


def is_quiet(sock: socket.socket) -> bool:
    """Whether a connection is up with nothing to read; does not wait."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False  # ended, or the peer talks out of turn


def has_hung_up(sock_fd: int) -> bool:
    """Return whether the other side of a connection will send no more; does not wait, and reads nothing."""
    return _has_come(sock_fd, select.POLLRDHUP)


def read_file_spans(fd: int, spans: IovTable, target: IovTable) -> int:
    """Read spans of a file, in order, into memory of the same total; returns the bytes read, all of them.

    Errors as with ``read_file``. One system call per 1024 rows of memory within a span, at least one a span.
    """
    return _move_spans(fd, spans, target, preadv, read_file)


def write_file_spans(fd: int, spans: IovTable, source: IovTable) -> int:
    """Write memory to spans of a file of the same total, in order; returns the bytes written, all of them.

    Errors as with ``write_file``.
    """
    return _move_spans(fd, spans, source, pwritev, write_file)


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
    return _has_come(pidfd, select.POLLIN)


def _has_come(fd: int, event: int) -> bool:
    poller = select.poll()
    poller.register(fd, event)
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


def call_failed(call: str, code: int, done: int, want: int) -> MoveFailed:
    """Return the error for what the system said of a call, with what to do about it."""
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
        return call_failed(call, code, done, want)
    if code == 0:
        return PeerLost(f"the connection ended after {done} of {want} bytes")
    if code == errno.EAGAIN and call == "sendmsg":
        return PeerLost(f"the other side has hung up, and takes no more after {done} of {want} bytes")
    failure = PeerLost(f"{call}: {errno.errorcode.get(code, code)} after {done} of {want} bytes")
    failure.__cause__ = OSError(code, os.strerror(code))
    return failure
