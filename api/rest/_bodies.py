"""What comes in: models of request bodies and of query strings, and their way into the contract's types.

Models are frozen and refuse unknown fields. Numbers of 64 bits may be JSON integers or decimal strings. Columns
become numpy arrays without a Python loop over their numbers, as long as they are integers.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator

from xferd.api import types as t
from xferd.api.descriptors import U32, U64, DescriptorList, ListSpec, PreparedRef, Run
from xferd.api.errors import InvalidArgument, InvalidDescriptor, LimitExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_WAIT_S = 3600.0
"""Longest wait of one call: an hour; a client that waits longer asks again."""

MIN_TTL_S = 5.0
MAX_TTL_S = 86400.0


def _integer(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("not a whole number, nor a decimal string of one")
    if not 0 <= value < 1 << 64:
        raise ValueError("out of range 0 to 2**64 - 1")
    return value


def _array(dtype: np.dtype[Any]) -> Callable[[object, ValidationInfo], object]:
    """Return a validator that makes an array of a number, or of a list of numbers or of decimal strings."""
    top = int(np.iinfo(dtype).max)

    def validate(value: object, info: ValidationInfo) -> object:
        rows = value if isinstance(value, list) else [value]
        kinds = set(map(type, rows))
        if str in kinds and kinds <= {int, str}:
            rows, kinds = _parsed(rows, info.field_name), {int}
        if kinds - {int}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds - {int, str}))
            raise InvalidDescriptor(
                f"column {info.field_name} holds {found}", limit="whole numbers", remedy="give whole bytes"
            )
        if rows and (min(rows) < 0 or max(rows) > top):
            worst = min(rows) if min(rows) < 0 else max(rows)
            raise InvalidDescriptor(
                f"column {info.field_name} has the value {worst if worst.bit_length() < 256 else 'of many digits'}",
                limit=f"0 to {top}",
                remedy="give whole bytes",
            )
        return np.array(rows, dtype=dtype)

    return validate


def _parsed(rows: list[Any], column: str | None) -> list[int]:
    try:
        return [_integer(row) for row in rows]
    except ValueError as exc:
        raise InvalidDescriptor(
            f"column {column}: {exc}", limit="0 to 2**64 - 1", remedy="give integers or decimal strings"
        ) from exc


def _payload(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("not a base64 string")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"not base64: {exc}") from exc


_DECIMAL = {"type": "string", "pattern": "^[0-9]{1,20}$"}
_WHOLE = {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1}
_INTEGER = {"anyOf": [_WHOLE, _DECIMAL]}
_COLUMN = {"anyOf": [_WHOLE, _DECIMAL, {"type": "array", "items": _INTEGER}]}
_INDEX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}}

Integer = Annotated[int, PlainValidator(_integer), WithJsonSchema(_INTEGER)]
Column = Annotated[Any, PlainValidator(_array(U64)), WithJsonSchema(_COLUMN)]
Index = Annotated[Any, PlainValidator(_array(U32)), WithJsonSchema(_INDEX)]
Payload = Annotated[bytes, PlainValidator(_payload), WithJsonSchema({"type": "string", "contentEncoding": "base64"})]
WaitS = Annotated[float, Field(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)]
TtlS = Annotated[float, Field(ge=MIN_TTL_S, le=MAX_TTL_S, allow_inf_nan=False)]
AccessName = Literal["NONE", "READ", "WRITE", "READ_WRITE"]


class Body(BaseModel):
    """A JSON body: exact types, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Query(BaseModel):
    """A query string: all values arrive as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ------------------------------------------------------------------------------------------- descriptor lists


class ColumnsBody(Body):
    """Columns of equal length; one value in `region` or `nbytes` stands for all rows."""

    region: Column
    offset: Column
    nbytes: Column


class RunBody(Body):
    """Equal spans: row i is (region, offset + i * stride, nbytes) for i < count."""

    region: Integer
    offset: Integer
    nbytes: Integer
    stride: Integer
    count: Integer


class DescriptorsBody(Body):
    """A descriptor list in exactly one of three forms: `columns`, `runs`, or `prepared` with an optional `index`."""

    node: str = ""
    epoch: Integer = 0
    columns: ColumnsBody | None = None
    runs: tuple[RunBody, ...] | None = None
    prepared: Integer | None = None
    index: Index | None = None

    @model_validator(mode="after")
    def _one_form(self) -> DescriptorsBody:
        given = [name for name in ("columns", "runs", "prepared") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of columns, runs, prepared; got {', '.join(given) or 'none'}")
        if self.index is not None and self.prepared is None:
            raise ValueError("index picks rows of a prepared list; give prepared with it")
        return self

    def to_list(self, max_descriptors: int) -> DescriptorList:
        """Return the list itself.

        Raises:
            InvalidArgument: it is a prepared one.
            LimitExceeded: more rows than ``max_descriptors``, checked before runs are expanded.
            InvalidDescriptor: as ``DescriptorList`` says.
        """
        spec = self.to_spec(max_descriptors)
        if isinstance(spec, PreparedRef):
            raise InvalidArgument("the list is prepared already", limit="columns or runs", remedy="use its handle")
        return spec

    def to_spec(self, max_descriptors: int) -> ListSpec:
        """Return what a transfer takes; raises as ``to_list`` does."""
        if self.prepared is not None:
            return PreparedRef(t.PreparedHandle(self.prepared), self.index)
        if self.runs is not None:
            runs = [Run(run.region, run.offset, run.nbytes, run.stride, run.count) for run in self.runs]
            return DescriptorList.from_runs(runs, node=self.node, epoch=self.epoch, max_descriptors=max_descriptors)
        assert self.columns is not None
        rows = len(self.columns.offset)
        if rows > max_descriptors:
            raise LimitExceeded(
                f"a list of {rows} descriptors",
                limit=f"{max_descriptors} descriptors",
                remedy="split the list, or raise limits.max_descriptors",
            )
        return DescriptorList.from_columns(
            self.columns.region, self.columns.offset, self.columns.nbytes, node=self.node, epoch=self.epoch
        )


# ------------------------------------------------------------------------------------------- sessions, memory


class SessionBody(Body):
    """A session to open. It ends when no call carried its token for `ttl_s` seconds; none takes the daemon's value."""

    agent: str = Field(default="", max_length=128)
    ttl_s: TtlS | None = None


class AllocateBody(Body):
    """A group of regions from one pool, all or none, one for each size in `nbytes`."""

    kind: Literal["allocate"]
    nbytes: tuple[Integer, ...]
    pool: str = ""
    access: AccessName = "NONE"
    label: str = ""
    persistent: bool = False

    def to_request(self) -> t.AllocateRequest:
        """Return the request of the contract."""
        return t.AllocateRequest(self.nbytes, self.pool, t.Access[self.access], self.label, self.persistent)


class FileBody(Body):
    """A file under a configured root; `nbytes` 0 takes its present size."""

    kind: Literal["file"]
    path: str
    nbytes: Integer = 0
    writable: bool = False
    create: bool = False
    access: AccessName = "NONE"
    label: str = ""

    def to_request(self) -> t.RegisterFileRequest:
        """Return the request of the contract."""
        return t.RegisterFileRequest(
            self.path, self.nbytes, self.writable, self.create, t.Access[self.access], self.label
        )


class PrivateBody(Body):
    """Memory of the calling process; `unsupported` for a session that was opened over HTTP, which knows no process."""

    kind: Literal["private"]
    address: Integer
    nbytes: Integer
    writable: bool = True
    access: AccessName = "NONE"
    label: str = ""

    def to_request(self) -> t.RegisterPrivateRequest:
        """Return the request of the contract."""
        return t.RegisterPrivateRequest(self.address, self.nbytes, t.Access[self.access], self.label, self.writable)


class ObjectBody(Body):
    """An object of a configured store; `nbytes` 0 takes its present size, `create` needs `writable` and a size."""

    kind: Literal["object"]
    store: str
    key: str
    nbytes: Integer = 0
    writable: bool = False
    create: bool = False
    access: AccessName = "NONE"
    label: str = ""

    def to_request(self) -> t.RegisterObjectRequest:
        """Return the request of the contract."""
        return t.RegisterObjectRequest(
            self.store, self.key, self.nbytes, self.writable, self.create, t.Access[self.access], self.label
        )


class DeviceBody(Body):
    """GPU memory that a process exported by an IPC handle; `nbytes` 0 reaches up to the allocation's end."""

    kind: Literal["device"]
    device_uuid: Payload
    handle: Payload
    allocation_nbytes: Integer
    offset: Integer = 0
    nbytes: Integer = 0
    writable: bool = True
    access: AccessName = "NONE"
    label: str = ""

    def to_request(self) -> t.RegisterDeviceRequest:
        """Return the request of the contract."""
        return t.RegisterDeviceRequest(
            self.device_uuid,
            self.allocation_nbytes,
            self.handle,
            self.offset,
            self.nbytes,
            t.Access[self.access],
            self.label,
            self.writable,
        )


RegionBody = Annotated[AllocateBody | FileBody | PrivateBody | ObjectBody | DeviceBody, Field(discriminator="kind")]


class EventBody(Body):
    """The IPC handle of an event of the caller's; without one, an event is made."""

    handle: Payload = b""


class ItemBody(Body):
    """A file by `path`, or an object by `store` and `key`."""

    path: str = ""
    store: str = ""
    key: str = ""


class QueryBody(Body):
    """Files and objects to look at."""

    items: tuple[ItemBody, ...]

    def to_items(self) -> tuple[t.QueryItem, ...]:
        """Return the items of the contract."""
        return tuple(t.QueryItem(item.path, item.store, item.key) for item in self.items)


class KeysBody(Body):
    """Objects of a store, by key."""

    keys: tuple[str, ...]


class ObjectsQuery(Query):
    """Which objects of a store to list, and where to go on."""

    prefix: str = ""
    after: str = ""
    limit: Annotated[int, Field(ge=0, le=1000)] = 0


class HandOverBody(Body):
    """Regions for another agent of this node; `access` is what others may do from now on, by default as before."""

    regions: tuple[Integer, ...]
    to: str
    payload: Payload = b""
    access: AccessName | None = None
    cause_id: str = ""

    def to_request(self) -> t.HandOverRequest:
        """Return the request of the contract."""
        access = None if self.access is None else t.Access[self.access]
        return t.HandOverRequest(region_ids(self.regions), self.to, self.payload, access, self.cause_id)


class FilterQuery(Query):
    """Filters of a region listing; what is left out does not filter."""

    agent: str = ""
    label: str = ""


class RegionsQuery(FilterQuery):
    """Filters of a region listing, and the node to ask."""

    node: str = ""


class SpanQuery(Query):
    """A span of a region; without `nbytes`, to its end."""

    offset: Integer = 0
    nbytes: Integer | None = None


class OffsetQuery(Query):
    """Where the body's first byte goes."""

    offset: Integer = 0


# ------------------------------------------------------------------------------------------- transfers


class NotificationBody(Body):
    """Bytes (base64) for an agent, `agent@node` or `agent` on this node."""

    target: str
    payload: Payload = b""

    def to_notification(self) -> t.Notification:
        """Return the value of the contract."""
        return t.Notification(self.target, self.payload)


class TransferBody(Body):
    """What to move. READ pulls `remote` into `local`, WRITE pushes `local` into `remote`; totals must be equal."""

    op: t.TransferOp
    local: DescriptorsBody
    remote: DescriptorsBody
    key: str = ""
    timeout_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    priority: t.Priority = t.Priority.NORMAL
    cause_id: str = ""
    notification: NotificationBody | None = None
    backend: str = ""
    verify: bool = False
    durable: bool = False
    wait_event: Integer = 0
    done_event: Integer = 0

    def to_request(self, max_descriptors: int, *, hold: bool = False) -> t.TransferRequest:
        """Return the request of the contract; raises as ``DescriptorsBody.to_spec`` does."""
        return t.TransferRequest(
            op=self.op,
            local=self.local.to_spec(max_descriptors),
            remote=self.remote.to_spec(max_descriptors),
            key=self.key,
            timeout_s=self.timeout_s,
            priority=self.priority,
            cause_id=self.cause_id,
            notification=self.notification.to_notification() if self.notification else None,
            backend=self.backend,
            verify=self.verify,
            durable=self.durable,
            wait_event=self.wait_event,
            done_event=self.done_event,
            hold=hold,
        )


class SubmitBody(TransferBody):
    """A transfer to make; with `hold` it waits for its post, with `wait_s` the answer waits for its end."""

    hold: bool = False
    wait_s: WaitS = 0.0


class PostBody(Body):
    """How long the answer may wait for the transfer's end."""

    wait_s: WaitS = 0.0


class WaitBody(Body):
    """How long to wait; a transfer that has not ended by then is answered as it is."""

    timeout_s: WaitS = 30.0


class TransfersQuery(Query):
    """Filters of a transfer listing."""

    active: bool = False
    agent: str = ""


class ReceiveQuery(Query):
    """How many notifications to take, and how many seconds to wait for the first."""

    limit: int = Field(default=100, ge=1, le=10000)
    timeout: WaitS = 0.0


# ------------------------------------------------------------------------------------------- node


class EventsQuery(Query):
    """Which peer (none: all), and when the stream ends: after `count` events or `timeout` seconds; 0 is never."""

    name: str = ""
    count: int = Field(default=0, ge=0)
    timeout: WaitS = 0.0


class FetchQuery(Query):
    """Whose label it is, and how many seconds to wait for it to appear."""

    node: str = Field(min_length=1)
    timeout: WaitS = 0.0


class ExportBody(Body):
    """Which regions go into the blob; none given: all shared ones."""

    regions: tuple[Integer, ...] | None = None


class DrainBody(Body):
    """How long to wait for what runs."""

    timeout_s: WaitS = 30.0


class LogLevelBody(Body):
    """A level of the log."""

    level: Literal["debug", "info", "warning", "error"]


def region_ids(values: Sequence[int]) -> tuple[t.RegionId, ...]:
    """Return numbers as region ids."""
    return tuple(t.RegionId(value) for value in values)
