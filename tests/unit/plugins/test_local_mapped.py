"""Copies between mappings are exact in every way there is, and the way taken is the one that was measured."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from xferd.plugins.local import blocks, mapped, native
from xferd.plugins.local.blocks import BlockCopier, blocks_of
from xferd.plugins.local.mapped import MappedCopier

NBYTES = 1 << 20


def noise(nbytes, seed=1):
    return np.random.default_rng(seed).integers(1, 255, nbytes, dtype=np.uint8, endpoint=True)


def table(base, rows):
    iov = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    iov[:, 0] += np.uint64(base)
    return iov


def places(iov):
    """The address of every byte, in order."""
    return np.concatenate([np.arange(start, start + size) for start, size in iov.tolist()])


@pytest.fixture(params=["native", "numpy"])
def copier(request):
    """The copier with and without what was compiled."""
    if request.param == "numpy":
        return MappedCopier()
    compiled = native.load()
    if compiled is None:
        pytest.skip("no compiler was there when xferd was installed")
    return MappedCopier(compiled)


def check(copy, left, right, nbytes=NBYTES):
    """Copy, and compare every byte of the target, also those around."""
    source, target = noise(nbytes), np.zeros(nbytes, dtype=np.uint8)
    mine, theirs = table(source.ctypes.data, left), table(target.ctypes.data, right)
    moved = copy(mine, theirs)
    expected = np.zeros(nbytes, dtype=np.uint8)
    if moved:
        expected[places(theirs) - target.ctypes.data] = source[places(mine) - source.ctypes.data]
    np.testing.assert_array_equal(target, expected)
    return moved


@st.composite
def block_rows(draw, count, size):
    """A table of ``count`` blocks in any order, neighbours merged here and there, and where it begins."""
    room = min(NBYTES // size - 1, count * 3)
    order = draw(st.permutations(range(room)))[:count]
    base = draw(st.integers(0, NBYTES - (room + 1) * size)) if draw(st.booleans()) else 0
    if draw(st.booleans()):
        order = list(range(order[0] % (room - count + 1), order[0] % (room - count + 1) + count))
    rows = []
    for number in order:
        if rows and rows[-1][0] + rows[-1][1] == base + number * size and draw(st.booleans()):
            rows[-1][1] += size
        else:
            rows.append([base + number * size, size])
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_that_do_not_pair_up_arrive_in_order(copier, data):
    left = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
    right, rest = [], sum(left)
    while rest:
        right.append(data.draw(st.integers(1, rest)) if len(right) < 60 else rest)
        rest -= right[-1]
    mine = [[end - size, size] for end, size in zip(np.cumsum(left).tolist(), left, strict=True)]
    theirs = [[end - size + 7, size] for end, size in zip(np.cumsum(right).tolist(), right, strict=True)]
    assert check(copier.copy, data.draw(st.permutations(mine)), theirs) == sum(left)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_arrive_in_order_from_anywhere_to_anywhere(data):
    size = data.draw(st.sampled_from((1, 8, 96, 512, 1000, 4096)))
    count = data.draw(st.integers(2, min(300, NBYTES // size // 4)))
    left, right = data.draw(block_rows(count, size)), data.draw(block_rows(count, size))
    moved = check(BlockCopier().copy, left, right)
    assert moved in (0, count * size)
    assert check(MappedCopier().copy, left, right) == count * size


@pytest.mark.parametrize("size", [64, 512, 2048])
@pytest.mark.parametrize("shape", ["scattered", "gathered", "both", "span"])
def test_many_blocks_go_by_numpy(size, shape):
    count = NBYTES // 4096 // 2  # 128
    rng = np.random.default_rng(3)
    left = [[int(number) * 4096, size] for number in rng.permutation(NBYTES // 4096)[:count]]
    right = [[int(number) * 4096, size] for number in rng.permutation(NBYTES // 4096)[:count]]
    span = [[size, count * size]]
    left, right = {"scattered": (span, right), "gathered": (left, span), "both": (left, right), "span": (span, span)}[
        shape
    ]
    moved = check(BlockCopier().copy, left, right)
    assert moved == (0 if shape == "span" else count * size)


def test_more_blocks_than_a_tile_and_a_rest():
    count = blocks.TILE_NBYTES // 2048 * 2 + 3
    order = np.random.default_rng(3).permutation(count)
    left = [[int(number) * 4096, 2048] for number in order]
    right = [[int(number) * 4096 + 2048, 2048] for number in order[::-1]]
    assert check(BlockCopier().copy, left, right, nbytes=count * 4096) == count * 2048


@pytest.mark.parametrize("skew", [0, 1, 15, 63, 64])
@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 500, 4096])
def test_past_the_cache_no_byte_is_lost_at_the_edges(copier, size, skew):
    count = native.PAST_CACHE_NBYTES // size + 1
    step = size + 70
    left = [[number * step + skew, size] for number in range(min(count, 4000))]
    fill = [[len(left) * step + 100, native.PAST_CACHE_NBYTES + 5]]
    right = [[number * step + 3, size] for number in range(len(left))][::-1]
    nbytes = fill[0][0] + fill[0][1] + 100
    assert check(copier.copy, left + fill, right + fill, nbytes=nbytes) == len(left) * size + fill[0][1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([[n * 1024, 512] for n in range(200)], [[n * 1024 + (n == 7), 512] for n in range(200)]),  # one out of step
        ([[n * 1024, 512 - (n == 9)] for n in range(200)], [[0, 200 * 512 - 1]]),  # one shorter
        ([[n * 16384, 16384] for n in range(0, 64, 2)] * 8, [[n * 16384, 16384] for n in range(1, 64, 2)] * 8),
        ([[n * 512, 512] for n in range(0, 100, 2)], [[n * 512, 512] for n in range(1, 100, 2)]),  # few
        ([[5, 1000]], [[900, 1000]]),
    ],
)
def test_what_is_not_of_equal_blocks_goes_another_way(copier, left, right):
    assert check(BlockCopier().copy, left, right) == 0
    assert check(copier.copy, left, right) == sum(size for _, size in left)


def test_blocks_of_finds_rows_that_were_merged():
    memory = noise(4096)
    found = blocks_of(table(memory.ctypes.data, [[0, 512], [1024, 1024], [512, 512]]), 512)
    assert found is not None
    assert found.index is not None
    assert found.index.tolist() == [0, 2, 3, 1]
    np.testing.assert_array_equal(found.rows.reshape(-1), memory[:2048])
    whole = blocks_of(table(memory.ctypes.data, [[512, 2048]]), 512)
    assert whole is not None
    assert whole.index is None
    assert whole.rows.shape == (4, 512)


def test_threads_have_tiles_of_their_own():
    copier = BlockCopier()
    count = 256
    rows = [[n * 1024, 512] for n in range(count)]
    shifted = [[n * 1024 + 512, 512] for n in range(count)]
    sources = [noise(NBYTES, seed) for seed in range(4)]
    targets = [np.zeros(NBYTES, dtype=np.uint8) for _ in sources]

    def work(source, target):
        for _ in range(50):
            copier.copy(table(source.ctypes.data, rows), table(target.ctypes.data, shifted))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(sources, targets, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for source, target in zip(sources, targets, strict=True):
        blocks_in, blocks_out = source[: count * 1024].reshape(-1, 2, 512), target[: count * 1024].reshape(-1, 2, 512)
        np.testing.assert_array_equal(blocks_out[:, 1], blocks_in[:, 0])
        assert not blocks_out[:, 0].any()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([16 << 20], [16 << 20]),
        ([16 << 20], [4 << 20, 12 << 20]),
        ([4 << 20, 8 << 20, 4 << 20], [(16 << 20) - 1, 1]),  # four pieces, the last of one byte
        ([8 << 20] * 2, [8 << 20] * 2),
    ],
)
def test_few_large_pieces_are_copied_exactly(copier, left, right):
    assert sum(left) >= (len(left) + len(right) - 1) * mapped.MEMMOVE_MIN_NBYTES, "not the way that is tested here"
    ends_left, ends_right = np.cumsum([0, *left]), np.cumsum([0, *right])
    mine = [[int(end) + 4096 * (1 + number), size] for number, (end, size) in enumerate(zip(ends_left, left))]  # noqa: B905
    theirs = [[int(end) + 77 * (1 + number), size] for number, (end, size) in enumerate(zip(ends_right, right))]  # noqa: B905
    assert check(copier.copy, mine, theirs, nbytes=17 << 20) == 16 << 20
