"""Ranges have exactly the keys of their prefix; endpoints mean what people write."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.metadata._etcd_wire import ALL_KEYS_END, Endpoint, full_jitter, prefix_range_end

NARROW = st.lists(st.sampled_from([0, 1, 0x2E, 0xFE, 0xFF]), max_size=6).map(bytes)


def in_range(key: bytes, start: bytes) -> bool:
    end = prefix_range_end(start)
    return key >= start and (end == ALL_KEYS_END or key < end)


@given(st.binary(max_size=8) | NARROW, st.binary(max_size=8) | NARROW)
def test_the_range_has_all_keys_with_the_prefix_and_no_others(prefix: bytes, key: bytes) -> None:
    assert in_range(key, prefix) == key.startswith(prefix)
    assert in_range(prefix + key, prefix)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"a\xff", b"b"), (b"a\xff\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0"), (b"/x/", b"/x0")],
)
def test_what_follows_the_grown_byte_goes(prefix: bytes, end: bytes) -> None:
    assert prefix_range_end(prefix) == end


@pytest.mark.parametrize(
    ("text", "endpoint", "again"),
    [
        ("etcd1:2379", Endpoint("etcd1", 2379), "etcd1:2379"),
        ("http://10.0.0.1:1", Endpoint("10.0.0.1", 1, tls=False), "10.0.0.1:1"),
        ("https://[::1]:2379", Endpoint("::1", 2379, tls=True), "[::1]:2379"),
    ],
)
def test_endpoints(text: str, endpoint: Endpoint, again: str) -> None:
    assert Endpoint.parse(text) == endpoint
    assert str(endpoint) == again


@pytest.mark.parametrize(
    "text",
    ["", "etcd1", "etcd1:", "etcd1:0", "etcd1:99999", "etcd1:x", "ftp://a:1", "http://a:1/path", "u@a:1", ":2379"],
)
def test_what_is_no_endpoint_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is neither host:port"):
        Endpoint.parse(text)


@given(st.integers(0, 10_000), st.floats(0.1, 60))
def test_delays_stay_under_their_cap(attempt: int, cap_s: float) -> None:
    assert 0 <= full_jitter(attempt, cap_s) <= cap_s
