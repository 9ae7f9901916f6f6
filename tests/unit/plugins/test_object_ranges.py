"""From rows to gets, and the order of a write: every shape, against a plain model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument
from xferd.plugins.base import Extent, MappedSpace, ObjectSpace, ObjectsSpace, ObjectVersion, RemoteSpace
from xferd.plugins.object.ranges import Get, by_object, covers, in_object_order, plan_gets

OBJECT = 5000


def table(rows):
    return np.array(rows, dtype=np.uint64)


@st.composite
def shapes(draw):
    """Rows of an object, in any order, some overlapping, and rows of memory of the same total that do not."""
    source = draw(st.lists(st.tuples(st.integers(0, OBJECT - 1), st.integers(1, 700)), min_size=1, max_size=12))
    source = [(at, min(size, OBJECT - at)) for at, size in source]
    total, sizes = sum(size for _, size in source), []
    while total:
        sizes.append(draw(st.integers(1, total)))
        total -= sizes[-1]
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    at, target = 0, []
    for gap, size in zip(gaps, sizes, strict=True):
        target.append((at + gap, size))
        at += gap + size
    return source, draw(st.permutations(target))


@pytest.mark.slow
@given(shapes(), st.integers(0, 400), st.integers(40, 900))
def test_gets_bring_every_byte_to_its_place(shape, gap, most):
    """Bytes land in list order, no get is too large, gets are in order and apart, and no row is left out."""
    source, target = shape
    data = np.random.default_rng(1).integers(0, 255, OBJECT, dtype=np.uint8)
    size = max(at + n for at, n in target)
    memory, expected = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    stream = np.concatenate([data[at : at + n] for at, n in source])
    done = 0
    for at, n in target:
        expected[at : at + n] = stream[done : done + n]
        done += n
    gets = plan_gets(table(source), table(target), merge_gap=gap, max_nbytes=most)
    for get in gets:
        assert 0 < get.stop - get.start <= most
        spans, places = get.tables(get.start)
        assert int(spans[:, 0].min()) >= get.start
        assert int((spans[:, 0] + spans[:, 1]).max()) <= get.stop
        got = np.concatenate([data[at : at + n] for at, n in spans.tolist()])
        assert len(got) == int(places[:, 1].sum())
        done = 0
        for place, n in places.tolist():
            memory[place : place + n] = got[done : done + n]
            done += n
    assert np.array_equal(memory, expected)
    for left, right in itertools.pairwise(gets):
        assert left.stop <= right.start
        assert left.stop == right.start or right.start - left.stop > min(gap, most - 1)
    wanted = np.zeros(OBJECT, bool)
    for at, n in source:
        wanted[at : at + n] = True
    asked = np.zeros(OBJECT, bool)
    for get in gets:
        asked[get.start : get.stop] = True
    assert (asked | ~wanted).all()
    assert covers(gets, OBJECT) == bool(asked.all())


def test_borders_of_gets_are_multiples_from_the_start():
    """A whole read in many rows is cut at the same borders as in one: digests of its MiBs are then known."""
    rows = [(at, 100) for at in range(0, 5000, 100)]
    gets = plan_gets(table(rows), table([(0, 5000)]), merge_gap=0, max_nbytes=1024)
    assert [get.start for get in gets] == [0, 1024, 2048, 3072, 4096]
    assert covers(gets, 5000)


def space_of(nbytes):
    return ObjectSpace("s", "k", nbytes, ObjectVersion())


@pytest.mark.slow
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20).flatmap(lambda sizes: st.permutations(sizes)), st.data())
def test_a_write_is_put_in_the_order_of_the_object(sizes, data):
    """Whatever the order of the rows, each byte of the object comes from the same place as before."""
    ends = np.cumsum(sizes)
    order = data.draw(st.permutations(range(len(sizes))))
    target = [(int(ends[n]) - sizes[n], sizes[n]) for n in order]
    total = int(ends[-1])
    source, left, at = [], total, 0
    while left:
        size = data.draw(st.integers(1, left))
        source.append((at, size))
        at += size + data.draw(st.integers(0, 3))
        left -= size
    region = table([1 + n % 2 for n in range(len(source))]) if data.draw(st.booleans()) else None
    place = RemoteSpace("b", 1) if region is not None else MappedSpace()
    before = Extent(place, table(source), region)
    after, whole = in_object_order(before, Extent(space_of(total), table(target)))
    assert whole.iov.tolist() == [[0, total]]

    def positions(extent):
        keys = extent.region.tolist() if extent.region is not None else [0] * len(extent.iov)
        return [(key, at + n) for key, (at, size) in zip(keys, extent.iov.tolist(), strict=True) for n in range(size)]

    of_stream = positions(before)
    expected, done = [None] * total, 0
    for at, size in target:
        expected[at : at + size] = of_stream[done : done + size]
        done += size
    assert positions(after) == expected


@pytest.mark.parametrize(
    "rows",
    [[(0, 99)], [(1, 99)], [(0, 50), (51, 49)], [(0, 60), (50, 40)], [(0, 50), (0, 50)], [(50, 50), (0, 49)]],
)
def test_less_than_the_whole_is_refused(rows):
    """Gaps, overlaps, and a part at either end."""
    total = sum(size for _, size in rows)
    with pytest.raises(InvalidArgument, match="as a whole"):
        in_object_order(Extent(MappedSpace(), table([(0, total)])), Extent(space_of(100), table(rows)))


@given(st.data())
def test_a_read_of_several_objects_is_split_by_object_and_no_byte_changes_its_place(data):
    """Objects whose rows follow each other, and such whose rows alternate; in list order within each."""
    members = tuple(ObjectSpace("s", f"k{n}", 900, ObjectVersion("e", 900)) for n in range(4))
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    if data.draw(st.booleans()):
        numbers = sorted(numbers)
    rows = [(data.draw(st.integers(0, 800)), data.draw(st.integers(1, 60))) for _ in numbers]
    total = sum(size for _, size in rows)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, total - 1)), max_size=9)) & set(range(1, total)))
    places = [(10_000 + 3 * a, b - a) for a, b in itertools.pairwise([0, *cuts, total])]

    def spread(rows):
        return [at + n for at, size in rows for n in range(size)]

    source = Extent(ObjectsSpace("s", members), table(rows), np.array(numbers, dtype=np.uint64))
    every = [number for number, (_, size) in zip(numbers, rows, strict=True) for _ in range(size)]
    expected = sorted(zip(every, spread(rows), spread(places), strict=True))
    found = []
    split = by_object(source, table(places))
    assert len(split) == len({number for number, _, _ in split}) == len(set(numbers))
    for number, spans, where in split:
        assert where.flags.c_contiguous  # it is handed to C as it stands
        found += [(number, at, to) for at, to in zip(spread(spans.tolist()), spread(where.tolist()), strict=True)]
    assert sorted(found) == expected


@pytest.mark.parametrize(
    ("offset", "sizes", "is_dense"),
    [
        (None, [3, 97], True),
        ([0], [100], True),
        ([0, 40], [40, 60], True),
        ([0, 40, 99], [40, 59, 1], True),
        ([10], [90], False),
        ([10, 40], [30, 60], False),
        ([0, 50], [40, 50], False),
        ([0, 30], [40, 60], False),
        ([0, 40], [40, 50], False),
        ([40, 0], [60, 40], False),
    ],
)
def test_which_gets_are_all_of_their_range_in_order(offset, sizes, is_dense):
    """The others leave something out, overlap, or lie in another order than the bytes come."""
    target = np.column_stack((np.arange(len(sizes)) * 1000, sizes)).astype(np.uint64)
    get = Get(500, 600, target, None if offset is None else np.array(offset, np.uint64))
    assert get.is_dense == is_dense
