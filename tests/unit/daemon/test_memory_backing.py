"""A client's memory is taken only where touching it cannot hurt the daemon, and given back whole."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from xferd.api.errors import InvalidArgument, OutOfBounds, PermissionDenied, Unavailable
from xferd.api.types import PeerCredentials, RegionSource
from xferd.daemon.memory.backing import ClientProcess, FileBacking, open_memfd, open_passed_fd, open_private
from xferd.plugins.base import FileSpace, ProcessSpace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096
F_SEAL_FUTURE_WRITE = 0x10  # the fcntl module does not have it

_CHILD = """
import ctypes, mmap, sys
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)
hole = mmap.mmap(-1, 3 * 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
ctypes.CDLL(None).munmap(ctypes.c_void_p(address + 8192), ctypes.c_size_t(4096))
print(address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    before = psutil.Process().num_fds()
    yield
    assert psutil.Process().num_fds() == before


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with two mapped pages, then one that is not, and the address of the first."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("client", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 3 * PAGE)
    yield fd
    os.close(fd)


# ------------------------------------------------------------------------------------------ memfds


def test_a_memfd_is_sealed_mapped_and_unmapped(memfd: int) -> None:
    backing = open_memfd(memfd, 2 * PAGE)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert (backing.nbytes, backing.writable, backing.source) == (2 * PAGE, True, RegionSource.MEMFD)
    os.pwrite(memfd, b"abc", PAGE)
    assert ctypes.string_at(backing.position + PAGE, 3) == b"abc"
    with pytest.raises(PermissionError):
        os.ftruncate(memfd, PAGE)
    backing.close()
    backing.close()
    assert "memfd:client" not in {os.path.basename(m.path) for m in psutil.Process().memory_maps(grouped=False)}  # noqa: PTH119


def test_a_memfd_takes_its_own_size(memfd: int) -> None:
    backing = open_memfd(memfd)
    assert backing.nbytes == 3 * PAGE
    backing.close()


def test_a_memfd_sealed_against_writing_is_read_only(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)
    backing = open_memfd(memfd)
    assert not backing.writable
    assert not backing.view().flags.writeable
    backing.close()


def test_a_memfd_that_is_too_small_or_empty_is_refused(memfd: int) -> None:
    with pytest.raises(OutOfBounds, match=f"{4 * PAGE} bytes of a memfd of {3 * PAGE}"):
        open_memfd(memfd, 4 * PAGE)
    os_fd = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    with pytest.raises(InvalidArgument):
        open_memfd(os_fd)
    os.close(os_fd)


def test_a_memfd_that_cannot_be_sealed_is_refused() -> None:
    fd = os.memfd_create("unsealable")
    os.ftruncate(fd, PAGE)
    with pytest.raises(InvalidArgument, match="MFD_ALLOW_SEALING"):
        open_memfd(fd)
    os.close(fd)


def test_what_is_no_memfd_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        file.truncate(PAGE)
        with pytest.raises(InvalidArgument, match="not a memfd"):
            open_memfd(file.fileno())


# ---------------------------------------------------------------------------------- private memory


def test_private_memory_of_a_live_child(child: tuple[subprocess.Popen[str], int]) -> None:
    process, address = child
    client = ClientProcess.open(PeerCredentials(process.pid, os.getuid(), os.getgid()))
    backing = open_private(client, address + 1, 2 * PAGE - 1)
    assert backing.space == ProcessSpace(process.pid, client.pidfd)
    assert backing.position == address + 1
    backing.close()
    for start, nbytes in ((address, 2 * PAGE + 1), (address + 2 * PAGE, 1), (1, 2)):
        with pytest.raises(OutOfBounds, match=f"process {process.pid}"):
            open_private(client, start, nbytes)
    for start, nbytes in ((address, 0), (0, 1), (-1, 1), (address, -1), (address, 1 << 56), ((1 << 64) - 1, 2)):
        with pytest.raises(InvalidArgument, match="span"):
            open_private(client, start, nbytes)
    process.kill()
    process.wait()
    with pytest.raises(Unavailable, match="has gone"):
        open_private(client, address, PAGE)
    client.close()
    client.close()


def test_a_process_that_has_gone_cannot_be_pinned() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(Unavailable):
        ClientProcess.open(PeerCredentials(process.pid, os.getuid(), os.getgid()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every process")
def test_another_users_process_is_refused(child: tuple[subprocess.Popen[str], int]) -> None:
    process, address = child
    client = ClientProcess.open(PeerCredentials(process.pid, os.getuid() + 1, os.getgid()))
    with pytest.raises(PermissionDenied, match="same user"):
        open_private(client, address, PAGE)
    client.close()


# -------------------------------------------------------------------------------------- passed files


def test_a_passed_file(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.write_bytes(b"x" * 100)
    backing = open_passed_fd(os.open(path, os.O_RDWR), writable=True)
    assert (backing.nbytes, backing.path, backing.source) == (100, str(path), RegionSource.FD)
    assert isinstance(backing.space, FileSpace)
    assert backing.position == 0
    backing.close()
    backing.close()
    shorter = open_passed_fd(os.open(path, os.O_RDONLY), 10, writable=False)
    assert shorter.nbytes == 10
    shorter.close()


@pytest.mark.parametrize(
    ("flags", "writable", "named"),
    [
        (os.O_RDONLY, True, "read-only"),
        (os.O_WRONLY, True, "write-only"),
        (os.O_WRONLY, False, "write-only"),
        (os.O_RDWR | os.O_APPEND, True, "O_APPEND"),
        (os.O_PATH, False, "regular"),
    ],
)
def test_a_file_opened_the_wrong_way_is_refused_and_stays_the_callers(
    tmp_path: Path, flags: int, writable: bool, named: str
) -> None:
    path = tmp_path / "kv"
    path.write_bytes(b"x" * 100)
    fd = os.open(path, flags)
    with pytest.raises(InvalidArgument, match=named):
        open_passed_fd(fd, writable=writable)
    os.close(fd)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    null = os.open("/dev/zero", os.O_RDWR)
    for fd in (reader, writer, directory, null):
        with pytest.raises(InvalidArgument, match="regular"):
            open_passed_fd(fd, writable=False)
        os.close(fd)


def test_a_file_shorter_than_asked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.write_bytes(b"x" * 100)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OutOfBounds, match="101 bytes of a file of 100"):
        open_passed_fd(fd, 101, writable=False)
    os.truncate(path, 0)
    with pytest.raises(InvalidArgument):
        open_passed_fd(fd, writable=False)
    backing = FileBacking(fd, str(path), RegionSource.FD)
    backing.close()
