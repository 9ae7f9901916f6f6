"""Bad input gets a typed error that names value, limit and remedy, through gRPC and REST alike, and disturbs nothing.

Limits on sizes and numbers are in ``test_limits.py``, failures of processes and links in ``test_lifecycle.py``, of
backends in ``test_faults.py``.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
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
from xferd.api.proto import peer_v1_pb2 as peer_pb
from xferd.api.proto import session_v1_pb2 as session_pb
from xferd.api.proto import xferd_v1_pb2 as pb
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
def face(pair: Daemons, no_leaks: Callable[..., None], open_face: Callable[..., Face]) -> Face:
    """Who misbehaves. Afterwards its daemon, and the other one, are as they were before."""
    no_leaks(*pair)
    made = open_face(pair[1], "mallory")
    return made


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
    for pin in ("warp", "tcp"):
        with refuses(NoRoute, pin, "local"):
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
        (Rows([1], [], [8]), ("region", 1, 0)),
        (Strides(1, 0, 8, 16, 0), ("run 0",)),
        (Strides(1, 0, 8, 1 << 40, 1 << 40), ("run 0",)),
        (Strides(1, U64, 1, 0, 1), ("run 0", U64 + 1)),
        (Strides(1, 0, 0, 8, 4), ("descriptor 0", "nbytes 0")),
    ],
    ids=repr,
)
def test_malformed_lists(face: Face, bad: Rows | Strides, named: tuple[object, ...]) -> None:
    (mine,) = face.allocate(SIZE)
    error = LimitedOr(bad)
    with refuses(error, *named):
        face.prepare(bad)
    for lists in ((bad, row(mine, 0, 8)), (row(mine, 0, 8), bad)):
        with refuses(error, *named):
            face.submit("READ", *lists)
        with refuses(error, *named):
            face.explain("READ", *lists)


def LimitedOr(bad: Rows | Strides) -> type[InvalidArgument]:  # noqa: N802
    return InvalidDescriptor
