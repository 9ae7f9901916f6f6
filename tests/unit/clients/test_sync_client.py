"""The blocking client against the real faces: what it allocates it sees, what fails is typed, what ends is released."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from xferd.api import types as t
from xferd.api.descriptors import DescriptorList
from xferd.api.errors import (
    AlreadyExists,
    Cancelled,
    Closed,
    DeadlineExceeded,
    InvalidArgument,
    MoveFailed,
    NotFound,
    OutOfBounds,
    PermissionDenied,
    PoolExhausted,
    ShortTransfer,
    SizeMismatch,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from xferd.clients import AdminConnection, Client, TransferState


@pytest.fixture
def client(threaded):
    with Client.connect(threaded.path, "me") as client:
        yield client


def fail_next(daemon, method: str, error: BaseException) -> None:
    daemon.engine.fail_next(method, error)


def test_connecting_gives_a_name_and_closing_gives_it_back(threaded):
    with Client.connect(threaded.path, "trainer") as client:
        assert client.address == "trainer@node-a"
        assert "trainer@node-a" in repr(client)
        with pytest.raises(AlreadyExists):
            Client.connect(threaded.path, "trainer")
        [session] = client.admin.sessions()
        assert (session.agent, session.pid, session.transport) == ("trainer", os.getpid(), t.Transport.SOCKET)
    client.close()
    with Client.connect(threaded.path, "trainer"):  # at once: closing has waited for the release
        pass


def test_use_after_close_is_closed(threaded):
    client = Client.connect(threaded.path)
    region = client.allocate(100)
    client.close()
    for use in (client.pools, lambda: client.allocate(1), lambda: client.register_memfd(1), region.array, region.free):
        with pytest.raises(Closed):
            use()


def test_an_unclosed_client_warns(threaded):
    client = Client.connect(threaded.path)
    with pytest.warns(ResourceWarning, match="was not closed"):
        client.__del__()
    client.close()


def test_what_is_allocated_is_the_pools_memory(threaded, client, open_fds):
    before = open_fds()
    first, second = client.allocate([4096, 100], label="kv", access=t.Access.READ)
    assert (first.nbytes, second.nbytes) == (4096, 4096)
    first.array(np.uint32)[:] = 7
    second.array(np.float64, (2, 3))[1, 1] = 0.5
    assert bytes(threaded.engine.data(first.id)[:4]) == b"\7\0\0\0"
    assert threaded.engine.maps == 1
    assert open_fds() == before  # the mapping needs none, and the passed descriptor is closed
    assert second.read(0, 8) == second.array()[:8].tobytes()
    assert second.write(np.arange(3, dtype=np.uint16), 10) == 6
    assert second.array()[10:16].tobytes() == b"\0\0\1\0\2\0"
    client.free([first, second])
    first.free()
    with pytest.raises(Closed):
        first.array()


def test_a_region_is_freed_by_its_block(threaded, client):
    with client.allocate(8192) as region:
        assert region.array().any() == False  # noqa: E712 - numpy's
        assert [found.id for found in client.regions(agent="me")] == [region.id]
    assert client.regions(agent="me") == []


def test_a_listed_region_is_mapped_by_right(threaded, client):
    with Client.connect(threaded.path, "other") as other:
        shared = other.allocate(4096, label="mine", access=t.Access.READ)
        shared.array()[:] = 3
        [found] = client.regions(label="mine")
        assert found.array()[4095] == 3
        with pytest.raises(ValueError, match="read-only"):
            found.array()[0] = 1
        with pytest.raises(PermissionDenied):
            found.write(b"x")
        with pytest.raises(PermissionDenied):
            found.free()
    client.regions()


def test_a_pool_that_cannot_be_mapped_is_read_by_calls(threaded, client):
    threaded.engine.is_mappable = False
    region = client.allocate(4096)
    with pytest.raises(Unsupported, match="cannot be mapped"):
        region.array()
    region.write(b"slow")
    assert region.read(0, 6) == b"slow\0\0"
    assert threaded.engine.maps == 1


def test_private_memory_is_moved_in_place_and_kept_alive(threaded, client):
    array = np.arange(1024, dtype=np.float32)
    mine = client.register(array, label="array")
    pooled = client.allocate(4096)
    status = client.write(mine, pooled)
    assert status.state is TransferState.DONE
    assert pooled.array(np.float32).tolist() == array.tolist()
    pooled.array(np.float32)[0] = -1.0
    client.read(mine, pooled)
    assert array[0] == -1.0
    assert mine.array(np.float32)[0] == -1.0
    assert not client.register(b"bytes", writable=None).info.writable
    assert len(client._kept) == 2
    mine.free()
    assert len(client._kept) == 1


def test_memory_of_a_failed_registration_is_kept_only_in_doubt(threaded, client):
    fail_next(threaded, "register_private", PermissionDenied("no"))
    with pytest.raises(PermissionDenied):
        client.register(np.zeros(4))
    assert client._doubtful == []
    fail_next(threaded, "register_private", Unavailable("perhaps"))
    with pytest.raises(Unavailable):
        client.register(np.zeros(4))
    assert len(client._doubtful) == 1


def test_a_memfd_and_a_file_go_over_the_socket(threaded, client, tmp_path, open_fds):
    region = client.register_memfd(5000, label="shared", access=t.Access.READ_WRITE)
    region.array()[4999] = 5
    assert threaded.engine.data(region.id)[4999] == 5
    assert (region.nbytes, region.info.access) == (5000, t.Access.READ_WRITE)
    before = open_fds()
    path = tmp_path / "weights"
    path.write_bytes(b"weights!")
    with path.open("rb") as file:
        opened = client.register_fd(file.fileno(), label="file")
        assert not file.closed
    assert opened.read(1, 3) == b"eig"
    with pytest.raises(Unsupported):
        opened.array()
    assert open_fds() == before
    threaded.engine.files["cache"] = bytearray(b"cached")
    assert client.register_file("cache").read() == b"cached"
    with pytest.raises(NotFound):
        client.register_file("missing")


def test_objects(threaded, client):
    threaded.engine.files["cache"] = bytearray(b"cached")
    region = client.register_object("s3", "kv/1", nbytes=10, writable=True, create=True, label="l")
    assert (region.info.kind, region.info.path, region.info.label) == (t.MemoryKind.OBJECT, "s3/kv/1", "l")
    found, file, absent, outside = client.query([("s3", "kv/1"), "cache", ("s3", "kv/2"), "../x"])
    assert found == t.QueryResult(True, 10, 1.5, "etag")
    assert (file.exists, file.nbytes, absent.exists) == (True, 6, False)
    assert isinstance(outside.error, PermissionDenied)
    assert client.list_objects("s3", "kv/").objects == (t.ObjectEntry("kv/1", 10, 1.5, "etag"),)
    client.delete_objects("s3", ["kv/1", "kv/2"])
    assert client.list_objects("s3", "kv/", after="a", limit=1) == t.ObjectPage(())
    with pytest.raises(NotFound):
        client.register_object("s3", "kv/1")


def test_blocks_and_prepared_lists_move(threaded, client):
    source, target = client.allocate([64 * 64, 64 * 64])
    source.array(np.uint8, (64, 64))[:] = np.arange(64, dtype=np.uint8)[:, None]
    order = np.random.default_rng(1).permutation(64)
    client.write(source.blocks(order, 64), target.blocks(np.arange(64), 64))
    assert target.array(np.uint8, (64, 64))[:, 0].tolist() == order.tolist()
    with client.prepare(source.blocks(np.arange(64), 64)) as left, client.prepare(target) as right:
        assert (len(left), left.info.total_nbytes) == (64, 4096)
        client.write(left, right)
        client.write(left.select([5, 3]), target.rows([0, 64], 64))
        assert target.array()[[0, 64]].tolist() == [5, 3]
        with pytest.raises(OutOfBounds):
            left.select([64])
        with pytest.raises(InvalidArgument):
            left.select([-1.5])
    left.release()
    with pytest.raises(NotFound):
        client.write(left, target)


def test_errors_of_transfers_are_raised_by_type(threaded, client):
    a, b = client.allocate([4096, 8192])
    with pytest.raises(SizeMismatch) as caught:
        client.read(a, b)
    assert caught.value.__cause__ is not None
    assert caught.value.limit
    with pytest.raises(OutOfBounds):
        client.read(a.rows(4096, 1), b.rows(0, 1))
    with pytest.raises(InvalidArgument, match="READ or WRITE"):
        client.transfer("COPY", a, a)
    with pytest.raises(TypeError, match=r"'bakend'.*backend, cause_id"):
        client.read(a, b.rows(0, 4096), bakend="tcp")
    fail_next(threaded, "submit", PoolExhausted("full", limit="1 byte", remedy="wait"))
    with pytest.raises(PoolExhausted, match="remedy: wait"):
        client.read(a, b.rows(0, 4096))


def test_a_transfer_is_waited_for_polled_cancelled_and_posted_again(threaded, client):
    a, b = client.allocate([4096, 4096])
    threaded.engine.paused = True
    transfer = client.transfer("READ", a, b, key="k", cause_id="why")
    assert not transfer.is_ended
    assert transfer.status.cause_id == "why"
    assert client.transfer("READ", a, b, key="k", cause_id="why").id == transfer.id
    with pytest.raises(DeadlineExceeded, match="is still POSTED"):
        transfer.wait(0.01)
    assert not transfer.is_ended
    assert transfer.cancel().state is TransferState.CANCELLED
    with pytest.raises(Cancelled):
        transfer.wait()
    threaded.engine.paused = False
    assert transfer.post(wait_s=5).state is TransferState.DONE
    assert transfer.wait().telemetry.moved_nbytes == 4096
    assert transfer.poll().state is TransferState.DONE
    assert "4096/4096 bytes" in repr(transfer)
    with transfer:
        pass
    with pytest.raises(NotFound):
        transfer.poll()


def test_a_failed_transfer_raises_its_own_error(threaded, client):
    a, b = client.allocate([4096, 4096])
    threaded.engine.paused = True
    with client.transfer(t.TransferOp.WRITE, a, b) as transfer:
        threaded.run(threaded.engine.finish(transfer.id, MoveFailed("EIO", routes_tried=("local: EIO",))))
        with pytest.raises(MoveFailed) as caught:
            transfer.wait()
        assert caught.value.routes_tried == ("local: EIO",)
        assert transfer.state is TransferState.FAILED
        assert transfer.poll().state is TransferState.FAILED  # asking is no raising


def test_many_are_waited_for_and_told_as_they_end(threaded, client):
    a, b = client.allocate([4096, 4096])
    threaded.engine.paused = True
    transfers = [client.transfer("READ", a, b) for _ in range(3)]
    assert len(client.wait_many(transfers, 0.0)) == 3
    threaded.run(threaded.engine.finish(transfers[1].id))
    statuses = client.wait_many(transfers, any=True)
    assert [status.state is TransferState.DONE for status in statuses] == [False, True, False]
    assert transfers[1].is_ended
    threaded.run(threaded.engine.finish(transfers[0].id))
    threaded.run(threaded.engine.finish(transfers[2].id))
    assert {status.id for status in client.completions(transfers)} == {transfer.id for transfer in transfers}
    endless = client.completions()
    assert next(endless).state is TransferState.DONE
    endless.close()
    assert client.wait_many([]) == []
    client.release(transfers)
    with pytest.raises(NotFound):
        client.poll_many(transfers)
    assert client.cancel([]) == []


def test_a_held_transfer_waits_for_its_post_and_can_be_asked_about(threaded, client):
    a, b = client.allocate([4096, 4096])
    held = client.transfer("READ", a, b, hold=True)
    assert held.state is TransferState.PREPARED
    held.post()
    assert held.wait().state is TransferState.DONE
    assert client.estimate("READ", a, b).duration_s >= 0
    assert client.explain("READ", a, b).total_nbytes == 4096


def test_notifications_carry_any_bytes(threaded, client):
    with Client.connect(threaded.path, "other") as other:
        client.notify("other", b"\0\xff")
        [notification] = other.notifications(5.0)
        assert (notification.payload, notification.source) == (b"\0\xff", "me@node-a")
        assert other.notifications() == []
        a, b = client.allocate([4096, 4096])
        status = client.write(a, b, notification=("other", b"done"))
        [notification] = other.notifications(5.0)
        assert (notification.payload, notification.transfer) == (b"done", status.id)


def test_nodes_and_metadata(threaded, client):
    assert client.node().name == "node-a"
    assert client.peers() == []
    client.allocate(4096, access=t.Access.READ)
    blob = client.export_metadata()
    assert client.export_metadata([]) != b""
    assert client.import_metadata(blob).node.name == "node-a"


def test_the_operators_verbs(threaded, client):
    assert client.admin.status().live
    assert "[" in client.admin.config()
    assert client.pools()[0].name == "host"
    assert client.admin.backends() is not None
    assert client.admin.transfers() == []
    assert client.admin.holds() is not None
    assert client.admin.set_log_level("debug") == "info"
    assert client.admin.drain(0.1).transfers_left == 0
    client.admin.drain(undo=True)
    with AdminConnection(threaded.target) as admin:
        [session] = admin.sessions()
        admin.end_session(session.session)
        assert admin.sessions() == []
    with pytest.raises(Unavailable, match="ended this session"):
        client.allocate(1)


def test_without_the_admin_token_pools_are_those_of_the_grant(threaded, client):
    threaded.engine.admin_token = "secret"
    assert client.pools() == list(client.grant.pools)
    with pytest.raises(Unauthenticated):
        client.admin.status()
    with Client.connect(threaded.path, admin_token="secret") as operator:
        assert operator.admin.status().ready


def test_the_daemons_reason_is_told_instead_of_a_dead_token(threaded, client):
    threaded.run(threaded.engine.end_session(client.grant.session, "maintenance"))
    with pytest.raises(Unavailable, match="maintenance"):
        client.allocate(1)


def test_a_session_over_grpc_alone_reads_and_writes_by_calls(threaded):
    with Client.connect_grpc(threaded.target, "remote") as client:
        [session] = client.admin.sessions()
        assert session.transport is t.Transport.GRPC
        region = client.allocate((2 << 20) // 4)
        data = np.random.default_rng(2).integers(0, 255, region.nbytes, dtype=np.uint8)
        assert region.write(data) == region.nbytes
        assert region.read() == data.tobytes()
        assert region.read(5, 0) == b""
        with pytest.raises(OutOfBounds):
            region.read(5, region.nbytes)
        with pytest.raises(Unsupported, match=r"read\(\) and write"):
            region.array()
        with pytest.raises(Unsupported, match="gRPC alone"):
            client.register_memfd(100)
        with pytest.raises(Unsupported):
            client.register(np.zeros(1))
        threaded.run(threaded.engine.end_session(session.session, "operator"))
        with pytest.raises(Unavailable, match="operator"):
            client.allocate(1)
        with pytest.raises(Unavailable):
            region.read()


def test_nobody_at_the_target_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="no daemon answers"):
        Client.connect_grpc(f"unix:{tmp_path}/none", timeout_s=0.05)
    with AdminConnection(f"unix:{tmp_path}/none") as admin, pytest.raises(Unavailable, match="check that xferd runs"):
        admin.status()


def test_a_short_stream_is_no_data(threaded):
    with Client.connect_grpc(threaded.target) as client:
        region = client.allocate(4096)
        threaded.engine._regions[region.id].data = bytearray(10)
        with pytest.raises((ShortTransfer, OutOfBounds)):
            region.read()


def test_threads_share_a_client(threaded, client):
    a, b = client.allocate([64 * 64, 64 * 64])
    a.array(np.uint8, (64, 64))[:] = np.arange(64, dtype=np.uint8)[:, None]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for block in range(number, 64, 4):
                client.write(a.blocks(block, 64), b.blocks(block, 64))
        except BaseException as exc:  # noqa: BLE001 - told by the test
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert b.array(np.uint8, (64, 64))[:, 63].tolist() == list(range(64))


def test_a_list_of_100000_descriptors_is_one_message(threaded, client):
    a, b = client.allocate([400_000, 400_000])
    offsets = np.arange(100_000, dtype=np.uint64) * np.uint64(4)
    a.array(np.uint32, 100_000)[:] = np.arange(100_000)
    client.write(
        DescriptorList.from_columns(a.id, offsets, 4), DescriptorList.from_columns(b.id, offsets[::-1].copy(), 4)
    )
    assert b.array(np.uint32, 100_000)[::-1].tolist() == list(range(100_000))


@pytest.mark.slow
def test_a_killed_client_leaves_nothing(threaded):
    script = """if True:
        import sys
        from xferd.clients import Client
        client = Client.connect(sys.argv[1])
        client.allocate(4096)
        print(1, flush=True)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", script, str(threaded.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        assert not threaded.engine.nothing_held()
        process.send_signal(signal.SIGKILL)
        threaded.run(threaded.engine.called("end_session"))
