"""The gRPC face does what the proto file says, over a real socket and an engine in memory."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from fake_engine import FakeEngine
from grpc_harness import Client, attached, column, columns, failure, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from xferd.api.errors import Closed, ConfigError, PoolExhausted
from xferd.api.grpc.server import GrpcFace, check_listen
from xferd.api.proto import xferd_v1_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def face(engine: FakeEngine) -> AsyncIterator[GrpcFace]:
    async with serving(engine) as face:
        yield face
    assert engine.nothing_held()


@pytest.fixture
async def client(face: GrpcFace) -> AsyncIterator[Client]:
    async with attached(face, "tester") as client:
        yield client


async def until_empty(engine: FakeEngine) -> None:
    """Return when the engine has no session any more."""
    async with asyncio.timeout(10):
        while live := engine.sessions():
            await engine.wait_session_end(live[0].session)


# -- sessions


async def test_open_grants_what_the_engine_gave(client: Client, engine: FakeEngine) -> None:
    assert (client.grant.agent, client.grant.node, client.grant.epoch) == ("tester", "node-a", 7)
    assert client.grant.limits.max_descriptors == 1 << 20
    assert [pool.name for pool in client.grant.pools] == ["host"]
    assert engine.sessions()[0].transport.value == "grpc"


async def test_session_ends_with_its_stream(face: GrpcFace, engine: FakeEngine) -> None:
    async with attached(face) as client:
        await client.allocate(4096, 8192)
        client.stream.cancel()
        await until_empty(engine)
    assert engine.nothing_held()


async def test_session_ends_when_the_connection_breaks(face: GrpcFace, engine: FakeEngine) -> None:
    async with attached(face) as client:
        await client.allocate(4096)
        await client.channel.close()
        await until_empty(engine)
    assert engine.nothing_held()


async def test_a_client_that_goes_while_its_session_opens_leaves_nothing(face: GrpcFace, engine: FakeEngine) -> None:
    engine.gate("open_session")
    async with grpc.aio.insecure_channel(f"unix:{face.socket_path}") as channel:
        stream = Client(channel).sessions.Open(pb.OpenSessionRequest())
        await engine.called("open_session")
        stream.cancel()
        await engine.was_cancelled("open_session")
    assert engine.nothing_held()


async def test_a_closed_face_does_not_start_again(engine: FakeEngine) -> None:
    async with serving(engine) as face:
        await face.start()
        await face.aclose()
        with pytest.raises(Closed):
            await face.start()


async def test_stream_says_why_the_daemon_ends_the_session(client: Client, engine: FakeEngine) -> None:
    await engine.end_session(client.grant.session_id, "shutting down")
    assert (await client.stream.read()).closing == "shutting down"
    assert await client.stream.read() == grpc.aio.EOF


async def test_close_ends_the_session_and_its_token(client: Client) -> None:
    await client.sessions.Close(pb.CloseSessionRequest(), metadata=client.auth)
    assert "closed by the client" in (await client.stream.read()).closing
    code, detail = await failure(client.memory.ListRegions(pb.ListRegionsRequest(), metadata=client.auth))
    assert (code, detail.code) == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")


async def test_closing_the_face_ends_sessions(engine: FakeEngine) -> None:
    async with serving(engine) as face, attached(face) as client:
        await client.allocate(4096)
        await face.aclose(grace_s=5)
        assert "stopping" in (await client.stream.read()).closing
        await face.aclose()
        assert engine.nothing_held()
        with pytest.raises(FileNotFoundError):
            os.stat(face.socket_path)  # noqa: PTH116


# -- memory


async def test_bytes_go_in_and_come_out_by_streams(client: Client, engine: FakeEngine) -> None:
    (region,) = await client.allocate(5 << 20)
    data = bytes(range(256)) * (3 << 12)
    half = len(data) // 2

    async def parts() -> AsyncIterator[pb.WriteRegionRequest]:
        yield pb.WriteRegionRequest(region=region, offset=100, data=data[:half])
        yield pb.WriteRegionRequest(region=region, offset=100 + half, data=data[half:])

    written = await client.memory.Write(parts(), metadata=client.auth)
    assert written.nbytes == len(data)
    read = client.memory.Read(pb.ReadRegionRequest(region=region, offset=100, nbytes=len(data)), metadata=client.auth)
    chunks = [message.data async for message in read]
    assert b"".join(chunks) == data
    assert len(chunks) == 3
    assert max(len(chunk) for chunk in chunks) == 1 << 20


async def test_free_and_list(client: Client) -> None:
    first, second = await client.allocate(4096, 4096)
    await client.memory.Free(pb.FreeRequest(region=[first]), metadata=client.auth)
    listing = await client.memory.ListRegions(pb.ListRegionsRequest(), metadata=client.auth)
    assert [region.id for region in listing.regions] == [second]


async def test_files_register_and_private_memory_needs_the_socket(client: Client, engine: FakeEngine) -> None:
    engine.files["weights"] = bytearray(b"w" * 100)
    region = await client.memory.RegisterFile(pb.RegisterFileRequest(path="weights"), metadata=client.auth)
    assert (region.nbytes, region.kind, region.path) == (100, pb.MEMORY_KIND_FILE, "weights")
    code, detail = await failure(
        client.memory.RegisterPrivate(pb.RegisterPrivateRequest(address=4096, nbytes=10), metadata=client.auth)
    )
    assert (code, detail.code) == (grpc.StatusCode.UNIMPLEMENTED, "unsupported")


# -- transfers


async def test_strided_columns_and_prepared_lists_move_bytes(client: Client, engine: FakeEngine) -> None:
    source, target = await client.allocate(4096, 4096)
    engine.data(source)[:] = bytes(index % 251 for index in range(4096))
    strided = pb.DescriptorList(
        strided=pb.Strided(runs=[pb.Run(region=source, offset=0, nbytes=16, stride=64, count=8)])
    )
    status = await client.submit(columns(target, [0, 64], 64), strided, wait_s=5)
    assert status.state == pb.TRANSFER_STATE_DONE
    expected = b"".join(engine.data(source)[at : at + 16] for at in range(0, 512, 64))
    assert engine.data(target)[:128] == expected

    prepared = await client.transfers.Prepare(pb.PrepareRequest(list=strided), metadata=client.auth)
    assert (prepared.count, prepared.total_nbytes) == (8, 128)
    rows = pb.DescriptorList(
        prepared=pb.PreparedRef(handle=prepared.handle, index=(7).to_bytes(4, "little") + (0).to_bytes(4, "little"))
    )
    await client.submit(columns(target, [1024], 32), rows)
    assert engine.data(target)[1024:1056] == engine.data(source)[448:464] + engine.data(source)[:16]
    await client.transfers.ReleasePrepared(pb.ReleasePreparedRequest(handle=[prepared.handle]), metadata=client.auth)
    code, _ = await failure(client.submit(columns(target, [1024], 32), rows))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_hold_post_poll_wait_cancel_release(client: Client, engine: FakeEngine) -> None:
    first, second = await client.allocate(4096, 4096)
    status = await client.submit(columns(first, [0], 64), columns(second, [0], 64), hold=True, key="k")
    assert status.state == pb.TRANSFER_STATE_PREPARED
    engine.paused = True
    posted = await client.transfers.Post(pb.PostRequest(id=status.id), metadata=client.auth)
    assert (posted.state, posted.telemetry.posts) == (pb.TRANSFER_STATE_POSTED, 1)
    waited = await client.transfers.Wait(pb.WaitRequest(id=[status.id], timeout_s=0), metadata=client.auth)
    assert waited.transfers[0].state == pb.TRANSFER_STATE_POSTED
    code, detail = await failure(client.transfers.Post(pb.PostRequest(id=status.id), metadata=client.auth))
    assert (code, detail.code) == (grpc.StatusCode.FAILED_PRECONDITION, "invalid_state")
    cancelled = await client.transfers.Cancel(pb.CancelRequest(id=[status.id]), metadata=client.auth)
    assert cancelled.transfers[0].state == pb.TRANSFER_STATE_CANCELLED
    polled = await client.transfers.Poll(pb.PollRequest(id=[status.id]), metadata=client.auth)
    assert list(polled.transfers) == list(cancelled.transfers)
    await client.transfers.Release(pb.ReleaseRequest(id=[status.id]), metadata=client.auth)
    code, _ = await failure(client.transfers.Poll(pb.PollRequest(id=[status.id]), metadata=client.auth))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_submit_waits_when_asked_to(client: Client, engine: FakeEngine) -> None:
    first, second = await client.allocate(4096, 4096)
    engine.paused = True
    local, remote = columns(first, [0], 64), columns(second, [0], 64)
    held = await client.submit(local, remote, hold=True)
    waiting = asyncio.ensure_future(client.transfers.Post(pb.PostRequest(id=held.id, wait_s=30), metadata=client.auth))
    await engine.called("wait")
    await engine.finish(held.id, PoolExhausted("no room", limit="4096 bytes", remedy="free some"))
    status = await waiting
    assert status.state == pb.TRANSFER_STATE_FAILED
    assert (status.error.code, status.error.limit, status.error.retryable) == ("pool_exhausted", "4096 bytes", True)


async def test_watch_streams_what_ended_and_what_ends(client: Client, engine: FakeEngine) -> None:
    first, second = await client.allocate(4096, 4096)
    local, remote = columns(first, [0], 64), columns(second, [0], 64)
    before = await client.submit(local, remote)
    stream = client.transfers.Watch(pb.WatchRequest(), metadata=client.auth)
    assert (await stream.read()).id == before.id
    after = await client.submit(local, remote)
    assert (await stream.read()).id == after.id
    stream.cancel()
    await engine.was_cancelled("watch")


async def test_estimate_and_explain(client: Client) -> None:
    first, second = await client.allocate(4096, 4096)
    request = pb.SubmitRequest(
        op=pb.TRANSFER_OP_WRITE, local=columns(first, [0, 64], 64), remote=columns(second, [0], 128)
    )
    explained = await client.transfers.Explain(request, metadata=client.auth)
    assert (explained.total_nbytes, explained.pieces, explained.route[0].backend) == (128, 2, "local")
    assert (await client.transfers.Estimate(request, metadata=client.auth)).basis == "assumed"


async def test_a_cancelled_call_cancels_the_engines_call(client: Client, engine: FakeEngine) -> None:
    engine.gate("allocate")
    call = client.memory.Allocate(pb.AllocateRequest(nbytes=[4096]), metadata=client.auth)
    await engine.called("allocate")
    call.cancel()
    await engine.was_cancelled("allocate")
    assert engine.pools()[0].used_nbytes == 0


async def test_a_deadline_of_the_client_cancels_the_engines_call(client: Client, engine: FakeEngine) -> None:
    engine.gate("allocate")
    code, _ = await failure(
        client.memory.Allocate(pb.AllocateRequest(nbytes=[4096]), metadata=client.auth, timeout=0.05)
    )
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await engine.was_cancelled("allocate")


# -- notifications, metadata, admin


async def test_notifications_carry_any_bytes(client: Client, face: GrpcFace) -> None:
    async with attached(face, "other") as other:
        payload = b"\0\xff\0"
        waiting = asyncio.ensure_future(
            other.notifications.Receive(pb.ReceiveRequest(timeout_s=10), metadata=other.auth)
        )
        await client.notifications.Send(
            pb.Notification(target="other@node-a", payload=payload, source="liar"), metadata=client.auth
        )
        (got,) = (await waiting).notifications
        assert (got.payload, got.source) == (payload, "tester@node-a")
        empty = await other.notifications.Receive(pb.ReceiveRequest(), metadata=other.auth)
        assert not empty.notifications


async def test_metadata_goes_out_as_a_blob_and_comes_in(client: Client) -> None:
    await client.allocate(4096, access=pb.ACCESS_READ)
    blob = await client.metadata.Export(pb.ExportRequest(), metadata=client.auth)
    imported = await client.metadata.Import(blob, metadata=client.auth)
    assert (imported.node.name, imported.regions) == ("node-a", 1)
    await client.metadata.Invalidate(pb.InvalidateRequest(name="node-a"), metadata=client.auth)
    code, _ = await failure(client.metadata.Import(pb.MetadataBlob(data=b"rubbish"), metadata=client.auth))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    nothing = await client.metadata.Export(pb.ExportRequest(partial=True), metadata=client.auth)
    assert b'"regions": []' in nothing.data
    assert (await client.metadata.GetNode(pb.GetNodeRequest(), metadata=client.auth)).agents == ["tester"]
    assert not (await client.metadata.ListPeers(pb.ListPeersRequest(), metadata=client.auth)).peers
    code, detail = await failure(client.metadata.GetNode(pb.GetNodeRequest(name="nowhere"), metadata=client.auth))
    assert (code, detail.code) == (grpc.StatusCode.NOT_FOUND, "peer_unknown")


async def test_admin_lists_and_acts(client: Client, engine: FakeEngine) -> None:
    await client.allocate(4096)
    admin = client.admin
    assert (await admin.Status(pb.StatusRequest())).sessions == 1
    assert "[node]" in (await admin.GetConfig(pb.GetConfigRequest())).toml
    assert (await admin.ListPools(pb.ListPoolsRequest())).pools[0].used_nbytes == 4096
    (session,) = (await admin.ListSessions(pb.ListSessionsRequest())).sessions
    assert (session.agent, session.transport, session.regions) == ("tester", "grpc", 1)
    assert (await admin.ListBackends(pb.ListBackendsRequest())).backends[0].name == "local"
    assert not (await admin.ListTransfers(pb.ListTransfersRequest())).transfers
    assert len((await admin.ListHolds(pb.ListHoldsRequest())).holds) == 1
    assert (await admin.SetLogLevel(pb.SetLogLevelRequest(level="debug"))).previous == "info"
    drained = await admin.Drain(pb.DrainRequest(timeout_s=1))
    assert (drained.drained, drained.transfers_left) == (True, 0)
    code, detail = await failure(client.memory.Allocate(pb.AllocateRequest(nbytes=[1]), metadata=client.auth))
    assert (code, detail.code, detail.retryable) == (grpc.StatusCode.UNAVAILABLE, "unavailable", True)
    await admin.Drain(pb.DrainRequest(undo=True))
    code, _ = await failure(admin.EndSession(pb.EndSessionRequest(id="s-none")))
    assert code is grpc.StatusCode.NOT_FOUND
    await admin.EndSession(pb.EndSessionRequest(id=session.id))
    assert "operator" in (await client.stream.read()).closing


@pytest.mark.parametrize(
    ("configured", "sent", "welcome"),
    [
        ("", "", True),
        ("", "expired", False),  # a session that ended never turns into an operator
        ("sesame", "", False),
        ("sesame", "wrong", False),
        ("sesame", "sesame", True),
    ],
)
async def test_operators_read_nodes_and_peers_without_a_session(configured: str, sent: str, welcome: bool) -> None:
    async with (
        serving(FakeEngine(admin_token=configured)) as face,
        grpc.aio.insecure_channel(f"unix:{face.socket_path}") as channel,
    ):
        stub = Client(channel).metadata
        metadata = (("authorization", f"Bearer {sent}"),) if sent else None
        for call in (
            stub.GetNode(pb.GetNodeRequest(), metadata=metadata),
            stub.ListPeers(pb.ListPeersRequest(), metadata=metadata),
        ):
            if welcome:
                await call
                continue
            code, _ = await failure(call)
            assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_admin_token_is_asked_for() -> None:
    engine = FakeEngine(admin_token="sesame")
    async with serving(engine) as face, attached(face) as client:
        code, _ = await failure(client.admin.Status(pb.StatusRequest(), metadata=client.auth))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "bearer sesame"),)
        assert (await client.admin.Status(pb.StatusRequest(), metadata=metadata)).sessions == 1


# -- health and reflection


async def test_health_follows_set_serving(face: GrpcFace, client: Client) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    answer = health_pb2.HealthCheckResponse
    for service in ("", "xferd.v1.TransferService"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == answer.NOT_SERVING
        await face.set_serving(True)
        assert (await stub.Check(request)).status == answer.SERVING
        await face.set_serving(False)


async def test_reflection_lists_every_service(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
        services = {service.full_name for service in pb.DESCRIPTOR.services_by_name.values()}
        assert names == services | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


# -- sockets


async def test_socket_mode_and_stale_socket(engine: FakeEngine) -> None:
    async with serving(engine) as face:
        assert stat.S_IMODE(os.stat(face.socket_path).st_mode) == 0o660  # noqa: PTH116
        second = GrpcFace(engine, socket_path=face.socket_path)
        with pytest.raises(ConfigError, match="served by another process"):
            await second.start()
        async with attached(face) as client:
            await client.allocate(1)


async def test_a_dead_daemons_socket_is_taken_over(engine: FakeEngine) -> None:
    with tempfile.TemporaryDirectory(prefix="xf") as folder:
        path = Path(folder) / "g.sock"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with GrpcFace(engine, socket_path=str(path)) as face, attached(face) as client:
            await client.allocate(1)


async def test_a_path_that_cannot_be_a_socket_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        await GrpcFace(engine, socket_path="/tmp/" + "x" * 110).start()
    with pytest.raises(ConfigError, match="cannot listen"):
        await GrpcFace(engine, socket_path="/tmp/no-such-folder-of-xferd/g.sock").start()


async def test_tcp_asks_for_the_token_to_open_a_session(engine: FakeEngine) -> None:
    async with serving(engine, listen="127.0.0.1:0", admin_token="sesame") as face:
        target = f"127.0.0.1:{face.port}"
        async with grpc.aio.insecure_channel(target) as channel:
            client = Client(channel)
            code, detail = await failure(client.sessions.Open(pb.OpenSessionRequest()).read())
            assert (code, detail.code) == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
            stream = client.sessions.Open(pb.OpenSessionRequest(), metadata=(("authorization", "Bearer sesame"),))
            client.grant = (await stream.read()).opened
            await client.allocate(4096)
            stream.cancel()
        async with attached(face) as local:
            await local.allocate(4096)
        await until_empty(engine)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.1.2.3:1", "example.org:1", "::1:1:1:1:2:1"])
def test_a_listener_for_others_needs_authentication(listen: str) -> None:
    with pytest.raises(ConfigError, match="without authentication"):
        check_listen(listen, authenticated=False)
    check_listen(listen, authenticated=True)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.1:80", "[::1]:65535", "localhost:1"])
def test_loopback_needs_none(listen: str) -> None:
    check_listen(listen, authenticated=False)


@pytest.mark.parametrize("listen", ["", "127.0.0.1", ":80", "127.0.0.1:65536", "127.0.0.1:http", "127.0.0.1:-1"])
def test_a_malformed_listener_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        check_listen(listen, authenticated=True)


async def test_a_taken_port_is_named(engine: FakeEngine) -> None:
    async with serving(engine, listen="127.0.0.1:0") as face:
        with pytest.raises(ConfigError, match=str(face.port)):
            async with serving(FakeEngine(), listen=f"127.0.0.1:{face.port}"):
                pass


def test_column_helper_is_the_wire_form() -> None:
    assert column(1, 1 << 63) == b"\1" + bytes(7) + bytes(7) + b"\x80"
