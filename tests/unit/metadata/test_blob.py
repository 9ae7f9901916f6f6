"""A blob gives back what was put in, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
from hypothesis import given, settings, strategies as st

from xferd.api.errors import InvalidArgument, LimitExceeded
from xferd.api.types import Access, MemoryKind, NodeInfo, RegionId, RegionInfo, RegionSource
from xferd.metadata.blob import MAX_BLOB_NBYTES, VERSION, decode_blob, encode_blob

U64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NODE = NodeInfo(
    name="node-a",
    id="4f2a",
    epoch=1_763_859_600,
    version="0.1.0",
    addresses=("tcp://127.0.0.1:7001",),
    backends=("local", "tcp"),
    kinds=(MemoryKind.DRAM, MemoryKind.FILE),
    agents=("prefill",),
    started_at=1.25,
)
REGIONS = st.builds(
    RegionInfo,
    id=U64.map(RegionId),
    node=st.just(NODE.name),
    epoch=st.just(NODE.epoch),
    kind=st.sampled_from(MemoryKind),
    source=st.sampled_from(RegionSource),
    device=st.integers(0, 15),
    nbytes=U64,
    agent=TEXT,
    access=st.sampled_from([Access.NONE, Access.READ, Access.WRITE, Access.READ_WRITE]),
    writable=st.booleans(),
    label=TEXT,
    pool=TEXT,
    pool_offset=U64,
    path=TEXT,
)
REGION = RegionInfo(
    id=RegionId(1 << 32),
    node=NODE.name,
    epoch=NODE.epoch,
    kind=MemoryKind.DRAM,
    source=RegionSource.POOL,
    device=0,
    nbytes=4096,
    agent="prefill",
    access=Access.READ,
    writable=True,
    label="kv",
)


def sealed(front: bytes, body: bytes) -> bytes:
    """Return a blob whose checksum fits, whatever it holds."""
    return front + hashlib.blake2b(front + body, digest_size=16).digest() + body


@given(st.lists(REGIONS, max_size=5))
def test_round_trip(regions: list[RegionInfo]) -> None:
    assert decode_blob(encode_blob(NODE, regions)) == (NODE, tuple(regions))


def test_every_flipped_byte_is_noticed() -> None:
    blob = encode_blob(NODE, [REGION])
    for position in range(len(blob)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(blob)
            damaged[position] ^= flip
            with pytest.raises(InvalidArgument):
                decode_blob(bytes(damaged))


def test_every_cut_is_noticed() -> None:
    blob = encode_blob(NODE, [REGION])
    for nbytes in range(len(blob)):
        with pytest.raises(InvalidArgument, match="size"):
            decode_blob(blob[:nbytes])
    with pytest.raises(InvalidArgument, match="size"):
        decode_blob(blob + b"\0")


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_blob(raw)


@settings(max_examples=200)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_content_with_a_right_checksum_is_parsed_or_refused(record: bytes, listing: bytes) -> None:
    """A checksum is no proof: any bytes may come under a right one."""
    front = struct.pack("<4sHHII", b"XFMD", VERSION, 0, len(record), len(listing))
    with pytest.raises(InvalidArgument):
        decode_blob(sealed(front, record + listing))


def test_the_message_says_which_part_is_wrong() -> None:
    blob = encode_blob(NODE, [])
    with pytest.raises(InvalidArgument, match=r"the magic is b'NIXL'.*XFMD"):
        decode_blob(b"NIXL" + blob[4:])
    with pytest.raises(InvalidArgument, match="the version is 9"):
        decode_blob(blob[:4] + b"\x09\0" + blob[6:])
    with pytest.raises(InvalidArgument, match="checksum"):
        decode_blob(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(InvalidArgument, match=rf"size is {MAX_BLOB_NBYTES + 1} bytes"):
        decode_blob(bytes(MAX_BLOB_NBYTES + 1))


def test_foreign_regions_are_refused() -> None:
    for change in ({"node": "node-b"}, {"epoch": NODE.epoch + 1}):
        with pytest.raises(InvalidArgument, match="regions of node"):
            decode_blob(encode_blob(NODE, [dataclasses.replace(REGION, **change)]))


def test_a_nameless_node_is_refused() -> None:
    for change in ({"name": ""}, {"id": ""}, {"epoch": 0}):
        with pytest.raises(InvalidArgument, match="name, id or epoch"):
            decode_blob(encode_blob(dataclasses.replace(NODE, **change), []))


def test_too_many_regions_are_refused_with_the_remedy() -> None:
    large = dataclasses.replace(REGION, label="x" * 4096)
    with pytest.raises(LimitExceeded, match=r"2000 regions.*export only"):
        encode_blob(NODE, [large] * 2000)
