"""io_uring by columns: results at their places however often the queue goes round; and where it is forbidden."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from arenas import FileArena, MappedArena
from check_backend import pattern

from xferd.api.errors import Unsupported
from xferd.plugins.posix import native, ring as uring
from xferd.plugins.posix.engines import Rings, Stop
from xferd.plugins.posix.pieces import pieces_of

try:
    uring.probe(8)
except Unsupported as unsupported:
    pytestmark = pytest.mark.skip(f"no io_uring here: {unsupported}")


# Forbids io_uring_setup as container runtimes do (their default profile answers EPERM), then starts the backend.
_FORBIDDEN = """
import asyncio, ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
program = b"".join(struct.pack("=HBBI", *row) for row in [
    (0x20, 0, 0, 0),                # load the number of the call
    (0x15, 0, 1, 425),              # io_uring_setup: go on, else skip
    (0x06, 0, 0, 0x00050000 | int(sys.argv[1])),
    (0x06, 0, 0, 0x7FFF0000),
])
held = ctypes.create_string_buffer(program)
filter = struct.pack("=HxxxxxxQ", 4, ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, os.strerror(ctypes.get_errno())

from xferd.api.errors import Unsupported
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace
from xferd.plugins.posix import PosixBackend, PosixOptions
import numpy as np

async def main():
    try:
        await PosixBackend(PosixOptions(engine="io_uring")).start()
    except Unsupported as error:
        print("refused:", error)
    backend = PosixBackend(PosixOptions())
    await backend.start()
    fd = os.open("/dev/zero", os.O_RDONLY)
    memory = np.ones(100_000, np.uint8)
    rows = np.array([[number * 200, 100] for number in range(500)], dtype=np.uint64)
    there = rows.copy()
    there[:, 0] += np.uint64(memory.ctypes.data)
    space = FileSpace(fd, "/dev/zero")
    print("moved:", await backend.move(Chunk(Extent(space, rows), Extent(MappedSpace(), there), 50_000, "t", "c")))
    print("manner:", backend.manner(space, MappedSpace()), int(memory.sum()))
    await backend.aclose()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_forbidden_io_uring_means_threads_and_is_said(code):
    done = subprocess.run(
        [sys.executable, "-c", _FORBIDDEN, str(int(code))], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    name = errno.errorcode[code]
    assert f"refused: io_uring: {name}" in done.stdout
    assert "moved: 50000" in done.stdout
    assert f"manner: threads (io_uring: {name}" in done.stdout
    assert done.stdout.rstrip().endswith(" 50000"), "bytes that were not moved, or too many"


@pytest.fixture(params=["interpreted", "compiled"])
def turns(request):
    """What turns the rings: None for the interpreter."""
    if request.param == "interpreted":
        return None
    if native.load() is None:
        pytest.skip("no compiler was there when xferd was installed")
    return native.load()


@pytest.mark.parametrize("depth", [1, 2, 7, 64])
def test_results_come_to_their_places_however_the_queue_goes_round(depth, turns):
    """Rows of different sizes, more than three queues of them; the same ring again and again."""
    engine, file, memory = Rings(depth, turns), FileArena(1 << 20), MappedArena(1 << 20)
    data = pattern(1 << 20, 1)
    file.fill(data)
    rng = np.random.default_rng(depth)
    for _ in range(5):
        count = 211
        sizes = rng.integers(1, 2000, count)
        rows = np.stack((rng.permutation(500)[:count] * 2048, sizes), axis=1).astype(np.uint64)
        there = rows[rng.permutation(count)]
        there[:, 1] = rows[:, 1]
        pieces = pieces_of(rows, there + np.array([memory.base, 0], dtype=np.uint64))
        results = engine.perform(file.space.fd, pieces, write=False, stop=Stop())
        assert np.array_equal(results, sizes)
        found = memory.read()
        for (offset, size), (place, _) in zip(rows.tolist(), there.tolist(), strict=True):
            assert np.array_equal(found[place : place + size], data[offset : offset + size])
    engine.close()
    file.close()


def test_after_an_error_nothing_more_is_begun(turns):
    engine, memory = Rings(8, turns), MappedArena(1 << 20)
    rows = np.array([[number * 100, 50] for number in range(1000)], dtype=np.uint64)
    fd = os.open("/dev/full", os.O_WRONLY)
    results = engine.perform(fd, pieces_of(rows, rows + np.array([memory.base, 0], np.uint64)), write=True, stop=Stop())
    assert results[0] == -errno.ENOSPC
    assert int(np.count_nonzero(results)) <= 16
    os.close(fd)
    engine.close()


def test_ring_that_cannot_be_made_in_a_thread_means_calls_for_it():
    """No descriptor is left for a ring: the move is done all the same."""
    import resource

    engine, file, memory = Rings(8), FileArena(8192), MappedArena(8192)
    file.fill(pattern(8192, 1))
    rows = np.array([[0, 100], [200, 100]], dtype=np.uint64)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        pieces = pieces_of(rows, rows + np.array([memory.base, 0], np.uint64))
        results = engine.perform(file.space.fd, pieces, write=False, stop=Stop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert results.tolist() == [100, 100]
    assert np.array_equal(memory.read()[200:300], pattern(8192, 1)[200:300])
    engine.close()
    file.close()


def test_old_kernels_and_switches_are_named():
    assert "older than 6.1" in str(uring._unsupported(errno.EINVAL))
    assert "io_uring_disabled" in str(uring._unsupported(errno.EPERM))
    assert uring._unsupported(errno.EPERM).remedy
