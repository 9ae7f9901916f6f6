"""Descriptor lists do, over whole columns, what a plain loop over Python numbers would do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api import descriptors as d
from xferd.api.errors import InvalidDescriptor, LimitExceeded, OutOfBounds, SizeMismatch

U64_MAX = 2**64 - 1
u64 = st.integers(0, U64_MAX)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def column(values):
    return np.array(values, dtype=d.U64)


@st.composite
def rows(draw, max_size=40):
    """Rows that are valid: no empty one, no end past 2**64 - 1; small and huge numbers alike."""
    found = []
    for _ in range(draw(st.integers(1, max_size))):
        nbytes = draw(st.integers(1, 50) | st.integers(1, U64_MAX))
        found.append(
            (draw(u64), draw(st.integers(0, min(80, U64_MAX - nbytes)) | st.integers(0, U64_MAX - nbytes)), nbytes)
        )
    return found


@st.composite
def equal_totals(draw):
    left = draw(sizes)
    total, right = sum(left), []
    while total:
        right.append(draw(st.integers(1, min(total, 40))))
        total -= right[-1]
    return left, right


def listed(descriptors):
    return list(
        zip(
            descriptors.region.tolist(),
            descriptors.offset.tolist(),
            descriptors.nbytes.tolist(),
            strict=True,
        )
    )


# ------------------------------------------------------------------------------------------ making lists


@given(rows())
def test_all_constructors_agree(table):
    region, offset, nbytes = (list(part) for part in zip(*table, strict=True))
    packed = [np.array(part, dtype="<u8").tobytes() for part in (region, offset, nbytes)]
    runs = [d.Run(*row, stride=0, count=1) for row in table]
    made = [
        d.DescriptorList.from_columns(region, offset, nbytes, node="b", epoch=7),
        d.DescriptorList.from_packed(*packed, node="b", epoch=7),
        d.DescriptorList.from_rows(table, node="b", epoch=7),
        d.DescriptorList.from_rows(np.array(table, dtype=np.uint64), node="b", epoch=7),
        d.DescriptorList.from_runs(runs, node="b", epoch=7),
    ]
    for descriptors in made:
        assert listed(descriptors) == table
        assert (descriptors.node, descriptors.epoch) == ("b", 7)
        for part in (descriptors.region, descriptors.offset, descriptors.nbytes):
            assert part.dtype == d.U64
            assert part.flags.c_contiguous


@given(rows())
def test_total_is_exact_past_u64(table):
    assert d.DescriptorList.from_rows(table).total_nbytes == sum(row[2] for row in table)


def test_packed_columns_are_viewed_not_copied():
    raw = np.arange(1, 9, dtype="<u8").tobytes()
    parsed = d.parse_column("offset", raw)
    assert parsed.tolist() == list(range(1, 9))
    assert not parsed.flags.owndata
    assert not parsed.flags.writeable


def test_packed_columns_are_little_endian():
    assert d.parse_column("offset", b"\x01" + bytes(7)).tolist() == [1]
    assert d.parse_column("offset", bytes(7) + b"\x01").tolist() == [1 << 56]
    assert d.parse_index(b"\x01" + bytes(3)).tolist() == [1]


def test_single_value_stands_for_all_rows():
    descriptors = d.DescriptorList.from_columns(5, [0, 10, 20], 10)
    assert listed(descriptors) == [(5, 0, 10), (5, 10, 10), (5, 20, 10)]
    packed = d.DescriptorList.from_packed(column([5]).tobytes(), column([0, 10]).tobytes(), column([10]).tobytes())
    assert listed(packed) == [(5, 0, 10), (5, 10, 10)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, ">u8", ">i4"])
def test_any_whole_numbers_are_taken(dtype):
    descriptors = d.DescriptorList.from_columns(
        np.array([1, 2], dtype=dtype), np.array([3, 4], dtype=dtype), np.array([5, 6], dtype=dtype)
    )
    assert listed(descriptors) == [(1, 3, 5), (2, 4, 6)]


def test_numbers_on_both_sides_of_int64_are_taken_exactly():
    # numpy alone would make floats of such a list, and 2**63 + 1 would become 2**63.
    descriptors = d.DescriptorList.from_columns([1, 2**64 - 1], [2**63 + 1, 3], [np.uint64(7), 9])
    assert listed(descriptors) == [(1, 2**63 + 1, 7), (2**64 - 1, 3, 9)]


@pytest.mark.parametrize(
    ("region", "offset", "nbytes"),
    [
        ([1], [0], [0]),
        ([1, 1], [0, 8], [8, 0]),
        ([1], [U64_MAX], [1]),
        ([1], [1], [U64_MAX]),
        ([1, 1], [0, 2**63], [8, 2**63]),
        ([], [], []),
        (1, [], 1),
        ([1, 2, 3], [0, 1], [1, 1]),
        ([1, 2], [0, 1], [1, 1, 1]),
        ([1, 2], [0], [1, 1]),
        ([1], [-1], [1]),
        ([1], [2**64], [1]),
        ([1], [0.5], [1]),
        ([1], [1e3], [1]),
        (np.array([1.0]), [0], [1]),
        (["1"], [0], [1]),
        ([None], [0], [1]),
        ([[1, 2]], [0], [1]),
        ([[1], [2, 3]], [0, 1], [1, 1]),
    ],
)
def test_bad_columns_are_refused(region, offset, nbytes):
    with pytest.raises(InvalidDescriptor) as caught:
        d.DescriptorList.from_columns(region, offset, nbytes)
    assert caught.value.limit
    assert caught.value.remedy


def test_last_byte_that_can_be_named():
    assert d.DescriptorList.from_columns(1, [U64_MAX - 1], 1).total_nbytes == 1
    assert d.DescriptorList.from_columns(1, [0], U64_MAX).total_nbytes == U64_MAX


def test_message_names_the_first_bad_row():
    with pytest.raises(InvalidDescriptor, match="descriptor 2 has nbytes 0"):
        d.DescriptorList.from_columns(1, [0, 1, 2, 3], [1, 1, 0, 0])
    with pytest.raises(InvalidDescriptor, match=f"descriptor 1 .offset {U64_MAX}, nbytes 9."):
        d.DescriptorList.from_columns(1, [0, U64_MAX, U64_MAX], 9)


@pytest.mark.parametrize("size", [1, 7, 9, 15])
def test_misaligned_bytes_are_refused(size):
    with pytest.raises(InvalidDescriptor, match=f"column offset has {size} bytes"):
        d.DescriptorList.from_packed(bytes(8), bytes(size), bytes(8))
    with pytest.raises(InvalidDescriptor, match=f"the index has {size} bytes"):
        d.parse_index(bytes(size))


@pytest.mark.parametrize("table", [[], [1, 2, 3], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3], [4, 5]]])
def test_rows_of_another_shape_are_refused(table):
    with pytest.raises(InvalidDescriptor):
        d.DescriptorList.from_rows(table)


# ------------------------------------------------------------------------------------------ strided runs


@given(
    st.lists(
        st.builds(d.Run, u64, st.integers(0, 1000), st.integers(1, 100), st.integers(0, 500), st.integers(1, 9)),
        min_size=1,
        max_size=20,
    )
)
def test_runs_expand_like_a_loop(runs):
    expected = [(run.region, run.offset + i * run.stride, run.nbytes) for run in runs for i in range(run.count)]
    assert listed(d.DescriptorList.from_runs(runs)) == expected
    assert listed(d.DescriptorList.from_runs(runs, max_descriptors=len(expected))) == expected
    with pytest.raises(LimitExceeded):
        d.DescriptorList.from_runs(runs, max_descriptors=len(expected) - 1)


@given(u64, u64, u64, u64, st.integers(0, 5))
def test_any_run_expands_exactly_or_is_refused(region, offset, nbytes, stride, count):
    expected = [(region, offset + i * stride, nbytes) for i in range(count)]
    valid = count > 0 and nbytes > 0 and all(row[1] + row[2] <= U64_MAX for row in expected)
    run = d.Run(region, offset, nbytes, stride, count)
    if valid:
        assert listed(d.DescriptorList.from_runs([run])) == expected
    else:
        with pytest.raises(InvalidDescriptor):
            d.DescriptorList.from_runs([run])


@pytest.mark.parametrize(
    "run",
    [
        d.Run(-1, 0, 1, 1, 1),
        d.Run(2**64, 0, 1, 1, 1),
        d.Run(1, -1, 1, 1, 1),
        d.Run(1, 0, -1, 1, 1),
        d.Run(1, 0, 1, -1, 2),
        d.Run(1, 0, 1, 1, -1),
        d.Run(1, 0, 1, 1, 0),
    ],
)
def test_runs_of_impossible_numbers_are_refused(run):
    with pytest.raises(InvalidDescriptor, match="run 1 is"):
        d.DescriptorList.from_runs([d.Run(1, 0, 1, 1, 1), run])


def test_no_runs_is_no_list():
    with pytest.raises(InvalidDescriptor):
        d.DescriptorList.from_runs([])


def test_limit_is_checked_before_memory_is_taken():
    with pytest.raises(LimitExceeded, match="expands to 1099511627776"):
        d.DescriptorList.from_runs([d.Run(1, 0, 1, 1, 1 << 40)], max_descriptors=1 << 20)
    with pytest.raises(LimitExceeded, match="has 3 runs"):
        d.DescriptorList.from_runs([d.Run(1, 0, 1, 1, 0)] * 3, max_descriptors=2)


# ------------------------------------------------------------------------------------------ selecting


@given(rows(), st.data())
def test_select_like_a_loop(table, data):
    index = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=60))
    descriptors = d.DescriptorList.from_rows(table, node="n", epoch=3)
    selected = descriptors.select(d.parse_index(np.array(index, dtype="<u4").tobytes()))
    assert listed(selected) == [table[i] for i in index]
    assert (selected.node, selected.epoch) == ("n", 3)
    assert descriptors.select(None) is descriptors


@given(rows(), st.integers(0, 2**32 - 1), st.data())
def test_index_past_the_end_is_out_of_bounds(table, beyond, data):
    top = min(len(table) + beyond, 2**32 - 1)
    index = data.draw(st.permutations([0, len(table) - 1, top]))
    with pytest.raises(OutOfBounds, match=f"index {top} "):
        d.DescriptorList.from_rows(table).select(np.array(index, dtype=d.U32))


def test_empty_index_is_refused():
    with pytest.raises(InvalidDescriptor):
        d.DescriptorList.from_rows([(1, 2, 3)]).select(np.array([], dtype=d.U32))


# ------------------------------------------------------------------------------------------ totals


@given(rows(), rows())
def test_totals_must_be_equal(left, right):
    mine, theirs = (sum(row[2] for row in table) for table in (left, right))
    lists = d.DescriptorList.from_rows(left), d.DescriptorList.from_rows(right)
    if mine != theirs:
        with pytest.raises(SizeMismatch, match=f"{mine} bytes and the remote list {theirs}"):
            d.check_total(*lists)
    elif mine < 2**63:
        assert d.check_total(*lists) == mine


def test_totals_that_agree_only_modulo_2_64_differ():
    wrapped = d.DescriptorList.from_columns(1, [0, 0, 0], [2**63, 2**63, 5])
    with pytest.raises(SizeMismatch):
        d.check_total(wrapped, d.DescriptorList.from_columns(1, [0], 5))


def test_totals_whose_sums_would_wrap_are_refused():
    below = d.DescriptorList.from_columns(1, [0], 2**63 - 1)
    assert d.check_total(below, below) == 2**63 - 1
    over = d.DescriptorList.from_columns(1, [0, 0], [2**63 - 1, 1])
    with pytest.raises(LimitExceeded):
        d.check_total(over, over)


# ------------------------------------------------------------------------------------------ coalescing


def coalesced(table):
    merged = []
    for region, offset, nbytes in table:
        if merged and merged[-1][0] == region and merged[-1][1] + merged[-1][2] == offset:
            merged[-1] = (region, merged[-1][1], merged[-1][2] + nbytes)
        else:
            merged.append((region, offset, nbytes))
    return merged


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=60)
    | rows()
    | st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
        lambda parts: [(7, end - part, part) for end, part in zip(itertools.accumulate(parts), parts, strict=True)]
    )
)
def test_coalesce_like_a_loop(table):
    region, offset, nbytes = (column(part) for part in zip(*table, strict=True))
    before = [part.copy() for part in (region, offset, nbytes)]
    merged = d.coalesce(region, offset, nbytes)
    assert list(zip(*(part.tolist() for part in merged), strict=True)) == coalesced(table)
    for part, was in zip((region, offset, nbytes), before, strict=True):
        np.testing.assert_array_equal(part, was)


def test_coalesce_without_neighbours_copies_nothing():
    parts = column([1, 1, 2]), column([0, 9, 10]), column([8, 1, 1])
    assert all(out is part for out, part in zip(d.coalesce(*parts), parts, strict=True))


def test_coalesce_does_not_join_around_the_end_of_u64():
    # The end of a row at the top is 2**64 - 1, never 0, so that a row at 0 does not continue it.
    parts = column([1, 1]), column([U64_MAX - 4, 0]), column([4, 4])
    assert d.coalesce(*parts)[1].tolist() == [U64_MAX - 4, 0]


# ------------------------------------------------------------------------------------------ pairing and cutting


@given(equal_totals())
def test_pair_names_every_byte_pair_once_in_order(lists):
    left, right = lists
    pairing = d.pair(column(left), column(right))
    expected = zip(
        [(row, skip) for row, size in enumerate(left) for skip in range(size)],
        [(row, skip) for row, size in enumerate(right) for skip in range(size)],
        strict=True,
    )
    segments = zip(
        pairing.left.tolist(),
        pairing.left_skip.tolist(),
        pairing.right.tolist(),
        pairing.right_skip.tolist(),
        pairing.nbytes.tolist(),
        strict=True,
    )
    named = [((a, p + i), (b, q + i)) for a, p, b, q, size in segments for i in range(size)]
    assert named == list(expected)
    assert len(pairing.nbytes) <= len(left) + len(right) - 1
    assert pairing.nbytes.all()


def test_pair_is_exact_where_floats_are_not():
    pairing = d.pair(column([2**60 + 1, 2**60]), column([2**60, 2**60 + 1]))
    assert pairing.nbytes.tolist() == [2**60, 1, 2**60]
    assert pairing.right_skip.tolist() == [0, 0, 1]


@given(equal_totals(), st.integers(1, 200), st.integers(1, 20))
def test_chunks_cover_all_and_keep_both_limits(lists, chunk_nbytes, max_pieces):
    left, right = lists
    points = d.cut_points(column(left), column(right), chunk_nbytes=chunk_nbytes, max_pieces=max_pieces)
    assert points[0] == 0
    assert points[-1] == sum(left)
    for start, stop in itertools.pairwise(points):
        assert start < stop <= start + chunk_nbytes
        for side in (left, right):
            ends = list(itertools.accumulate(side))
            touched = [end for end, size in zip(ends, side, strict=True) if end > start and end - size < stop]
            assert len(touched) <= max_pieces


@given(equal_totals())
def test_limits_that_do_not_bind_give_one_chunk(lists):
    left, right = (column(side) for side in lists)
    assert d.cut_points(left, right, chunk_nbytes=1 << 40, max_pieces=1 << 20) == [0, sum(lists[0])]


def test_more_chunks_than_memory_holds_are_refused():
    huge = column([2**62])
    with pytest.raises(LimitExceeded):
        d.cut_points(huge, huge, chunk_nbytes=8 << 20, max_pieces=8192)
    assert len(d.cut_points(huge, huge, chunk_nbytes=2**50, max_pieces=8192)) == 2**12 + 1
