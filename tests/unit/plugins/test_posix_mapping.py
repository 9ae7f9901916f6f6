"""Reads by mapping a file: exact bytes, files that are cut under them, and mappings that do not outlive their use."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from arenas import FileArena, MappedArena
from check_backend import pattern
from hypothesis import given, settings, strategies as st

from xferd.api.errors import ShortTransfer
from xferd.plugins.base import BlockSums, Chunk
from xferd.plugins.posix import PosixBackend, PosixOptions, mapping, native, xxh3
from xferd.plugins.posix.mapping import IDLE_S, MAX_FILES, MIN_NBYTES, Mappings

COMPILED = native.load()
if COMPILED is None:
    pytestmark = pytest.mark.skip("no compiler was there when xferd was installed")
elif not mapping.is_possible():
    pytestmark = pytest.mark.skip("the kernel does not tell what is in the page cache (Linux 6.5)")

NBYTES = 1 << 20
PAGE = 4096


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file():
    arena = FileArena(NBYTES)
    arena.fill(pattern(NBYTES, 1))
    yield arena
    arena.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def mappings(clock):
    assert COMPILED is not None
    assert COMPILED.guard() == 0
    made = Mappings(COMPILED, clock)
    yield made
    made.close()
    assert not made.held


def table(rows, base=0):
    iov = np.array(rows, dtype=np.uint64)
    iov[:, 0] += np.uint64(base)
    return iov


def read(mappings, file, rows, places=None):
    """Read rows of the file; returns what is in memory then, or None where calls would have to do it."""
    memory = MappedArena(sum(size for _, size in rows))
    where = places or [(0, memory.nbytes)]
    if not mappings.read(file.space.fd, table(rows), table(where, memory.base)):
        return None
    return memory.read()


def test_whole_file_is_read(mappings, file):
    assert np.array_equal(read(mappings, file, [(0, NBYTES)]), pattern(NBYTES, 1))
    assert mappings.held == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=70, max_size=255, unique=True), st.integers(1, 4096))
def test_scattered_rows_arrive_in_order_whatever_the_rows_of_memory_are(numbers, size):
    assert COMPILED is not None
    COMPILED.guard()
    arena, mappings = FileArena(NBYTES), Mappings(COMPILED)
    arena.fill(pattern(NBYTES, 1))
    rows = [(number * PAGE + number % (PAGE - size + 1), size) for number in numbers] + [
        (NBYTES - MIN_NBYTES, MIN_NBYTES)
    ]
    total = sum(nbytes for _, nbytes in rows)
    first = total // 3
    memory = MappedArena(total)
    places = table([(total - first, first), (0, total - first)], memory.base)
    assert mappings.read(arena.space.fd, table(rows), places)
    wanted = np.concatenate([pattern(NBYTES, 1)[start : start + nbytes] for start, nbytes in rows])
    found = memory.read()
    assert np.array_equal(np.concatenate((found[total - first :], found[: total - first])), wanted)
    mappings.close()
    arena.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 70_000), min_size=1, max_size=12),
    st.lists(st.integers(1, 90_000), min_size=1, max_size=12),
    st.integers(0, 63),
)
def test_sums_made_on_the_way_are_those_of_the_bytes_that_arrive(lengths, rows, skew):
    """Blocks of any length with gaps between, whatever the rows of memory are and wherever they begin."""
    assert COMPILED is not None
    if xxh3.load() is None:
        pytest.skip("there is no libxxhash")
    COMPILED.guard()
    arena, mappings = FileArena(NBYTES), Mappings(COMPILED)
    arena.fill(pattern(NBYTES, 1))
    edges = [edge for edge in np.cumsum(lengths).tolist() if edge <= NBYTES]
    borders = [0, *edges, NBYTES]
    spans = [span for number, span in enumerate(itertools.pairwise(borders)) if number % 3 != 1 and span[0] < span[1]]
    sums = BlockSums.of(*np.array(spans, np.int64).T.copy())
    memory = MappedArena(NBYTES + 64)
    places, at = [], 0
    for size in rows:
        places.append((at, min(size, NBYTES - at)))
        at += size
        if at >= NBYTES:
            break
    if at < NBYTES:
        places.append((at, NBYTES - at))
    assert mappings.read(arena.space.fd, table([(0, NBYTES)]), table(places, memory.base + skew), sums)
    found = memory.read()[skew : skew + NBYTES]
    assert np.array_equal(found, pattern(NBYTES, 1))
    assert sums.is_known.all()
    assert sums.values.tolist() == [xxhash.xxh3_64_intdigest(found[start:stop].tobytes()) for start, stop in spans]
    mappings.close()
    arena.close()


def test_sums_of_a_read_that_failed_are_not_known(mappings, file):
    assert read(mappings, file, [(0, NBYTES)]) is not None
    file.cut(NBYTES - PAGE)
    sums = BlockSums.of(np.array([0]), np.array([PAGE]))
    memory = MappedArena(NBYTES)
    assert not mappings.read(file.space.fd, table([(0, NBYTES)]), table([(0, NBYTES)], memory.base), sums)
    assert not sums.is_known.any()


async def test_parts_of_a_chunk_are_cut_between_blocks(file):
    """So that all are summed on the way, by several threads."""
    if xxh3.load() is None:
        pytest.skip("there is no libxxhash")
    backend = PosixBackend(PosixOptions(movers=2))
    await backend.start()
    memory = MappedArena(NBYTES)
    begin = np.array([0, 300_001, 400_000, 900_000])
    sums = BlockSums.of(begin, np.array([300_001, 400_000, 900_000, NBYTES]))
    chunk = Chunk(file.extent([(0, NBYTES)]), memory.extent([(0, NBYTES)]), NBYTES, "t", "c", sums=sums)
    assert await backend.move(chunk) == NBYTES
    assert sums.is_known.all()
    whole = memory.read()
    spans = zip(sums.begin.tolist(), sums.stop.tolist(), strict=True)
    assert sums.values.tolist() == [xxhash.xxh3_64_intdigest(whole[start:stop].tobytes()) for start, stop in spans]
    await backend.aclose()


def test_small_reads_and_what_is_no_regular_file_are_left_to_calls(mappings, file):
    assert read(mappings, file, [(0, MIN_NBYTES - 1)]) is None
    memory, zero = MappedArena(NBYTES), os.open("/dev/zero", os.O_RDONLY)
    rows = table([(0, NBYTES)])
    assert not mappings.read(zero, rows, table([(0, NBYTES)], memory.base))
    os.close(zero)
    assert not mappings.read(zero, rows, table([(0, NBYTES)], memory.base))
    assert not mappings.held


def test_descriptor_that_cannot_be_mapped_is_left_to_calls(mappings, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    fd = os.open(path, os.O_WRONLY)
    memory = MappedArena(NBYTES)
    assert not mappings.read(fd, table([(0, NBYTES)]), table([(0, NBYTES)], memory.base))
    os.close(fd)


def test_what_is_not_in_the_page_cache_is_left_to_calls(mappings, tmp_path):
    """It would be read by page faults, one at a time."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, pattern(NBYTES, 1).tobytes())
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.pread(fd, MIN_NBYTES, 0)
    if _cached_pages(fd, NBYTES // 2):
        pytest.skip("the file system keeps the pages, as tmpfs does")
    memory = MappedArena(NBYTES)

    def is_read(rows) -> bool:
        return mappings.read(fd, table(rows), table([(0, sum(size for _, size in rows))], memory.base))

    assert not is_read([(0, NBYTES)])
    assert not is_read([(number * 2 * PAGE, PAGE) for number in range(NBYTES // PAGE // 2)])
    assert is_read([(0, MIN_NBYTES)])
    os.close(fd)


def _cached_pages(fd, offset):
    span, found = np.array([offset, 0], np.uint64), np.zeros(5, np.uint64)
    assert not mapping._syscall(mapping._CACHESTAT, fd, span.ctypes.data, found.ctypes.data, 0, 0)
    return int(found[0])


@pytest.mark.parametrize("nbytes", [0, PAGE, NBYTES - PAGE, NBYTES - 1])
def test_file_that_is_cut_after_it_was_mapped_is_left_to_calls(mappings, file, nbytes):
    assert read(mappings, file, [(0, NBYTES)]) is not None
    file.cut(nbytes)
    assert read(mappings, file, [(0, NBYTES)]) is None


@pytest.mark.parametrize("nbytes", [0, PAGE, NBYTES - PAGE, NBYTES - 1])
def test_file_that_is_cut_while_it_is_copied_ends_no_process(mappings, file, nbytes):
    """The last look at the file is skipped here, as if it had been cut just after."""
    assert COMPILED is not None
    read(mappings, file, [(0, NBYTES)])
    [held] = mappings._held.values()
    file.cut(nbytes)
    memory, spans = MappedArena(NBYTES), table([(0, NBYTES)])
    room, target = np.empty_like(spans), table([(0, NBYTES)], memory.base)
    rest = spans.ctypes.data, 1, NBYTES, 0, room.ctypes.data, target.ctypes.data, 1, None
    assert COMPILED.read_mapped(file.space.fd, held.address, *rest) == -1


def test_grown_file_is_mapped_anew(mappings, file):
    read(mappings, file, [(0, NBYTES)])
    os.pwrite(file.space.fd, bytes(range(256)) * (NBYTES // 256), NBYTES)
    found = read(mappings, file, [(NBYTES, NBYTES)])
    assert found.tobytes() == bytes(range(256)) * (NBYTES // 256)
    assert mappings.held == 1


def test_written_bytes_are_read_at_once(mappings, file):
    read(mappings, file, [(0, NBYTES)])
    os.pwrite(file.space.fd, b"other", 5)
    assert read(mappings, file, [(0, NBYTES)])[5:10].tobytes() == b"other"


def test_mappings_go_when_nobody_uses_them(mappings, file, clock):
    read(mappings, file, [(0, NBYTES)])
    clock.now += IDLE_S / 2
    assert mappings.drop_idle()
    read(mappings, file, [(0, NBYTES)])
    clock.now += IDLE_S / 2
    assert mappings.drop_idle(), "used lately"
    clock.now += IDLE_S / 2
    assert not mappings.drop_idle()
    assert not _is_mapped(file)


def test_mapping_in_use_outlives_its_end(mappings, file, clock):
    held = mappings._take(file.space.fd, NBYTES)
    clock.now += 10 * IDLE_S
    assert mappings.drop_idle()
    mappings._drop(next(iter(mappings._held)))
    assert _is_mapped(file)
    mappings._give_back(held)
    assert not _is_mapped(file)


def _is_mapped(file):
    inode = os.fstat(file.space.fd).st_ino
    return any(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


def test_number_of_mappings_is_bounded(mappings, tmp_path):
    memory = MappedArena(MIN_NBYTES)
    for number in range(MAX_FILES + 3):
        path = tmp_path / str(number)
        path.write_bytes(bytes(MIN_NBYTES))
        fd = os.open(path, os.O_RDONLY)
        assert mappings.read(fd, table([(0, MIN_NBYTES)]), table([(0, MIN_NBYTES)], memory.base))
        os.close(fd)
    assert mappings.held == MAX_FILES


# ------------------------------------------------------------------------------------------ SIGBUS

_BUS = """
import os, signal, sys
from xferd.plugins.posix import native
assert native.load().guard() == 0
assert native.load().guard() == 0
os.kill(os.getpid(), signal.SIGBUS)
signal.pause()
"""


def test_sigbus_that_is_not_ours_ends_the_process_as_before():
    done = subprocess.run([sys.executable, "-c", _BUS], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGBUS


def test_reads_are_left_to_calls_where_somebody_else_takes_sigbus(mappings, file):
    before = signal.signal(signal.SIGBUS, lambda *_: None)
    try:
        assert read(mappings, file, [(0, NBYTES)]) is None
    finally:
        signal.signal(signal.SIGBUS, before)
        COMPILED.guard()
    assert read(mappings, file, [(0, NBYTES)]) is not None


@pytest.mark.slow
async def test_reads_of_a_file_that_is_cut_again_and_again_are_whole_or_short():
    """For a second, one thread cuts and restores the file while both movers copy from it."""
    arena, memory, stop = FileArena(8 * NBYTES), MappedArena(8 * NBYTES), threading.Event()
    data = pattern(arena.nbytes, 1)
    arena.fill(data)
    copy = data.tobytes()

    def spoil() -> None:
        while not stop.is_set():
            os.ftruncate(arena.space.fd, NBYTES + 5)
            os.ftruncate(arena.space.fd, 0)
            os.pwrite(arena.space.fd, copy, 0)

    backend = PosixBackend(PosixOptions())
    await backend.start()
    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    ended = {"whole": 0, "short": 0}
    until = time.monotonic() + 1
    while time.monotonic() < until or not all(ended.values()):
        source, target = arena.extent([(0, arena.nbytes)]), memory.extent([(0, arena.nbytes)])
        try:
            assert await backend.move(Chunk(source, target, arena.nbytes, "t", "c")) == arena.nbytes
            ended["whole"] += 1
        except ShortTransfer:
            ended["short"] += 1
    stop.set()
    spoiler.join()
    await backend.aclose()
    arena.close()


# ------------------------------------------------------------------------------------------ the backend


def chunk(file, memory):
    return Chunk(file.extent([(0, NBYTES)]), memory.extent([(0, NBYTES)]), NBYTES, "t", "c")


@pytest.mark.parametrize("wanted", [True, False])
async def test_backend_maps_unless_told_not_to(file, wanted):
    backend, memory = PosixBackend(PosixOptions(mapped_reads=wanted)), MappedArena(NBYTES)
    await backend.start()
    assert ("mapped" in backend.manner(file.space, memory.extent([(0, 1)]).space)) is wanted
    assert "mapped" not in backend.manner(memory.extent([(0, 1)]).space, file.space)
    await backend.move(chunk(file, memory))
    assert np.array_equal(memory.read(), pattern(NBYTES, 1))
    assert _is_mapped(file) is wanted
    await backend.aclose()
    assert not _is_mapped(file)


@pytest.mark.slow
async def test_backend_lets_go_of_files_that_are_not_read_any_more(file):
    backend, memory = PosixBackend(PosixOptions()), MappedArena(NBYTES)
    await backend.start()
    await backend.move(chunk(file, memory))
    async with asyncio.timeout(4 * IDLE_S):
        while _is_mapped(file):  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0.1)
    await backend.move(chunk(file, memory))
    assert _is_mapped(file)
    await backend.aclose()
