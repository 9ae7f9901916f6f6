"""Leave for a peer to read or write spans here: what a lane's thread gets for one data request.

Memory mapped into this process is handed out as it is, in one table. Private memory of other processes, files and
GPU memory pass through a staging buffer, a window at a time. The order of the list is kept: a list that mixes spaces
becomes successive runs. Nothing here checks a right; ``serving.py`` has done so before a grant exists.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import coalesce
from xferd.api.errors import Unsupported
from xferd.api.types import TransferOp
from xferd.plugins.base import DeviceSpace, Extent, FileSpace, MappedSpace, ObjectSpace, ProcessSpace, RemoteSpace
from xferd.plugins.vectored import copy_process, flush_file, read_file, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from xferd.daemon.engine.sealing import WriteTicket
    from xferd.daemon.memory.resolving import Resolved
    from xferd.daemon.memory.staging import StagingPool, StagingSlot
    from xferd.daemon.peers.device_lane import DeviceLane
    from xferd.daemon.storage.lanes import LaneSealer
    from xferd.plugins.base import IovTable, Space


@dataclass(frozen=True, slots=True, eq=False)
class Stager:
    """Moves bytes between a staging slot and one foreign space; blocking, called from lanes' threads."""

    space: ProcessSpace | FileSpace

    def fill(self, staging: IovTable, part: IovTable) -> None:
        """Copy ``part`` of the space into the staging rows; totals are equal."""
        if isinstance(self.space, ProcessSpace):
            copy_process(staging, part, self.space.pid, write=False, pidfd=self.space.pidfd)
        else:
            self._each_row(read_file, staging, part)

    def flush(self, staging: IovTable, part: IovTable) -> None:
        """Copy the staging rows into ``part`` of the space; totals are equal."""
        if isinstance(self.space, ProcessSpace):
            copy_process(staging, part, self.space.pid, write=True, pidfd=self.space.pidfd)
        else:
            self._each_row(write_file, staging, part)

    def _each_row(self, call: Callable[[int, int, IovTable], int], staging: IovTable, part: IovTable) -> None:
        """Do one system call a row: a file takes one offset a call, and rows that touch were merged before."""
        assert isinstance(self.space, FileSpace)
        address = int(staging[0, 0])
        for offset, nbytes in part.tolist():
            call(self.space.fd, offset, np.array([[address, nbytes]], dtype=np.uint64))
            address += nbytes


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStager:
    """Moves bytes between a staging slot and GPU memory; blocking, called from lanes' threads."""

    space: DeviceSpace
    lane: DeviceLane
    holder: str

    def fill(self, staging: IovTable, part: IovTable) -> None:
        """Copy ``part`` of the space into the staging rows; totals are equal."""
        self.lane.move(Extent(self.space, part), staging, self.holder, write=False)

    def flush(self, staging: IovTable, part: IovTable) -> None:
        """Copy the staging rows into ``part`` of the space; totals are equal."""
        self.lane.move(Extent(self.space, part), staging, self.holder, write=True)


class PeerGrant:
    """A ``Grant`` over resolved spans. Used by one thread at a time.

    Args:
        resolved: spans whose regions are held for this grant.
        op: READ: the peer reads what is here.
        nbytes: total of the spans.
        staging: lends a slot to a list that needs one, for as long as the grant is open.
        staging_timeout_s: how long to wait for a slot; ``windows`` raises ``Overloaded`` when none comes free.
        holder: the name under which regions and slot are held.
        on_close: lets go of the regions; called once.
        sealer: keeps the proof of what lies in storage pools; None where there are none.
        devices: reaches GPU memory; None where there is none.
        verify: the peer wants proof of what it reads from storage pools.
        durable: the peer wants what it writes to files on the disk before it is answered.
    """

    def __init__(
        self,
        resolved: Resolved,
        op: TransferOp,
        nbytes: int,
        *,
        staging: StagingPool,
        staging_timeout_s: float,
        holder: str,
        on_close: Callable[[], None],
        sealer: LaneSealer | None = None,
        devices: DeviceLane | None = None,
        verify: bool = False,
        durable: bool = False,
    ) -> None:
        self.nbytes = nbytes
        self._runs = runs_of(resolved)
        self._op = op
        self._staging = staging
        self._staging_timeout_s = staging_timeout_s
        self._holder = holder
        self._on_close = on_close
        self._sealer = sealer
        self._devices = devices
        self._verify = verify
        self._durable = durable
        self._ticket: WriteTicket | None = None
        self._slot: StagingSlot | None = None
        self._closed = False

    def windows(self) -> Iterator[IovTable]:
        """Yield tables of this process's memory, in list order; see ``Grant.windows``.

        What lies in storage pools is proven: a write's bytes before the last ``next`` returns, so that the peer hears
        of it only then; those of a read before the first one, where the peer asks or the pool verifies every read. A
        durable write's bytes in other files are put on the disk before the last ``next`` returns.
        """
        if self._sealer is not None and self._op is TransferOp.WRITE:
            self._ticket = self._sealer.begin(self._runs)
        elif self._sealer is not None:
            self._sealer.verify(self._runs, is_asked=self._verify)
        for run in self._runs:
            if isinstance(run.space, MappedSpace):
                yield run.iov
            else:
                yield from self._staged(run)
        if self._durable and self._op is TransferOp.WRITE:
            self._flush()
        ticket, self._ticket = self._ticket, None
        if self._sealer is not None and ticket is not None:
            self._sealer.seal(ticket)

    def close(self) -> None:
        """Give back the slot and let go of the regions. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._sealer is not None and self._ticket is not None:
                self._sealer.abandon(self._ticket)
            if self._slot is not None:
                self._staging.give_back(self._slot)
        finally:
            self._on_close()

    def _flush(self) -> None:
        """Put on the disk what was written to files, each once; those of storage pools are, once they are sealed.

        Raises:
            MoveFailed: a disk said no.
        """
        sealer = self._sealer
        written = [run for run in self._runs if sealer is None or not sealer.concerns([run])]
        files = {run.space for run in written if isinstance(run.space, FileSpace)}
        for file in files:
            flush_file(file.fd, file.path)

    def _staged(self, run: Extent) -> Iterator[IovTable]:
        stager, total = self._stager(run.space), run.nbytes
        if self._slot is None:
            self._slot = self._staging.borrow(self._staging_timeout_s, self._holder)
        for start in range(0, total, self._slot.nbytes):
            stop = min(total, start + self._slot.nbytes)
            part = run.cut(start, stop).iov
            staging = self._slot.iov(stop - start)
            if self._op is TransferOp.READ:
                stager.fill(staging, part)
                yield staging
            else:
                yield staging
                stager.flush(staging, part)

    def _stager(self, space: Space) -> Stager | DeviceStager:
        if isinstance(space, DeviceSpace):
            assert self._devices is not None, "a region of GPU memory without a backend for GPUs"
            return DeviceStager(space, self._devices, self._holder)
        assert isinstance(space, ProcessSpace | FileSpace)
        return Stager(space)


def check_served(spaces: Iterable[Space]) -> None:
    """Check that peers can be given leave to these spaces.

    Raises:
        Unsupported: an object, whose bytes would pass through this node for nothing.
    """
    if any(isinstance(space, ObjectSpace) for space in spaces):  # not named: rights have not been looked at
        raise Unsupported(
            "a region that is an object of a store is not served to other nodes",
            limit="memory and files",
            remedy="register the object at the node that needs it: every node reaches the store by itself",
        )


def runs_of(resolved: Resolved) -> list[Extent]:
    """Cut resolved spans into successive runs of one space each, with neighbours merged."""
    if resolved.space is None and len(resolved.position) == 1:
        row = np.array([[resolved.position[0], resolved.nbytes[0]]], dtype=np.uint64)
        return [Extent(resolved.spaces[0], row)]
    if resolved.space is None:
        return [_extent(resolved, 0, slice(None))]
    edges = (np.flatnonzero(resolved.space[1:] != resolved.space[:-1]) + 1).tolist()
    borders = itertools.pairwise([0, *edges, len(resolved.space)])
    return [_extent(resolved, int(resolved.space[start]), slice(start, stop)) for start, stop in borders]


def _extent(resolved: Resolved, number: int, rows: slice) -> Extent:
    space = resolved.spaces[number]
    assert not isinstance(space, RemoteSpace), "a region of this node lies on this node"
    assert not isinstance(space, ObjectSpace), "objects are not served"
    position, nbytes = resolved.position[rows], resolved.nbytes[rows]
    # One space, so one key for all rows: positions are comparable across its regions.
    _, position, nbytes = coalesce(np.zeros(len(position), dtype=np.uint64), position, nbytes)
    return Extent(space, np.column_stack((position, nbytes)))
