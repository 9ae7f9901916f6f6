"""What the local backend says of spaces; that it moves bytes exactly is in ``tests/conformance``."""

from __future__ import annotations

import numpy as np
import pytest
from arenas import MappedArena, ProcessArena

from xferd.api.errors import MoveFailed, Unsupported
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace, SpaceKind
from xferd.plugins.local import LocalBackend, LocalOptions


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
