"""Every error reaches a client as the status of the table and as its detail; bad input never gets further."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from fake_engine import FakeEngine
from grpc_harness import Client, attached, column, columns, failure, serving

from xferd.api import errors, types as t, wire
from xferd.api.proto import xferd_v1_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xferd.api.grpc.server import GrpcFace

U64 = (1 << 64) - 1
MAX_MESSAGE_NBYTES = 4 << 20
Code = grpc.StatusCode


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def face(engine: FakeEngine) -> AsyncIterator[GrpcFace]:
    async with serving(engine, max_message_nbytes=MAX_MESSAGE_NBYTES, max_descriptors=1 << 17) as face:
        yield face
    assert engine.nothing_held()


@pytest.fixture
async def client(face: GrpcFace) -> AsyncIterator[Client]:
    async with attached(face, "tester") as client:
        yield client


# -- the table


@pytest.mark.parametrize("cls", errors.ERROR_TABLE, ids=lambda cls: cls.__name__)
async def test_an_error_arrives_with_its_status_and_detail(
    client: Client, engine: FakeEngine, cls: type[errors.XferdError]
) -> None:
    error = cls("the value 7", limit="at most 6", remedy="ask for less", routes_tried=("tcp: lost",))
    engine.fail_next("allocate", error)
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await client.allocate(4096)
    assert info.value.code().name == errors.ERROR_TABLE[cls].grpc
    assert info.value.details() == str(error)
    trailer = dict(info.value.trailing_metadata())
    again = wire.error_from_detail(pb.ErrorDetail.FromString(trailer["xferd-error-bin"]))
    assert str(again) == str(error)
    assert again.code == cls.code


async def test_a_bug_is_logged_and_says_nothing_of_itself(
    client: Client, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.fail_next("allocate", ZeroDivisionError("secret inside"))
    code, detail = await failure(client.memory.Allocate(pb.AllocateRequest(nbytes=[1]), metadata=client.auth))
    assert (code, detail.code) == (Code.INTERNAL, "internal")
    assert "secret" not in detail.message
    logged = capsys.readouterr().out
    assert "rpc.bug" in logged
    assert "ZeroDivisionError: secret inside" in logged
    await client.allocate(1)


async def test_a_subclass_takes_the_status_of_its_base(client: Client, engine: FakeEngine) -> None:
    class VerySpecial(errors.Stale):
        pass

    engine.fail_next("allocate", VerySpecial("old"))
    code, detail = await failure(client.memory.Allocate(pb.AllocateRequest(nbytes=[1]), metadata=client.auth))
    assert (code, detail.code) == (Code.FAILED_PRECONDITION, "stale")


@pytest.mark.parametrize("filler", ["x", "\N{SNOWMAN}"])
async def test_an_endless_error_is_cut_to_fit_into_a_trailer(client: Client, engine: FakeEngine, filler: str) -> None:
    routes = tuple(f"tcp: {filler * 90}" for _ in range(500))
    huge = errors.NoRoute(filler * 20_000, limit=filler * 9_000, remedy=filler * 9_000, routes_tried=routes)
    engine.fail_next("allocate", huge)
    code, detail = await failure(client.memory.Allocate(pb.AllocateRequest(nbytes=[1]), metadata=client.auth))
    assert (code, detail.code) == (Code.UNIMPLEMENTED, "no_route")
    assert detail.message.startswith(filler * 100)


async def test_an_error_in_the_middle_of_a_stream_arrives(client: Client, engine: FakeEngine) -> None:
    (region,) = await client.allocate(4096)
    read = client.memory.Read(pb.ReadRegionRequest(region=region, offset=4000, nbytes=97), metadata=client.auth)
    code, detail = await failure(read.read())
    assert (code, detail.code) == (Code.OUT_OF_RANGE, "out_of_bounds")
    assert "4096" in detail.limit

    async def parts() -> AsyncIterator[pb.WriteRegionRequest]:
        yield pb.WriteRegionRequest(region=region, offset=0, data=b"good")
        yield pb.WriteRegionRequest(region=region, offset=4095, data=b"bad")

    code, detail = await failure(client.memory.Write(parts(), metadata=client.auth))
    assert (code, detail.code) == (Code.OUT_OF_RANGE, "out_of_bounds")
    assert engine.data(region)[:4] == b"good"


def test_the_page_of_errors_is_in_step_with_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs/errors.md").read_text()
    rows = {
        match[1]: match[2]
        for match in re.finditer(r"^\| `(\w+)` \|.*?\| ([A-Z_]+ \| \d+ \| (?:yes|no)) \|$", page, re.MULTILINE)
    }
    assert rows == {
        cls.code: f"{status.grpc} | {status.http} | {'yes' if cls.retryable else 'no'}"
        for cls, status in errors.ERROR_TABLE.items()
        if cls is not errors.XferdError
    }


# -- who calls


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (("authorization", "Bearer wrong"),),
        (("authorization", "Bearer "),),
        (("authorization", "Basic abc"),),
        (("authorization", ""),),
        (("token", "abc"),),
    ],
)
async def test_every_call_but_open_needs_a_live_token(client: Client, engine: FakeEngine, metadata: object) -> None:
    engine.admin_token = "of an operator, who may do some of this without a session"
    calls = [
        client.sessions.Close(pb.CloseSessionRequest(), metadata=metadata),
        client.memory.Allocate(pb.AllocateRequest(nbytes=[1]), metadata=metadata),
        client.memory.RegisterPrivate(pb.RegisterPrivateRequest(), metadata=metadata),
        client.memory.RegisterFile(pb.RegisterFileRequest(), metadata=metadata),
        client.memory.Free(pb.FreeRequest(), metadata=metadata),
        client.memory.ListRegions(pb.ListRegionsRequest(), metadata=metadata),
        client.memory.ListPools(pb.ListPoolsRequest(), metadata=metadata),
        client.memory.Read(pb.ReadRegionRequest(), metadata=metadata).read(),
        client.memory.Write(iter([pb.WriteRegionRequest()]), metadata=metadata),
        client.transfers.Prepare(pb.PrepareRequest(), metadata=metadata),
        client.transfers.ReleasePrepared(pb.ReleasePreparedRequest(), metadata=metadata),
        client.transfers.Submit(pb.SubmitRequest(), metadata=metadata),
        client.transfers.Post(pb.PostRequest(), metadata=metadata),
        client.transfers.Poll(pb.PollRequest(), metadata=metadata),
        client.transfers.Wait(pb.WaitRequest(), metadata=metadata),
        client.transfers.Watch(pb.WatchRequest(), metadata=metadata).read(),
        client.transfers.Cancel(pb.CancelRequest(), metadata=metadata),
        client.transfers.Release(pb.ReleaseRequest(), metadata=metadata),
        client.transfers.Estimate(pb.SubmitRequest(), metadata=metadata),
        client.transfers.Explain(pb.SubmitRequest(), metadata=metadata),
        client.notifications.Send(pb.Notification(), metadata=metadata),
        client.notifications.Receive(pb.ReceiveRequest(), metadata=metadata),
        client.metadata.Export(pb.ExportRequest(), metadata=metadata),
        client.metadata.Import(pb.MetadataBlob(), metadata=metadata),
        client.metadata.Invalidate(pb.InvalidateRequest(), metadata=metadata),
    ]
    for call in calls:
        code, detail = await failure(call)
        assert (code, detail.code) == (Code.UNAUTHENTICATED, "unauthenticated")
        assert detail.remedy


async def test_a_second_session_of_an_agent_is_refused(client: Client, face: GrpcFace) -> None:
    async with grpc.aio.insecure_channel(f"unix:{face.socket_path}") as channel:
        stream = Client(channel).sessions.Open(pb.OpenSessionRequest(agent="tester"))
        code, detail = await failure(stream.read())
        assert (code, detail.code) == (Code.ALREADY_EXISTS, "already_exists")
    await client.allocate(1)


async def test_foreign_regions_are_refused(client: Client, face: GrpcFace) -> None:
    (mine,) = await client.allocate(4096)
    async with attached(face) as other:
        (theirs,) = await other.allocate(4096)
        code, detail = await failure(other.memory.Free(pb.FreeRequest(region=[theirs, mine]), metadata=other.auth))
        assert (code, detail.code) == (Code.PERMISSION_DENIED, "permission_denied")
        code, _ = await failure(other.submit(columns(theirs, [0], 64), columns(mine, [0], 64)))
        assert code is Code.PERMISSION_DENIED
        read = other.memory.Read(pb.ReadRegionRequest(region=mine, nbytes=1), metadata=other.auth)
        code, _ = await failure(read.read())
        assert code is Code.PERMISSION_DENIED
        listing = await other.memory.ListRegions(pb.ListRegionsRequest(), metadata=other.auth)
        assert [region.id for region in listing.regions] == [theirs]


# -- bad input


def _list(region: bytes, offset: bytes, nbytes: bytes) -> pb.DescriptorList:
    return pb.DescriptorList(columns=pb.Columns(region=region, offset=offset, nbytes=nbytes))


BAD_LISTS = {
    "misaligned": (lambda r: _list(column(r), b"12345", column(64)), Code.INVALID_ARGUMENT, "invalid_descriptor"),
    "unequal": (
        lambda r: _list(column(r, r), column(0, 1, 2), column(8)),
        Code.INVALID_ARGUMENT,
        "invalid_descriptor",
    ),
    "length 0": (lambda r: columns(r, [0, 64], 0), Code.INVALID_ARGUMENT, "invalid_descriptor"),
    "no rows": (lambda _: _list(b"", b"", b""), Code.INVALID_ARGUMENT, "invalid_descriptor"),
    "no form": (lambda _: pb.DescriptorList(), Code.INVALID_ARGUMENT, "invalid_descriptor"),
    "wrap-around": (lambda r: columns(r, [U64], 64), Code.INVALID_ARGUMENT, "invalid_descriptor"),
    "past the end": (lambda r: columns(r, [4096 - 63], 64), Code.OUT_OF_RANGE, "out_of_bounds"),
    "far past the end": (lambda r: columns(r, [U64 - 64], 64), Code.OUT_OF_RANGE, "out_of_bounds"),
    "unknown region": (lambda _: columns(12345, [0], 64), Code.NOT_FOUND, "not_found"),
    "unknown handle": (
        lambda _: pb.DescriptorList(prepared=pb.PreparedRef(handle=77)),
        Code.NOT_FOUND,
        "not_found",
    ),
    "misaligned index": (
        lambda _: pb.DescriptorList(prepared=pb.PreparedRef(handle=77, index=b"123")),
        Code.INVALID_ARGUMENT,
        "invalid_descriptor",
    ),
    "old epoch": (lambda r: columns(r, [0], 64, epoch=6), Code.FAILED_PRECONDITION, "stale"),
    "unknown node": (lambda r: columns(r, [0], 64, node="nowhere"), Code.NOT_FOUND, "peer_unknown"),
    "too many": (
        lambda r: _list(column(r), bytes(8 * ((1 << 17) + 1)), column(1)),
        Code.RESOURCE_EXHAUSTED,
        "limit_exceeded",
    ),
    "too many by runs": (
        lambda r: pb.DescriptorList(strided=pb.Strided(runs=[pb.Run(region=r, nbytes=1, count=U64)] * 3)),
        Code.RESOURCE_EXHAUSTED,
        "limit_exceeded",
    ),
    "run past 2**64": (
        lambda r: pb.DescriptorList(strided=pb.Strided(runs=[pb.Run(region=r, nbytes=1, stride=U64, count=3)])),
        Code.INVALID_ARGUMENT,
        "invalid_descriptor",
    ),
    "other total": (lambda r: columns(r, [0], 65), Code.INVALID_ARGUMENT, "size_mismatch"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
async def test_bad_lists_are_refused_and_nothing_is_left(client: Client, engine: FakeEngine, name: str) -> None:
    make, expected, kind = BAD_LISTS[name]
    good, other = await client.allocate(4096, 4096)
    for local, remote in ((columns(good, [0], 64), make(other)), (make(other), columns(good, [0], 64))):
        code, detail = await failure(client.submit(local, remote))
        assert (code, detail.code) == (expected, kind)
        assert detail.message
        assert detail.remedy
    assert not engine.transfers()
    if name != "other total":
        code, _ = await failure(client.transfers.Prepare(pb.PrepareRequest(list=make(other)), metadata=client.auth))
        if "handle" not in name:
            assert code is expected
    assert (await client.submit(columns(good, [0], 64), columns(other, [0], 64))).state == pb.TRANSFER_STATE_DONE


async def test_a_long_list_goes_through(client: Client) -> None:
    first, second = await client.allocate(1 << 20, 1 << 20)
    count = 100_000
    offsets = column(*range(0, count * 8, 8))
    local, remote = _list(column(first), offsets, column(8)), _list(column(second), offsets, column(8))
    status = await client.submit(local, remote, wait_s=30)
    assert (status.state, status.telemetry.descriptors) == (pb.TRANSFER_STATE_DONE, 2 * count)
    assert status.telemetry.pieces == 2


async def test_a_message_over_the_limit_is_refused_by_the_transport(client: Client) -> None:
    """The answer is gRPC's own: RESOURCE_EXHAUSTED that names both sizes, and no detail of ours."""
    (region,) = await client.allocate(16 << 20)
    data = bytes(MAX_MESSAGE_NBYTES)
    code, detail = await failure(
        client.memory.Write(iter([pb.WriteRegionRequest(region=region, data=data)]), metadata=client.auth)
    )
    assert (code, detail.code) == (Code.RESOURCE_EXHAUSTED, "")
    with pytest.raises(grpc.aio.AioRpcError, match=rf"larger than max \(\d+ vs\. {MAX_MESSAGE_NBYTES}\)"):
        await client.notifications.Send(pb.Notification(target="tester", payload=data), metadata=client.auth)
    await client.notifications.Send(pb.Notification(target="tester", payload=b"small"), metadata=client.auth)


@pytest.mark.parametrize(
    "fields",
    [
        {"op": pb.TRANSFER_OP_UNSPECIFIED},
        {"op": 9},
        {"priority": 9},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"wait_s": float("inf")},
        {"wait_s": -0.5},
    ],
    ids=str,
)
async def test_bad_fields_of_a_transfer_are_refused(
    client: Client, engine: FakeEngine, fields: dict[str, float]
) -> None:
    first, second = await client.allocate(4096, 4096)
    code, detail = await failure(client.submit(columns(first, [0], 8), columns(second, [0], 8), **fields))
    assert (code, detail.code) == (Code.INVALID_ARGUMENT, "invalid_argument")
    assert not engine.transfers()


async def test_unknown_ids_are_not_found(client: Client) -> None:
    transfers, memory = client.transfers, client.memory
    calls = [
        memory.Free(pb.FreeRequest(region=[99]), metadata=client.auth),
        memory.Read(pb.ReadRegionRequest(region=99, nbytes=1), metadata=client.auth).read(),
        memory.Write(iter([pb.WriteRegionRequest(region=99, data=b"x")]), metadata=client.auth),
        memory.Allocate(pb.AllocateRequest(pool="none", nbytes=[1]), metadata=client.auth),
        memory.RegisterFile(pb.RegisterFileRequest(path="none"), metadata=client.auth),
        memory.ListRegions(pb.ListRegionsRequest(node="none"), metadata=client.auth),
        transfers.ReleasePrepared(pb.ReleasePreparedRequest(handle=[99]), metadata=client.auth),
        transfers.Post(pb.PostRequest(id="none"), metadata=client.auth),
        transfers.Poll(pb.PollRequest(id=["none"]), metadata=client.auth),
        transfers.Wait(pb.WaitRequest(id=["none"]), metadata=client.auth),
        transfers.Watch(pb.WatchRequest(id=["none"]), metadata=client.auth).read(),
        transfers.Cancel(pb.CancelRequest(id=["none"]), metadata=client.auth),
        transfers.Release(pb.ReleaseRequest(id=["none"]), metadata=client.auth),
        client.notifications.Send(pb.Notification(target="none"), metadata=client.auth),
        client.notifications.Send(pb.Notification(target="tester@none"), metadata=client.auth),
        client.metadata.GetNode(pb.GetNodeRequest(name="none"), metadata=client.auth),
        client.metadata.Invalidate(pb.InvalidateRequest(name="none"), metadata=client.auth),
    ]
    for call in calls:
        code, detail = await failure(call)
        assert code is Code.NOT_FOUND
        assert detail.code in ("not_found", "agent_unknown", "peer_unknown")


async def test_pools_and_groups_have_limits(client: Client, engine: FakeEngine) -> None:
    allocate = client.memory.Allocate
    code, detail = await failure(allocate(pb.AllocateRequest(nbytes=[U64]), metadata=client.auth))
    assert (code, detail.code, detail.retryable) == (Code.RESOURCE_EXHAUSTED, "pool_exhausted", True)
    code, detail = await failure(allocate(pb.AllocateRequest(nbytes=[1] * 65537), metadata=client.auth))
    assert (code, detail.code) == (Code.RESOURCE_EXHAUSTED, "limit_exceeded")
    code, detail = await failure(allocate(pb.AllocateRequest(nbytes=[0]), metadata=client.auth))
    assert (code, detail.code) == (Code.INVALID_ARGUMENT, "invalid_argument")
    code, detail = await failure(allocate(pb.AllocateRequest(nbytes=[1], access=9), metadata=client.auth))
    assert (code, detail.code) == (Code.INVALID_ARGUMENT, "invalid_argument")
    assert engine.pools()[0].used_nbytes == 0


async def test_a_region_in_use_is_not_freed_and_a_key_means_one_request(client: Client, engine: FakeEngine) -> None:
    first, second = await client.allocate(4096, 4096)
    engine.paused = True
    local, remote = columns(first, [0], 8), columns(second, [0], 8)
    status = await client.submit(local, remote, key="k")
    assert (await client.submit(local, remote, key="k")).id == status.id
    code, detail = await failure(client.submit(local, remote, key="k", op=pb.TRANSFER_OP_WRITE))
    assert (code, detail.code) == (Code.ALREADY_EXISTS, "already_exists")
    code, detail = await failure(client.memory.Free(pb.FreeRequest(region=[first]), metadata=client.auth))
    assert (code, detail.code) == (Code.FAILED_PRECONDITION, "busy")
    assert status.id in detail.message
    await engine.finish(t.TransferId(status.id))
    await client.memory.Free(pb.FreeRequest(region=[first]), metadata=client.auth)
    code, detail = await failure(client.memory.Free(pb.FreeRequest(region=[first]), metadata=client.auth))
    assert (code, detail.code) == (Code.FAILED_PRECONDITION, "stale")


async def test_random_bytes_on_the_socket_disturb_nobody(client: Client, face: GrpcFace) -> None:
    reader, writer = await asyncio.open_unix_connection(face.socket_path)
    writer.write(bytes(range(256)) * 64)
    with contextlib.suppress(ConnectionResetError):  # the server hangs up, at times before it has read all
        await reader.read()
    writer.close()
    await client.allocate(1)


async def test_a_message_that_is_no_protobuf_is_refused(client: Client) -> None:
    call = client.channel.unary_unary("/xferd.v1.MemoryService/Allocate")
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call(b"\xff\xff\xff", metadata=client.auth)
    assert info.value.code() is Code.UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await client.channel.unary_unary("/xferd.v1.MemoryService/Nothing")(b"")
    assert info.value.code() is Code.UNIMPLEMENTED
    await client.allocate(1)
