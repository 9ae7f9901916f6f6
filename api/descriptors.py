"""Descriptor lists as columns, and their arithmetic: parse, expand, check, select, coalesce, pair, cut.

Everything here is numpy over whole columns; there is no Python loop over descriptors. Nothing here knows what a
region is or where it lives: bounds come in as columns too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xferd.api.errors import InvalidDescriptor, LimitExceeded, OutOfBounds, SizeMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import PreparedHandle

Column: TypeAlias = NDArray[np.uint64]
IndexColumn: TypeAlias = NDArray[np.uint32]

U64 = np.dtype("<u8")
U32 = np.dtype("<u4")

MAX_TOTAL_NBYTES = (1 << 63) - 1
"""Bytes of one transfer: cumulative sums stay within u64, and byte counts within the i64 of other languages."""

MAX_CHUNKS = 1 << 20
"""Chunks of one transfer: 8 TiB of 8 MiB each. A list may name the same bytes a million times over, so that a small
message could otherwise ask for more chunks than fit into memory."""


@dataclass(frozen=True, slots=True, eq=False)
class DescriptorList:
    """Columns of (region, offset, nbytes), all on one node.

    Attributes:
        region: u64, shape (n,).
        offset: u64, shape (n,), in bytes from the start of the region.
        nbytes: u64, shape (n,).
        node: where the regions are; "" is the node that is asked.
        epoch: of that node, as the regions' record gave it; 0 is not checked.

    The arrays belong to the list and must not be written to afterwards.
    """

    region: Column
    offset: Column
    nbytes: Column
    node: str = ""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.region)

    @classmethod
    def from_columns(
        cls, region: object, offset: object, nbytes: object, *, node: str = "", epoch: int = 0
    ) -> DescriptorList:
        """Build a list from array-likes; a scalar or single value in ``region`` or ``nbytes`` stands for all rows.

        Raises:
            InvalidDescriptor: columns of unequal length, negative or fractional numbers, no rows.
        """
        offsets = _as_column("offset", offset)
        count = len(offsets)
        return cls(
            _broadcast("region", _as_column("region", region), count),
            offsets,
            _broadcast("nbytes", _as_column("nbytes", nbytes), count),
            node,
            epoch,
        ).validated()

    @classmethod
    def from_packed(
        cls, region: bytes, offset: bytes, nbytes: bytes, *, node: str = "", epoch: int = 0
    ) -> DescriptorList:
        """Build a list from packed little-endian u64 columns, as they stand on the wire, without copying them.

        Raises:
            InvalidDescriptor: a column whose size is no multiple of 8, columns of unequal length, no rows.
        """
        offsets = parse_column("offset", offset)
        count = len(offsets)
        return cls(
            _broadcast("region", parse_column("region", region), count),
            offsets,
            _broadcast("nbytes", parse_column("nbytes", nbytes), count),
            node,
            epoch,
        ).validated()

    @classmethod
    def from_rows(cls, rows: object, *, node: str = "", epoch: int = 0) -> DescriptorList:
        """Build a list from an array-like of shape (n, 3): (region, offset, nbytes)."""
        table = _as_array("rows", rows)
        if table.ndim != 2 or table.shape[1] != 3:
            raise InvalidDescriptor(
                f"rows have shape {table.shape}", limit="(n, 3)", remedy="give (region, offset, nbytes) a row"
            )
        return cls.from_columns(table[:, 0], table[:, 1], table[:, 2], node=node, epoch=epoch)

    @classmethod
    def from_runs(
        cls, runs: Sequence[Run], *, node: str = "", epoch: int = 0, max_descriptors: int = 1 << 32
    ) -> DescriptorList:
        """Expand strided runs into columns.

        Raises:
            LimitExceeded: the runs expand to more than ``max_descriptors`` rows (checked before expanding).
            InvalidDescriptor: no runs, a run of no rows, a negative number, or an end past 2**64 - 1.
        """
        if len(runs) > max_descriptors:
            raise LimitExceeded(
                f"the strided list has {len(runs)} runs",
                limit=f"{max_descriptors} descriptors",
                remedy="split the list, or raise limits.max_descriptors",
            )
        total = sum(run.count for run in runs)
        if total > max_descriptors:
            raise LimitExceeded(
                f"the strided list expands to {total} descriptors",
                limit=f"{max_descriptors} descriptors",
                remedy="split the list, or raise limits.max_descriptors",
            )
        for number, run in enumerate(runs):
            if min(run.region, run.offset, run.nbytes, run.stride, run.count - 1) < 0 or run.region >= 1 << 64:
                raise InvalidDescriptor(
                    f"run {number} is {run}", limit="numbers of u64, count at least 1", remedy="leave empty runs out"
                )
            last = run.offset + run.stride * (run.count - 1) + run.nbytes
            if last >= 1 << 64:
                raise InvalidDescriptor(
                    f"run {number} ends at byte {last}", limit="2**64 - 1", remedy="check stride and count"
                )
        counts = np.array([run.count for run in runs], dtype=np.int64)
        # A run of one row never takes a step: its stride may be any number, also one that is no u64.
        table = np.array(
            [(run.region, run.offset, run.nbytes, run.stride if run.count > 1 else 0) for run in runs], dtype=U64
        ).reshape(-1, 4)
        rows = np.repeat(table, counts, axis=0)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        step = (np.arange(total, dtype=np.int64) - starts).astype(U64)
        return cls(
            np.ascontiguousarray(rows[:, 0]),
            rows[:, 1] + step * rows[:, 3],
            np.ascontiguousarray(rows[:, 2]),
            node,
            epoch,
        ).validated()

    def validated(self) -> DescriptorList:
        """Return self after checking that there are rows, none is empty, and no end passes 2**64 - 1."""
        if not len(self):
            raise InvalidDescriptor("the list has no descriptors", limit="at least 1", remedy="leave the transfer out")
        if not self.nbytes.all():
            row = int(np.argmin(self.nbytes != 0))
            raise InvalidDescriptor(
                f"descriptor {row} has nbytes 0", limit="at least 1 byte", remedy="drop empty descriptors"
            )
        over = self.nbytes > np.uint64(0xFFFF_FFFF_FFFF_FFFF) - self.offset
        if over.any():
            row = int(np.argmax(over))
            raise InvalidDescriptor(
                f"descriptor {row} (offset {int(self.offset[row])}, nbytes {int(self.nbytes[row])}) wraps around",
                limit="offset + nbytes <= 2**64 - 1",
                remedy="check the arithmetic that made the offset",
            )
        return self

    @property
    def total_nbytes(self) -> int:
        """Sum of all rows, exact also where it passes 2**64."""
        return exact_sum(self.nbytes)

    def select(self, index: IndexColumn | None) -> DescriptorList:
        """Return the rows that ``index`` names, in its order; None returns self.

        Raises:
            OutOfBounds: an index past the last row.
            InvalidDescriptor: an empty index.
        """
        if index is None:
            return self
        if not len(index):
            raise InvalidDescriptor("the index array is empty", limit="at least 1", remedy="leave the transfer out")
        top = int(index.max())
        if top >= len(self):
            raise OutOfBounds(
                f"index {top} in a prepared list of {len(self)} descriptors",
                limit=f"0 to {len(self) - 1}",
                remedy="index rows of the prepared list, from 0",
            )
        return DescriptorList(self.region[index], self.offset[index], self.nbytes[index], self.node, self.epoch)


@dataclass(frozen=True, slots=True)
class Run:
    """Equal spans: row i is (region, offset + i * stride, nbytes) for i < count."""

    region: int
    offset: int
    nbytes: int
    stride: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRef:
    """Rows of a list that was checked before; ``index`` None takes all rows."""

    handle: PreparedHandle
    index: IndexColumn | None = None


ListSpec: TypeAlias = DescriptorList | PreparedRef


def parse_column(name: str, raw: bytes) -> Column:
    """View packed little-endian u64 bytes as an array; no copy.

    Raises:
        InvalidDescriptor: the size is no multiple of 8.
    """
    if len(raw) % 8:
        raise InvalidDescriptor(
            f"column {name} has {len(raw)} bytes", limit="a multiple of 8", remedy="pack little-endian u64"
        )
    return np.frombuffer(raw, dtype=U64)


def parse_index(raw: bytes) -> IndexColumn:
    """View packed little-endian u32 bytes as an index array; no copy."""
    if len(raw) % 4:
        raise InvalidDescriptor(
            f"the index has {len(raw)} bytes", limit="a multiple of 4", remedy="pack little-endian u32"
        )
    return np.frombuffer(raw, dtype=U32)


class HasTotal(Protocol):
    """Anything that knows the exact sum of its rows."""

    @property
    def total_nbytes(self) -> int:
        """Sum of all rows, exact also where it passes 2**64."""


def check_total(local: HasTotal, remote: HasTotal) -> int:
    """Return the total bytes that both lists share.

    Raises:
        SizeMismatch: they differ.
        LimitExceeded: more than 2**63 - 1, past which the sums below would wrap around. Sparse files get there.
    """
    local_nbytes, remote_nbytes = local.total_nbytes, remote.total_nbytes
    if local_nbytes != remote_nbytes:
        raise SizeMismatch(
            f"the local list has {local_nbytes} bytes and the remote list {remote_nbytes}",
            limit="equal totals",
            remedy="the pairs may differ in shape, the totals may not",
        )
    if local_nbytes > MAX_TOTAL_NBYTES:
        raise LimitExceeded(
            f"the lists have {local_nbytes} bytes", limit=f"{MAX_TOTAL_NBYTES} bytes", remedy="split the transfer"
        )
    return local_nbytes


def coalesce(region: Column, offset: Column, nbytes: Column) -> tuple[Column, Column, Column]:
    """Merge each row into its predecessor where it continues it; order and bytes stay the same.

    ``region`` may be any key within which offsets are comparable. Returns the inputs where nothing merges.
    """
    if len(offset) < 2:
        return region, offset, nbytes
    new = (offset[1:] != offset[:-1] + nbytes[:-1]) | (region[1:] != region[:-1])
    if new.all():
        return region, offset, nbytes
    starts = np.concatenate(([0], np.flatnonzero(new) + 1))
    return region[starts], offset[starts], np.add.reduceat(nbytes, starts)


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """Two lists cut at each other's borders.

    Segment i is ``nbytes[i]`` bytes from row ``left[i]`` plus ``left_skip[i]`` on one side, and from row ``right[i]``
    plus ``right_skip[i]`` on the other.
    """

    left: NDArray[np.int64]
    left_skip: Column
    right: NDArray[np.int64]
    right_skip: Column
    nbytes: Column


def pair(left_nbytes: Column, right_nbytes: Column) -> Pairing:
    """Cut two lists of equal total into segments that lie within one row on each side.

    At most ``len(left) + len(right) - 1`` segments come out; their order is the order of both lists.
    """
    left_ends, right_ends = np.cumsum(left_nbytes), np.cumsum(right_nbytes)
    # Two ascending runs, which a stable sort only merges; np.union1d would hash and sort them, at ten times the price.
    both = np.sort(np.concatenate((left_ends, right_ends)), kind="stable")
    ends = both[np.append(True, both[1:] != both[:-1])]
    starts = np.concatenate((np.zeros(1, dtype=U64), ends[:-1]))
    left = np.searchsorted(left_ends, starts, side="right")
    right = np.searchsorted(right_ends, starts, side="right")
    return Pairing(
        left,
        starts - (left_ends - left_nbytes)[left],
        right,
        starts - (right_ends - right_nbytes)[right],
        ends - starts,
    )


def cut_points(left_nbytes: Column, right_nbytes: Column, *, chunk_nbytes: int, max_pieces: int) -> list[int]:
    """Return byte positions 0 = p0 < p1 < ... < pn = total that cut a transfer into chunks.

    Each chunk has at most ``chunk_nbytes`` bytes and touches at most ``max_pieces`` rows of either list. Totals are
    equal (``check_total``).

    Raises:
        LimitExceeded: more than ``MAX_CHUNKS`` chunks.
    """
    total = exact_sum(left_nbytes)
    if total <= chunk_nbytes and max(len(left_nbytes), len(right_nbytes)) <= max_pieces:
        return [0, total]
    left_ends, right_ends = np.cumsum(left_nbytes), np.cumsum(right_nbytes)
    if total // chunk_nbytes >= MAX_CHUNKS:
        raise LimitExceeded(
            f"{total} bytes in chunks of {chunk_nbytes}",
            limit=f"{MAX_CHUNKS} chunks a transfer",
            remedy="split the transfer, or raise transfers.chunk",
        )
    marks = np.concatenate(
        (
            left_ends[max_pieces - 1 :: max_pieces],
            right_ends[max_pieces - 1 :: max_pieces],
            np.arange(chunk_nbytes, total, chunk_nbytes, dtype=U64),
            np.array([0, total], dtype=U64),
        )
    )
    return [int(mark) for mark in np.unique(marks)]


def _as_array(name: str, values: object) -> NDArray[Any]:
    try:
        array = np.asarray(values)
        if array.dtype.kind == "f" and not isinstance(values, np.ndarray | np.generic):
            # numpy makes floats of an empty list, and of whole numbers of which some pass int64 and some do not.
            array = np.asarray(values, dtype=object)
    except ValueError as exc:
        raise InvalidDescriptor(f"column {name} is ragged", limit="one number a row", remedy="give equal rows") from exc
    return array


def _as_column(name: str, values: object) -> Column:
    array = np.atleast_1d(_as_array(name, values))
    if array.ndim != 1:
        raise InvalidDescriptor(f"column {name} has {array.ndim} dimensions", limit="1", remedy="flatten it")
    if array.dtype == U64:
        return np.ascontiguousarray(array)
    if array.dtype == object:  # numbers past int64 arrive as objects
        if not all(isinstance(value, int | np.integer) and 0 <= int(value) < 1 << 64 for value in array):
            raise InvalidDescriptor(
                f"column {name} has a value outside u64", limit="whole, 0 to 2**64 - 1", remedy="give whole bytes"
            )
        return array.astype(U64)
    if array.dtype.kind not in "iu":
        raise InvalidDescriptor(
            f"column {name} has dtype {array.dtype}", limit="unsigned integers", remedy="give whole bytes"
        )
    if array.dtype.kind == "i" and len(array) and int(array.min()) < 0:
        raise InvalidDescriptor(
            f"column {name} has the value {int(array.min())}",
            limit="0 to 2**64 - 1",
            remedy="give whole bytes",
        )
    return array.astype(U64)


def _broadcast(name: str, column: Column, count: int) -> Column:
    if len(column) == count:
        return column
    if len(column) == 1:
        return np.full(count, column[0], dtype=U64)
    raise InvalidDescriptor(
        f"column {name} has {len(column)} rows and column offset {count}",
        limit="equal lengths, or one value for all",
        remedy="give every column the same length",
    )


def exact_sum(nbytes: Column) -> int:
    """Return the sum of a column, exact also where it passes 2**64."""
    if len(nbytes) == 1:
        return int(nbytes[0])
    if len(nbytes) and int(nbytes.max()) * len(nbytes) < 1 << 64:
        return int(nbytes.sum())
    low, high = nbytes & np.uint64(0xFFFF_FFFF), nbytes >> np.uint64(32)
    return int(low.sum()) + (int(high.sum()) << 32)
