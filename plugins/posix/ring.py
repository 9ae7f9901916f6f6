"""io_uring, as far as files need it: many reads or writes handed over by one system call, from columns.

The queues are memory shared with the kernel, and numpy sees them as arrays of structures: a batch of requests is one
copy into the submission queue, its results one gather from the completion queue. No row passes through the interpreter,
which is why no binding is used: those fill in one request a call. Where ``_native.c`` was compiled, it makes the turns.

A ring belongs to the thread that made it (``IORING_SETUP_SINGLE_ISSUER``), and the kernel posts completions only inside
that thread's own system calls (``DEFER_TASKRUN``, Linux 6.1). So nothing changes between two calls, and no memory
barriers are needed on any processor. Older kernels, and containers whose filter forbids io_uring, use plain calls.
See ``io_uring_setup(2)``, ``io_uring_enter(2)``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import InternalError, Unsupported
from xferd.plugins.posix.native import Queue

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from xferd.plugins.posix.native import Native

    Requests: TypeAlias = NDArray[np.void]

NOP, READV, WRITEV, READ, WRITE = 0, 1, 2, 22, 23
"""Operations."""

MAX_DEPTH = 4096

_SETUP, _ENTER = 425, 426  # the same on every architecture
_CLAMP, _SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 4, 1 << 12, 1 << 13
_GETEVENTS = 1
_SQES_AT = 0x1000_0000
_SWITCH = Path("/proc/sys/kernel/io_uring_disabled")

_SQ_PLACES = ("head", "tail", "ring_mask", "ring_entries", "flags", "dropped", "array", "reserved")
_CQ_PLACES = ("head", "tail", "ring_mask", "ring_entries", "overflow", "cqes", "flags", "reserved")
_PARAMETERS = np.dtype(
    [
        ("sq_entries", "u4"),
        ("cq_entries", "u4"),
        ("flags", "u4"),
        ("more", "u4", 7),
        ("sq", [*((name, "u4") for name in _SQ_PLACES), ("address", "u8")]),
        ("cq", [*((name, "u4") for name in _CQ_PLACES), ("address", "u8")]),
    ]
)
REQUEST = np.dtype(
    [
        ("operation", "u1"),
        ("flags", "u1"),
        ("priority", "u2"),
        ("fd", "i4"),
        ("offset", "u8"),
        ("address", "u8"),
        ("count", "u4"),
        ("rw_flags", "u4"),
        ("token", "i8"),
        ("rest", "u8", 3),
    ]
)
"""``struct io_uring_sqe``. ``count``: bytes of a READ or WRITE, rows of a READV or WRITEV. ``token`` comes back."""
_WORDS = REQUEST.itemsize // 8
_COMPLETION = np.dtype([("token", "i8"), ("result", "i4"), ("flags", "u4")])

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long] * 7
_syscall.restype = ctypes.c_long


class Ring:
    """A submission and a completion queue. Made, used and closed by one thread; ``close`` may come from another.

    Args:
        depth: how many requests may be under way at once.

    Raises:
        Unsupported: the kernel is too old, or forbids it here; the message says which.
    """

    def __init__(self, depth: int) -> None:
        made = np.zeros(1, _PARAMETERS)
        made["flags"] = _CLAMP | _SINGLE_ISSUER | _DEFER_TASKRUN
        self._fd = int(_syscall(_SETUP, depth, made.ctypes.data, 0, 0, 0, 0))
        if self._fd < 0:
            raise _unsupported(ctypes.get_errno())
        entries, completions = int(made["sq_entries"][0]), int(made["cq_entries"][0])
        sq, cq = made["sq"][0], made["cq"][0]
        nbytes = max(int(sq["array"]) + 4 * entries, int(cq["cqes"]) + _COMPLETION.itemsize * completions)
        try:
            queues = mmap.mmap(self._fd, nbytes)
            requests = mmap.mmap(self._fd, REQUEST.itemsize * entries, offset=_SQES_AT)
        except OSError:
            os.close(self._fd)
            raise
        self.depth = min(depth, entries)
        # Views made once, and of plain types: a turn of the queue takes microseconds, as does each view.
        self._requests: NDArray[np.uint64] = np.frombuffer(requests, np.uint64).reshape(entries, _WORDS)
        completed = np.frombuffer(queues, _COMPLETION, completions, int(cq["cqes"]))
        self._tokens: NDArray[np.int64] = completed["token"]
        self._results: NDArray[np.int32] = completed["result"]
        words = memoryview(queues).cast("I")
        self._sq_tail = words[int(sq["tail"]) // 4 :]
        self._cq_head = words[int(cq["head"]) // 4 :]
        self._cq_tail = words[int(cq["tail"]) // 4 :]
        np.frombuffer(queues, "u4", entries, int(sq["array"]))[:] = np.arange(entries)  # each place is its own number
        self._tail = 0
        self._unsubmitted = 0
        base = np.frombuffer(queues, np.uint8).ctypes.data
        self._queue = Queue(
            self._fd,
            self.depth,
            entries,
            completions,
            base + int(sq["tail"]),
            self._requests.ctypes.data,
            base + int(cq["head"]),
            base + int(cq["tail"]),
            base + int(cq["cqes"]),
        )

    def close(self) -> None:
        """Give it back to the kernel; nothing is under way. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def run(
        self, native: Native, requests: NDArray[np.uint64], results: NDArray[np.int32], batch: int, stop: ctypes.c_int
    ) -> None:
        """Perform requests by compiled code: what ``put``, ``enter`` and ``reap`` do, again and again.

        Waits for at least ``batch`` of them each time. Begins none after a failure, or once ``stop`` is not 0. Nothing
        is under way before and after.

        Raises:
            InternalError: the kernel refused the ring itself; what was submitted may go on.
        """
        left = ctypes.c_uint(0)
        queue, flag = ctypes.addressof(self._queue), ctypes.addressof(stop)
        where = requests.ctypes.data, len(requests), results.ctypes.data
        failed = native.run_ring(queue, *where, batch, flag, ctypes.addressof(left))
        self._tail = self._sq_tail[0]
        if failed:
            raise _refused(failed)

    def put(self, requests: NDArray[np.uint64]) -> None:
        """Queue requests, given as ``words`` of them, which go to the kernel with the next ``enter``.

        With those under way they are at most ``depth``. What they point to stays in place until they have completed.
        """
        count, size = len(requests), len(self._requests)
        at = self._tail & (size - 1)
        first = size - at
        if count <= first:
            self._requests[at : at + count] = requests
        else:
            self._requests[at:] = requests[:first]
            self._requests[: count - first] = requests[first:]
        self._tail = (self._tail + count) & 0xFFFF_FFFF
        self._sq_tail[0] = self._tail
        self._unsubmitted += count

    def enter(self, wanted: int) -> None:
        """Submit what was put, and wait until ``wanted`` more requests have completed, or a few fewer.

        Raises:
            InternalError: the kernel refused the ring itself; what was submitted may go on.
        """
        code = _syscall(_ENTER, self._fd, self._unsubmitted, wanted, _GETEVENTS, 0, 0)
        if code >= 0:
            self._unsubmitted -= code
            return
        failed = ctypes.get_errno()
        if failed not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
            raise _refused(failed)

    def reap(self, results: NDArray[np.int32]) -> tuple[int, int]:
        """Take what has completed: put each result at its token in ``results``.

        Returns how many there were, and the least result, at most 0.
        """
        head, size, done, least = self._cq_head[0], len(self._tokens), 0, 0
        count = (self._cq_tail[0] - head) & 0xFFFF_FFFF
        while done < count:
            at = (head + done) & (size - 1)
            end = min(at + count - done, size)
            part = self._results[at:end]
            results[self._tokens[at:end]] = part
            least = min(least, int(part.min()))
            done += end - at
        self._cq_head[0] = (head + count) & 0xFFFF_FFFF
        return count, least


def words(requests: Requests) -> NDArray[np.uint64]:
    """Return requests as the queue takes them, sharing memory."""
    return requests.view(np.uint64).reshape(len(requests), _WORDS)


def probe(depth: int) -> None:
    """Make a ring and let one request that does nothing pass through it.

    Raises:
        Unsupported: io_uring cannot be used here, and why.
    """
    ring = Ring(depth)
    try:
        ring.put(words(np.zeros(1, REQUEST)))
        results = np.full(1, -1, np.int32)
        try:
            ring.enter(1)
        except InternalError as exc:
            raise Unsupported(f"io_uring: {exc}", remedy="allow io_uring_enter to the daemon") from exc
        if ring.reap(results) != (1, 0) or results[0]:
            raise Unsupported("io_uring does not answer", remedy='set backends.posix.engine = "threads"')
    finally:
        ring.close()


def _refused(code: int) -> InternalError:
    return InternalError(f"io_uring_enter: {os.strerror(code)}", remedy='set backends.posix.engine = "threads"')


def _unsupported(code: int) -> Unsupported:
    reasons = {
        errno.ENOSYS: "the kernel has none, or a filter forbids it",
        errno.EPERM: f"it is forbidden here ({_switch()})",
        errno.EINVAL: "the kernel is older than 6.1",
        errno.ENOMEM: "no memory to lock",
    }
    name = errno.errorcode.get(code, str(code))
    return Unsupported(
        f"io_uring: {name}: {reasons.get(code, os.strerror(code))}",
        remedy="allow it to the daemon (seccomp profile, kernel.io_uring_disabled), or run Linux 6.1 or newer",
    )


def _switch() -> str:
    try:
        return f"kernel.io_uring_disabled = {_SWITCH.read_text().strip()}"
    except OSError:
        return "a seccomp filter"
