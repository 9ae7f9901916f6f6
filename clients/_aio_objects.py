"""What the async client hands out: regions, prepared lists, transfers. Users import them from ``aio.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from xferd.clients import _calls as calls
from xferd.clients.devices import element_shape
from xferd.clients.memory import ByteArray, RegionBase, source_bytes
from xferd.clients.transfers import PreparedBase, TransferBase, check_in_time

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import DTypeLike

    from xferd.api import types as t
    from xferd.clients._aio_link import AsyncLink
    from xferd.clients._ring_tracks import Track
    from xferd.clients.devices import DeviceArray


class AsyncRegion(RegionBase):
    """A region of this session, or one that it may see. A context manager that frees it."""

    def __init__(self, client: AsyncLink, info: t.RegionInfo, memory: ByteArray | None = None) -> None:
        super().__init__(info, memory)
        self._client = client

    async def read(self, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return a copy of a span: from memory where it is mapped, else over gRPC, the slow road."""
        offset, nbytes = self._span(offset, nbytes)
        copied = self._copy_out(offset, nbytes)
        return await self._client._read_stream(self.id, offset, nbytes) if copied is None else copied

    async def write(self, data: object, offset: int = 0) -> int:
        """Write an array or a buffer into the region; returns the number of bytes. As ``read``, the other way."""
        source = source_bytes(data)
        self._span(offset, len(source))
        if self._copy_in(offset, source):
            return len(source)
        return await self._client._write_stream(self.id, offset, source)

    async def dlpack(self, dtype: DTypeLike = np.uint8, shape: int | tuple[int, ...] | None = None) -> DeviceArray:
        """Return a region of GPU memory for torch, cupy and others to take without a copy.

        ``torch.from_dlpack``, ``cupy.asarray`` and the like take what is returned. The memory stays mapped while
        anybody has it; after ``free`` the bytes may be another's, as with ``array``.

        Args:
            dtype: of the elements; numpy's, or "bfloat16".
            shape: from the region's start; may be smaller than the region. None takes all whole elements.

        Raises:
            OutOfBounds: the shape is larger than the region.
            Unsupported: it is no GPU memory of this node, or there is no driver here.
        """
        self._check_live()
        return await self._client._device_array(self, element_shape(self.nbytes, dtype, shape))

    async def free(self) -> None:
        """Give the region back. Twice is fine.

        Raises:
            Busy: a transfer moves bytes of it.
        """
        if not self._is_freed:
            await self._client._free([self])

    async def map(self) -> Self:
        """Map the region's pool now, so that ``array`` works; needed for regions that were listed, not allocated."""
        self._check_live()
        if self._memory is None:
            await self._client._map(self.info)
        return self

    def _mapped(self) -> ByteArray | None:
        self._client._check_open()
        if self._memory is None:
            self._memory = self._client._view(self.info)
        return self._memory

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._client.is_closed:  # with the session, its regions went
            await self.free()


class AsyncPreparedList(PreparedBase):
    """A prepared list. A context manager that releases it."""

    def __init__(self, client: AsyncLink, info: t.PreparedInfo) -> None:
        super().__init__(info)
        self._client = client

    async def release(self) -> None:
        """Let the daemon forget the list; transfers that use it are not disturbed. Twice is fine."""
        if not self._is_released:
            await self._client._call(calls.release_prepared([self.handle]))
            if self._client._ring is not None:
                self._client._ring.forget_list(self.handle)
            self._is_released = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._client.is_closed:
            await self.release()


class AsyncTransfer(TransferBase):
    """A transfer under way: ``await`` it for its end. A context manager that releases it, cancelling what still runs.

    A cancelled wait leaves the transfer going on.
    """

    def __init__(self, client: AsyncLink, told: t.TransferStatus | Track) -> None:
        super().__init__(told)
        self._client = client

    def _glance(self) -> None:
        if self._client._ring is not None:
            self._client._ring.glance()

    def __await__(self) -> Generator[Any, None, t.TransferStatus]:
        """Wait as ``wait`` does without a timeout."""
        return self.wait().__await__()

    async def wait(self, timeout_s: float | None = None) -> t.TransferStatus:
        """Wait for the end and return the status of a transfer that is DONE.

        Raises:
            XferdError: it failed; this is its own error.
            Cancelled: it was cancelled.
            DeadlineExceeded: ``timeout_s`` are over and it still runs (``is_ended`` is False), or its own deadline
                has failed it (``is_ended`` is True).
        """
        [status] = await self._client._wait([self], timeout_s, any_of=False)
        return check_in_time(status, timeout_s)

    async def poll(self) -> t.TransferStatus:
        """Return the status; a failure is told, not raised. Asks the daemon unless its end stands in the ring."""
        status = await self._client._glance_at(self)
        if status is None:
            [self.status] = await self._client._call(calls.poll([self.id]))
            status = self.status
        return status

    async def post(self, *, wait_s: float = 0.0) -> t.TransferStatus:
        """Post it if it was held, or again if it has ended; ``wait_s`` waits for its end in the same call.

        Raises:
            InvalidState: it is under way.
        """
        ring = self._client._ring
        if ring is not None and ring.is_usable:
            track = await ring.post(self, wait_s)
            if track is not None:
                return track.status if wait_s <= 0 else await self._client._whole(track)
        return await self._client._post_by_call(self, wait_s)

    async def cancel(self) -> t.TransferStatus:
        """Cancel; no byte moves any more when this returns. One that had ended keeps its state."""
        [status] = await self._client._cancel([self])
        return status

    async def release(self) -> None:
        """Let the daemon forget it, cancelling it first if it runs."""
        await self._client._release([self])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._client.is_closed:
            await self.release()
