"""A region of a client process of the benchmark, with its bytes at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.clients.bench._patterns import Blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.clients.memory import ByteArray
    from xferd.clients.sync import Region


@dataclass(frozen=True, slots=True)
class Owned:
    """A region and its bytes as this process sees them.

    Attributes:
        region: what transfers name.
        memory: its bytes, or a copy of them.
        push: brings what was written into ``memory`` to where the region is.
        pull: brings what the region has into ``memory``.
        fd: of the region's file, open as long as this process; -1 for what is none.
    """

    region: Region
    memory: ByteArray
    push: Callable[[], object] = lambda: None
    pull: Callable[[], object] = lambda: None
    fd: int = -1

    def blocks(self, block_nbytes: int) -> Blocks:
        """Return the bytes cut into blocks."""
        return Blocks(self.memory, block_nbytes)
