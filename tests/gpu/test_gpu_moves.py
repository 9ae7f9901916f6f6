"""Memory of a real GPU through a real daemon: every byte is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from gpu_memory import DRIVER, MIB

from xferd.api.descriptors import DescriptorList
from xferd.api.types import Access
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import DaemonProcess
    from gpu_memory import Memory

pytestmark = pytest.mark.gpu

BLOCKS = 10_000
NBYTES = 64 * MIB


@pytest.fixture(params=[None, False], ids=["ring", "grpc"])
def two(request: pytest.FixtureRequest, gpu_node: DaemonProcess) -> Iterator[tuple[Client, Client]]:
    """Two agents, each with a device worker of its own."""
    with (
        Client.connect(gpu_node.session_socket, "one", ring=request.param) as one,
        Client.connect(gpu_node.session_socket, "two", ring=request.param) as other,
    ):
        yield one, other


def noise(seed: int, nbytes: int = NBYTES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def test_tensors_of_two_engines_are_gathered_and_scattered(two: tuple[Client, Client], memory: Memory) -> None:
    one, other = two
    block, count = 64 * 1024, NBYTES // (64 * 1024)
    source, target, data = memory.make(NBYTES), memory.make(NBYTES), noise(1)
    memory.put(source, data)
    theirs, mine = one.register_device(source, access=Access.READ), other.register_device(target)
    order = np.random.default_rng(2).permutation(count)
    with (
        other.prepare(mine.blocks(np.arange(count), block)) as slots,
        other.prepare(other.region(theirs.info).blocks(np.arange(count), block)) as blocks,
    ):
        status = other.read(slots.select(np.arange(count)), blocks.select(order))
    assert {hop.backend for hop in status.telemetry.route} == {"cuda"}
    assert np.array_equal(memory.get(target).reshape(count, block), data.reshape(count, block)[order])
    whole = memory.make(NBYTES)
    with other.register_device(whole) as region:
        other.read(region, other.region(theirs.info))
        assert np.array_equal(memory.get(whole), data)


def spans(seed: int, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and sizes of blocks that do not overlap, of any size from 1 byte and at any alignment."""
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.random(BLOCKS) < 0.5, rng.integers(1, 64, BLOCKS), rng.integers(1, 9000, BLOCKS))
    gaps = rng.integers(0, 33, BLOCKS)
    offsets = np.cumsum(sizes + gaps) - sizes
    assert offsets[-1] + sizes[-1] <= room
    return offsets, sizes


@pytest.mark.parametrize("way", ["VRAM to VRAM", "VRAM to DRAM", "DRAM to VRAM"])
def test_ten_thousand_blocks_of_any_size_and_alignment(two: tuple[Client, Client], memory: Memory, way: str) -> None:
    one, other = two
    offsets, sizes = spans(3, NBYTES)
    order = np.random.default_rng(4).permutation(BLOCKS)
    ends = np.cumsum(sizes[order] + 7)
    targets = ends - sizes[order]  # the same blocks, in another order and at other alignments
    data, clean = noise(5), noise(6)
    source_kind, target_kind = way.split(" to ")
    regions = []
    for kind, client, content in ((source_kind, one, data), (target_kind, other, clean)):
        if kind == "VRAM":
            array = memory.make(NBYTES)
            memory.put(array, content)
            region = client.register_device(array, access=Access.READ_WRITE)
        else:
            region = client.allocate(NBYTES, "host", access=Access.READ_WRITE)
            array = region.array()
            array[:] = content
        regions.append((region, array))
    (source, _), (target, seen) = regions
    node = {"node": source.info.node, "epoch": source.info.epoch}
    near = DescriptorList.from_columns(target.id, targets, sizes[order], **node)
    far = DescriptorList.from_columns(source.id, offsets[order], sizes[order], **node)
    other.read(near, far)

    expected = clean.copy()
    for at, start, size in zip(targets.tolist(), offsets[order].tolist(), sizes[order].tolist(), strict=True):
        expected[at : at + size] = data[start : start + size]
    found = memory.get(seen) if target_kind == "VRAM" else np.array(seen)
    wrong = np.flatnonzero(found != expected)
    assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {wrong[0]}"
    for region, _ in regions:
        region.free()


@pytest.mark.parametrize("offset", [0, 1, 3, 8, 16, 255])
def test_one_block_at_any_alignment(two: tuple[Client, Client], memory: Memory, offset: int) -> None:
    one, _ = two
    source, target = memory.make(MIB), memory.make(MIB)
    data = noise(7, MIB)
    memory.put(source, data)
    with one.register_device(source) as near, one.register_device(target) as far:
        one.write(near.rows(offset, MIB - 300), far.rows(300 - offset, MIB - 300))
        found = memory.get(target)
        assert np.array_equal(found[300 - offset : MIB - offset], data[offset : offset + MIB - 300])
        assert not found[: 300 - offset].any()
        assert not found[MIB - offset :].any()


def test_memory_of_a_pool_is_taken_by_dlpack(two: tuple[Client, Client], memory: Memory) -> None:
    one, other = two
    region = one.allocate(MIB, "gpu", access=Access.READ_WRITE, label="pooled")
    tensor = memory.take(region.dlpack())
    data = noise(8, MIB)
    memory.put(tensor, data)
    host = one.allocate(MIB, "host")
    one.read(host, region)
    assert np.array_equal(host.array(), data), "what a library wrote is what xferd moves"
    host.array()[:] = 9
    one.write(host, region)
    assert (memory.get(tensor) == 9).all(), "what xferd moved is what a library reads"
    [seen] = other.regions(label="pooled")
    shared = memory.take(seen.dlpack())
    assert (memory.get(shared) == 9).all()
    assert region.read(0, 4) == b"\t\t\t\t"
    del tensor, shared
    one.free([region, host])


def test_parts_of_one_allocation_and_the_same_again(two: tuple[Client, Client], memory: Memory) -> None:
    """An allocator cuts one allocation into tensors: offsets in it must be right, and nothing is registered twice."""
    one, _ = two
    whole = memory.make(4 * MIB)
    data = noise(9, 4 * MIB)
    memory.put(whole, data)
    parts = [whole[start : start + MIB] for start in (512, MIB + 4096, 3 * MIB - 4)]
    regions = [one.register_device(part) for part in parts]
    again = [one.register_device(part) for part in parts]
    assert [r.id for r in again] == [r.id for r in regions]
    host = one.allocate(MIB, "host")
    for region, start in zip(regions, (512, MIB + 4096, 3 * MIB - 4), strict=True):
        one.read(host, region)
        assert np.array_equal(host.array(), data[start : start + MIB])
    one.free([*regions, *again, host])


@pytest.mark.parametrize("whose", ["own", "library's"])
def test_a_transfer_reads_after_the_kernel_has_written(two: tuple[Client, Client], memory: Memory, whose: str) -> None:
    one, _ = two
    array, host = memory.make(MIB), one.allocate(MIB, "host")
    foreign = memory.event() if whose != "own" else None
    if foreign is None and whose != "own":
        pytest.skip(f"{memory.name} has no events of its own")
    event = one.open_event(foreign)
    with one.register_device(array) as region:
        for value in (11, 12):
            stream, finish = memory.fill_slowly(array, value)
            (event if foreign is None else foreign).record(stream)
            transfer = one.transfer("READ", host, region, wait_event=event)
            finish()
            transfer.wait(20.0)
            assert (host.array() == value).all()
    host.free()


def test_a_stream_goes_on_after_the_transfer(two: tuple[Client, Client], memory: Memory) -> None:
    one, _ = two
    array, host = memory.make(MIB), one.allocate(MIB, "host")
    host.array()[:] = 21
    done = one.make_event()
    with one.register_device(array) as region:
        one.write(host, region, done_event=done)
        done.wait()
        done.synchronize()
        assert (memory.get(array) == 21).all()
    host.free()


def test_the_gpu_says_what_it_did(two: tuple[Client, Client], memory: Memory) -> None:
    one, _ = two
    before = one.devices()[0]
    array, host = memory.make(MIB), one.allocate(MIB, "host")
    with one.register_device(array) as region:
        one.write(host, region)
    after = one.devices()[0]
    assert after.driver == DRIVER
    assert after.reason == ""
    assert after.moved_nbytes - before.moved_nbytes >= MIB
    assert after.kernel_s + after.copy_s > before.kernel_s + before.copy_s
    host.free()
