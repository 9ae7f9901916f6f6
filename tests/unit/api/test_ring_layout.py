"""A ring's layout: what is made is read back, what makes no sense is refused, and docs/ring.md tells the same."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from xferd.api import ring
from xferd.api.errors import InvalidArgument, ProtocolViolation
from xferd.api.proto.session_v1_pb2 import OpenRing, RingGrant, SessionSocketReply, SessionSocketRequest
from xferd.api.ring import CompletionFlag, Kind, Opcode, RingLayout, RingSizes, RingState, SubmissionFlag

PAGE = (Path(__file__).resolve().parents[3] / "docs/ring.md").read_text()

good_sizes = st.builds(
    RingSizes,
    sq_entries=st.integers(1, 15).map(lambda bits: 1 << bits),
    cq_entries=st.integers(1, 15).map(lambda bits: 1 << bits),
    detail_nbytes=st.integers(4, 1024).map(lambda steps: steps * 64),
    arena_nbytes=st.integers(1, (1 << 20) - 1).map(lambda pages: pages * 4096),
)


@given(good_sizes)
def test_a_header_gives_the_same_layout_back(sizes):
    made = RingLayout.of(sizes)
    assert RingLayout.from_header(made.header() + bytes(100)) == made
    ends = [
        (made.sq_at, sizes.sq_entries * ring.SUBMISSION_NBYTES),
        (made.cq_at, sizes.cq_entries * ring.COMPLETION_NBYTES),
        (made.details_at, sizes.cq_entries * sizes.detail_nbytes),
        (made.arena_at, sizes.arena_nbytes),
    ]
    at = ring.HEADER_NBYTES
    for start, nbytes in ends:
        assert start >= at, "parts overlap"
        assert start % 64 == 0
        at = start + nbytes
    assert at == made.nbytes
    assert made.arena_at % 4096 == 0


@given(st.binary(max_size=200))
@example(b"")
@example(RingLayout.of(RingSizes()).header()[:-1])
def test_any_bytes_are_a_layout_or_a_typed_error(data):
    try:
        made = RingLayout.from_header(data)
    except ProtocolViolation:
        return
    assert made.header() == data[: ring.HEADER.size]


@given(good_sizes, st.integers(0, ring.HEADER.size - 1), st.integers(0, 255))
def test_a_changed_header_is_refused_or_says_what_it_says(sizes, at, value):
    header = bytearray(RingLayout.of(sizes).header())
    header[at] = value
    try:
        made = RingLayout.from_header(bytes(header))
    except ProtocolViolation:
        return
    ignored = slice(12, 16), slice(28, 32)  # the header's own size, and a reserved field
    again = bytearray(made.header())
    for part in ignored:
        header[part] = again[part]
    assert again == header


@pytest.mark.parametrize(
    "sizes",
    [
        RingSizes(sq_entries=0),
        RingSizes(sq_entries=1),
        RingSizes(sq_entries=3),
        RingSizes(sq_entries=1 << 16),
        RingSizes(cq_entries=1000),
        RingSizes(detail_nbytes=192),
        RingSizes(detail_nbytes=300),
        RingSizes(detail_nbytes=(1 << 16) + 64),
        RingSizes(arena_nbytes=0),
        RingSizes(arena_nbytes=5000),
        RingSizes(arena_nbytes=1 << 32),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_limit(sizes):
    with pytest.raises(InvalidArgument) as caught:
        RingLayout.of(sizes)
    assert caught.value.limit
    assert caught.value.remedy


u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
f64 = st.floats(allow_nan=False)


@given(st.tuples(u64, u8, u8, u8, u8, u32, u64, u64, u32, u32, u32, u32, u32, u32, u64))
def test_a_submission_survives_its_slot(entry):
    raw = ring.SUBMISSION.pack(*entry)
    assert len(raw) == ring.SUBMISSION_NBYTES
    assert ring.SUBMISSION.unpack(raw) == entry
    assert int.from_bytes(raw[ring.NUMBER_OF_SUBMISSION_AT :], "little") == entry[-1]


@given(st.tuples(u64, u64, u8, u8, u16, u32, u64, u64, f64, f64, f64, f64, f64, f64, u32, u32, u32, u32, u32, u32, u64))
def test_a_completion_survives_its_slot(entry):
    raw = ring.COMPLETION.pack(*entry)
    assert len(raw) == ring.NUMBER_OF_COMPLETION_AT + 8 <= ring.COMPLETION_NBYTES
    assert ring.COMPLETION.unpack(raw) == entry
    assert int.from_bytes(raw[ring.NUMBER_OF_COMPLETION_AT :], "little") == entry[-1]


# ------------------------------------------------------------------------------------ the page


def dumps() -> list[bytes]:
    """Return the bytes of the page's dumps, block by block."""
    found = []
    for block in re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        text = "\n".join(re.sub(r"^(slot \d|arena)", "", line) for line in block.splitlines())
        text = re.sub(r"\b([0-9a-f]{2}) \u00d7 (\d+)", lambda m: " ".join([m[1]] * int(m[2])), text)
        raw = b"".join(
            bytes.fromhex(match[1])
            for line in text.splitlines()
            if (match := re.match(r"\s*((?:[0-9a-f]{2}\b ?)+)", line))
        )
        if raw:
            found.append(raw)
    return found


def test_the_dumps_of_the_page_are_what_the_code_makes():
    opening, submit, post, ended = dumps()
    place = RingLayout.of(RingSizes())
    request = SessionSocketRequest(
        request_id=2,
        open_ring=OpenRing(version=1, sq_entries=256, cq_entries=1024, detail_nbytes=1024, arena_nbytes=1 << 20),
    )
    reply = SessionSocketReply(request_id=2, ring=RingGrant(nbytes=place.nbytes))
    assert opening == request.SerializeToString() + reply.SerializeToString()
    entry = ring.SUBMISSION.pack(7, Opcode.SUBMIT, 1, 0, 0, 0, 5, 6, 0, 2, 8, 2, 0, 0, 1)
    assert submit == entry + struct.pack("<4I", 0, 1, 77, 3)
    transfer = 0x5DBF105967722778
    assert post == ring.SUBMISSION.pack(8, Opcode.POST, 0, 0, 0, 0, transfer, 0, 0, 0, 0, 0, 0, 0, 2)
    fields = (8, transfer, Kind.ENDED, 4, CompletionFlag.ROUTE, 96, 8192, 8192)
    times = (1795407170.0, 1795407171.5, 1795407171.5, 1795407171.5, 0.0, 0.00001)
    assert ended == ring.COMPLETION.pack(*fields, *times, 4, 4, 1, 1, 1, 0, 2)
    assert f"{place.nbytes:,} bytes" in PAGE
    assert f"{place.sq_at}, {place.cq_at}, {place.details_at} and {place.arena_at}" in PAGE


def test_the_numbers_of_the_page_are_those_of_the_code():
    for enumeration in (Kind, CompletionFlag):
        for member in enumeration:
            assert re.search(rf"\b{int(member)} {member.name}\b", PAGE), member
    assert re.search(r"\| `opcode` \| 1 \| 2 \| 3 \| 4 \|", PAGE)
    assert [int(code) for code in Opcode] == [1, 2, 3, 4]
    for flag in SubmissionFlag:
        assert f"{int(flag)} {flag.name}" in PAGE
    assert f"{int(RingState.OPEN)} open, {int(RingState.CLOSED)} closed" in PAGE
    for at, name in ((ring.SQ_HEAD_AT, "SQ_HEAD"), (ring.CQ_HEAD_AT, "CQ_HEAD"), (ring.STATE_AT, "state")):
        assert f"| {at} | {4 if name == 'state' else 8} | `{name}`" in PAGE
    assert f"| 0 | {ring.HEADER.size} | the fixed header" in PAGE
    assert f"| {ring.REASON_AT} | up to {ring.MAX_REASON_NBYTES} |" in PAGE
    assert "at most half of `cq_entries`" in PAGE


@pytest.mark.parametrize(
    ("heading", "layout", "names"),
    [
        (
            "## Submissions",
            ring.SUBMISSION,
            """user_data opcode op priority flags timeout_ms a b local_at local_count remote_at remote_count
            options_at options_nbytes number""",
        ),
        (
            "## Completions",
            ring.COMPLETION,
            """user_data transfer kind state flags detail_nbytes total_nbytes moved_nbytes created_at posted_at
            first_byte_at ended_at queued_s moving_s descriptors pieces chunks posts route - number""",
        ),
    ],
)
def test_the_tables_of_the_page_are_the_structs(heading, layout, names):
    section = PAGE.split(heading)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([uf]\d+) \| (?:`(\w+)`)? ?\|", section, flags=re.MULTILINE)
    codes = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "f64": "d"}
    assert "<" + "".join(codes[kind] for _, kind, _ in rows) == layout.format
    assert [name or "-" for _, _, name in rows] == names.split()
    at = 0
    for place, kind, _ in rows:
        assert int(place) == at
        at += struct.calcsize("<" + codes[kind])
