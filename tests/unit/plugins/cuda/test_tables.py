"""Rows become pieces with the right addresses, and never reach outside what is mapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xferd.api.errors import OutOfBounds, SizeMismatch
from xferd.plugins.cuda.layout import Side
from xferd.plugins.cuda.tables import Missing, Places, pieces_of
from xferd.plugins.vectored import no_longer_than

SHIFT = 40
ALLOCATIONS = {1: (0x7F00_0000_0000, 4096), 2: (0x10_0000, 1 << 20), 5: (0xFFFF_FFFF_F000_0000, 1 << 16), 200: (64, 64)}
SEGMENTS = {
    3: (0x7FAA_0000_0000, 8192, 0x5000),
    4: (0x7FAA_0000_2000, 4096, 0x7FFF_0000_0000),
    9: (0x1000, 4096, 0x9000),
}


def rows_of(rows):
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def places(locked=None):
    made = Places((lambda *segment: locked.append(segment)) if locked is not None else (lambda *_: None))
    for number, (address, nbytes) in ALLOCATIONS.items():
        made.add_allocation(number, address, nbytes)
    for number, (address, nbytes, own) in SEGMENTS.items():
        made.add_segment(number, address, nbytes, own)
    return made


def by_hand(side, position, nbytes):
    """The address of one row, in plain Python; None where it is missing, "past" where it ends too late."""
    if side == Side.DEVICE:
        number, offset = position >> SHIFT, position & ((1 << SHIFT) - 1)
        if number not in ALLOCATIONS:
            return None
        address, room = ALLOCATIONS[number]
        return "past" if offset + nbytes > room else address + offset
    for address, room, own in SEGMENTS.values():
        if address <= position and position + nbytes <= address + room:
            return position - address + own
    return None


positions = st.one_of(
    st.tuples(st.sampled_from([*ALLOCATIONS, 3, 63, 64, 201, 5000]), st.integers(0, 5000)).map(
        lambda pair: (Side.DEVICE, pair[0] << SHIFT | pair[1])
    ),
    st.tuples(st.sampled_from(list(SEGMENTS)), st.integers(-50, 9000)).map(
        lambda pair: (Side.HOST, SEGMENTS[pair[0]][0] + pair[1])
    ),
    st.integers(0, 1 << 48).map(lambda position: (Side.HOST, position)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(positions, st.integers(1, 9000)), min_size=1, max_size=12))
def test_each_row_is_where_plain_arithmetic_has_it(wanted):
    for side in Side:
        rows = [(position, nbytes) for ((of, position), nbytes) in wanted if of == side]
        if not rows:
            continue
        expected = [by_hand(side, *row) for row in rows]
        if None in expected:
            with pytest.raises(Missing):
                places().translate(side, rows_of(rows))
        elif "past" in expected:
            with pytest.raises(OutOfBounds):
                places().translate(side, rows_of(rows))
        else:
            translated = places().translate(side, rows_of(rows))
            assert translated.address.tolist() == expected
            assert translated.nbytes.tolist() == [nbytes for _, nbytes in rows]


def test_rows_name_what_they_lie_in():
    made = places()
    device = made.translate(Side.DEVICE, rows_of([(2 << SHIFT, 4), (1 << SHIFT, 4), (2 << SHIFT, 4)]))
    assert set(device.numbers.tolist()) == {1, 2}
    host = made.translate(Side.HOST, rows_of([(0x1000, 4), (0x7FAA_0000_2000, 4)]))
    assert set(host.numbers.tolist()) == {9, 4}
    assert made.translate(Side.HOST, rows_of([(0x1000, 4)])).numbers.tolist() == [9]


def test_host_memory_is_locked_when_it_is_first_used_and_once():
    locked = []
    made = places(locked)
    assert made.locked_nbytes == 0
    for _ in range(2):
        made.translate(Side.HOST, rows_of([(0x1000, 4)]))
    assert locked == [(0x9000, 4096, True)]
    made.translate(Side.HOST, rows_of([(0x7FAA_0000_0000, 4), (0x1000, 4)]))
    assert locked == [(0x9000, 4096, True), (0x5000, 8192, True)]
    assert made.locked_nbytes == 4096 + 8192
    assert made.drop_segment(3)
    assert not made.drop_segment(4), "it was never locked"
    assert not made.drop_segment(77)
    assert made.locked_nbytes == 4096


def test_memory_that_was_dropped_is_missing_and_can_come_back_elsewhere():
    made = places()
    made.drop_allocation(1)
    made.drop_allocation(77)
    with pytest.raises(Missing):
        made.translate(Side.DEVICE, rows_of([(1 << SHIFT, 4)]))
    made.add_allocation(1, 0x4000, 16)
    assert made.translate(Side.DEVICE, rows_of([(1 << SHIFT | 12, 4)])).address.tolist() == [0x400C]
    made.drop_segment(9)
    with pytest.raises(Missing):
        made.translate(Side.HOST, rows_of([(0x1000, 4)]))


def test_a_missing_row_counts_more_than_one_that_ends_too_late():
    with pytest.raises(Missing):
        places().translate(Side.DEVICE, rows_of([(1 << SHIFT, 4097), (99 << SHIFT, 1)]))


def test_message_of_a_row_past_the_end_names_it():
    with pytest.raises(OutOfBounds, match=r"byte 4100 of allocation 1.*4096"):
        places().translate(Side.DEVICE, rows_of([(1 << SHIFT, 4), (1 << SHIFT | 4000, 100)]))


def test_span_is_within_its_allocation():
    made = places()
    assert made.span(2, 16, 1000) == 0x10_0000 + 16
    for bad in ((2, 1 << 20, 1), (2, -1, 1), (77, 0, 1)):
        with pytest.raises(OutOfBounds):
            made.span(*bad)


@st.composite
def two_lists(draw):
    """Two lists of the same total: spans that touch now and then, and never overlap."""
    total = draw(st.integers(1, 400))

    def cut():
        marks = sorted(draw(st.sets(st.integers(1, total - 1), max_size=12))) if total > 1 else []
        sizes = np.diff([0, *marks, total])
        rows, at = [], 0
        for size in sizes.tolist():
            at += draw(st.integers(0, 1)) * draw(st.integers(0, 50))
            rows.append((at, size))
            at += size
        return draw(st.permutations(rows))

    return cut(), cut()


def bytes_of(rows):
    return [position for start, size in rows for position in range(start, start + size)]


@settings(max_examples=300, deadline=None)
@given(two_lists(), st.integers(1, 64))
def test_pieces_move_each_byte_once_to_its_place(lists, limit):
    source, target = lists
    made = Places(lambda *_: None)
    made.add_allocation(0, 10_000, 1 << 20)
    made.add_allocation(1, 50_000, 1 << 20)
    table = pieces_of(
        made.translate(Side.DEVICE, rows_of(source)),
        made.translate(Side.DEVICE, rows_of([(1 << SHIFT | position, size) for position, size in target])),
    )
    wanted = dict(zip((50_000 + p for p in bytes_of(target)), (10_000 + p for p in bytes_of(source)), strict=True))
    for pieces in (table, no_longer_than(table, limit)):
        found = {}
        for origin, goal, size in pieces.tolist():
            for step in range(size):
                assert goal + step not in found, "a byte moves twice"
                found[goal + step] = origin + step
        assert found == wanted
        assert (pieces[:, 2] > 0).all()
    # Merged as far as can be, and cut no more than needed.
    for before, after in zip(table[:-1].tolist(), table[1:].tolist(), strict=True):
        assert (before[0] + before[2], before[1] + before[2]) != (after[0], after[1])
    assert len(no_longer_than(table, limit)) == sum(-(-size // limit) for size in table[:, 2].tolist())


def test_lists_of_unequal_totals_are_refused():
    made = places()
    with pytest.raises(SizeMismatch, match="8 bytes and the target 9"):
        pieces_of(
            made.translate(Side.DEVICE, rows_of([(2 << SHIFT, 8)])),
            made.translate(Side.DEVICE, rows_of([(1 << SHIFT, 9)])),
        )


def test_a_table_that_needs_no_cut_is_not_copied():
    table = np.array([[1, 2, 64], [100, 200, 64]], dtype=np.uint64)
    assert no_longer_than(table, 64) is table
