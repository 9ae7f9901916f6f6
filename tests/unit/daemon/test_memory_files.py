"""A client reaches regular files below the roots and nothing else, however it spells the path or races."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import psutil
import pytest

from xferd.api.errors import (
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    PoolExhausted,
)
from xferd.api.types import RegisterFileRequest
from xferd.daemon.memory.files import FileRoots

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = b"kv blocks"


@pytest.fixture(params=["openat2", "stepwise"])
def roots(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileRoots]:
    """Two roots: ``first`` has files, a link to it is the second; ``outside`` is beside them."""
    (tmp_path / "first" / "deep").mkdir(parents=True)
    (tmp_path / "first" / "kv").write_bytes(TEXT)
    (tmp_path / "first" / "deep" / "kv").write_bytes(TEXT)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "linked").symlink_to(tmp_path / "first" / "deep")
    before = psutil.Process().num_fds()
    yield FileRoots([tmp_path / "first", tmp_path / "linked"], use_openat2=request.param == "openat2")
    assert psutil.Process().num_fds() == before, "a file descriptor was left open"


def ask(path: object, nbytes: int = 0, *, writable: bool = False, create: bool = False) -> RegisterFileRequest:
    return RegisterFileRequest(str(path), nbytes, writable=writable, create=create)


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("{tmp}/first/kv", "first/kv"),
        ("{tmp}/first/./deep//kv", "first/deep/kv"),
        ("kv", "first/kv"),
        ("deep/kv", "first/deep/kv"),
        ("{tmp}/linked/kv", "first/deep/kv"),
    ],
)
def test_a_file_below_a_root(roots: FileRoots, tmp_path: Path, path: str, real: str) -> None:
    fd, nbytes, found = roots.open_path(ask(path.format(tmp=tmp_path)))
    assert (nbytes, found) == (len(TEXT), str(tmp_path / real))
    assert os.pread(fd, 100, 0) == TEXT
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


def test_writable(roots: FileRoots, tmp_path: Path) -> None:
    opened = roots.open_path(ask("kv", 2, writable=True))
    assert opened.nbytes == 2
    os.pwrite(opened.fd, b"KV", 0)
    os.close(opened.fd)
    assert (tmp_path / "first" / "kv").read_bytes() == b"KV blocks"


@pytest.mark.parametrize(
    "path",
    [
        "{tmp}/outside/secret",
        "/etc/passwd",
        "{tmp}/first/../outside/secret",
        "../outside/secret",
        "deep/../kv",
        "{tmp}/firstborn",
        "{tmp}/first",
        "/",
    ],
)
def test_a_path_outside_the_roots_is_refused_with_the_roots(roots: FileRoots, tmp_path: Path, path: str) -> None:
    (tmp_path / "firstborn").write_bytes(TEXT)
    with pytest.raises(PermissionDenied) as caught:
        roots.open_path(ask(path.format(tmp=tmp_path)))
    assert str(tmp_path / "first") in caught.value.limit
    assert caught.value.remedy


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("link", "target", "path"),
    [
        ("link", "{tmp}/outside/secret", "link"),
        ("link", "kv", "link"),
        ("link", "{tmp}/outside", "link/secret"),
        ("link", "{tmp}/outside", "link/new"),
        ("link", "deep", "link/kv"),
        ("link", "{tmp}/outside/new", "link"),
    ],
)
def test_no_symlink_is_followed(
    roots: FileRoots, tmp_path: Path, link: str, target: str, path: str, create: bool
) -> None:
    (tmp_path / "first" / link).symlink_to(target.format(tmp=tmp_path))
    with pytest.raises(PermissionDenied, match="symlink"):
        roots.open_path(ask(path, 10 if create else 0, writable=create, create=create))
    assert not (tmp_path / "outside" / "new").exists()


def test_magic_links_and_other_mounts_are_refused(tmp_path: Path) -> None:
    for use_openat2 in (True, False):
        roots = FileRoots(["/"], use_openat2=use_openat2)
        for path in ("/proc/self/environ", "/proc/self/root/etc/passwd", "/sys/kernel/mm/hugepages"):
            with pytest.raises(PermissionDenied):
                roots.open_path(ask(path))


@pytest.mark.slow
def test_a_directory_swapped_for_a_symlink_while_opening_never_leads_outside(roots: FileRoots, tmp_path: Path) -> None:
    """The race that a check before the opening would lose."""
    swapped, spare, link = tmp_path / "first" / "swap", tmp_path / "first" / "spare", tmp_path / "first" / "link"
    swapped.mkdir()
    (swapped / "secret").write_bytes(TEXT)
    link.symlink_to(tmp_path / "outside")
    stop, seen = threading.Event(), {"opened": 0, "refused": 0}

    def swap() -> None:
        while not stop.is_set():
            swapped.rename(spare)
            link.rename(swapped)
            swapped.rename(link)
            spare.rename(swapped)
            os.sched_yield()  # else both threads may keep step, and nothing is ever opened

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        while sum(seen.values()) < 2000 or not seen["opened"]:
            try:
                opened = roots.open_path(ask("swap/secret"))
            except (PermissionDenied, NotFound):
                seen["refused"] += 1
                continue
            assert os.pread(opened.fd, 100, 0) == TEXT
            os.close(opened.fd)
            seen["opened"] += 1
    finally:
        stop.set()
        thread.join()
    assert seen["opened"]


def test_missing_files_and_roots(roots: FileRoots, tmp_path: Path) -> None:
    for path in ("none", "none/kv", "deep/none"):
        with pytest.raises(NotFound, match="create"):
            roots.open_path(ask(path))
    with pytest.raises(NotFound, match=r"files\.roots"):
        FileRoots([tmp_path / "gone"]).open_path(ask("kv"))


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(roots: FileRoots, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "first" / "fifo")
    for path in ("fifo", "deep", "kv/below"):
        for writable in (False, True):
            with pytest.raises(InvalidArgument, match="regular"):
                roots.open_path(ask(path, writable=writable))


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
def test_impossible_names_are_refused(roots: FileRoots, path: str) -> None:
    with pytest.raises(InvalidArgument):
        roots.open_path(ask(path))


def test_sizes(roots: FileRoots, tmp_path: Path) -> None:
    (tmp_path / "first" / "empty").touch()
    with pytest.raises(InvalidArgument, match="empty"):
        roots.open_path(ask("empty"))
    with pytest.raises(OutOfBounds, match="10 bytes of file 'kv' of 9"):
        roots.open_path(ask("kv", 10, writable=True))
    for nbytes in (-1, 1 << 63):
        with pytest.raises(InvalidArgument):
            roots.open_path(ask("kv", nbytes))


# ----------------------------------------------------------------------------------------- creating


def test_create_makes_and_extends_with_zeros_and_never_shrinks(roots: FileRoots, tmp_path: Path) -> None:
    for nbytes, size in ((100, 100), (8192, 8192), (50, 8192)):
        opened = roots.open_path(ask("deep/new", nbytes, writable=True, create=True))
        assert opened.nbytes == nbytes
        assert os.pread(opened.fd, 9000, 0) == bytes(size)
        os.close(opened.fd)
    status = (tmp_path / "first" / "deep" / "new").stat()
    assert status.st_blocks * 512 >= 8192, "room was not taken"
    assert not status.st_mode & 0o007


@pytest.mark.parametrize(("nbytes", "writable"), [(0, True), (10, False)])
def test_create_needs_a_size_and_writable(roots: FileRoots, nbytes: int, writable: bool) -> None:
    with pytest.raises(InvalidArgument, match="create"):
        roots.open_path(ask("new", nbytes, writable=writable, create=True))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB with one small file."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", place], check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    (place / "deep").mkdir()
    (place / "kv").write_bytes(TEXT)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("use_openat2", [True, False])
def test_a_full_file_system_leaves_no_file_and_no_longer_one(small: Path, use_openat2: bool) -> None:
    roots = FileRoots([small], use_openat2=use_openat2)
    for path in ("new", "deep/new", "kv"):
        with pytest.raises(PoolExhausted, match=path) as caught:
            roots.open_path(ask(path, 1 << 20, writable=True, create=True))
        assert caught.value.remedy
    assert not (small / "new").exists()
    assert not (small / "deep" / "new").exists()
    assert (small / "kv").read_bytes() == TEXT


def test_a_file_system_mounted_below_a_root_is_not_entered(roots: FileRoots, small: Path, tmp_path: Path) -> None:
    roots.reload([tmp_path])
    for path in ("small/kv", "small/none", "small/deep/kv"):
        with pytest.raises(PermissionDenied, match="another file system"):
            roots.open_path(ask(path))


def test_a_file_size_limit_is_a_typed_error(roots: FileRoots, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(LimitExceeded):
            roots.open_path(ask("new", 8192, writable=True, create=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / "first" / "new").exists()


# ---------------------------------------------------------------------------------------------- roots


def test_without_roots_everything_is_refused_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied, match=r"files\.roots"):
        FileRoots().open_path(ask(tmp_path / "kv"))


def test_roots_can_be_swapped_and_a_bad_list_changes_nothing(roots: FileRoots, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="relative"):
        roots.reload([tmp_path / "outside", "relative"])
    assert roots.roots[0] == str(tmp_path / "first")
    roots.reload([tmp_path / "outside"])
    os.close(roots.open_path(ask("secret")).fd)
    with pytest.raises(PermissionDenied):
        roots.open_path(ask(tmp_path / "first" / "kv"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_file_without_rights_is_refused(roots: FileRoots, tmp_path: Path) -> None:
    (tmp_path / "first" / "kv").chmod(0)
    with pytest.raises(PermissionDenied, match="uid"):
        roots.open_path(ask("kv"))


def test_no_fd_left_is_overload(roots: FileRoots) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, hard))  # room for the root, not for the file
    try:
        with pytest.raises(Overloaded, match="LimitNOFILE"):
            roots.open_path(ask("kv"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
