"""What the benchmark and a peer's process say to each other; which cases a peer takes; how its requests are timed."""

from __future__ import annotations

from multiprocessing.connection import Pipe

import numpy as np
import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import Unsupported
from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._mooncake import Mooncake
from xferd.clients.bench._nixl import Nixl, NixlDefault
from xferd.clients.bench._peer_process import descriptors, receive, send, timed

LOCAL = Case(Place.LOCAL, "WRITE", 4096, 64)
TCP = Case(Place.TCP, "READ", 4096, 64)


class Absent(Nixl):
    """A peer whose wheel is nowhere."""

    distributions = ("no-such-wheel",)


class Present(Nixl):
    """A peer whose wheel is there."""

    @classmethod
    def installed(cls):
        return "nixl-cu13", "1.5.1"


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()).filter(lambda found: "arrays" not in found),
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), max_size=3),
)
def test_a_message_arrives_with_its_arrays(message, columns):
    ours, theirs = Pipe()
    with ours, theirs:
        send(ours, message, *(np.array(column, np.int64) for column in columns))
        told, arrays = receive(theirs)
    assert told == message
    assert [array.tolist() for array in arrays] == columns


def test_timings_keep_their_type_over_the_connection():
    ours, theirs = Pipe()
    with ours, theirs:
        send(ours, {}, np.array([[0.5, 0.25, 0.125]]))
        _, [flat] = receive(theirs)
    assert flat.dtype == np.float64
    assert flat.tolist() == [0.5, 0.25, 0.125]


def test_a_closed_connection_is_the_end():
    ours, theirs = Pipe()
    ours.close()
    with theirs, pytest.raises(EOFError):
        receive(theirs)


@given(
    st.integers(0, 2**47),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=50),
    st.sampled_from([8, 512, 4096, 1 << 28]),
)
def test_descriptors_are_addresses_of_blocks(address, rows, block_nbytes):
    table = descriptors(address, np.array(rows, np.int64), block_nbytes)
    assert table.dtype == np.uint64
    assert table.tolist() == [[address + row * block_nbytes, block_nbytes, 0] for row in rows]


def test_the_parts_of_a_request_are_the_time_between_its_moments():
    moments = iter([(1.0, 1.5, 1.625, 2.0), (3.0, 3.0, 3.25, 4.0)])
    assert timed(lambda: next(moments), 2, 2, 60.0).tolist() == [[0.5, 0.125, 0.375], [0.0, 0.25, 0.75]]


@pytest.mark.parametrize(("least", "most", "seconds", "count"), [(3, 10, 0.0, 3), (1, 5, 60.0, 5), (1, 1, 0.0, 1)])
def test_a_visit_ends_by_time_within_its_bounds(least, most, seconds, count):
    assert len(timed(lambda: (0.0, 0.0, 0.0, 1e9 if not seconds else 0.0), least, most, seconds)) == count


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(Place.LOCAL, "WRITE", 4096, 1, src="FILE"), "FILE to DRAM is not implemented"),
        (Case(Place.LOCAL, "WRITE", 4096, 1, scheme="many-to-one"), "many-to-one"),
        (Case(Place.CONTROL, "echo"), "not measured for control"),
        (LOCAL, ""),
        (TCP, ""),
    ],
)
def test_what_a_peer_takes(case, why):
    assert why in Present(4096).refusal(case)
    assert bool(Present(4096).refusal(case)) == bool(why)


def test_mooncake_has_no_road_within_a_machine():
    assert Mooncake(4096).refusal(LOCAL) == "mooncake is not measured for local"


def test_a_missing_wheel_is_refused_with_the_extra_that_brings_it():
    system = Absent(4096)
    assert system.refusal(LOCAL) == "nixl is not installed: pip install 'xferd[peers]'"
    with pytest.raises(Unsupported, match=r"xferd\[peers\]"), system:
        system.probe(LOCAL)
    assert system.settings()["version"] is None


def test_settings_are_those_that_both_places_run_with():
    settings = Present(1 << 20).settings()
    assert (settings["package"], settings["version"]) == ("nixl-cu13", "1.5.1")
    assert settings["local"]["environment"] == {}
    assert settings["tcp"]["environment"] == {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    assert settings["tcp"]["initiator"] == {"module": "nixl_cu13", "agent": {"enable_prog_thread": False}}
    assert Present(4096).agent("target") == {"enable_prog_thread": True}


def test_nixl_as_it_comes_is_told_nothing_but_the_road():
    system = NixlDefault(4096)
    assert (system.agent("initiator"), system.agent("target")) == ({}, {})
    assert (system.environ(Place.LOCAL), system.environ(Place.TCP)) == ({}, {"UCX_TLS": "tcp"})
    assert system.driver == Nixl.driver
