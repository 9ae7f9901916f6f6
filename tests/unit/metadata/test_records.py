"""Records survive the way to bytes and back; what is not a record is passed over."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import structlog
from hypothesis import given, strategies as st

from xferd.api.types import MemoryKind, NodeInfo
from xferd.metadata.records import MAX_RECORD_NBYTES, node_from_bytes, node_to_bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NODES = st.builds(
    NodeInfo,
    name=TEXT.filter(bool),
    id=TEXT.filter(bool),
    epoch=st.integers(1, (1 << 64) - 1),
    version=TEXT,
    addresses=st.lists(TEXT, max_size=3).map(tuple),
    backends=st.lists(TEXT, max_size=3).map(tuple),
    kinds=st.lists(st.sampled_from(MemoryKind), max_size=3).map(tuple),
    agents=st.lists(TEXT, max_size=3).map(tuple),
    started_at=st.floats(0, 1e12),
)
NODE = NodeInfo(
    name="a",
    id="id",
    epoch=7,
    version="0.1.0",
    addresses=("tcp://127.0.0.1:1",),
    backends=("local",),
    kinds=(MemoryKind.DRAM,),
    agents=("x",),
    started_at=2.0,
)


@given(NODES)
def test_round_trip(node: NodeInfo) -> None:
    assert node_from_bytes(node_to_bytes(node), where="test") == node


def test_equal_records_give_equal_bytes() -> None:
    """A store may skip a write whose bytes are those that it holds."""
    assert node_to_bytes(NODE) == node_to_bytes(NODE)


def test_unknown_fields_and_kinds_are_passed_over() -> None:
    record = json.loads(node_to_bytes(NODE))
    record["colour"] = {"deep": [1]}
    record["kinds"].append("CXL")
    assert node_from_bytes(json.dumps(record).encode(), where="test") == NODE


@given(st.binary(max_size=200) | NODES.map(lambda node: node_to_bytes(node)[:-1]))
def test_rubbish_gives_none(raw: bytes) -> None:
    assert node_from_bytes(raw, where="test") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"record_version": 2},
        {"record_version": None},
        {"name": ""},
        {"name": 5},
        {"name": "\ud800"},
        {"id": ""},
        {"epoch": 0},
        {"epoch": -1},
        {"epoch": True},
        {"epoch": 1 << 64},
        {"addresses": "tcp://x"},
        {"agents": [1]},
        {"agents": ["\udfff"]},
        {"kinds": {}},
        {"started_at": "now"},
        {"started_at": 10**400},
    ],
    ids=str,
)
def test_wrong_fields_give_none_and_one_log_line(changes: dict[str, object]) -> None:
    raw = json.dumps({**json.loads(node_to_bytes(NODE)), **changes}).encode()
    with structlog.testing.capture_logs() as lines:
        assert node_from_bytes(raw, where="/xferd/v1/nodes/a") is None
    assert [(line["event"], line["where"]) for line in lines] == [("record_skipped", "/xferd/v1/nodes/a")]


@pytest.mark.parametrize("raw", [b"[" * 100_000, b"{" + b" " * MAX_RECORD_NBYTES + b"}", b"null", b"\xff"])
def test_hostile_bytes_give_none(raw: bytes) -> None:
    assert node_from_bytes(raw, where="test") is None


def test_a_drain_is_in_the_record_only_while_it_lasts() -> None:
    assert b"draining" not in node_to_bytes(NODE)
    draining = replace(NODE, draining=True)
    assert node_from_bytes(node_to_bytes(draining), where="here") == draining
    rubbish = node_to_bytes(draining).replace(b'"draining":true', b'"draining":"yes"')
    assert node_from_bytes(rubbish, where="here") is None
