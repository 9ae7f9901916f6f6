"""Proof of bytes, as the engine sees it: whom to ask before bytes are written, before DONE is told, and after a read.

``daemon/storage/sealer.py`` implements it for storage pools. Extents of other memory are passed over, so that whoever
moves bytes may hand in all that it moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.plugins.base import BlockSums, Extent


class WriteTicket(Protocol):
    """What ``begin`` gave; ended once, by ``seal`` or by ``abandon``."""


class ReadTicket(Protocol):
    """What ``reading`` gave; ended once, by ``finish``, or dropped."""


class AwaitedSums(Protocol):
    """What ``arriving`` or ``leaving`` gave, for one chunk."""

    @property
    def sums(self) -> BlockSums | None:
        """What a backend may sum on the way; None where no sum is wanted."""


class Sealer(Protocol):
    """Keeps the proof of what lies in storage pools. Used on the event loop; the regions are held throughout."""

    def concerns(self, extents: Sequence[Extent]) -> bool:
        """Whether any of the extents lies in a pool that keeps proof. Cheap: it looks at the spaces alone."""

    async def begin(self, extents: Sequence[Extent]) -> WriteTicket:
        """Be told that these spans are about to be written; no byte may move before this returns.

        Where it raises, or is cancelled, nothing has begun.

        Raises:
            PoolExhausted, MoveFailed: it cannot be written down; nothing may be moved.
        """

    async def seal(self, ticket: WriteTicket) -> None:
        """Put what was written on the disk, with its checksums; only then may DONE be told. No byte moves any more.

        The ticket is over, also where this raises or is cancelled: the bytes are then not proven.

        Raises:
            PoolExhausted, MoveFailed, ShortTransfer: the disk.
        """

    def abandon(self, ticket: WriteTicket) -> None:
        """Be told that a write failed or was cancelled, and that no byte of it moves any more."""

    def leaving(self, ticket: WriteTicket, source: Extent, target: Extent) -> AwaitedSums | None:
        """Be told that a chunk is about to move; None where ``seal`` will read it back.

        Optional, and only quicker: ``seal`` reads back what was not summed as it passed.
        """

    async def left(self, ticket: WriteTicket, chunk: AwaitedSums, source: Extent) -> None:
        """Be told that a chunk has moved, while its source still has the bytes: what was not summed is summed there.

        Not for a chunk that failed.
        """

    def reading(self, extents: Sequence[Extent], *, is_asked: bool) -> ReadTicket | None:
        """Be told that these spans are about to be read; None where nothing will be compared.

        With a ticket, ``finish`` takes the place of ``verify``; arguments and errors are those of ``verify``.
        """

    def arriving(self, ticket: ReadTicket, leg: Extent, start: int, nbytes: int, target: Extent) -> AwaitedSums | None:
        """Be told that a chunk is about to move; None where ``finish`` will have to read what it read once more.

        Args:
            ticket: of the post.
            leg: all that the chunk's leg reads; the same object for all of its chunks.
            start: where in the leg's bytes the chunk begins.
            nbytes: of the chunk.
            target: where it goes.
        """

    async def arrived(self, ticket: ReadTicket, chunk: AwaitedSums, source: Extent, target: Extent) -> None:
        """Be told that a chunk has moved, while its target has the bytes: what was not summed yet is summed there."""

    async def finish(self, ticket: ReadTicket) -> None:
        """Compare what has arrived, and read once more what was not summed there, before DONE is told.

        Errors as with ``verify``.
        """

    async def verify(self, extents: Sequence[Extent], *, is_asked: bool) -> None:
        """Compare what was read with its checksums, before DONE is told.

        Args:
            extents: the spans that were read.
            is_asked: the caller wants proof; without it only pools that verify every read do so.

        Raises:
            IntegrityError: a block is not what was sealed; or, where proof is asked for, has none.
            MoveFailed, ShortTransfer: the disk.
        """


class NoSealer:
    """Nothing keeps proof: a daemon without storage pools."""

    def concerns(self, extents: Sequence[Extent]) -> bool:
        """Never."""
        return False

    async def begin(self, extents: Sequence[Extent]) -> WriteTicket:
        """Nothing begins."""
        return _Nothing()

    async def seal(self, ticket: WriteTicket) -> None:
        """Nothing is kept."""

    def abandon(self, ticket: WriteTicket) -> None:
        """Nothing was kept."""

    def leaving(self, ticket: WriteTicket, source: Extent, target: Extent) -> AwaitedSums | None:
        """Nothing is summed."""
        return None

    async def left(self, ticket: WriteTicket, chunk: AwaitedSums, source: Extent) -> None:
        """Nothing is summed."""

    def reading(self, extents: Sequence[Extent], *, is_asked: bool) -> ReadTicket | None:
        """Nothing will be compared."""
        return None

    def arriving(self, ticket: ReadTicket, leg: Extent, start: int, nbytes: int, target: Extent) -> AwaitedSums | None:
        """Nothing is compared."""
        return None

    async def arrived(self, ticket: ReadTicket, chunk: AwaitedSums, source: Extent, target: Extent) -> None:
        """Nothing is compared."""

    async def finish(self, ticket: ReadTicket) -> None:
        """Nothing was to be compared."""

    async def verify(self, extents: Sequence[Extent], *, is_asked: bool) -> None:
        """Nothing can be compared."""


class _Nothing:
    """The ticket of nothing."""
