"""The ``faulty`` backend: another backend with faults at chosen moments, for drills and for tests of whoever uses it.

It ships with the product: an operator can rehearse a slow, lying or dying backend on a node of their own. Which chunk
meets which fault depends only on the seeds and on the order of the chunks.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from xferd.api.errors import Closed, MoveFailed, PeerLost, ShortTransfer, Unsupported
from xferd.plugins import vectored
from xferd.plugins.base import Chunk, FileSpace, MappedSpace, ProcessSpace
from xferd.plugins.decorator import BackendDecorator
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Nbytes, Options, Seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xferd.plugins.base import Backend, BackendStatistics, Extent, Space


class FaultOptions(Options):
    """One entry of ``faults``. It strikes a chunk when all of its conditions hold.

    What it does: ``delay`` waits before the chunk moves. ``error`` and ``disconnect`` move ``fraction`` of it and raise
    ``MoveFailed`` or ``PeerLost``. ``short`` moves ``fraction`` of it, and then by ``mode``: "raise" says so as
    ``ShortTransfer``; "lie" returns the smaller count as if all were well; "hide" claims that all was moved.
    ``corrupt`` inverts one byte of the target after the move, or of the source for the length of the move where the
    target cannot be reached from here.
    """

    kind: Literal["delay", "error", "short", "disconnect", "corrupt"]
    after_nbytes: Nbytes = Field(0, description="condition: so many bytes were moved before")
    every: int = Field(1, ge=1, description="condition: every n-th chunk of those that meet after_nbytes")
    probability: float = Field(1.0, gt=0, le=1, description="condition: chance for each of those chunks")
    limit: int = Field(0, ge=0, description="condition: at most so many times; 0 is no limit")
    seed: int = Field(0, description="of the chance, and of the position of a corrupted byte")
    delay: Seconds = Field(0.1, description="of kind delay")
    fraction: float = Field(0.5, ge=0, lt=1, description="part of the chunk moved by error, disconnect and short")
    mode: Literal["raise", "lie", "hide"] = Field("raise", description="of kind short")


class FaultyOptions(Options):
    """``[backends.faulty]``: the name of the backend to wrap, and the faults, tried in their order for each chunk."""

    inner: str = Field(min_length=1)
    faults: tuple[FaultOptions, ...] = ()


class FaultyBackend(BackendDecorator):
    """Wraps a backend and is a little cheaper than it, so that the planner tries it first and then fails over."""

    name: ClassVar[str] = "faulty"
    options: ClassVar[type[BaseModel]] = FaultyOptions

    def __init__(self, options: BaseModel, inner: Backend, *, owns_inner: bool) -> None:
        super().__init__(options, inner, owns_inner=owns_inner)
        assert isinstance(options, FaultyOptions)
        self._faults = [_Fault(fault) for fault in options.faults]
        self._counter = MoveCounter()
        self._movers = MoverPool(self.name, 1)
        self._injected: Counter[str] = Counter()
        self._closed = False

    @classmethod
    def wraps(cls, options: BaseModel) -> str:
        """Return ``inner`` of the options."""
        assert isinstance(options, FaultyOptions)
        return options.inner

    async def aclose(self) -> None:
        """Refuse new moves, then close the inner backend if it is ours."""
        self._closed = True
        await self._movers.aclose()
        await super().aclose()

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return nine tenths of the inner backend's estimate."""
        return 0.9 * self.inner.estimate_s(source, target, nbytes, pieces)

    async def move(self, chunk: Chunk) -> int:
        """Move the chunk by the inner backend, with the faults that strike it.

        Raises:
            MoveFailed, PeerLost, ShortTransfer: injected; the message says so.
            XferdError: whatever the inner backend raises.
        """
        if self._closed:
            raise Closed("the faulty backend was closed")
        # Decided before the first await, so that the order of the calls decides alone.
        struck = [fault for fault in self._faults if fault.strikes(self._counter.moved_nbytes)]
        self._injected.update(fault.options.kind for fault in struck)
        with self._counter.moving(chunk.nbytes):
            return await self._move(chunk, struck)

    def statistics(self) -> BackendStatistics:
        """Return counters of what went through here; injected failures are failures."""
        return self._counter.snapshot(self.inner.statistics().slots)

    def injected(self) -> Mapping[str, int]:
        """Return how many faults of each kind were injected since the start."""
        return dict(self._injected)

    async def _move(self, chunk: Chunk, struck: list[_Fault]) -> int:
        corruptions = []
        for fault in struck:
            match fault.options.kind:
                case "delay":
                    await asyncio.sleep(fault.options.delay)
                case "corrupt":
                    corruptions.append(fault.position(chunk.nbytes))
                case _:
                    return await self._fail(chunk, fault)
        if not corruptions:
            return await self.inner.move(chunk)
        return await self._corrupt(chunk, corruptions)

    async def _fail(self, chunk: Chunk, fault: _Fault) -> int:
        part = int(chunk.nbytes * fault.options.fraction)
        moved = await self.inner.move(_head(chunk, part)) if part else 0
        story = f"after {moved} of {chunk.nbytes} bytes, injected by backends.faulty"
        match fault.options.kind:
            case "error":
                raise MoveFailed(f"error {story}") from OSError(5, os.strerror(5))
            case "disconnect":
                raise PeerLost(f"disconnected {story}")
            case _ if fault.options.mode == "raise":
                raise ShortTransfer(f"short {story}")
            case _:
                return moved if fault.options.mode == "lie" else chunk.nbytes

    async def _corrupt(self, chunk: Chunk, positions: list[int]) -> int:
        if _can_invert(chunk.target):
            moved = await self.inner.move(chunk)
            for position in positions:
                await self._movers.run(_invert, chunk.target.cut(position, position + 1))
            return moved
        if not _can_invert(chunk.source):
            raise Unsupported(f"faulty cannot corrupt {chunk.source.space} nor {chunk.target.space}")
        inverted = []
        try:
            for position in positions:
                span = chunk.source.cut(position, position + 1)
                _invert(span)  # one byte, on the loop: with no await here no cancellation leaves the source damaged
                inverted.append(span)
            return await self.inner.move(chunk)
        finally:
            for span in inverted:
                _invert(span)


class _Fault:
    """A fault with its memory: how many chunks it has seen and struck."""

    def __init__(self, options: FaultOptions) -> None:
        self.options = options
        self._random = random.Random(options.seed)
        self._seen = 0
        self._struck = 0

    def strikes(self, moved_nbytes: int) -> bool:
        if moved_nbytes < self.options.after_nbytes or (self.options.limit and self._struck >= self.options.limit):
            return False
        self._seen += 1
        if self._seen % self.options.every or self._random.random() >= self.options.probability:
            return False
        self._struck += 1
        return True

    def position(self, nbytes: int) -> int:
        return self._random.randrange(nbytes)


def _head(chunk: Chunk, nbytes: int) -> Chunk:
    source, target = chunk.source.cut(0, nbytes), chunk.target.cut(0, nbytes)
    return Chunk(source, target, nbytes, chunk.transfer_id, chunk.cause_id, chunk.agent)


def _can_invert(extent: Extent) -> bool:
    return isinstance(extent.space, MappedSpace | ProcessSpace | FileSpace)


def _invert(span: Extent) -> None:
    """Invert the bits of a span of one byte, by the same calls as any other move."""
    byte = np.zeros(1, dtype=np.uint8)
    scratch = np.array([[byte.ctypes.data, 1]], dtype=np.uint64)
    match span.space:
        case MappedSpace():
            vectored.copy_local(span.iov, scratch)
            byte ^= 0xFF
            vectored.copy_local(scratch, span.iov)
        case ProcessSpace(pid, pidfd):
            vectored.copy_process(scratch, span.iov, pid, write=False, pidfd=pidfd)
            byte ^= 0xFF
            vectored.copy_process(scratch, span.iov, pid, write=True, pidfd=pidfd)
        case FileSpace(fd):
            vectored.read_file_spans(fd, span.iov, scratch)
            byte ^= 0xFF
            vectored.write_file_spans(fd, span.iov, scratch)
