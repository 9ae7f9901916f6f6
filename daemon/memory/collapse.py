"""Huge pages for pools that have none set aside: the kernel is asked to collapse 512 small pages into one of 2 MiB.

Copies between collapsed pools are faster, because far fewer pages are looked up (``docs/performance.md``).
``MADV_COLLAPSE`` (Linux 6.1) works where transparent huge pages for shared memory are off, as they are by default. It
takes milliseconds of CPU a page, so that it is done in the background, a few pages at a time; what is being copied
meanwhile is not harmed.

Not here: pages set aside by the administrator (``huge_pages`` in ``pool.py``), which need none of this.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import heapq
import os
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import structlog

from xferd.api.mapping import HUGE_PAGE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

_NICE = 10
"""Of the thread: a tenth of a core where all are wanted. At 19 it might keep the interpreter lock too long when it is
moved off a core in the wrong moment."""

_RETRIES = 5
"""A page that is being copied to or from cannot be collapsed at that moment; it is tried again after 1, 2, 4, ... s."""

_TRY_AGAIN = frozenset({errno.EAGAIN, errno.EBUSY, errno.ENOMEM})

_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25

_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_madvise.restype = ctypes.c_int

log = structlog.get_logger(__name__)


def collapse_page(address: int) -> int:
    """Make the 2 MiB at an address one page, zeroed where nothing was yet; returns 0, or the errno of the refusal."""
    # One small page must exist: the kernel finds nothing to collapse in a span that nobody touched.
    if _madvise(address, 4096, _MADV_POPULATE_WRITE) or _madvise(address, HUGE_PAGE_NBYTES, _MADV_COLLAPSE):
        return ctypes.get_errno()
    return 0


class PageCollapser:
    """Collapses spans of one mapping in a thread named ``xferd-pages-<name>``, started when first needed.

    Args:
        name: of the pool.
        address: of the mapping, which begins at a huge page and stays until ``aclose`` has returned.
        nbytes: of the mapping.
        collapse: as ``collapse_page``.
        retry_s: after how long a page that was busy is tried again for the first time.
    """

    def __init__(
        self,
        name: str,
        address: int,
        nbytes: int,
        *,
        collapse: Callable[[int], int] = collapse_page,
        retry_s: float = 1.0,
    ) -> None:
        self._name = name
        self._address = address
        self._collapse = collapse
        self._retry_s = retry_s
        self._is_huge = bytearray(nbytes // HUGE_PAGE_NBYTES)
        self._huge = 0
        self._refusal = ""
        self._spans: SimpleQueue[range | None] = SimpleQueue()
        self._later: list[tuple[float, int, int]] = []  # a heap of (when, retry, page)
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def huge_nbytes(self) -> int:
        """Bytes in pages that were collapsed."""
        return self._huge * HUGE_PAGE_NBYTES

    @property
    def refusal(self) -> str:
        """Why the kernel does none of it, or ""."""
        return self._refusal

    def add(self, offset: int, nbytes: int) -> None:
        """Collapse the huge pages that lie wholly within a span, soon. Thread-safe if calls do not overlap."""
        pages = range(-(-offset // HUGE_PAGE_NBYTES), (offset + nbytes) // HUGE_PAGE_NBYTES)
        if not pages or self._stopping or self._refusal:
            return
        self._spans.put(pages)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"xferd-pages-{self._name}", daemon=True)
            self._thread.start()

    async def aclose(self) -> None:
        """Stop after the page at hand, which takes milliseconds. Twice is fine."""
        self._stopping = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._spans.put(None)
            await asyncio.to_thread(thread.join)

    # ------------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + _NICE)
        while (pages := self._next()) is not None:
            for page in pages:
                if self._stopping or self._refusal:
                    return
                self._try(page, retry=0)
            self._try_later()

    def _next(self) -> range | None:
        """Return the next span, an empty one when it is time for a page that was busy; None to stop."""
        wait_s = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        try:
            return self._spans.get(timeout=wait_s)
        except Empty:
            return range(0)

    def _try_later(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic() and not self._stopping:
            _, retry, page = heapq.heappop(self._later)
            self._try(page, retry)

    def _try(self, page: int, retry: int) -> None:
        if self._is_huge[page]:
            return
        code = self._collapse(self._address + page * HUGE_PAGE_NBYTES)
        if not code:
            self._is_huge[page] = 1
            self._huge += 1
        elif code in _TRY_AGAIN or self._huge:
            if retry < _RETRIES:
                heapq.heappush(self._later, (time.monotonic() + self._retry_s * 2**retry, retry + 1, page))
        else:
            self._refusal = f"the kernel refuses to collapse pages ({errno.errorcode.get(code, code)})"
            log.warning(
                "no_huge_pages",
                pool=self._name,
                reason=self._refusal,
                remedy="Linux 6.1 or newer with transparent huge pages, or set pages aside and use huge_pages = true",
            )
