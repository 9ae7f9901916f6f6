"""One request of xferd's own client, in each of the ways in which it can be prepared, timed in its parts.

A request is made again and again for one flow: the same blocks, the same two regions. What is timed is what a user of
the client waits for: picking rows or building lists, the call, and the answer that all has moved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xferd.api.types import Priority, TransferOp
from xferd.clients._calls import WAIT_SLICE_S
from xferd.clients.bench._probes import Sample
from xferd.clients.transfers import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import TransferStatus
    from xferd.clients.bench._patterns import Rows
    from xferd.clients.sync import Client, PreparedList, Region
    from xferd.clients.transfers import ListLike


class Request(Protocol):
    """Makes one request and waits for its end."""

    def __call__(self) -> Sample:
        """Return how long it took."""

    def close(self) -> None:
        """Let go of what is held for it."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a request moves: blocks of one region into blocks of another, on behalf of a client."""

    client: Client
    op: TransferOp
    local: Region
    remote: Region
    local_rows: Rows
    remote_rows: Rows
    block_nbytes: int
    priority: Priority = Priority.NORMAL

    @property
    def nbytes(self) -> int:
        """Bytes of one request."""
        return len(self.local_rows) * self.block_nbytes

    def lists(self) -> tuple[ListLike, ListLike]:
        """Build both lists."""
        return (
            self.local.blocks(self.local_rows, self.block_nbytes),
            self.remote.blocks(self.remote_rows, self.block_nbytes),
        )


class HeldRequest:
    """Posts one transfer again, that was made and checked before."""

    def __init__(self, move: Move) -> None:
        local, remote = move.lists()
        self._nbytes = move.nbytes
        self._transfer = move.client.transfer(move.op, local, remote, hold=True, priority=move.priority)

    def __call__(self) -> Sample:
        """Post and wait."""
        started = time.perf_counter()
        status = self._transfer.post(wait_s=WAIT_SLICE_S)
        if not self._transfer.is_ended:
            status = self._transfer.wait()
        return _sample(started, started, status, self._nbytes)

    def close(self) -> None:
        """Let the daemon forget the transfer."""
        self._transfer.release()


class FreshRequest:
    """Makes a transfer each time, from lists that ``lists`` gives."""

    def __init__(self, move: Move, lists: Callable[[], tuple[ListLike, ListLike]]) -> None:
        self._move = move
        self._lists = lists
        self._call = move.client.read if move.op is TransferOp.READ else move.client.write

    def __call__(self) -> Sample:
        """Build or pick, submit and wait."""
        started = time.perf_counter()
        local, remote = self._lists()
        prepared = time.perf_counter()
        status = self._call(local, remote, priority=self._move.priority)
        return _sample(started, prepared, status, self._move.nbytes)

    def close(self) -> None:
        """Hold nothing."""


class Lists:
    """Prepared lists of all blocks of regions, made once; an initiator keeps them for all its requests."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._made: dict[tuple[str, int, int], PreparedList] = {}

    def of(self, region: Region, block_nbytes: int) -> PreparedList:
        """Return the list of a region's blocks."""
        key = region.info.node, region.id, block_nbytes
        if key not in self._made:
            every = np.arange(region.nbytes // block_nbytes)
            self._made[key] = self._client.prepare(region.blocks(every, block_nbytes))
        return self._made[key]


def make_request(prepared: str, move: Move, lists: Lists) -> Request:
    """Return what makes the request, prepared as far as ``Case.prepared`` says."""
    if prepared == "transfer":
        return HeldRequest(move)
    if prepared == "no":
        return FreshRequest(move, move.lists)
    local, remote = lists.of(move.local, move.block_nbytes), lists.of(move.remote, move.block_nbytes)
    return FreshRequest(move, lambda: (local.select(move.local_rows), remote.select(move.remote_rows)))


def _sample(started: float, prepared: float, status: TransferStatus, nbytes: int) -> Sample:
    """Return the sample of a request that has just ended; its parts add up to the whole."""
    ended = time.perf_counter()
    checked(status)
    telemetry = status.telemetry
    if not telemetry.ended_at:
        return Sample(ended - started, nbytes, prepared - started)
    transfer_s = max(telemetry.ended_at - telemetry.posted_at, 0.0)
    return Sample(ended - started, nbytes, prepared - started, max(ended - prepared - transfer_s, 0.0), transfer_s)
