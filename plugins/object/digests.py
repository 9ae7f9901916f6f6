"""The checksum of an object: xxh3 of each MiB of it, and xxh3 over those, kept in the object's own metadata.

A tree of one level, so that an object that is read in many gets at once, in any order, can be verified without a
second pass over its bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from xferd.api.errors import IntegrityError
from xferd.plugins.base import BlockSums
from xferd.plugins.posix import xxh3
from xferd.plugins.vectored import total_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable

LEAF_NBYTES = 1 << 20
ATTRIBUTE = "xferdxxh3"
"""A name that is allowed everywhere: Azure takes identifiers only, and proxies may drop what has an underscore."""

_LEAVES = f"{LEAF_NBYTES}:"


def leaves_of(memory: IovTable) -> NDArray[np.uint64]:
    """Return the digest of each MiB of what lies in memory rows; the last may be shorter. Call it from a thread."""
    nbytes = total_nbytes(memory)
    begin = np.arange(0, nbytes, LEAF_NBYTES)
    leaves = BlockSums.of(begin, np.minimum(begin + LEAF_NBYTES, nbytes))
    xxh3.sum_memory(leaves, memory, xxh3.load())
    return leaves.values


def attribute_of(leaves: NDArray[np.uint64]) -> dict[str, str]:
    """Return the metadata of an object with these leaves."""
    root = xxhash.xxh3_64_intdigest(leaves.astype("<u8").tobytes())
    return {ATTRIBUTE: f"{LEAF_NBYTES}:{root:016x}"}


class LeafHasher:
    """Digests of bytes that come in order, in pieces of any size."""

    def __init__(self) -> None:
        self._leaf = xxhash.xxh3_64()
        self._leaf_nbytes = 0
        self._leaves: list[int] = []

    def update(self, data: NDArray[np.uint8]) -> None:
        """Take the next bytes; call it from a thread, one at a time."""
        at = 0
        while at < len(data):
            size = min(LEAF_NBYTES - self._leaf_nbytes, len(data) - at)
            self._leaf.update(data[at : at + size].data)
            self._leaf_nbytes += size
            at += size
            if self._leaf_nbytes == LEAF_NBYTES:
                self._finish_leaf()

    def leaves(self) -> NDArray[np.uint64]:
        """Return the digests of all that came; nothing may come after."""
        if self._leaf_nbytes:
            self._finish_leaf()
        return np.array(self._leaves, dtype=np.uint64)

    def _finish_leaf(self) -> None:
        self._leaves.append(self._leaf.intdigest())
        self._leaf.reset()
        self._leaf_nbytes = 0


class WholeCheck:
    """Collects digests of the parts of one object's read, and compares at the end. Used on the event loop.

    What began or ended inside a MiB is not known, and then nothing is compared.
    """

    def __init__(self, place: str, nbytes: int) -> None:
        self._place = place
        self._nbytes = nbytes
        self._leaves = np.zeros(-(-nbytes // LEAF_NBYTES), dtype=np.uint64)
        self._known = np.zeros(len(self._leaves), dtype=np.bool_)
        self._expected = ""

    def expects(self, attributes: Mapping[str, str]) -> bool:
        """Whether the object has a checksum that digests can be compared with."""
        return attributes.get(ATTRIBUTE, "").startswith(_LEAVES)

    def wants(self, start: int, stop: int) -> bool:
        """Whether the digests of this range help: it must begin and end with a MiB, or end with the object."""
        return start % LEAF_NBYTES == 0 and (stop % LEAF_NBYTES == 0 or stop == self._nbytes)

    def add(self, start: int, leaves: NDArray[np.uint64], attributes: Mapping[str, str]) -> None:
        """Take the digests of the MiBs from ``start`` on, and what the object says that they should come to."""
        first = start // LEAF_NBYTES
        self._leaves[first : first + len(leaves)] = leaves
        self._known[first : first + len(leaves)] = True
        self._expected = attributes.get(ATTRIBUTE, "")

    def verify(self) -> bool:
        """Return whether the object was verified; False where it has no checksum of ours, or not all is known.

        Raises:
            IntegrityError: it was, and is not what was written.
        """
        if not self._expected.startswith(_LEAVES) or not self._known.all():
            return False
        found = attribute_of(self._leaves)[ATTRIBUTE]
        if found != self._expected:
            raise IntegrityError(
                f"{self._place}: the {self._nbytes} bytes read are not those that were written",
                limit=f"xxh3 {self._expected.rpartition(':')[2]}, found {found.rpartition(':')[2]}",
                remedy="write the object again from its source",
            )
        return True
