"""Short files, full devices and durability in the posix backend, whatever engine it has; exact bytes are in
``tests/conformance``."""

from __future__ import annotations

import asyncio
import os
import resource
import signal

import numpy as np
import pytest
from arenas import FileArena, MappedArena
from check_backend import pattern
from pydantic import ValidationError

from xferd.api.errors import Cancelled, MoveFailed, ShortTransfer, Unsupported
from xferd.plugins.base import Chunk, Extent, FileSpace, LegScope, MappedSpace
from xferd.plugins.posix import PosixBackend, PosixOptions, native
from xferd.plugins.posix.engines import Calls, Rings, Stop
from xferd.plugins.posix.pieces import pieces_of

WAYS = {
    "io_uring": {"engine": "io_uring"},
    "shallow": {"engine": "io_uring", "queue_depth": 4},
    "threads": {"engine": "threads"},
    "unmapped": {"engine": "io_uring", "mapped_reads": False},
    "direct": {"engine": "io_uring", "direct": True},
    "direct-threads": {"engine": "threads", "direct": True},
}
MANY = [(number * 8192, 4096) for number in range(300)]
"""More rows than a plain loop of calls is taken for, and more than a ring has room for."""


@pytest.fixture(params=WAYS)
async def backend(request):
    backend = PosixBackend(PosixOptions(**WAYS[request.param]))
    await backend.start()
    yield backend
    await backend.aclose()


@pytest.fixture
def file():
    arena = FileArena(8192 * 300)
    yield arena
    arena.close()


def chunk(source, target):
    return Chunk(source, target, source.nbytes, "t", "c")


async def test_short_file_is_a_short_transfer(backend, file):
    memory = MappedArena(8192)
    file.cut(5000)
    with pytest.raises(ShortTransfer, match=r"ended after \d+ of \d+"):
        await backend.move(chunk(file.extent([(0, 8192)]), memory.extent([(0, 8192)])))
    assert backend.statistics().failures == 1


@pytest.mark.parametrize("nbytes", [0, 4096, 8192 * 100 + 17, 8192 * 299 + 4095])
async def test_file_that_was_cut_below_any_of_many_rows_is_a_short_transfer(backend, file, nbytes):
    memory = MappedArena(file.nbytes)
    file.cut(nbytes)
    with pytest.raises(ShortTransfer, match=f"file size {nbytes}"):
        await backend.move(chunk(file.extent(MANY), memory.extent(MANY)))
    assert backend.statistics().moved_nbytes == 0


async def test_row_that_ends_where_the_file_ends_is_read(backend, file):
    memory = MappedArena(10_000)
    file.fill(pattern(file.nbytes, 1))
    file.cut(8192 + 100)
    await backend.move(chunk(file.extent([(8000, 292)]), memory.extent([(3, 292)])))
    assert np.array_equal(memory.read()[3:295], pattern(file.nbytes, 1)[8000:8292])


async def test_write_past_the_end_makes_the_file_longer(backend, file):
    memory = MappedArena(100)
    memory.fill(pattern(100, 1))
    file.cut(0)
    await backend.move(chunk(memory.extent([(0, 100)]), file.extent([(1000, 100)])))
    assert os.fstat(file.space.fd).st_size == 1100
    assert os.pread(file.space.fd, 100, 1000) == pattern(100, 1).tobytes()


@pytest.mark.parametrize("rows", [[(0, 100)], [(number * 200, 100) for number in range(50)]], ids=["one", "many"])
async def test_full_device_names_the_errno(backend, rows):
    memory, fd = MappedArena(10_000), os.open("/dev/full", os.O_WRONLY)
    target = Extent(FileSpace(fd, "/dev/full"), np.array(rows, dtype=np.uint64))
    with pytest.raises(MoveFailed, match="ENOSPC") as caught:
        await backend.move(chunk(memory.extent(rows), target))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.remedy
    os.close(fd)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("count", [2, 50], ids=["few", "many"])
async def test_an_error_of_the_device_in_the_midst_names_it(backend, count, write):
    """This process's own memory as the device: rows that are there, and then one that is not, which is EIO."""
    there, memory = MappedArena(100 * count), MappedArena(100 * count)
    fd = os.open("/proc/self/mem", os.O_RDWR)
    base = int(there.extent([(0, 1)]).iov[0, 0])
    rows = [(base + 100 * number, 100) for number in range(0, 2 * count - 2, 2) if number < count] + [(4096, 100)]
    device = Extent(FileSpace(fd, "/proc/self/mem"), np.array(rows, dtype=np.uint64))
    side = memory.extent([(0, 100 * len(rows))])
    with pytest.raises(MoveFailed, match="EIO") as caught:
        await backend.move(chunk(side, device) if write else chunk(device, side))
    assert isinstance(caught.value.__cause__, OSError)
    assert backend.statistics().failures == 1
    os.close(fd)


async def test_limit_in_the_midst_of_many_rows_fails_the_chunk(backend, file):
    """The system refuses rows beyond a size of file: some have been written, and the error says why not all."""
    memory = MappedArena(file.nbytes)
    limits, was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192 * 100, limits[1]))
    try:
        with pytest.raises(MoveFailed, match="EFBIG"):
            await backend.move(chunk(memory.extent(MANY), file.extent(MANY)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, was)
    await backend.move(chunk(memory.extent(MANY), file.extent(MANY)))


async def test_memory_that_is_not_mapped_fails_the_chunk(backend, file):
    memory = MappedArena(file.nbytes)
    rows = memory.extent(MANY).iov
    rows[150:, 0] -= np.uint64(memory.base)  # the lowest addresses, which nobody may map
    rows[150:, 0] -= rows[150, 0]
    with pytest.raises(MoveFailed, match="EFAULT"):
        await backend.move(chunk(file.extent(MANY), Extent(MappedSpace(), rows)))


async def test_file_to_file_goes_through_memory(backend, file):
    assert "file to file" in backend.refusal(file.space, file.space)
    with pytest.raises(Unsupported):
        await backend.move(chunk(file.extent([(0, 8)]), file.extent([(8, 8)])))


async def test_slots_keep_a_chunk_waiting_at_each_mover(file):
    backend = PosixBackend(PosixOptions(movers=5))
    assert backend.slots(file.space, MappedSpace()) == 10
    assert backend.statistics().slots == 10
    await backend.aclose()


# ------------------------------------------------------------------------------------------ durability


async def test_sync_that_fails_fails_the_chunk():
    backend = PosixBackend(PosixOptions(fsync="data"))
    memory, fd = MappedArena(100), os.open("/dev/null", os.O_WRONLY)
    target = Extent(FileSpace(fd, "/dev/null"), memory.extent([(0, 100)]).iov)
    with pytest.raises(MoveFailed, match="fdatasync of /dev/null") as caught:
        await backend.move(chunk(memory.extent([(0, 100)]), target))
    assert isinstance(caught.value.__cause__, OSError)
    os.close(fd)
    await backend.aclose()


@pytest.mark.parametrize("fsync", ["none", "data"])
async def test_leg_is_put_on_the_disk_once_at_its_end(fsync):
    """/dev/null takes every byte and no sync: chunks go through, and the commit says that nothing is durable."""
    backend = PosixBackend(PosixOptions(fsync=fsync))
    memory, fd = MappedArena(100), os.open("/dev/null", os.O_WRONLY)
    source = memory.extent([(0, 100)])
    target = Extent(FileSpace(fd, "/dev/null"), source.iov)
    leg = await backend.open_leg(LegScope(source, target, 200, "t", "c"))
    assert await leg.move(chunk(source, target)) == 100
    assert await leg.move(chunk(source, target)) == 100
    with pytest.raises(MoveFailed, match="fdatasync of /dev/null"):
        await leg.commit()
    os.close(fd)
    await backend.aclose()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("fsync", ["none", "data"])
def test_leg_is_needed_where_a_file_is_written_that_must_be_on_the_disk(file, fsync, asked):
    backend = PosixBackend(PosixOptions(fsync=fsync))
    assert backend.can_flush()
    assert not backend.is_transactional
    assert backend.needs_leg(file.space, durable=asked) is (asked or fsync == "data")
    assert not backend.needs_leg(MappedSpace(), durable=False), "a file is read"


# ------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize(
    "make", [Calls, lambda: Rings(8), lambda: Rings(8, native.load())], ids=["threads", "io_uring", "compiled"]
)
def test_stopped_engine_leaves_out_what_it_has_not_begun(make, file):
    """Stopped from the start it begins one turn at most, and comes back with nothing under way."""
    engine, memory, stop = make(), MappedArena(file.nbytes), Stop()
    file.fill(pattern(file.nbytes, 1))
    stop.set()
    pieces = pieces_of(file.extent(MANY).iov, memory.extent(MANY).iov)
    results = engine.perform(file.space.fd, pieces, write=False, stop=stop)
    begun = int(np.count_nonzero(results))
    assert begun <= 8
    assert np.array_equal(results, np.where(np.arange(300) < begun, 4096, 0))
    assert not memory.read()[8192 * 8 :].any()
    engine.close()


async def test_cancelled_move_ends_between_batches():
    """Of 64 MiB in 16,384 requests, a move that is cancelled as it begins does not do all."""
    backend = PosixBackend(PosixOptions(movers=1, queue_depth=8, mapped_reads=False))
    await backend.start()
    arena, memory = FileArena(128 << 20), MappedArena(64 << 20)
    rows = [(number * 8192, 4096) for number in range(16_384)]
    arena.fill(np.full(arena.nbytes, 7, np.uint8))
    source, target = arena.extent(rows), memory.extent([(0, 64 << 20)])
    move = asyncio.ensure_future(backend.move(chunk(source, target)))
    while not memory._bytes[0]:  # noqa: ASYNC110  # a byte in memory is no event
        await asyncio.sleep(0)
    move.cancel()
    await asyncio.wait([move])
    assert move.cancelled()
    assert not memory.read()[-4096:].any(), "it went on to the end"
    arena.close()
    await backend.aclose()


def test_stop_is_an_error_of_ours():
    stop = Stop()
    stop.check()
    stop.set()
    with pytest.raises(Cancelled):
        stop.check()


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"movers": 64, "bounce": 1 << 20}, "64 movers need at least 8388608"),
        ({"direct_below": ("mnt/x",)}, "is not absolute"),
        ({"queue_depth": 0}, "greater than or equal to 1"),
        ({"engine": "libaio"}, "'auto', 'io_uring' or 'threads'"),
    ],
)
def test_options_that_cannot_be(wanted, said):
    with pytest.raises(ValidationError, match=said):
        PosixOptions(**wanted)


@pytest.mark.parametrize("movers", [1, 2, 3, 64])
@pytest.mark.parametrize("bounce", [8 << 20, (8 << 20) + 12_345, 100 << 20])
def test_bounce_memory_holds_two_pieces_of_each_thread(movers, bounce):
    options = PosixOptions(movers=movers, bounce=bounce)
    assert options.movers * options.bounce_nbytes <= bounce
    assert 2 * options.piece_nbytes <= options.bounce_nbytes
    assert options.piece_nbytes & (options.piece_nbytes - 1) == 0
    assert options.piece_nbytes >= 64 << 10
