"""Which blocks a list of spans touches, against a slow and obvious reckoning."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, strategies as st
from storage_rig import extent

from xferd.daemon.storage.catalogue import ALIGN_NBYTES
from xferd.daemon.storage.touching import ExtentIndex


@st.composite
def layouts(draw):
    """Extents one behind the other, with and without gaps, of different block sizes."""
    at, made = 0, []
    for number in range(draw(st.integers(1, 5))):
        at += draw(st.sampled_from([0, 0, ALIGN_NBYTES]))
        nbytes = draw(st.integers(1, 5 * ALIGN_NBYTES))
        made.append(extent(number, at, nbytes, draw(st.sampled_from([1000, 4096, 10_000]))))
        at += made[-1].room
    rows = draw(st.lists(st.tuples(st.integers(0, at), st.integers(1, at + 1)), max_size=8))
    return made, rows


@given(layouts())
def test_the_blocks_touched_are_those_of_every_byte(case):
    extents, rows = case
    index = ExtentIndex()
    index.add(extents)
    found = {
        (span.extent.id, block)
        for span in index.touched(np.array(rows, dtype=np.uint64).reshape(-1, 2))
        for block in range(span.first, span.stop)
    }
    expected = {
        (e.id, block)
        for e in extents
        for block in range(e.blocks)
        for start, nbytes in [e.span(block, block + 1)]
        if any(at < start + nbytes and at + size > start for at, size in rows)
    }
    assert found == expected


@given(layouts())
def test_spans_are_in_order_and_none_touches_another(case):
    extents, rows = case
    index = ExtentIndex()
    index.add(extents)
    spans = index.touched(np.array(rows, dtype=np.uint64).reshape(-1, 2))
    for before, after in itertools.pairwise(spans):
        assert (before.extent.offset, before.stop) < (after.extent.offset, after.first) or (
            before.extent is not after.extent
        )
    assert all(0 <= span.first < span.stop <= span.extent.blocks for span in spans)


def test_what_is_taken_out_is_touched_no_more():
    index = ExtentIndex()
    here, gone = extent(1, 0, 4096, 4096), extent(2, 4096, 4096, 4096)
    index.add([here, gone])
    whole = np.array([[0, 8192]], dtype=np.uint64)
    assert [span.extent for span in index.touched(whole)] == [here, gone]
    index.remove([gone])
    assert [span.extent for span in index.touched(whole)] == [here]
