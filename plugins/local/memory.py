"""This process's memory as Python sees it: by address, without a copy.

Nothing here keeps what it points to alive or mapped: whoever uses it holds the regions.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

USER_SPACE_NBYTES = 1 << 56
"""All addresses that user space can have, with page tables of five levels."""

MEMORY = memoryview((ctypes.c_ubyte * USER_SPACE_NBYTES).from_address(0)).cast("B")
"""All of it. Making a slice takes 0.1 us, where a ctypes array at an address takes 1 us."""


def view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Return a span of it as numpy sees it."""
    return np.frombuffer(MEMORY[address : address + nbytes], dtype=np.uint8)
