"""Frames are cut right wherever the stream is cut, and nothing is kept of a frame that is not allowed."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import ProtocolViolation
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.tcp.frames import (
    CONTROL_LIMITS,
    HANDSHAKE_LIMITS,
    HEADER_NBYTES,
    MAX_CONTROL_NBYTES,
    Frame,
    FrameLimits,
    FrameParser,
    FrameType,
    Header,
    decode_control,
    encode_frame,
)

TYPES = st.sampled_from(sorted(FrameType))
U64 = st.integers(0, 2**64 - 1)
CONTROL_FRAMES = st.lists(
    st.tuples(st.sampled_from([FrameType.REQUEST, FrameType.REPLY]), U64, st.binary(max_size=300)), max_size=8
)


def wire_of(frames: list[tuple[FrameType, int, bytes]]) -> bytes:
    return b"".join(Header(kind, len(body), 0, number).to_bytes() + body for kind, number, body in frames)


def drain(parser: FrameParser) -> list[Frame]:
    found = []
    while (frame := parser.next_frame()) is not None:
        found.append(frame)
    return found


@given(TYPES, st.integers(0, 2**32 - 1), U64, U64)
def test_headers_survive_the_wire(kind: FrameType, control: int, payload: int, number: int) -> None:
    header = Header(kind, control, payload, number)
    assert len(header.to_bytes()) == HEADER_NBYTES
    assert Header.from_bytes(header.to_bytes()) == header


@given(CONTROL_FRAMES, st.data())
def test_frames_come_out_wherever_the_stream_is_cut(
    frames: list[tuple[FrameType, int, bytes]], data: st.DataObject
) -> None:
    raw = wire_of(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    parser, found = FrameParser(CONTROL_LIMITS), []
    for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        parser.feed(raw[start:stop])
        found += drain(parser)
    assert [(frame.type, frame.request_id, frame.control) for frame in found] == frames
    assert parser.is_between_frames


def test_a_stream_that_ends_at_any_byte_is_noticed() -> None:
    raw = wire_of([(FrameType.REQUEST, 1, b"abc"), (FrameType.REPLY, 2, b"")])
    borders = {0, HEADER_NBYTES + 3, len(raw)}
    for length in range(len(raw) + 1):
        parser = FrameParser(CONTROL_LIMITS)
        parser.feed(raw[:length])
        assert len(drain(parser)) == sum(1 for border in borders if 0 < border <= length)
        assert parser.is_between_frames == (length in borders)


@given(st.binary(max_size=200))
def test_rubbish_is_a_violation_and_nothing_else(raw: bytes) -> None:
    parser = FrameParser(CONTROL_LIMITS)
    parser.feed(raw)
    if len(raw) < HEADER_NBYTES:
        assert parser.next_frame() is None
        return
    with pytest.raises(ProtocolViolation):
        drain(parser)
    with pytest.raises(ProtocolViolation):  # and it stays one
        parser.next_frame()


@given(st.integers(0, HEADER_NBYTES - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_header_is_refused_or_seen(place: int, change: int) -> None:
    good = Header(FrameType.REQUEST, 0, 0, 7)
    raw = bytearray(good.to_bytes())
    raw[place] ^= change
    try:
        header = CONTROL_LIMITS.check(Header.from_bytes(raw))
    except ProtocolViolation:
        return
    assert header != good


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (Header(FrameType.HELLO, 0), "HELLO is not allowed here"),
        (Header(FrameType.REQUEST, MAX_CONTROL_NBYTES + 1), "limit: 16777216 bytes"),
        (Header(FrameType.REQUEST, 0, 1), "payload of 1 bytes"),
    ],
)
def test_a_header_over_its_limits_is_refused_before_its_bytes_come(header: Header, match: str) -> None:
    parser = FrameParser(CONTROL_LIMITS)
    parser.feed(header.to_bytes())
    with pytest.raises(ProtocolViolation, match=match):
        parser.next_frame()


def test_the_handshake_has_a_small_limit() -> None:
    with pytest.raises(ProtocolViolation, match="limit: 4096 bytes"):
        HANDSHAKE_LIMITS.check(Header(FrameType.HELLO, 4097))
    with pytest.raises(ProtocolViolation, match="HELLO frame would have"):
        encode_frame(FrameType.HELLO, pb.Hello(node="n" * 5000))


def test_payload_is_for_frames_that_carry_it() -> None:
    limits = FrameLimits.of({FrameType.DATA, FrameType.END}, payload_nbytes=10)
    assert limits.check(Header(FrameType.DATA, 0, 10)).payload_nbytes == 10
    assert limits.check(Header(FrameType.ERROR, 5)).type is FrameType.ERROR
    for header in (Header(FrameType.DATA, 0, 11), Header(FrameType.END, 0, 1), Header(FrameType.ERROR, 0, 1)):
        with pytest.raises(ProtocolViolation, match="payload"):
            limits.check(header)


def test_a_control_part_that_is_no_message_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match=r"no xferd\.peer\.v1\.Hello"):
        decode_control(pb.Hello, b"\xff\xff\xff")
