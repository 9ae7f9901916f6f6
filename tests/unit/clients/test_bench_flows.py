"""Schemes become flows whose blocks nobody shares, in regions that have room for them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.clients.bench._cases import SCHEMES, Case, Place
from xferd.clients.bench._flows import (
    LOAD_REGION_NBYTES,
    MAX_TOTAL_NBYTES,
    Member,
    Need,
    flows_of,
    initiator_of,
    kinds_of,
    load_needs,
    needs_of,
    partner_of,
    place_flows,
    regions_for,
)
from xferd.clients.bench._standard import standard_cases

CASES = st.builds(
    Case,
    place=st.sampled_from([Place.LOCAL, Place.TCP]),
    op=st.sampled_from(["READ", "WRITE"]),
    block_nbytes=st.sampled_from([8, 64, 4096, 12288]),
    batch=st.integers(1, 20),
    src=st.sampled_from(["DRAM", "PRIVATE"]),
    dst=st.sampled_from(["DRAM", "MEMFD"]),
    scheme=st.sampled_from(SCHEMES),
    clients=st.integers(1, 5),
    threads=st.integers(1, 3),
    order=st.sampled_from(["random", "sequential"]),
)


@pytest.mark.parametrize(
    ("scheme", "pairs"),
    [
        ("pairwise", {(0, 0), (1, 1), (2, 2)}),
        ("many-to-one", {(0, 0), (1, 0), (2, 0)}),
        ("one-to-many", {(0, 0), (0, 1), (0, 2)}),
        ("all-to-all", {(one, other) for one in range(3) for other in range(3)}),
    ],
)
def test_a_scheme_says_who_reaches_whom(scheme, pairs):
    flows = flows_of(Case(Place.LOCAL, "READ", 4096, 1, scheme=scheme, clients=3, threads=2))
    assert {(flow.initiator, flow.partner) for flow in flows} == pairs
    assert len(flows) == 2 * len(pairs)


@given(CASES, st.integers(1, 1000))
def test_no_two_flows_share_a_block_on_either_side(case, visit):
    regions = regions_for([case])
    counts = {need: nbytes // case.block_nbytes for need, nbytes in regions.items()}
    used = defaultdict(list)
    local_kind, remote_kind = kinds_of(case)
    for placed in place_flows(case, counts, visit):
        used[Need(initiator_of(case, placed.flow.initiator), local_kind)].append(placed.local)
        used[Need(partner_of(placed.flow.partner), remote_kind)].append(placed.remote)
        assert placed.source == (placed.flow.partner if case.op == "READ" else placed.flow.initiator)
    assert set(used) == set(needs_of(case)) == set(regions)
    for need, rows in used.items():
        every = np.concatenate(rows)
        assert len(np.unique(every)) == len(every)
        assert every.max() < counts[need]
        assert all(len(part) == case.batch for part in rows)


def test_blocks_are_scattered_anew_each_visit_unless_in_order():
    case = Case(Place.LOCAL, "WRITE", 4096, 64)
    counts = {need: nbytes // 4096 for need, nbytes in regions_for([case]).items()}
    first, second = (place_flows(case, counts, visit)[0].local for visit in (1, 2))
    assert not np.array_equal(first, second)
    assert np.abs(np.diff(first)).max() > 1
    in_order = Case(Place.LOCAL, "WRITE", 4096, 64, order="sequential")
    assert place_flows(in_order, counts, 1)[0].local.tolist() == list(range(64))


@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        (Case(Place.LOCAL, "WRITE", 100, 3), 4096),
        (Case(Place.LOCAL, "WRITE", 1 << 20, 2), 8 << 20),
        (Case(Place.LOCAL, "WRITE", 64 << 10, 1024), 256 << 20),
        (Case(Place.LOCAL, "WRITE", 256 << 20, 1), 256 << 20),
        (Case(Place.LOCAL, "WRITE", 1 << 20, 512), 512 << 20),
    ],
)
def test_a_region_has_room_for_scatter_within_bounds(case, nbytes):
    assert set(regions_for([case]).values()) == {nbytes}


def test_many_clients_scatter_less_so_that_memory_suffices():
    case = Case(Place.LOCAL, "WRITE", 64 << 10, 256, clients=32)
    assert sum(regions_for([case]).values()) <= MAX_TOTAL_NBYTES
    assert min(regions_for([case]).values()) >= case.nbytes


def test_cases_share_regions():
    regions = regions_for(standard_cases())
    assert set(regions.values()) == {256 << 20}
    assert {need.member.agent + "@" + need.member.node for need in regions} == {
        "initiator-0@a",
        "initiator-0@b",
        "partner-0@a",
    }


@pytest.mark.parametrize("place", [Place.LOCAL, Place.TCP])
def test_a_load_has_two_regions_of_its_own(place):
    case = Case(place, "READ", 4096, 1, load=8)
    own, other = load_needs(case)
    assert own != other
    assert own.member.node == initiator_of(case, 0).node
    assert other.member.node == "a"
    regions = regions_for([case])
    assert regions[own] == regions[other] == LOAD_REGION_NBYTES
    assert {Member("a", "partner", 0), own.member, other.member} <= {need.member for need in regions}
