"""The bytes in docs/protocol.md are the bytes that this code sends, and its numbers are this code's limits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.plugins.base import PeerIdentity
from xferd.plugins.tcp.frames import (
    HEADER_NBYTES,
    MAX_CONTROL_NBYTES,
    MAX_HANDSHAKE_NBYTES,
    FrameType,
    Header,
    encode_frame,
)
from xferd.plugins.tcp.handshake import (
    CLIENT_LABEL,
    SERVER_LABEL,
    ClientHandshake,
    Expectation,
    ServerHandshake,
    transcript,
)
from xferd.plugins.tcp.options import TcpOptions

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")
SECRET = b"example secret of sixteen bytes+"
REGION = 0x1_0000_0002


def dumps() -> dict[str, bytes]:
    return {name: bytes.fromhex(body) for name, body in re.findall(r"```hex (\w+)\n(.*?)```", PAGE, re.DOTALL)}


def column(*values: int) -> bytes:
    return np.array(values, dtype="<u8").tobytes()


def spoken() -> dict[str, bytes]:
    caller = ClientHandshake(
        SECRET, PeerIdentity("node-a", "a1", 3), pb.LANE_KIND_DATA, Expectation("node-b", 5), nonce=bytes(range(32))
    )
    server = ServerHandshake(SECRET, PeerIdentity("node-b", "b1", 5), nonce=bytes(range(32, 64)))
    challenge = server.challenge(caller.hello())
    proof, _ = caller.answer(challenge)
    server.accept(proof)
    options = TcpOptions()
    request = pb.DataRequest(
        transfer_id="t1",
        cause_id="c1",
        op=xferd_pb.TRANSFER_OP_READ,
        epoch=5,
        region=column(REGION, REGION),
        offset=column(0, 8192),
        nbytes=column(3, 2),
        total_nbytes=5,
        agent="x@node-a",
    )
    welcome = pb.Welcome(max_frame_nbytes=options.max_frame, max_descriptors=options.max_descriptors)
    return {
        "hello": encode_frame(FrameType.HELLO, caller.hello()),
        "transcript": transcript(SERVER_LABEL, caller.hello(), challenge),
        "challenge": encode_frame(FrameType.CHALLENGE, challenge),
        "proof": encode_frame(FrameType.PROOF, proof),
        "welcome": encode_frame(FrameType.WELCOME, welcome),
        "request": encode_frame(FrameType.DATA_REQUEST, request, request_id=1),
        "data": Header(FrameType.DATA, 0, 5, 1).to_bytes() + b"hello",
        "end": encode_frame(FrameType.END, pb.DataReply(moved_nbytes=5), request_id=1),
    }


@pytest.mark.parametrize("name", sorted(spoken()))
def test_each_dump_is_what_is_sent(name: str) -> None:
    assert dumps()[name].hex(" ") == spoken()[name].hex(" ")


def test_no_dump_is_unchecked() -> None:
    assert dumps().keys() == spoken().keys()


def test_every_frame_type_has_its_row() -> None:
    rows = {(int(number), name) for number, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE, re.MULTILINE)}
    assert rows == {(kind.value, kind.name) for kind in FrameType}


def test_limits_and_labels_are_those_of_the_code() -> None:
    assert f"a header of {HEADER_NBYTES} bytes" in PAGE
    assert f"before WELCOME | {MAX_HANDSHAKE_NBYTES} bytes" in PAGE
    assert f"({MAX_CONTROL_NBYTES:,} bytes)" in PAGE
    assert f"`{SERVER_LABEL.decode()}`" in PAGE
    assert f"`{CLIENT_LABEL.decode()}`" in PAGE
