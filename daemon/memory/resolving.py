"""Resolving of descriptor lists: (region, offset) columns to positions, against a copy of the region table's slots.

Pure numpy, without the table's lock: the copy (``slots.Window``) was taken under it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import OutOfBounds
from xferd.api.types import RegionId
from xferd.daemon.memory.slots import SLOT_MASK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.api.descriptors import Column, DescriptorList
    from xferd.daemon.memory.slots import Window
    from xferd.plugins.base import Space


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """A list with bounds checked. The arrays may be those of the list: do not write to them.

    Attributes:
        position: absolute address or file offset a row.
        nbytes: bytes a row.
        space: row to index in ``spaces``; None when there is just one.
        spaces: the spaces that the list touches.
        regions: the distinct regions.
    """

    position: Column
    nbytes: Column
    space: NDArray[np.int32] | None
    spaces: tuple[Space, ...]
    regions: tuple[RegionId, ...]


def slots_of(region: Column) -> NDArray[np.intp]:
    """Return the slot of each region id."""
    return (region & np.uint64(SLOT_MASK)).astype(np.intp)


def only_region(descriptors: DescriptorList) -> int | None:
    """Return the region of all rows, or None where there are several."""
    regions = descriptors.region
    return int(regions[0]) if len(regions) == 1 or (regions == regions[0]).all() else None


def resolve_within(region: int, span: tuple[int, int, Space], descriptors: DescriptorList) -> Resolved | None:
    """Resolve a list of one region, whose base, nbytes and space are ``span``; None where a row passes its end."""
    base, size, space = span
    if len(descriptors) == 1:  # without numpy's price for each step
        offset, nbytes = int(descriptors.offset[0]), int(descriptors.nbytes[0])
        if offset + nbytes > size:
            return None
        position = np.array([base + offset], dtype=np.uint64)
    else:
        if _passes_end(descriptors, np.uint64(size)).any():
            return None
        position = descriptors.offset + np.uint64(base)
    return Resolved(position, descriptors.nbytes, None, (space,), (RegionId(region),))


def resolve_in(window: Window, slots: NDArray[np.intp], descriptors: DescriptorList) -> Resolved | int:
    """Resolve a list, or return the first row whose region is not in the window.

    Raises:
        OutOfBounds: a span passes the end of its region.
    """
    region = descriptors.region
    if not len(window.ids):
        return 0
    at = slots - window.first
    beyond = at >= len(window.ids)
    if beyond.any():
        return int(np.argmax(beyond | (window.ids[np.where(beyond, 0, at)] != region)))
    wrong = window.ids[at] != region
    if wrong.any():
        return int(np.argmax(wrong))
    _check_bounds(descriptors, window.nbytes[at])
    touched = np.zeros(len(window.ids), dtype=np.bool_)
    touched[at] = True
    numbers = np.unique(window.space[touched])
    return Resolved(
        descriptors.offset + window.base[at],
        descriptors.nbytes,
        None if len(numbers) == 1 else np.searchsorted(numbers, window.space).astype(np.int32)[at],
        _present(window, numbers.tolist()),
        tuple(window.ids[touched].tolist()),
    )


def _present(window: Window, numbers: list[int]) -> tuple[Space, ...]:
    spaces = tuple(window.spaces[number - window.first_space] for number in numbers)
    return tuple(space for space in spaces if space is not None)  # never None: a live region keeps its space


def _passes_end(descriptors: DescriptorList, size: Column | np.uint64) -> NDArray[np.bool_]:
    """Return for each row whether it passes the end of its region, which has that size."""
    offset, nbytes = descriptors.offset, descriptors.nbytes
    return (offset > size) | (nbytes > size - offset)  # the right side wraps only where the left is true


def _check_bounds(descriptors: DescriptorList, size: Column) -> None:
    offset, nbytes = descriptors.offset, descriptors.nbytes
    over = _passes_end(descriptors, size)
    if not over.any():
        return
    row = int(np.argmax(over))
    limit = int(size[row])
    raise OutOfBounds(
        f"descriptor {row} (offset {int(offset[row])}, nbytes {int(nbytes[row])}) passes the end of region "
        f"{int(descriptors.region[row])}",
        limit=f"{limit} bytes",
        remedy="a descriptor lies inside one region",
    )
