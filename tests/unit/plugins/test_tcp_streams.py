"""What a stream reads ahead: frames come out whole wherever the bytes are cut, and payload lands in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import ProtocolViolation
from xferd.plugins import vectored
from xferd.plugins.tcp.frames import HEADER_NBYTES, FrameLimits, FrameType, Header
from xferd.plugins.tcp.streams import READ_AHEAD_NBYTES, FrameHeads, ReadAhead

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMITS = FrameLimits.of({FrameType.DATA_REQUEST}, control_nbytes=100_000, payload_nbytes=1 << 20)


class Wire:
    """Bytes to come, in pieces of the sizes that are asked for, never more than there is room for."""

    def __init__(self, raw: bytes, cuts: list[int]) -> None:
        self.raw = raw
        self.cuts = cuts
        self.calls = 0

    def into(self, ahead: ReadAhead) -> None:
        room = ahead.room()
        assert len(room) > 0
        size = min(len(room), len(self.raw), self.cuts[self.calls % len(self.cuts)])
        self.calls += 1
        room[:size] = self.raw[:size]
        self.raw = self.raw[size:]
        ahead.came(size)

    def rest(self, nbytes: int) -> bytes:
        head, self.raw = self.raw[:nbytes], self.raw[nbytes:]
        return head


def frame(control: bytes, payload: bytes, number: int) -> bytes:
    return Header(FrameType.DATA_REQUEST, len(control), len(payload), number).to_bytes() + control + payload


def rows_of(memory: NDArray[np.uint8], rows: int) -> NDArray[np.uint64]:
    borders = np.unique(np.linspace(0, memory.nbytes, rows + 1).astype(np.uint64))
    return np.column_stack((borders[:-1] + np.uint64(memory.ctypes.data), np.diff(borders)))


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([0, 1, 100, 8160, 8161, 30_000]), st.sampled_from([0, 1, 4096, 8192, 50_000])),
        min_size=1,
        max_size=6,
    ),
    cuts=st.lists(st.sampled_from([1, 7, 31, 32, 33, 8191, 8192, 100_000]), min_size=1, max_size=5),
    rows=st.integers(1, 5),
)
def test_frames_come_out_whole_wherever_the_stream_is_cut(
    sizes: list[tuple[int, int]], cuts: list[int], rows: int
) -> None:
    rng = np.random.default_rng(1)
    frames = [(rng.bytes(control), rng.bytes(payload)) for control, payload in sizes]
    wire = Wire(b"".join(frame(*both, number) for number, both in enumerate(frames)), [*cuts, 4096])
    ahead = ReadAhead()
    for number, (control, payload) in enumerate(frames):
        while (head := ahead.head(LIMITS)) is None:
            wire.into(ahead)
        assert head == (Header(FrameType.DATA_REQUEST, len(control), len(payload), number), control)
        if not payload:
            continue
        memory = np.zeros(len(payload), dtype=np.uint8)
        read_ahead = min(len(ahead), len(payload))
        assert read_ahead <= READ_AHEAD_NBYTES
        rest = ahead.payload(rows_of(memory, rows), len(payload))
        left = vectored.total_nbytes(rest) if len(rest) else 0
        assert left == len(payload) - read_ahead
        memory[read_ahead:] = np.frombuffer(wire.rest(left), dtype=np.uint8)
        assert memory.tobytes() == payload
    assert ahead.is_between_frames
    assert not wire.raw


def test_a_header_is_refused_before_there_is_room_for_what_it_announces() -> None:
    ahead = ReadAhead()
    wire = Wire(Header(FrameType.DATA_REQUEST, 100_001, 0, 1).to_bytes(), [HEADER_NBYTES])
    wire.into(ahead)
    with pytest.raises(ProtocolViolation, match="100001 bytes"):
        ahead.head(LIMITS)
    assert len(ahead.room()) <= READ_AHEAD_NBYTES


def test_memory_for_a_long_control_part_is_given_back() -> None:
    ahead = ReadAhead()
    wire = Wire(frame(bytes(100_000), b"", 1), [1 << 20])
    while ahead.head(LIMITS) is None:
        wire.into(ahead)
    assert len(ahead.room()) == READ_AHEAD_NBYTES


@given(waiting=st.integers(0, 8000), drop=st.integers(0, 20_000))
def test_dropped_bytes_are_gone(waiting: int, drop: int) -> None:
    ahead = ReadAhead()
    wire = Wire(frame(b"", bytes(waiting), 1), [1 << 20])
    wire.into(ahead)
    assert ahead.head(LIMITS) is not None
    assert ahead.drop(drop) == max(drop - waiting, 0)
    assert len(ahead) == max(waiting - drop, 0)


@pytest.mark.parametrize("size", [32, READ_AHEAD_NBYTES, READ_AHEAD_NBYTES + 1, 100_000])
def test_the_head_stands_before_the_payload(size: int) -> None:
    heads, payload = FrameHeads(), np.arange(10, dtype=np.uint8)
    head = np.random.default_rng(1).bytes(size)
    whole = heads.table(head, rows_of(payload, 2))
    out = np.zeros(size + 10, dtype=np.uint8)
    vectored.copy_local(whole, vectored.iov_of(out.data))
    assert out.tobytes() == head + payload.tobytes()
    assert vectored.total_nbytes(heads.table(head, None)) == size
