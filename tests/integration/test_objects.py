"""Objects through real daemons: registered, moved from and to every kind of memory, asked about, in every client."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from check_backend import assert_same, pattern
from cluster import Cluster
from s3_server import ACCESS_KEY, SECRET_KEY, s3_server, write_credentials

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    OutOfBounds,
    PermissionDenied,
    ShortTransfer,
    Stale,
    Unsupported,
)
from xferd.api.types import Access, MemoryKind, RegionSource, TransferOp, TransferState
from xferd.clients import AsyncClient, Client

MIB = 1 << 20
BUCKET = "daemons"
_CTL = "import sys; from xferd.clients.ctl import main; sys.exit(main())"


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        running.create_bucket(BUCKET)
        yield running


def settings_of(server, tmp):
    credentials = tmp / "credentials"
    write_credentials(str(credentials))
    section = server.store_section(BUCKET, credentials_file=str(credentials), max_concurrency=8)
    at = "backends.object.stores.kv"
    kinds = [f"{at}.{key}={json.dumps(value)}" for key, value in section.items()]
    (tmp / "objects").mkdir()
    absent = server.store_section("no-such-bucket", credentials_file=str(credentials))
    kinds += [f"backends.object.stores.absent.{key}={json.dumps(value)}" for key, value in absent.items()]
    return (
        *kinds,
        f"backends.object.stores.dir.url=file://{tmp / 'objects'}",
        "backends.object.stores.ro.url=memory:///",
        "backends.object.stores.ro.read_only=true",
    )


@pytest.fixture(scope="module")
def daemons(server, tmp_path_factory):
    cluster = Cluster()
    a = cluster.make("a", settings=settings_of(server, tmp_path_factory.mktemp("a")))
    b = cluster.make("b", peers=(a,))
    with Client.connect(a.session_socket) as client:
        client.query([("kv", "warm-up")])  # obstore's runtime opens what it keeps with its first request
    yield a, b
    logs = "".join(daemon.log() for daemon in (a, b))
    problems = cluster.close()
    assert not problems, "\n".join(problems)
    assert ACCESS_KEY not in logs
    assert SECRET_KEY not in logs


@pytest.fixture
def clients(daemons, no_leaks):
    no_leaks(*daemons)
    with (
        Client.connect(daemons[0].session_socket, agent="alice") as a,
        Client.connect(daemons[1].session_socket, agent="bob") as b,
    ):
        yield a, b


@pytest.fixture
def client(clients):
    return clients[0]


def made(client, key, nbytes, store="kv"):
    return client.register_object(store, key, nbytes=nbytes, writable=True, create=True)


@pytest.mark.parametrize("store", ["kv", "dir"])
@pytest.mark.parametrize("nbytes", [5000, 9 * MIB + 3, 20 * MIB])
def test_round_trip(server, client, store, nbytes):
    """What is written from a pool is in the store, whole, and comes back, scattered."""
    source, target = client.allocate([nbytes, nbytes])
    source.array()[:] = pattern(nbytes, 1)
    region = made(client, f"round/{nbytes}", nbytes, store)
    assert (region.info.kind, region.info.source) == (MemoryKind.OBJECT, RegionSource.OBJECT)
    assert region.info.path == f"{store}/round/{nbytes}"
    assert client.write(source, region).state is TransferState.DONE
    if store == "kv":
        assert server.get(BUCKET, f"round/{nbytes}") == source.array().tobytes()
    half = nbytes // 2
    there = target.rows([half, 0], [nbytes - half, half])
    assert client.read(there, region.rows([half, 0], [nbytes - half, half])).state is TransferState.DONE
    assert_same(target.array(), source.array())
    region.free()
    again = client.register_object(store, f"round/{nbytes}")
    assert again.nbytes == nbytes
    assert again.read(7, 100) == source.array()[7:107].tobytes()


def test_private_memory_and_files(server, client, daemons):
    """Private memory goes directly, a file through staging memory; and back."""
    data = pattern(9 * MIB, 3).copy()
    private = client.register(data)
    region = made(client, "private", data.nbytes)
    client.write(private, region)
    assert server.get(BUCKET, "private") == data.tobytes()
    data[:] = 0
    client.read(private, region)
    assert_same(data, pattern(9 * MIB, 3))
    path = daemons[0].files / "staged.bin"
    path.write_bytes(pattern(12 * MIB, 4).tobytes())
    file = client.register_file(str(path), writable=True)
    staged = made(client, "staged", 12 * MIB)
    status = client.write(file, staged)
    assert [hop.backend for hop in status.telemetry.route] == ["posix", "object"]
    assert server.get(BUCKET, "staged") == path.read_bytes()
    path.write_bytes(bytes(12 * MIB))
    assert [hop.backend for hop in client.read(file, staged).telemetry.route] == ["object", "posix"]
    assert path.read_bytes() == pattern(12 * MIB, 4).tobytes()


def test_memory_of_another_node(server, clients):
    """Another node's memory reaches an object, and is filled from one, in one transfer of two hops."""
    a, b = clients
    theirs = b.allocate(3 * MIB, access=Access.READ_WRITE)
    theirs.array()[:] = pattern(3 * MIB, 6)
    region = made(a, "remote", 3 * MIB)
    [remote] = a.regions(node="b", ids=[theirs.id])
    assert [hop.backend for hop in a.read(region, remote).telemetry.route] == ["tcp", "object"]
    assert server.get(BUCKET, "remote") == theirs.array().tobytes()
    server.put(BUCKET, "remote", pattern(3 * MIB, 7).tobytes())
    fresh = a.register_object("kv", "remote")
    assert [hop.backend for hop in a.write(fresh, remote).telemetry.route] == ["object", "tcp"]
    assert_same(theirs.array(), pattern(3 * MIB, 7))


def test_objects_are_not_served_to_peers(server, clients):
    """A peer is refused, and told to go to the store itself."""
    a, b = clients
    server.put(BUCKET, "shared", b"s" * 100)
    shared = a.register_object("kv", "shared", access=Access.READ)
    mine = b.allocate(100)
    [remote] = b.regions(node="a", ids=[shared.id])
    with pytest.raises(Unsupported, match="register the object at the node"):
        b.read(mine, remote)


def test_many_objects_in_one_transfer(server, client):
    """Each is whole, those of one chunk and those of several, from memory that is scattered over all of them."""
    sizes = [200_000 + n for n in range(40)] + [20 * MIB, 9 * MIB]
    regions = [made(client, f"many/{n}", size) for n, size in enumerate(sizes)]
    block = client.allocate(sum(sizes))
    block.array()[:] = pattern(sum(sizes), 8)
    remote = DescriptorList.from_columns([region.id for region in regions], [0] * len(sizes), sizes)
    assert client.write(block, remote).state is TransferState.DONE
    at = 0
    for n, size in enumerate(sizes):
        assert server.get(BUCKET, f"many/{n}") == block.array()[at : at + size].tobytes()
        at += size
    copy = client.allocate(sum(sizes))
    client.read(copy, remote)
    assert_same(copy.array(), block.array())
    backwards = DescriptorList.from_columns(regions[-1].id, [5 * MIB, 0], [4 * MIB, 5 * MIB])
    client.write(block.rows(0, 9 * MIB), backwards)
    first, second = block.array()[: 4 * MIB], block.array()[4 * MIB : 9 * MIB]
    assert server.get(BUCKET, f"many/{len(sizes) - 1}") == second.tobytes() + first.tobytes()


def test_a_cancelled_write_leaves_the_object_and_no_parts(server, client, daemons):
    """Cancelled on the way, the object is the old one, and nothing is left in the bucket."""
    server.put(BUCKET, "old", b"old")
    region = client.register_object("kv", "old", nbytes=100 * MIB, writable=True)
    block = client.allocate(100 * MIB)
    ended = set()
    for after_nbytes in (0, 1, 30 * MIB, 60 * MIB):
        transfer = client.transfer(TransferOp.WRITE, block, region)
        while transfer.poll().telemetry.moved_nbytes < after_nbytes:
            pass
        ended.add(transfer.cancel().state)
    assert ended == {TransferState.CANCELLED}
    with pytest.raises(DeadlineExceeded):
        client.write(block, region, timeout_s=0.05)
    assert server.get(BUCKET, "old") == b"old"
    assert server.unfinished_uploads(BUCKET) == 0


def test_wholes(server, client):
    """A part is refused when the transfer is submitted; a stream too; and the object is as it was."""
    server.put(BUCKET, "whole", b"w" * 8192)
    region = client.register_object("kv", "whole", writable=True)
    block = client.allocate(8192)
    with pytest.raises(InvalidArgument, match="as a whole"):
        client.write(block.rows(0, 100), region.rows(0, 100))
    with pytest.raises(InvalidArgument, match="as a whole"):
        region.write(b"x" * 10)
    assert server.get(BUCKET, "whole") == b"w" * 8192
    region.write(b"y" * 8192)
    assert server.get(BUCKET, "whole") == b"y" * 8192


def test_registration(server, client):
    """What cannot be registered is a typed error; sizes are those asked, or the object's."""
    server.put(BUCKET, "reg", b"r" * 1000)
    assert client.register_object("kv", "reg").nbytes == 1000
    assert client.register_object("kv", "reg", nbytes=10).nbytes == 10
    assert client.register_object("kv", "reg", nbytes=5000, writable=True).nbytes == 5000
    server.put(BUCKET, "empty", b"")
    for args, options, expected in (
        (("kv", "missing"), {}, NotFound),
        (("kv", "missing"), {"writable": True, "nbytes": 5}, NotFound),
        (("absent", "key"), {}, NotFound),
        (("unknown", "key"), {}, NotFound),
        (("kv", "reg"), {"nbytes": 1001}, OutOfBounds),
        (("kv", "empty"), {}, InvalidArgument),
        (("kv", "../reg"), {}, InvalidArgument),
        (("kv", "reg"), {"create": True}, InvalidArgument),
        (("ro", "reg"), {"writable": True, "create": True, "nbytes": 5}, PermissionDenied),
    ):
        with pytest.raises(expected):
            client.register_object(*args, **options)
    read_only = client.register_object("kv", "reg")
    with pytest.raises(PermissionDenied):
        client.write(client.allocate(1000).rows(0, 1000), read_only)


def test_changed_and_deleted(server, client):
    """The version is pinned at registration; what has gone is not found."""
    server.put(BUCKET, "pinned", b"1" * 1000)
    region = client.register_object("kv", "pinned")
    block = client.allocate(1000)
    server.put(BUCKET, "pinned", b"2" * 1000)
    with pytest.raises(Stale):
        client.read(block.rows(0, 1000), region)
    client.delete_objects("kv", ["pinned", "never-was"])
    with pytest.raises(NotFound):
        client.read(block.rows(0, 1000), region)
    new = made(client, "unwritten", 1000)
    with pytest.raises(NotFound):
        client.read(block.rows(0, 1000), new)
    server.put(BUCKET, "longer", b"3" * 1000)
    longer = client.register_object("kv", "longer", nbytes=2000, writable=True)
    large = client.allocate(2000)
    with pytest.raises(ShortTransfer):
        client.read(large.rows(0, 2000), longer)


def test_query_list_delete(server, client, daemons):
    """Files and objects are looked at in one call, and what goes wrong with one leaves the others alone."""
    for n in range(3):
        server.put(BUCKET, f"q/{n}", bytes(n + 1))
    (daemons[0].files / "present").write_bytes(b"12345")
    (daemons[0].files / "folder").mkdir(exist_ok=True)
    items = [("kv", "q/0"), "present", ("kv", "q/9"), "missing", "../x", ("absent", "k"), ("none", "k"), "folder",
             ("kv", "a//b"), ("kv", "q/2"), str(daemons[0].files / "present")]  # fmt: skip
    results = client.query(items)
    told = [(r.exists, r.nbytes, type(r.error)) for r in results]
    no = type(None)
    assert told == [
        (True, 1, no),
        (True, 5, no),
        (False, 0, no),
        (False, 0, no),
        (False, 0, PermissionDenied),
        (False, 0, no),  # a HEAD of an absent bucket tells nothing more
        (False, 0, NotFound),
        (False, 0, InvalidArgument),
        (False, 0, InvalidArgument),
        (True, 3, no),
        (True, 5, no),
    ]
    assert all(r.modified_at > 1.7e9 for r in results if r.exists)
    assert results[0].etag
    page = client.list_objects("kv", "q/", limit=2)
    assert [(entry.key, entry.nbytes) for entry in page.objects] == [("q/0", 1), ("q/1", 2)]
    rest = client.list_objects("kv", "q/", after=page.next, limit=2)
    assert ([entry.key for entry in rest.objects], rest.next) == (["q/2"], "")
    client.delete_objects("kv", [f"q/{n}" for n in range(5)])
    assert client.list_objects("kv", "q/").objects == ()
    with pytest.raises(NotFound):
        client.list_objects("absent")


async def test_async_client(server, daemons):
    async with await AsyncClient.connect(daemons[0].session_socket, agent="async") as client:
        region = await client.register_object("kv", "aio", nbytes=100, writable=True, create=True)
        block = await client.allocate(100)
        block.array()[:] = 7
        await client.write(block, region)
        assert server.get(BUCKET, "aio") == b"\7" * 100
        assert [r.nbytes for r in await client.query([("kv", "aio")])] == [100]


def test_rest_and_ctl(server, daemons, client):
    """The same by curl and by hand."""
    daemon = daemons[0]
    server.put(BUCKET, "ctl/in", b"c" * 1000)
    status, answer = daemon.get("/v1/query", "POST", {"items": [{"store": "kv", "key": "ctl/in"}]})
    assert (status, answer["results"][0]["nbytes"]) == (200, 1000)

    def ctl(*words):
        command = [sys.executable, "-c", _CTL, "--json", "--socket", str(daemon.session_socket), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert ctl("query", "object:kv/ctl/in", "file:absent")["results"][0]["nbytes"] == 1000
    ctl("cp", "object:kv/ctl/in", "object:dir/ctl/out")
    ctl("cp", "object:dir/ctl/out", "file:ctl.out")
    assert (daemon.files / "ctl.out").read_bytes() == b"c" * 1000
    assert [entry["key"] for entry in ctl("objects", "kv", "ctl/")["objects"]] == ["ctl/in"]
    ctl("delete-objects", "kv", "ctl/in")
    assert server.keys(BUCKET).count("ctl/in") == 0
    config = daemon.get("/v1/config")[1]["toml"]
    assert "no-such-bucket" in config
    assert ACCESS_KEY not in config
    assert SECRET_KEY not in config
    assert np.array_equal(client.query(["ctl.out"])[0].nbytes, 1000)
