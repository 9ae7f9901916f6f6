"""A client of the session socket and the ring, written from docs/ring.md, docs/session-socket.md and the proto files.

It imports nothing of xferd and spells its few protobuf messages by hand: what is not on those pages does not work here.
It does as it is told, rubbish included, which is what tests need of it.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

SUBMIT, POST, CANCEL, LISTEN = 1, 2, 3, 4
READ, WRITE = 1, 2
HOLD, TELL_ACCEPTED = 1, 2
ENDED, REFUSED, ACCEPTED, NOTIFICATION = 1, 2, 3, 4
CUT, STATUS, ROUTE = 1, 2, 4
DONE = 4

SQ_HEAD, CQ_HEAD, STATE, REASON = 128, 192, 256, 512


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """Return a field of a message: a varint, or bytes of whatever kind."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Return the fields of a message."""
    found: dict[int, list[int | bytes]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        match tag & 7:
            case 0:
                value: int | bytes = number()
            case 1:
                value, at = data[at : at + 8], at + 8
            case 2:
                length = number()
                value, at = data[at : at + length], at + length
            case _:
                raise ValueError(f"wire type of tag {tag}")
        found.setdefault(tag >> 3, []).append(value)
    return found


class Refused(Exception):
    """An ErrorDetail."""

    def __init__(self, detail: bytes) -> None:
        told = fields(detail)
        self.code = bytes(told.get(1, [b""])[0]).decode()  # type: ignore[arg-type]
        super().__init__(f"{self.code}: {bytes(told.get(2, [b''])[0]).decode()}")  # type: ignore[arg-type]


class Attached:
    """A session, with as much of gRPC as makes memory and prepared lists."""

    def __init__(self, path: str, agent: str = "") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(path)
        self.sock.settimeout(20)
        self._requests = 0
        reply, _ = self.ask(field(2, field(1, 1) + field(2, agent)))
        grant = fields(reply[3][0])  # type: ignore[arg-type]
        self.token = bytes(grant[2][0]).decode()  # type: ignore[arg-type]
        self.channel = grpc.insecure_channel(bytes(grant[7][0]).decode())  # type: ignore[arg-type]

    def ask(self, request: bytes) -> tuple[dict[int, list[int | bytes]], list[int]]:
        """Make a request on the session socket."""
        self._requests += 1
        self.sock.send(field(1, self._requests) + request)
        data, fds, _, _ = socket.recv_fds(self.sock, 65536, 8)
        reply = fields(data)
        if 2 in reply:
            raise Refused(reply[2][0])  # type: ignore[arg-type]
        return reply, list(fds)

    def call(self, method: str, request: bytes) -> dict[int, list[int | bytes]]:
        stub = self.channel.unary_unary(f"/xferd.v1.{method}")
        reply: bytes = stub(request, metadata=(("authorization", f"Bearer {self.token}"),), timeout=20)
        return fields(reply)

    def allocate(self, nbytes: int) -> tuple[int, memoryview]:
        """Return a region's id, and its bytes in the first pool."""
        listing = self.call("MemoryService/Allocate", field(2, varint(nbytes)))
        region = fields(listing[3][0])  # type: ignore[arg-type]
        reply, [fd] = self.ask(field(3, field(1, region[12][0])))
        pool = mmap.mmap(fd, int(fields(reply[4][0])[3][0]))  # type: ignore[arg-type]
        os.close(fd)
        start = int(region.get(13, [0])[0])
        return int(region[1][0]), memoryview(pool)[start : start + nbytes]

    def prepare(self, region: int, offsets: list[int], nbytes: int) -> int:
        """Return the handle of a list of equal spans."""
        columns = field(1, struct.pack("<Q", region))
        columns += field(2, struct.pack(f"<{len(offsets)}Q", *offsets)) + field(3, struct.pack("<Q", nbytes))
        reply = self.call("TransferService/Prepare", field(1, field(3, columns)))
        return int(reply[1][0])

    def close(self) -> None:
        self.channel.close()
        self.sock.shutdown(socket.SHUT_WR)
        while self.sock.recv(65536):
            pass
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Completion:
    user_data: int
    transfer: int
    kind: int
    state: int
    flags: int
    detail: bytes
    total_nbytes: int
    moved_nbytes: int
    created_at: float
    posted_at: float
    first_byte_at: float
    ended_at: float
    queued_s: float
    moving_s: float
    descriptors: int
    pieces: int
    chunks: int
    posts: int
    route: int


class BookRing:
    """A ring, used by the rules; ``memory`` is there to break them."""

    def __init__(
        self, session: Attached, sq: int = 256, cq: int = 1024, detail: int = 1024, arena: int = 1 << 20
    ) -> None:
        request = field(1, 1) + field(2, sq) + field(3, cq) + field(4, detail) + field(5, arena)
        reply, fds = session.ask(field(6, request))
        memfd, self.doorbell, self.signal = fds
        self.nbytes = int(fields(reply[7][0])[1][0])  # type: ignore[arg-type]
        self.memory = mmap.mmap(memfd, self.nbytes)
        os.close(memfd)
        header = struct.unpack_from("<8sIIIIIIQQQQQ", self.memory)
        assert header[:3] == (b"XFERRING", 1, 4096)
        self.sq, self.cq, self.detail = header[3:6]
        self.sq_at, self.cq_at, self.details_at, self.arena_at, self.arena = header[7:]
        self.words = memoryview(self.memory).cast("Q")
        self.sent = 0
        self.read = 0

    @property
    def taken(self) -> int:
        return self.words[SQ_HEAD // 8]

    @property
    def state(self) -> int:
        return self.words[STATE // 8] & 0xFFFFFFFF

    def reason(self) -> Refused | None:
        length = self.words[STATE // 8] >> 32
        return Refused(self.memory[REASON : REASON + length]) if length else None

    def put(
        self,
        user_data: int,
        opcode: int,
        a: int,
        b: int = 0,
        *,
        op: int = 0,
        priority: int = 0,
        flags: int = 0,
        timeout_ms: int = 0,
        local: tuple[int, int] = (0, 0),
        remote: tuple[int, int] = (0, 0),
        options: tuple[int, int] = (0, 0),
    ) -> None:
        """Write an entry without ringing."""
        self.put_raw(
            struct.pack(
                "<QBBBBIQQ6I", user_data, opcode, op, priority, flags, timeout_ms, a, b, *local, *remote, *options
            )
        )

    def put_raw(self, entry: bytes) -> None:
        self.sent += 1
        assert self.sent <= self.taken + self.sq, "the queue is full"
        at = self.sq_at + (self.sent - 1) % self.sq * 64
        self.memory[at : at + 56] = entry
        self.words[(at + 56) // 8] = self.sent

    def ring(self) -> None:
        try:
            os.write(self.doorbell, b"!")
        except BlockingIOError:
            pass
        except BrokenPipeError:
            assert self.state == 2

    def put_index(self, at: int, rows: list[int]) -> tuple[int, int]:
        """Put rows into the arena; returns where and how many."""
        self.memory[self.arena_at + at : self.arena_at + at + 4 * len(rows)] = struct.pack(f"<{len(rows)}I", *rows)
        return at, len(rows)

    def poll(self) -> Completion | None:
        """Take the next completion if it is there."""
        slot = self.read % self.cq
        at = self.cq_at + slot * 128
        if self.words[(at + 112) // 8] != self.read + 1:
            return None
        user_data, transfer, kind, state, flags, length, *rest = struct.unpack_from("<QQBBHIQQ6d6I", self.memory, at)
        place = self.details_at + slot * self.detail
        detail = self.memory[place : place + length]
        self.read += 1
        self.words[CQ_HEAD // 8] = self.read
        if self.taken != self.sent:
            self.ring()
        return Completion(user_data, transfer, kind, state, flags, detail, *rest[:-1])

    def wait(self, timeout_s: float = 20.0) -> Completion | None:
        """Wait for the next completion; None when the ring is closed or the daemon has gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                is_over = not os.read(self.signal, 4096)
            except BlockingIOError:
                is_over = False
            told = self.poll()
            if told is not None or is_over or self.state != 1:
                return told
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no completion came")
            select.select([self.signal], [], [], left)

    def completions(self, count: int) -> Iterator[Completion]:
        for _ in range(count):
            told = self.wait()
            assert told is not None, self.reason()
            yield told

    def close(self) -> None:
        self.words.release()
        self.memory.close()
        os.close(self.doorbell)
        os.close(self.signal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
