"""The journal's records: their bytes, and what is made of a file that was cut off or damaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xferd.api.types import Access
from xferd.daemon.storage import records as r

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
names = st.text(max_size=40)
accesses = st.sampled_from([Access.NONE, Access.READ, Access.WRITE, Access.READ_WRITE])
ids = st.lists(u64, max_size=5).map(tuple)
places = st.lists(st.builds(r.Placed, u64, u32, u64, u64), max_size=4).map(tuple)
sums = st.lists(u64, max_size=6).map(lambda values: np.array(values, np.uint64))
times = st.floats(allow_nan=False)


def _seal(id_: int, first: int, values: np.ndarray, has_sums: bool) -> r.Seal:
    return r.Seal(id_, first, len(values), values if has_sums else None)


RECORDS = st.one_of(
    st.builds(r.Allocate, places, names, names, accesses, u32, times),
    st.builds(r.Free, ids),
    st.builds(r.Own, ids, names, accesses),
    st.builds(r.Dirty, st.lists(st.builds(r.BlockRange, u64, u32, u32), max_size=4).map(tuple)),
    st.builds(_seal, u64, u32, sums, st.booleans()),
    st.just(r.Close()),
    st.builds(r.Snapshot, st.binary(min_size=16, max_size=16)),
    st.builds(r.End, u64),
    st.builds(r.Start, times),
)


def journal(records: list[r.Record], *, durable_after: int = 0) -> bytes:
    """Return records in batches of ``durable_after`` (0: one batch), numbered from 1."""
    return b"".join(
        r.encode(record, i, (i - 1) // durable_after * durable_after if durable_after else 0)
        for i, record in enumerate(records, 1)
    )


@given(st.lists(RECORDS, max_size=6))
def test_records_come_back_as_they_were(records):
    found = r.scan(journal(records), 1)
    assert found.tail is r.TailState.WHOLE
    assert [entry.record for entry in found.entries] == records
    assert found.last_sequence == len(records)


@given(st.lists(RECORDS, min_size=1, max_size=4), st.data())
@settings(max_examples=60)
def test_a_file_cut_anywhere_gives_the_records_before_the_cut_and_is_called_torn(records, data):
    whole = journal(records, durable_after=1)
    cut = data.draw(st.integers(0, len(whole) - 1))
    found = r.scan(whole[:cut], 1)
    expected = [entry.record for entry in r.scan(whole, 1).entries if entry.offset + entry.nbytes <= cut]
    assert [entry.record for entry in found.entries] == expected
    assert found.tail is (r.TailState.WHOLE if found.good_nbytes == cut else r.TailState.TORN)


@given(st.lists(RECORDS, min_size=2, max_size=4), st.data())
@settings(max_examples=60)
def test_a_bit_that_flips_in_a_record_known_to_be_on_the_disk_is_called_damage(records, data):
    whole = journal(records, durable_after=1)
    last = r.scan(whole, 1).entries[-1]
    at = data.draw(st.integers(0, last.offset - 1))
    raw = bytearray(whole)
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    found = r.scan(bytes(raw), 1)
    if found.tail is r.TailState.WHOLE:  # padding carries nothing
        assert [entry.record for entry in found.entries] == records
    else:
        assert found.tail is r.TailState.DAMAGED
        assert "was on the disk" in found.reason


def test_a_hole_in_a_batch_that_nobody_was_told_of_is_torn_and_not_damage():
    """A power cut may leave the second record of a batch on the disk and not the first."""
    first, second = r.Free((1,)), r.Free((2,))
    raw = bytearray(journal([first, second]))
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    found = r.scan(bytes(raw), 1)
    assert (found.tail, found.good_nbytes) == (r.TailState.TORN, 0)


@given(st.binary(max_size=300))
def test_rubbish_never_raises_and_yields_no_record(data):
    assert r.scan(data, 1).entries == ()


def test_a_header_has_the_documented_bytes():
    raw = r.encode(r.Free((7,)), 5, 4)
    assert raw[:4] == b"XFJ1"
    assert raw[4:6] == b"\x02\x00"
    assert int.from_bytes(raw[8:12], "little") == 16
    assert [int.from_bytes(raw[at : at + 8], "little") for at in (16, 24)] == [5, 4]
    assert raw[40:] == b"\x01\0\0\0\0\0\0\0" + b"\x07" + bytes(7)


def test_a_record_that_is_too_large_is_refused_before_it_is_written():
    with pytest.raises(ValueError, match="FREE"):
        r.encode(r.Free(tuple(range(r.MAX_PAYLOAD_NBYTES // 8))), 1, 0)
