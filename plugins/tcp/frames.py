"""Frames: the fixed header, the limits it is held against, and a parser that does no I/O.

What the control parts mean is in ``handshake.py`` and ``proto/peer_v1.proto``; ``docs/protocol.md`` has every byte.
Payload never passes through here: it goes straight between a socket and the memory it belongs to.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from xferd.api.errors import ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"XFRD"
VERSION = 1
"""The one version of the protocol that this build speaks."""
HEADER_NBYTES = 32
MAX_CONTROL_NBYTES = 16 << 20
"""Largest control part after the handshake, part of the protocol's version."""
MAX_HANDSHAKE_NBYTES = 4096
"""Largest control part of a handshake frame: what a stranger can make us hold."""

_HEADER = struct.Struct("<4sHHIIQQ")
MessageT = TypeVar("MessageT", bound=Message)


class FrameType(enum.IntEnum):
    """What a frame is; the value stands in its header."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    ERROR = 5
    REQUEST = 16
    REPLY = 17
    DATA_REQUEST = 32
    DATA = 33
    END = 34


@dataclass(frozen=True, slots=True)
class Header:
    """The 32 bytes in front of each frame."""

    type: FrameType
    control_nbytes: int
    payload_nbytes: int = 0
    request_id: int = 0
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """Return the header as it stands on the wire."""
        return _HEADER.pack(
            MAGIC, self.version, self.type, self.control_nbytes, 0, self.payload_nbytes, self.request_id
        )

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview) -> Header:
        """Read a header of exactly 32 bytes.

        Raises:
            ProtocolViolation: wrong magic, version, type or flags.
        """
        magic, version, type_value, control_nbytes, flags, payload_nbytes, request_id = _HEADER.unpack(raw)
        if magic != MAGIC:
            raise ProtocolViolation(
                f"a frame starts with {magic.hex()}",
                limit=f"magic {MAGIC.hex()}",
                remedy="this port speaks the xferd node protocol only",
            )
        if version != VERSION:
            raise ProtocolViolation(
                f"a frame has version {version}",
                limit=f"version {VERSION}",
                remedy="run the same release on both nodes",
            )
        if flags:
            raise ProtocolViolation(f"a frame has flags {flags:#x}", limit="flags 0", remedy="clear unknown flags")
        try:
            frame_type = FrameType(type_value)
        except ValueError as exc:
            raise ProtocolViolation(f"a frame has the unknown type {type_value}", limit="docs/protocol.md") from exc
        return cls(frame_type, control_nbytes, payload_nbytes, request_id, version)


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a header may announce at this point of a connection; checked before anything after it is received."""

    types: frozenset[FrameType]
    control_nbytes: int = MAX_CONTROL_NBYTES
    payload_nbytes: int = 0

    @classmethod
    def of(
        cls, types: Iterable[FrameType], *, control_nbytes: int = MAX_CONTROL_NBYTES, payload_nbytes: int = 0
    ) -> FrameLimits:
        """Build limits for some types; ERROR is always among them."""
        return cls(frozenset(types) | {FrameType.ERROR}, control_nbytes, payload_nbytes)

    def check(self, header: Header) -> Header:
        """Return the header.

        Raises:
            ProtocolViolation: the type is not allowed here, or a size passes its limit.
        """
        if header.type not in self.types:
            raise ProtocolViolation(
                f"a frame of type {header.type.name} is not allowed here",
                limit=", ".join(sorted(frame_type.name for frame_type in self.types)),
            )
        if header.control_nbytes > self.control_nbytes:
            raise ProtocolViolation(
                f"a {header.type.name} frame announces a control part of {header.control_nbytes} bytes",
                limit=f"{self.control_nbytes} bytes",
            )
        payload_limit = self.payload_nbytes if header.type in _WITH_PAYLOAD else 0
        if header.payload_nbytes > payload_limit:
            raise ProtocolViolation(
                f"a {header.type.name} frame announces a payload of {header.payload_nbytes} bytes",
                limit=f"{payload_limit} bytes",
                remedy="send smaller chunks, or raise backends.tcp.max_frame at the receiver",
            )
        return header


_WITH_PAYLOAD = frozenset({FrameType.DATA_REQUEST, FrameType.DATA})

HANDSHAKE_LIMITS = FrameLimits.of(
    {FrameType.HELLO, FrameType.CHALLENGE, FrameType.PROOF, FrameType.WELCOME}, control_nbytes=MAX_HANDSHAKE_NBYTES
)
CONTROL_LIMITS = FrameLimits.of({FrameType.REQUEST, FrameType.REPLY})


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame without payload, complete."""

    type: FrameType
    request_id: int
    control: bytes


class FrameParser:
    """Cuts a stream into frames without payload, as a control lane carries them. No I/O.

    The pieces may be cut anywhere. Nothing past a header is kept before the header was checked. After a
    violation the parser goes on raising it.
    """

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._header: Header | None = None
        self._violation: ProtocolViolation | None = None

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here."""
        return not self._buffer and self._header is None

    def feed(self, data: bytes) -> None:
        """Take in the next bytes of the stream."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None until more was fed.

        Raises:
            ProtocolViolation: the stream is not what the limits allow.
        """
        if self._violation is not None:
            raise self._violation
        try:
            return self._next_frame()
        except ProtocolViolation as exc:
            self._violation = exc
            self._buffer.clear()
            raise

    def _next_frame(self) -> Frame | None:
        if self._header is None:
            if len(self._buffer) < HEADER_NBYTES:
                return None
            self._header = self._limits.check(Header.from_bytes(self._buffer[:HEADER_NBYTES]))
            if self._header.payload_nbytes:
                raise ProtocolViolation(f"a {self._header.type.name} frame has a payload on a lane without payload")
            del self._buffer[:HEADER_NBYTES]
        header = self._header
        if len(self._buffer) < header.control_nbytes:
            return None
        control = bytes(self._buffer[: header.control_nbytes])
        del self._buffer[: header.control_nbytes]
        self._header = None
        return Frame(header.type, header.request_id, control)


def encode_frame(frame_type: FrameType, message: Message, *, request_id: int = 0, payload_nbytes: int = 0) -> bytes:
    """Return header and control part of a frame; ``payload_nbytes`` of payload must follow it on the wire.

    Raises:
        ProtocolViolation: the message is larger than the other side takes.
    """
    control = message.SerializeToString()
    limit = MAX_HANDSHAKE_NBYTES if frame_type <= FrameType.WELCOME else MAX_CONTROL_NBYTES
    if len(control) > limit:
        raise ProtocolViolation(f"a {frame_type.name} frame would have {len(control)} bytes", limit=f"{limit} bytes")
    return Header(frame_type, len(control), payload_nbytes, request_id).to_bytes() + control


def decode_control(message_type: type[MessageT], control: bytes) -> MessageT:
    """Return the control part as a message.

    Raises:
        ProtocolViolation: it is none.
    """
    try:
        return message_type.FromString(control)
    except DecodeError as exc:
        raise ProtocolViolation(
            f"a control part of {len(control)} bytes is no {message_type.DESCRIPTOR.full_name}"
        ) from exc
