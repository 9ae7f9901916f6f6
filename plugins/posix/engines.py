"""The two ways in which requests reach the kernel: by io_uring, many a system call, or by one call each.

Both run in mover threads and return when nothing is under way any more, whatever happened. What comes back is a count
or an error for each piece; ``settle`` makes of it what a caller may rely on.
"""

from __future__ import annotations

import abc
import ctypes
import errno
import threading
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import structlog

from xferd.api.errors import Cancelled, Unsupported
from xferd.plugins import vectored
from xferd.plugins.posix import ring as uring
from xferd.plugins.posix.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from xferd.plugins.posix.native import Native
    from xferd.plugins.posix.pieces import Pieces
    from xferd.plugins.posix.ring import Requests

log = structlog.get_logger(__name__)

COMPILED_SHARE = 8
"""Compiled code waits for one in so many of the ring's depth at a time."""

_AGAIN = (errno.EINTR, errno.EAGAIN)
"""Of one request: to be done again, by a call that waits."""


class Stop:
    """Says that a move was cancelled. Set on the event loop, looked at in mover threads between two batches."""

    __slots__ = ("flag",)

    def __init__(self) -> None:
        self.flag = ctypes.c_int(0)  # where compiled code sees it too

    @property
    def is_set(self) -> bool:
        """Whether the end was asked for."""
        return bool(self.flag.value)

    def set(self) -> None:
        """Ask for the end."""
        self.flag.value = 1

    def check(self) -> None:
        """Raise ``Cancelled`` where the end was asked for; nothing of the caller's may be under way."""
        if self.is_set:
            raise Cancelled("the move was cancelled")


class Engine(abc.ABC):
    """Performs requests."""

    name: ClassVar[str]

    @abc.abstractmethod
    def perform(self, fd: int, pieces: Pieces, *, write: bool, stop: Stop) -> NDArray[np.int32]:
        """Return for each piece the bytes moved, or the error as a negative number; nothing is under way then.

        After the first real error, or when stopped, pieces that were not begun are left out: they have moved 0 bytes.
        Pieces are ``bounded``.
        """

    def close(self) -> None:
        """Release what it holds; no ``perform`` is under way. Twice is fine."""
        return


class Calls(Engine):
    """One ``preadv`` or ``pwritev`` for each piece. Works everywhere; the interpreter looks at each piece."""

    name: ClassVar[str] = "threads"

    def perform(self, fd: int, pieces: Pieces, *, write: bool, stop: Stop) -> NDArray[np.int32]:
        """Call for each piece in turn."""
        call = vectored.pwritev if write else vectored.preadv
        results = np.zeros(len(pieces), np.int32)
        base, borders = pieces.parts.ctypes.data, pieces.borders.tolist()
        for number, offset in enumerate(pieces.offset.tolist()):
            first = borders[number]
            moved = call(fd, base + 16 * first, borders[number + 1] - first, offset)
            results[number] = moved if moved >= 0 else -ctypes.get_errno()
            if stop.is_set or (moved < 0 and -results[number] not in _AGAIN):
                break
        return results


class Rings(Engine):
    """Batches through io_uring: each mover thread has a ring of its own, made when it first needs one.

    Args:
        depth: requests under way for each thread.
        native: what makes the turns of the queues; None leaves them to the interpreter.
    """

    name: ClassVar[str] = "io_uring"

    def __init__(self, depth: int, native: Native | None = None) -> None:
        self._depth = depth
        self._native = native
        self._own = threading.local()
        self._rings: list[Ring] = []
        self._calls = Calls()

    def perform(self, fd: int, pieces: Pieces, *, write: bool, stop: Stop) -> NDArray[np.int32]:
        """Keep up to ``depth`` requests under way."""
        try:
            ring = self._ring()
        except Unsupported as error:  # no descriptor or memory left for one more ring
            log.warning("ring_not_made", reason=str(error), instead=Calls.name)
            return self._calls.perform(fd, pieces, write=write, stop=stop)
        requests = uring.words(_requests(fd, pieces, write=write))
        results = np.zeros(len(requests), np.int32)
        if self._native is not None:
            ring.run(self._native, requests, results, max(1, ring.depth // COMPILED_SHARE), stop.flag)
        else:
            _turn(ring, requests, results, stop)
        return results

    def close(self) -> None:
        """Close the rings of all threads."""
        while self._rings:
            self._rings.pop().close()

    def _ring(self) -> Ring:
        ring: Ring | None = getattr(self._own, "ring", None)
        if ring is None:
            self._own.ring = ring = Ring(self._depth)
            self._rings.append(ring)
        return ring


def _turn(ring: Ring, requests: NDArray[np.uint64], results: NDArray[np.int32], stop: Stop) -> None:
    """Perform requests without compiled code, and wait for a quarter of the depth at a time.

    Measured with 4 KiB past the page cache, one thread, depths of 16 to 128, by fio's speed: a quarter 0.79 to
    1.06, half 0.78 to 0.97, two thirds 0.58 to 0.91, an eighth and less 0.66 to 1.19. Submitting in smaller parts,
    so that the disk begins sooner, gained a twentieth with one thread and lost up to a third with two.
    """
    quarter = max(1, ring.depth // 4)
    count, sent, done = len(requests), 0, 0
    is_halted = False
    try:
        while True:
            if not is_halted and sent < count:
                batch = requests[sent : sent + ring.depth - (sent - done)]
                ring.put(batch)
                sent += len(batch)
            if sent == done:
                return
            ring.enter(sent - done if is_halted or sent == count else min(quarter, sent - done))
            completed, least = ring.reap(results)
            done += completed
            is_halted = is_halted or stop.is_set or (least < 0 and bool(_failures(results).any()))
    finally:
        while done < sent:  # whatever happened: the kernel must not touch memory that the caller lets go
            ring.enter(sent - done)
            done += ring.reap(results)[0]


def settle(
    results: NDArray[np.int32],
    needed: NDArray[np.uint64],
    pieces: Pieces,
    plain: Callable[[], int],
    *,
    write: bool,
    is_direct: bool,
    stop: Stop,
) -> bool:
    """See to it that every piece has moved what is needed of it, and raise where that cannot be.

    What stopped short is done to its end by calls on the ``plain`` descriptor, which wait and can tell why. Returns
    False where the file system took the descriptor for O_DIRECT but refuses a request that is aligned.

    Raises:
        ShortTransfer: the file ends before.
        MoveFailed: the system refused, for example ENOSPC or EIO.
        Cancelled: it was asked to stop.
    """
    if not (results < needed.astype(np.int64)).any():
        return True
    stop.check()
    failed = _failures(results)
    is_refused = is_direct and bool((results == -errno.EINVAL).any())
    if is_refused:
        failed &= results != -errno.EINVAL
    if failed.any():
        first = int(np.argmax(failed))
        done = int(pieces.nbytes[:first].sum())
        call = "pwritev" if write else "preadv"
        raise vectored.call_failed(call, -int(results[first]), done, pieces.total_nbytes)
    _finish(results, needed, pieces, plain(), write=write, stop=stop)
    return not is_refused


def _finish(
    results: NDArray[np.int32], needed: NDArray[np.uint64], pieces: Pieces, fd: int, *, write: bool, stop: Stop
) -> None:
    slowly = vectored.write_file if write else vectored.read_file
    for number in np.flatnonzero(results < needed.astype(np.int64)).tolist():  # after a failure only
        stop.check()
        done = max(0, int(results[number]))
        parts = pieces.parts[int(pieces.borders[number]) : int(pieces.borders[number + 1])]
        rest, _ = vectored.split(vectored.advance(parts, done), int(needed[number]) - done)
        slowly(fd, int(pieces.offset[number]) + done, rest)


def _requests(fd: int, pieces: Pieces, *, write: bool) -> Requests:
    counts = np.diff(pieces.borders)
    first = pieces.borders[:-1]
    is_one = counts == 1
    requests = np.zeros(len(pieces), uring.REQUEST)
    one, several = (uring.WRITE, uring.WRITEV) if write else (uring.READ, uring.READV)
    requests["operation"] = np.where(is_one, one, several)
    requests["fd"] = fd
    requests["offset"] = pieces.offset
    tables = np.uint64(pieces.parts.ctypes.data) + first.astype(np.uint64) * np.uint64(16)
    requests["address"] = np.where(is_one, pieces.parts[first, 0], tables)
    requests["count"] = np.where(is_one, pieces.nbytes, counts.astype(np.uint64))
    requests["token"] = np.arange(len(pieces))
    return requests


def _failures(results: NDArray[np.int32]) -> NDArray[np.bool_]:
    failed: NDArray[np.bool_] = results < 0
    for code in _AGAIN:
        failed &= results != -code
    return failed
