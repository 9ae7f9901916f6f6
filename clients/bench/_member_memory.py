"""A client process's own regions, of any memory kind, with their bytes at hand to stamp and to look at."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import Unsupported
from xferd.api.types import Access
from xferd.clients.bench._patterns import Blocks
from xferd.clients.memory import map_shared

if TYPE_CHECKING:
    from xferd.clients.memory import ByteArray
    from xferd.clients.sync import Client, Region


@dataclass(frozen=True, slots=True)
class Owned:
    """A region and its bytes as this process sees them."""

    region: Region
    memory: ByteArray

    def blocks(self, block_nbytes: int) -> Blocks:
        """Return the bytes cut into blocks."""
        return Blocks(self.memory, block_nbytes)


def make_region(client: Client, kind: str, nbytes: int) -> Owned:
    """Make a region that others may read and write; it goes with the session.

    Raises:
        Unsupported: there is no such memory yet.
    """
    access = Access.READ_WRITE
    match kind:
        case "DRAM":
            region = client.allocate(nbytes, access=access, label="bench")
            return Owned(region, region.array())
        case "MEMFD":
            region = client.register_memfd(nbytes, access=access, label="bench")
            return Owned(region, region.array())
        case "PRIVATE":
            memory = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
            memory[:] = 1  # present, and not all one page of zeros
            return Owned(client.register(memory, access=access, label="bench"), memory)
        case "FILE":
            return _file_region(client, nbytes)
        case _:
            raise Unsupported(f"memory of kind {kind}", remedy="choose DRAM, MEMFD, PRIVATE or FILE")


def _file_region(client: Client, nbytes: int) -> Owned:
    """Make a file without a name, which goes with its last user, and register it by descriptor."""
    with tempfile.TemporaryFile(prefix="xferbench-") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        memory = map_shared(file.fileno(), nbytes)
        region = client.register_fd(file.fileno(), writable=True, access=Access.READ_WRITE, label="bench")
    return Owned(region, memory)
