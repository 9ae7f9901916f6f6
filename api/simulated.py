"""Handles of simulated GPU memory and events: what CUDA's IPC handles are, for memory that is a memfd.

Memory of a simulated device is a memfd of the process that allocated it. A handle names the process and the fd, so it
can be sent as bytes like CUDA's, and works only while that process lives and keeps the fd. An event is a memfd of one
page that begins with two u64: how often it was recorded, and how many of those records are done. Whoever waits takes
the first number when it begins to wait, and has waited when the second has reached it; so an event that was never
recorded holds nobody up, as with CUDA.

The one place that both sides of the format share: devices are in ``plugins/cuda/simulated.py``, engines' memory in the
client library. Who may open whose fd is the kernel's decision (``proc(5)``: same user, or more).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xferd.api.errors import InvalidArgument

HANDLE_NBYTES: Final = 64
"""As CUDA's."""

MEMORY_MAGIC: Final = b"XSIM"
EVENT_MAGIC: Final = b"XSEV"

EVENT: Final = struct.Struct("<QQ")
"""At the start of an event's page: records begun, records done."""

EVENT_NBYTES: Final = 4096

_UUID_PREFIX: Final = b"xferd-simulated"
_HANDLE: Final = struct.Struct("<4sIIQQ36x")
_REMEDY: Final = "export the memory again, from a process that lives and keeps it"

assert _HANDLE.size == HANDLE_NBYTES
assert len(_UUID_PREFIX) == 15


@dataclass(frozen=True, slots=True)
class SimulatedHandle:
    """What a handle says: ``fd`` is a number in process ``pid``, which started at ``start_ticks`` since boot."""

    pid: int
    fd: int
    nbytes: int
    start_ticks: int
    magic: bytes = MEMORY_MAGIC

    def to_bytes(self) -> bytes:
        """Return the 64 bytes."""
        return _HANDLE.pack(self.magic, self.pid, self.fd, self.nbytes, self.start_ticks)

    @classmethod
    def from_bytes(cls, raw: bytes, magic: bytes = MEMORY_MAGIC) -> SimulatedHandle:
        """Return what 64 bytes say.

        Raises:
            InvalidArgument: not a handle of this kind.
        """
        if len(raw) != HANDLE_NBYTES or raw[:4] != magic:
            raise InvalidArgument(
                f"{len(raw)} bytes that begin with {raw[:4]!r} are no simulated handle",
                limit=f"{HANDLE_NBYTES} bytes that begin with {magic!r}",
                remedy="export the memory by the simulated device that the daemon uses",
            )
        found, pid, fd, nbytes, start_ticks = _HANDLE.unpack(raw)
        return cls(pid, fd, nbytes, start_ticks, found)


def export_fd(fd: int, nbytes: int, magic: bytes = MEMORY_MAGIC) -> bytes:
    """Return the handle of a memfd of this process, good while the process keeps ``fd`` open."""
    pid = os.getpid()
    return SimulatedHandle(pid, fd, nbytes, process_start_ticks(pid), magic).to_bytes()


def open_handle(raw: bytes, magic: bytes = MEMORY_MAGIC) -> tuple[int, int]:
    """Open what a handle names; returns (fd, nbytes), the fd being the caller's to close.

    Raises:
        InvalidArgument: not a handle, its process has gone or closed the fd, or may not be looked into, or the memory
            is smaller than the handle says.
    """
    handle = SimulatedHandle.from_bytes(raw, magic)
    _check_alive(handle)
    try:
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidArgument(
            f"fd {handle.fd} of process {handle.pid} cannot be opened: {exc.strerror}", remedy=_REMEDY
        ) from exc
    try:
        # Once more: between the first look and the opening another process may have been given the number.
        _check_alive(handle)
        found = os.fstat(fd).st_size
        if found < handle.nbytes:
            raise InvalidArgument(
                f"the handle says {handle.nbytes} bytes and the memory has {found}", limit=f"{found} bytes"
            )
    except InvalidArgument:
        os.close(fd)
        raise
    return fd, handle.nbytes


def device_uuid(index: int) -> bytes:
    """Return the UUID of a simulated device, 16 bytes."""
    return _UUID_PREFIX + bytes([index])


def device_index(uuid: bytes) -> int | None:
    """Return the number of a simulated device; None for a UUID that is not of one."""
    return uuid[15] if len(uuid) == 16 and uuid.startswith(_UUID_PREFIX) else None


def process_start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: with its pid, the name of one process only.

    Raises:
        OSError: there is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])


def _check_alive(handle: SimulatedHandle) -> None:
    try:
        is_same = process_start_ticks(handle.pid) == handle.start_ticks
    except OSError:
        is_same = False
    if not is_same:
        raise InvalidArgument(f"process {handle.pid}, which exported the handle, has ended", remedy=_REMEDY)
