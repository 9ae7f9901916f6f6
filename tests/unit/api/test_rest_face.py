"""How the face listens, streams, survives bugs and lets go."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from fake_engine import FakeEngine
from rest_harness import Rest, serving
from structlog.testing import capture_logs

from xferd.api.errors import Closed, ConfigError, PeerLost
from xferd.api.rest import RestFace
from xferd.api.types import TransferId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LISTEN = "127.0.0.1:0"


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    async with serving(listen=LISTEN) as client:
        yield client


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xf") as name:
        yield Path(name)


# ------------------------------------------------------------------------------------------- sockets


async def test_the_socket_has_mode_0660_under_any_umask(folder: Path) -> None:
    previous = os.umask(0o077)
    try:
        async with serving() as rest:
            assert stat.S_IMODE(os.stat(rest.socket_path).st_mode) == 0o660  # noqa: PTH116
    finally:
        os.umask(previous)


async def test_a_dead_socket_is_replaced_and_a_live_one_is_not(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = RestFace(FakeEngine(), socket_path=str(path))
    await first.start()
    await first.start()
    second = RestFace(FakeEngine(), socket_path=str(path))
    with pytest.raises(ConfigError, match="in use"):
        await second.start()
    assert path.exists()
    await second.aclose()
    assert path.exists(), "who did not make the socket does not remove it"
    await first.aclose()
    await first.aclose()
    assert not path.exists()
    with pytest.raises(Closed):
        await first.start()


async def test_places_that_cannot_hold_a_socket(folder: Path) -> None:
    (folder / "file").write_bytes(b"precious")
    for path in (folder / "file", folder / "missing" / "s", folder / ("x" * 120)):
        with pytest.raises(ConfigError) as caught:
            await RestFace(FakeEngine(), socket_path=str(path)).start()
        assert caught.value.remedy
    assert (folder / "file").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "node-a:80", "127.0.0.1", "a:b", "u@h:1", "h:1/x"]
)
def test_addresses_that_are_refused_without_a_token(listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RestFace(FakeEngine(), socket_path="/nonexistent", listen=listen)
    assert caught.value.remedy


async def test_any_address_with_a_token() -> None:
    engine = FakeEngine(admin_token="t")
    async with serving(engine, listen="0.0.0.0:0", admin_token="t") as rest:
        assert rest.face.address.startswith("0.0.0.0:")


async def test_a_tcp_port_that_is_taken(folder: Path) -> None:
    async with serving(listen=LISTEN) as rest:
        path = folder / "s"
        with pytest.raises(ConfigError, match="listen"):
            await RestFace(FakeEngine(), socket_path=str(path), listen=rest.face.address).start()
        assert not path.exists(), "a failed start leaves nothing"


async def over_tcp(rest: Rest, method: str, path: str, **headers: str) -> int:
    async with (
        aiohttp.ClientSession() as client,
        client.request(method, f"http://{rest.face.address}{path}", headers=headers) as response,
    ):
        return response.status


async def test_tcp_answers_its_own_names_alone(rest: Rest) -> None:
    port = rest.face.address.rpartition(":")[2]
    for host in (rest.face.address, f"localhost:{port}", f"[::1]:{port}", "127.0.0.1", socket.gethostname()):
        assert await over_tcp(rest, "GET", "/livez", Host=host) == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[::1", "127.0.0.1.evil"):
        assert await over_tcp(rest, "GET", "/livez", Host=host) == 403
    assert (await rest("GET", "/livez", headers={"Host": "anything"})).status == 200, "a Unix socket has no rebinding"


async def test_a_foreign_web_page_cannot_make_the_node_drain(rest: Rest) -> None:
    assert await over_tcp(rest, "POST", "/v1/drain", Origin="http://evil.example") == 403
    assert await over_tcp(rest, "POST", "/v1/drain", Origin="null") == 403
    assert not rest.engine.draining
    assert await over_tcp(rest, "DELETE", "/v1/drain", Origin=f"http://{rest.face.address}") == 204


# ------------------------------------------------------------------------------------------- health and bugs


async def test_health_says_why_not(rest: Rest) -> None:
    assert (await rest("GET", "/livez")).json == {"status": "ok", "reason": ""}
    rest.engine.live_reason = "the loop was late by 5 s"
    rest.engine.draining = True
    live, ready = await rest("GET", "/livez"), await rest("GET", "/readyz")
    assert (live.status, live.json["reason"]) == (503, "the loop was late by 5 s")
    assert (ready.status, ready.json) == (503, {"status": "failing", "reason": "draining"})


async def test_a_bug_is_answered_logged_and_survived(rest: Rest) -> None:
    rest.engine.fail_next("holds", RuntimeError("secret detail"))
    with capture_logs() as logs:
        reply = await rest("GET", "/v1/holds")
    assert (reply.status, reply.code) == (500, "internal")
    assert b"secret detail" not in reply.body
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["incident"] in reply.json["instance"]
    assert isinstance(entry["exc_info"], RuntimeError)
    assert (await rest("GET", "/v1/holds")).status == 200


async def test_what_is_no_http_is_refused_without_noise(rest: Rest, caplog: pytest.LogCaptureFixture) -> None:
    for rubbish in (
        b"\x16\x03\x01\x02\x00" * 50,
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nA" + b"a" * 100_000,
        b"\0" * 4096,
    ):
        reader, writer = await asyncio.open_unix_connection(rest.socket_path)
        writer.write(rubbish + b"\r\n\r\n")
        writer.write_eof()
        assert (await reader.read(12)) in (b"", b"HTTP/1.0 400", b"HTTP/1.1 400")
        writer.close()
    assert (await rest("GET", "/livez")).status == 200
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_every_error_travels_with_all_its_fields(rest: Rest) -> None:
    error = PeerLost("node b is gone", limit="5 s", remedy="wait", routes_tried=("tcp: reset", "local: not here"))
    rest.engine.fail_next("node", error)
    reply = await rest("GET", "/v1/nodes/b")
    assert reply.status == 502
    assert reply.json == {
        "type": "urn:xferd:error:peer_lost",
        "title": "Peer lost",
        "status": 502,
        "detail": "node b is gone",
        "code": "peer_lost",
        "limit": "5 s",
        "remedy": "wait",
        "retryable": True,
        "routes_tried": ["tcp: reset", "local: not here"],
    }
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.headers["Cache-Control"] == "no-store"


# ------------------------------------------------------------------------------------------- streams


async def test_bytes_are_streamed_both_ways(rest: Rest) -> None:
    """16 MiB go through in parts of at most 1 MiB, although a JSON body may have no more than 8 MiB."""
    token = await rest.session()
    payload = os.urandom(16 << 20)
    (region,) = await rest.allocate(token, len(payload))
    reply = await rest("PUT", f"/v1/regions/{region}/bytes", token=token, data=io.BytesIO(payload))
    assert reply.json == {"nbytes": len(payload)}
    assert rest.engine.calls.count("write_region") >= 16
    reply = await rest("GET", f"/v1/regions/{region}/bytes", token=token)
    assert reply.body == payload
    assert reply.headers["Content-Length"] == str(len(payload))


class Breaking(FakeEngine):
    """Loses the region after the first part of a read."""

    async def read_region(self, caller, region, offset, nbytes):  # type: ignore[no-untyped-def]
        yield bytes(1 << 20)
        raise PeerLost("gone in the middle")


async def test_a_read_that_breaks_never_looks_whole() -> None:
    async with serving(Breaking()) as rest:
        token = await rest.session()
        (region,) = await rest.allocate(token, 4 << 20)
        with pytest.raises(aiohttp.ClientPayloadError):
            await rest("GET", f"/v1/regions/{region}/bytes", token=token)
        assert (await rest("GET", "/livez")).status == 200


class Endless(FakeEngine):
    """Reads never end, and it is known when one was let go of."""

    async def read_region(self, caller, region, offset, nbytes):  # type: ignore[no-untyped-def]
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            self.cancelled.append("read_region")


async def test_a_client_that_hangs_up_in_a_read_lets_go_of_the_region() -> None:
    async with serving(Endless(pool_nbytes=1 << 40)) as rest:
        token = await rest.session()
        (region,) = await rest.allocate(token, 4096)
        rest.engine._regions[int(region)].info = replace(rest.engine._regions[int(region)].info, nbytes=1 << 40)
        head = f"GET /v1/regions/{region}/bytes HTTP/1.1\nHost: x\nAuthorization: Bearer {token}\n\n"
        reader, writer = await raw(rest.socket_path, head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()
        await rest.cancelled.has("read_region")


async def raw(path: str, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request.replace("\n", "\r\n").encode())
    return reader, writer


async def test_a_body_is_asked_for_only_once_its_sender_may_send_it(rest: Rest) -> None:
    """A client with Expect: 100-continue does not upload a gigabyte to learn that its token is wrong."""
    token = await rest.session()
    (region,) = await rest.allocate(token, 4096)
    head = f"PUT /v1/regions/{region}/bytes HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: %d\n"
    for authorization, length, first in (
        ("wrong", 4096, b"HTTP/1.1 401 "),
        (token, 1 << 30, b"HTTP/1.1 416 "),
        (token, 4096, b"HTTP/1.1 100 "),
    ):
        reader, writer = await raw(rest.socket_path, head % length + f"Authorization: Bearer {authorization}\n\n")
        assert (await reader.readline()).startswith(first)
        if b"100" in first:
            writer.write(b"y" * 4096)
            assert b"HTTP/1.1 200 OK\r\n" in [await reader.readline() for _ in range(2)]
        writer.close()
        await writer.wait_closed()
    assert rest.engine.data(int(region)) == b"y" * 4096


async def test_a_client_that_hangs_up_while_it_waits_takes_no_notification(rest: Rest) -> None:
    token = await rest.session("a")
    rest.engine.gate("notifications")
    request = f"GET /v1/notifications?timeout=60 HTTP/1.1\nHost: x\nAuthorization: Bearer {token}\n\n"
    _, writer = await raw(rest.socket_path, request)
    await rest.calls.has("notifications")
    writer.close()
    await writer.wait_closed()
    await rest.cancelled.has("notifications")


async def test_a_wait_ends_with_its_transfer(rest: Rest) -> None:
    token = await rest.session()
    source, target = await rest.allocate(token, 4096, 4096)
    rest.engine.paused = True
    spans = [{"columns": {"region": region, "offset": [0], "nbytes": 8}} for region in (source, target)]
    body = {"op": "WRITE", "local": spans[0], "remote": spans[1]}
    transfer = (await rest("POST", "/v1/transfers", body, token=token)).json["id"]
    assert (await rest("POST", f"/v1/transfers/{transfer}/wait", {"timeout_s": 0}, token=token)).json[
        "state"
    ] == "POSTED"
    waiting = asyncio.create_task(rest("POST", f"/v1/transfers/{transfer}/wait", {"timeout_s": 60}, token=token))
    await rest.calls.has("wait", 2)
    await rest.engine.finish(TransferId(transfer))
    assert (await waiting).json["state"] == "DONE"


async def test_what_a_transfer_may_say_reaches_the_daemon(rest: Rest) -> None:
    token = await rest.session()
    source, target = await rest.allocate(token, 4096, 4096)
    spans = [{"columns": {"region": region, "offset": [0], "nbytes": 8}} for region in (source, target)]
    body = {"op": "WRITE", "local": spans[0], "remote": spans[1], "hold": True}
    for options in ({}, {"durable": True}, {"verify": True}):
        made = (await rest("POST", "/v1/transfers", body | options, token=token)).json["id"]
        request = rest.engine._transfers[TransferId(made)].request
        assert {"durable": request.durable, "verify": request.verify} == {"durable": False, "verify": False} | options


@pytest.mark.slow
async def test_a_long_wait_keeps_its_session_alive(rest: Rest) -> None:
    """The session's token is shown again while its call waits."""
    token = await rest.session()
    before = rest.engine.calls.count("authenticate")
    assert (await rest("GET", "/v1/notifications?timeout=2.6", token=token)).json == {"notifications": []}
    assert rest.engine.calls.count("authenticate") >= before + 2


async def test_closing_does_not_wait_for_waits() -> None:
    engine = FakeEngine()
    async with serving(engine) as rest:
        token = await rest.session()
        waiting = asyncio.create_task(rest("GET", "/v1/notifications?timeout=600", token=token))
        await rest.calls.has("notifications")
        async with asyncio.timeout(10):
            await rest.face.aclose()
        with pytest.raises(aiohttp.ClientError):
            await waiting
    assert not engine.nothing_held(), "sessions are the engine's to end"
