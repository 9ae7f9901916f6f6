"""Sizes and durations read exactly, print so that they read back, and refuse rubbish with a typed error."""

import contextlib

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument
from xferd.api.units import (
    DURATION_UNITS,
    MAX_NBYTES,
    MAX_SECONDS,
    SIZE_UNITS,
    format_nbytes,
    format_seconds,
    parse_nbytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("4096", 4096), ("64KiB", 65536), ("1.5GB", 1_500_000_000), (" 2 MiB ", 2 << 20), (7, 7), ("1B", 1)],
)
def test_sizes(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30.0), ("1.5h", 5400.0), (2, 2.0), (0.25, 0.25), ("90", 90.0), ("0", 0)],
)
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "MiB",
        "-1",
        "1.5B",
        "64 mib",
        "1e3",
        "٣KiB",
        "8 EiB",
        "9" * 40,
        "1" * 10000,
        1 << 63,
        -1,
        True,
        None,
        1.0,
        "1\n2",
    ],
)
def test_no_size(value):
    with pytest.raises(InvalidArgument) as caught:
        parse_nbytes(value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "value", ["", "s", "-1s", "1 min", "nan", "inf", float("nan"), float("inf"), -0.1, True, None, "99999d", 10**400]
)
def test_no_duration(value):
    with pytest.raises(InvalidArgument) as caught:
        parse_seconds(value)
    assert caught.value.remedy


@given(st.integers(0, MAX_NBYTES))
def test_a_size_reads_back(nbytes):
    assert parse_nbytes(format_nbytes(nbytes)) == nbytes


@given(st.floats(0, MAX_SECONDS))
def test_a_duration_reads_back(seconds):
    assert parse_seconds(format_seconds(seconds)) == seconds


@given(st.integers(0, 1000), st.sampled_from(sorted(SIZE_UNITS)))
def test_every_unit_of_size(count, unit):
    assert parse_nbytes(f"{count}{unit}") == count * SIZE_UNITS[unit]


@given(st.integers(0, 1000), st.sampled_from(sorted(DURATION_UNITS)))
def test_every_unit_of_time(count, unit):
    assert parse_seconds(f"{count}{unit}") == float(count * DURATION_UNITS[unit])


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_nbytes, parse_seconds):
        with contextlib.suppress(InvalidArgument):
            assert parse(text) >= 0


def test_readable():
    assert format_nbytes(64 << 20) == "64MiB"
    assert format_nbytes(4097) == "4097B"
    assert [format_seconds(s) for s in (0.0, 0.5, 10.0, 300.0, 5400.0)] == ["0s", "500ms", "10s", "5m", "90m"]
