"""The ``posix`` backend: files of this node to and from mapped host memory, by ``preadv`` and ``pwritev``.

One system call moves one contiguous span of a file from or to up to 1024 spans of memory. Which files may be opened
is decided where they are registered (``daemon/memory``), not here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from xferd.api.errors import MoveFailed, Unsupported
from xferd.plugins import vectored
from xferd.plugins.base import Backend, FileSpace, MappedSpace, SpaceKind
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Options

if TYPE_CHECKING:
    from xferd.plugins.base import BackendStatistics, Chunk, Extent, Space

# Measured in the page cache: preadv 4.8 GB/s, pwrite 6 to 8 GB/s with two to four threads. A piece may be a system
# call of its own (a scattered file), about 2 us. A disk is slower; the engine learns that from the first transfers.
_START_S = 20e-6
_PIECE_S = 2e-6
_NBYTES_PER_S = 4.8e9

_PAIRS = frozenset({(SpaceKind.FILE, SpaceKind.MAPPED), (SpaceKind.MAPPED, SpaceKind.FILE)})


class PosixOptions(Options):
    """``[backends.posix]``.

    ``movers`` is the number of threads. ``fsync = "data"`` makes each chunk durable (``fdatasync``) before it counts
    as moved; "none" leaves that to the kernel, and to the client that may sync its own file.
    """

    movers: int = Field(2, ge=1, le=64)
    fsync: Literal["none", "data"] = "none"


class PosixBackend(Backend):
    """Reads and writes files through the page cache in mover threads."""

    name: ClassVar[str] = "posix"
    options: ClassVar[type[PosixOptions]] = PosixOptions

    def __init__(self, options: PosixOptions) -> None:
        self._options = options
        self._movers = MoverPool(self.name, options.movers)
        self._counter = MoveCounter()

    async def start(self) -> None:
        """Do nothing: threads start when first needed."""

    async def aclose(self) -> None:
        """Wait for moves under way, then end the threads."""
        await self._movers.aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return FILE with MAPPED in both directions."""
        return _PAIRS

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a linear guess from measurements in the page cache; the engine learns better ones."""
        return _START_S + pieces * _PIECE_S + nbytes / _NBYTES_PER_S

    def slots(self, source: Space, target: Space) -> int:
        """Return the number of mover threads."""
        return self._options.movers

    async def move(self, chunk: Chunk) -> int:
        """Read or write one chunk in a mover thread; a cancelled call has ended before this raises.

        Raises:
            ShortTransfer: the file ends before the chunk does.
            MoveFailed: the system refused, for example ENOSPC or EIO; ``__cause__`` is the OSError.
        """
        with self._counter.moving(chunk.nbytes):
            return await self._movers.run(_copy, chunk.source, chunk.target, sync=self._options.fsync == "data")

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        return self._counter.snapshot(self._options.movers)


def _copy(source: Extent, target: Extent, *, sync: bool) -> int:
    match source.space, target.space:
        case FileSpace(fd), MappedSpace():
            return vectored.read_file_spans(fd, source.iov, target.iov)
        case MappedSpace(), FileSpace(fd, path):
            moved = vectored.write_file_spans(fd, target.iov, source.iov)
            if sync:
                _sync(fd, path)
            return moved
        case _:
            raise Unsupported(
                f"posix cannot move {source.space} to {target.space}", remedy="stage through a pool: ask the planner"
            )


def _sync(fd: int, path: str) -> None:
    try:
        os.fdatasync(fd)
    except OSError as exc:
        raise MoveFailed(f"fdatasync of {path}: {exc.strerror}", remedy="check the file system") from exc
