"""From rows to gets: which ranges of an object to ask for, and where the bytes of each go. Pure; all column work."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import coalesce, pair
from xferd.api.errors import InvalidArgument
from xferd.plugins.base import Extent, MappedSpace, ObjectSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xferd.plugins.base import IovTable


@dataclass(frozen=True, slots=True, eq=False)
class Get:
    """One range [start, stop) of an object, and the spans of it that are wanted.

    Attributes:
        target: where each span goes.
        offset: where each span begins, counted from ``start``; None where they are all of the range, in order.
    """

    start: int
    stop: int
    target: IovTable
    offset: NDArray[np.uint64] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether its spans are all of the range, one after the other."""
        if self.offset is None:
            return True
        ends = self.target[:, 1].cumsum()  # no span reaches over the range: as many bytes from another start would
        return bool((self.offset[1:] == ends[:-1]).all()) and int(ends[-1]) == self.stop - self.start

    def tables(self, address: int) -> tuple[IovTable, IovTable]:
        """Return where to copy from and to, with the range's bytes at ``address``."""
        if self.offset is None:  # one row: what copies then looks at half as many
            return np.array([[address, self.stop - self.start]], dtype=np.uint64), self.target
        return np.column_stack((self.offset + np.uint64(address), self.target[:, 1])), self.target


def plan_gets(source: IovTable, target: IovTable, *, merge_gap: int, max_nbytes: int) -> list[Get]:
    """Return gets, in order of position, that together bring ``source``'s rows to ``target``'s, both in list order.

    Rows that touch, overlap, or lie no further apart than ``merge_gap`` become one get, and none is larger than
    ``max_nbytes``; rows are split at the borders.
    """
    if len(source) == 1:
        return _gets_of_span(int(source[0, 0]), target, max_nbytes)
    cuts = pair(source[:, 1], target[:, 1])
    begin = source[cuts.left, 0] + cuts.left_skip
    place = target[cuts.right, 0] + cuts.right_skip
    order = np.argsort(begin, kind="stable")
    begin, place, nbytes = begin[order], place[order], cuts.nbytes[order]
    end = begin + nbytes
    starts, stops = _ranges(begin, end, merge_gap, max_nbytes)
    first = np.searchsorted(starts, begin, side="right") - 1
    last = np.searchsorted(starts, end - np.uint64(1), side="right") - 1
    counts = last - first + 1
    row = np.repeat(np.arange(len(begin)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    get = first[row] + nth
    piece_begin = np.maximum(begin[row], starts[get])
    piece_end = np.minimum(end[row], stops[get])
    by_get = np.argsort(get, kind="stable")
    borders = np.searchsorted(get[by_get], np.arange(len(starts) + 1))
    offset = (piece_begin - starts[get])[by_get]
    where = np.column_stack((place[row] + (piece_begin - begin[row]), piece_end - piece_begin))[by_get]
    return [
        Get(int(starts[n]), int(stops[n]), where[a:b], offset[a:b])
        for n, (a, b) in enumerate(itertools.pairwise(borders.tolist()))
        if a < b  # a range cut out of a gap that was merged over has nothing that is wanted
    ]


def by_object(source: Extent, target: IovTable) -> list[tuple[int, IovTable, IovTable]]:
    """Split a read of several objects: the number of each, its spans, and where these go, both in list order."""
    assert source.region is not None
    edges = [0, *(np.flatnonzero(source.region[1:] != source.region[:-1]) + 1).tolist(), len(source.region)]
    numbers = source.region[edges[:-1]].tolist()
    if len(set(numbers)) == len(numbers):  # the rows of each follow each other: the common case, and far quicker
        ends = source.iov[:, 1].cumsum()[np.array(edges[1:]) - 1].tolist()
        memory = Extent(MappedSpace(), target).indexed()
        places = [memory.cut(start, stop).iov for start, stop in itertools.pairwise([0, *ends])]
        spans = [source.iov[first:last] for first, last in itertools.pairwise(edges)]
        return list(zip(numbers, spans, places, strict=True))
    cuts = pair(source.iov[:, 1], target[:, 1])
    number = source.region[cuts.left]
    order = np.argsort(number, kind="stable")
    spans_of_all = np.column_stack((source.iov[cuts.left, 0] + cuts.left_skip, cuts.nbytes))[order]
    places_of_all = np.column_stack((target[cuts.right, 0] + cuts.right_skip, cuts.nbytes))[order]
    found, first_rows = np.unique(number[order], return_index=True)
    borders = itertools.pairwise([*first_rows.tolist(), len(order)])
    return [(n, spans_of_all[a:b], places_of_all[a:b]) for n, (a, b) in zip(found.tolist(), borders, strict=True)]


def in_object_order(source: Extent, target: Extent) -> tuple[Extent, Extent]:
    """Return both sides in the order of the target object's bytes, of which they must be all.

    Raises:
        InvalidArgument: the target's rows are not the whole object, each byte once.
    """
    assert isinstance(target.space, ObjectSpace)
    if len(target.iov) == 1:
        _check_whole(target.space, target.iov)
        return source, target
    cuts = pair(source.iov[:, 1], target.iov[:, 1])
    begin = target.iov[cuts.right, 0] + cuts.right_skip
    order = np.argsort(begin, kind="stable")
    left, nbytes = cuts.left[order], cuts.nbytes[order]
    position = (source.iov[cuts.left, 0] + cuts.left_skip)[order]
    _check_whole(target.space, np.column_stack((begin[order], nbytes)))
    key = np.zeros(len(left), np.uint64) if source.region is None else source.region[left]
    region, position, sizes = coalesce(key, position, nbytes)
    iov = np.column_stack((position, sizes))
    whole = np.array([[0, target.space.nbytes]], dtype=np.uint64)
    return Extent(source.space, iov, None if source.region is None else region), Extent(target.space, whole)


def covers(gets: list[Get], nbytes: int) -> bool:
    """Whether gets ask for every byte of an object of so many bytes, with no gap between them."""
    position = 0
    for get in gets:
        if get.start != position:
            return False
        position = get.stop
    return position == nbytes


def _gets_of_span(start: int, target: IovTable, max_nbytes: int) -> list[Get]:
    """Return gets of one span of an object, which are in order as they stand: the common case, and far quicker."""
    total = int(target[:, 1].sum())
    if total <= max_nbytes:
        return [Get(start, start + total, target)]
    memory = Extent(MappedSpace(), target).indexed()
    ends = [*range(max_nbytes, total, max_nbytes), total]
    return [Get(start + at, start + stop, memory.cut(at, stop).iov) for at, stop in itertools.pairwise([0, *ends])]


def _ranges(
    begin: NDArray[np.uint64], end: NDArray[np.uint64], merge_gap: int, max_nbytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Merge spans sorted by their beginning, then cut what is too large."""
    reach = np.maximum.accumulate(end)
    is_new = np.ones(len(begin), dtype=np.bool_)
    is_new[1:] = begin[1:] > reach[:-1] + np.uint64(merge_gap)
    heads = np.flatnonzero(is_new)
    low = begin[heads]
    high = reach[np.append(heads[1:], len(begin)) - 1]
    counts = ((high - low + np.uint64(max_nbytes - 1)) // np.uint64(max_nbytes)).astype(np.intp)
    span = np.repeat(np.arange(len(low)), counts)
    nth = (np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64)
    starts = low[span] + nth * np.uint64(max_nbytes)
    return starts, np.minimum(starts + np.uint64(max_nbytes), high[span])


def _check_whole(space: ObjectSpace, rows: IovTable) -> None:
    end = rows[:, 0] + rows[:, 1]
    is_whole = int(rows[0, 0]) == 0 and bool((rows[1:, 0] == end[:-1]).all()) and int(end[-1]) == space.nbytes
    if not is_whole:
        raise InvalidArgument(
            f"object {space.key!r} of store {space.store!r} is written as a whole or not at all: the list has "
            f"{int(rows[:, 1].sum())} of its {space.nbytes} bytes in {len(rows)} spans",
            limit=f"every byte from 0 to {space.nbytes}, once, from one kind of memory, in one transfer",
            remedy="write all of it, register it with the size that is to be written, or use a file for parts",
        )
