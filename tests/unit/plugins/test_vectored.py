"""Whole tables move exactly, with any shapes, and what the system refuses is a typed error that names it."""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import MoveFailed, ShortTransfer
from xferd.plugins import vectored
from xferd.plugins.base import Extent, MappedSpace

NBYTES = 1 << 16
cuts = st.lists(st.integers(1, 2000), min_size=1, max_size=30)


def table(base, rows):
    iov = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    iov[:, 0] += np.uint64(base)
    return iov


def spans(sizes, gap):
    """Return (offset, size) rows in reverse order of memory, with gaps between them."""
    offset, rows = 0, []
    for size in sizes:
        rows.append((offset + gap, size))
        offset += size + gap
    return rows[::-1]


def resized(sizes, total):
    """Return sizes cut or padded to a total."""
    found = []
    for size in sizes:
        if total <= 0:
            break
        found.append(min(size, total))
        total -= found[-1]
    return found + ([total] if total > 0 else [])


def noise(nbytes, seed=1):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def gathered(data, rows):
    return np.concatenate([data[offset : offset + size] for offset, size in rows])


def no_memory():
    """Return the address of a page that is mapped, and not to be touched."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=0)
    return page, np.frombuffer(page, dtype=np.uint8).ctypes.data


@given(cuts, st.integers(0, 70_000))
def test_advance_drops_exactly_the_first_bytes(sizes, moved):
    moved = min(moved, sum(sizes))
    iov = table(1 << 40, spans(sizes, 5))
    before = iov.copy()
    rest = vectored.advance(iov, moved)
    np.testing.assert_array_equal(iov, before)
    places = [byte for start, size in iov.tolist() for byte in range(start, start + size)]
    assert [byte for start, size in rest.tolist() for byte in range(start, start + size)] == places[moved:]


def test_advance_is_exact_where_floats_are_not():
    iov = np.array([[0, 2**60], [0, 1], [0, 1]], dtype=np.uint64)
    assert vectored.advance(iov, 2**60 + 1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "moved", [1, 512 * 1024 - 1, 512 * 1024, 512 * 1024 + 1, 512 * 2000, 512 * 3000 - 1, 512 * 3000]
)
def test_advance_looks_past_what_one_call_takes(moved):
    iov = table(0, [(row * 1000, 512) for row in range(3000)])
    rest = vectored.advance(iov, moved)
    assert vectored.total_nbytes(rest) == 512 * 3000 - moved
    if len(rest):
        whole, part = divmod(moved, 512)
        assert rest[0].tolist() == [whole * 1000 + part, 512 - part]
        np.testing.assert_array_equal(rest[1:], iov[whole + 1 :])


@pytest.mark.parametrize("is_indexed", [False, True])
@given(cuts, st.data())
def test_extent_cut_agrees_with_a_loop(is_indexed, sizes, data):
    total = sum(sizes)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    extent = Extent(MappedSpace(), table(0, spans(sizes, 3)), np.arange(len(sizes), dtype=np.uint64))
    extent = extent.indexed() if is_indexed else extent
    places = [
        (owner, byte) for owner, (first, size) in enumerate(extent.iov.tolist()) for byte in range(first, first + size)
    ]
    part = extent.cut(start, stop)
    assert part.region is not None
    named = [
        (owner, byte)
        for owner, (first, size) in zip(part.region.tolist(), part.iov.tolist(), strict=True)
        for byte in range(first, first + size)
    ]
    assert named == places[start:stop]
    assert part.nbytes == stop - start
    assert part.iov[:, 1].all()


@given(cuts, cuts)
def test_copies_any_shapes(left, right):
    right = resized(right, sum(left))
    source, target = noise(NBYTES), np.zeros(NBYTES, dtype=np.uint8)
    mine, theirs = spans(left, 1), spans(right, 2)
    assert vectored.copy_local(table(source.ctypes.data, mine), table(target.ctypes.data, theirs)) == sum(left)
    np.testing.assert_array_equal(gathered(target, theirs), gathered(source, mine))
    assert target.sum(dtype=int) == gathered(source, mine).sum(dtype=int)


def test_more_rows_than_one_call_takes():
    count = vectored.IOV_MAX * 3 + 5
    source, target = noise(count * 4), np.zeros(count * 4, dtype=np.uint8)
    rows = [(row * 4, 3) for row in range(count)]
    assert (
        vectored.copy_local(table(source.ctypes.data, rows), table(target.ctypes.data, [(1, count * 3)])) == count * 3
    )
    np.testing.assert_array_equal(target[1 : 1 + count * 3], gathered(source, rows))


def test_memory_that_may_not_be_touched_is_efault():
    page, address = no_memory()
    target = np.zeros(64, dtype=np.uint8)
    with pytest.raises(MoveFailed, match="EFAULT after 0 of 64") as caught:
        vectored.copy_local(table(address, [(0, 64)]), table(target.ctypes.data, [(0, 64)]))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFAULT
    assert caught.value.remedy
    page.close()


def test_fault_on_the_way_says_how_far_it_came():
    page, address = no_memory()
    source, target = noise(4096), np.zeros(8192, dtype=np.uint8)
    iov = np.array([[source.ctypes.data, 4096], [address, 4096]], dtype=np.uint64)
    with pytest.raises(MoveFailed, match="EFAULT after 4096 of 8192"):
        vectored.copy_local(iov, table(target.ctypes.data, [(0, 8192)]))
    np.testing.assert_array_equal(target[:4096], source)
    page.close()


def test_process_that_does_not_exist_is_esrch():
    data = noise(64)
    iov = table(data.ctypes.data, [(0, 64)])
    with pytest.raises(MoveFailed, match="ESRCH"):
        vectored.copy_process(iov, iov, 2**22 + 1, write=True)


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@given(left=cuts, right=cuts)
def test_file_spans_move_any_shapes(tmp_path_factory, left, right):
    right = resized(right, sum(left))
    fd = os.open(tmp_path_factory.mktemp("spans") / "data", os.O_RDWR | os.O_CREAT)
    try:
        before, memory = noise(NBYTES, 2), noise(NBYTES, 3)
        os.pwrite(fd, before.tobytes(), 0)
        there, here = spans(left, 1), spans(right, 2)
        target = np.zeros(NBYTES, dtype=np.uint8)
        assert vectored.read_file_spans(fd, table(0, there), table(target.ctypes.data, here)) == sum(left)
        np.testing.assert_array_equal(gathered(target, here), gathered(before, there))
        assert vectored.write_file_spans(fd, table(0, there), table(memory.ctypes.data, here)) == sum(left)
        after = np.frombuffer(os.pread(fd, NBYTES, 0), dtype=np.uint8)
        np.testing.assert_array_equal(gathered(after, there), gathered(memory, here))
        untouched = np.ones(NBYTES, dtype=bool)
        for offset, size in there:
            untouched[offset : offset + size] = False
        np.testing.assert_array_equal(after[untouched], before[untouched])
    finally:
        os.close(fd)


def test_file_span_of_more_memory_rows_than_one_call_takes(file):
    count = vectored.IOV_MAX * 2 + 3
    data, memory = noise(count * 3), np.zeros(count * 4, dtype=np.uint8)
    os.pwrite(file, data.tobytes(), 0)
    rows = [(row * 4, 3) for row in range(count)]
    vectored.read_file_spans(file, table(0, [(0, count * 3)]), table(memory.ctypes.data, rows))
    np.testing.assert_array_equal(gathered(memory, rows), data)
    os.ftruncate(file, 0)
    vectored.write_file_spans(file, table(0, [(0, count * 3)]), table(memory.ctypes.data, rows))
    assert os.pread(file, count * 3, 0) == data.tobytes()


@pytest.mark.parametrize(("size", "done"), [(0, 0), (100, 40), (159, 99)])
def test_short_file_says_where_it_ended(file, size, done):
    os.ftruncate(file, size)
    memory = np.zeros(200, dtype=np.uint8)
    rows = table(0, [(0, 50), (60, 100)]) if size > 50 else table(0, [(0, 150)])
    with pytest.raises(ShortTransfer, match=f"ended after {done} of") as caught:
        vectored.read_file_spans(file, rows, table(memory.ctypes.data, [(0, 150)]))
    assert str(size) in caught.value.limit


def test_bad_descriptor_is_ebadf(file):
    data = noise(10)
    iov = table(data.ctypes.data, [(0, 10)])
    read_only = os.open("/proc/self/exe", os.O_RDONLY)
    with pytest.raises(MoveFailed, match="pwritev: EBADF"):
        vectored.write_file_spans(read_only, table(0, [(0, 10)]), iov)
    os.close(read_only)
    with pytest.raises(MoveFailed, match="preadv: EBADF"):
        vectored.read_file_spans(-1, table(0, [(0, 10)]), iov)


def test_full_device_is_enospc():
    full = os.open("/dev/full", os.O_WRONLY)
    data = noise(10)
    with pytest.raises(MoveFailed, match="pwritev: ENOSPC after 0 of 10") as caught:
        vectored.write_file_spans(full, table(0, [(0, 10)]), table(data.ctypes.data, [(0, 10)]))
    assert "make room" in caught.value.remedy
    os.close(full)


def test_iov_of_names_the_buffer():
    buffer = bytearray(b"hello")
    target = np.zeros(5, dtype=np.uint8)
    vectored.copy_local(vectored.iov_of(buffer), table(target.ctypes.data, [(0, 5)]))
    assert target.tobytes() == b"hello"


def test_has_ended_follows_the_process():
    read, write = os.pipe()
    child = os.posix_spawn(
        "/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0), (os.POSIX_SPAWN_CLOSE, write)]
    )
    pidfd = os.pidfd_open(child)
    assert not vectored.has_ended(pidfd)
    os.close(write)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert vectored.has_ended(pidfd)
    os.close(pidfd)
    os.close(read)
