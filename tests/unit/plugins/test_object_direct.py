"""Gets that the kernel puts in place, against servers that follow a script: what came, and what is left to obstore."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import re
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import uvloop
import xxhash

from xferd.api.errors import InvalidArgument
from xferd.plugins.object import ObjectBackend, ObjectOptions, addresses, direct as module
from xferd.plugins.object.connections import Connections
from xferd.plugins.object.digests import LEAF_NBYTES
from xferd.plugins.object.direct import Ask, DirectGets
from xferd.plugins.object.fetching import MAX_HEAD_NBYTES, Head, Range, Received
from xferd.plugins.object.nearness import FAR_S, Nearness
from xferd.plugins.object.options import StoreOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Script = Callable[["Server", asyncio.StreamReader, asyncio.StreamWriter, bytes], object]

DATA = np.random.default_rng(5).integers(0, 256, 3 * LEAF_NBYTES + 4321, dtype=np.uint8)


class Server:
    """Answers each request by a script; keeps what was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.heads: list[bytes] = []
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await self.script(self, reader, writer, head)
        writer.close()

    def drop_all(self) -> None:
        for writer in self._writers:
            writer.close()


@contextlib.asynccontextmanager
async def gets_from(script: Script, **more: object) -> AsyncIterator[tuple[DirectGets, Server]]:
    server = Server(script)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    section = {"url": "s3://b/pre", "endpoint": f"http://127.0.0.1:{port}", "allow_http": True, "anonymous": True}
    options = StoreOptions.model_validate(section | more)
    gets = DirectGets(None, options, asyncio.Semaphore(options.max_concurrency))
    try:
        yield gets, server
    finally:
        await gets.aclose()
        server.drop_all()
        listening.close()


def span_of(head: bytes) -> tuple[int, int]:
    found = re.search(rb"Range: bytes=(\d+)-(\d+)", head)
    assert found is not None
    return int(found[1]), int(found[2]) + 1


def answer(head: bytes, *, status: str = "206 Partial Content", fields: str = "", body: bytes | None = None) -> bytes:
    start, stop = span_of(head)
    data = DATA[start:stop].tobytes() if body is None else body
    lines = f"HTTP/1.1 {status}\r\nContent-Range: bytes {start}-{stop - 1}/{len(DATA)}\r\n{fields}"
    if "Content-Length" not in fields and "Transfer-Encoding" not in fields:
        lines += f"Content-Length: {len(data)}\r\n"
    return lines.encode() + b"\r\n" + data


async def well(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
    writer.write(answer(head, fields="x-amz-meta-XferdXXH3: 1048576:0\r\nETag: e\r\n"))
    await writer.drain()


def rows(into: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    table = np.array(spans, dtype=np.uint64)
    table[:, 0] += np.uint64(into.ctypes.data)
    return table


def whole(into: np.ndarray) -> np.ndarray:
    return rows(into, [(0, len(into))])


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  # what is waited for happens in memory that a kernel writes
        await asyncio.sleep(0.001)


async def get(gets: DirectGets, key: str, wanted: Range, etag: str, hashes: Callable[..., bool]) -> Received | None:
    [received] = await gets.get([Ask(key, etag, wanted, hashes)])
    return received


def never(_: object) -> bool:
    return False


@pytest.mark.parametrize(
    ("start", "sizes"),
    [
        (0, [len(DATA)]),
        (7, [1]),
        (100, [1] * 500),
        (5, [3, LEAF_NBYTES, 1, 2 * LEAF_NBYTES - 9, 77]),
        (LEAF_NBYTES, [4096] * 512),
        (0, [65] * 4000),
    ],
    ids=["all", "one byte", "single bytes", "odd", "pages", "more rows than a call takes"],
)
async def test_bytes_go_where_they_belong(start: int, sizes: list[int]) -> None:
    """In rows of any size, in any order of places, with nothing beside them touched."""
    places = np.cumsum([0, *(size + 3 for size in sizes)])
    order = np.random.default_rng(1).permutation(len(sizes))
    spans = [(int(places[at]), sizes[at]) for at in order]
    into = np.full(int(places[-1]), 0xEE, np.uint8)
    wanted, at = into.copy(), start
    for place, size in spans:
        wanted[place : place + size] = DATA[at : at + size]
        at += size
    async with gets_from(well) as (gets, server):
        received = await get(gets, "k", Range(start, at, rows(into, spans)), "", never)
        assert received is not None
        assert received.leaves is None
        assert received.attributes == {"xferdxxh3": "1048576:0"}
        assert (into == wanted).all()
        assert span_of(server.heads[0]) == (start, at)
        assert gets.gets == 1


async def test_digests_are_those_of_the_bytes() -> None:
    """One for each MiB, the last of what is left; asked for by what the object's metadata says."""
    into, seen = np.zeros(len(DATA), np.uint8), []

    def asked(attributes: object) -> bool:
        seen.append(attributes)
        return True

    cut = 12_345
    async with gets_from(well) as (gets, _):
        received = await get(gets, "k", Range(0, len(DATA), rows(into, [(0, cut), (cut, len(DATA) - cut)])), "", asked)
    assert received is not None
    assert received.leaves is not None
    pieces = [DATA[at : at + LEAF_NBYTES] for at in range(0, len(DATA), LEAF_NBYTES)]
    assert received.leaves.tolist() == [xxhash.xxh3_64_intdigest(piece.tobytes()) for piece in pieces]
    assert seen == [{"xferdxxh3": "1048576:0"}]


async def test_a_head_in_pieces_and_one_with_its_body() -> None:
    """How the answer is cut into packets changes nothing."""

    async def slowly(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
        text = answer(head)
        border = text.index(b"\r\n\r\n") + 8
        for first, last in itertools.pairwise([*range(0, border, 7), len(text)]):
            writer.write(text[first:last])
            await writer.drain()
            await asyncio.sleep(0)

    into = np.zeros(9000, np.uint8)
    async with gets_from(slowly) as (gets, _):
        assert await get(gets, "k", Range(50, 9050, whole(into)), "", never) is not None
    assert (into == DATA[50:9050]).all()


async def test_a_connection_is_used_again_and_one_that_ended_is_not() -> None:
    """One after the other takes one connection; a server that closes is met by a new one, and nothing rests for it."""
    into = np.zeros(4096, np.uint8)
    wanted = Range(0, 4096, whole(into))

    async def last(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(answer(head, fields="Connection: close\r\n" if len(server.heads) == 4 else ""))
        await writer.drain()

    async with gets_from(last) as (gets, server):
        for _ in range(3):
            assert await get(gets, "k", wanted, "", never) is not None
        assert server.connections == 1
        server.drop_all()
        await until(lambda: not gets._workers and len(gets._connections) == 0)
        assert await get(gets, "k", wanted, "", never) is not None
        assert server.connections == 2
        assert await get(gets, "k", wanted, "", never) is not None  # the one before said that it was the last
        assert server.connections == 3
        assert gets.gets == 5


def test_connections_are_used_again_on_the_loop_of_the_daemon() -> None:
    """uvloop makes what it watches non-blocking."""

    async def ask() -> None:
        into = np.zeros(3 * LEAF_NBYTES, np.uint8)
        async with gets_from(well) as (gets, server):
            for _ in range(5):
                into[:] = 0
                assert await get(gets, "k", Range(1, len(into) + 1, whole(into)), "", never) is not None
                assert (into == DATA[1 : len(into) + 1]).all()
            assert server.connections == 1

    uvloop.run(ask())


async def test_many_at_once_with_few_threads() -> None:
    """Those beyond wait for one, and every byte is where it belongs."""
    parts = [np.zeros(70_000, np.uint8) for _ in range(24)]
    async with gets_from(well, max_concurrency=4) as (gets, _):
        received = await asyncio.gather(
            *(
                get(gets, "k", Range(n * 1000, n * 1000 + 70_000, whole(into)), "", never)
                for n, into in enumerate(parts)
            )
        )
        assert all(received)
        assert gets.gets == 24
    assert all((into == DATA[n * 1000 : n * 1000 + 70_000]).all() for n, into in enumerate(parts))


def plainly(text: Callable[[bytes], bytes], *, ends: bool = False) -> Script:
    async def script(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(text(head))
        await writer.drain()
        if ends:
            writer.close()

    return script


@pytest.mark.parametrize(
    ("text", "is_left_alone"),
    [
        (lambda head: answer(head, status="200 OK"), True),
        (lambda head: answer(head, status="301 Moved Permanently", fields="Location: http://x/\r\n"), True),
        (lambda head: answer(head, status="403 Forbidden"), False),
        (lambda head: answer(head, status="412 Precondition Failed"), False),
        (lambda head: answer(head, status="429 Too Many Requests"), True),
        (lambda head: answer(head, status="503 Slow Down"), True),
        (lambda head: answer(head, body=b"short"), True),
        (lambda head: answer(head, body=b"too long" * 2000), True),
        (lambda head: answer(head).replace(b"bytes 10-", b"bytes 11-"), True),
        (lambda head: answer(head, fields="Transfer-Encoding: chunked\r\n", body=b"64\r\n" + bytes(100)), True),
        (lambda head: answer(head, fields="Content-Encoding: gzip\r\n"), True),
        (lambda head: answer(head) + b"more than was said", True),
        (lambda head: b"SSH-2.0-OpenSSH\r\n\r\n", True),
        (lambda head: b"HTTP/1.1 206 OK\r\nX: " + b"x" * MAX_HEAD_NBYTES, True),
        (lambda head: b"HTTP/1.1 206", True),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
async def test_anything_else_is_left_to_obstore(text: Callable[[bytes], bytes], is_left_alone: bool) -> None:
    """Nothing is raised and nothing said to be there; after what would not change soon it is not tried for a while."""
    into = np.zeros(100, np.uint8)
    wanted = Range(10, 110, whole(into))
    async with gets_from(plainly(text, ends=True)) as (gets, server):
        assert await get(gets, "k", wanted, "", never) is None
        assert gets.gets == 0
        asked = len(server.heads)
        server.script = well
        again = await get(gets, "k", wanted, "", never)
        assert (again is None) == is_left_alone
        assert len(server.heads) == asked + (not is_left_alone)


async def test_it_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST_S", 0.0)
    into = np.zeros(100, np.uint8)
    async with gets_from(plainly(lambda head: b"HTTP/1.1 500 Oops\r\n\r\n", ends=True)) as (gets, server):
        assert await get(gets, "k", Range(0, 100, whole(into)), "", never) is None
        server.script = well
        assert await get(gets, "k", Range(0, 100, whole(into)), "", never) is not None


async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        section = {"url": "s3://b", "endpoint": f"http://127.0.0.1:{sock.getsockname()[1]}", "allow_http": True}
        gets = DirectGets(None, StoreOptions.model_validate(section | {"anonymous": True}), asyncio.Semaphore(1))
        into = np.zeros(10, np.uint8)
        assert await get(gets, "k", Range(0, 10, whole(into)), "", never) is None
        await gets.aclose()


async def hang_in_body(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
    text = answer(head)
    writer.write(text[: len(text) // 2])
    await writer.drain()
    await reader.read()  # until the other end has gone
    writer.write(text[len(text) // 2 :])
    writer.close()


async def hang_in_head(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
    writer.write(b"HTTP/1.1 2")
    await reader.read()
    writer.close()


async def drip(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
    text = answer(head)
    for at in range(len(text)):
        writer.write(text[at : at + 1])
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("script", [hang_in_body, hang_in_head, drip])
async def test_the_time_for_all_of_it_is_bounded(script: Script) -> None:
    into = np.zeros(40_000, np.uint8)
    async with gets_from(script, request_timeout=0.4) as (gets, _):
        began = time.monotonic()
        assert await get(gets, "k", Range(0, 40_000, whole(into)), "", never) is None
        assert time.monotonic() - began >= 0.4
        assert await asyncio.wait_for(get(gets, "k", Range(0, 40_000, whole(into)), "", never), 0.3) is None  # at rest


async def test_the_time_is_for_all_of_it_and_not_for_each_part() -> None:
    """Each MiB comes in less than the time for the request, and all of them take longer."""

    async def in_parts(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
        text = answer(head)
        for at in range(0, len(text), LEAF_NBYTES):
            writer.write(text[at : at + LEAF_NBYTES])
            await writer.drain()
            await asyncio.sleep(0.3)

    into = np.zeros(3 * LEAF_NBYTES, np.uint8)
    async with gets_from(in_parts, request_timeout=0.5) as (gets, _):
        assert await get(gets, "k", Range(0, len(into), whole(into)), "", never) is None


async def test_a_server_that_hangs_is_not_asked_for_the_rest() -> None:
    """Those that wait go another way at once: each would take the whole time."""
    into = np.zeros(5000, np.uint8)
    asks = [Ask("k", "", Range(n * 1000, n * 1000 + 1000, rows(into, [(n * 1000, 1000)])), never) for n in range(5)]
    async with gets_from(hang_in_head, max_concurrency=1, request_timeout=0.2) as (gets, server):
        assert await gets.get(asks) == [None] * 5
        assert len(server.heads) == 1


@pytest.mark.parametrize("script", [hang_in_body, hang_in_head])
@pytest.mark.parametrize("way", ["cancel", "close"])
async def test_broken_off(script: Script, way: str) -> None:
    """Once it is over nothing is put in place, whatever the server still sends; and others go on."""
    into = np.zeros(2 * LEAF_NBYTES, np.uint8)
    async with gets_from(script) as (gets, server):
        task = asyncio.create_task(get(gets, "k", Range(0, len(into), whole(into)), "", never))
        await until(lambda: bool(server.heads) and (script is hang_in_head or bool(into.any())))
        async with asyncio.timeout(10):  # of the 30 s that the request may take
            if way == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await gets.aclose()
                assert await task is None
        left = into.copy()
        server.script = well
        other = np.zeros(50, np.uint8)
        received = await get(gets, "k", Range(0, 50, whole(other)), "", never)
        assert (received is not None) == (way == "cancel")
        assert (into == left).all()


async def test_a_far_store_has_more_requests_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A near one is asked by few threads; once answers are seen to take long, all that may ask do."""
    under_way, peaks = 0, []

    def slowly(delay_s: float) -> Script:
        async def script(server: Server, reader: object, writer: asyncio.StreamWriter, head: bytes) -> None:
            nonlocal under_way
            under_way += 1
            peaks.append(under_way)
            await asyncio.sleep(delay_s)
            under_way -= 1
            writer.write(answer(head))
            await writer.drain()

        return script

    into = np.zeros(64 * 100, np.uint8)
    asks = [Ask("k", "", Range(n * 100, n * 100 + 100, rows(into, [(n * 100, 100)])), never) for n in range(64)]
    monkeypatch.setattr("xferd.plugins.object.nearness.NEAR_S", 60.0)
    async with gets_from(slowly(0.0), max_concurrency=12) as (gets, _):
        assert all(await gets.get(asks))
        assert max(peaks) <= module.NEAR_THREADS
    peaks.clear()
    monkeypatch.setattr("xferd.plugins.object.nearness.NEAR_S", 0.002)
    async with gets_from(slowly(0.05), max_concurrency=12) as (gets, _):
        assert all(await gets.get(asks))
        assert max(peaks) == 12
    assert (into == DATA[: len(into)]).all()


async def test_other_requests_of_the_store_get_a_turn() -> None:
    """Reads that never end must not keep a write from ever beginning."""
    into = np.zeros(100 * 100, np.uint8)
    asks = [Ask("k", "", Range(n * 100, n * 100 + 100, rows(into, [(n * 100, 100)])), never) for n in range(100)]
    async with gets_from(well, max_concurrency=1) as (gets, _):
        reading = asyncio.create_task(gets.get(asks))
        await until(lambda: gets._slots.locked())
        async with gets._slots:
            assert not reading.done()
            assert into[-1] == 0
        assert all(await reading)
    assert (into == DATA[: len(into)]).all()


async def test_a_bug_leaves_no_connection_that_is_out_of_step() -> None:
    """What is raised in a thread ends the range, and the next one has a connection of its own."""

    def broken(_: object) -> bool:
        raise ZeroDivisionError

    into = np.zeros(1000, np.uint8)
    async with gets_from(well) as (gets, server):
        assert await get(gets, "k", Range(0, 1000, whole(into)), "", never) is not None
        raised: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context["exception"]))
        assert await get(gets, "k", Range(0, 1000, whole(into)), "", broken) is None
        assert await get(gets, "k", Range(50, 1050, whole(into)), "", never) is not None
        assert (into == DATA[50:1050]).all()
        assert server.connections == 2
        gc.collect()
        assert [type(error) for error in raised] == [ZeroDivisionError]


def test_nearness() -> None:
    """One late answer decides nothing, one that took far longer or several do; after a while it is looked at again."""
    nearness = Nearness()
    mib, allowed = 1 << 20, 0.002 + (1 << 20) / 200e6
    assert nearness.is_near(0.0)
    for _ in range(100):
        assert not nearness.note(mib, allowed * 0.9, 0.0)
    assert not nearness.note(mib, allowed * 1.2, 0.0)
    for _ in range(50):
        assert not nearness.note(mib, allowed * 0.2, 0.0)
    assert not nearness.note(mib, allowed * 3, 0.0)
    assert nearness.note(mib, allowed * 3, 10.0)
    assert not nearness.is_near(10.0)
    assert not nearness.note(mib, allowed * 9, 11.0)  # known already
    assert nearness.is_near(10.0 + FAR_S)
    assert nearness.note(100, 0.05, 10.0 + FAR_S)
    assert not nearness.is_near(11.0 + FAR_S)


async def test_who_is_cancelled_takes_nothing_from_others() -> None:
    """What another one waits for behind it still comes."""
    mine, other = np.zeros(1000, np.uint8), np.zeros(500, np.uint8)
    asks = [Ask("k", "", Range(0, 1000, whole(mine)), never)] * 3
    async with gets_from(hang_in_head, max_concurrency=1) as (gets, server):
        task = asyncio.create_task(gets.get(asks))
        await until(lambda: bool(server.heads))
        behind = asyncio.create_task(get(gets, "k", Range(7, 507, whole(other)), "", never))
        await until(lambda: len(gets._waiting) == 3)
        server.script = well
        task.cancel()
        async with asyncio.timeout(10):
            assert await behind is not None
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(server.heads) == 2
    assert (other == DATA[7:507]).all()
    assert not mine.any()


async def test_a_backend_closes_what_its_stores_have_and_checks_keys() -> None:
    section = {"url": "s3://b", "endpoint": "http://127.0.0.1:9", "allow_http": True, "anonymous": True}
    backend = ObjectBackend(ObjectOptions.model_validate({"stores": {"s": section}}))
    await backend.start()
    store = backend._stores["s"]
    assert store.direct is not None
    into = np.zeros(10, np.uint8)
    with pytest.raises(InvalidArgument):
        await store.get_into([Ask("../k", "", Range(0, 10, whole(into)), never)])
    await backend.aclose()
    assert store.direct._is_closed


async def test_memory_that_is_not_there_is_left_to_the_other_way() -> None:
    """It finds the same, by a copy that can say which memory."""
    async with gets_from(well) as (gets, _):
        nowhere = np.array([[4096, 100]], dtype=np.uint64)
        assert await get(gets, "k", Range(0, 100, nowhere), "", never) is None


async def test_what_is_asked() -> None:
    """Path, version and range; a key of any characters is one line."""
    into = np.zeros(10, np.uint8)
    async with gets_from(well) as (gets, server):
        key = "a b/ü\r\nX: y?&=%"
        assert await get(gets, key, Range(5, 15, whole(into)), '"etag"', never) is not None
        lines = server.heads[0].decode().split("\r\n")
        assert lines[0] == "GET /b/pre/a%20b/%C3%BC%0D%0AX%3A%20y%3F%26%3D%25 HTTP/1.1"
        assert "Range: bytes=5-14" in lines
        assert 'If-Match: "etag"' in lines
        assert await get(gets, "k", Range(5, 15, whole(into)), "x\r\nY: z", never) is None
        assert len(server.heads) == 1


async def test_an_address_is_signed_once_for_a_while_and_anew_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = []

    async def sign(client: object, method: str, key: str, expires_in: object) -> str:
        signed.append(key)
        return f"http://{port}/b/{key}?sig={len(signed)}"

    monkeypatch.setattr(addresses.obstore, "sign_async", sign)
    into = np.zeros(10, np.uint8)
    async with gets_from(well, anonymous=False) as (gets, server):
        port = gets._addresses._endpoint.netloc
        for _ in range(3):
            assert await get(gets, "k", Range(0, 10, whole(into)), "", never) is not None
        assert signed == ["k"]
        server.script = plainly(lambda head: answer(head, status="403 Forbidden"), ends=True)
        assert await get(gets, "k", Range(0, 10, whole(into)), "", never) is None
        server.script = well
        assert await get(gets, "k", Range(0, 10, whole(into)), "", never) is not None
        assert signed == ["k", "k"]
        assert b"GET /b/k?sig=2 HTTP/1.1" in server.heads[-1]
        monkeypatch.setattr(addresses, "SIGNED_ANEW_S", 0.0)
        monkeypatch.setattr(addresses, "MAX_SIGNED", 1)
        assert await get(gets, "other", Range(0, 10, whole(into)), "", never) is not None
        assert list(gets._addresses._signed) == ["other"]

        async def refuse(*_: object) -> str:
            raise PermissionError("no credentials")

        monkeypatch.setattr(addresses.obstore, "sign_async", refuse)
        assert await get(gets, "k", Range(0, 10, whole(into)), "", never) is None


def test_for_which_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def is_for(**section: object) -> bool:
        return DirectGets.is_for(StoreOptions.model_validate({"allow_http": True} | section))

    plain = {"url": "s3://b", "endpoint": "http://127.0.0.1:9"}
    assert is_for(**plain)
    assert not is_for(**plain, direct_gets=False)
    assert not is_for(url="s3://b", endpoint="https://127.0.0.1:9")
    assert not is_for(url="s3://b")
    assert not is_for(url="memory:///")
    assert not is_for(url="gs://b", endpoint="http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert not is_for(**plain)


async def test_connections_that_rest_are_closed_after_a_while_or_when_the_server_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xferd.plugins.object.connections.IDLE_S", 0.05)
    connections = Connections()
    ends = [socket.socketpair() for _ in range(4)]
    connections.keep(ends[0][0])
    await asyncio.sleep(0.02)  # what follows is about passing time
    for mine, _ in ends[1:]:
        connections.keep(mine)
    assert connections.take() is ends[3][0]  # the one used last
    ends[2][1].close()
    await until(lambda: ends[2][0].fileno() == -1)
    assert len(connections) == 2
    await until(lambda: len(connections) == 1)
    assert ends[0][0].fileno() == -1
    await until(lambda: len(connections) == 0)
    assert ends[1][0].fileno() == -1
    connections.keep(ends[3][0])
    ends[3][1].send(b"out of turn")
    assert connections.take() is None
    connections.close()
    for mine, other in ends:
        mine.close()
        other.close()


def test_heads() -> None:
    head = Head(b"HTTP/1.1 206\r\nCONTENT-RANGE:bytes 5-9/100\r\ncontent-length: 5")
    assert head.brings(5, 10)
    assert not head.brings(5, 11)
    assert not head.is_last
    assert Head(b"HTTP/1.0 200 OK\r\n").is_last
    assert Head(b"HTTP/1.1 200 OK\r\nconnection: Close").is_last
    for rubbish in (b"", b"HTTP/2 200", b"HTTP/1.1 abc", b"HTTP/1.1 2000 x"):
        with pytest.raises(ConnectionError):
            Head(rubbish)
