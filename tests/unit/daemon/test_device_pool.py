"""Pools of GPU memory: extents are zeros and apart, a lost or absent device is said, and old regions stay nothing."""

from __future__ import annotations

import asyncio

import pytest
from fake_devices import FakeDevices, lost

from xferd.api.errors import Closed, DeviceLost, PoolExhausted, Unavailable
from xferd.api.types import MemoryKind
from xferd.daemon.memory.device_pool import DevicePool
from xferd.plugins.base import ALLOCATION_SHIFT, DeviceSpace

PAGE = 4096
OFFSET = (1 << ALLOCATION_SHIFT) - 1


async def made(nbytes: int = 16 * PAGE, fake: FakeDevices | None = None) -> tuple[DevicePool, FakeDevices]:
    memory = fake or FakeDevices()
    pool = DevicePool("vram", 0, nbytes, memory)
    await pool.start()
    return pool, memory


async def test_extents_are_zeros_apart_and_known_by_their_positions() -> None:
    pool, memory = await made()
    first, second = await pool.allocate_group([100, PAGE + 1])
    assert first.space == DeviceSpace(0)
    (number,) = memory.memory
    assert {b.position >> ALLOCATION_SHIFT for b in (first, second)} == {number}
    spans = sorted((b.position & OFFSET, size) for b, size in ((first, PAGE), (second, 2 * PAGE)))
    assert spans[0][0] + spans[0][1] <= spans[1][0]
    assert not any(memory.memory[number])
    info = pool.info()
    assert (info.kind, info.used_nbytes, info.allocations, info.mappable, info.reason) == (
        MemoryKind.VRAM,
        3 * PAGE,
        2,
        False,
        "",
    )
    pool.check_invariants()


async def test_what_is_freed_is_wiped_before_it_can_be_had_again() -> None:
    pool, memory = await made()
    backings = await pool.allocate_group([16 * PAGE])
    (number,) = memory.memory
    memory.memory[number][:] = b"\xee" * (16 * PAGE)
    memory.gate.clear()
    freeing = asyncio.create_task(pool.free_group(backings))
    await asyncio.sleep(0)
    with pytest.raises(PoolExhausted, match="vram"):
        await pool.allocate_group([PAGE])
    memory.gate.set()
    await freeing
    await pool.allocate_group([16 * PAGE])
    assert not any(memory.memory[number])


async def test_a_group_is_all_or_none_and_its_failure_is_counted() -> None:
    pool, _ = await made()
    with pytest.raises(PoolExhausted):
        await pool.allocate_group([8 * PAGE, 9 * PAGE])
    info = pool.info()
    assert (info.used_nbytes, info.failed_allocations) == (0, 1)


async def test_a_device_without_the_memory_is_said_and_tried_again() -> None:
    memory = FakeDevices(8 * PAGE)
    pool, _ = await made(fake=memory)
    assert "65536 bytes" in pool.info().reason
    assert pool.info().free_nbytes == 0
    with pytest.raises(PoolExhausted, match="pool 'vram'"):
        await pool.allocate_group([PAGE])
    assert pool.info().failed_allocations == 1
    memory.nbytes = 1 << 20  # somebody else let go of it
    assert await pool.allocate_group([PAGE])
    assert pool.info().reason == ""
    assert memory.open_allocations == {1}


async def test_a_device_that_fails_while_it_is_wiped_keeps_nothing() -> None:
    memory = FakeDevices()
    pool = DevicePool("vram", 0, PAGE, memory)
    memory.gate.clear()
    starting = asyncio.create_task(pool.start())
    await asyncio.sleep(0)
    memory.failure = Unavailable("the device is ill", remedy="reset it")
    memory.gate.set()
    await starting
    assert "the device is ill" in pool.reason
    assert memory.open_allocations == set()


async def test_a_lost_pool_is_made_anew_under_another_number_and_the_old_one_ends_with_its_last_region() -> None:
    pool, memory = await made()
    old = await pool.allocate_group([PAGE, PAGE])
    memory.lose()
    assert "worker ended" in pool.info().reason
    assert pool.info().used_nbytes == 0
    (new,) = await pool.allocate_group([16 * PAGE])
    assert new.position >> ALLOCATION_SHIFT != old[0].position >> ALLOCATION_SHIFT
    assert memory.open_allocations == {1, 2}, "the old number must not be given again while it is a region's"
    await pool.free_group(old[:1])
    assert memory.open_allocations == {1, 2}
    await pool.free_group(old[1:])
    assert memory.open_allocations == {2}
    assert not [call for call in memory.calls if call[:2] == ("wipe", 1) and call != ("wipe", 1, 0, 16 * PAGE)]
    with pytest.raises(PoolExhausted):  # what was freed of the old one is no room in the new one
        await pool.allocate_group([PAGE])
    assert pool.info().peak_used_nbytes == 16 * PAGE


async def test_what_a_lost_pool_had_counts_on() -> None:
    pool, memory = await made()
    await pool.allocate_group([8 * PAGE])
    with pytest.raises(PoolExhausted):
        await pool.allocate_group([9 * PAGE])
    memory.lose()
    await pool.allocate_group([PAGE])
    info = pool.info()
    assert (info.used_nbytes, info.peak_used_nbytes, info.failed_allocations) == (PAGE, 8 * PAGE, 1)


async def test_a_pool_that_is_lost_while_it_is_freed_gives_nothing_back() -> None:
    pool, memory = await made()
    backings = await pool.allocate_group([PAGE])
    memory.failure = lost()
    await pool.free_group(backings)  # not lost by what the memory says: the extent stays out of use
    assert pool.info().used_nbytes == PAGE
    memory.lose()
    with pytest.raises(DeviceLost):
        await pool.allocate_group([PAGE])
    memory.failure = None
    assert await pool.allocate_group([16 * PAGE])
    assert memory.open_allocations == {2}


async def test_several_that_find_it_lost_make_one_new_pool() -> None:
    pool, memory = await made()
    memory.lose()
    memory.gate.clear()  # the new one is being wiped while the others ask
    asking = asyncio.gather(*(pool.allocate_group([PAGE]) for _ in range(4)))
    for _ in range(3):
        await asyncio.sleep(0)
    memory.gate.set()
    await asking
    assert len(memory.memory) == 2
    assert memory.open_allocations == {2}


async def test_a_closed_pool_gives_its_memory_back() -> None:
    pool, memory = await made()
    await pool.aclose()
    await pool.aclose()
    assert memory.open_allocations == set()
    with pytest.raises(Closed):
        await pool.allocate_group([PAGE])
