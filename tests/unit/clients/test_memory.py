"""What a region gives without a daemon: arrays that are its memory, and rows that lie in it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import Closed, InvalidArgument, InvalidDescriptor, OutOfBounds, Unsupported
from xferd.api.types import Access, MemoryKind, RegionId, RegionInfo, RegionSource
from xferd.clients.memory import RegionBase, bytes_of, make_memfd, map_shared, pool_view, source_bytes


def info(nbytes: int = 4096, *, access: Access = Access.NONE, writable: bool = True, offset: int = 0) -> RegionInfo:
    return RegionInfo(
        RegionId(1 << 32 | 5),
        "node-a",
        7,
        MemoryKind.DRAM,
        RegionSource.POOL,
        0,
        nbytes,
        "me",
        access,
        writable,
        pool="host",
        pool_offset=offset,
    )


def region(nbytes: int = 4096) -> RegionBase:
    return RegionBase(info(nbytes), np.zeros(nbytes, np.uint8))


def test_arrays_share_memory_with_the_region():
    subject = region()
    subject.array(np.float32, (2, 3))[1, 2] = 1.0
    assert subject.array(np.float32)[5] == 1.0
    assert subject.array().shape == (4096,)
    assert subject.array("<u8", 4).shape == (4,)
    assert region(10).array(np.uint32).shape == (2,)


@pytest.mark.parametrize("shape", [4097, (1025, 4), (1 << 40, 1 << 40)])
def test_a_shape_beyond_the_region_is_refused(shape):
    with pytest.raises(OutOfBounds, match="4096 bytes in region"):
        region().array(np.uint8, shape)


def test_a_negative_length_is_refused():
    with pytest.raises(InvalidArgument):
        region().array(np.uint8, (-1, 4))


def test_what_cannot_be_mapped_says_so_and_what_is_freed_is_closed():
    with pytest.raises(Unsupported, match=r"use read\(\) and write\(\)"):
        RegionBase(info(), None).array()
    freed = region()
    freed._forget()
    with pytest.raises(Closed):
        freed.array()
    assert "freed" in repr(freed)


@given(nbytes=st.integers(1, 1 << 20), block=st.integers(1, 1 << 14), data=st.data())
def test_blocks_lie_in_the_region_or_are_refused(nbytes, block, data):
    subject = RegionBase(info(nbytes), None)
    index = data.draw(st.lists(st.integers(-2, 70), min_size=1, max_size=8))
    if all(0 <= number < nbytes // block for number in index):
        rows = subject.blocks(index, block)
        assert rows.offset.tolist() == [number * block for number in index]
        assert int((rows.offset + rows.nbytes).max()) <= nbytes
        assert set(rows.region.tolist()) == {subject.id}
        assert (rows.node, rows.epoch) == ("node-a", 7)
    else:
        with pytest.raises(OutOfBounds):
            subject.blocks(index, block)


def test_block_numbers_do_not_wrap_around():
    with pytest.raises(OutOfBounds):
        region().blocks(np.array([1 << 63], dtype=np.uint64), 2)
    with pytest.raises(InvalidDescriptor):
        region().blocks([0.5], 2)
    with pytest.raises(InvalidDescriptor):
        region().blocks([0], 0)


def test_a_view_of_a_pool_is_writable_only_by_right():
    pool = np.zeros(8192, np.uint8)
    assert pool_view(info(offset=4096), pool, "me").flags.writeable
    assert pool_view(info(access=Access.WRITE), pool, "other").flags.writeable
    assert not pool_view(info(access=Access.READ), pool, "other").flags.writeable
    assert not pool_view(info(writable=False), pool, "me").flags.writeable
    pool_view(info(offset=4096), pool, "me")[0] = 9
    assert pool[4096] == 9


def test_a_memfd_is_shared_and_cannot_shrink():
    fd, memory = make_memfd(8192, "label")
    try:
        memory[8191] = 7
        assert os.pread(fd, 1, 8191) == b"\x07"
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        other = map_shared(fd, 8192)
        other[0] = 3
        assert memory[0] == 3
    finally:
        os.close(fd)
    with pytest.raises(InvalidArgument):
        make_memfd(0, "")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4))[:, 1], np.zeros(0), np.array([object()]), 5, [1, 2]], ids=lambda a: type(a).__name__
)
def test_memory_that_cannot_be_registered_is_refused(array):
    with pytest.raises(InvalidArgument):
        bytes_of(array)


def test_registered_bytes_are_those_of_the_array():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    view = bytes_of(array)
    view[0] = 42
    assert array[0, 0] == 42
    assert bytes_of(bytearray(b"abc")).tobytes() == b"abc"
    assert not bytes_of(b"abc").flags.writeable


def test_any_layout_can_be_written():
    assert source_bytes(np.arange(4, dtype=np.uint8)[::2]).tobytes() == b"\0\2"
    assert source_bytes(b"").tobytes() == b""
    assert source_bytes(np.zeros(0)).tobytes() == b""
    assert source_bytes(memoryview(b"xy")).tobytes() == b"xy"
