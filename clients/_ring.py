"""A session's ring as the client's side of the memory: mapping it, writing submissions, taking completions.

Nothing here waits. Who waits for what, and what goes over the ring at all, is in ``_ring_base.py`` and its two heirs,
``_sync_ring.py`` and ``_aio_ring.py``. ``api/ring.py`` has the layout, docs/ring.md the rules.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np
from google.protobuf.message import DecodeError

from xferd.api import ring as layout, wire
from xferd.api.descriptors import U32
from xferd.api.errors import InvalidState, ProtocolViolation, Unavailable, Unsupported, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.clients._ring_tracks import Ask, CutNote, Note, RingHome

if TYPE_CHECKING:
    from xferd.api.descriptors import IndexColumn

_SQ_HEAD: Final = layout.SQ_HEAD_AT // 8
_CQ_HEAD: Final = layout.CQ_HEAD_AT // 8
_STATE: Final = layout.STATE_AT // 8
_OPEN: Final = int(layout.RingState.OPEN)
_ENTRY: Final = struct.Struct("<QBBBBIQQIIIIII")  # SUBMISSION but for its number, which is written after all else
_RESULT: Final = layout.COMPLETION
_SQ_STEP: Final = layout.SUBMISSION_NBYTES
_CQ_STEP: Final = layout.COMPLETION_NBYTES // 8
_ACCEPTED, _REFUSED, _NOTIFICATION = (
    int(k) for k in (layout.Kind.ACCEPTED, layout.Kind.REFUSED, layout.Kind.NOTIFICATION)
)
_CUT, _ROUTE = int(layout.CompletionFlag.CUT), int(layout.CompletionFlag.ROUTE)

_DRAIN_NBYTES: Final = 4096

# A child of fork shares the mapping with its parent and must not touch it. The system calls one hook for all rings,
# because a hook cannot be taken back.
_mapped: weakref.WeakSet[Ring] = weakref.WeakSet()


def _disown_all() -> None:
    for ring in tuple(_mapped):
        ring.disown()


os.register_at_fork(after_in_child=_disown_all)


class Arena:
    """Hands out room in the arena in the order of submissions, and takes it back as the daemon has passed them."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._start = 0  # oldest byte in use and next free one, both counted on without wrapping
        self._end = 0
        self._used: deque[tuple[int, int]] = deque()  # (number of the submission, where its room ends)

    def take(self, nbytes: int, number: int, passed: int) -> int:
        """Return the place of ``nbytes`` for submission ``number``, or -1; ``passed`` is the daemon's SQ head."""
        used = self._used
        while used and used[0][0] <= passed:
            self._start = used.popleft()[1]
        if not used:
            self._start = self._end = 0
        start = self._end
        place = start % self.nbytes
        if place + nbytes > self.nbytes:  # what is left before the end is left out: room is in one piece
            start += self.nbytes - place
            place = 0
        end = start + (nbytes + 7 & ~7)
        if end - self._start > self.nbytes:
            return -1
        self._end = end
        used.append((number, end))
        return place


class Ring:
    """The mapping and both queues. Owns the mapping and its ends of the two pipes.

    Submissions may come from one thread at a time, and completions be taken by one thread at a time; the two do not
    disturb each other.

    Attributes:
        home: what is the same for all transfers of this session.
        asks: what has been asked and not answered, by ``user_data``.
        notes: notifications that have come and wait to be taken.
        allowed: notifications that the daemon may send, all that it had leave for.
        noted: notifications that have come.
        arrival: over when the next notification comes; then there is a new one.
        lost: why there is no ring any more; None while there is.
        is_session_over: it is lost because the session, or the daemon, has ended.
        is_disowned: this process is a child of the one that the ring belongs to.
        signal: the end of a pipe that can be read after completions; does not block.
    """

    def __init__(self, fds: list[int], nbytes: int, home: RingHome) -> None:
        """Take over the fds of a grant and map; they are closed if this fails.

        Raises:
            ProtocolViolation: not three fds, or what they hold is no ring.
            Unsupported: the system refuses to map.
        """
        self._map: mmap.mmap | None = None
        try:
            if len(fds) != 3:
                raise ProtocolViolation(f"a ring came with {len(fds)} file descriptors", limit="exactly 3")
            memfd, self._doorbell, self.signal = fds
            self._map = _mapping(memfd, nbytes)
            self.layout = layout.RingLayout.from_header(self._map[: layout.HEADER.size])
            if self.layout.nbytes != nbytes:
                raise ProtocolViolation(f"a ring of {nbytes} bytes", limit=f"{self.layout.nbytes} bytes by its header")
            for fd in fds[1:]:
                os.set_blocking(fd, False)
        except BaseException:
            if self._map is not None:
                self._map.close()
            for fd in fds:
                os.close(fd)
            raise
        os.close(memfd)  # the mapping keeps the memory
        sizes = self.layout.sizes
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._rows = np.frombuffer(self._map, U32, sizes.arena_nbytes // 4, self.layout.arena_at)
        self._arena = Arena(sizes.arena_nbytes)
        self._sq_mask = sizes.sq_entries - 1
        self._cq_mask = sizes.cq_entries - 1
        self._first_number = (self.layout.cq_at + layout.NUMBER_OF_COMPLETION_AT) // 8
        self._sent = 0
        self._read = 0
        self._pid = os.getpid()
        self.home = home
        self.asks: dict[int, Ask] = {}
        self.notes: deque[Note] = deque()
        self.allowed = 0
        self.noted = 0
        self.arrival = Ask()
        self.lost: XferdError | None = None
        self.is_session_over = False
        self.is_disowned = False
        _mapped.add(self)

    # -- submissions

    def fits(self, nbytes: int) -> bool:
        """Say whether the arena can ever hold so much for one submission."""
        return nbytes <= self._arena.nbytes

    def put(
        self,
        ask: Ask | None,
        opcode: int,
        a: int,
        b: int = 0,
        op: int = 0,
        priority: int = 0,
        flags: int = 0,
        timeout_ms: int = 0,
        local: IndexColumn | None = None,
        remote: IndexColumn | None = None,
        options: bytes = b"",
    ) -> bool:
        """Write a submission, unless there is no room now, or the ring is closed, which ``check`` then finds.

        The daemon learns of it by ``ring``.

        Raises:
            XferdError: the ring is lost.
        """
        if self.lost is not None:
            raise self.lost
        words = self._words
        number = self._sent + 1
        passed = words[_SQ_HEAD]
        if number - passed > self._sq_mask + 1 or words[_STATE] & 0xFFFFFFFF != _OPEN:
            return False
        local_count = remote_count = local_at = remote_at = options_at = 0
        if local is not None or remote is not None or options:
            local_count = 0 if local is None else len(local)
            remote_count = 0 if remote is None else len(remote)
            local_at = self._arena.take((local_count + remote_count) * 4 + len(options), number, passed)
            if local_at < 0:
                return False
            remote_at = local_at + local_count * 4
            options_at = remote_at + remote_count * 4
            if local is not None:
                self._rows[local_at >> 2 : remote_at >> 2] = local
            if remote is not None:
                self._rows[remote_at >> 2 : options_at >> 2] = remote
            if options:
                start = self.layout.arena_at + options_at
                self._bytes[start : start + len(options)] = options
        if ask is not None:
            self.asks[number] = ask
        at = self.layout.sq_at + (number - 1 & self._sq_mask) * _SQ_STEP
        # fmt: off
        _ENTRY.pack_into(
            self._bytes, at, number, opcode, op, priority, flags, timeout_ms, a, b,
            local_at, local_count, remote_at, remote_count, options_at, len(options),
        )
        # fmt: on
        words[at + layout.NUMBER_OF_SUBMISSION_AT >> 3] = number
        self._sent = number
        return True

    def ring(self) -> None:
        """Tell the daemon that there are submissions: one system call for all that were put since."""
        try:
            os.write(self._doorbell, b"\1")
        except (BlockingIOError, BrokenPipeError):
            return  # full: it is about to look; or closed: the ring's state says why

    # -- completions

    def drain(self) -> bool:
        """Take what the daemon has signalled, before looking at the ring; False when no signal will come any more."""
        try:
            return bool(os.read(self.signal, _DRAIN_NBYTES))
        except BlockingIOError:
            return True

    @property
    def awaited(self) -> tuple[memoryview, int, int]:
        """The words of the ring, the index of the one that will change next, and what it will be: for spinning."""
        number = self._read + 1
        return self._words, self._first_number + (number - 1 & self._cq_mask) * _CQ_STEP, number

    def reap(self) -> int:
        """Take the completions that are there, and return how many. No system call, unless the daemon lags behind."""
        if self.lost is not None:
            return 0
        words, number = self._words, self._read + 1
        first = number
        while words[self._first_number + (number - 1 & self._cq_mask) * _CQ_STEP] == number:
            self._take(number - 1 & self._cq_mask)
            self._read = number
            number += 1
        if number == first:
            return 0
        words[_CQ_HEAD] = self._read
        if words[_SQ_HEAD] != self._sent:  # it may have stopped for want of room for completions; now there is
            self.ring()
        return number - first

    def _take(self, slot: int) -> None:
        entry = _RESULT.unpack_from(self._bytes, self.layout.cq_at + slot * layout.COMPLETION_NBYTES)
        nbytes = entry[5]
        detail = b""
        if nbytes:
            size = self.layout.sizes.detail_nbytes
            start = self.layout.details_at + slot * size
            detail = bytes(self._bytes[start : start + min(nbytes, size)])
        kind, flags = entry[2], entry[4]
        if kind == _NOTIFICATION:
            self._take_note(CutNote() if flags & _CUT else detail)
            return
        if flags & _ROUTE and not flags & _CUT and entry[18]:
            self.home.routes[entry[18]] = detail
        if kind == _ACCEPTED:
            ask = self.asks.get(entry[0])
            if ask is not None:
                if ask.is_held:
                    del self.asks[entry[0]]
                ask.accept(entry, detail)
            return
        ask = self.asks.pop(entry[0], None)
        if ask is None:
            return  # nobody asked: a daemon that errs harms nobody here
        if kind == _REFUSED:
            ask.refuse(_error(detail), is_cut=bool(flags & _CUT))
        else:
            ask.end(entry, detail)

    def _take_note(self, note: Note) -> None:
        self.noted += 1
        self.notes.append(note)
        arrived, self.arrival = self.arrival, Ask()
        arrived.finish()

    # -- the end

    def check(self) -> XferdError | None:
        """Look whether the daemon has closed the ring, and return why it is lost, None while it is not.

        As ``reap``, this is for one thread at a time.
        """
        if self.lost is None and self._words[_STATE] & 0xFFFFFFFF != _OPEN:
            self.reap()
            nbytes = min(self._words[_STATE] >> 32, layout.MAX_REASON_NBYTES)
            if not nbytes:
                self.lose_session()
                return self.lost
            reason = _error(bytes(self._bytes[layout.REASON_AT : layout.REASON_AT + nbytes]))
            error = Unavailable(
                f"the daemon closed the ring: {reason.message}", limit=reason.limit, remedy="gRPC goes on without it"
            )
            error.__cause__ = reason
            self.lose(error)
        return self.lost

    def lose_session(self) -> None:
        """Give the ring up because there is nobody at its other end."""
        self.is_session_over = self.is_session_over or self.lost is None
        self.lose(Unavailable("the session, or the daemon, has ended", remedy="connect again"))

    def lose(self, error: XferdError) -> None:
        """Give the ring up: whoever waits is told, and goes on by gRPC where that can be."""
        if self.lost is None:
            self.lost = error
            asks, self.asks = self.asks, {}
            for ask in (*asks.values(), self.arrival):
                ask.lose()

    def disown(self) -> None:
        """Leave the ring to the process that opened it: this one is its child."""
        self.is_disowned = True
        self.lost = InvalidState(
            f"the ring belongs to process {self._pid}", limit=f"this is process {os.getpid()}", remedy="connect anew"
        )

    def close(self) -> None:
        """Unmap and close, when nobody uses it any more. Twice is fine."""
        if self._map is None:
            return
        del self._rows
        self._words.release()
        self._bytes.release()
        self._map.close()
        self._map = None
        os.close(self._doorbell)
        os.close(self.signal)


def _mapping(memfd: int, nbytes: int) -> mmap.mmap:
    size = os.fstat(memfd).st_size
    if nbytes < layout.HEADER_NBYTES or size < nbytes:
        raise ProtocolViolation(f"a ring of {nbytes} bytes in a memfd of {size}", limit="a memfd as large as the ring")
    try:
        return mmap.mmap(memfd, nbytes)
    except (OSError, ValueError) as exc:
        raise Unsupported(f"{nbytes} bytes cannot be mapped: {exc}", remedy="check RLIMIT_AS, or use no ring") from exc


def _error(detail: bytes) -> XferdError:
    try:
        return wire.error_from_detail(pb.ErrorDetail.FromString(detail))
    except DecodeError:
        return ProtocolViolation("the daemon gave a reason that cannot be read", remedy="is it of this release?")
