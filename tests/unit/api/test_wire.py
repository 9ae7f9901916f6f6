"""What goes onto the wire comes off it again, and what cannot be right is refused with a typed error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xferd.api import errors, types as t, wire
from xferd.api.descriptors import DescriptorList, PreparedRef, Run
from xferd.api.errors import InvalidArgument, InvalidDescriptor, LimitExceeded, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
u32, u64 = st.integers(0, U32), st.integers(0, U64)
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
seconds = st.floats(0, 1e12)
kinds = st.sampled_from(t.MemoryKind)
accesses = st.sampled_from([t.Access.NONE, t.Access.READ, t.Access.WRITE, t.Access.READ_WRITE])
ids = st.builds(t.RegionId, u64)

pools = st.builds(
    t.PoolInfo, names, kinds, u64, u64, u64, u64, st.floats(0, 1), u64, u64, u64, st.booleans(), u64, names
)
limits = st.builds(t.Limits, u64, u64, u64, u64)
grants = st.builds(t.SessionGrant, names, names, names, names, u64, limits, names, st.lists(pools).map(tuple))
sessions = st.builds(
    t.SessionInfo, names, names, st.sampled_from(t.Transport), u32, u32, seconds, seconds, u64, u64, u64, u64
)
regions = st.builds(
    t.RegionInfo,
    id=ids,
    node=names,
    epoch=u64,
    kind=kinds,
    source=st.sampled_from(t.RegionSource),
    device=u32,
    nbytes=u64,
    agent=names,
    access=accesses,
    writable=st.booleans(),
    label=names,
    pool=names,
    pool_offset=u64,
    path=names,
)
hops = st.builds(t.Hop, names, names, names, names)
routes = st.lists(hops, max_size=3).map(tuple)
telemetries = st.builds(
    t.Telemetry, seconds, seconds, seconds, seconds, seconds, seconds, u64, u64, u64, u64, u64, u32, routes
)
nodes = st.builds(
    t.NodeInfo,
    name=names,
    id=names,
    epoch=u64,
    version=names,
    addresses=st.lists(names).map(tuple),
    backends=st.lists(names).map(tuple),
    kinds=st.lists(kinds).map(tuple),
    agents=st.lists(names).map(tuple),
    started_at=seconds,
)
notifications = st.builds(t.Notification, names, st.binary(), names, names, st.lists(ids, max_size=3).map(tuple))
statuses = st.builds(
    t.TransferStatus,
    id=names,
    key=names,
    op=st.sampled_from(t.TransferOp),
    state=st.sampled_from(t.TransferState),
    priority=st.sampled_from(t.Priority),
    cause_id=names,
    local_node=names,
    remote_node=names,
    agent=names,
    error=st.none(),
    telemetry=telemetries,
)

ROUND_TRIPS = {
    "limits": limits,
    "grant": grants,
    "session": sessions,
    "pool": pools,
    "region": regions,
    "listing": st.builds(t.RegionListing, names, u64, st.lists(regions, max_size=3).map(tuple)),
    "allocate": st.builds(t.AllocateRequest, st.lists(u64).map(tuple), names, accesses, names, st.booleans()),
    "register_private": st.builds(t.RegisterPrivateRequest, u64, u64, accesses, names, st.booleans()),
    "register_file": st.builds(t.RegisterFileRequest, names, u64, st.booleans(), st.booleans(), accesses, names),
    "register_object": st.builds(
        t.RegisterObjectRequest, names, names, u64, st.booleans(), st.booleans(), accesses, names
    ),
    "query_item": st.builds(t.QueryItem, names, names, names),
    "query_result": st.builds(t.QueryResult, st.booleans(), u64, seconds, names, st.none()),
    "object_query": st.builds(t.ObjectQuery, names, names, names, u32),
    "object_page": st.builds(
        t.ObjectPage, st.lists(st.builds(t.ObjectEntry, names, u64, seconds, names), max_size=3).map(tuple), names
    ),
    "register_device": st.builds(
        t.RegisterDeviceRequest, st.binary(), u64, st.binary(), u64, u64, accesses, names, st.booleans()
    ),
    "register_device_fd": st.builds(
        t.RegisterDeviceRequest, st.binary(), u64, st.just(b""), u64, u64, accesses, names, st.booleans()
    ),
    "device_handle": st.builds(t.DeviceHandle, st.binary(), st.binary(), u64, u64, names),
    "device": st.builds(t.DeviceInfo, u32, st.binary(), *[names] * 3, u64, u64, u32, *[u64] * 3, seconds, seconds),
    "device_event": st.builds(t.DeviceEvent, u64, st.binary()),
    "hand_over": st.builds(
        t.HandOverRequest, st.lists(ids).map(tuple), names, st.binary(), st.none() | accesses, names
    ),
    "region_query": st.builds(t.RegionQuery, names, names, names, st.lists(ids).map(tuple)),
    "prepared": st.builds(t.PreparedInfo, u64, names, u64, u64, u64),
    "notification": notifications,
    "telemetry": telemetries,
    "status": statuses,
    "estimate": st.builds(t.Estimate, seconds, seconds, names, routes),
    "explanation": st.builds(t.Explanation, routes, st.lists(names).map(tuple), u64, u64, u64),
    "node": nodes,
    "peer": st.builds(t.PeerInfo, nodes, st.sampled_from(t.PeerState), names, seconds, u32, u64, u64),
    "node_status": st.builds(
        t.NodeStatus,
        nodes,
        st.booleans(),
        st.booleans(),
        names,
        st.booleans(),
        *[u64] * 7,
        seconds,
    ),
    "backend": st.builds(t.BackendInfo, names, st.lists(names).map(tuple), u64, u64, u64, u32, u32),
    "route_cost": st.builds(t.RouteCost, *[names] * 4, u64, u64, seconds, seconds, u64, seconds, u32, seconds, names),
    "storage": st.builds(
        t.StorageInfo,
        names,
        names,
        st.booleans(),
        *[u64] * 11,
        u64,
        seconds,
        st.lists(
            st.builds(t.StorageDirectoryInfo, names, names, seconds, *[u64] * 6, names, st.booleans(), u64, u64, u64),
            max_size=2,
        ).map(tuple),
    ),
    "hold": st.builds(t.HoldInfo, names, names, names, names, seconds, seconds),
    "check": st.builds(t.Check, names, st.sampled_from(t.CheckState), names, names),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_records_survive_the_trip(name: str, data: st.DataObject) -> None:
    value = data.draw(ROUND_TRIPS[name])
    message = getattr(wire, f"{name}_to_message")(value)
    again = type(message).FromString(message.SerializeToString())
    assert getattr(wire, f"{name}_from_message")(again) == value


def test_every_converter_goes_both_ways() -> None:
    there = {name.removesuffix("_to_message") for name in wire.__all__ if name.endswith("_to_message")}
    back = {name.removesuffix("_from_message") for name in wire.__all__ if name.endswith("_from_message")}
    assert there - back == {"runs"}  # runs come back as columns
    assert not back - there
    assert there - set(ROUND_TRIPS) == {"list", "runs", "statuses", "transfer_request"}


def test_nobody_but_the_daemon_says_that_regions_were_handed_over() -> None:
    told = t.Notification("b", b"x", "a@n", "", (t.RegionId(7),))
    message = wire.notification_to_message(told)
    assert wire.notification_from_message(message) == told
    assert wire.notification_asked_for(message).regions == ()
    request = pb.SubmitRequest(op=pb.TRANSFER_OP_READ, notification=message)
    for side in (request.local, request.remote):
        side.columns.region = side.columns.offset = side.columns.nbytes = (8).to_bytes(8, "little")
    asked = wire.transfer_request_from_message(request, 10).notification
    assert asked is not None
    assert asked.regions == ()


# -- lists

rows = st.lists(st.tuples(u64, st.integers(0, 1 << 62), st.integers(1, 1 << 62)), min_size=1, max_size=50)


def _same(left: DescriptorList, right: DescriptorList) -> bool:
    return (left.node, left.epoch) == (right.node, right.epoch) and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in ("region", "offset", "nbytes")
    )


@given(rows, names, u64)
@settings(max_examples=50, deadline=None)
def test_lists_survive_the_trip(table: list[tuple[int, int, int]], node: str, epoch: int) -> None:
    spec = DescriptorList.from_rows(np.array(table, dtype="<u8"), node=node, epoch=epoch)
    raw = wire.list_to_message(spec).SerializeToString()
    again = wire.list_from_message(pb.DescriptorList.FromString(raw), len(spec))
    assert isinstance(again, DescriptorList)
    assert _same(again, spec)


def test_a_column_of_one_value_shrinks_on_the_wire() -> None:
    spec = DescriptorList.from_columns(5, np.arange(1000) * 64, 64)
    message = wire.list_to_message(spec)
    assert (len(message.columns.region), len(message.columns.offset), len(message.columns.nbytes)) == (8, 8000, 8)
    assert _same(wire.list_from_message(message, 1000), spec)


@given(st.lists(st.builds(Run, u32, u32, st.integers(1, U32), u32, st.integers(1, 5)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_runs_expand_to_the_rows_they_describe(runs: list[Run]) -> None:
    got = wire.list_from_message(wire.runs_to_message(runs, node="b", epoch=3), 25)
    expected = [(r.region, r.offset + i * r.stride, r.nbytes) for r in runs for i in range(r.count)]
    assert isinstance(got, DescriptorList)
    assert list(zip(got.region.tolist(), got.offset.tolist(), got.nbytes.tolist(), strict=True)) == expected
    assert (got.node, got.epoch) == ("b", 3)


@pytest.mark.parametrize("index", [None, [0], [5, 3, U32]])
def test_prepared_references_survive_the_trip(index: list[int] | None) -> None:
    spec = PreparedRef(t.PreparedHandle(9), None if index is None else np.array(index, dtype="<u4"))
    again = wire.list_from_message(wire.list_to_message(spec), 3)
    assert isinstance(again, PreparedRef)
    assert again.handle == 9
    assert (again.index is None) if index is None else again.index.tolist() == index


def test_an_empty_index_does_not_become_all_rows() -> None:
    with pytest.raises(InvalidDescriptor, match="index array is empty"):
        wire.list_to_message(PreparedRef(t.PreparedHandle(9), np.array([], dtype="<u4")))


def packed(*values: int) -> bytes:
    return np.array(values, dtype="<u8").tobytes()


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        (pb.DescriptorList(), InvalidDescriptor, "no form"),
        (pb.DescriptorList(columns=pb.Columns()), InvalidDescriptor, "no descriptors"),
        (pb.DescriptorList(strided=pb.Strided()), InvalidDescriptor, "no descriptors"),
        (
            pb.DescriptorList(columns=pb.Columns(region=packed(1), offset=b"1234567", nbytes=packed(1))),
            InvalidDescriptor,
            "7 bytes",
        ),
        (
            pb.DescriptorList(columns=pb.Columns(region=packed(1), offset=packed(1, 2, 3), nbytes=packed(1, 2))),
            InvalidDescriptor,
            "2 rows",
        ),
        (
            pb.DescriptorList(columns=pb.Columns(region=packed(1), offset=packed(0), nbytes=packed(0))),
            InvalidDescriptor,
            "nbytes 0",
        ),
        (
            pb.DescriptorList(columns=pb.Columns(region=packed(1), offset=packed(U64), nbytes=packed(1))),
            InvalidDescriptor,
            "wraps around",
        ),
        (
            pb.DescriptorList(
                columns=pb.Columns(region=packed(1), offset=packed(*range(11)), nbytes=packed(1)),
            ),
            LimitExceeded,
            "11 descriptors",
        ),
        (
            pb.DescriptorList(strided=pb.Strided(runs=[pb.Run(region=1, nbytes=1, stride=1, count=U64)])),
            LimitExceeded,
            "expands to",
        ),
        (
            pb.DescriptorList(strided=pb.Strided(runs=[pb.Run(region=1, offset=U64, nbytes=1, stride=1, count=1)])),
            InvalidDescriptor,
            "run 0 ends",
        ),
        (
            pb.DescriptorList(strided=pb.Strided(runs=[pb.Run(region=1)] * (wire.MAX_RUNS + 1))),
            LimitExceeded,
            "65537 runs",
        ),
        (pb.DescriptorList(prepared=pb.PreparedRef(handle=1, index=b"12345")), InvalidDescriptor, "5 bytes"),
        (pb.DescriptorList(prepared=pb.PreparedRef(handle=1, index=bytes(44))), LimitExceeded, "11 descriptors"),
    ],
)
def test_bad_lists_are_refused(message: pb.DescriptorList, error: type[XferdError], match: str) -> None:
    with pytest.raises(error, match=match) as info:
        wire.list_from_message(message, 10)
    assert info.value.limit
    assert info.value.remedy


def test_a_long_list_costs_no_loop() -> None:
    spec = DescriptorList.from_columns(np.arange(100_000) % 7, np.arange(100_000) * 4096, 4096)
    message = wire.list_to_message(spec)
    got = wire.list_from_message(message, 100_000)
    assert isinstance(got, DescriptorList)
    assert not got.offset.flags.owndata  # a view of the message's bytes, not a copy
    assert _same(got, spec)


# -- requests


def _request(**fields: object) -> t.TransferRequest:
    spec = DescriptorList.from_columns(1, [0], 8)
    return t.TransferRequest(**({"op": t.TransferOp.READ, "local": spec, "remote": spec} | fields))


def test_transfer_requests_survive_the_trip() -> None:
    request = _request(
        key="k",
        timeout_s=1.5,
        priority=t.Priority.HIGH,
        cause_id="c",
        notification=t.Notification("a@b", b"\0n"),
        backend="local",
        hold=True,
        verify=True,
        durable=True,
    )
    message = wire.transfer_request_to_message(request, wait_s=2)
    again = wire.transfer_request_from_message(message, 1)
    assert message.wait_s == 2
    assert _same(again.local, request.local)
    same = ("op", "key", "timeout_s", "priority", "cause_id", "notification", "backend", "hold", "verify", "durable")
    for name in same:
        assert getattr(again, name) == getattr(request, name)


def test_an_unset_priority_is_normal_and_no_notification_is_none() -> None:
    message = wire.transfer_request_to_message(_request())
    message.ClearField("priority")
    again = wire.transfer_request_from_message(message, 1)
    assert again.priority is t.Priority.NORMAL
    assert again.notification is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("op", pb.TRANSFER_OP_UNSPECIFIED),
        ("op", 77),
        ("priority", 77),
        ("timeout_s", -1.0),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
    ],
)
def test_bad_requests_are_refused(field: str, value: float) -> None:
    message = wire.transfer_request_to_message(_request())
    setattr(message, field, value)
    with pytest.raises(InvalidArgument) as info:
        wire.transfer_request_from_message(message, 1)
    assert info.value.limit
    assert info.value.remedy


@pytest.mark.parametrize(
    "convert",
    [
        wire.kind_from_wire,
        wire.source_from_wire,
        wire.access_from_wire,
        wire.op_from_wire,
        wire.state_from_wire,
        wire.priority_from_wire,
        wire.peer_state_from_wire,
    ],
)
def test_unknown_enumeration_values_are_refused(convert: object) -> None:
    with pytest.raises(InvalidArgument, match="77"):
        convert(77)


def test_every_enumeration_value_of_the_proto_file_is_known() -> None:
    tables = {
        "MemoryKind": wire.kind_from_wire,
        "RegionSource": wire.source_from_wire,
        "Access": wire.access_from_wire,
        "TransferOp": wire.op_from_wire,
        "TransferState": wire.state_from_wire,
        "Priority": wire.priority_from_wire,
        "PeerState": wire.peer_state_from_wire,
        "CheckState": wire.check_state_from_wire,
    }
    for name, descriptor in pb.DESCRIPTOR.enum_types_by_name.items():
        for value in descriptor.values:
            if not value.name.endswith("_UNSPECIFIED"):
                assert wire.enum_to_wire(tables[name](value.number)) == value.number


def test_a_newer_nodes_memory_kind_is_left_out() -> None:
    message = pb.Node(name="b")
    message.kinds.extend([77, pb.MEMORY_KIND_FILE])
    assert wire.node_from_message(message).kinds == (t.MemoryKind.FILE,)


@pytest.mark.parametrize("nbytes", [-1, 1 << 64, "many", 1.5])
def test_numbers_that_no_field_holds_are_the_callers_mistake(nbytes: object) -> None:
    with pytest.raises(InvalidArgument, match="AllocateRequest"):
        wire.allocate_to_message(t.AllocateRequest((nbytes,)))


def test_a_path_that_is_no_text_still_travels() -> None:
    broken = b"weights-\xff".decode("utf-8", "surrogateescape")
    assert wire.text(broken).encode() == b"weights-\\udcff"


# -- errors


@pytest.mark.parametrize("cls", errors.ERRORS_BY_CODE.values(), ids=lambda cls: cls.__name__)
def test_errors_survive_the_trip(cls: type[XferdError]) -> None:
    error = cls("the message", limit="a limit", remedy="a remedy", routes_tried=("local: busy", "tcp: lost"))
    detail = wire.error_to_detail(error)
    again = wire.error_from_detail(pb.ErrorDetail.FromString(detail.SerializeToString()))
    assert type(again) is cls
    assert str(again) == str(error)
    assert (again.retryable, detail.retryable) == (cls.retryable, cls.retryable)


def test_an_error_of_a_newer_daemon_is_a_root_error_with_its_code() -> None:
    again = wire.error_from_detail(pb.ErrorDetail(code="too_new", message="what happened"))
    assert type(again) is XferdError
    assert "too_new: what happened" in str(again)
