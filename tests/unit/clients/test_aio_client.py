"""The async client: what it does beyond the blocking one is to wait, to be cancelled, and to map in time."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from xferd.api import types as t
from xferd.api.errors import (
    AlreadyExists,
    Cancelled,
    Closed,
    DeadlineExceeded,
    MoveFailed,
    NotFound,
    OutOfBounds,
    PermissionDenied,
    ShortTransfer,
    SizeMismatch,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from xferd.clients import AsyncClient, TransferState


@pytest.fixture
async def client(daemon):
    async with AsyncClient.connect(daemon.path, "me") as client:
        yield client


async def test_connecting_gives_a_name_and_closing_gives_it_back(daemon):
    client = await AsyncClient.connect(daemon.path, "trainer")
    assert client.address == "trainer@node-a"
    with pytest.raises(AlreadyExists):
        await AsyncClient.connect(daemon.path, "trainer")
    [session] = await client.admin.sessions()
    assert (session.agent, session.pid) == ("trainer", os.getpid())
    region = await client.allocate(1)
    await client.aclose()
    await client.aclose()
    assert client.is_closed
    for use in (client.pools, lambda: client.register_memfd(1), region.read):
        with pytest.raises(Closed):
            await use()
    async with AsyncClient.connect(daemon.path, "trainer"):  # at once: closing has waited for the release
        pass


async def test_a_cancelled_connect_leaves_nothing(daemon):
    gate = daemon.engine.gate("open_session")
    connecting = asyncio.ensure_future(AsyncClient.connect(daemon.path)._attach())
    await daemon.engine.called("open_session")
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    gate.set()


async def test_what_is_allocated_is_the_pools_memory(daemon, client):
    first, second = await client.allocate([4096, 4096], access=t.Access.READ, label="kv")
    first.array(np.uint32)[:] = 7
    assert bytes(daemon.engine.data(first.id)[:4]) == b"\7\0\0\0"
    assert daemon.engine.maps == 1
    await client.allocate(4096)
    assert daemon.engine.maps == 1
    assert await second.write(b"abc", 1) == 3
    assert await second.read(0, 5) == b"\0abc\0"
    async with await client.allocate(4096) as third:
        assert len(await client.regions(agent="me")) == 4
    with pytest.raises(Closed):
        third.array()
    await client.free([first, second])


async def test_a_listed_region_is_mapped_on_request(daemon, client):
    async with AsyncClient.connect(daemon.path, "other") as other:
        shared = await other.allocate(4096, label="mine", access=t.Access.READ)
        shared.array()[:] = 3
        [found] = await client.regions(label="mine")
        with pytest.raises(Unsupported):
            found.array()
        assert (await found.map()).array()[4095] == 3
        with pytest.raises(ValueError, match="read-only"):
            found.array()[0] = 1
        with pytest.raises(PermissionDenied):
            await found.write(b"x")


async def test_a_pool_that_cannot_be_mapped_is_read_by_calls(daemon, client):
    daemon.engine.is_mappable = False
    region = await client.allocate(4096)
    with pytest.raises(Unsupported):
        region.array()
    assert await region.write(b"slow") == 4
    assert await region.read(0, 6) == b"slow\0\0"


async def test_own_memory_is_registered_in_every_way(daemon, client, tmp_path):
    array = np.arange(1024, dtype=np.float32)
    mine = await client.register(array)
    shared = await client.register_memfd(4096)
    status = await client.write(mine, shared)
    assert status.state is TransferState.DONE
    assert shared.array(np.float32).tolist() == array.tolist()
    path = tmp_path / "weights"
    path.write_bytes(b"weights!")
    with path.open("rb") as file:
        assert await (await client.register_fd(file.fileno())).read(1, 3) == b"eig"
    daemon.engine.files["cache"] = bytearray(b"cached")
    assert await (await client.register_file("cache")).read() == b"cached"
    made = await client.register_object("s3", "kv/1", nbytes=10, writable=True, create=True)
    assert (made.info.kind, made.nbytes) == (t.MemoryKind.OBJECT, 10)
    assert [result.exists for result in await client.query([("s3", "kv/1"), "cache", "absent"])] == [True, True, False]
    assert [entry.key for entry in (await client.list_objects("s3", "kv/")).objects] == ["kv/1"]
    await client.delete_objects("s3", ["kv/1"])
    assert (await client.list_objects("s3")).objects == ()
    daemon.engine.fail_next("register_private", Unavailable("perhaps"))
    with pytest.raises(Unavailable, match="perhaps"):
        await client.register(np.zeros(4))
    assert len(client._doubtful) == 1


async def test_blocks_and_prepared_lists_move(client):
    source, target = await client.allocate([4096, 4096])
    source.array(np.uint8, (64, 64))[:] = np.arange(64, dtype=np.uint8)[:, None]
    async with await client.prepare(source.blocks(np.arange(64), 64)) as left, await client.prepare(target) as right:
        await client.write(left, right)
        assert target.array()[::64].tolist() == list(range(64))
        await client.read(target.rows([0, 64], 64), left.select([5, 3]))
        assert target.array()[[0, 64]].tolist() == [5, 3]
    with pytest.raises(NotFound):
        await client.write(left, target)
    with pytest.raises(SizeMismatch):
        await client.read(source.rows(0, 1), target)


async def test_a_transfer_is_awaited_and_raises_what_it_failed_with(daemon, client):
    a, b = await client.allocate([4096, 4096])
    daemon.engine.paused = True
    transfer = await client.transfer("READ", a, b)
    with pytest.raises(DeadlineExceeded, match="is still POSTED"):
        await transfer.wait(0.01)
    waiting = asyncio.ensure_future(transfer.wait())
    await daemon.engine.called("wait")
    await daemon.engine.finish(transfer.id)
    assert (await waiting).state is TransferState.DONE
    assert (await transfer).state is TransferState.DONE
    await transfer.post()
    await daemon.engine.finish(transfer.id, MoveFailed("EIO"))
    with pytest.raises(MoveFailed):
        await transfer
    assert (await transfer.poll()).state is TransferState.FAILED
    await transfer.post()
    assert (await transfer.cancel()).state is TransferState.CANCELLED
    with pytest.raises(Cancelled):
        await transfer
    async with transfer:
        pass
    with pytest.raises(NotFound):
        await transfer.poll()


async def test_a_cancelled_wait_leaves_the_transfer_going_on(daemon, client):
    a, b = await client.allocate([4096, 4096])
    daemon.engine.paused = True
    transfer = await client.transfer("READ", a, b)
    waiting = asyncio.ensure_future(transfer.wait())
    await daemon.engine.called("wait")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await daemon.engine.was_cancelled("wait")
    assert (await transfer.poll()).state is TransferState.POSTED


async def test_a_close_in_the_middle_of_a_call_is_closed_and_not_cancelled(daemon):
    client = await AsyncClient.connect(daemon.path)
    a, b = await client.allocate([4096, 4096])
    daemon.engine.paused = True
    transfer = await client.transfer("READ", a, b)
    waiting = asyncio.ensure_future(transfer.wait())
    await daemon.engine.called("wait")
    await client.aclose()
    with pytest.raises((Closed, Unavailable)):
        await waiting


async def test_many_are_waited_for_and_told_as_they_end(daemon, client):
    a, b = await client.allocate([4096, 4096])
    daemon.engine.paused = True
    transfers = [await client.transfer("READ", a, b) for _ in range(3)]
    await daemon.engine.finish(transfers[1].id)
    statuses = await client.wait_many(transfers, any=True)
    assert [status.state is TransferState.DONE for status in statuses] == [False, True, False]
    assert [transfer.is_ended for transfer in transfers] == [False, True, False]
    async with asyncio.TaskGroup() as group:
        seen = group.create_task(collect(client, transfers))
        await daemon.engine.called("watch")
        await daemon.engine.finish(transfers[0].id)
        await daemon.engine.finish(transfers[2].id)
    assert {status.id for status in seen.result()} == {transfer.id for transfer in transfers}
    assert len(await client.poll_many(transfers)) == 3
    await client.release(transfers)
    assert await client.cancel([]) == []


async def collect(client: AsyncClient, transfers: object) -> list[t.TransferStatus]:
    return [status async for status in client.completions(transfers)]  # type: ignore[arg-type]


async def test_estimate_explain_hold(client):
    a, b = await client.allocate([4096, 4096])
    held = await client.transfer("READ", a, b, hold=True)
    assert held.state is TransferState.PREPARED
    assert (await held.post(wait_s=5)).state is TransferState.DONE
    assert (await client.estimate("READ", a, b)).duration_s >= 0
    assert (await client.explain("READ", a, b)).total_nbytes == 4096
    for call in (client.read(a, b, bakend="local"), client.explain("READ", a, b, bakend="local")):
        with pytest.raises(TypeError, match=r"'bakend'.*backend, cause_id"):
            await call


async def test_notifications_are_awaited(daemon, client):
    async with AsyncClient.connect(daemon.path, "other") as other, asyncio.TaskGroup() as group:
        taking = group.create_task(other.notifications(20.0))
        await daemon.engine.called("notifications")
        await client.notify("other", b"\0\xff")
        [notification] = await taking
        assert (notification.payload, notification.source) == (b"\0\xff", "me@node-a")


async def test_nodes_metadata_and_the_operators_verbs(daemon, client):
    assert (await client.node()).name == "node-a"
    assert await client.peers() == []
    assert (await client.import_metadata(await client.export_metadata())).node.name == "node-a"
    assert (await client.admin.status()).live
    assert (await client.pools())[0].name == "host"
    assert await client.admin.config()
    assert await client.admin.backends() is not None
    assert await client.admin.transfers() == []
    assert await client.admin.holds() is not None
    assert await client.admin.set_log_level("debug") == "info"
    await client.admin.drain(0.1)
    await client.admin.drain(undo=True)
    daemon.engine.admin_token = "secret"
    assert await client.pools() == list(client.grant.pools)
    with pytest.raises(Unauthenticated):
        await client.admin.end_session(client.grant.session)


async def test_the_daemons_reason_is_told_instead_of_a_dead_token(daemon, client):
    await daemon.engine.end_session(client.grant.session, "maintenance")
    with pytest.raises(Unavailable, match="maintenance"):
        await client.allocate(1)
    with pytest.raises(Unavailable, match="maintenance"):
        await client.register_memfd(1)


async def test_a_session_over_grpc_alone_reads_and_writes_by_calls(daemon):
    async with AsyncClient.connect_grpc(daemon.target, "remote") as client:
        region = await client.allocate(1 << 19)
        data = np.random.default_rng(2).integers(0, 255, region.nbytes, dtype=np.uint8)
        assert await region.write(data) == region.nbytes
        assert await region.read() == data.tobytes()
        with pytest.raises(OutOfBounds):
            await region.read(5, region.nbytes)
        with pytest.raises(Unsupported):
            region.array()
        with pytest.raises(Unsupported, match="gRPC alone"):
            await client.register_memfd(100)
        daemon.engine._regions[region.id].data = bytearray(10)
        with pytest.raises((ShortTransfer, OutOfBounds)):
            await region.read()
        daemon.engine.fail_next("allocate", Unavailable("busy for a moment"))
        with pytest.raises(Unavailable, match="busy for a moment"):
            await client.allocate(1)
        await client.allocate(1)  # an error that is not the end does not end the session
        await daemon.engine.end_session(client.grant.session, "operator")
        with pytest.raises(Unavailable, match="operator"):
            await client.allocate(1)


async def test_nobody_there_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="no daemon answers"):
        await AsyncClient.connect_grpc(f"unix:{tmp_path}/none", timeout_s=0.05)
    with pytest.raises(Unavailable, match="XFERD_SOCKET"):
        await AsyncClient.connect(tmp_path / "none")


async def test_an_unclosed_client_warns(daemon):
    client = await AsyncClient.connect(daemon.path)
    with pytest.warns(ResourceWarning, match="was not closed"):
        client.__del__()
    await client.aclose()
