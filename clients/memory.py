"""Regions as a client holds them: their bytes as numpy arrays without a copy, and rows of descriptor lists.

What needs the daemon (freeing, reading over gRPC) is in ``sync.py`` and ``aio.py``, whose regions derive from
``RegionBase``.
"""

from __future__ import annotations

import fcntl
import math
import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xferd.api import mapping
from xferd.api.descriptors import U64, DescriptorList
from xferd.api.errors import Closed, InvalidArgument, InvalidDescriptor, OutOfBounds, PermissionDenied, Unsupported
from xferd.api.types import Access, MemoryKind, QueryItem, RegionSource

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

    from xferd.api.types import DeviceHandle, Notification, RegionId, RegionInfo, RegionListing

ByteArray: TypeAlias = NDArray[np.uint8]

STREAM_NBYTES = 1 << 20
"""Bytes of one message of a streaming read or write."""

_SEALS = fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK


def map_shared(fd: int, nbytes: int) -> ByteArray:
    """Map a memfd for reading and writing; the mapping lives as long as the array or a view of it.

    Raises:
        Unsupported: the system refuses; ``__cause__`` has its error.
    """
    try:
        return mapping.map_shared(fd, nbytes)
    except OSError as exc:
        raise Unsupported(
            f"{nbytes} bytes cannot be mapped: {exc}", remedy="check RLIMIT_AS and RLIMIT_NOFILE"
        ) from exc


def make_memfd(nbytes: int, name: str) -> tuple[int, ByteArray]:
    """Return a memfd that cannot shrink, and its mapping; the caller closes the fd.

    Sealed because the daemon maps it too: a shrunken file would kill it with SIGBUS.
    """
    if nbytes <= 0:
        raise InvalidArgument(f"a memfd of {nbytes} bytes", limit="at least 1 byte", remedy="ask for bytes")
    fd = os.memfd_create(name[:200] or "xferd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, *_SEALS)
        return fd, map_shared(fd, nbytes)
    except OSError as exc:
        os.close(fd)
        raise Unsupported(f"a memfd of {nbytes} bytes cannot be made: {exc.strerror}", remedy="ask for less") from exc
    except Unsupported:
        os.close(fd)
        raise


def bytes_of(array: object) -> ByteArray:
    """Return the memory of an array, or of anything with a buffer, as bytes, without a copy.

    Raises:
        InvalidArgument: it is not contiguous, empty, or has no memory of its own to register.
    """
    try:
        view = array if isinstance(array, np.ndarray) else np.frombuffer(memoryview(array).cast("B"), np.uint8)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as exc:
        raise InvalidArgument(
            f"{type(array).__name__} has no memory to register: {exc}", remedy="give an array"
        ) from exc
    if not view.nbytes or not view.flags.c_contiguous or view.dtype.hasobject:
        raise InvalidArgument(
            f"an array of shape {view.shape}, strides {view.strides}, dtype {view.dtype} cannot be registered",
            limit="C-contiguous, at least one byte, no Python objects",
            remedy="use np.ascontiguousarray, or register the whole array and name parts by offset",
        )
    return view.reshape(-1).view(np.uint8)


def address_of(view: ByteArray) -> int:
    """Return the address of an array's first byte."""
    address: int = view.__array_interface__["data"][0]
    return address


class RegionBase:
    """A region: its record, its bytes where this process can reach them, and rows of it for descriptor lists.

    ``info`` is the daemon's record. An array from ``array`` shares memory with the region; after ``free`` the
    memory may belong to somebody else, so such arrays must not be used any more.
    """

    def __init__(self, info: RegionInfo, memory: ByteArray | None) -> None:
        self.info = info
        self._memory = memory
        self._handle: DeviceHandle | None = None  # of GPU memory, once asked for
        self._fate = ""

    @property
    def _is_freed(self) -> bool:
        return bool(self._fate)

    @property
    def id(self) -> RegionId:
        """The region's id on its node."""
        return self.info.id

    @property
    def nbytes(self) -> int:
        """Size; for an allocated region what was asked for, rounded up to 4096."""
        return self.info.nbytes

    def array(self, dtype: DTypeLike = np.uint8, shape: int | tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return the region's bytes as an array, without a copy.

        Args:
            dtype: of the elements.
            shape: from the region's start; may be smaller than the region. None takes all whole elements.

        Raises:
            OutOfBounds: the shape is larger than the region.
            Unsupported: this process cannot map the region: it is a file, of another node, or of a session
                without file descriptors. ``read`` and ``write`` still work for regions of this node.
            Closed: the region was freed.
        """
        memory = self._bytes()
        kind = np.dtype(dtype)
        if shape is None:
            return memory[: len(memory) // kind.itemsize * kind.itemsize].view(kind)
        lengths = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in lengths):
            raise InvalidArgument(f"shape {lengths}", limit="lengths of at least 0", remedy="write every length out")
        nbytes = math.prod(lengths) * kind.itemsize
        if nbytes > len(memory):
            raise OutOfBounds(
                f"shape {lengths} of {kind} takes {nbytes} bytes",
                limit=f"{len(memory)} bytes in region {self.id}",
                remedy="allocate more, or take a smaller shape",
            )
        return memory[:nbytes].view(kind).reshape(lengths)

    def rows(self, offsets: ArrayLike, nbytes: ArrayLike) -> DescriptorList:
        """Return a list of spans of this region; one value in ``nbytes`` stands for all rows."""
        return DescriptorList.from_columns(self.id, offsets, nbytes, node=self.info.node, epoch=self.info.epoch)

    def blocks(self, index: ArrayLike, block_nbytes: int) -> DescriptorList:
        """Return a list of blocks by number, for a region cut into blocks of ``block_nbytes`` bytes each.

        Raises:
            OutOfBounds: a number past the last whole block.
        """
        if block_nbytes <= 0:
            raise InvalidDescriptor(f"blocks of {block_nbytes} bytes", limit="at least 1 byte", remedy="give a size")
        numbers = np.atleast_1d(np.asarray(index))
        if numbers.dtype.kind not in "iu":
            raise InvalidDescriptor(f"block numbers of dtype {numbers.dtype}", limit="integers", remedy="give numbers")
        count = self.nbytes // block_nbytes
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= count):
            wrong = int(numbers.min()) if int(numbers.min()) < 0 else int(numbers.max())
            raise OutOfBounds(
                f"block {wrong} of region {self.id}",
                limit=f"0 to {count - 1}: {self.nbytes} bytes in blocks of {block_nbytes}",
                remedy="number blocks from 0",
            )
        return self.rows(numbers.astype(U64) * np.uint64(block_nbytes), block_nbytes)

    def whole(self) -> DescriptorList:
        """Return a list of one row: the whole region."""
        return self.rows(0, self.nbytes)

    def __repr__(self) -> str:
        state = f", {self._fate}" if self._fate else ""
        return f"<{type(self).__name__} {self.id} {self.info.kind.value} {self.nbytes} bytes @{self.info.node}{state}>"

    def _check_live(self) -> None:
        if self._is_freed:
            raise Closed(f"region {self.id} was {self._fate}")

    def _mapped(self) -> ByteArray | None:
        """Return the region's bytes where this process has them; a subclass may map them now."""
        return self._memory

    def _bytes(self) -> ByteArray:
        self._check_live()
        memory = self._mapped()
        if memory is None:
            raise Unsupported(
                f"region {self.id} ({self.info.source.value} on {self.info.node}) cannot be mapped here",
                limit="regions of this node's pools and of this client's memory, in a session over the session socket",
                remedy="use read() and write(), dlpack() for GPU memory, or a transfer into what can be mapped",
            )
        return memory

    def _span(self, offset: int, nbytes: int | None) -> tuple[int, int]:
        """Return a checked (offset, nbytes); None reaches to the end."""
        self._check_live()
        length = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or length < 0 or offset + length > self.nbytes:
            raise OutOfBounds(
                f"bytes {offset} to {offset + length} of region {self.id}",
                limit=f"{self.nbytes} bytes",
                remedy="stay inside the region",
            )
        return offset, length

    def _copy_out(self, offset: int, nbytes: int) -> bytes | None:
        """Return bytes where the region is mapped, else None."""
        memory = self._mapped()
        return None if memory is None else memory[offset : offset + nbytes].tobytes()

    def _copy_in(self, offset: int, data: ByteArray) -> bool:
        """Write bytes where the region is mapped; False where it is not."""
        memory = self._mapped()
        if memory is None:
            return False
        if not memory.flags.writeable:
            raise PermissionDenied(
                f"region {self.id} may not be written", limit=f"access {self.info.access.name}", remedy="ask its owner"
            )
        memory[offset : offset + len(data)] = data
        return True

    def _forget(self, fate: str = "freed") -> None:
        """Note that the region is freed, or has another owner."""
        self._fate = fate
        self._memory = None


def pool_view(info: RegionInfo, pool: ByteArray, agent: str) -> ByteArray:
    """Return a region's part of its mapped pool; read-only where ``agent`` has no right to write."""
    view = pool[info.pool_offset : info.pool_offset + info.nbytes]
    if not info.writable or (info.agent != agent and Access.WRITE not in info.access):
        view.flags.writeable = False
    return view


def query_item(item: str | os.PathLike[str] | tuple[str, str]) -> QueryItem:
    """Return what to ask for a path, or for (store, key)."""
    if isinstance(item, tuple):
        store, key = item
        return QueryItem(store=store, key=key)
    return QueryItem(path=os.fspath(item))


def handed_over(notification: Notification) -> tuple[RegionId, ...]:
    """Return the regions that a notification hands over.

    Raises:
        InvalidArgument: none.
    """
    if not notification.regions:
        raise InvalidArgument(
            f"the notification from {notification.source} hands nothing over",
            limit="notifications with regions",
            remedy="its sender must give the regions with hand_over",
        )
    return notification.regions


def owned_by(agent: str, listing: RegionListing) -> tuple[RegionInfo, ...]:
    """Return the records of a listing, all of which must be an agent's.

    Raises:
        PermissionDenied: one belongs to another agent: it was handed on.
    """
    for info in listing.regions:
        if info.agent != agent:
            raise PermissionDenied(
                f"region {info.id} belongs to agent {info.agent}",
                limit=f"regions of agent {agent}",
                remedy="it was handed on; take it up by its record with region()",
            )
    return listing.regions


def is_mappable(info: RegionInfo, node: str) -> bool:
    """Say whether a region lies in a pool of this node that is memory of the host."""
    return info.source is RegionSource.POOL and info.kind is MemoryKind.DRAM and info.node == node


def source_bytes(data: object) -> ByteArray:
    """Return what is to be written as bytes: an array of any layout, or anything with a buffer."""
    if isinstance(data, np.ndarray):
        return bytes_of(np.ascontiguousarray(data)) if data.size else np.empty(0, np.uint8)
    view = memoryview(data)  # type: ignore[arg-type]
    return np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.empty(0, np.uint8)
