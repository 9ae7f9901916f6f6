"""The object backend against a server that speaks S3, with faults in between."""

from __future__ import annotations

import asyncio
import itertools
import os
import traceback
from contextlib import asynccontextmanager

import numpy as np
import pytest
from check_backend import assert_same, pattern
from fault_proxy import Rule, fault_proxy
from s3_server import ACCESS_KEY, SECRET_KEY, s3_server, write_credentials

from xferd.api.errors import (
    Closed,
    ConfigError,
    IntegrityError,
    InvalidArgument,
    MoveFailed,
    NotFound,
    Overloaded,
    PermissionDenied,
    ShortTransfer,
    Stale,
    Unauthenticated,
    XferdError,
)
from xferd.plugins.base import Chunk, Extent, LegScope, MappedSpace, ObjectSpace, ObjectsSpace, ObjectVersion
from xferd.plugins.object import ObjectBackend, ObjectOptions

MIB = 1 << 20
BUCKET = "xferd-test"


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        running.create_bucket(BUCKET)
        yield running


@pytest.fixture(autouse=True)
def credentials(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    write_credentials(str(path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    return path


@asynccontextmanager
async def backend_of(*, stores=None, **options):
    backend = ObjectBackend(ObjectOptions.model_validate({"stores": stores, **options}))
    await backend.start()
    try:
        yield backend
        assert backend.read_budget.used_nbytes == 0
        assert backend.write_budget.used_nbytes == 0
        assert backend.statistics().busy == 0
    finally:
        await backend.aclose()


def store_of(server, **more):
    return {"s3": server.store_section(BUCKET, **more)}


@pytest.fixture(params=[True, False], ids=["direct", "collected"])
def direct_gets(request, monkeypatch):
    """Both ways of what a store sends; the short cut is tried each time, whatever came of it before."""
    monkeypatch.setattr("xferd.plugins.object.direct.REST_S", 0.0)
    return request.param


def memory(nbytes, seed=1):
    data = pattern(nbytes, seed).copy()
    return data, Extent(MappedSpace(), np.array([[data.ctypes.data, nbytes]], dtype=np.uint64))


def scattered(data, spans):
    iov = np.array(spans, dtype=np.uint64)
    iov[:, 0] += np.uint64(data.ctypes.data)
    return Extent(MappedSpace(), iov)


async def region_of(backend, key, nbytes=0, store="s3"):
    facts = await backend.find_object(store, key)
    version = ObjectVersion(facts.etag, facts.nbytes) if facts else ObjectVersion()
    return ObjectSpace(store, key, nbytes or version.nbytes, version)


def spans_of(space, spans=None):
    return Extent(space, np.array(spans or [(0, space.nbytes)], dtype=np.uint64))


def chunk_of(source, target, transfer="t1"):
    return Chunk(source, target, source.nbytes, transfer, "cause", "agent")


async def write(backend, source, target, *, chunk_nbytes=4 * MIB, at_once=8, is_known=True):
    """Move a leg as the runner has to: open, chunks several at once but started in order, commit; abort on failure."""
    source, target = backend.arrange(source, target)
    scope = LegScope(source if is_known else None, target, source.nbytes, "t1", "cause", "agent")
    leg = await backend.open_leg(scope)
    gate = asyncio.Semaphore(at_once)

    async def one(start):
        async with gate:
            stop = min(start + chunk_nbytes, source.nbytes)
            await leg.move(chunk_of(source.cut(start, stop), target.cut(start, stop)))

    tasks = [asyncio.ensure_future(one(start)) for start in range(0, source.nbytes, chunk_nbytes)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await leg.abort()
        raise
    await leg.commit()


async def error_of(work):
    with pytest.raises(XferdError) as caught:
        await work
    return caught.value


# ------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("nbytes", [1, 4096, 3 * MIB + 5, 8 * MIB, 8 * MIB + 1, 21 * MIB + 77])
@pytest.mark.parametrize("is_known", [True, False], ids=["memory", "staged"])
async def test_write_then_read_back(server, nbytes, is_known):
    """What is written is there byte for byte by other means, and is read back through the same region."""
    async with backend_of(stores=store_of(server)) as backend:
        data, source = memory(nbytes)
        space = await region_of(backend, f"wrb/{nbytes}", nbytes)
        await write(backend, source, spans_of(space), is_known=is_known)
        assert_same(np.frombuffer(server.get(BUCKET, space.key), dtype=np.uint8), data)
        assert server.unfinished_uploads(BUCKET) == 0
        into, target = memory(nbytes, seed=2)
        assert await backend.move(chunk_of(spans_of(space), target)) == nbytes
        assert_same(into, data)
        assert backend.verified_reads == (1 if is_known or nbytes <= 4 * MIB else 0)  # a chunk


async def test_write_from_scattered_memory_in_any_order(server):
    """The rows of an object may come in any order; the planner's ``arrange`` puts them in the object's."""
    async with backend_of(stores=store_of(server), part="5MiB") as backend:
        nbytes, row = 12 * MIB, 48 * 1024
        data, _ = memory(2 * nbytes)
        order = np.random.default_rng(3).permutation(nbytes // row)
        source = scattered(data, [(int(n) * 2 * row, row) for n in range(len(order))])
        space = await region_of(backend, "scattered", nbytes)
        target = spans_of(space, [(int(n) * row, row) for n in order])
        await write(backend, source, target, chunk_nbytes=3 * MIB + 1)
        expected = np.empty(nbytes, dtype=np.uint8)
        for n, place in enumerate(order):
            expected[place * row : (place + 1) * row] = data[n * 2 * row : n * 2 * row + row]
        assert_same(np.frombuffer(server.get(BUCKET, "scattered"), dtype=np.uint8), expected)


async def test_scattered_read_merges_neighbours(server, direct_gets):
    """Rows near each other take one request; far ones take their own; bytes land in list order."""
    data = pattern(9 * MIB, 5)
    server.put(BUCKET, "ranges", data.tobytes())
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(
            stores=store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint), merge_gap="64KiB"
        ) as backend,
    ):
        space = await region_of(backend, "ranges")
        proxy.requests.clear()
        rows = [(4 * MIB, 1000), (10, 100), (4 * MIB + 5000, 7), (200, 50), (8 * MIB, 4096), (10, 3)]
        into = np.zeros(10_000, dtype=np.uint8)
        total = sum(size for _, size in rows)
        await backend.move(chunk_of(spans_of(space, rows), scattered(into, [(1, 600), (2000, total - 600)])))
        stream = np.concatenate([data[at : at + size] for at, size in rows])
        assert_same(into[1:601], stream[:600])
        assert_same(into[2000 : 2000 + total - 600], stream[600:])
        assert not into[601:2000].any()
        assert [method for method, _ in proxy.requests] == ["GET"] * 3


async def test_checksum_is_verified(server, direct_gets):
    """A whole read of what is not what was written is an error that names the object, and is counted."""
    async with backend_of(stores=store_of(server, direct_gets=direct_gets)) as backend:
        _, source = memory(3 * MIB)
        space = await region_of(backend, "sum", 3 * MIB)
        await write(backend, source, spans_of(space))
        written = (await backend._store("s3").get("sum", 0, 1, "")).attributes["xferdxxh3"]
        server.put(BUCKET, "sum", bytes(3 * MIB), {"x-amz-meta-xferdxxh3": written})
        changed = await region_of(backend, "sum")
        _, target = memory(3 * MIB, 2)
        error = await error_of(backend.move(chunk_of(spans_of(changed), target)))
        assert isinstance(error, IntegrityError)
        assert "'sum'" in error.message
        leg = await backend.open_leg(LegScope(spans_of(changed), target, 3 * MIB, "t", "c"))
        for start in (2 * MIB, 0, MIB):
            await leg.move(chunk_of(spans_of(changed, [(start, MIB)]), target.cut(start, start + MIB)))
        assert isinstance(await error_of(leg.commit()), IntegrityError)
        assert backend.statistics().integrity_failures == 2
        _, part = memory(100)
        await backend.move(chunk_of(spans_of(changed, [(5, 100)]), part))  # a part cannot be verified


async def test_many_objects_are_read_as_one_leg_and_verified_each(server, direct_gets):
    """Chunks of several objects, and an object in several chunks: bytes in place; one that was changed is named."""
    sizes = [MIB + 7, 300_000, 3 * MIB, 1, 2 * MIB]
    async with backend_of(stores=store_of(server, direct_gets=direct_gets), read_range="1MiB") as backend:
        wholes = []
        for n, size in enumerate(sizes):
            data, source = memory(size, n)
            await write(backend, source, spans_of(await region_of(backend, f"many{n}", size)))
            wholes.append(data)

        async def read():
            members = tuple([await region_of(backend, f"many{n}") for n in range(len(sizes))])
            iov = np.array([(0, size) for size in sizes], dtype=np.uint64)
            source = Extent(ObjectsSpace("s3", members), iov, np.arange(len(sizes), dtype=np.uint64))
            data, target = memory(sum(sizes), 77)
            leg = await backend.open_leg(LegScope(source, target, sum(sizes), "t", "c"))
            cuts = [0, sizes[0] + sizes[1] + MIB, sizes[0] + sizes[1] + 2 * MIB, sum(sizes)]
            moves = [leg.move(chunk_of(source.cut(a, b), target.cut(a, b))) for a, b in itertools.pairwise(cuts)]
            await asyncio.gather(*moves)
            assert_same(data, np.concatenate(wholes))
            await leg.commit()
            assert await backend.move(chunk_of(source, target)) == sum(sizes)  # without a leg

        await read()
        assert backend.verified_reads == 2 * len(sizes)
        written = (await backend._store("s3").get("many2", 0, 1, "")).attributes["xferdxxh3"]
        wholes[2][MIB + 5] ^= 1
        server.put(BUCKET, "many2", wholes[2].tobytes(), {"x-amz-meta-xferdxxh3": written})
        error = await error_of(read())
        assert isinstance(error, IntegrityError)
        assert "'many2'" in error.message


async def test_memory_that_changes_while_it_is_sent(server):
    """An upload whose source is written to meanwhile would carry a checksum of other bytes: it is dropped."""
    async with backend_of(stores=store_of(server)) as backend:
        data, source = memory(20 * MIB)
        space = await region_of(backend, "racy", 20 * MIB)
        leg = await backend.open_leg(LegScope(source, spans_of(space), 20 * MIB, "t", "c"))
        for start in (0, 10 * MIB):
            part = start, start + 10 * MIB
            await leg.move(chunk_of(source.cut(*part), spans_of(space).cut(*part)))
            data[19 * MIB] ^= 1
        assert isinstance(await error_of(leg.commit()), IntegrityError)
        assert server.unfinished_uploads(BUCKET) == 0
        assert await backend.find_object("s3", "racy") is None


# ------------------------------------------------------------------------------------------ wholes


async def test_part_of_an_object_is_refused(server):
    """A write of less than the whole is refused, says so, and leaves the object alone."""
    async with backend_of(stores=store_of(server)) as backend:
        server.put(BUCKET, "kept", b"k" * 8192)
        space = await region_of(backend, "kept")
        _, source = memory(4096)
        target = spans_of(space, [(4096, 4096)])
        for work in (
            backend.move(chunk_of(source, target)),
            backend.open_leg(LegScope(source, target, 4096, "t", "c")),
        ):
            error = await error_of(work)
            assert isinstance(error, InvalidArgument)
            assert "as a whole" in error.message
        with pytest.raises(InvalidArgument, match="as a whole"):
            backend.arrange(source, target)
        _, twice = memory(8192 + 10)
        with pytest.raises(InvalidArgument, match="as a whole"):
            backend.arrange(twice, spans_of(space, [(0, 8192), (100, 10)]))
        assert server.get(BUCKET, "kept") == b"k" * 8192


async def test_readers_see_the_old_or_the_new(server):
    """Until the commit the old object is whole, and the region that was pinned to it is stale afterwards."""
    async with backend_of(stores=store_of(server), part="5MiB") as backend:
        server.put(BUCKET, "swap", b"o" * 100)
        old = await region_of(backend, "swap")
        space = await region_of(backend, "swap", 16 * MIB)
        data, source = memory(16 * MIB)
        leg = await backend.open_leg(LegScope(source, spans_of(space), 16 * MIB, "t", "c"))
        await leg.move(chunk_of(source, spans_of(space)))
        _, target = memory(100, 2)
        await backend.move(chunk_of(spans_of(old), target))
        await leg.commit()
        assert isinstance(await error_of(backend.move(chunk_of(spans_of(old), target))), Stale)
        assert_same(np.frombuffer(server.get(BUCKET, "swap"), dtype=np.uint8), data)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
async def test_abort_leaves_no_parts(server, moved):
    """Whatever was moved before, an aborted leg leaves neither parts nor an object."""
    async with backend_of(stores=store_of(server), part="5MiB") as backend:
        _, source = memory(20 * MIB)
        space = await region_of(backend, f"abort/{moved}", 20 * MIB)
        leg = await backend.open_leg(LegScope(None, spans_of(space), 20 * MIB, "t", "c"))
        for n in range(moved):
            cut = n * 6 * MIB, (n + 1) * 6 * MIB
            await leg.move(chunk_of(source.cut(*cut), spans_of(space).cut(*cut)))
        await leg.abort()
        assert server.unfinished_uploads(BUCKET) == 0
        assert await backend.find_object("s3", space.key) is None
        assert backend.uploads_left_behind == 0


@pytest.mark.parametrize("blocked", ["uploads", "partNumber=1&", "partNumber=3&"])
async def test_cancelled_upload_leaves_no_parts(server, blocked):
    """Cancelled while a request of the upload is under way, also the very first, nothing is left in the bucket."""
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, endpoint=proxy.endpoint), part="5MiB") as backend,
    ):
        _, source = memory(30 * MIB)
        space = await region_of(backend, f"cancel/{blocked}", 30 * MIB)
        action = "delay" if blocked == "uploads" else "hang"
        method = "POST" if blocked == "uploads" else "PUT"
        rule = Rule(action, lambda m, t: m == method and blocked in t, delay_s=0.3)
        proxy.rules.append(rule)
        task = asyncio.ensure_future(write(backend, source, spans_of(space)))
        async with asyncio.timeout(20):
            await rule.first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert server.unfinished_uploads(BUCKET) == 0
        assert await backend.find_object("s3", space.key) is None


async def test_a_later_chunk_fails_with_the_earlier_one(server):
    """Chunks that wait for their turn do not wait for ever when the one before them has failed."""
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, endpoint=proxy.endpoint, max_retries=0), part="5MiB") as backend,
    ):
        proxy.rules.append(Rule("answer", lambda m, t: "partNumber=2" in t, status=500))
        _, source = memory(60 * MIB)
        space = await region_of(backend, "failing", 60 * MIB)
        async with asyncio.timeout(20):
            assert isinstance(await error_of(write(backend, source, spans_of(space), at_once=12)), MoveFailed)
        assert server.unfinished_uploads(BUCKET) == 0


# ------------------------------------------------------------------------------------------ faults


async def test_changed_between_two_ranges(server, direct_gets):
    """The version is pinned when the object is registered: a range of another one is an error, not other bytes."""
    async with backend_of(stores=store_of(server, direct_gets=direct_gets)) as backend:
        server.put(BUCKET, "moving", b"a" * 8192)
        space = await region_of(backend, "moving")
        into, target = memory(8192, 2)
        await backend.move(chunk_of(spans_of(space, [(0, 4096)]), target.cut(0, 4096)))
        server.put(BUCKET, "moving", b"b" * 8192)
        second = backend.move(chunk_of(spans_of(space, [(4096, 4096)]), target.cut(4096, 8192)))
        assert isinstance(await error_of(second), Stale)
        assert bytes(into[:4096]) == b"a" * 4096
        assert_same(into[4096:], pattern(8192, 2)[4096:])


async def test_shorter_than_the_read(server, direct_gets):
    """A read past the end is a short transfer, also where no version is pinned."""
    async with backend_of(stores=store_of(server, direct_gets=direct_gets)) as backend:
        server.put(BUCKET, "short", b"s" * 1000)
        for start in (500, 5000):
            space = ObjectSpace("s3", "short", 10_000, ObjectVersion("", 10_000))
            _, target = memory(1000, 2)
            error = await error_of(backend.move(chunk_of(spans_of(space, [(start, 1000)]), target)))
            assert isinstance(error, ShortTransfer), error


async def test_slow_down_and_cuts_are_tried_again(server, direct_gets):
    """503, resets, and answers that are cut short are tried again within the bounds, and then the bytes are right."""
    data = pattern(3 * MIB, 9)
    server.put(BUCKET, "tried", data.tobytes())
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint, max_retries=5)) as backend,
    ):
        space = await region_of(backend, "tried")
        slow = b"<Error><Code>SlowDown</Code></Error>"
        faults = (Rule("answer", times=2, status=503, body=slow), Rule("reset", times=1), Rule("cut", times=1))
        for rule in faults:
            proxy.rules[:] = [rule]
            rule.after_nbytes = 100_000
            into, target = memory(3 * MIB, 2)
            await backend.move(chunk_of(spans_of(space), target))
            assert rule.struck
            assert_same(into, data)


async def test_faults_that_stay(server, direct_gets):
    """What does not get better is a typed error within the bounds, with a cause, and nothing was put in place."""
    server.put(BUCKET, "bad", bytes(1 * MIB))
    async with fault_proxy(server.port) as proxy:
        section = store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint, max_retries=1, request_timeout=0.5)
        async with backend_of(stores=section) as backend:
            space = await region_of(backend, "bad")
            for rule, expected in (
                (Rule("answer", status=503, body=b"<Error><Code>SlowDown</Code></Error>"), Overloaded),
                (Rule("answer", status=500), MoveFailed),
                (Rule("reset"), MoveFailed),
                (Rule("hang"), MoveFailed),
                (Rule("cut", after_nbytes=1000), MoveFailed),
                (Rule("answer", status=403, body=b"<Error><Code>AccessDenied</Code></Error>"), PermissionDenied),
                (Rule("answer", status=403, body=b"<Error><Code>InvalidAccessKeyId</Code></Error>"), Unauthenticated),
                (
                    Rule("answer", status=403, body=b"<Error><Code>SignatureDoesNotMatch</Code></Error>"),
                    Unauthenticated,
                ),
                (Rule("answer", status=400, body=b"<Error><Code>ExpiredToken</Code></Error>"), Unauthenticated),
                (Rule("answer", status=401), Unauthenticated),
                (Rule("answer", status=404, body=b"<Error><Code>NoSuchBucket</Code></Error>"), NotFound),
                (Rule("answer", status=404, body=b"<Error><Code>NoSuchKey</Code></Error>"), NotFound),
            ):
                proxy.rules[:] = [rule]
                into, target = memory(1 * MIB, 2)
                async with asyncio.timeout(10):
                    error = await error_of(backend.move(chunk_of(spans_of(space), target)))
                assert type(error) is expected, (rule, error)
                assert error.__cause__ is not None
                whole = 1000 if rule.action == "cut" else 0  # what came may be in place, and nothing else is
                assert_same(into[whole:], pattern(1 * MIB, 2)[whole:])


async def test_cancelled_read_of_an_endpoint_that_hangs(server, direct_gets):
    """Cancelling does not wait for the endpoint."""
    server.put(BUCKET, "hang", bytes(100))
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint)) as backend,
    ):
        space = await region_of(backend, "hang")
        rule = Rule("hang")
        proxy.rules.append(rule)
        into, target = memory(100, 2)
        task = asyncio.ensure_future(backend.move(chunk_of(spans_of(space), target)))
        await rule.first.wait()
        task.cancel()
        async with asyncio.timeout(1):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert_same(into, pattern(100, 2))


async def test_absent_bucket(server, direct_gets):
    """An absent bucket is NotFound, whatever is asked of it."""
    async with backend_of(stores={"none": server.store_section("no-such-bucket", direct_gets=direct_gets)}) as backend:
        _, memory_side = memory(100)
        space = ObjectSpace("none", "key", 100, ObjectVersion("", 100))
        assert isinstance(await error_of(backend.move(chunk_of(spans_of(space), memory_side))), NotFound)
        assert isinstance(await error_of(backend.move(chunk_of(memory_side, spans_of(space)))), NotFound)
        assert isinstance(await error_of(backend.list_objects("none", "", "", 10)), NotFound)
        assert isinstance(await error_of(backend.delete_objects("none", ["key"])), NotFound)
        assert isinstance(await error_of(backend.find_object("other", "key")), NotFound)


async def test_what_is_in_flight_is_bounded(server, direct_gets):
    """However many transfers ask at once, no more bytes and no more requests are under way than configured."""
    data = pattern(4 * MIB, 3)
    server.put(BUCKET, "busy", data.tobytes())
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(
            stores=store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint, max_concurrency=3),
            read_memory="4MiB",
            read_range="1MiB",
            write_memory="16MiB",
            part="5MiB",
        ) as backend,
    ):
        space = await region_of(backend, "busy")
        proxy.peak = 0
        reads = [memory(4 * MIB, 2) for _ in range(12)]
        await asyncio.gather(*(backend.move(chunk_of(spans_of(space), target)) for _, target in reads))
        for into, _ in reads:
            assert_same(into, data)
        assert proxy.peak <= 3
        if direct_gets:  # the bytes are in no memory of the backend's
            assert backend.read_budget.peak_nbytes == 0
            assert backend._store("s3").direct.gets == 48
        else:
            assert 0 < backend.read_budget.peak_nbytes <= 4 * MIB
        spaces = [await region_of(backend, f"busy/{n}", 11 * MIB) for n in range(4)]
        _, source = memory(11 * MIB)
        await asyncio.gather(*(write(backend, source, spans_of(target)) for target in spaces))
        assert 0 < backend.write_budget.peak_nbytes <= 16 * MIB


async def test_uploads_never_wait_for_each_other(server):
    """Chunks of many uploads in turn, with few slots and memory for one upload: all of them come to their end."""
    async with backend_of(stores=store_of(server), write_memory="15MiB", part="5MiB", upload_parts=1) as backend:
        nbytes, step, slots = 14 * MIB, 3 * MIB, asyncio.Semaphore(3)
        _, source = memory(nbytes)
        legs, starts = [], []
        for n in range(5):
            target = spans_of(await region_of(backend, f"turns/{n}", nbytes))
            legs.append((target, await backend.open_leg(LegScope(source, target, nbytes, f"t{n}", "c"))))
        for start in range(0, nbytes, step):
            starts += [(start, *leg) for leg in legs]

        async def one(start, target, leg):
            try:
                stop = min(start + step, nbytes)
                await leg.move(chunk_of(source.cut(start, stop), target.cut(start, stop)))
            finally:
                slots.release()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for start, target, leg in starts:
                await slots.acquire()  # a slot is given in turn, and kept while the chunk waits for what it needs
                group.create_task(one(start, target, leg))
        for target, leg in legs:
            await leg.commit()
            assert server.get(BUCKET, target.space.key) == pattern(nbytes, 1).tobytes()
        assert backend.write_budget.peak_nbytes <= 15 * MIB


# ------------------------------------------------------------------------------------------ keys

ODD = [
    "a/b", "sp ace", "ü/日本/emoji😀", "q?x#y", "percent%41%2F", "~t", "a\\b", "*[]{}|^`<>\"'&+=;:@,$!", "x" * 1024,
    "..a/b..", "...", "a/.hidden", "-", "é" * 512,
]  # fmt: skip
REFUSED = ["", "../x", "a/../b", "a/./b", ".", "..", "/lead", "trail/", "a//b", "nul\0", "new\nline", "x" * 1025,
           "é" * 513, "\ud800", "\x7f"]  # fmt: skip


@pytest.mark.parametrize("key", ODD, ids=lambda key: ascii(key)[:20])
async def test_odd_keys(server, key):
    """Every key that is taken is that very key in the store: written, found, listed, read and deleted."""
    async with backend_of(stores=store_of(server)) as backend:
        data, source = memory(100)
        space = await region_of(backend, key, 100)
        await write(backend, source, spans_of(space))
        assert key in server.keys(BUCKET)
        assert server.get(BUCKET, key) == data.tobytes()
        prefix = key[: max(1, len(key) // 2)].rstrip("/")
        page = await backend.list_objects("s3", prefix if prefix not in (".", "..") else "", "", 1000)
        assert key in [facts.key for facts in page]
        await backend.delete_objects("s3", [key])
        assert key not in server.keys(BUCKET)


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: ascii(key)[:20])
@pytest.mark.parametrize("kind", ["s3", "file"])
async def test_refused_keys(server, tmp_path, key, kind):
    """A key that would be another key, or none, in some store is refused before anything is sent."""
    stores = store_of(server) | {"file": {"url": f"file://{tmp_path}"}}
    async with backend_of(stores=stores) as backend:
        space = ObjectSpace(kind, key, 10, ObjectVersion("", 10))
        _, memory_side = memory(10)
        for work in (
            backend.move(chunk_of(spans_of(space), memory_side)),
            backend.move(chunk_of(memory_side, spans_of(space))),
            backend.find_object(kind, key),
            backend.delete_objects(kind, [key]),
        ):
            assert isinstance(await error_of(work), InvalidArgument)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["credentials"]


async def test_a_directory_is_not_left(tmp_path):
    """Keys stay below a local store's directory, also where a symlink in it leads out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"x" * 10)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    async with backend_of(stores={"dir": {"url": f"file://{root}"}}) as backend:
        _, memory_side = memory(10)
        for key in ("link/secret", "file", "link/new"):
            space = ObjectSpace("dir", key, 10, ObjectVersion("", 10))
            for work in (
                backend.move(chunk_of(spans_of(space), memory_side)),
                backend.move(chunk_of(memory_side, spans_of(space))),
                backend.find_object("dir", key),
                backend.delete_objects("dir", [key]),
            ):
                assert isinstance(await error_of(work), PermissionDenied)
        assert [path.name for path in outside.iterdir()] == ["secret"]
        long = ObjectSpace("dir", "n" * 300, 10, ObjectVersion())
        assert isinstance(await error_of(backend.move(chunk_of(memory_side, spans_of(long)))), InvalidArgument)


# ------------------------------------------------------------------------------------------ asking


async def test_listing_in_pages(server, tmp_path):
    """Pages are bounded, in key order, and together everything with the prefix, on every kind of store."""
    stores = store_of(server) | {"file": {"url": f"file://{tmp_path}"}, "memory": {"url": "memory:///"}}
    keys = sorted([f"list/{n:03}" for n in range(40)] + ["list/sub/a", "list", "lisu", "lis/x", "list/é", "list-2"])
    async with backend_of(stores=stores) as backend:
        _, source = memory(5)
        for store in stores:
            for key in keys:
                if store == "file" and key == "list":
                    continue  # a directory of that name is there
                space = ObjectSpace(store, key, 5, ObjectVersion())
                await backend.move(chunk_of(source, spans_of(space)))
            for prefix in ("list/", "list", "lis", "list/00", "nothing"):
                expected = [k for k in keys if k.startswith(prefix) and not (store == "file" and k == "list")]
                found, after = [], ""
                while page := await backend.list_objects(store, prefix, after, 7):
                    assert len(page) <= 7
                    found += [facts.key for facts in page]
                    after = found[-1]
                assert found == expected, (store, prefix)
            gone = [key for key in keys[1:] if not (store == "file" and key == "list")]
            await backend.delete_objects(store, [*gone, "absent"])
            left = await backend.list_objects(store, "lis", "", 100)
            assert [facts.key for facts in left] == keys[:1]
            assert left[0].nbytes == 5
            assert left[0].modified_at > 1.7e9


async def test_read_only_store(server):
    """A store that is configured read only is read, and nothing else."""
    async with backend_of(stores=store_of(server, read_only=True)) as backend:
        server.put(BUCKET, "ro", b"r" * 10)
        space = await region_of(backend, "ro")
        _, memory_side = memory(10)
        await backend.move(chunk_of(spans_of(space), memory_side))
        assert isinstance(await error_of(backend.move(chunk_of(memory_side, spans_of(space)))), PermissionDenied)
        assert isinstance(await error_of(backend.delete_objects("s3", ["ro"])), PermissionDenied)
        assert "read only" in backend.refusal(MappedSpace(), space)


# ------------------------------------------------------------------------------------------ secrets


async def test_credentials_are_taken_up_when_they_are_renewed(server, credentials, monkeypatch):
    """Requests are signed with what the file says, and one that goes wrong later is a typed error without its text."""
    monkeypatch.setattr("xferd.plugins.object.credentials.REREAD_S", -1.0)
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, endpoint=proxy.endpoint, max_retries=0)) as backend,
    ):
        await backend.find_object("s3", "absent")
        assert ACCESS_KEY.encode() in proxy.heads[-1]
        credentials.write_text("[default]\naws_access_key_id = AKIANEW\naws_secret_access_key = new\n")
        await backend.find_object("s3", "absent")
        assert b"AKIANEW" in proxy.heads[-1]
        credentials.write_text(f"garbage {SECRET_KEY}")
        error = await error_of(backend.find_object("s3", "absent"))
        assert isinstance(error, Unauthenticated)
        assert SECRET_KEY not in "".join(traceback.format_exception(error))


async def test_nothing_secret_in_errors(server, direct_gets):
    """What a store answers may quote what the request was signed with; nothing of it is in an error or its causes."""
    body = (
        f"<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId>"
        f"<StringToSign>{SECRET_KEY}</StringToSign><SignatureProvided>0123abcd</SignatureProvided></Error>"
    ).encode()
    async with (
        fault_proxy(server.port) as proxy,
        backend_of(stores=store_of(server, direct_gets=direct_gets, endpoint=proxy.endpoint, max_retries=0)) as backend,
    ):
        space = ObjectSpace("s3", "k", 10, ObjectVersion("", 10))
        large = ObjectSpace("s3", "k", 9 * MIB, ObjectVersion("", 9 * MIB))
        _, memory_side = memory(10)
        _, large_side = memory(9 * MIB)
        for status in (403, 400, 500, 503, 404, 412, 301):
            proxy.rules[:] = [Rule("answer", status=status, body=body)]
            for work in (
                backend.move(chunk_of(spans_of(space), memory_side)),
                backend.move(chunk_of(memory_side, spans_of(space))),
                backend.move(chunk_of(large_side, spans_of(large))),
                backend.list_objects("s3", "a", "", 5),
                backend.delete_objects("s3", ["k"]),
            ):
                error = await error_of(work)
                chain = [error, error.__cause__, error.__context__]
                text = "".join(traceback.format_exception(error)) + repr(chain)
                for secret in (ACCESS_KEY, SECRET_KEY, "0123abcd", "StringToSign"):
                    assert secret not in text, (status, work, text)


@pytest.mark.parametrize(
    "section",
    [
        {"url": "s3://user:SEKRIT@bucket"},
        {"url": "s3://bucket?X-Amz-Signature=SEKRIT"},
        {"url": "s3://bucket", "endpoint": "https://user:SEKRIT@host"},
        {"url": "s3://bucket", "endpoint": "http://host:80"},
        {"url": "ftp://bucket"},
        {"url": "s3://"},
        {"url": "file://relative/path"},
        {"url": "file:///no/such/directory/anywhere"},
        {"url": "az://container"},
        {"url": "gs://bucket", "profile": "p"},
        {"url": "s3://bucket", "profile": "absent"},
        {"url": "s3://bucket", "credentials_file": "/no/such/file"},
        {"url": "s3://bucket", "secret_access_key": "SEKRIT"},
    ],
    ids=lambda section: "-".join(section) + section["url"][:12],
)
async def test_wrong_sections(section, monkeypatch):
    """A wrong section is refused at the start, by name, without showing what may be secret."""
    from xferd.plugins.registry import create_backends

    with pytest.raises(ConfigError) as caught:
        await create_backends({"object": {"stores": {"wrong": section}}})["object"].start()
    assert "wrong" in str(caught.value)
    assert "SEKRIT" not in "".join(traceback.format_exception(caught.value))


async def test_closed(server):
    """A closed backend refuses everything."""
    async with backend_of(stores=store_of(server)) as backend:
        server.put(BUCKET, "closed", b"c" * 10)
        space = await region_of(backend, "closed")
        _, memory_side = memory(10)
        await backend.aclose()
        for work in (
            backend.move(chunk_of(spans_of(space), memory_side)),
            backend.move(chunk_of(memory_side, spans_of(space))),
            backend.find_object("s3", "closed"),
        ):
            assert isinstance(await error_of(work), Closed)
