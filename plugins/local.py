"""The ``local`` backend: host memory to host memory on one node.

It moves between memory mapped into the daemon (pools, clients' memfds) and, one side at a time, the private memory of
another process. Two private memories have no direct way; the planner stages them through a pool. Files are in
``posix.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from xferd.api.errors import Unsupported
from xferd.plugins import vectored
from xferd.plugins.base import Backend, MappedSpace, ProcessSpace, SpaceKind
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Options

if TYPE_CHECKING:
    from xferd.plugins.base import BackendStatistics, Chunk, Extent, Space

# Measured on two cores between two processes: 4 KiB x 1 in 18 us, most of it entering the thread and the call;
# 4 KiB x 1024 in 0.70 ms; 256 MiB x 1 at 11.2 GB/s. Half a microsecond a piece and 9 GB/s fit all three within 30 %.
_START_S = 20e-6
_PIECE_S = 0.3e-6
_NBYTES_PER_S = 9e9

_PAIRS = frozenset(
    {
        (SpaceKind.MAPPED, SpaceKind.MAPPED),
        (SpaceKind.MAPPED, SpaceKind.PROCESS),
        (SpaceKind.PROCESS, SpaceKind.MAPPED),
    }
)


class LocalOptions(Options):
    """``[backends.local]``: ``movers`` is the number of threads, and so of chunks that move at once."""

    movers: int = Field(2, ge=1, le=64)


class LocalBackend(Backend):
    """Copies with whole iovec tables in mover threads, the interpreter lock released.

    Spans of source and target that overlap give bytes in no defined order, as with ``memcpy``.
    """

    name: ClassVar[str] = "local"
    options: ClassVar[type[LocalOptions]] = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._movers = MoverPool(self.name, options.movers)
        self._counter = MoveCounter()

    async def start(self) -> None:
        """Do nothing: threads start when first needed."""

    async def aclose(self) -> None:
        """Wait for moves under way, then end the threads."""
        await self._movers.aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return MAPPED with MAPPED, and MAPPED with PROCESS in both directions."""
        return _PAIRS

    def refusal(self, source: Space, target: Space) -> str:
        """Return why not; also where the process of a private memory has ended."""
        reason = Backend.refusal(self, source, target)
        if reason:
            return reason
        for space in (source, target):
            if isinstance(space, ProcessSpace) and vectored.has_ended(space.pidfd):
                return f"process {space.pid} has ended"
        return ""

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a linear guess from measurements on a small machine; the engine learns better ones."""
        return _START_S + pieces * _PIECE_S + nbytes / _NBYTES_PER_S

    def slots(self, source: Space, target: Space) -> int:
        """Return the number of mover threads."""
        return self._options.movers

    async def move(self, chunk: Chunk) -> int:
        """Copy one chunk in a mover thread; a cancelled call has ended before this raises.

        Raises:
            MoveFailed: the private memory is not mapped, not allowed, or its process has gone.
        """
        with self._counter.moving(chunk.nbytes):
            return await self._movers.run(_copy, chunk.source, chunk.target)

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        return self._counter.snapshot(self._options.movers)


def _copy(source: Extent, target: Extent) -> int:
    match source.space, target.space:
        case MappedSpace(), MappedSpace():
            return vectored.copy_mapped(source.iov, target.iov)
        case MappedSpace(), ProcessSpace(pid, pidfd):
            return vectored.copy_process(source.iov, target.iov, pid, write=True, pidfd=pidfd)
        case ProcessSpace(pid, pidfd), MappedSpace():
            return vectored.copy_process(target.iov, source.iov, pid, write=False, pidfd=pidfd)
        case _:
            raise Unsupported(
                f"local cannot move {source.space} to {target.space}", remedy="stage through a pool: ask the planner"
            )
