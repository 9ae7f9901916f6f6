"""The session socket's server: who may attach, what each bad packet gets, and that nothing outlives a client."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings, strategies as st

from xferd.api import wire
from xferd.api.errors import AlreadyExists, Closed, ConfigError, InvalidArgument, NotFound, XferdError
from xferd.api.proto import session_v1_pb2 as sp
from xferd.api.types import (
    Access,
    Caller,
    Limits,
    MemoryKind,
    PeerCredentials,
    PoolInfo,
    RegionId,
    RegionInfo,
    RegionSource,
    SessionGrant,
    SessionId,
    SessionInfo,
    Transport,
)
from xferd.daemon.sessions.packets import MAX_PACKET_NBYTES
from xferd.daemon.sessions.socket import SessionSocketServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

POOL_NBYTES = 8192


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


class FakeEngine:
    """Keeps sessions in a dictionary and counts regions; registering closes the fd that it was given."""

    def __init__(self) -> None:
        self.pool = os.memfd_create("pool")
        os.truncate(self.pool, POOL_NBYTES)
        self.live: dict[SessionId, tuple[str, PeerCredentials | None]] = {}
        self.ended: dict[SessionId, str] = {}
        self.changed = asyncio.Event()
        self.ends: dict[SessionId, asyncio.Future[str]] = {}
        self.release = asyncio.Event()  # end_session returns when this is set
        self.release.set()
        self.gate = asyncio.Event()  # register_fd waits for it
        self.gate.set()
        self.registered: list[tuple[str, int]] = []

    def close(self) -> None:
        os.close(self.pool)

    async def until(self, condition) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def authenticate(self, token: str) -> Caller:
        raise NotImplementedError

    def authenticate_admin(self, token: str) -> Caller:
        raise NotImplementedError

    async def open_session(
        self,
        agent: str,
        transport: Transport,
        *,
        credentials: PeerCredentials | None = None,
        ttl_s: float = 0.0,
    ) -> SessionGrant:
        assert transport is Transport.SOCKET
        if agent == "bug":
            raise ZeroDivisionError("a bug")
        if any(name == agent for name, _ in self.live.values()):
            raise AlreadyExists(f"agent {agent!r} is attached")
        session = SessionId(f"s{len(self.live) + len(self.ended)}")
        self.live[session] = (agent, credentials)
        self.ends[session] = asyncio.get_running_loop().create_future()
        self.changed.set()
        limits = Limits(1 << 20, 1 << 26, 1 << 20, 1 << 16)
        return SessionGrant(session, "token", agent, "node", 7, limits, "unix:/x/grpc.sock", (self._info(),))

    async def wait_session_end(self, session: SessionId) -> str:
        return await asyncio.shield(self.ends[session])

    async def end_session(self, session: SessionId, reason: str) -> None:
        await self.release.wait()
        if self.live.pop(session, None):
            self.ended[session] = reason
        self.changed.set()

    def sessions(self) -> list[SessionInfo]:
        return []

    async def register_memfd(self, caller: Caller, fd: int, nbytes: int, access: Access, label: str) -> RegionInfo:
        try:
            nbytes = nbytes or os.fstat(fd).st_size
            if label == "refuse":
                raise InvalidArgument("refused")
        finally:
            os.close(fd)
        return self._region(caller, nbytes, RegionSource.MEMFD, access, label)

    async def register_fd(
        self, caller: Caller, fd: int, nbytes: int, writable: bool, access: Access, label: str
    ) -> RegionInfo:
        try:
            self.changed.set()
            await self.gate.wait()
            nbytes = nbytes or os.fstat(fd).st_size
        finally:
            os.close(fd)
        return self._region(caller, nbytes, RegionSource.FD, access, label)

    def pool_fd(self, caller: Caller, pool: str) -> tuple[PoolInfo, int]:
        if pool not in ("", "host"):
            raise NotFound(f"pool {pool!r}")
        return self._info(), self.pool

    def _info(self) -> PoolInfo:
        return PoolInfo("host", MemoryKind.DRAM, POOL_NBYTES, 0, POOL_NBYTES, POOL_NBYTES, 0.0, 0, 0, 0, True)

    def _region(self, caller: Caller, nbytes: int, source: RegionSource, access: Access, label: str) -> RegionInfo:
        self.registered.append((caller.agent, nbytes))
        kind = MemoryKind.FILE if source is RegionSource.FD else MemoryKind.DRAM
        return RegionInfo(RegionId(1), "node", 7, kind, source, 0, nbytes, caller.agent, access, True, label)


class Client:
    """A client without our client library: raw packets, in threads so that the server has its loop."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def ask(self, fds: tuple[int, ...] = (), **request: object) -> tuple[sp.SessionSocketReply, list[int]]:
        self.number += 1
        message = sp.SessionSocketRequest(request_id=self.number, **request)  # type: ignore[arg-type]
        return await self.ask_raw(message.SerializeToString(), fds)

    async def ask_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> tuple[sp.SessionSocketReply, list[int]]:
        self.send(data, fds)
        return await self.receive()

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    async def receive(self) -> tuple[sp.SessionSocketReply, list[int]]:
        data, fds, flags, _ = await asyncio.to_thread(socket.recv_fds, self.sock, 65536, 4, socket.MSG_CMSG_CLOEXEC)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        assert data, "the connection ended"
        return sp.SessionSocketReply.FromString(data), fds

    async def hello(self, agent: str = "a") -> sp.SessionSocketReply:
        reply, fds = await self.ask(hello=sp.Hello(version=1, agent=agent))
        assert not fds
        return reply

    async def at_end(self) -> bool:
        try:
            return await asyncio.to_thread(self.sock.recv, 65536) == b""
        except ConnectionResetError:
            return True


def error_of(reply: sp.SessionSocketReply) -> XferdError:
    assert reply.WhichOneof("reply") == "error", reply
    return wire.error_from_detail(reply.error)


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="xf"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def engine():
    engine = FakeEngine()
    yield engine
    engine.close()


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine, folder: Path, **options: object) -> AsyncIterator[Path]:
    """A server whose end leaves no fd, no task and no session."""
    fds, tasks = open_fds(), asyncio.all_tasks()
    path = folder / "session.sock"
    async with SessionSocketServer(path, engine, **options):  # type: ignore[arg-type]
        yield path
    assert not engine.live
    assert not path.exists()
    assert asyncio.all_tasks() == tasks
    assert open_fds() <= fds  # fewer where what an earlier test left to the collector goes meanwhile


async def test_hello_gives_a_session_with_the_kernels_word_on_who_asks(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            reply = await client.hello("trainer.1")
            grant = wire.grant_from_message(reply.grant)
            assert (reply.request_id, grant.agent, grant.epoch) == (1, "trainer.1", 7)
            assert grant.pools[0].name == "host"
            [(agent, credentials)] = engine.live.values()
            assert agent == "trainer.1"
            assert credentials == PeerCredentials(os.getpid(), os.geteuid(), os.getegid())
        await engine.until(lambda: not engine.live)
        assert list(engine.ended.values()) == ["the client closed its session"]


async def test_a_pool_is_mapped_and_shared(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            await client.hello()
            reply, [fd] = await client.ask(map_pool=sp.MapPool(pool="host"))
            with os.fdopen(fd, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"shared", 4096)
            assert wire.pool_from_message(reply.pool).nbytes == POOL_NBYTES
            assert os.pread(engine.pool, 6, 4096) == b"shared"
            reply, fds = await client.ask(map_pool=sp.MapPool(pool="nope"))
            assert not fds
            assert isinstance(error_of(reply), NotFound)
            assert reply.request_id == 3


async def test_descriptors_are_registered_and_errors_leave_the_session_alone(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client, tempfile.TemporaryFile() as file:
            file.write(b"x" * 100)
            file.flush()
            await client.hello()
            reply, _ = await client.ask((file.fileno(),), register_memfd=sp.RegisterMemfd(nbytes=64, access=3))
            assert reply.region.nbytes == 64
            reply, _ = await client.ask((file.fileno(),), register_fd=sp.RegisterFd(label="file"))
            assert (reply.region.nbytes, reply.region.label) == (100, "file")
            reply, _ = await client.ask((file.fileno(),), register_memfd=sp.RegisterMemfd(label="refuse"))
            assert isinstance(error_of(reply), InvalidArgument)
            assert engine.live
        await engine.until(lambda: not engine.live)


BAD_REQUESTS = [
    ("exactly 1", 0, {"register_memfd": sp.RegisterMemfd(nbytes=1)}),
    ("exactly 1", 2, {"register_memfd": sp.RegisterMemfd(nbytes=1)}),
    ("exactly 1", 0, {"register_fd": sp.RegisterFd()}),
    ("exactly 1", 8, {"register_fd": sp.RegisterFd()}),
    ("exactly 0", 1, {"map_pool": sp.MapPool()}),
    ("0 ACCESS_NONE|0 NONE", 1, {"register_memfd": sp.RegisterMemfd(access=77)}),  # type: ignore[arg-type]
    ("has its session", 0, {"hello": sp.Hello(version=1)}),
    ("no request that is known", 1, {}),
]


@pytest.mark.parametrize(("message", "count", "request_"), BAD_REQUESTS)
async def test_a_bad_request_is_answered_and_its_fds_are_closed(engine, folder, message, count, request_):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            await client.hello()
            fds = open_fds()
            reply, _ = await client.ask((engine.pool,) * count, **request_)
            with pytest.raises(XferdError, match=message):
                raise error_of(reply)
            assert reply.request_id == 2
            assert open_fds() <= fds  # fewer where what an earlier test left to the collector goes meanwhile
            reply, [fd] = await client.ask(map_pool=sp.MapPool())  # and the session goes on
            os.close(fd)
        assert not engine.registered


HELLO = sp.SessionSocketRequest(request_id=1, hello=sp.Hello(version=1, agent="a")).SerializeToString()
BAD_OPENINGS = [
    ("protocol_violation", b"\xff" * 20, 0),
    ("protocol_violation", b"GET / HTTP/1.1\r\n\r\n", 0),
    ("protocol_violation", b"x" * (MAX_PACKET_NBYTES + 1), 0),
    ("protocol_violation", HELLO, 9),
    ("invalid_argument", HELLO, 1),
    ("protocol_violation", sp.SessionSocketRequest(request_id=1, map_pool=sp.MapPool()).SerializeToString(), 0),
    ("protocol_violation", sp.SessionSocketRequest(hello=sp.Hello(version=1)).SerializeToString(), 0),
    ("unsupported", sp.SessionSocketRequest(request_id=1, hello=sp.Hello(version=2)).SerializeToString(), 0),
]


@pytest.mark.parametrize(("code", "data", "count"), BAD_OPENINGS)
async def test_a_bad_opening_gets_an_error_and_the_end(engine, folder, code, data, count):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            reply, _ = await client.ask_raw(data, (engine.pool,) * count)
            assert error_of(reply).code == code
            assert await client.at_end()
            assert not engine.live
        with Client(path) as client:
            assert (await client.hello()).grant.agent == "a"


async def test_rubbish_after_hello_ends_the_session_with_its_reason(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            await client.hello()
            reply, _ = await client.ask_raw(b"\xff" * 7)
            assert error_of(reply).code == "protocol_violation"
            closing, _ = await client.receive()
            assert "7 bytes is no SessionSocketRequest" in closing.closing
            assert await client.at_end()
        assert "7 bytes" in engine.ended[SessionId("s0")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packets=st.lists(st.tuples(st.binary(min_size=1, max_size=200), st.integers(0, 3)), max_size=4), hello=st.booleans()
)
def test_random_packets_disturb_nobody(folder, packets, hello):
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine, folder) as path:
            with Client(path) as client:
                if hello:
                    await client.hello()
                with contextlib.suppress(OSError):  # the server may close between two packets
                    for data, count in packets:
                        client.send(data, (engine.pool,) * count)
                client.sock.shutdown(socket.SHUT_WR)
                while not await client.at_end():
                    pass
            with Client(path) as client:
                assert (await client.hello("after")).grant.agent == "after"
        engine.close()

    asyncio.run(run())


async def test_a_refusal_to_open_is_passed_on_and_ends_the_connection(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as first, Client(path) as second:
            await first.hello("same")
            assert error_of(await second.hello("same")).code == "already_exists"
            assert await second.at_end()
            assert len(engine.live) == 1


async def test_a_bug_in_the_engine_harms_one_client_only(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            reply = await client.hello("bug")
            assert error_of(reply).code == "internal"
            assert await client.at_end()
        with Client(path) as client:
            assert (await client.hello()).grant.agent == "a"


async def test_silence_instead_of_hello_has_a_deadline(engine, folder):
    async with serving(engine, folder, hello_timeout_s=0.01) as path:
        with Client(path) as client:
            reply, _ = await client.receive()
            assert error_of(reply).code == "deadline_exceeded"
            assert await client.at_end()


async def test_other_users_are_refused(engine, folder):
    async with serving(engine, folder, allowed_uids={os.geteuid() + 1}) as path:
        with Client(path) as client:
            reply, _ = await client.receive()
            with pytest.raises(XferdError, match="allowed_uids") as caught:
                raise error_of(reply)
            assert caught.value.code == "permission_denied"
            assert await client.at_end()


async def test_connections_are_bounded(engine, folder):
    async with serving(engine, folder, max_connections=1) as path:
        with Client(path) as first, Client(path) as second:
            await first.hello()
            reply, _ = await second.receive()
            assert error_of(reply).code == "overloaded"


async def test_the_daemon_ends_a_session_and_says_why(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            await client.hello()
            engine.ends[SessionId("s0")].set_result("operator's wish")
            closing, _ = await client.receive()
            assert (closing.request_id, closing.closing) == (0, "operator's wish")
            assert await client.at_end()
        assert engine.ended == {"s0": "operator's wish"}


async def test_the_end_of_the_socket_means_that_all_is_released(engine, folder):
    async with serving(engine, folder) as path:
        with Client(path) as client:
            await client.hello()
            engine.release.clear()
            client.sock.shutdown(socket.SHUT_WR)
            ending = asyncio.ensure_future(client.at_end())
            assert not (await asyncio.wait([ending], timeout=0.02))[0]
            engine.release.set()
            assert await ending
            assert engine.ended == {"s0": "the client closed its session"}


async def test_a_stopping_server_tells_its_clients(engine, folder):
    server = SessionSocketServer(folder / "session.sock", engine)
    await server.start()
    with Client(folder / "session.sock") as client:
        await client.hello()
        await server.aclose()
        assert engine.ended == {"s0": "the daemon is stopping"}
        closing, _ = await client.receive()
        assert closing.closing == "the daemon is stopping"
        assert await client.at_end()


async def test_a_client_that_dies_while_its_fd_is_registered_leaks_nothing(engine, folder):
    async with serving(engine, folder) as path:
        engine.gate.clear()
        client = Client(path)
        await client.hello()
        client.send(
            sp.SessionSocketRequest(request_id=2, register_fd=sp.RegisterFd(nbytes=1)).SerializeToString(),
            (engine.pool,),
        )
        engine.changed.clear()
        await asyncio.wait_for(engine.changed.wait(), 10)
        engine.ends[SessionId("s0")].set_result("enough")
        assert (await client.receive())[0].closing == "enough"
        client.sock.close()
        await engine.until(lambda: not engine.live)


CLIENT_SCRIPT = """
import os, socket, sys
from xferd.api.proto import session_v1_pb2 as sp
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sock.send(sp.SessionSocketRequest(request_id=1, hello=sp.Hello(version=1, agent="victim")).SerializeToString())
sock.recv(65536)
if sys.argv[2] == "fork" and not os.fork():
    sys.stdin.read()  # the child keeps the socket open until the test is over
    os._exit(0)
print("attached", flush=True)
sys.stdin.read()
"""


async def kill_client(engine: FakeEngine, path: Path, manner: str) -> str:
    """Attach a real process, kill it, and return the reason with which its session was ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT_SCRIPT, str(path), manner, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert await process.stdout.readline() == b"attached\n"
    [(agent, credentials)] = engine.live.values()
    assert agent == "victim"
    assert credentials is not None
    assert credentials.pid == process.pid
    process.send_signal(signal.SIGKILL)
    await engine.until(lambda: not engine.live)
    process.stdin.close()  # lets the forked child go
    await process.communicate()
    return engine.ended[SessionId("s0")]


@pytest.mark.slow
async def test_a_killed_client_is_noticed(engine, folder):
    async with serving(engine, folder) as path:
        assert await kill_client(engine, path, "plain") != ""


@pytest.mark.slow
async def test_a_killed_client_whose_child_keeps_the_socket_is_noticed(engine, folder):
    async with serving(engine, folder) as path:
        assert "exited" in await kill_client(engine, path, "fork")


@pytest.mark.slow
def test_the_same_on_uvloop(folder):
    async def run() -> None:
        engine = FakeEngine()
        async with SessionSocketServer(folder / "session.sock", engine) as server:
            with Client(folder / "session.sock") as client:
                await client.hello()
                _, [fd] = await client.ask(map_pool=sp.MapPool())
                os.close(fd)
            await engine.until(lambda: not engine.live)
            engine.ended.clear()
            assert "exited" in await kill_client(engine, folder / "session.sock", "fork")
            assert server.connections <= 1
        assert server.connections == 0
        engine.close()

    uvloop.run(run())


async def test_a_stale_path_is_taken_over_and_a_live_one_is_not(engine, folder):
    path = folder / "session.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    async with serving(engine, folder) as path:
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(AlreadyExists, match="another daemon"):
            await SessionSocketServer(path, engine).start()
        assert path.exists()


async def test_a_path_that_was_bound_by_another_is_left_alone(engine, folder):
    path = folder / "session.sock"
    server = SessionSocketServer(path, engine)
    await server.start()
    path.unlink()
    path.touch()
    await server.aclose()
    assert path.exists()
    await server.aclose()
    with pytest.raises(Closed):
        await server.start()


async def test_paths_that_cannot_be_bound_are_configuration_errors(engine, folder):
    with pytest.raises(ConfigError, match="107"):
        await SessionSocketServer(folder / ("x" * 120), engine).start()
    with pytest.raises(ConfigError, match="folder exists"):
        await SessionSocketServer(folder / "missing" / "s.sock", engine).start()


async def test_a_socket_from_systemd_is_served_and_its_path_kept(engine, folder):
    path = folder / "given.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    async with SessionSocketServer(listener, engine):
        with Client(path) as client:
            assert (await client.hello()).grant.agent == "a"
    assert path.exists()
