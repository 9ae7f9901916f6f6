"""GPU memory served to peers: windows by way of staging memory, and no byte moves once a lane is told of an end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from xferd.api.errors import DeadlineExceeded, DeviceLost, ShortTransfer, Unsupported, XferdError
from xferd.api.types import RegionId, TransferOp
from xferd.daemon.memory.resolving import Resolved
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.device_lane import DeviceLane
from xferd.daemon.peers.grants import PeerGrant
from xferd.plugins.base import Backend, BackendStatistics, DeviceSpace, Extent, MappedSpace, SpaceKind
from xferd.plugins.vectored import copy_local, iov_of, total_nbytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xferd.plugins.base import Chunk, Space

PAGE = 4096


class FakeGpu(Backend):
    """GPU memory is one array, whose positions are offsets; a move can be held up, fail, or be short."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: XferdError | None = None
        self.missing = 0
        self.moving = 0
        self.chunks: list[Chunk] = []

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        return frozenset({(SpaceKind.DEVICE, SpaceKind.MAPPED), (SpaceKind.MAPPED, SpaceKind.DEVICE)})

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        return 1.0

    def slots(self, source: Space, target: Space) -> int:
        return 1

    def statistics(self) -> BackendStatistics:
        return BackendStatistics()

    async def move(self, chunk: Chunk) -> int:
        self.chunks.append(chunk)
        self.moving += 1
        try:
            cancelled = None
            while not self.gate.is_set():  # a GPU cannot be stopped in the middle
                try:
                    await self.gate.wait()
                except asyncio.CancelledError as exc:
                    cancelled = exc
            if cancelled is not None:
                raise cancelled
            if self.failure is not None:
                raise self.failure
            copy_local(self._here(chunk.source), self._here(chunk.target))
            return chunk.nbytes - self.missing
        finally:
            self.moving -= 1

    def _here(self, extent: Extent) -> np.ndarray:
        iov = extent.iov.copy()
        if isinstance(extent.space, DeviceSpace):
            iov[:, 0] += np.uint64(self.memory.ctypes.data)
        return iov


@pytest.fixture
async def gpu() -> FakeGpu:
    return FakeGpu(np.random.default_rng(3).integers(0, 256, 16 * PAGE, dtype=np.uint8))


@pytest.fixture
async def staging() -> AsyncIterator[StagingPool]:
    made = StagingPool(4 * PAGE, PAGE)
    yield made
    assert made.holds() == []
    made.close()


def grant_of(rows: list[tuple[int, int]], op: TransferOp, staging: StagingPool, lane: DeviceLane) -> PeerGrant:
    table = np.array(rows, dtype=np.uint64)
    resolved = Resolved(table[:, 0], table[:, 1], None, (DeviceSpace(0),), (RegionId(1),))
    return PeerGrant(
        resolved,
        op,
        int(table[:, 1].sum()),
        staging=staging,
        staging_timeout_s=1.0,
        holder="peer p transfer t #1",
        on_close=lambda: None,
        devices=lane,
    )


def read_all(grant: PeerGrant) -> bytes:
    parts = []
    for window in grant.windows():
        part = bytearray(total_nbytes(window))
        copy_local(window, iov_of(part))
        parts.append(bytes(part))
    grant.close()
    return b"".join(parts)


def write_all(grant: PeerGrant, payload: bytes) -> None:
    for window in grant.windows():
        nbytes = total_nbytes(window)
        copy_local(iov_of(payload[:nbytes]), window)
        payload = payload[nbytes:]
    grant.close()


async def test_windows_of_gpu_memory_pass_in_list_order_both_ways(gpu: FakeGpu, staging: StagingPool) -> None:
    lane = DeviceLane(gpu)
    rows = [(9 * PAGE, 3 * PAGE), (0, 10), (10, 20), (5000, 1)]
    wanted = b"".join(gpu.memory[at : at + nbytes].tobytes() for at, nbytes in rows)
    assert await asyncio.to_thread(read_all, grant_of(rows, TransferOp.READ, staging, lane)) == wanted
    payload = np.random.default_rng(4).bytes(len(wanted))
    before = gpu.memory.copy()
    await asyncio.to_thread(write_all, grant_of(rows, TransferOp.WRITE, staging, lane), payload)
    assert b"".join(gpu.memory[at : at + nbytes].tobytes() for at, nbytes in rows) == payload
    assert (gpu.memory[12 * PAGE :] == before[12 * PAGE :]).all()
    assert len(gpu.chunks) > 2, "it did not pass in windows"
    assert {chunk.agent for chunk in gpu.chunks} == {""}, "peers are served by the daemon's own workers"


async def test_a_move_that_takes_too_long_is_told_only_when_it_has_come_to_rest(
    gpu: FakeGpu, staging: StagingPool
) -> None:
    lane = DeviceLane(gpu, timeout_s=0.01)
    gpu.gate.clear()
    grant = grant_of([(0, PAGE)], TransferOp.READ, staging, lane)
    reading = asyncio.create_task(asyncio.to_thread(read_all, grant))
    done, _ = await asyncio.wait([reading], timeout=0.1)
    assert not done, "the lane went on while the GPU was still writing into its staging memory"
    gpu.gate.set()
    with pytest.raises(DeadlineExceeded):
        await reading
    assert gpu.moving == 0
    grant.close()


async def test_failures_reach_the_lane(gpu: FakeGpu, staging: StagingPool) -> None:
    lane = DeviceLane(gpu)
    gpu.failure = DeviceLost("the worker died")
    grant = grant_of([(0, PAGE)], TransferOp.READ, staging, lane)
    with pytest.raises(DeviceLost):
        await asyncio.to_thread(read_all, grant)
    grant.close()
    gpu.failure, gpu.missing = None, 1
    row = np.array([[0, 8]], dtype=np.uint64)
    here = bytearray(8)
    with pytest.raises(ShortTransfer):
        await asyncio.to_thread(lane.move, Extent(DeviceSpace(0), row), iov_of(here), "t", write=False)
    none = DeviceLane(None)
    with pytest.raises(Unsupported):
        await asyncio.to_thread(none.move, Extent(MappedSpace(), row), iov_of(here), "t", write=True)
