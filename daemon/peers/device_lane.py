"""GPU memory as a lane's thread reaches it: each move between it and staging memory is made on the event loop.

The bytes take one more step than those of host memory, by a device worker; the wire behind it is far slower.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.api.errors import DeadlineExceeded, ShortTransfer, Unsupported
from xferd.api.timeouts import timeout
from xferd.plugins.base import Chunk, Extent, MappedSpace

if TYPE_CHECKING:
    from xferd.plugins.base import Backend, IovTable

TIMEOUT_S = 30.0
"""For one window. Workers that hang are killed by their backend well before."""


class DeviceLane:
    """Moves between staging memory and GPUs, from threads. Made on the event loop, which runs while it is used.

    Args:
        backend: moves DEVICE with MAPPED; None where there is none, and then no region is GPU memory.
        timeout_s: for one call.
    """

    def __init__(self, backend: Backend | None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()

    def move(self, there: Extent, staging: IovTable, holder: str, *, write: bool) -> None:
        """Copy between staging rows and an extent of GPU memory, ``write`` towards the GPU; totals are equal.

        Blocks. When it returns or raises no byte of it moves any more. Errors as ``Backend.move``.
        """
        here = Extent(MappedSpace(), staging)
        source, target = (here, there) if write else (there, here)
        chunk = Chunk(source, target, there.nbytes, holder, holder)
        asyncio.run_coroutine_threadsafe(self._move(chunk), self._loop).result()

    async def _move(self, chunk: Chunk) -> None:
        if self._backend is None:
            raise Unsupported("this node has no backend for GPUs", remedy="configure [backends.cuda]")
        try:
            # The time is kept here and not by the thread: a move that is cancelled ends only when it has come to rest.
            async with timeout(self._timeout_s):
                moved = await self._backend.move(chunk)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{chunk.nbytes} bytes between staging memory and a GPU",
                limit=f"{self._timeout_s:g} s",
                remedy="try again; see the node's log for its device workers",
            ) from None
        if moved != chunk.nbytes:
            raise ShortTransfer(f"a GPU moved {moved} of {chunk.nbytes} bytes", remedy="see the node's log")
