"""Shared memory mapped into this process, with an address that system calls and numpy can use.

A mapping outlives its owner's ``close`` for as long as somebody still has a numpy view of it, so that a view can
never point at memory that is gone. Raw addresses have no such protection: whoever uses one holds the region.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api.errors import Closed
from xferd.api.mapping import map_shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Mapping:
    """``nbytes`` bytes of a file descriptor, or anonymous ones for fd -1, mapped shared.

    The fd stays the caller's, and is not needed any more. From 2 MiB on, the address is one that huge pages can back.

    Attributes:
        address: of the first byte in this process; does not change.
        nbytes: size of the mapping.
        writable: whether the bytes may be written through it.

    Raises:
        OSError: as mmap(2).
    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool = True) -> None:
        self._bytes: NDArray[np.uint8] | None = map_shared(fd, nbytes, writable=writable)
        self.address = int(self._bytes.ctypes.data)
        self.nbytes = nbytes
        self.writable = writable

    def view(self, offset: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """Return a numpy view of a span, without a copy; it stays good after ``close``.

        Raises:
            Closed: the mapping was closed.
        """
        if self._bytes is None:
            raise Closed("the mapping was closed", remedy="take views before closing")
        return self._bytes[offset : None if nbytes is None else offset + nbytes]

    def close(self) -> None:
        """Unmap, now or when the last view goes. Twice is fine."""
        self._bytes = None
