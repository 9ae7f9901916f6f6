"""Writes that are summed just before they go to the page cache: exact bytes, exact sums, and calls where that fails."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from arenas import FileArena, MappedArena
from check_backend import pattern
from hypothesis import given, settings, strategies as st

from xferd.api.errors import Cancelled, MoveFailed
from xferd.plugins.base import BlockSums, Chunk, FileSpace
from xferd.plugins.posix import PosixBackend, PosixOptions, xxh3
from xferd.plugins.posix.engines import Stop
from xferd.plugins.vectored import iov_of

SUMMER = xxh3.load()
if SUMMER is None:
    pytestmark = pytest.mark.skip("no compiler was there when xferd was installed, or no xxh3 for it")

MIB = 1 << 20


def blocks(*edges: tuple[int, int]) -> BlockSums:
    return BlockSums.of(np.array([a for a, _ in edges], np.int64), np.array([b for _, b in edges], np.int64))


def right(sums: BlockSums, data: np.ndarray) -> list[int]:
    pairs = zip(sums.begin.tolist(), sums.stop.tolist(), strict=True)
    return [xxhash.xxh3_64_intdigest(data[begin:stop].tobytes()) for begin, stop in pairs]


def cut(draw, total: int, most: int) -> list[int]:
    inner = draw(st.lists(st.integers(1, total - 1), max_size=most, unique=True)) if total > 1 else []
    edges = [0, *sorted(inner), total]
    return [b - a for a, b in itertools.pairwise(edges)]


@st.composite
def writes(draw):
    """File spans apart from each other in any order, rows of memory, and blocks with gaps between them."""
    total = draw(st.sampled_from([1, 17, 4096, 70_000, MIB + 3, 3 * MIB - 1]))
    spans = cut(draw, total, 12)
    rows = [1] * 700 + cut(draw, total - 700, 5) if total > 1000 and draw(st.booleans()) else cut(draw, total, 20)
    edges = np.cumsum([0, *cut(draw, total, 9)]).tolist()
    pairs = list(itertools.pairwise(edges))
    kept = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    order = draw(st.permutations(range(len(spans))))
    return total, spans, order, rows, [pair for pair, keep in zip(pairs, kept, strict=True) if keep]


@settings(max_examples=120, deadline=None)
@given(writes(), st.integers(0, 2**32))
def test_bytes_and_sums(write, seed):
    total, sizes, order, rows, pairs = write
    data = np.random.default_rng(seed).integers(0, 256, total, dtype=np.uint8)
    store = [data[end - size : end].copy() for size, end in zip(rows, np.cumsum(rows).tolist(), strict=True)]
    memory = np.concatenate([iov_of(part.data) for part in store])
    starts = np.zeros(len(sizes), np.int64)
    at = 5
    for number in order:
        starts[number] = at
        at += sizes[number] + 3
    spans = np.column_stack((starts, sizes)).astype(np.uint64)
    sums = blocks(*pairs)
    fd = os.memfd_create("written")
    try:
        os.ftruncate(fd, at)
        assert SUMMER.write(fd, spans, memory, sums, Stop().flag)
        wanted = np.zeros(at, np.uint8)
        done = 0
        for start, size in spans.tolist():
            wanted[start : start + size] = data[done : done + size]
            done += size
        assert os.pread(fd, at, 0) == wanted.tobytes()
    finally:
        os.close(fd)
    assert sums.values.tolist() == right(sums, data)
    assert sums.is_known.all()


def test_a_call_that_fails_makes_no_sum_known(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    data, sums = pattern(8192, 1).copy(), blocks((0, 4096), (4096, 8192))
    with path.open("rb") as file:
        assert not SUMMER.write(file.fileno(), np.array([[0, 8192]], np.uint64), iov_of(data.data), sums, Stop().flag)
    assert not sums.is_known.any()
    assert path.read_bytes() == bytes(8192)


def test_nothing_is_written_once_it_was_stopped():
    stop, sums = Stop(), blocks((0, 100))
    stop.set()
    fd = os.memfd_create("written")
    try:
        assert not SUMMER.write(fd, np.array([[0, 100]], np.uint64), iov_of(bytearray(100)), sums, stop.flag)
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)
    assert not sums.is_known.any()


@pytest.fixture
def arenas():
    memory, file = MappedArena(4 * MIB), FileArena(4 * MIB)
    memory.fill(pattern(4 * MIB, 3))
    yield memory, file
    memory.close()
    file.close()


def chunk_of(arenas, sums):
    memory, file = arenas
    spans = [(at * MIB, MIB) for at in (2, 0, 3, 1)]
    source, target = memory.extent([(0, 4 * MIB)]), file.extent(spans)
    return Chunk(source, target, 4 * MIB, "t", "c", sums=sums)


@pytest.mark.parametrize("is_cached", [True, False], ids=["page cache", "O_DIRECT"])
async def test_a_backend_sums_what_it_writes_through_the_page_cache(arenas, is_cached):
    """Past it no byte passes the processor: whoever wants sums makes them."""
    sums = blocks(*((at, at + MIB // 2) for at in range(0, 4 * MIB, MIB // 2)))
    backend = PosixBackend(PosixOptions(direct=not is_cached))
    await backend.start()
    try:
        assert await backend.move(chunk_of(arenas, sums)) == 4 * MIB
    finally:
        await backend.aclose()
    memory, file = arenas
    data = np.frombuffer(memory.read(), np.uint8)
    found = np.frombuffer(file.read(), np.uint8)
    for place, at in enumerate((2, 0, 3, 1)):
        assert (found[at * MIB : (at + 1) * MIB] == data[place * MIB : (place + 1) * MIB]).all()
    assert sums.is_known.all() == is_cached
    if is_cached:
        assert sums.values.tolist() == right(sums, data)


async def test_what_the_system_refuses_is_told_as_without_sums(arenas):
    backend = PosixBackend(PosixOptions())
    await backend.start()
    fd = os.open("/dev/full", os.O_WRONLY)
    sums = blocks((0, MIB))
    try:
        chunk = chunk_of(arenas, sums)
        full = replace(chunk, target=replace(chunk.target, space=FileSpace(fd, "/dev/full")))
        with pytest.raises(MoveFailed, match=r"ENOSPC|No space"):
            await backend.move(full)
    finally:
        os.close(fd)
        await backend.aclose()
    assert not sums.is_known.any()


def test_a_move_that_is_stopped_meanwhile_is_cancelled(arenas, monkeypatch):
    """Between two calls, and not written once more by others."""
    backend = PosixBackend(PosixOptions(engine="threads"))
    chunk, stop = chunk_of(arenas, blocks((0, MIB))), Stop()

    def halted(*_: object) -> bool:
        stop.set()
        return False

    monkeypatch.setattr(xxh3.Summer, "write", halted)
    with pytest.raises(Cancelled):
        backend._mover.move(chunk.target.space, chunk.target.iov, chunk.source.iov, chunk.sums, write=True, stop=stop)
