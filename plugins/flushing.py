"""Legs to files that are put on the disk at their end, for backends that write files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.plugins.base import OpenLeg
from xferd.plugins.vectored import flush_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xferd.plugins.base import Chunk, FileSpace
    from xferd.plugins.movers import MoverPool


class FlushedLeg(OpenLeg):
    """A leg whose chunks are put on the disk together, by one call at its end.

    Args:
        move: moves a chunk, which need not be durable then.
        movers: a thread of theirs makes the call.
        target: the file that the leg writes; its fd stays open until the leg has ended.
    """

    def __init__(self, move: Callable[[Chunk], Awaitable[int]], movers: MoverPool, target: FileSpace) -> None:
        self._move = move
        self._movers = movers
        self._target = target

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk, which is not durable yet."""
        return await self._move(chunk)

    async def commit(self) -> None:
        """Flush the file; a cancelled call waits for the disk.

        Raises:
            MoveFailed: the disk said no. Which bytes are on it is not known then.
        """
        await self._movers.run(flush_file, self._target.fd, self._target.path)

    async def abort(self) -> None:
        """Do nothing: bytes in a file cannot be taken back, and nobody was told that they are there."""
