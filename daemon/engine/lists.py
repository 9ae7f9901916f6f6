"""Checked lists: descriptor lists after bounds and rights were looked at, and the book of prepared ones.

A list of this node is checked against the region table; a list of another node against that node's own records,
which its daemon gives by region. Either is checked once, in columns, and can then be used by index many times.
What can change afterwards (a region freed, an epoch over) is checked again at each post, by region and not by row.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xferd.api.descriptors import DescriptorList, PreparedRef, exact_sum
from xferd.api.errors import LimitExceeded, NotFound, OutOfBounds, PermissionDenied, Stale
from xferd.api.types import Access, PreparedHandle, PreparedInfo, RegionId
from xferd.plugins.base import RemoteSpace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from xferd.api.descriptors import Column, IndexColumn, ListSpec
    from xferd.api.types import RegionInfo, SessionId
    from xferd.daemon.memory.regions import RegionTable
    from xferd.plugins.base import PeerIdentity, Space


LARGE_ROWS = 1 << 16
"""Lists beyond this are checked and planned in a thread, so that other clients' calls do not wait: 100,000 rows take
5 to 8 ms, a million 60 ms and more. The tables that are read there are thread-safe."""


class RemoteRegions(Protocol):
    """Where records of other nodes' regions come from; ``daemon/peers`` implements it."""

    async def resolve(self, name: str) -> PeerIdentity:
        """Return who the node is at present, connecting if need be."""

    async def remote_regions(self, name: str, ids: Sequence[RegionId]) -> Mapping[RegionId, RegionInfo]:
        """Return the records of regions of another node; raises for those that it does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckedList:
    """Columns that are within bounds.

    Attributes:
        position: address, file offset, or (for another node) offset in the region.
        nbytes: bytes a row.
        space: row to index in ``spaces``, or None where there is just one.
        spaces: the spaces that the list touches.
        region: region ids a row; kept for another node's lists only.
        regions: the distinct regions.
        node: "" for this node.
        epoch: of the node.
        rights: what every region of another node's list grants; unused for this node's.
    """

    position: Column
    nbytes: Column
    space: NDArray[np.int32] | None
    spaces: tuple[Space, ...]
    region: Column | None
    regions: tuple[RegionId, ...]
    node: str
    epoch: int
    rights: Access = Access.READ_WRITE

    def __len__(self) -> int:
        return len(self.position)

    @property
    def total_nbytes(self) -> int:
        """Sum of all rows, exact also where it passes 2**64."""
        return exact_sum(self.nbytes)

    def select(self, index: IndexColumn | None) -> CheckedList:
        """Return the rows that ``index`` names, in its order. ``regions`` stays the whole list's.

        Raises:
            OutOfBounds: an index past the last row.
        """
        if index is None:
            return self
        if not len(index) or int(index.max()) >= len(self):
            top = int(index.max()) if len(index) else None
            raise OutOfBounds(
                "the index array is empty" if top is None else f"index {top} in a list of {len(self)} descriptors",
                limit=f"0 to {len(self) - 1}",
                remedy="index rows of the prepared list, from 0",
            )
        return CheckedList(
            self.position[index],
            self.nbytes[index],
            None if self.space is None else self.space[index],
            self.spaces,
            None if self.region is None else self.region[index],
            self.regions,
            self.node,
            self.epoch,
            self.rights,
        )


@dataclass(frozen=True, slots=True, eq=False)
class PreparedEntry:
    """A checked list under a handle, owned by a session."""

    info: PreparedInfo
    session: SessionId
    checked: CheckedList
    since: float


class ListBook:
    """Checks lists and keeps prepared ones."""

    def __init__(
        self, node: str, epoch: int, regions: RegionTable, remote: RemoteRegions, *, max_prepared: int
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._regions = regions
        self._remote = remote
        self._max_prepared = max_prepared
        self._entries: dict[PreparedHandle, PreparedEntry] = {}
        self._handles = itertools.count(1)

    def is_local(self, node: str) -> bool:
        """Whether a list's node is this one."""
        return node in ("", self._node)

    async def check(self, descriptors: DescriptorList) -> CheckedList:
        """Check bounds, generations and epoch of a list.

        Raises:
            Stale, NotFound, OutOfBounds, PeerUnknown, PeerLost.
        """
        if self.is_local(descriptors.node):
            if len(descriptors) > LARGE_ROWS:
                return await asyncio.to_thread(self._check_local, descriptors)
            return self._check_local(descriptors)
        return await self._check_remote(descriptors)

    async def checked(self, session: SessionId | None, spec: ListSpec) -> CheckedList:
        """Return the checked form of a list as a request carries it, prepared or not."""
        if not isinstance(spec, PreparedRef):
            return await self.check(spec)
        entry = self._owned(session, spec.handle)
        if entry.checked.node:
            epoch = (await self._remote.resolve(entry.checked.node)).epoch
            if epoch != entry.checked.epoch:
                raise Stale(
                    f"prepared list {spec.handle} is of epoch {entry.checked.epoch} of node {entry.checked.node}, "
                    f"which is at epoch {epoch}",
                    remedy="ask for the node's regions again and prepare again",
                )
        return entry.checked.select(spec.index)

    def checked_now(self, session: SessionId | None, spec: ListSpec) -> CheckedList | None:
        """As ``checked``, without waiting; None where that is needed: for lists of other nodes, and long ones."""
        if isinstance(spec, PreparedRef):
            checked = self._owned(session, spec.handle).checked
            return None if checked.node else checked.select(spec.index)
        if not self.is_local(spec.node) or len(spec) > LARGE_ROWS:
            return None
        return self._check_local(spec)

    async def prepare(self, session: SessionId, descriptors: DescriptorList, now: float) -> PreparedInfo:
        """Check a list and keep it."""
        if len(self._entries) >= self._max_prepared:
            raise LimitExceeded(
                f"{len(self._entries)} prepared lists are kept",
                limit=f"{self._max_prepared} prepared lists",
                remedy="release some, or raise limits.max_prepared",
            )
        checked = await self.check(descriptors)
        info = PreparedInfo(
            PreparedHandle(next(self._handles)),
            checked.node or self._node,
            checked.epoch,
            len(checked),
            descriptors.total_nbytes,
        )
        self._entries[info.handle] = PreparedEntry(info, session, checked, now)
        return info

    def release(self, session: SessionId, handles: Sequence[PreparedHandle]) -> None:
        """Forget lists of a session, all or none."""
        for handle in handles:
            self._owned(session, handle)
        for handle in handles:
            self._entries.pop(handle, None)

    def release_session(self, session: SessionId) -> None:
        """Forget all lists of a session."""
        for handle in [h for h, entry in self._entries.items() if entry.session == session]:
            del self._entries[handle]

    def count(self, session: SessionId) -> int:
        """Return how many lists a session keeps."""
        return sum(entry.session == session for entry in self._entries.values())

    def entries(self) -> list[PreparedEntry]:
        """Return what is kept."""
        return list(self._entries.values())

    def _owned(self, session: SessionId | None, handle: PreparedHandle) -> PreparedEntry:
        entry = self._entries.get(handle)
        if entry is None:
            raise NotFound(f"no prepared list {handle}", remedy="prepare it again; a session's lists end with it")
        if entry.session != session:
            raise PermissionDenied(f"prepared list {handle} belongs to another session", remedy="prepare your own")
        return entry

    def _check_local(self, descriptors: DescriptorList) -> CheckedList:
        self._check_epoch(self._node, descriptors.epoch, self._epoch)
        found = self._regions.resolve(descriptors)
        return CheckedList(
            found.position, found.nbytes, found.space, found.spaces, None, found.regions, "", self._epoch
        )

    async def _check_remote(self, descriptors: DescriptorList) -> CheckedList:
        node = descriptors.node
        epoch = (await self._remote.resolve(node)).epoch
        self._check_epoch(node, descriptors.epoch, epoch)
        ids, row_of = _distinct(descriptors.region)
        infos = await self._remote.remote_regions(node, [RegionId(int(i)) for i in ids])
        sizes = np.array([infos[RegionId(int(i))].nbytes for i in ids], dtype=np.uint64)
        size = sizes[0] if row_of is None else sizes[row_of]
        bad = (descriptors.offset > size) | (descriptors.nbytes > size - np.minimum(descriptors.offset, size))
        if bad.any():
            row = int(np.argmax(bad))
            info = infos[RegionId(int(descriptors.region[row]))]
            raise OutOfBounds(
                f"descriptor {row} (offset {int(descriptors.offset[row])}, nbytes {int(descriptors.nbytes[row])}) "
                f"passes the end of region {info.id} of node {node}",
                limit=f"{info.nbytes} bytes",
                remedy="a descriptor lies inside one region",
            )
        memory = "+".join(sorted({info.kind.value for info in infos.values()}))
        rights = Access.READ_WRITE
        for info in infos.values():
            rights &= info.access if info.writable else info.access & Access.READ
        return CheckedList(
            descriptors.offset,
            descriptors.nbytes,
            None,
            (RemoteSpace(node, epoch, memory),),
            descriptors.region,
            tuple(infos),
            node,
            epoch,
            rights,
        )

    @staticmethod
    def _check_epoch(node: str, given: int, present: int) -> None:
        if given not in (0, present):
            raise Stale(
                f"the list is of epoch {given} of node {node}, which is at epoch {present}",
                remedy="ask for the node's regions again; those of an old epoch are gone",
            )


def _distinct(column: Column) -> tuple[Column, NDArray[np.intp] | None]:
    """Return the distinct values and, unless there is just one, each row's index among them."""
    if (column == column[0]).all():
        return column[:1], None
    values, inverse = np.unique(column, return_inverse=True)
    return values, inverse
