"""A way between GPUs and memory of the daemon that workers cannot map: short-lived buffers of streaming calls.

A bounded piece of shared memory, through which such a chunk passes part by part. What pools, staging and clients'
memfds hold never comes here.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.mapping import map_shared
from xferd.plugins.base import Extent, MappedSpace
from xferd.plugins.local import native
from xferd.plugins.local.mapped import MappedCopier
from xferd.plugins.movers import MoverPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from xferd.plugins.base import Chunk
    from xferd.plugins.cuda.manager import DeviceManager

BOUNCE_NBYTES = 4 << 20


class HostBounce:
    """One buffer, made when it is first needed, and used by one chunk at a time."""

    def __init__(self) -> None:
        self._copier = MappedCopier(native.load())
        self._movers = MoverPool("cuda-bounce", 1)
        self._buffer: NDArray[np.uint8] | None = None
        self._lock = asyncio.Lock()

    async def move(self, chunk: Chunk, manager: DeviceManager, move: Callable[[Chunk], Awaitable[int]]) -> int:
        """Move a chunk, one side of which is memory that ``manager`` does not know, by parts through the buffer."""
        async with self._lock:
            buffer = self._made(manager)
            is_upload = isinstance(chunk.source.space, MappedSpace)
            sources, targets = chunk.source.indexed(), chunk.target.indexed()
            for start in range(0, chunk.nbytes, BOUNCE_NBYTES):
                nbytes = min(BOUNCE_NBYTES, chunk.nbytes - start)
                row = np.array([[buffer.ctypes.data, nbytes]], dtype=np.uint64)
                through = Extent(MappedSpace(), row)
                source, target = sources.cut(start, start + nbytes), targets.cut(start, start + nbytes)
                if is_upload:
                    await self._movers.run(self._copier.copy, source.iov, row)
                    await move(replace(chunk, source=through, target=target, nbytes=nbytes))
                else:
                    await move(replace(chunk, source=source, target=through, nbytes=nbytes))
                    await self._movers.run(self._copier.copy, row, target.iov)
        return chunk.nbytes

    async def aclose(self) -> None:
        """End the thread. Twice is fine; the manager lets go of the memory."""
        await self._movers.aclose()
        self._buffer = None

    def _made(self, manager: DeviceManager) -> NDArray[np.uint8]:
        if self._buffer is None:
            fd = os.memfd_create("xferd:bounce", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, BOUNCE_NBYTES)
                self._buffer = map_shared(fd, BOUNCE_NBYTES)
                manager.add_host(self._buffer.ctypes.data, BOUNCE_NBYTES, fd)
            finally:
                os.close(fd)
        return self._buffer
