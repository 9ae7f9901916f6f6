"""Numbers and names are written as people read them, and nothing of others reaches the terminal raw."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.clients.ctl import _format as f


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1000, "1000 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (256 << 20, "256 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (1 << 63, "8.00 EiB"),
    ],
)
def test_sizes_are_in_binary_units(count: int, text: str) -> None:
    assert f.nbytes(count) == text


@pytest.mark.parametrize(
    ("bytes_per_s", "text"), [(0.0, "0 B/s"), (999.0, "999 B/s"), (1.93e9, "1.93 GB/s"), (25e9, "25.0 GB/s")]
)
def test_rates_are_in_decimal_units(bytes_per_s: float, text: str) -> None:
    assert f.rate(bytes_per_s) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (93e-6, "93 µs"),
        (0.0012, "1.20 ms"),
        (0.0346, "34.6 ms"),
        (0.9999, "1.0 s"),
        (59.96, "1m 0s"),
        (312.0, "5m 12s"),
        (3 * 3600 + 125.0, "3h 2m"),
        (86400 * 3 + 3600 * 4.0, "3d 4h"),
    ],
)
def test_durations_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert f.duration(seconds) == text


@given(st.integers(0, 1 << 64))
def test_no_size_takes_more_than_nine_columns(count: int) -> None:
    assert len(f.nbytes(count)) <= 9 or count >= 1000 << 60


@given(st.floats(0, 1e9))
def test_no_duration_breaks_the_table(seconds: float) -> None:
    assert 0 < len(f.duration(seconds)) <= 11


def test_never_has_no_age_and_no_moment() -> None:
    assert f.age(0.0, 100.0) == "-"
    assert f.moment(0.0) == "-"
    assert f.percent(1, 0) == "-"
    assert f.age(40.0, 100.0) == "1m 0s"


def test_text_of_others_cannot_steer_the_terminal() -> None:
    assert f.printable("kv\x1b[31m\r\nlayer") == r"kv\x1b[31m\r\nlayer"
    assert f.printable("größer 块") == "größer 块"


@given(st.text())
def test_whatever_the_text_it_stays_one_printable_line(text: str) -> None:
    assert f.printable(text).isprintable()


def test_an_error_is_one_line_with_its_limit_and_its_remedy() -> None:
    line = f.error_line("pool host has\nno room", "256 MiB", "raise pools.nbytes", ("local: busy",))
    assert line == r"pool host has\nno room; tried local: busy; limit: 256 MiB; remedy: raise pools.nbytes"
