"""The daemon's side of a ring, as small as it can be: tests say what it takes and what it tells."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Self

from xferd.api import ring as layout
from xferd.api.ring import COMPLETION, SUBMISSION, CompletionFlag, Kind, RingLayout, RingSizes, RingState
from xferd.clients._ring import Ring
from xferd.clients._ring_tracks import RingHome

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = RingSizes(sq_entries=4, cq_entries=8, detail_nbytes=256, arena_nbytes=4096)
DONE, FAILED, CANCELLED, PREPARED, POSTED = 4, 5, 6, 1, 2


class RingStub:
    """Owns the memory and its ends of the pipes; ``client_fds`` are for a ``Ring``, which owns them from there on."""

    def __init__(self, sizes: RingSizes = SMALL) -> None:
        self.layout = RingLayout.of(sizes)
        self.memfd = os.memfd_create("stub-ring")
        os.truncate(self.memfd, self.layout.nbytes)
        self.memory = mmap.mmap(self.memfd, self.layout.nbytes)
        header = self.layout.header()
        self.memory[: len(header)] = header
        self.doorbell, doorbell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal, self.signal = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.client_fds = [os.dup(self.memfd), doorbell, signal]
        self.taken = 0
        self.told = 0
        self.set_state(RingState.OPEN)

    def ring(self) -> Ring:
        return Ring(self.client_fds, self.layout.nbytes, RingHome("node-a", "me"))

    def word(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 8], "little")

    def set_word(self, at: int, value: int, nbytes: int = 8) -> None:
        self.memory[at : at + nbytes] = value.to_bytes(nbytes, "little")

    def set_state(self, state: RingState, reason: bytes = b"") -> None:
        self.memory[layout.REASON_AT : layout.REASON_AT + len(reason)] = reason
        self.set_word(layout.STATE_AT, int(state) | len(reason) << 32)

    def doorbells(self) -> int:
        """Return how often the doorbell was rung since the last look."""
        try:
            return len(os.read(self.doorbell, 4096))
        except BlockingIOError:
            return 0

    def take(self, most: int = 1 << 30) -> list[tuple[int, ...]]:
        """Take what has been submitted."""
        return list(self._take(most))

    def _take(self, most: int) -> Iterator[tuple[int, ...]]:
        while most:
            most -= 1
            at = self.layout.sq_at + self.taken % self.layout.sizes.sq_entries * 64
            entry = SUBMISSION.unpack_from(self.memory, at)
            if entry[-1] != self.taken + 1:
                return
            self.taken += 1
            self.set_word(layout.SQ_HEAD_AT, self.taken)
            yield entry

    def arena(self, at: int, nbytes: int) -> bytes:
        return self.memory[self.layout.arena_at + at : self.layout.arena_at + at + nbytes]

    @property
    def read(self) -> int:
        return self.word(layout.CQ_HEAD_AT)

    def tell(
        self,
        user_data: int,
        kind: Kind = Kind.ENDED,
        *,
        transfer: int = 0xABC,
        state: int = DONE,
        flags: CompletionFlag = CompletionFlag(0),  # noqa: B008 - immutable
        detail: bytes = b"",
        route: int = 0,
        posts: int = 1,
        signals: bool = True,
    ) -> None:
        """Write a completion and signal it."""
        slot = self.told % self.layout.sizes.cq_entries
        self.told += 1
        place = self.layout.details_at + slot * self.layout.sizes.detail_nbytes
        self.memory[place : place + len(detail)] = detail
        head = user_data, transfer, kind, state, flags, len(detail), 4096, 4096
        times = 1.0, 2.0, 3.0, 4.0, 0.5, 0.25
        at = self.layout.cq_at + slot * 128
        entry = COMPLETION.pack(*head, *times, 2, 2, 1, posts, route, 0, self.told)
        self.memory[at : at + 112] = entry[:112]
        self.memory[at + 112 : at + 120] = entry[112:]
        if signals:
            self.wake()

    def wake(self) -> None:
        os.write(self.signal, b"\1")

    def hang_up(self) -> None:
        """Close the pipes, as the daemon's end does."""
        for fd in (self.doorbell, self.signal):
            if fd >= 0:
                os.close(fd)
        self.doorbell = self.signal = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.memory.close()
        os.close(self.memfd)


class StillSocket:
    """A session socket of which nothing is heard but its end."""

    def end_reason(self, wait_s: float) -> str:
        return "the daemon stops"


class AsyncStillSocket:
    async def end_reason(self, wait_s: float) -> str:
        return "the daemon stops"
