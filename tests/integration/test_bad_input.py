"""Bad input gets a typed error that names value, limit and remedy, through gRPC and REST alike, and disturbs nothing.

Limits on sizes and numbers are in ``test_limits.py``, failures of processes and links in ``test_lifecycle.py``, of
backends in ``test_faults.py``.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from cluster import eventually, free_port
from faces import FACES, Handle, Refused, Rows, Strides, refuses, request, row

from xferd.api.errors import (
    AgentUnknown,
    AlreadyExists,
    IntegrityError,
    InvalidArgument,
    InvalidDescriptor,
    NoRoute,
    NotFound,
    OutOfBounds,
    PeerLost,
    PeerUnknown,
    PermissionDenied,
    PoolExhausted,
    SizeMismatch,
    Stale,
    Unauthenticated,
    Unsupported,
)
from xferd.api.proto import peer_v1_pb2 as peer_pb, session_v1_pb2 as session_pb, xferd_v1_pb2 as pb
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess
    from faces import Face

    Daemons = tuple[DaemonProcess, DaemonProcess]

U64 = (1 << 64) - 1
SIZE = 8192
POOL_NBYTES = 256 << 20
NO_REGION = 7 << 32 | 4095


@pytest.fixture(params=list(FACES))
def open_face(request: pytest.FixtureRequest) -> Iterator[Callable[..., Face]]:
    """Opens sessions through one face, and closes them."""
    opened: list[Face] = []

    def make(daemon: DaemonProcess, agent: str = "") -> Face:
        opened.append(FACES[request.param](daemon, agent))
        return opened[-1]

    yield make
    for face in opened:
        face.close()


@pytest.fixture
def one_face(pair: Daemons, no_leaks: Callable[..., None]) -> Iterator[Callable[[str], Face]]:
    """Opens a session through the face that a test is about, for what only that face has."""
    no_leaks(*pair)
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(closing(FACES[kind](pair[1], "mallory")))


@pytest.fixture
def face(pair: Daemons, no_leaks: Callable[..., None], open_face: Callable[..., Face]) -> Face:
    """Who misbehaves. Afterwards its daemon, and the other one, are as they were before."""
    no_leaks(*pair)
    return open_face(pair[1], "mallory")


@pytest.fixture
def other(pair: Daemons, face: Face, open_face: Callable[..., Face]) -> Face:
    """Another session of the same daemon."""
    return open_face(pair[1], "alice")


@pytest.fixture
def far(pair: Daemons, face: Face, open_face: Callable[..., Face]) -> Face:
    """A session of the other daemon."""
    return open_face(pair[0], "bob")


def check_still_works(face: Face) -> None:
    """A transfer of the same session goes through."""
    source, target = face.allocate(4096, 4096)
    face.write(source, 0, b"\x5a" * 4096)
    status = face.submit("WRITE", row(source, 0, 4096), row(target, 0, 4096))
    assert status["state"] == "DONE", status
    assert face.read(target, 0, 4096) == b"\x5a" * 4096


# ------------------------------------------------------------------------------------------- unknown ids


def test_unknown_regions(face: Face) -> None:
    (mine,) = face.allocate(SIZE)
    with refuses(NotFound, NO_REGION):
        face.region(NO_REGION)
    with refuses(NotFound, NO_REGION):
        face.free(NO_REGION)
    with refuses(NotFound, NO_REGION):
        face.read(NO_REGION, 0, 1)
    with refuses(NotFound, NO_REGION):
        face.write(NO_REGION, 0, b"x")
    with refuses(NotFound, NO_REGION):
        face.prepare(row(NO_REGION, 0, 1))
    with refuses(NotFound, NO_REGION):
        face.submit("READ", row(mine, 0, 1), row(NO_REGION, 0, 1))
    with refuses(NotFound, U64):
        face.submit("READ", row(U64, 0, 1), row(mine, 0, 1))
    check_still_works(face)


def test_a_freed_region_is_stale(face: Face) -> None:
    old, mine = face.allocate(SIZE, SIZE)
    handle = face.prepare(row(old, 0, 16))
    face.free(old)
    for act in (
        lambda: face.region(old),
        lambda: face.free(old),
        lambda: face.read(old, 0, 1),
        lambda: face.submit("READ", row(mine, 0, 1), row(old, 0, 1)),
        lambda: face.submit("READ", row(mine, 0, 16), Handle(handle)),
    ):
        with refuses(Stale, old):
            act()
    face.allocate(SIZE)  # takes the same slot, with another generation
    with refuses(Stale, old):
        face.read(old, 0, 1)


def test_unknown_transfers_prepared_lists_and_sessions(face: Face) -> None:
    (mine,) = face.allocate(SIZE)
    for act in (face.poll, face.post, face.cancel, face.release):
        with refuses(NotFound, "ffffffffffffffff"):
            act("ffffffffffffffff")
    with refuses(NotFound, 4711):
        face.release_prepared(4711)
    with refuses(NotFound, U64):
        face.submit("READ", Handle(U64), row(mine, 0, 1))
    with refuses(NotFound, "nosuchsession"):
        face.end_session("nosuchsession")


def test_unknown_nodes_agents_pools_and_backends(face: Face, far: Face) -> None:
    (mine,) = face.allocate(SIZE)
    with refuses(PeerUnknown, "mars"):
        face.node("mars")
    with refuses(PeerUnknown, "mars"):
        face.regions("mars")
    with refuses(PeerUnknown, "mars"):
        face.prepare(row(1, 0, 1, "mars"))
    with refuses(PeerUnknown, "mars"):
        face.submit("READ", row(mine, 0, 1), row(1, 0, 1, "mars"))
    with refuses(PeerUnknown, "mars"):
        face.notify("bob@mars")
    with refuses(PeerUnknown, "mars"):
        face.invalidate("mars")
    for target in ("nobody", "nobody@b", "nobody@a"):
        with refuses(AgentUnknown, "nobody"):
            face.notify(target, b"x")
    with refuses(NotFound, "attic", limit="host"):
        face.allocate(4096, pool="attic")
    for pin, error in (("warp", InvalidArgument), ("tcp", NoRoute)):
        with refuses(error, pin, "local"):
            face.submit("READ", row(mine, 0, 1), row(mine, 1, 1), backend=pin)
    (theirs,) = far.allocate(SIZE, access="READ")
    with refuses(NotFound, NO_REGION, "a"):
        face.submit("READ", row(mine, 0, 1), row(NO_REGION, 0, 1, "a"))
    with refuses(NoRoute, "local", "tcp"):
        face.submit("READ", row(mine, 0, 1), row(theirs, 0, 1, "a"), backend="local")


def test_a_node_that_was_restarted_has_another_epoch(face: Face, far: Face) -> None:
    (theirs,) = far.allocate(SIZE, access="READ")
    (mine,) = face.allocate(SIZE)
    epoch = int(face.node("a")["epoch"])
    for wrong in (epoch - 1, epoch + 1):
        with refuses(Stale, wrong, epoch):
            face.submit("READ", row(mine, 0, 1), row(theirs, 0, 1, "a", wrong))
    with refuses(Stale, 3):
        face.submit("READ", row(mine, 0, 1, "b", 3), row(theirs, 0, 1, "a"))


def test_a_local_list_of_another_node_is_refused(face: Face, far: Face) -> None:
    (theirs,) = far.allocate(SIZE, access="READ")
    (mine,) = face.allocate(SIZE)
    with refuses(InvalidArgument, "node a", limit="node b"):
        face.submit("READ", row(theirs, 0, 1, "a"), row(mine, 0, 1))


# ------------------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 40, 1), (U64 - 1, 1), (0, U64)],
)
def test_a_descriptor_past_its_region(face: Face, far: Face, offset: int, nbytes: int) -> None:
    mine, target = face.allocate(SIZE, SIZE)
    (theirs,) = far.allocate(SIZE, access="READ_WRITE")
    for bad in (row(mine, offset, nbytes), row(theirs, offset, nbytes, "a")):
        with refuses(OutOfBounds, "descriptor 0", offset, nbytes, limit=str(SIZE)):
            face.prepare(bad)
        with refuses(OutOfBounds, "descriptor 0", offset, nbytes, limit=str(SIZE)):
            face.submit("READ", row(target, 0, 1), bad)
    with refuses(OutOfBounds, "descriptor 1", offset):  # the row is named
        face.prepare(Rows([mine, mine], [0, offset], [1, nbytes]))
    if nbytes <= 1 << 20:
        with refuses(OutOfBounds, offset, limit=str(SIZE)):
            face.read(mine, offset, nbytes)
        with refuses(OutOfBounds, offset, limit=str(SIZE)):
            face.write(mine, offset, b"x" * nbytes)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (Rows([1], [U64], [1]), ("descriptor 0", U64)),
        (Rows([1], [U64], [U64]), ("descriptor 0", U64)),
        (Rows([1, 1], [0, 2], [1, U64 - 1]), ("descriptor 1", U64 - 1)),
        (Rows([1], [0], [0]), ("descriptor 0", "nbytes 0")),
        (Rows([1, 1, 1], [0, 8, 16], [8, 0, 8]), ("descriptor 1", "nbytes 0")),
        (Rows([], [], []), ("no descriptors",)),
        (Rows([1, 1, 1], [0, 8], [8, 8]), ("region", 3, 2)),
        (Rows([1], [0, 8, 16], [8, 8]), ("nbytes", 2, 3)),
        (Rows([1], [], [8]), ("no descriptors",)),
        (Rows([1, 1], [], [8]), ("region", 2, 0)),
        (Strides(1, 0, 8, 16, 0), ("run 0",)),
        (Strides(1, 0, 8, 1 << 62, 8), ("run 0", 7 * (1 << 62) + 8)),
        (Strides(1, U64, 1, 0, 1), ("run 0", U64 + 1)),
        (Strides(1, 0, 0, 8, 4), ("descriptor 0", "nbytes 0")),
    ],
    ids=repr,
)
def test_malformed_lists(face: Face, bad: Rows | Strides, named: tuple[object, ...]) -> None:
    (mine,) = face.allocate(SIZE)
    with refuses(InvalidDescriptor, *named):
        face.prepare(bad)
    for lists in ((bad, row(mine, 0, 8)), (row(mine, 0, 8), bad)):
        with refuses(InvalidDescriptor, *named):
            face.submit("READ", *lists)
        with refuses(InvalidDescriptor, *named):
            face.explain("READ", *lists)


@pytest.mark.parametrize("column", ["region", "offset", "nbytes"])
def test_misaligned_column_bytes(one_face: Callable[[str], Face], column: str) -> None:
    """Packed columns are a thing of gRPC; of REST it is numbers that are none."""
    face = one_face("grpc")
    (mine,) = face.allocate(SIZE)
    columns = {"region": struct.pack("<Q", mine), "offset": bytes(8), "nbytes": struct.pack("<Q", 1)}
    columns[column] += b"abc"
    bad = pb.DescriptorList(columns=pb.Columns(**columns))
    with refuses(InvalidDescriptor, column, 11, limit="multiple of 8"):
        face.ask(face.transfers.Prepare, pb.PrepareRequest(list=bad))
    handle = face.prepare(row(mine, 0, 8))
    with refuses(InvalidDescriptor, "index", 3, limit="multiple of 4"):
        ref = pb.DescriptorList(prepared=pb.PreparedRef(handle=handle, index=b"abc"))
        face.ask(face.transfers.Submit, pb.SubmitRequest(op=1, local=ref, remote=ref))
    with refuses(InvalidDescriptor, "no form"):
        face.ask(face.transfers.Prepare, pb.PrepareRequest())
    with refuses(InvalidArgument, "op"):
        good = pb.DescriptorList(prepared=pb.PreparedRef(handle=handle))
        face.ask(face.transfers.Submit, pb.SubmitRequest(local=good, remote=good))


@pytest.mark.parametrize(
    ("value", "named"),
    [(-1, "-1"), (1 << 64, str(1 << 64)), (1.5, "float"), ("ten", "ten"), (None, "NoneType"), ([1], "list")],
)
def test_numbers_that_are_none(one_face: Callable[[str], Face], value: object, named: str) -> None:
    face = one_face("rest")
    (mine,) = face.allocate(SIZE)
    for column in ("region", "offset", "nbytes"):
        columns = {"region": [mine], "offset": [0], "nbytes": [1]} | {column: [value]}
        with refuses(InvalidDescriptor, column, *([named] if named != "ten" else [])):
            face.ask("POST", "/v1/prepared", {"columns": columns})
    with refuses(InvalidArgument, "nbytes"):
        face.ask("POST", "/v1/regions", {"kind": "allocate", "nbytes": [value]})


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b'{"op": "READ"}', b"\xff\xfe", b'{"colums": {}}'])
def test_bodies_that_are_no_request(one_face: Callable[[str], Face], body: bytes) -> None:
    face = one_face("rest")
    for path in ("/v1/transfers", "/v1/prepared", "/v1/regions"):
        with refuses(InvalidArgument):
            face.ask("POST", path, body or b" ")


def test_totals_that_differ(face: Face, far: Face) -> None:
    one, two = face.allocate(SIZE, SIZE)
    (theirs,) = far.allocate(SIZE, access="READ_WRITE")
    for remote in (row(two, 0, 4095), row(theirs, 0, 4095, "a"), Rows([two] * 3, [0, 1, 2], [4096, 4096, 4096])):
        total = sum(remote.nbytes)
        for op in ("READ", "WRITE"):
            with refuses(SizeMismatch, 4096, total, limit="equal"):
                face.submit(op, row(one, 0, 4096), remote)


def test_an_index_past_its_prepared_list(face: Face) -> None:
    one, two = face.allocate(SIZE, SIZE)
    handle = face.prepare(Rows([one] * 4, [0, 1024, 2048, 3072], [1024] * 4))
    with refuses(OutOfBounds, "index 4", limit="0 to 3"):
        face.submit("READ", Handle(handle, [0, 4, 1]), row(two, 0, 3072))
    with refuses(OutOfBounds, (1 << 32) - 1, limit="0 to 3"):
        face.submit("READ", Handle(handle, [(1 << 32) - 1]), row(two, 0, 1024))
    status = face.submit("READ", row(two, 0, 4096), Handle(handle, [3, 3, 0, 1]))
    assert status["state"] == "DONE"


# ------------------------------------------------------------------------------------------- rights


def test_what_another_session_holds(face: Face, other: Face) -> None:
    (theirs,) = other.allocate(SIZE, label="private")
    (shared,) = other.allocate(SIZE, access="READ_WRITE", label="shared")
    (mine,) = face.allocate(SIZE)
    handle = other.prepare(row(theirs, 0, 16))
    transfer = other.submit("WRITE", row(theirs, 0, 16), row(shared, 0, 16))["id"]
    for region in (theirs, shared):
        with refuses(PermissionDenied, region):
            face.free(region)
    for act in (lambda: face.region(theirs), lambda: face.read(theirs, 0, 1), lambda: face.write(theirs, 0, b"x")):
        with refuses(PermissionDenied, theirs):
            act()
    with refuses(PermissionDenied, handle):
        face.release_prepared(handle)
    with refuses(PermissionDenied, handle):
        face.submit("READ", row(mine, 0, 16), Handle(handle))
    for act in (face.poll, face.post, face.cancel, face.release):
        with refuses(PermissionDenied, transfer):
            act(transfer)
    assert theirs not in [int(region["id"]) for region in face.regions("b")]
    # Nothing of it was touched.
    assert other.submit("READ", row(theirs, 0, 16), Handle(handle))["state"] == "DONE"
    assert other.poll(transfer)["state"] == "DONE"


@pytest.mark.parametrize("where", ["same node", "across nodes"])
@pytest.mark.parametrize(("access", "op"), [("NONE", "READ"), ("NONE", "WRITE"), ("READ", "WRITE"), ("WRITE", "READ")])
def test_a_region_without_the_right(face: Face, other: Face, far: Face, access: str, op: str, where: str) -> None:
    owner, node = (other, "") if where == "same node" else (far, "a")
    (theirs,) = owner.allocate(SIZE, access=access)
    owner.write(theirs, 0, b"s" * 64)
    (mine,) = face.allocate(SIZE)
    face.write(mine, 0, b"m" * 64)
    # A region that grants nothing is not even shown to other nodes.
    error = NotFound if (access, node) == ("NONE", "a") else PermissionDenied
    with refuses(error, *([theirs] if node == "" or access == "NONE" else [op])):
        face.submit(op, row(mine, 0, 64), row(theirs, 0, 64, node))
    assert owner.read(theirs, 0, 64) == b"s" * 64
    assert face.read(mine, 0, 64) == b"m" * 64


def test_a_token_of_no_session(pair: Daemons, no_leaks: Callable[..., None]) -> None:
    no_leaks(*pair)
    for token in ("", "0" * 43, "x"):
        status, problem = request(pair[1], "POST", "/v1/prepared", {"columns": {}}, token=token)
        assert (status, problem["code"]) == (401, Unauthenticated.code)
        face = FACES["grpc"](pair[1])
        face.auth = (("authorization", f"Bearer {token}"),)
        with refuses(Unauthenticated):
            face.allocate(4096)
        face.stream.cancel()
        face.channel.close()


def test_names_that_are_taken(face: Face, open_face: Callable[..., Face], pair: Daemons) -> None:
    with refuses(AlreadyExists, "mallory"):
        open_face(pair[1], "mallory")
    for bad in ("no spaces", "a@b", "x" * 129, "\x00"):
        with pytest.raises(Refused) as caught:
            open_face(pair[1], bad)
        assert caught.value.code == InvalidArgument.code
    one, two = face.allocate(SIZE, SIZE)
    first = face.submit("WRITE", row(one, 0, 64), row(two, 0, 64), key="k")
    with refuses(AlreadyExists, "'k'", first["id"]):
        face.submit("WRITE", row(one, 0, 65), row(two, 0, 65), key="k")


def test_private_memory_needs_the_session_socket(face: Face) -> None:
    with refuses(Unsupported, "mallory"):
        face.register_private(4096, 4096)


# ------------------------------------------------------------------------------------------- pools, files


def test_a_full_pool_gives_all_or_nothing(pair: Daemons, face: Face) -> None:
    (held,) = face.allocate(POOL_NBYTES - (1 << 20))
    before = pair[1].footprint()["used_nbytes"]
    for group in ([(1 << 20) + 1], [4096] * 200 + [1 << 20], [POOL_NBYTES], [1 << 62, 1 << 62], [U64] * 4):
        with refuses(PoolExhausted, "host", limit=str(POOL_NBYTES)):
            face.allocate(*group)
        assert pair[1].footprint()["used_nbytes"] == before
    with refuses(InvalidArgument, 0):
        face.allocate(4096, 0)
    with refuses(InvalidArgument):
        face.allocate()
    rest = face.allocate(1 << 20)  # what is left is still to be had, to the last byte
    with refuses(PoolExhausted):
        face.allocate(1)
    for region in (held, *rest):
        face.free(region)
    assert pair[1].footprint()["used_nbytes"] == 0


def test_paths_outside_the_roots(pair: Daemons, face: Face, tmp_path) -> None:
    files = pair[1].files
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    (files / "link").unlink(missing_ok=True)
    (files / "link").symlink_to(outside)
    (files / "folder").mkdir(exist_ok=True)
    (files / "way-out").unlink(missing_ok=True)
    (files / "way-out").symlink_to(tmp_path)
    for path in (
        str(outside),
        f"{files}/../{outside.name}",
        f"../{files.name}/../../etc/passwd",
        "/etc/passwd",
        "link",
        f"{files}/link",
        "way-out/secret",
        "/proc/self/mem",
        "/dev/zero",
    ):
        with refuses(PermissionDenied, path):
            face.register_file(path)
        with refuses(PermissionDenied, path):
            face.register_file(path, writable=True, create=True, nbytes=4096)
    assert outside.read_bytes() == b"secret"
    for escape in ("folder/../../made", f"{files}/../made", "way-out/made"):
        with refuses(PermissionDenied, escape):
            face.register_file(escape, writable=True, create=True, nbytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret"]
    assert not (files.parent / "made").exists()


def test_paths_that_are_no_file(pair: Daemons, face: Face) -> None:
    files = pair[1].files
    (files / "folder").mkdir(exist_ok=True)
    if not (files / "pipe").exists():
        os.mkfifo(files / "pipe")
    (files / "empty").write_bytes(b"")
    (files / "small").write_bytes(b"12345")
    with refuses(NotFound, "missing"):
        face.register_file("missing")
    for path in ("folder", "pipe", "", "\0", "x" * 5000):
        with pytest.raises(Refused) as caught:
            face.register_file(path)
        assert caught.value.code in (InvalidArgument.code, NotFound.code, Unsupported.code, PermissionDenied.code), path
        assert caught.value.remedy
    with refuses(InvalidArgument):
        face.register_file("empty")
    with pytest.raises(Refused) as caught:
        face.register_file("small", nbytes=6)
    assert caught.value.code in (OutOfBounds.code, InvalidArgument.code)
    assert "6" in caught.value.text
    assert "5" in caught.value.text
    with pytest.raises(Refused) as caught:
        face.register_file("small", create=True)
    assert caught.value.code == InvalidArgument.code


@pytest.mark.parametrize("where", ["same node", "across nodes"])
def test_a_file_that_is_shorter_than_the_read(pair: Daemons, face: Face, far: Face, where: str) -> None:
    owner, daemon, node = (face, pair[1], "") if where == "same node" else (far, pair[0], "a")
    path = daemon.files / "shrinks"
    path.write_bytes(b"\x11" * (3 << 20))
    region = owner.register_file("shrinks", access="READ")
    (mine,) = face.allocate(3 << 20)
    os.truncate(path, (1 << 20) + 5)
    status = face.submit("READ", row(mine, 0, 3 << 20), row(region, 0, 3 << 20, node))
    assert status["state"] == "FAILED", status
    assert status["error"]["code"] == "short_transfer", status
    assert "shrinks" in status["error"]["message"], status
    status = face.submit("READ", row(mine, 0, 1 << 20), row(region, 0, 1 << 20, node))
    assert status["state"] == "DONE", status
    if not node:
        with pytest.raises(Refused) as caught:
            face.read(region, (1 << 20) + 4, 2)
        assert caught.value.code == "short_transfer"


def test_a_file_opened_for_reading_is_not_written(pair: Daemons, face: Face) -> None:
    path = pair[1].files / "read-only"
    path.write_bytes(b"r" * 64)
    region = face.register_file("read-only", access="READ_WRITE")
    (mine,) = face.allocate(4096)
    with refuses(PermissionDenied, region):
        face.submit("WRITE", row(mine, 0, 64), row(region, 0, 64))
    with refuses(PermissionDenied, region):
        face.write(region, 0, b"x")
    assert path.read_bytes() == b"r" * 64


def test_metadata_blobs_that_are_none(face: Face, far: Face) -> None:
    good = FACES["grpc"].ask(far, far.metadata.Export, pb.ExportRequest()).data if far.kind == "grpc" else None
    for blob in (b"x", b"XFERD", os.urandom(4096)):
        with pytest.raises(Refused) as caught:
            face.import_metadata(blob)
        assert caught.value.code in (IntegrityError.code, InvalidArgument.code, "protocol_violation"), caught.value
    if good is not None:
        flipped = bytearray(good)
        flipped[len(flipped) // 2] ^= 1
        for blob in (bytes(flipped), good[:-1], good + b"x"):
            with pytest.raises(Refused) as caught:
                face.import_metadata(blob)
            assert caught.value.code in (IntegrityError.code, InvalidArgument.code, "protocol_violation")


# ------------------------------------------------------------------------------------------- sockets


HEADER = struct.Struct("<4sHHIIQQ")


def frame(type_value: int, control: bytes, *, magic: bytes = b"XFRD", version: int = 1, flags: int = 0) -> bytes:
    return HEADER.pack(magic, version, type_value, len(control), flags, 0, 0) + control


def hello(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "min_version": 1,
        "max_version": 1,
        "lane": 1,
        "node": "stranger",
        "node_id": "id",
        "epoch": 1,
        "nonce": secrets.token_bytes(32),
    }
    return peer_pb.Hello(**fields | changes).SerializeToString()


def converse(port: int, said: bytes, *, half_close: bool = True) -> list[tuple[int, bytes]]:
    """Say something to a peer port; returns the frames that come back until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(said)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        heard = b""
        try:
            while part := sock.recv(65536):
                heard += part
        except ConnectionResetError:
            pass  # it hung up before it had read all of our rubbish
    frames = []
    while heard:
        _, _, type_value, control_nbytes, _, _, _ = HEADER.unpack(heard[:32])
        frames.append((type_value, heard[32 : 32 + control_nbytes]))
        heard = heard[32 + control_nbytes :]
    return frames


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: node-a.example\r\nAccept: */*\r\n\r\n", "protocol_violation"),
        (frame(1, hello(), magic=b"EVIL"), "protocol_violation"),
        (frame(1, hello(), version=2), "protocol_violation"),
        (frame(1, hello(), flags=1), "protocol_violation"),
        (frame(99, hello()), "protocol_violation"),
        (frame(33, b""), "protocol_violation"),
        (frame(1, b"\xff" * 64), "protocol_violation"),
        (frame(1, bytes(4097)), "protocol_violation"),
        (frame(1, hello(min_version=2, max_version=3)), "protocol_violation"),
        (frame(1, hello(lane=7)), "protocol_violation"),
        (frame(1, hello(epoch=0)), "protocol_violation"),
        (frame(1, hello(nonce=b"short")), "protocol_violation"),
        (frame(1, hello()) + frame(3, peer_pb.Proof(proof=bytes(32)).SerializeToString()), "unauthenticated"),
        (HEADER.pack(b"XFRD", 1, 1, (1 << 32) - 1, 0, 0, 0), "protocol_violation"),
        (HEADER.pack(b"XFRD", 1, 1, 0, 0, U64, 0), "protocol_violation"),
        (b"\x00" * 32, "protocol_violation"),
    ],
)
def test_rubbish_on_the_peer_port(pair: Daemons, no_leaks: Callable[..., None], said: bytes, code: str) -> None:
    no_leaks(*pair)
    frames = converse(pair[0].peer_port, said, half_close=False)
    assert frames[-1][0] == 5, frames
    detail = pb.ErrorDetail.FromString(frames[-1][1])
    assert detail.code == code, detail
    assert detail.message


def test_half_frames_and_noise_on_the_peer_port(pair: Daemons, no_leaks: Callable[..., None]) -> None:
    no_leaks(*pair)
    whole = frame(1, hello())
    for cut in (0, 1, 16, 31, 32, 33, len(whole) - 1):
        assert [kind for kind, _ in converse(pair[0].peer_port, whole[:cut])] in ([], [5])
    noise = os.urandom(1 << 16)
    for start in range(0, len(noise), 4096):
        converse(pair[0].peer_port, noise[start : start + 4096])
    # One that says nothing at all holds nothing up, and neither does a half-open crowd.
    idle = [socket.create_connection(("127.0.0.1", pair[0].peer_port)) for _ in range(100)]
    with Client.connect(pair[1].session_socket) as client:
        assert client.node("a").name == "a"
    for sock in idle:
        sock.close()


def test_a_wrong_secret_joins_nothing(cluster: Cluster, pair: Daemons, no_leaks: Callable[..., None]) -> None:
    no_leaks(*pair)
    stranger = cluster.make("stranger", peers=(pair[0],))
    face = FACES["grpc"](stranger)
    with refuses(Unauthenticated, "'a'", "secret"):
        face.regions("a")
    with refuses(Unauthenticated, "'a'", "secret"):
        face.notify("bob@a")
    face.close()
    rest = FACES["rest"](stranger)
    with refuses(Unauthenticated, "'a'", "secret"):
        rest.regions("a")
    rest.close()
    assert "stranger" not in [peer["node"]["name"] for peer in pair[0].get("/v1/peers")[1]["peers"]]


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 100,
        os.urandom(60000),
        session_pb.SessionSocketRequest(request_id=1, hello=session_pb.Hello(version=2)).SerializeToString(),
        session_pb.SessionSocketRequest(request_id=1, map_pool=session_pb.MapPool()).SerializeToString(),
        session_pb.SessionSocketRequest(request_id=1).SerializeToString(),
        session_pb.SessionSocketRequest(request_id=1, hello=session_pb.Hello(version=1)).SerializeToString()[:3],
        session_pb.SessionSocketRequest(
            request_id=1, hello=session_pb.Hello(version=1, agent="no spaces")
        ).SerializeToString(),
    ],
    ids=["ones", "noise", "version", "no-hello", "empty", "half", "name"],
)
def test_rubbish_on_the_session_socket(pair: Daemons, no_leaks: Callable[..., None], said: bytes) -> None:
    no_leaks(*pair)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(str(pair[0].session_socket))
        sock.send(said)
        reply = session_pb.SessionSocketReply.FromString(sock.recv(65536))
        assert reply.error.code in ("protocol_violation", "invalid_argument", "unsupported"), reply
        assert reply.error.message
        assert reply.error.remedy
        assert sock.recv(65536) == b""  # and it hangs up


def test_rubbish_after_hello_ends_that_session_only(pair: Daemons, no_leaks: Callable[..., None]) -> None:
    no_leaks(*pair)
    with Client.connect(pair[0].session_socket, agent="good") as good:
        mine = good.allocate(4096)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(str(pair[0].session_socket))
            greeting = session_pb.SessionSocketRequest(request_id=1, hello=session_pb.Hello(version=1, agent="bad"))
            sock.send(greeting.SerializeToString())
            assert session_pb.SessionSocketReply.FromString(sock.recv(65536)).HasField("grant")
            # A file descriptor where none belongs, none where one belongs: refused, and the session goes on.
            ask = session_pb.SessionSocketRequest(request_id=2, register_memfd=session_pb.RegisterMemfd(nbytes=4096))
            sock.send(ask.SerializeToString())
            assert session_pb.SessionSocketReply.FromString(sock.recv(65536)).error.code == "invalid_argument"
            ask = session_pb.SessionSocketRequest(request_id=3, map_pool=session_pb.MapPool(pool="attic"))
            with open("/dev/null", "rb") as null:  # noqa: PTH123
                socket.send_fds(sock, [ask.SerializeToString()], [null.fileno()])
            assert session_pb.SessionSocketReply.FromString(sock.recv(65536)).error.code == "invalid_argument"
            sock.send(b"\xff" * 32)
            assert session_pb.SessionSocketReply.FromString(sock.recv(65536)).error.code == "protocol_violation"
            assert session_pb.SessionSocketReply.FromString(sock.recv(65536)).closing
            assert sock.recv(65536) == b""
        mine.array()[:] = 3
        good.write(mine, good.allocate(4096))


def test_a_peer_address_where_nobody_listens(cluster: Cluster, no_leaks: Callable[..., None]) -> None:
    port = free_port()
    lonely = cluster.make(
        "lonely", settings=(f'metadata.embedded.peers=[{{name="ghost", address="tcp://127.0.0.1:{port}"}}]',)
    )
    for kind in FACES:
        face = FACES[kind](lonely)
        with refuses(PeerLost, "ghost", port):
            face.regions("ghost")
        face.close()
    eventually(lambda: lonely.get("/readyz")[0] == 200 or lonely.get("/readyz"))
