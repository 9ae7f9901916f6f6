"""The shared-memory ring of a session, byte by byte: what both ends must agree on. docs/ring.md is the same for people.

One memfd holds a header page, the submission queue (SQ), the completion queue (CQ), one detail slot for each CQ entry,
and an arena that the client fills. Entries are little-endian structs whose last field is their number, counted from 1
over the life of the ring and written last: an entry is there once its number is the one that is waited for. So neither
side reads a tail index of the other, and what is half written is never taken for an entry.

Wake-ups go through two pipes, one each way, a byte or more at a time; what is read from them means nothing. Pipes and
not eventfds, because both ends of an eventfd share one file description: a client could clear O_NONBLOCK on it and
fill its counter, and the daemon's next write would stop the event loop. A pipe's two ends are two descriptions.

Nothing here waits or performs system calls; ``daemon/rings/`` and ``clients/_ring.py`` do.
"""

from __future__ import annotations

import enum
import platform
import struct
from dataclasses import dataclass
from typing import Final

from xferd.api.errors import InvalidArgument, ProtocolViolation

MAGIC: Final = b"XFERRING"
VERSION: Final = 1
HEADER_NBYTES: Final = 4096
ENTRY_ALIGN: Final = 64

SQ_HEAD_AT: Final = 128
"""u64, the daemon's: how many submissions it has taken; those slots may be used again."""

CQ_HEAD_AT: Final = 192
"""u64, the client's: how many completions it has read; those slots may be used again."""

STATE_AT: Final = 256
"""u32 ``RingState``, u32 nbytes of the ``ErrorDetail`` at ``REASON_AT``; the daemon's."""

REASON_AT: Final = 512
MAX_REASON_NBYTES: Final = HEADER_NBYTES - REASON_AT

HEADER: Final = struct.Struct("<8sIIIIIIQQQQQ")
"""magic, version, header nbytes, SQ entries, CQ entries, detail nbytes a slot, 0; as byte positions from the start: SQ,
CQ, details, arena; and the arena's nbytes."""

SUBMISSION: Final = struct.Struct("<QBBBBIQQIIIIIIQ")
"""user_data, opcode, op, priority, flags, timeout_ms, a, b, local index at, local count, remote index at, remote count,
options at, options nbytes, number. 64 bytes. ``a`` is a transfer (POST, CANCEL), the local list's handle (SUBMIT) or a
count (LISTEN); ``b`` is the remote list's handle."""

COMPLETION: Final = struct.Struct("<QQBBHIQQddddddIIIIIIQ")
"""user_data, transfer, kind, state, flags, detail nbytes, total nbytes, moved nbytes; created, posted, first byte and
ended at (UNIX seconds), queued, moving (seconds); descriptors, pieces, chunks, posts, route, 0; number. 120 bytes, in
slots of 128. ``transfer`` is the id, in text 16 hexadecimal digits; ``state`` is the number of a ``TransferState``."""

SUBMISSION_NBYTES: Final = 64
COMPLETION_NBYTES: Final = 128
NUMBER_OF_SUBMISSION_AT: Final = 56
NUMBER_OF_COMPLETION_AT: Final = 112

MAX_ROUTES: Final = 1024
"""Route numbers a ring; routes beyond it are number 0 and told each time."""

MAX_ENTRIES: Final = 1 << 15
INDEX_NBYTES: Final = 4


class RingState(enum.IntEnum):
    """Whether the daemon serves the ring."""

    OPEN = 1
    CLOSED = 2  # for good; the reason is in the header, and the session goes on without it


class Opcode(enum.IntEnum):
    """What a submission asks for."""

    SUBMIT = 1  # a transfer between two prepared lists, or rows of them
    POST = 2  # a transfer that is held, or has ended
    CANCEL = 3
    LISTEN = 4  # gives leave for ``a`` more notifications to come as completions


class SubmissionFlag(enum.IntFlag):
    """Flags of SUBMIT, and the second one of POST."""

    HOLD = 1  # create it only; the one completion is ACCEPTED
    TELL_ACCEPTED = 2  # one more completion before the last one; a POST that ends at once tells of its end only


class Kind(enum.IntEnum):
    """What a completion tells."""

    ENDED = 1  # the transfer is DONE, FAILED or CANCELLED
    REFUSED = 2  # nothing was done; the detail is an ``ErrorDetail``
    ACCEPTED = 3  # the transfer exists; its id is in ``transfer``
    NOTIFICATION = 4  # the detail is a ``Notification``


class CompletionFlag(enum.IntFlag):
    """Flags of completions."""

    CUT = 1  # the detail did not fit into its slot: ask by gRPC (a transfer's status, or the next notification)
    STATUS = 2  # the detail is a whole ``TransferStatus``; so it is for all that are not DONE
    ROUTE = (
        4  # the detail is a ``TransferStatus`` of which only telemetry.route is set: what this ``route`` number means
    )


@dataclass(frozen=True, slots=True)
class RingSizes:
    """What a client asks for."""

    sq_entries: int = 256
    cq_entries: int = 1024
    detail_nbytes: int = 1024
    arena_nbytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the parts of a ring lie; positions and sizes in bytes."""

    sizes: RingSizes
    sq_at: int
    cq_at: int
    details_at: int
    arena_at: int
    nbytes: int

    @classmethod
    def of(cls, sizes: RingSizes) -> RingLayout:
        """Lay out a ring.

        Raises:
            InvalidArgument: counts that are no powers of two, or sizes that do not align.
        """
        for name, count in (("sq_entries", sizes.sq_entries), ("cq_entries", sizes.cq_entries)):
            if not 2 <= count <= MAX_ENTRIES or count & (count - 1):
                raise InvalidArgument(
                    f"{name} is {count}", limit=f"a power of two from 2 to {MAX_ENTRIES}", remedy="choose another"
                )
        if sizes.detail_nbytes < 256 or sizes.detail_nbytes % ENTRY_ALIGN or sizes.detail_nbytes > 1 << 16:
            raise InvalidArgument(
                f"detail_nbytes is {sizes.detail_nbytes}", limit="256 to 65536 in steps of 64", remedy="choose another"
            )
        if not 4096 <= sizes.arena_nbytes < 1 << 32 or sizes.arena_nbytes % 4096:
            raise InvalidArgument(
                f"arena_nbytes is {sizes.arena_nbytes}",
                limit="4096 to 2**32 - 4096 in steps of 4096",
                remedy="round up",
            )
        sq_at = HEADER_NBYTES
        cq_at = sq_at + sizes.sq_entries * SUBMISSION_NBYTES
        details_at = cq_at + sizes.cq_entries * COMPLETION_NBYTES
        arena_at = -(-(details_at + sizes.cq_entries * sizes.detail_nbytes) // 4096) * 4096
        return cls(sizes, sq_at, cq_at, details_at, arena_at, arena_at + sizes.arena_nbytes)

    def header(self) -> bytes:
        """Return the header's fixed part."""
        sizes = self.sizes
        return HEADER.pack(
            MAGIC,
            VERSION,
            HEADER_NBYTES,
            sizes.sq_entries,
            sizes.cq_entries,
            sizes.detail_nbytes,
            0,
            self.sq_at,
            self.cq_at,
            self.details_at,
            self.arena_at,
            sizes.arena_nbytes,
        )

    @classmethod
    def from_header(cls, data: bytes | memoryview) -> RingLayout:
        """Read a header as a client does.

        Raises:
            ProtocolViolation: no ring, a version that is not known here, or parts that overlap.
        """
        if len(data) < HEADER.size:
            raise ProtocolViolation(f"a ring's header of {len(data)} bytes", limit=f"at least {HEADER.size} bytes")
        magic, version, _, sq, cq, detail, _, *places = HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise ProtocolViolation(
                f"magic {magic!r}, version {version}", limit=f"{MAGIC!r}, version {VERSION}", remedy="use gRPC alone"
            )
        try:
            layout = cls.of(RingSizes(sq, cq, detail, places[4]))
        except InvalidArgument as exc:
            raise ProtocolViolation(f"the ring's header makes no sense: {exc.message}") from exc
        if [layout.sq_at, layout.cq_at, layout.details_at, layout.arena_at] != places[:4]:
            raise ProtocolViolation("the ring's parts are not where this version puts them", remedy="use gRPC alone")
        return layout


def is_supported() -> bool:
    """Say whether rings work on this machine.

    An entry's number must not be seen before the rest of it. x86-64 keeps the order of stores and of loads; others
    would need barriers that Python does not have.
    """
    return platform.machine() in ("x86_64", "AMD64")
