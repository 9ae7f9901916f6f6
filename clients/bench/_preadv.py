"""A loop of preadv or pwritev in a few threads: what the page cache gives without a daemon."""

from __future__ import annotations

import itertools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._kinds import nameless_file
from xferd.clients.bench._patterns import Blocks
from xferd.clients.bench._probes import Probe, System

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.clients.bench._patterns import Rows
    from xferd.clients.memory import ByteArray

THREADS = 2


class Preadv(System):
    """A file and memory of this process, and one system call a block."""

    name: ClassVar[str] = "preadv"
    orders: ClassVar[tuple[str, ...]] = ("random", "sequential")

    def __init__(self, region_nbytes: int) -> None:
        self._region_nbytes = region_nbytes
        self._stack = ExitStack()
        self._made: tuple[int, ByteArray, mmap.mmap] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def refusal(self, case: Case) -> str:
        """Take what goes between a file in the page cache and memory of the host."""
        is_known = case.place is Place.LOCAL and case.ends == ("DRAM", "FILE")
        return "" if is_known else "it moves files in the page cache only"

    def probe(self, case: Case) -> Probe:
        """Return the probe, making the file and the memory that all probes share."""
        if self._made is None or self._pool is None:
            with nameless_file(self._region_nbytes) as (lent, file):
                fd = os.dup(lent)
            self._stack.callback(os.close, fd)
            self._made = fd, file, mmap.mmap(-1, self._region_nbytes)
            self._pool = self._stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="preadv"))
        return PreadvProbe(case, *self._made, self._pool)

    def settings(self) -> dict[str, object]:
        """Return the number of threads."""
        return {"threads": THREADS}

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._made = None
        self._pool = None
        self._stack.close()


class PreadvProbe(Probe):
    """Moves random blocks to random places."""

    system: ClassVar[str] = Preadv.name

    def __init__(self, case: Case, fd: int, file: ByteArray, memory: mmap.mmap, pool: ThreadPoolExecutor) -> None:
        super().__init__(case)
        self._fd, self._pool = fd, pool
        self._file, self._view = Blocks(file, case.block_nbytes), memoryview(memory)
        self._memory = Blocks(np.frombuffer(memory, np.uint8), case.block_nbytes)
        self._visit = 0
        self._rows: tuple[Rows, Rows] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def begin(self, visit: int) -> None:
        """Choose blocks on both sides, stamp the source, clear the target."""
        rng = np.random.default_rng(visit)
        self._visit = visit
        is_random, batch = self.case.order == "random", self.case.batch
        counts = self._file.count, self._memory.count
        first, second = (rng.permutation(count)[:batch] if is_random else np.arange(batch) for count in counts)
        self._rows = first, second
        source, target = self._sides()
        source[0].stamp(source[1], visit)
        target[0].clear()

    def request(self) -> None:
        """Move all blocks, each thread a part of them."""
        rows = list(zip(self._rows[0].tolist(), self._rows[1].tolist(), strict=True))
        marks = [len(rows) * number // THREADS for number in range(THREADS + 1)]
        parts = [rows[first:last] for first, last in itertools.pairwise(marks)]
        list(self._pool.map(self._move, parts))

    def verify(self) -> str:
        """Compare with the pattern."""
        source, target = self._sides()
        return str(target[0].fault(target[1], source[1], self._visit) or "")

    def _move(self, rows: list[tuple[int, int]]) -> None:
        size = self.case.block_nbytes
        call = os.preadv if self.case.op == "READ" else os.pwritev
        for block, place in rows:
            moved = call(self._fd, [self._view[place * size : (place + 1) * size]], block * size)
            assert moved == size, "a short call"

    def _sides(self) -> tuple[tuple[Blocks, Rows], tuple[Blocks, Rows]]:
        """Return (source, its blocks), (target, its blocks)."""
        sides = (self._file, self._rows[0]), (self._memory, self._rows[1])
        return sides if self.case.op == "READ" else (sides[1], sides[0])
