"""A durable transfer is DONE when what it wrote to files is on the disk, by every face, here and on another node.

The daemons here run with an ``os.fdatasync`` that writes down for which file it was called, and says EIO for one named
``bad``: no disk does so when asked.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pytest
from device_nodes import Vram, make_gpu_node

from xferd.api.descriptors import DescriptorList
from xferd.api.errors import MoveFailed, Unsupported
from xferd.api.types import Access
from xferd.clients import Client
from xferd.plugins.ucx.library import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster import Cluster, DaemonProcess

pytestmark = pytest.mark.slow

NBYTES = 4 << 20
CHUNKS = ("transfers.chunk=1MiB",)

_CACHESTAT = 451

WATCHED = """
    import errno, os

    real = os.fdatasync

    def fdatasync(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.basename(path) == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)
        with open(os.environ["FLUSHED"], "a") as log:
            print(os.path.basename(path), file=log)

    os.fdatasync = fdatasync
"""


@pytest.fixture
def flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return what tells which files daemons that start from now on have flushed since it was asked last."""
    log = tmp_path / "flushed"
    log.touch()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(WATCHED))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setenv("FLUSHED", str(log))
    seen = 0

    def since() -> list[str]:
        nonlocal seen
        lines = log.read_text().split()
        new, seen = lines[seen:], len(lines)
        return new

    return since


def unwritten_pages(path: Path) -> int:
    """Return how many pages of a file are not on the disk; 0 too where the kernel cannot tell (before Linux 6.5)."""
    told = (ctypes.c_uint64 * 5)()
    span = (ctypes.c_uint64 * 2)(0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(_CACHESTAT, fd, span, told, 0):
            assert ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP)
    finally:
        os.close(fd)
    return told[1] + told[2]  # dirty, and being written


def pattern(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, NBYTES, np.uint8)


@pytest.mark.parametrize("is_ring", [False, True], ids=["grpc", "ring"])
def test_a_durable_write_of_many_chunks_is_flushed_once(cluster: Cluster, flushed, is_ring: bool) -> None:
    daemon = cluster.make("a", tcp=False, settings=CHUNKS)
    with Client.connect(daemon.session_socket, agent="x", ring=is_ring) as client:
        memory, back = client.allocate([NBYTES, NBYTES])
        file = client.register_file(daemon.files / "data", writable=True, create=True, nbytes=NBYTES)
        memory.array()[:] = pattern(1)
        spans = [client.prepare(region.whole()) for region in (memory, file, back)]
        status = client.write(spans[0], spans[1])
        assert status.telemetry.chunks > 1
        assert flushed() == []
        status = client.write(spans[0], spans[1], durable=True)
        assert status.telemetry.chunks > 1
        assert flushed() == ["data"]
        assert unwritten_pages(daemon.files / "data") == 0
        client.read(spans[2], spans[1], durable=True)  # nothing is written to a file
        client.write(spans[0], spans[2], durable=True)  # nor here
        assert flushed() == []
        assert (back.array() == memory.array()).all()
    assert (daemon.files / "data").read_bytes() == pattern(1).tobytes()


def test_every_post_of_a_transfer_is_flushed_and_every_file_once(cluster: Cluster, flushed) -> None:
    """Two files in one list, and private memory, which goes by way of staging memory."""
    daemon = cluster.make("a", tcp=False, settings=CHUNKS)
    data = pattern(2)
    with Client.connect(daemon.session_socket, agent="x") as client:
        files = [
            client.register_file(daemon.files / name, writable=True, create=True, nbytes=NBYTES // 2)
            for name in ("one", "two")
        ]
        both = client.prepare(DescriptorList.from_rows([(file.id, 0, NBYTES // 2) for file in files]))
        with client.transfer("WRITE", client.register(data), both, durable=True, hold=True) as transfer:
            for value in (1, 2):
                data[:] = value
                transfer.post()
                transfer.wait()
                assert sorted(flushed()) == ["one", "two"]
                assert (daemon.files / "two").read_bytes() == bytes([value]) * (NBYTES // 2)


@pytest.mark.parametrize("is_ring", [False, True], ids=["grpc", "ring"])
def test_a_flush_that_fails_fails_the_transfer_and_no_other(cluster: Cluster, flushed, is_ring: bool) -> None:
    daemon = cluster.make("a", tcp=False, settings=CHUNKS)
    with Client.connect(daemon.session_socket, agent="x", ring=is_ring) as client:
        memory = client.prepare(client.allocate(NBYTES).whole())
        bad, good = (
            client.prepare(client.register_file(daemon.files / name, writable=True, create=True, nbytes=NBYTES).whole())
            for name in ("bad", "good")
        )
        with pytest.raises(MoveFailed, match=r"fdatasync of .*/bad: Input/output error"):
            client.write(memory, bad, durable=True)
        client.write(memory, bad)
        client.write(memory, good, durable=True)
        assert flushed() == ["good"]


def test_a_copy_by_hand_is_flushed_where_that_is_asked(cluster: Cluster, flushed) -> None:
    daemon = cluster.make("a", tcp=False)
    (daemon.files / "in").write_bytes(bytes(4096))
    ctl = "import sys; from xferd.clients.ctl import main; sys.exit(main())"
    copy = (sys.executable, "-c", ctl, "--socket", str(daemon.session_socket), "cp", "file:in", "file:out")
    subprocess.run(copy, check=True, timeout=60)
    assert flushed() == []
    subprocess.run((*copy, "--durable"), check=True, timeout=60)
    assert flushed() == ["out"]


def test_gpu_memory_and_a_backend_that_wraps_another_are_flushed_once_too(cluster: Cluster, flushed) -> None:
    more = (*CHUNKS, "backends.gds={}", 'backends.faulty={inner="posix"}')
    daemon = make_gpu_node(cluster, "g", *more)
    with Client.connect(daemon.session_socket, agent="x") as client:
        host = client.allocate(NBYTES)
        vram = Vram(client, NBYTES)
        vram.array[:] = pattern(5)
        file, bad = (
            client.register_file(daemon.files / name, writable=True, create=True, nbytes=NBYTES)
            for name in ("data", "bad")
        )
        for source, backend in ((vram.region, "gds"), (vram.region, "posix"), (host, "faulty")):
            status = client.write(source, file, durable=True, backend=backend)
            assert status.telemetry.route[-1].backend == backend
            assert flushed() == ["data"]
            with pytest.raises(MoveFailed, match="fdatasync"):
                client.write(source, bad, durable=True, backend=backend)
            client.write(source, bad, backend=backend)
            assert flushed() == []
            client.read(source, file, durable=True, backend=backend)
            assert flushed() == []


def fabrics() -> list[str]:
    try:
        load("")
    except Unsupported:
        return ["tcp"]
    return ["tcp", "ucx"]


def two_nodes(cluster: Cluster, backend: str) -> tuple[DaemonProcess, DaemonProcess]:
    more = ('backends.ucx={transports="tcp,self"}',) if backend == "ucx" else ()
    b = cluster.make("b", settings=(*CHUNKS, *more))
    return cluster.make("a", peers=(b,), settings=(*CHUNKS, *more)), b


@pytest.mark.parametrize("is_ring", [False, True], ids=["grpc", "ring"])
@pytest.mark.parametrize("backend", fabrics())
def test_the_node_that_has_the_file_flushes_it_before_it_answers(
    cluster: Cluster, flushed, backend: str, is_ring: bool
) -> None:
    a, b = two_nodes(cluster, backend)
    with (
        Client.connect(a.session_socket, agent="writer", ring=is_ring) as writer,
        Client.connect(b.session_socket, agent="owner") as owner,
    ):
        for name in ("data", "bad"):
            owner.register_file(
                b.files / name, writable=True, create=True, nbytes=NBYTES, access=Access.READ_WRITE, label=name
            )
        memory = writer.allocate(NBYTES)
        memory.array()[:] = pattern(3)
        [remote], [bad] = (writer.regions(node="b", label=name) for name in ("data", "bad"))
        here, there, failing = (writer.prepare(region.whole()) for region in (memory, remote, bad))
        writer.write(here, there, backend=backend)
        writer.read(here, there, backend=backend, durable=True)
        assert flushed() == []
        status = writer.write(here, there, backend=backend, durable=True)
        assert flushed() == ["data"] * status.telemetry.chunks
        assert unwritten_pages(b.files / "data") == 0
        with pytest.raises(MoveFailed, match=r"fdatasync of .*/bad: Input/output error"):
            writer.write(here, failing, backend=backend, durable=True)
        writer.write(here, failing, backend=backend)
        small = writer.prepare(remote.rows(0, 4096)), writer.prepare(memory.rows(0, 4096))
        writer.write(small[1], small[0], backend=backend, durable=True)
        assert flushed() == ["data"]
    assert (b.files / "data").read_bytes() == pattern(3).tobytes()


def test_what_is_read_from_another_node_into_a_file_is_flushed_here(cluster: Cluster, flushed) -> None:
    a, b = two_nodes(cluster, "tcp")
    with (
        Client.connect(a.session_socket, agent="reader") as reader,
        Client.connect(b.session_socket, agent="owner") as owner,
    ):
        owner.allocate(NBYTES, access=Access.READ, label="kv").array()[:] = pattern(4)
        [remote] = reader.regions(node="b", label="kv")
        file = reader.register_file(a.files / "here", writable=True, create=True, nbytes=NBYTES)
        reader.read(file, remote, durable=True)
        assert flushed() == ["here"]
    assert (a.files / "here").read_bytes() == pattern(4).tobytes()


def test_storage_pools_are_flushed_once_with_the_flag_as_without(cluster: Cluster, flushed, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    pool = f'storage_pools=[{{name="ssd", directories=[{{path="{disk}"}}], nbytes="16MiB"}}]'
    daemon = cluster.make("a", tcp=False, settings=(pool,))
    with Client.connect(daemon.session_socket, agent="x") as client:
        memory, stored = client.allocate(NBYTES), client.allocate(NBYTES, "ssd", persistent=True)
        client.write(memory, stored)
        flushed()
        client.write(memory, stored)
        without = flushed()
        client.write(memory, stored, durable=True)
        assert flushed().count("slab-0000") == without.count("slab-0000") == 1
        passing = client.allocate(NBYTES, "ssd")
        client.write(memory, passing, durable=True)  # ends with its session: there is nothing to keep
        assert "slab-0000" not in flushed()
