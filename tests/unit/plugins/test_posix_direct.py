"""Past the page cache: the cache is really passed by, neighbours lose nothing, memory is bounded, and what has no
O_DIRECT goes the plain way and says so."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from arenas import FileArena, MappedArena
from check_backend import pattern

from xferd.api.errors import MoveFailed
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace
from xferd.plugins.posix import PosixBackend, PosixOptions
from xferd.plugins.posix.direct import DirectFile, DirectPolicy

MIB = 1 << 20


def chunk(source, target):
    return Chunk(source, target, source.nbytes, "t", "c")


async def started(**wanted):
    backend = PosixBackend(PosixOptions(**wanted))
    await backend.start()
    return backend


@pytest.fixture
def file():
    arena = FileArena(4 * MIB)
    arena.fill(pattern(4 * MIB, 1))
    os.fsync(arena.space.fd)
    yield arena
    arena.close()


@pytest.fixture
def passes_cache(file):
    """Skip where the temporary directory's file system keeps everything in memory anyway."""
    try:
        DirectFile(file.space).close()
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {tempfile.gettempdir()}: {error}")
    drop(file.space.fd)
    if cached(file.space.fd, file.nbytes):
        pytest.skip(f"{tempfile.gettempdir()} is memory")


def drop(fd):
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached(fd, nbytes):
    """Pages of a file that are in the page cache."""
    with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        seen = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
        assert not ctypes.CDLL(None).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), ctypes.byref(seen)
        )
        del view
        return sum(page & 1 for page in seen)


def open_descriptors():
    return set(Path("/proc/self/fd").iterdir())


def page_aligned(nbytes):
    """Return an arena whose first byte is at the start of a page, as pools are."""
    arena = MappedArena(nbytes + mmap.PAGESIZE)
    arena.base = (arena.base + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    return arena


@pytest.mark.usefixtures("passes_cache")
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
async def test_cache_is_passed_by_both_ways(file, engine):
    backend = await started(direct=True, engine=engine)
    memory = page_aligned(4 * MIB)
    spans = [(0, 4 * MIB)]
    await backend.move(chunk(file.extent(spans), memory.extent(spans)))
    assert cached(file.space.fd, file.nbytes) == 0
    assert backend._bounce.held_nbytes == 0, "aligned memory went through bounce memory"
    await backend.move(chunk(memory.extent(spans), file.extent(spans)))
    assert cached(file.space.fd, file.nbytes) == 0
    await backend.move(chunk(file.extent([(1, 4 * MIB - 2)]), memory.extent([(3, 4 * MIB - 2)])))
    assert cached(file.space.fd, file.nbytes) == 0, "not aligned, and through bounce memory"
    assert np.array_equal(file.read(), pattern(4 * MIB, 1))
    await backend.aclose()


@pytest.mark.usefixtures("passes_cache")
async def test_files_below_a_directory_alone(file):
    backend = await started(direct_below=("/nowhere",))
    memory = page_aligned(MIB)
    move = chunk(file.extent([(0, MIB)]), memory.extent([(0, MIB)]))
    assert "O_DIRECT" not in backend.manner(file.space, MappedSpace())
    await backend.move(move)
    assert cached(file.space.fd, file.nbytes) > 0
    await backend.aclose()
    backend = await started(direct_below=("/nowhere", tempfile.gettempdir() + "/"))
    assert backend.manner(file.space, MappedSpace()).endswith(", O_DIRECT")
    drop(file.space.fd)
    await backend.move(move)
    assert cached(file.space.fd, file.nbytes) == 0
    await backend.aclose()


def test_a_name_that_only_begins_like_a_directory_is_not_below_it():
    policy = DirectPolicy(every=False, below=("/mnt/nvme",))
    assert policy.wants(FileSpace(3, "/mnt/nvme/a/b"))
    assert not policy.wants(FileSpace(3, "/mnt/nvme2/a"))
    assert not DirectPolicy(every=False).wants(FileSpace(3, "/mnt/nvme/a"))


@pytest.mark.usefixtures("passes_cache")
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
async def test_descriptor_that_a_client_opened_with_o_direct(file, engine):
    """It is moved past the cache without being asked for, at any alignment; and its flags stay as they are."""
    backend = await started(engine=engine)
    fd = os.open(file.space.path, os.O_RDWR | os.O_DIRECT)
    memory, space = MappedArena(MIB), FileSpace(fd, file.space.path)
    memory.fill(pattern(MIB, 2))
    row = np.array([[7, 100_001]], dtype=np.uint64)
    await backend.move(chunk(memory.extent([(5, 100_001)]), Extent(space, row)))
    expected = pattern(4 * MIB, 1).copy()
    expected[7:100_008] = pattern(MIB, 2)[5:100_006]
    assert np.array_equal(file.read(), expected)
    await backend.move(chunk(Extent(space, row), memory.extent([(11, 100_001)])))
    assert np.array_equal(memory.read()[11:100_012], expected[7:100_008])
    os.close(fd)
    await backend.aclose()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
async def test_neighbours_that_share_pages_lose_nothing(file, engine):
    """Moves side by side whose borders lie within a page, again and again: every byte of each arrives."""
    backend = await started(direct=True, engine=engine, movers=4)
    memory = MappedArena(4 * MIB)
    borders = [0, *(number * 65_536 + 1000 * number + 13 for number in range(1, 60)), 4 * MIB]
    for seed in range(2, 8):
        memory.fill(pattern(4 * MIB, seed))
        spans = [[(first, last - first)] for first, last in itertools.pairwise(borders)]
        await asyncio.gather(*(backend.move(chunk(memory.extent(span), file.extent(span))) for span in spans))
        assert np.array_equal(file.read(), pattern(4 * MIB, seed))
        drop(file.space.fd)
        assert np.array_equal(file.read(), pattern(4 * MIB, seed)), "the cache and the disk differ"
    await backend.aclose()


async def test_bounce_memory_is_bounded_under_any_load(file):
    backend = await started(direct=True, movers=3, bounce=600_000)
    arenas = [MappedArena(2 * MIB) for _ in range(12)]
    rows = [(number * 4096 + 1, 4000) for number in range(500)]
    whole = [(number * 4000 + 3, 4000) for number in range(500)]
    moves = [backend.move(chunk(file.extent(rows), arena.extent(whole))) for arena in arenas]
    moves += [backend.move(chunk(file.extent([(9, 2_000_000)]), arena.extent([(9, 2_000_000)]))) for arena in arenas]
    await asyncio.gather(*moves[:12])
    assert 0 < backend._bounce.held_nbytes <= 600_000
    await asyncio.gather(*moves[12:])
    assert 0 < backend._bounce.held_nbytes <= 600_000
    data = pattern(4 * MIB, 1)
    assert all(np.array_equal(arena.read()[9:2_000_009], data[9:2_000_009]) for arena in arenas)
    await backend.aclose()
    assert backend._bounce.held_nbytes == 0


async def test_what_has_no_o_direct_goes_the_plain_way_and_says_so():
    backend = await started(direct=True)
    fd = os.open("/dev/zero", os.O_RDONLY)
    memory, space = MappedArena(MIB), FileSpace(fd, "/dev/zero")
    memory.fill(np.full(MIB, 1, np.uint8))
    assert backend.manner(space, MappedSpace()).endswith(", O_DIRECT")
    row = np.array([[0, MIB]], dtype=np.uint64)
    await backend.move(chunk(Extent(space, row), memory.extent([(0, MIB)])))
    assert not memory.read().any()
    assert "through the page cache because O_DIRECT failed: Invalid argument" in backend.manner(space, MappedSpace())
    os.close(fd)
    await backend.aclose()


async def test_requests_that_are_refused_though_aligned_are_done_the_plain_way(file):
    """A file system that says nothing true of its alignment: each refused request is done, and it is remembered."""
    backend = await started(direct=True)
    file.fill(pattern(4 * MIB, 3))
    space, policy = file.space, backend._policy
    real = policy.open

    def claims_less(space):
        opened = real(space)
        if opened is not None:
            opened.memory_unit = opened.offset_unit = 1
        return opened

    policy.open = claims_less  # type: ignore[method-assign]  # as if the file system had said so
    memory = MappedArena(4 * MIB)
    rows = [(number * 8192 + 1, 4001) for number in range(300)]
    await backend.move(chunk(file.extent(rows), memory.extent(rows)))
    data, found = pattern(4 * MIB, 3), memory.read()
    assert all(np.array_equal(found[at : at + size], data[at : at + size]) for at, size in rows)
    assert "EINVAL" in policy.refusal(space)
    await backend.aclose()


@pytest.mark.usefixtures("passes_cache")
async def test_read_only_descriptor_is_read_past_the_cache_and_never_written(file):
    backend = await started(direct=True)
    fd = os.open(file.space.path, os.O_RDONLY)
    memory, space = page_aligned(MIB), FileSpace(fd, file.space.path)
    row = np.array([[0, MIB]], dtype=np.uint64)
    await backend.move(chunk(Extent(space, row), memory.extent([(0, MIB)])))
    assert cached(file.space.fd, file.nbytes) == 0
    with pytest.raises(MoveFailed, match="EBADF"):
        await backend.move(chunk(memory.extent([(0, MIB)]), Extent(space, row)))
    os.close(fd)
    await backend.aclose()


async def test_nothing_stays_open_after_a_chunk(file):
    backend = await started(direct=True)
    memory = MappedArena(MIB)
    await backend.move(chunk(memory.extent([(0, MIB)]), file.extent([(1, MIB)])))
    before = open_descriptors()
    for _ in range(20):
        await backend.move(chunk(memory.extent([(0, MIB)]), file.extent([(1, MIB)])))
        await backend.move(chunk(file.extent([(1, MIB)]), memory.extent([(0, MIB)])))
    assert len(open_descriptors() - before) <= 2, "more than the rings of the mover threads"
    await backend.aclose()
