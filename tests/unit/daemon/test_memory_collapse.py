"""Pages are collapsed in the background, once each, tried again when busy, and given up where the kernel refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from xferd.api.errors import Closed
from xferd.api.mapping import HUGE_PAGE_NBYTES, map_shared
from xferd.daemon.memory.collapse import PageCollapser, collapse_page
from xferd.daemon.memory.pool import HostPool

MIB = 1 << 20
BASE = 1 << 40


class Kernel:
    """Answers as told, notes what was asked, and lets a test wait for it."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.asked: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, address: int) -> int:
        with self._changed:
            self.asked.append((address - BASE) // HUGE_PAGE_NBYTES)
            self._changed.notify_all()
            return self.answers.pop(0) if self.answers else 0

    async def wait(self, count: int) -> None:
        def waiting() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.asked) >= count, timeout=30)

        assert await asyncio.to_thread(waiting), self.asked


def collapser(kernel, pages=8):
    return PageCollapser("test", BASE, pages * HUGE_PAGE_NBYTES, collapse=kernel, retry_s=0.001)


async def test_only_whole_pages_of_a_span_and_each_once():
    kernel = Kernel()
    pages = collapser(kernel)
    pages.add(4096, 3 * HUGE_PAGE_NBYTES)  # pages 1 and 2 are whole in it
    pages.add(HUGE_PAGE_NBYTES, 3 * HUGE_PAGE_NBYTES)  # 1 to 3
    pages.add(5 * HUGE_PAGE_NBYTES, HUGE_PAGE_NBYTES - 1)
    await kernel.wait(3)
    await pages.aclose()
    assert kernel.asked == [1, 2, 3]
    assert pages.huge_nbytes == 3 * HUGE_PAGE_NBYTES


async def test_busy_pages_are_tried_again_and_at_last_left_alone():
    kernel = Kernel(0, errno.EAGAIN, *[errno.EBUSY] * 3)
    pages = collapser(kernel)
    pages.add(0, 2 * HUGE_PAGE_NBYTES)
    await kernel.wait(6)
    await pages.aclose()
    assert kernel.asked == [0, 1, 1, 1, 1, 1]
    assert pages.huge_nbytes == 2 * HUGE_PAGE_NBYTES
    assert pages.refusal == ""

    stubborn = Kernel(*[errno.EAGAIN] * 6)
    pages = collapser(stubborn)
    pages.add(0, HUGE_PAGE_NBYTES)
    await stubborn.wait(6)
    pages.add(HUGE_PAGE_NBYTES, HUGE_PAGE_NBYTES)
    await stubborn.wait(7)
    await pages.aclose()
    assert stubborn.asked == [0] * 6 + [1]
    assert pages.huge_nbytes == HUGE_PAGE_NBYTES


async def test_refusing_kernel_is_asked_once():
    kernel = Kernel(errno.EINVAL)
    pages = collapser(kernel)
    pages.add(0, 4 * HUGE_PAGE_NBYTES)
    await kernel.wait(1)
    await pages.aclose()
    assert kernel.asked == [0]
    assert "EINVAL" in pages.refusal
    assert pages.huge_nbytes == 0


async def test_closing_stops_after_the_page_at_hand():
    begun, may_end = threading.Event(), threading.Event()

    def slow(_address: int) -> int:
        begun.set()
        assert may_end.wait(30)
        return 0

    pages = collapser(slow)
    pages.add(0, 8 * HUGE_PAGE_NBYTES)
    assert await asyncio.to_thread(begun.wait, 30)
    closing = asyncio.create_task(pages.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    may_end.set()
    await closing
    assert pages.huge_nbytes == HUGE_PAGE_NBYTES
    assert not any(thread.name.startswith("xferd-pages") for thread in threading.enumerate())
    await pages.aclose()
    pages.add(0, HUGE_PAGE_NBYTES)
    assert not any(thread.name.startswith("xferd-pages") for thread in threading.enumerate())


def huge_kib(address: int) -> int:
    """Return what the kernel says of a mapping: KiB mapped by huge pages."""
    text = Path("/proc/self/smaps").read_text()
    [entry] = re.findall(rf"(?ms)^{address:x}-.*?^ShmemPmdMapped:\s+(\d+) kB", text)
    return int(entry)


@pytest.fixture
def can_collapse():
    fd = os.memfd_create("probe")
    os.ftruncate(fd, HUGE_PAGE_NBYTES)
    array = map_shared(fd, HUGE_PAGE_NBYTES)
    os.close(fd)
    code = collapse_page(array.ctypes.data)
    if code:
        pytest.skip(f"this kernel does not collapse pages of memory files: {errno.errorcode[code]}")


async def until(condition):
    """Wait for the background thread, which has no event to offer to strangers."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # the thread tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("can_collapse")
async def test_allocated_extents_become_huge_and_keep_their_bytes():
    pool = HostPool("host", 16 * MIB, collapse="allocated")
    [small, large] = pool.allocate_group([4096, 6 * MIB])
    view = pool.view(large, 6 * MIB)
    data = np.random.default_rng(1).integers(0, 255, 6 * MIB, dtype=np.uint8)
    view[:] = data
    await until(lambda: pool.info().huge_nbytes == 6 * MIB)  # both lie side by side, and fill the first page
    np.testing.assert_array_equal(view, data)
    assert huge_kib(pool.address) == 6 * 1024
    assert not pool.view(small, 4096).any()
    pool.free(large)
    [again] = pool.allocate_group([6 * MIB])
    assert not pool.view(again, 6 * MIB).any()
    del view
    await pool.aclose()


@pytest.mark.usefixtures("can_collapse")
async def test_whole_pool_becomes_huge_from_the_start_and_reads_as_zeros():
    pool = HostPool("host", 9 * MIB, collapse="all")
    await until(lambda: pool.info().huge_nbytes == 8 * MIB)
    assert pool.info().huge_refusal == ""
    assert not pool.view(0, 9 * MIB).any()
    await pool.aclose()
    with pytest.raises(Closed):
        pool.allocate_group([1])


async def test_nothing_happens_where_it_is_off():
    pool = HostPool("host", 8 * MIB)
    pool.allocate_group([8 * MIB])
    assert not any(thread.name.startswith("xferd-pages") for thread in threading.enumerate())
    assert pool.info().huge_nbytes == 0
    await pool.aclose()
