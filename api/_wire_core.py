"""Wire form of what everything else is built from: enumerations, errors, descriptor lists.

Part of ``wire.py``, which is what others import. Protobuf's own errors (a number that does not fit its field, a
string that is no text) leave here as ``InvalidArgument``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

from xferd.api import types as t
from xferd.api.descriptors import U32, U64, DescriptorList, ListSpec, PreparedRef, Run, parse_index
from xferd.api.errors import InvalidArgument, InvalidDescriptor, LimitExceeded, XferdError, error_for_code
from xferd.api.proto import xferd_v1_pb2 as pb

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable, Mapping, Sequence

    from xferd.api.descriptors import Column, IndexColumn

M = TypeVar("M")
E = TypeVar("E", bound="enum.Enum")

MAX_RUNS = 65536
"""Runs in one strided list. Runs are messages and cost a loop each; a longer list belongs into columns."""


def build(message: Callable[..., M], **fields: object) -> M:
    """Make a message; a value that its field cannot hold is the caller's mistake.

    Raises:
        InvalidArgument: a negative or too large number, a wrong type, a string that is no UTF-8.
    """
    try:
        return message(**fields)
    except (ValueError, TypeError) as exc:
        name = getattr(message, "__name__", "message")
        raise InvalidArgument(
            f"{name} cannot hold a value: {exc}", limit="the field's type", remedy="check signs and sizes"
        ) from exc


def text(value: str) -> str:
    """Return the string as valid UTF-8: names from a file system may hold bytes that are no text."""
    return value.encode("utf-8", "backslashreplace").decode()


def check_seconds(name: str, value: float) -> float:
    """Return a duration off the wire.

    Raises:
        InvalidArgument: it is negative, infinite or not a number.
    """
    if not math.isfinite(value) or value < 0:
        raise InvalidArgument(
            f"{name} is {value}", limit="a finite number of seconds, at least 0", remedy="give seconds"
        )
    return value


# ------------------------------------------------------------------------------------------- enumerations

_KINDS: dict[int, t.MemoryKind] = {getattr(pb, f"MEMORY_KIND_{kind.name}"): kind for kind in t.MemoryKind}
_SOURCES: dict[int, t.RegionSource] = {getattr(pb, f"REGION_SOURCE_{item.name}"): item for item in t.RegionSource}
_ACCESSES: dict[int, t.Access] = {
    pb.ACCESS_NONE: t.Access.NONE,
    pb.ACCESS_READ: t.Access.READ,
    pb.ACCESS_WRITE: t.Access.WRITE,
    pb.ACCESS_READ_WRITE: t.Access.READ_WRITE,
}
_OPS: dict[int, t.TransferOp] = {getattr(pb, f"TRANSFER_OP_{op.name}"): op for op in t.TransferOp}
_STATES: dict[int, t.TransferState] = {getattr(pb, f"TRANSFER_STATE_{item.name}"): item for item in t.TransferState}
_PRIORITIES: dict[int, t.Priority] = {getattr(pb, f"PRIORITY_{item.name}"): item for item in t.Priority}
_PEER_STATES: dict[int, t.PeerState] = {getattr(pb, f"PEER_STATE_{item.name}"): item for item in t.PeerState}
_CHECK_STATES: dict[int, t.CheckState] = {getattr(pb, f"CHECK_STATE_{item.name}"): item for item in t.CheckState}

_NUMBERS: dict[enum.Enum, int] = {
    member: number
    for table in (_KINDS, _SOURCES, _ACCESSES, _OPS, _STATES, _PRIORITIES, _PEER_STATES, _CHECK_STATES)
    for number, member in table.items()
}


def enum_to_wire(member: enum.Enum) -> int:
    """Return the number that stands for a member of any of the contract's enumerations."""
    return _NUMBERS[member]


def kind_from_wire(number: int) -> t.MemoryKind:
    """Return the memory kind of this number, or raise ``InvalidArgument``."""
    return _member("memory kind", _KINDS, number)


def source_from_wire(number: int) -> t.RegionSource:
    """Return the region source of this number, or raise ``InvalidArgument``."""
    return _member("region source", _SOURCES, number)


def access_from_wire(number: int) -> t.Access:
    """Return the access of this number, or raise ``InvalidArgument``."""
    return _member("access", _ACCESSES, number)


def op_from_wire(number: int) -> t.TransferOp:
    """Return the operation of this number; unset has no default, or raise ``InvalidArgument``."""
    return _member("transfer op", _OPS, number)


def state_from_wire(number: int) -> t.TransferState:
    """Return the transfer state of this number, or raise ``InvalidArgument``."""
    return _member("transfer state", _STATES, number)


def priority_from_wire(number: int) -> t.Priority:
    """Return the priority of this number; unset is NORMAL, unknown raises ``InvalidArgument``."""
    return t.Priority.NORMAL if number == pb.PRIORITY_UNSPECIFIED else _member("priority", _PRIORITIES, number)


def peer_state_from_wire(number: int) -> t.PeerState:
    """Return the peer state of this number, or raise ``InvalidArgument``."""
    return _member("peer state", _PEER_STATES, number)


def check_state_from_wire(number: int) -> t.CheckState:
    """Return the check's state of this number, or raise ``InvalidArgument``."""
    return _member("check state", _CHECK_STATES, number)


def known_kinds(numbers: Sequence[int]) -> tuple[t.MemoryKind, ...]:
    """Return the kinds known here: a newer node may list more, which is no reason to refuse its record."""
    return tuple(_KINDS[number] for number in numbers if number in _KINDS)


def _member(name: str, table: Mapping[int, E], number: int) -> E:
    try:
        return table[number]
    except KeyError:
        known = ", ".join(f"{key} {member.name}" for key, member in table.items())
        raise InvalidArgument(
            f"{name} has the number {number}", limit=known, remedy="set the field to one of these"
        ) from None


# ------------------------------------------------------------------------------------------- errors


def error_to_detail(error: XferdError) -> pb.ErrorDetail:
    """Return the wire form of an error; ``__cause__`` stays at home."""
    return pb.ErrorDetail(
        code=error.code,
        message=text(error.message),
        limit=text(error.limit),
        remedy=text(error.remedy),
        retryable=error.retryable,
        routes_tried=[text(route) for route in error.routes_tried],
    )


def error_from_detail(detail: pb.ErrorDetail) -> XferdError:
    """Return an error to raise. A code that is not known here gives the root class, with the code in its message."""
    cls = error_for_code(detail.code)
    message = f"{detail.code}: {detail.message}" if cls is XferdError else detail.message
    return cls(message, limit=detail.limit, remedy=detail.remedy, routes_tried=tuple(detail.routes_tried))


# ------------------------------------------------------------------------------------------- descriptor lists


def list_to_message(spec: ListSpec) -> pb.DescriptorList:
    """Return the wire form of a list; a column with one value in all rows shrinks to that value.

    Raises:
        InvalidDescriptor: a prepared list with an empty index, which on the wire would mean all rows.
    """
    if isinstance(spec, DescriptorList):
        columns = pb.Columns(
            region=_pack_shared(spec.region), offset=_pack(spec.offset), nbytes=_pack_shared(spec.nbytes)
        )
        return build(pb.DescriptorList, node=spec.node, epoch=spec.epoch, columns=columns)
    if spec.index is not None and not len(spec.index):
        raise InvalidDescriptor("the index array is empty", limit="at least 1", remedy="leave the transfer out")
    index = b"" if spec.index is None else _pack_index(spec.index)
    return build(pb.DescriptorList, prepared=build(pb.PreparedRef, handle=spec.handle, index=index))


def runs_to_message(runs: Sequence[Run], *, node: str = "", epoch: int = 0) -> pb.DescriptorList:
    """Return the wire form of strided runs, which the other side expands.

    Raises:
        LimitExceeded: more than ``MAX_RUNS`` runs.
    """
    _check_runs(len(runs))
    messages = [
        build(pb.Run, region=r.region, offset=r.offset, nbytes=r.nbytes, stride=r.stride, count=r.count) for r in runs
    ]
    return build(pb.DescriptorList, node=node, epoch=epoch, strided=pb.Strided(runs=messages))


def list_from_message(message: pb.DescriptorList, max_descriptors: int) -> ListSpec:
    """Return the list of any of the three forms. Columns are not copied out of the message's bytes.

    Args:
        message: off the wire, trusted in nothing.
        max_descriptors: limit on rows, and on the length of an index; checked before anything is expanded.

    Raises:
        LimitExceeded: more rows than that, or more than ``MAX_RUNS`` runs.
        InvalidDescriptor: no form, misaligned or unequal columns, a row of length 0, an end past 2**64 - 1.
    """
    form = message.WhichOneof("form")
    if form == "columns":
        region, offset, nbytes = message.columns.region, message.columns.offset, message.columns.nbytes
        _check_rows(max(len(region), len(offset), len(nbytes)) // 8, max_descriptors)
        return DescriptorList.from_packed(region, offset, nbytes, node=message.node, epoch=message.epoch)
    if form == "strided":
        _check_runs(len(message.strided.runs))
        runs = [Run(r.region, r.offset, r.nbytes, r.stride, r.count) for r in message.strided.runs]
        return DescriptorList.from_runs(runs, node=message.node, epoch=message.epoch, max_descriptors=max_descriptors)
    if form == "prepared":
        index = message.prepared.index
        _check_rows(len(index) // 4, max_descriptors)
        return PreparedRef(t.PreparedHandle(message.prepared.handle), parse_index(index) if index else None)
    raise InvalidDescriptor(
        "a descriptor list has no form", limit="columns, strided or prepared", remedy="set one of the three"
    )


def _pack(column: Column) -> bytes:
    return column.astype(U64, copy=False).tobytes()


def _pack_shared(column: Column) -> bytes:
    return _pack(column[:1]) if len(column) > 1 and bool((column == column[0]).all()) else _pack(column)


def _pack_index(index: IndexColumn) -> bytes:
    return index.astype(U32, copy=False).tobytes()


def _check_rows(count: int, max_descriptors: int) -> None:
    if count > max_descriptors:
        raise LimitExceeded(
            f"the list has {count} descriptors",
            limit=f"{max_descriptors} descriptors",
            remedy="split the list, or raise limits.max_descriptors",
        )


def _check_runs(count: int) -> None:
    if count > MAX_RUNS:
        raise LimitExceeded(f"the strided list has {count} runs", limit=f"{MAX_RUNS} runs", remedy="send columns")
