"""What the local backend says of spaces; that it moves bytes exactly is in ``tests/conformance``."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from arenas import MappedArena, ProcessArena

from xferd.api.errors import MoveFailed, Unsupported
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace, SpaceKind
from xferd.plugins.local import LocalBackend, LocalOptions, native, now
from xferd.plugins.local.mapped import MappedCopier
from xferd.plugins.movers import MoveCounter


@pytest.fixture
async def backend():
    backend = LocalBackend(LocalOptions())
    await backend.start()
    yield backend
    await backend.aclose()


@pytest.fixture
def process():
    arena = ProcessArena(4096)
    yield arena
    arena.close()


def chunk(source, target):
    return Chunk(source, target, source.nbytes, "t", "c")


async def test_two_private_memories_have_no_direct_way(backend, process):
    assert (SpaceKind.PROCESS, SpaceKind.PROCESS) not in backend.pairs()
    assert "process to process" in backend.refusal(process.space, process.space)
    with pytest.raises(Unsupported):
        await backend.move(chunk(process.extent([(0, 8)]), process.extent([(8, 8)])))


async def test_ended_process_is_refused_before_and_fails_during(backend, process):
    mapped = MappedArena(4096)
    assert backend.refusal(process.space, mapped.space) == ""
    process.kill()
    assert f"process {process.space.pid} has ended" in backend.refusal(process.space, mapped.space)
    assert "has ended" in backend.refusal(mapped.space, process.space)
    for source, target in ((process, mapped), (mapped, process)):
        with pytest.raises(MoveFailed, match="ended while its memory was being"):
            await backend.move(chunk(source.extent([(0, 64)]), target.extent([(0, 64)])))
    assert backend.statistics().failures == 2


async def test_files_are_refused_with_a_reason(backend):
    assert "file to mapped" in backend.refusal(FileSpace(0, "x"), MappedSpace())


async def test_slots_are_the_movers(backend):
    assert backend.slots(MappedSpace(), MappedSpace()) == 2
    assert backend.statistics().slots == 2


async def test_private_address_that_is_not_mapped_fails(backend, process):
    memory = MappedArena(64)
    hole = Extent(process.space, np.array([[4096, 64]], dtype=np.uint64))
    with pytest.raises(MoveFailed, match="EFAULT"):
        await backend.move(chunk(hole, memory.extent([(0, 64)])))


@pytest.mark.parametrize(
    ("left", "right", "by_piece", "by_loop"),
    [
        ([(0, 64 << 10)], [(0, 64 << 10)], True, True),
        ([(0, (64 << 10) + 1)], [(0, (64 << 10) + 1)], False, True),
        ([(0, 256 << 10)], [(0, 256 << 10)], False, True),
        ([(0, (256 << 10) + 1)], [(0, (256 << 10) + 1)], False, False),
        ([(n * 64, 32) for n in range(32)], [(0, 1024)], True, True),
        ([(n * 64, 32) for n in range(33)], [(0, 33 * 32)], False, True),
        ([(0, 33 * 32)], [(n * 64, 32) for n in range(33)], False, True),
        ([(0, 257 * 32)], [(n * 64, 32) for n in range(257)], False, False),
    ],
)
@pytest.mark.parametrize("has_loop", [False, True])
def test_small_copies_between_mappings_are_made_at_once(left, right, by_piece, by_loop, has_loop):
    compiled = native.load() if has_loop else None
    if has_loop and compiled is None:
        pytest.skip("no compiler was there when xferd was installed")
    source, target = MappedArena(1 << 19).extent(left), MappedArena(1 << 19).extent(right)
    counter = MoveCounter()
    call = now.compile_copy(source.iov, target.iov, counter, MappedCopier(compiled))
    assert (call is not None) == (by_loop if has_loop else by_piece)
    assert counter.chunks == 0


async def test_private_memory_is_never_copied_on_the_loop(backend, process):
    mapped = MappedArena(4096).extent([(0, 8)])
    private = process.extent([(0, 8)])
    assert backend.move_now(mapped, private) is None
    assert backend.move_now(private, mapped) is None


def _scattered(count, block, seed):
    return [(int(n) * block, block) for n in np.random.default_rng(seed).permutation(count * 2)[:count]]


@pytest.mark.parametrize("movers", [1, 2, 3])
@pytest.mark.parametrize("block", [1000, 4096, 1 << 20])
async def test_a_chunk_is_shared_by_idle_movers_and_counted_once(movers, block):
    before = {t for t in threading.enumerate() if t.name.startswith("xferd-local_")}  # of other tests' backends
    backend = LocalBackend(LocalOptions(movers=movers))
    count = (4 << 20) // block
    left, right = _scattered(count, block, 1), _scattered(count, block, 2)
    source, target = MappedArena(count * block * 2), MappedArena(count * block * 2)
    data = np.random.default_rng(5).integers(1, 255, source.nbytes, dtype=np.uint8)
    source.fill(data)
    target.fill(np.zeros(target.nbytes, dtype=np.uint8))
    work = chunk(source.extent(left), target.extent(right))
    assert await backend.move(work) == work.nbytes
    expected = np.zeros(target.nbytes, dtype=np.uint8)
    for (at, size), (to, _) in zip(left, right, strict=True):
        expected[to : to + size] = data[at : at + size]
    np.testing.assert_array_equal(target.read(), expected)
    counted = backend.statistics()
    assert (counted.chunks, counted.moved_nbytes, counted.busy) == (1, work.nbytes, 0)
    started = {t for t in threading.enumerate() if t.name.startswith("xferd-local_")} - before
    assert len(started) == movers
    await backend.aclose()


async def test_a_shared_chunk_that_fails_in_one_part_fails_once(backend, process):
    nbytes = 2 << 20
    memory = MappedArena(nbytes)
    rows = np.array([[process.base, 4096]] + [[4096, 4096]] * (nbytes // 4096 - 1), dtype=np.uint64)
    with pytest.raises(MoveFailed, match="EFAULT"):
        await backend.move(chunk(Extent(process.space, rows), memory.extent([(0, nbytes)])))
    counted = backend.statistics()
    assert (counted.failures, counted.chunks, counted.busy) == (1, 0, 0)
