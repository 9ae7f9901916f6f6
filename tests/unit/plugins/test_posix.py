"""Short files, full devices and durability in the posix backend; exact bytes are in ``tests/conformance``."""

from __future__ import annotations

import os

import pytest
from arenas import FileArena, MappedArena
from check_backend import pattern

from xferd.api.errors import MoveFailed, ShortTransfer, Unsupported
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace
from xferd.plugins.posix import PosixBackend, PosixOptions


@pytest.fixture
async def backend():
    backend = PosixBackend(PosixOptions())
    await backend.start()
    yield backend
    await backend.aclose()


@pytest.fixture
def file():
    arena = FileArena(8192)
    yield arena
    arena.close()


def chunk(source, target):
    return Chunk(source, target, source.nbytes, "t", "c")


async def test_short_file_is_a_short_transfer(backend, file):
    memory = MappedArena(8192)
    file.cut(5000)
    with pytest.raises(ShortTransfer, match="ended after 5000 of 8192"):
        await backend.move(chunk(file.extent([(0, 8192)]), memory.extent([(0, 8192)])))
    assert backend.statistics().failures == 1


async def test_write_past_the_end_makes_the_file_longer(backend, file):
    memory = MappedArena(100)
    memory.fill(pattern(100, 1))
    file.cut(0)
    await backend.move(chunk(memory.extent([(0, 100)]), file.extent([(1000, 100)])))
    assert os.fstat(file.space.fd).st_size == 1100
    assert os.pread(file.space.fd, 100, 1000) == pattern(100, 1).tobytes()


async def test_full_device_names_the_errno(backend):
    memory, fd = MappedArena(100), os.open("/dev/full", os.O_WRONLY)
    target = Extent(FileSpace(fd, "/dev/full"), memory.extent([(0, 100)]).iov)
    with pytest.raises(MoveFailed, match="ENOSPC"):
        await backend.move(chunk(memory.extent([(0, 100)]), target))
    os.close(fd)


async def test_sync_that_fails_fails_the_chunk():
    backend = PosixBackend(PosixOptions(fsync="data"))
    memory, fd = MappedArena(100), os.open("/dev/null", os.O_WRONLY)
    target = Extent(FileSpace(fd, "/dev/null"), memory.extent([(0, 100)]).iov)
    with pytest.raises(MoveFailed, match="fdatasync of /dev/null") as caught:
        await backend.move(chunk(memory.extent([(0, 100)]), target))
    assert isinstance(caught.value.__cause__, OSError)
    os.close(fd)
    await backend.aclose()


async def test_file_to_file_goes_through_memory(backend, file):
    assert "file to file" in backend.refusal(file.space, file.space)
    with pytest.raises(Unsupported):
        await backend.move(chunk(file.extent([(0, 8)]), file.extent([(8, 8)])))


async def test_slots_are_the_movers(file):
    backend = PosixBackend(PosixOptions(movers=5))
    assert backend.slots(file.space, MappedSpace()) == 5
    await backend.aclose()
