"""Places are read as they are shown, and a copy never moves a part unasked."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument
from xferd.api.types import RegionId
from xferd.clients.ctl._places import Place, parse_place, span_nbytes

A = Place(path="/data/a")
B = Place(region=RegionId(7))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("file:/data/a+b@c", Place(path="/data/a+b@c")),
        ("file:relative:name", Place(path="relative:name")),
        ("region:7", Place(region=RegionId(7))),
        ("region:7@node-b", Place(region=RegionId(7), node="node-b")),
        ("region:7@node-b+4KiB", Place(region=RegionId(7), node="node-b", offset=4096)),
        ("region:7+12", Place(region=RegionId(7), offset=12)),
    ],
)
def test_a_place_is_read(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize(
    "text",
    [
        *("", "file:", "region:", "/data/a", "s3:x", "region:x", "region:-1", "region:7@", "region:7+", "region:7+1zB"),
        *(f"region:{1 << 64}", "region:7@a@b", "region:\N{ARABIC-INDIC DIGIT SEVEN}"),
    ],
)
def test_what_is_no_place_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_place(text)
    assert caught.value.remedy


_nodes = st.text("abcXYZ019._-", min_size=0, max_size=8)
_regions = st.builds(
    Place, region=st.integers(0, (1 << 64) - 1).map(RegionId), node=_nodes, offset=st.integers(0, (1 << 63) - 1)
)


@given(st.one_of(_regions, st.builds(Place, path=st.text(min_size=1))))
def test_what_is_shown_reads_back(place: Place) -> None:
    assert parse_place(str(place)) == place


def test_the_whole_source_is_moved_unless_less_is_asked() -> None:
    assert span_nbytes(100, 100, None, source=A, target=B) == 100
    assert span_nbytes(100, 500, 40, source=A, target=B) == 40


@pytest.mark.parametrize(
    ("source", "target", "wanted", "named"),
    [
        (100, 99, None, "do not fit"),
        (100, -4, 50, "do not fit"),
        (100, 500, 101, "asked"),
        (100, 500, 0, "nothing"),
        (0, 10, None, "nothing"),
        (-5, 10, None, "nothing"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(source: int, target: int, wanted: int | None, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        span_nbytes(source, target, wanted, source=A, target=B)
