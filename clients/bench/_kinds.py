"""Memory kinds: one table of what there is, what a client process does to have a region of it, and why not.

A new kind is a row of ``KINDS``. Bytes that a process cannot map (objects, storage pools) are stamped and looked at in
a copy, which transfers of its own bring there and back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from xferd.api.types import Access
from xferd.clients.bench._owned import Owned
from xferd.clients.bench._vram import make_vram
from xferd.clients.memory import map_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xferd.clients.memory import ByteArray
    from xferd.clients.sync import Client, Region

STORE = "bench"
"""Name of the object store in the daemons of a run."""

_SUMMED, _PLAIN = 'checksum="xxh3", verify=true', 'checksum="off"'
POOLS = {"summed": _SUMMED, "plain": _PLAIN, "summed-direct": _SUMMED, "plain-direct": _PLAIN}
"""Settings of their storage pools: with checksums that are compared at each read, and without."""

DIRECT = "-direct"
"""How the names of those end that are past the page cache."""


Make: TypeAlias = "Callable[[Client, int], Owned]"


@dataclass(frozen=True, slots=True)
class Kind:
    """What regions can be of.

    Attributes:
        name: on the command line.
        make: makes a region of so many bytes that others may read and write; it goes with the session.
        refusal: says why there is none on this machine, "" if there is.
        is_host: memory of the host, which systems without a daemon have of one kind only.
        is_pooled: takes as much of the daemon's host pool.
        is_whole: is written as a whole or not at all, so that a region is of the size of one request.
        pool: the storage pool of the daemons that it is in, "" for none.
        is_device: is memory of a GPU, a simulated one where there is none.
        plain: the kind that is the same without checksums, "" where it has none.
    """

    name: str
    make: Make
    refusal: Callable[[], str] = lambda: ""
    is_host: bool = False
    is_pooled: bool = False
    is_whole: bool = False
    is_device: bool = False
    pool: str = ""
    plain: str = ""


def _pool(client: Client, nbytes: int) -> Owned:
    region = client.allocate(nbytes, access=Access.READ_WRITE, label="bench")
    return Owned(region, region.array())


def _memfd(client: Client, nbytes: int) -> Owned:
    region = client.register_memfd(nbytes, access=Access.READ_WRITE, label="bench")
    return Owned(region, region.array())


def _private(client: Client, nbytes: int) -> Owned:
    memory = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory[:] = 1  # present, and not all one page of zeros
    return Owned(client.register(memory, access=Access.READ_WRITE, label="bench"), memory)


@contextlib.contextmanager
def nameless_file(nbytes: int) -> Iterator[tuple[int, ByteArray]]:
    """Make a file without a name, which goes with its last user: its descriptor, open while entered, and its bytes."""
    with tempfile.TemporaryFile(prefix="xferbench-") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        yield file.fileno(), map_shared(file.fileno(), nbytes)


def _file(client: Client, nbytes: int) -> Owned:
    """Make a file and register it by descriptor."""
    with nameless_file(nbytes) as (fd, memory):
        region = client.register_fd(fd, writable=True, access=Access.READ_WRITE, label="bench")
        return Owned(region, memory, fd=os.dup(fd))


def _direct_file(client: Client, nbytes: int) -> Owned:
    """Make such a file, and register a descriptor with O_DIRECT, which the daemon then moves past the page cache."""
    with nameless_file(nbytes) as (cached_fd, memory):
        fd = open_direct(cached_fd)
        region = client.register_fd(fd, writable=True, access=Access.READ_WRITE, label="bench")
    # Written back before anything is timed. The descriptor ends with this process, as all of it does.
    return Owned(region, memory, push=lambda: os.fsync(fd), fd=fd)


def open_direct(fd: int) -> int:
    """Return another descriptor of a file, with O_DIRECT; the caller closes it. Raises OSError where there is none."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)


def direct_refusal() -> str:
    """Return why files cannot be moved past the page cache here, or ""."""
    with tempfile.TemporaryFile(prefix="xferbench-") as file:
        try:
            os.close(open_direct(file.fileno()))
        except OSError as exc:
            return f"files in {tempfile.gettempdir()} have no O_DIRECT ({exc.strerror}): set TMPDIR to a disk"
    return ""


def _object(client: Client, nbytes: int) -> Owned:
    key = f"{client.agent}-{nbytes}"
    region = client.register_object(
        STORE, key, nbytes=nbytes, writable=True, create=True, access=Access.READ_WRITE, label="bench"
    )
    return _copied(client, region, nbytes)


def _object_refusal() -> str:
    return "" if find_spec("obstore") else "obstore is not installed: pip install 'xferd[object]'"


def _storage(name: str, pool: str, plain: str = "") -> Kind:
    def make(client: Client, nbytes: int) -> Owned:
        return _copied(client, client.allocate(nbytes, pool, access=Access.READ_WRITE, label="bench"), nbytes)

    refusal = direct_refusal if pool.endswith(DIRECT) else lambda: ""
    return Kind(name, make, refusal, is_pooled=True, pool=pool, plain=plain)


def _copied(client: Client, region: Region, nbytes: int) -> Owned:
    copy = client.allocate(nbytes, label="bench copy")
    return Owned(
        region,
        copy.array(),
        push=lambda: client.write(copy.whole(), region.whole()),
        pull=lambda: client.read(copy.whole(), region.whole()),
    )


KINDS = {
    kind.name: kind
    for kind in (
        Kind("DRAM", _pool, is_host=True, is_pooled=True),
        Kind("MEMFD", _memfd, is_host=True),
        Kind("PRIVATE", _private, is_host=True),
        Kind("FILE", _file),
        Kind("FILE_DIRECT", _direct_file, direct_refusal),
        _storage("STORAGE", "summed", plain="STORAGE_PLAIN"),
        _storage("STORAGE_PLAIN", "plain"),
        _storage("STORAGE_DIRECT", "summed-direct", plain="STORAGE_DIRECT_PLAIN"),
        _storage("STORAGE_DIRECT_PLAIN", "plain-direct"),
        Kind("OBJECT", _object, _object_refusal, is_pooled=True, is_whole=True),
        Kind("VRAM", make_vram, is_device=True),
    )
}
"""DRAM is a pool's, MEMFD a client's memory file, PRIVATE a client's own. FILE goes through the page cache, FILE_DIRECT
past it; STORAGE is of a storage pool, OBJECT an object in a store, VRAM a client's memory of a GPU."""


def kind_of(name: str) -> Kind:
    """Return the kind of a region's name, which may have the size of a request behind a slash."""
    return KINDS[name.partition("/")[0]]


def region_name(kind: str, request_nbytes: int) -> str:
    """Return under what name a process keeps a region: with the size where it depends on it."""
    return f"{kind}/{request_nbytes}" if KINDS[kind].is_whole else kind
