"""The ``posix`` backend: files of this node to and from mapped host memory.

Which files may be opened is decided where they are registered (``daemon/memory``), not here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import structlog

from xferd.api.errors import Closed, Unsupported
from xferd.plugins.base import Backend, FileSpace, MappedSpace, SpaceKind
from xferd.plugins.begun import told
from xferd.plugins.flushing import FlushedLeg
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.pairs import ByPair
from xferd.plugins.posix import mapping, native, ring
from xferd.plugins.posix.direct import BounceMemory, DirectPolicy
from xferd.plugins.posix.engines import Calls, Engine, Rings, Stop
from xferd.plugins.posix.mapping import Mappings
from xferd.plugins.posix.moving import FileMover
from xferd.plugins.posix.options import PosixOptions
from xferd.plugins.vectored import flush_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import BackendStatistics, Begun, BlockSums, Chunk, Extent, LegScope, OpenLeg, Space
    from xferd.plugins.movers import Batch
    from xferd.plugins.posix.native import Native

# Assumed of the page cache, by calls, until chunks were timed. A disk is slower; the engine learns that from the first
# transfers.
_START_S = 20e-6
_PIECE_S = 1e-6
_NBYTES_PER_S = 4.8e9

MIN_PART_NBYTES = 512 << 10
"""A chunk is cut for idle threads into parts no smaller than this, as in ``local``."""

PART_ALIGNMENT = 64 << 10
"""Parts begin at multiples of it, so that aligned rows stay aligned."""

_PAIRS = frozenset({(SpaceKind.FILE, SpaceKind.MAPPED), (SpaceKind.MAPPED, SpaceKind.FILE)})

log = structlog.get_logger(__name__)


class PosixBackend(Backend):
    """Reads and writes files in mover threads, through the page cache or past it."""

    name: ClassVar[str] = "posix"
    options: ClassVar[type[PosixOptions]] = PosixOptions

    def __init__(self, options: PosixOptions) -> None:
        self._options = options
        self._movers = MoverPool(self.name, options.movers)
        self._counter = MoveCounter()
        self._policy = DirectPolicy(every=options.direct, below=options.direct_below)
        self._bounce = BounceMemory(options.bounce_nbytes)
        self._engine: Engine = Calls()
        self._reason = ""
        self._mappings: Mappings | None = None
        self._sweep_due: asyncio.TimerHandle | None = None
        self._sweep: asyncio.Task[None] | None = None
        self._mover = self._make_mover()
        self._kept: ByPair[tuple[list[tuple[int, int]], list[tuple[Extent, Extent]]]] = ByPair()

    async def start(self) -> None:
        """Choose how requests reach the kernel; threads start when first needed.

        Raises:
            Unsupported: io_uring is asked for, and cannot be used here.
        """
        compiled = native.load()
        self._choose_engine(compiled)
        if self._options.mapped_reads and compiled and mapping.is_possible() and not compiled.guard():
            self._mappings = Mappings(compiled)
        self._mover = self._make_mover()

    def _choose_engine(self, compiled: Native | None) -> None:
        if self._options.engine == "threads":
            return
        try:
            ring.probe(self._options.queue_depth)
        except Unsupported as error:
            if self._options.engine == "io_uring":
                raise
            self._reason = str(error)
            log.info("io_uring_not_used", reason=self._reason, instead=self._engine.name)
            return
        self._engine = Rings(self._options.queue_depth, compiled)

    async def aclose(self) -> None:
        """Wait for moves under way, then end the threads and release rings, mappings and memory."""
        mappings, self._mappings = self._mappings, None  # from now on no sweep is due
        if self._sweep_due is not None:
            self._sweep_due.cancel()
        await self._movers.aclose()
        if self._sweep is not None:
            await self._sweep
        if mappings is not None:
            mappings.close()
        self._engine.close()
        self._bounce.close()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return FILE with MAPPED in both directions."""
        return _PAIRS

    def manner(self, source: Space, target: Space) -> str:
        """Return the engine, and whether the page cache is passed by."""
        space = source if isinstance(source, FileSpace) else target
        assert isinstance(space, FileSpace)
        how = f"{self._engine.name} ({self._reason})" if self._reason else self._engine.name
        if not self._policy.wants(space):
            is_mapped = self._mappings is not None and space is source
            return f"{how}, mapped where it is in the page cache" if is_mapped else how
        refusal = self._policy.refusal(space)
        return f"{how}, through the page cache because O_DIRECT failed: {refusal}" if refusal else f"{how}, O_DIRECT"

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a linear guess from measurements in the page cache; the engine learns better ones."""
        return _START_S + pieces * _PIECE_S + nbytes / _NBYTES_PER_S

    def slots(self, source: Space, target: Space) -> int:
        """Return twice the number of mover threads: the next chunk waits at a thread, and no thread for the loop.

        Measured in the page cache, chunks of 8 MiB, two movers: a tenth quicker than with as many as movers.
        """
        return 2 * self._options.movers

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        """Begin to read or write one chunk; see ``Backend.begin``. None where it is to be on the disk at its end.

        Told are the errors of ``move``.
        """
        return None if self._must_flush(chunk.target.space) else self._begin(chunk, done)

    async def move(self, chunk: Chunk) -> int:
        """Read or write one chunk; a cancelled call has nothing under way when this raises.

        With ``fsync`` it is on the disk then.

        Raises:
            ShortTransfer: the file ends before the chunk does.
            MoveFailed: the system refused, for example ENOSPC or EIO; ``__cause__`` is the OSError.
        """
        space = chunk.target.space
        moved = await self._move_loosely(chunk)
        if isinstance(space, FileSpace) and self._must_flush(space):
            await self._movers.run(flush_file, space.fd, space.path)
        return moved

    def can_flush(self) -> bool:
        """It can."""
        return True

    def needs_leg(self, target: Space, *, durable: bool) -> bool:
        """Return whether a file is written that must be on the disk at the end."""
        return isinstance(target, FileSpace) and (durable or self._must_flush(target))

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        """Begin a leg whose file is put on the disk once, at its end."""
        assert scope.target is not None, "only legs that end in a file are opened"
        assert isinstance(scope.target.space, FileSpace)
        return FlushedLeg(self._move_loosely, self._movers, scope.target.space)

    def statistics(self) -> BackendStatistics:
        """Return counters since start."""
        return self._counter.snapshot(2 * self._options.movers)

    def _must_flush(self, target: Space) -> bool:
        return isinstance(target, FileSpace) and self._options.fsync == "data"

    async def _move_loosely(self, chunk: Chunk) -> int:
        """Move one chunk as ``move`` does, and leave it to the leg to flush."""
        return await told(functools.partial(self._begin, chunk))

    def _make_mover(self) -> FileMover:
        return FileMover(self._engine, self._policy, self._bounce, self._options.piece_nbytes, self._mappings)

    def _begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun:
        stop = Stop()
        calls = [self._call(*part, stop) for part in self._parts(chunk)]
        batch = self._movers.begin(calls, functools.partial(self._ended, chunk.nbytes, done))
        batch.on_abort = stop.set
        self._counter.busy += 1
        return batch

    def _ended(self, nbytes: int, done: Callable[[int | Exception], None], batch: Batch) -> None:
        self._expect_sweep()
        outcome = batch.outcome()
        self._counter.ended(nbytes, outcome)
        done(outcome)

    def _expect_sweep(self) -> None:
        """See to it that mappings that nobody uses any more go."""
        if self._sweep_due is None and self._mappings is not None and self._mappings.held:
            self._sweep_due = asyncio.get_running_loop().call_later(mapping.IDLE_S, self._begin_sweep)

    def _begin_sweep(self) -> None:
        self._sweep = asyncio.get_running_loop().create_task(self._drop_idle(), name="posix: unmap idle files")

    async def _drop_idle(self) -> None:
        if self._mappings is not None:
            with suppress(Closed):  # ``aclose`` unmaps them all
                await self._movers.run(self._mappings.drop_idle)
        self._sweep_due = None
        self._expect_sweep()

    def _call(self, source: Extent, target: Extent, sums: BlockSums | None, stop: Stop) -> Callable[[], int]:
        match source.space, target.space:
            case FileSpace() as space, MappedSpace():
                return functools.partial(self._mover.move, space, source.iov, target.iov, sums, write=False, stop=stop)
            case MappedSpace(), FileSpace() as space:
                return functools.partial(self._mover.move, space, target.iov, source.iov, sums, write=True, stop=stop)
            case _:
                raise Unsupported(
                    f"posix cannot move {source.space} to {target.space}",
                    remedy="stage through a pool: ask the planner",
                )

    def _parts(self, chunk: Chunk) -> list[tuple[Extent, Extent, BlockSums | None]]:
        """Cut a chunk for the threads that are idle, where several are quicker than one."""
        source, target, nbytes, sums = chunk.source, chunk.target, chunk.nbytes, chunk.sums
        count = min(self._movers.idle, nbytes // MIN_PART_NBYTES) if self._is_shared(source.space, target.space) else 1
        if count < 2:
            return [(source, target, sums)]
        marks = [nbytes * number // count // PART_ALIGNMENT * PART_ALIGNMENT for number in range(count)]
        if sums is not None:
            marks = sorted({_between(sums, mark) for mark in marks})
        spans = list(itertools.pairwise([*marks, nbytes]))
        kept = self._kept.get(source, target)
        if kept is None or kept[0] != spans:
            kept = spans, [(source.cut(*span), target.cut(*span)) for span in spans]
            self._kept.put(source, target, kept)
        return [(*part, sums and sums.cut(*span)) for span, part in zip(*kept, strict=True)]

    def _is_shared(self, source: Space, target: Space) -> bool:
        has_ring = isinstance(self._engine, Rings)
        if isinstance(source, FileSpace):
            # Copies from the page cache keep a core busy each; one ring keeps a disk busy.
            return not (has_ring and self._policy.wants(source))
        # Writers to one file take turns in the kernel, unless they go past the page cache.
        return isinstance(target, FileSpace) and self._policy.wants(target) and not has_ring


def _between(sums: BlockSums, mark: int) -> int:
    """Return where the block begins that a mark would cut in two, or the mark."""
    block = int(sums.stop.searchsorted(mark, side="right"))
    return min(mark, int(sums.begin[block])) if block < len(sums.begin) else mark
