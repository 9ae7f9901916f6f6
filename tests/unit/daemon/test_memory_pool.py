"""A pool is a sealed memfd whose bytes clients see, and whose fresh extents are always zeros."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from xferd.api.errors import Closed, ConfigError, InvalidArgument, PoolExhausted
from xferd.api.types import MemoryKind
from xferd.daemon.memory.backing import PoolBacking, close_backings
from xferd.daemon.memory.pool import HUGE_PAGE_NBYTES, HostPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = 4096


@pytest.fixture
async def pool() -> AsyncIterator[HostPool]:
    made = HostPool("host", 64 * PAGE)
    yield made
    made.check_invariants()
    await made.aclose()


def allocated_blocks(pool: HostPool) -> int:
    """Bytes that the memfd occupies."""
    return os.fstat(pool.fd).st_blocks * 512


async def test_what_a_client_maps_is_what_the_daemon_sees(pool: HostPool) -> None:
    (offset,) = pool.allocate_group([PAGE])
    fd = os.dup(pool.fd)  # as the session socket does
    with mmap.mmap(fd, pool.nbytes) as client:
        os.close(fd)
        client[offset : offset + 5] = b"hello"
        assert pool.view(offset, 5).tobytes() == b"hello"
        pool.view(offset, 5)[:] = np.frombuffer(b"world", dtype=np.uint8)
        assert client[offset : offset + 5] == b"world"


async def test_the_memfd_is_named_and_sealed_for_good(pool: HostPool) -> None:
    assert os.readlink(f"/proc/self/fd/{pool.fd}").startswith("/memfd:xferd:host")  # noqa: PTH115
    for change in (lambda: os.ftruncate(pool.fd, PAGE), lambda: os.ftruncate(pool.fd, 65 * PAGE)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):  # a client must not make it read-only for the next one
        fcntl.fcntl(pool.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


async def test_the_next_owner_sees_zeros_and_neighbours_keep_theirs(pool: HostPool) -> None:
    first, middle, last = pool.allocate_group([PAGE, 3 * PAGE, PAGE])
    for offset, nbytes in ((first, PAGE), (middle, 3 * PAGE), (last, PAGE)):
        pool.view(offset, nbytes)[:] = 0xAA
    pool.free(middle)
    assert pool.allocate_group([3 * PAGE]) == [middle]
    assert not pool.view(middle, 3 * PAGE).any()
    assert pool.view(first, PAGE).min() == pool.view(last, PAGE).min() == 0xAA
    pool.free_group([first, middle, last])
    assert not pool.view(0, pool.nbytes).any()


async def test_untouched_pages_stay_untouched_when_freed(pool: HostPool) -> None:
    (offset,) = pool.allocate_group([32 * PAGE])
    pool.view(offset + 7 * PAGE, PAGE)[:] = 1
    pool.view(offset + 20 * PAGE, 1)[:] = 1
    before = allocated_blocks(pool)
    pool.free(offset)
    assert allocated_blocks(pool) == before == 2 * PAGE
    assert not pool.view(offset + 7 * PAGE, PAGE).any()
    assert not pool.view(offset + 20 * PAGE, 1).any()


async def test_a_full_pool_says_so_and_counts_it(pool: HostPool) -> None:
    pool.allocate_group([32 * PAGE])
    with pytest.raises(PoolExhausted):
        pool.allocate_group([16 * PAGE, 17 * PAGE])
    info = pool.info()
    assert (info.name, info.kind, info.nbytes, info.mappable) == ("host", MemoryKind.DRAM, 64 * PAGE, True)
    assert (info.used_nbytes, info.free_nbytes, info.allocations) == (32 * PAGE, 32 * PAGE, 1)
    assert (info.failed_allocations, info.peak_used_nbytes, info.fragmentation) == (1, 32 * PAGE, 0.0)


async def test_an_extent_is_freed_once(pool: HostPool) -> None:
    (offset,) = pool.allocate_group([PAGE])
    pool.free(offset)
    with pytest.raises(InvalidArgument):
        pool.free(offset)


async def test_backings_of_a_group_close_together_and_once(pool: HostPool) -> None:
    backings = [PoolBacking(pool, offset, pool.address + offset) for offset in pool.allocate_group([PAGE] * 5)]
    assert backings[2].position == pool.address + 2 * PAGE
    backings[1].close()
    close_backings(backings)
    close_backings(backings)
    backings[0].close()
    assert pool.info().allocations == 0


async def test_a_pool_leaves_no_fd_and_a_view_outlives_it() -> None:
    process = psutil.Process()
    before = process.num_fds()
    pool = HostPool("host", 3 * PAGE - 5)
    assert pool.nbytes == 3 * PAGE
    (offset,) = pool.allocate_group([PAGE])
    view = pool.view(offset, PAGE)
    view[:] = 7
    await pool.aclose()
    await pool.aclose()
    assert view.min() == 7
    pool.free(offset)  # what a late close of a backing does
    with pytest.raises(Closed):
        pool.allocate_group([1])
    with pytest.raises(Closed):
        pool.view(0, 1)
    del view
    assert process.num_fds() == before


def test_huge_pages_that_are_not_there_are_a_configuration_error() -> None:
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    before = psutil.Process().num_fds()
    with pytest.raises(ConfigError, match=r"vm\.nr_hugepages|cannot be made") as caught:
        HostPool("host", (free + 1) * HUGE_PAGE_NBYTES, huge_pages=True)
    assert "huge_pages = false" in caught.value.remedy
    assert psutil.Process().num_fds() == before
