"""What is said between the daemon and a device worker over their socket: rare requests, some with a file descriptor.

A request is one packet of JSON with the name of its class; a worker answers each, in order, with a ``Reply``. The first
packet of a worker is a ``Ready`` or, where it cannot start, a ``Reply`` with an error, after which it exits. Moves go
through shared memory (``layout.py``). Both ends are one release, so there is no version.
"""

from __future__ import annotations

import array
import dataclasses
import json
import socket
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from xferd.api.errors import DeviceLost, XferdError, error_for_code

MAX_PACKET_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has its context. ``devices`` is how many the driver shows; the rest as in ``DeviceInfo``.

    ``file_manner`` says how it moves between files and GPU memory, "" where it cannot; ``file_refusal`` says why not.
    """

    devices: int
    device_uuid: str
    name: str
    total_nbytes: int
    free_nbytes: int
    file_manner: str = ""
    file_refusal: str = ""


@dataclass(frozen=True, slots=True)
class Open:
    """Map a client's allocation, by IPC ``handle`` (hex), or by the fd that comes along."""

    allocation: int
    nbytes: int
    handle: str = ""
    device: int = 0


@dataclass(frozen=True, slots=True)
class Allocate:
    """Allocate memory of the worker's own; the reply's ``handle`` is how others open it."""

    allocation: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Close:
    """Let go of an allocation, opened or made here; an unknown one is fine. No command under way names it."""

    allocation: int


@dataclass(frozen=True, slots=True)
class Wipe:
    """Fill a span with zeros, and answer when that has ended."""

    allocation: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MapHost:
    """Map host memory whose fd comes along; ``address`` is where the daemon has it. Locked when it is first used."""

    segment: int
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DropHost:
    """Unlock and unmap host memory; an unknown one is fine."""

    segment: int


@dataclass(frozen=True, slots=True)
class OpenEvent:
    """Open a client's IPC event, ``handle`` in hex."""

    event: int
    handle: str


@dataclass(frozen=True, slots=True)
class MakeEvent:
    """Make an event that transfers may record; the reply's ``handle`` is how the client opens it."""

    event: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for free memory and what is locked."""


Request: TypeAlias = Open | Allocate | Close | Wipe | MapHost | DropHost | OpenEvent | MakeEvent | Ask


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; ``code`` is that of an ``XferdError``, or "". Fields that do not apply are as here."""

    code: str = ""
    message: str = ""
    limit: str = ""
    remedy: str = ""
    handle: str = ""
    free_nbytes: int = 0
    pinned_nbytes: int = 0

    def check(self) -> Reply:
        """Return it, or raise what it says went wrong."""
        if self.code:
            raise error_for_code(self.code)(self.message, limit=self.limit, remedy=self.remedy)
        return self

    @classmethod
    def of(cls, error: XferdError) -> Reply:
        """Return the answer that raises ``error`` at the other end."""
        return cls(error.code, error.message, error.limit, error.remedy)


_CLASSES = {
    cls.__name__: cls
    for cls in (Ready, Open, Allocate, Close, Wipe, MapHost, DropHost, OpenEvent, MakeEvent, Ask, Reply)
}


@dataclass(frozen=True, slots=True)
class Received:
    """A packet with the fds that came along, which are the receiver's to close."""

    message: Ready | Request | Reply
    fds: list[int] = field(default_factory=list)


def encode(message: Ready | Request | Reply) -> bytes:
    """Return a packet."""
    return json.dumps([type(message).__name__, dataclasses.asdict(message)], separators=(",", ":")).encode()


def decode(packet: bytes) -> Ready | Request | Reply:
    """Return what a packet says."""
    name, values = json.loads(packet)
    made: Any = _CLASSES[name](**values)
    return made  # type: ignore[no-any-return]  # one of the classes of the table


def receive(sock: socket.socket) -> Received | None:
    """Receive a packet as the socket's blocking mode has it; None at the end of the connection.

    Raises:
        BlockingIOError: nothing is there, on a socket that does not block.
    """
    packet, ancillary, _, _ = sock.recvmsg(MAX_PACKET_NBYTES, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return Received(decode(packet), fds.tolist()) if packet else None


def send(sock: socket.socket, message: Ready | Request | Reply, fd: int = -1) -> None:
    """Send a packet, with a copy of ``fd`` where it is given.

    Raises:
        DeviceLost: the other end has gone.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    try:
        sock.sendmsg([encode(message)], ancillary)
    except (BrokenPipeError, ConnectionResetError) as exc:
        raise DeviceLost("the device worker has gone", remedy="try again: another one is started") from exc
