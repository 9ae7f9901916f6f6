"""Columns of the posix backend: whatever the shapes, the pieces are the same bytes, within the limits of a request."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from xferd.plugins.posix.pieces import Pieces, pieces_of, shortened, without_edges
from xferd.plugins.vectored import IOV_MAX


def table(rows):
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


@st.composite
def spans(draw, total=None, largest=20_000):
    """Spans in any order, none empty, none overlapping; of a total where it is given."""
    if total is None:
        sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=12))
    else:
        sizes = []
        while total:
            sizes.append(draw(st.integers(1, min(total, 9)) | st.integers(1, total)))
            total -= sizes[-1]
    position, rows = draw(st.integers(0, 10_000)), []
    for size in sizes:
        rows.append((position, size))
        position += size + draw(st.integers(1, 5000))
    return table(draw(st.permutations(rows)))


def bytes_of(spans):
    """Every byte's position, in order."""
    return np.concatenate([np.arange(start, start + size) for start, size in spans.tolist()])


def memory_of(pieces):
    return bytes_of(pieces.parts)


def file_of(pieces: Pieces):
    return bytes_of(np.stack((pieces.offset, pieces.nbytes), axis=1))


def check(pieces: Pieces):
    """Each piece has as many bytes in memory as in the file."""
    sums = np.add.reduceat(pieces.parts[:, 1], pieces.borders[:-1])
    assert np.array_equal(sums, pieces.nbytes)
    assert pieces.borders[0] == 0
    assert pieces.borders[-1] == len(pieces.parts)


@given(spans(), st.sampled_from([512, 4096, 8192]))
def test_shortened_spans_are_the_same_bytes_and_cut_on_the_grid(rows, limit):
    cut = shortened(rows, limit)
    assert np.array_equal(bytes_of(cut), bytes_of(rows))
    assert int(cut[:, 1].max()) <= limit
    ends = set((rows[:, 0] + rows[:, 1]).tolist())
    assert all(end % limit == 0 or end in ends for end in (cut[:, 0] + cut[:, 1]).tolist())
    short = rows[rows[:, 1] <= limit]
    assert {tuple(row) for row in short.tolist()} <= {tuple(row) for row in cut.tolist()}, "a short span was cut"


@given(spans(), st.sampled_from([512, 4096]))
def test_without_edges_what_is_whole_is_aligned_and_edges_are_small(rows, unit):
    cut = without_edges(rows, unit)
    assert np.array_equal(bytes_of(cut), bytes_of(rows))
    for start, size in cut.tolist():
        is_whole = start % unit == 0 and size % unit == 0
        assert is_whole or start // unit == (start + size - 1) // unit, "an edge reaches over a border"


@given(spans().flatmap(lambda rows: st.tuples(st.just(rows), spans(total=int(rows[:, 1].sum())))))
def test_pieces_pair_file_and_memory_in_order(ends):
    file, memory = ends
    pieces = pieces_of(file, memory)
    check(pieces)
    assert np.array_equal(file_of(pieces), bytes_of(file))
    assert np.array_equal(memory_of(pieces), bytes_of(memory))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.integers(0, 5000))
def test_bounded_pieces_fit_one_request(counts, start):
    """Memory in rows of two bytes, a hole between each: as many parts as rows."""
    file = table([(start + 10_000 * number, 2 * count) for number, count in enumerate(counts)])
    memory = table([(3 * number, 2) for number in range(sum(counts))])
    whole = pieces_of(file, memory)
    pieces = whole.bounded()
    check(pieces)
    assert int(np.diff(pieces.borders).max()) <= IOV_MAX
    assert np.array_equal(file_of(pieces), file_of(whole))
    assert np.array_equal(memory_of(pieces), memory_of(whole))


@given(spans().flatmap(lambda rows: st.tuples(st.just(rows), spans(total=int(rows[:, 1].sum())))), st.data())
def test_take_and_span_keep_each_piece_with_its_memory(ends, data):
    pieces = pieces_of(*ends)
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces))))
    whole = dict(zip(file_of(pieces).tolist(), memory_of(pieces).tolist(), strict=True))
    first = data.draw(st.integers(0, len(pieces) - 1))
    last = data.draw(st.integers(first + 1, len(pieces)))
    for part in (pieces.take(wanted), pieces.span(first, last)):
        if not len(part):
            continue
        check(part)
        assert all(
            whole[at] == there for at, there in zip(file_of(part).tolist(), memory_of(part).tolist(), strict=True)
        )
    assert len(pieces.take(wanted)) == int(wanted.sum())


def test_aligned_looks_at_offset_address_and_each_length():
    file = table([(0, 4096), (8192, 4096), (20_000, 4096), (40_960, 4096), (81_920, 4096)])
    memory = table(
        [(0, 4096), (4097, 4096), (12_288, 4096), (16_384, 1000), (20_480, 3096), (24_576, 512), (28_672, 3584)]
    )
    assert pieces_of(file, memory).aligned(512, 512).tolist() == [True, False, False, False, True]
    assert pieces_of(file, memory).aligned(512, 4).tolist() == [True, False, False, False, True]
    assert pieces_of(file, memory).aligned(1024, 4).tolist() == [True, False, False, False, False]
