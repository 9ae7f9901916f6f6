"""The ``local`` backend: host memory to host memory on one node.

It moves between memory mapped into the daemon (pools, clients' memfds) and, one side at a time, the private memory of
another process. Two private memories have no direct way; the planner stages them through a pool. Files are in
``posix.py``.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from xferd.api.errors import Unsupported
from xferd.plugins import vectored
from xferd.plugins.base import Backend, Extent, MappedSpace, ProcessSpace, SpaceKind
from xferd.plugins.begun import told
from xferd.plugins.local import native, now
from xferd.plugins.local.mapped import MappedCopier
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Options
from xferd.plugins.pairs import ByPair

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import BackendStatistics, Begun, Chunk, Space
    from xferd.plugins.movers import Batch

# Assumed until chunks were timed: what one thread makes of it by process_vm_readv, without huge pages.
_START_S = 20e-6
_PIECE_S = 0.3e-6
_NBYTES_PER_S = 9e9

MIN_PART_NBYTES = 512 << 10
"""A chunk is cut for idle threads into parts no smaller than this: 50 to 200 us of copying, where waking one more
thread takes 30."""

PART_ALIGNMENT = 64 << 10
"""Parts begin at multiples of it, so that blocks of up to this size stay whole."""

MIN_PART_ROWS = 16
"""Rows of a part from which on it does not matter that they are not all of one size."""

_PAIRS = frozenset(
    {
        (SpaceKind.MAPPED, SpaceKind.MAPPED),
        (SpaceKind.MAPPED, SpaceKind.PROCESS),
        (SpaceKind.PROCESS, SpaceKind.MAPPED),
    }
)


def parts_of(chunk: Chunk, count: int) -> list[tuple[Extent, Extent]]:
    """Cut a chunk into parts of about the same size: between rows where they pair up, which is next to free."""
    source, target = chunk.source, chunk.target
    rows = len(source.iov)
    if rows >= count * MIN_PART_ROWS and np.array_equal(source.iov[:, 1], target.iov[:, 1]):
        marks = [rows * number // count for number in range(count + 1)]
        return [
            (Extent(source.space, source.iov[first:last]), Extent(target.space, target.iov[first:last]))
            for first, last in itertools.pairwise(marks)
        ]
    cuts = [chunk.nbytes * number // count // PART_ALIGNMENT * PART_ALIGNMENT for number in range(count)]
    return [(source.cut(*span), target.cut(*span)) for span in itertools.pairwise([*cuts, chunk.nbytes])]


class LocalOptions(Options):
    """``[backends.local]``: ``movers`` is the number of threads, and so of chunks that move at once.

    ``nice`` is added to their nice value, so that on a full machine the event loop gets a core before them;
    see ``courtesy.py``.
    """

    movers: int = Field(2, ge=1, le=64)
    nice: int = Field(10, ge=0, le=19)


class LocalBackend(Backend):
    """Copies with whole iovec tables in mover threads, the interpreter lock released.

    Spans of source and target that overlap give bytes in no defined order, as with ``memcpy``.
    """

    name: ClassVar[str] = "local"
    options: ClassVar[type[LocalOptions]] = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._movers = MoverPool(self.name, options.movers, nice=options.nice)
        self._counter = MoveCounter()
        self._mapped = MappedCopier(native.load())
        self._kept: ByPair[list[Callable[[], int]]] = ByPair()

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

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun:
        """Begin to copy one chunk in as many mover threads as are idle; see ``Backend.begin``.

        Told are MoveFailed where the private memory is not mapped, not allowed, or its process has gone.
        """
        count = max(min(self._movers.idle, chunk.nbytes // MIN_PART_NBYTES), 1)
        batch = self._movers.begin(self._calls(chunk, count), functools.partial(self._ended, chunk.nbytes, done))
        self._counter.busy += 1
        return batch

    async def move(self, chunk: Chunk) -> int:
        """Copy one chunk as ``begin`` does; a cancelled call has ended before this raises.

        Raises:
            MoveFailed: as ``begin`` tells.
        """
        return await told(functools.partial(self.begin, chunk))

    def move_now(self, source: Extent, target: Extent, agent: str = "") -> Callable[[], int] | None:
        """Return a copy between mapped memories that is as small as ``now.py`` says; else None."""
        if not (isinstance(source.space, MappedSpace) and isinstance(target.space, MappedSpace)):
            return None
        return now.compile_copy(source.iov, target.iov, self._counter, self._mapped)

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        return self._counter.snapshot(self._options.movers)

    def _calls(self, chunk: Chunk, count: int) -> list[Callable[[], int]]:
        """Return calls that copy a chunk in so many parts; those of a transfer that is posted again are kept."""
        source, target = chunk.source, chunk.target
        kept = self._kept.get(source, target)
        if kept is not None and len(kept) == count:
            return kept
        parts = parts_of(chunk, count) if count > 1 else [(source, target)]
        calls = [self._call(*part) for part in parts]
        if isinstance(source.space, MappedSpace) and isinstance(target.space, MappedSpace):
            # Their calls know the tables and not the extents, so that what is kept goes with the plan.
            self._kept.put(source, target, calls)
        return calls

    def _call(self, source: Extent, target: Extent) -> Callable[[], int]:
        match source.space, target.space:
            case MappedSpace(), MappedSpace():
                return self._mapped.made(source.iov, target.iov)
            case MappedSpace(), ProcessSpace(pid, pidfd):
                copy = functools.partial(vectored.copy_process, write=True)
                return functools.partial(copy, source.iov, target.iov, pid, pidfd=pidfd)
            case ProcessSpace(pid, pidfd), MappedSpace():
                copy = functools.partial(vectored.copy_process, write=False)
                return functools.partial(copy, target.iov, source.iov, pid, pidfd=pidfd)
            case _:
                raise Unsupported(
                    f"local cannot move {source.space} to {target.space}",
                    remedy="stage through a pool: ask the planner",
                )

    def _ended(self, nbytes: int, done: Callable[[int | Exception], None], batch: Batch) -> None:
        outcome = batch.outcome()
        self._counter.ended(nbytes, outcome)
        done(outcome)
