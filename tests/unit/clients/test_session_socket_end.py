"""The client's end of the session socket: where it looks, whom it trusts, and that a daemon's rubbish harms nobody."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path

import pytest

from xferd.api.errors import (
    DeadlineExceeded,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unavailable,
    XferdError,
)
from xferd.api.proto import session_v1_pb2 as sp, xferd_v1_pb2 as pb
from xferd.clients._aio_session_socket import AsyncSessionSocket
from xferd.clients._session_socket import Place, SessionSocket, find_place, hello, map_pool, open_socket


@pytest.fixture
def listener():
    """A listening socket whose daemon is the test."""
    with (
        tempfile.TemporaryDirectory(prefix="xf") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        sock.bind(f"{folder}/s")
        sock.listen()
        sock.settimeout(20)
        yield sock


def place_of(listener: socket.socket) -> Place:
    return Place(Path(listener.getsockname()))


def answer(**fields: object) -> bytes:
    return sp.SessionSocketReply(**fields).SerializeToString()  # type: ignore[arg-type]


def test_the_place_is_the_argument_then_the_environment_then_the_run_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XFERD_SOCKET", "/env/s.sock")
    assert find_place("/arg/s.sock").path == Path("/arg/s.sock")
    assert find_place(None).path == Path("/env/s.sock")
    monkeypatch.delenv("XFERD_SOCKET")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_place(None).path == Path("/run/xferd/session.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_place(None).path == tmp_path / "xferd/session.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert find_place(None) == Place(Path("/tmp/xferd-1234/session.sock"), frozenset({1234, 0}))


def test_nobody_there_names_the_path_and_the_remedy(tmp_path):
    with pytest.raises(Unavailable, match="XFERD_SOCKET") as caught:
        open_socket(Place(tmp_path / "no.sock"), 1.0)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_daemon_of_a_stranger_is_not_trusted_in_a_public_folder(listener):
    stranger = Place(place_of(listener).path, frozenset({os.geteuid() + 1}))
    with pytest.raises(PermissionDenied, match="runs as user"):
        open_socket(stranger, 1.0)


def test_a_late_answer_is_dropped_with_its_descriptors(listener, open_fds):
    client = SessionSocket(place_of(listener), 0.02)
    daemon, _ = listener.accept()
    with daemon:
        with pytest.raises(DeadlineExceeded):
            client.exchange(map_pool("one"))
        before = open_fds()
        with open_memfd() as fd:
            socket.send_fds(daemon, [answer(request_id=1, pool=pb.PoolInfo(name="one"))], [fd])
            socket.send_fds(daemon, [answer(request_id=2, pool=pb.PoolInfo(name="two"))], [fd])
        reply, fds = client.exchange(map_pool("two"))
        assert reply.pool.name == "two"
        for fd in fds:
            os.close(fd)
        assert open_fds() == before
        client.timeout_s = 20.0
        daemon.send(answer(request_id=3, error=pb.ErrorDetail(code="not_found", message="pool x")))
        with pytest.raises(NotFound, match="pool x"):
            client.exchange(map_pool("x"))
    client.close(1.0)


class open_memfd:  # noqa: N801 - used like a function
    def __enter__(self) -> int:
        self.fd = os.memfd_create("test")
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        (b"\xff" * 9, ProtocolViolation),
        (answer(closing="enough"), Unavailable),
        (answer(error=pb.ErrorDetail(code="permission_denied", message="no")), PermissionDenied),
        (b"", Unavailable),
    ],
    ids=["rubbish", "closing", "refusal", "end"],
)
async def test_what_comes_instead_of_an_answer_is_a_typed_error(listener, packet, error):
    blocking = SessionSocket(place_of(listener), 20.0)
    blocking_daemon, _ = listener.accept()
    waiting = AsyncSessionSocket(open_socket(place_of(listener), 20.0), 20.0)
    waiting_daemon, _ = listener.accept()
    for daemon in (blocking_daemon, waiting_daemon):
        if packet:
            daemon.send(packet)
        else:
            daemon.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        blocking.exchange(hello("a"))
    with pytest.raises(error):
        await waiting.exchange(hello("a"))
    for daemon in (blocking_daemon, waiting_daemon):
        daemon.close()
    blocking.close(1.0)
    await waiting.close(1.0)
    await waiting.close(1.0)


async def test_a_cancelled_exchange_keeps_no_descriptor_and_the_next_one_works(listener, open_fds):
    client = AsyncSessionSocket(open_socket(place_of(listener), 20.0), 20.0)
    daemon, _ = listener.accept()
    before = open_fds()
    first = asyncio.ensure_future(client.exchange(map_pool("one")))
    await asyncio.wait([first], timeout=0)
    with open_memfd() as fd:
        socket.send_fds(daemon, [answer(request_id=1, pool=pb.PoolInfo(name="one"))], [fd])
    client._on_readable()  # the answer is there, and the exchange is cancelled before it sees it
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert open_fds() == before
    daemon.send(answer(request_id=2, pool=pb.PoolInfo(name="two")))
    reply, _ = await client.exchange(map_pool("two"))
    assert reply.pool.name == "two"
    daemon.close()
    await client.close(1.0)


async def test_the_reason_of_the_end_is_heard_without_asking(listener):
    client = AsyncSessionSocket(open_socket(place_of(listener), 20.0), 20.0)
    daemon, _ = listener.accept()
    daemon.send(answer(closing="drained"))
    assert await client.end_reason(0.0) == "drained"
    daemon.close()
    with pytest.raises(XferdError, match="drained"):
        await client.exchange(map_pool(""))
    await client.close(1.0)
