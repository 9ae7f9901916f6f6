"""The daemon's end of a ring's memory: entries in and out, and nothing believed.

The client can write to every byte at any time. So each field is read once, what the daemon needs to remember is kept
outside the ring, and nothing that is read is used before it was checked. What the fields mean is in ``api/ring.py``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from xferd.api import ring
from xferd.api.descriptors import U32
from xferd.api.errors import InvalidArgument, ProtocolViolation

if TYPE_CHECKING:
    from xferd.api.descriptors import IndexColumn
    from xferd.api.ring import RingLayout

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_STATE = struct.Struct("<II")


class RingMemory:
    """A ring's memfd, mapped. Owns both; the client gets its own copy of the fd."""

    def __init__(self, layout: RingLayout) -> None:
        """Make the memory, sealed so that a client cannot shrink it under the daemon's feet, and write the header."""
        self.layout = layout
        self.fd = os.memfd_create("xferd-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, layout.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, layout.nbytes)
        except OSError:
            os.close(self.fd)
            raise
        header = layout.header()
        self._map[: len(header)] = header
        self._words = memoryview(self._map).cast("Q")
        self._sq_mask, self._cq_mask = layout.sizes.sq_entries - 1, layout.sizes.cq_entries - 1
        self._unpack, self._pack = ring.SUBMISSION.unpack_from, ring.COMPLETION.pack_into
        self._sq_word = (layout.sq_at + ring.NUMBER_OF_SUBMISSION_AT) // 8
        self.set_state(ring.RingState.OPEN, b"")

    def submission(self, number: int) -> tuple[int, ...] | None:
        """Return the fields of submission ``number``, or None if it is not there yet.

        Raises:
            ProtocolViolation: another number stands in its slot than it can have by now.
        """
        seen = self._number_for(number)
        if seen == number:
            slot = (number - 1) & self._sq_mask
            return self._unpack(self._map, self.layout.sq_at + slot * ring.SUBMISSION_NBYTES)
        if not self._is_old(seen, number):
            raise ProtocolViolation(
                f"submission {seen} stands in the slot of submission {number}",
                limit="0, or the one before it in this slot",
                remedy="number submissions from 1, without gaps",
            )
        return None

    def has_changed(self, taken: int, read: int) -> bool:
        """Whether the client has written anything since ``taken`` submissions and ``read`` completions were seen."""
        number = taken + 1
        return not self._is_old(self._number_for(number), number) or self.read_completions() != read

    def _number_for(self, number: int) -> int:
        """Return what stands where the number of a submission is to be."""
        return self._words[self._sq_word + (number - 1 & self._sq_mask) * (ring.SUBMISSION_NBYTES // 8)]

    def _is_old(self, seen: int, number: int) -> bool:
        """Whether that is what stood there before: nothing, or the submission that had the slot last."""
        return seen in (0, number - self.layout.sizes.sq_entries)

    def taken(self, count: int) -> None:
        """Tell the client how many submissions were taken."""
        self._words[ring.SQ_HEAD_AT // 8] = count

    def read_completions(self) -> int:
        """Return how many completions the client says it has read; to be checked."""
        return self._words[ring.CQ_HEAD_AT // 8]

    def complete(self, number: int, fields: tuple[float, ...], detail: bytes) -> None:
        """Write completion ``number``: all fields but that number; ``detail`` fits into its slot."""
        slot = (number - 1) & self._cq_mask
        if detail:
            at = self.layout.details_at + slot * self.layout.sizes.detail_nbytes
            self._map[at : at + len(detail)] = detail
        self._pack(self._map, self.layout.cq_at + slot * ring.COMPLETION_NBYTES, *fields, number)

    def arena(self, at: int, nbytes: int) -> bytes:
        """Return a copy of a span of the arena.

        Raises:
            InvalidArgument: it passes the arena's end.
        """
        limit = self.layout.sizes.arena_nbytes
        if at + nbytes > limit:
            raise InvalidArgument(
                f"bytes {at} to {at + nbytes} of the arena",
                limit=f"{limit} bytes",
                remedy="stay inside, or ask for more",
            )
        start = self.layout.arena_at + at
        return self._map[start : start + nbytes]

    def index(self, at: int, count: int) -> IndexColumn | None:
        """Return a copy of an index array; None for 0 rows, which stand for the whole list."""
        return np.frombuffer(self.arena(at, count * ring.INDEX_NBYTES), dtype=U32) if count else None

    def set_state(self, state: ring.RingState, reason: bytes) -> None:
        """Write the state and the reason, which is left out where it is too long."""
        told = reason if len(reason) <= ring.MAX_REASON_NBYTES else b""
        self._map[ring.REASON_AT : ring.REASON_AT + len(told)] = told
        _STATE.pack_into(self._map, ring.STATE_AT, state, len(told))

    def close(self) -> None:
        """Unmap and close. Twice is fine; what the client has mapped stays the client's."""
        if self.fd >= 0:
            self._words.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1
