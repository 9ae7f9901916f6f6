"""Peers run the same cases in their own best way, once each, and a system that is missing is named with its remedy."""

from __future__ import annotations

import dataclasses

import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench import _systems as systems
from xferd.clients.bench._app import main
from xferd.clients.bench._cases import ECHO, MEMCPY, Case, Place
from xferd.clients.bench._plan import make_plan
from xferd.clients.bench._probes import Probe, System
from xferd.clients.bench._xferd import Xferd

RING = Case(Place.LOCAL, "WRITE", 4096, 1024, control="ring")
GRPC = Case(Place.LOCAL, "WRITE", 4096, 1024, control="grpc")
LISTS = Case(Place.LOCAL, "WRITE", 4096, 1024, control="grpc", prepared="lists")
COPY = Case(Place.LIMIT, "memcpy", 4096, 1024)


class Nothing(Probe):
    def __init__(self, system: str, case: Case) -> None:
        super().__init__(case)
        self.system = system  # type: ignore[misc]

    def request(self) -> None: ...


class Fake(System):
    """Takes cases that a condition holds for."""

    def __init__(self, name: str, takes) -> None:
        self.name = name  # type: ignore[misc]
        self.takes = takes

    def refusal(self, case: Case) -> str:
        return "" if self.takes(case) else f"{self.name} has no {case.prepared}"

    def probe(self, case: Case) -> Probe:
        return Nothing(self.name, case)


OWN = Fake("xferd", lambda case: case.place is not Place.LIMIT)
COPIER = Fake("memcpy", lambda case: case.place is Place.LIMIT)


def ran(plan) -> list[tuple[str, Case]]:
    return [(probe.system, probe.case) for probe in plan.probes]


def test_a_peer_runs_a_case_once_however_xferd_is_told():
    plan = make_plan([COPY, RING, GRPC], [COPIER, Fake("nixl", lambda _case: True), OWN])
    twin = Case(Place.LOCAL, "WRITE", 4096, 1024)
    assert ran(plan) == [("memcpy", COPY), ("xferd", RING), ("nixl", twin), ("xferd", GRPC)]
    for case in (RING, GRPC):
        assert plan.beside["xferd", case] == {"memcpy": ("memcpy", COPY), "nixl": ("nixl", twin)}
    assert plan.beside["nixl", twin] == {"memcpy": ("memcpy", COPY)}


def test_a_peer_that_cannot_prepare_so_does_it_in_its_own_way():
    peer = Fake("mooncake", lambda case: case.prepared == "transfer")
    plan = make_plan([LISTS], [peer, OWN])
    assert plan.beside["xferd", LISTS]["mooncake"][1].prepared == "transfer"


@pytest.mark.parametrize(
    "case",
    [
        Case(Place.LOCAL, "READ", 4096, 1, clients=4),
        Case(Place.LOCAL, "READ", 4096, 1, threads=2),
        Case(Place.LOCAL, "READ", 4096, 1, load=8),
        Case(Place.LOCAL, "READ", 4096, 1, order="sequential"),
    ],
)
def test_peers_are_not_asked_for_what_a_pair_cannot_do(case):
    plan = make_plan([case], [Fake("nixl", lambda _case: True), OWN])
    assert ran(plan) == [("xferd", case)]
    assert "not run by nixl" in plan.left_out[0]


def test_what_nobody_runs_is_said_and_limits_only_come_where_wanted():
    plan = make_plan([RING, COPY, ECHO], [Fake("xferd", lambda case: case is ECHO)])
    assert ran(plan) == [("xferd", ECHO)]
    assert len(plan.left_out) == 1
    assert RING.name in plan.left_out[0]


def test_ratios_are_to_what_is_run():
    plan = make_plan([RING, MEMCPY], [COPIER, OWN])
    assert plan.beside["xferd", RING] == {"memcpy 256 MiB": ("memcpy", MEMCPY)}


def test_a_system_that_is_missing_is_named_with_what_to_install(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["--against", "iperf3", "--quick"]) == 2
    assert "iperf3 is not installed" in capsys.readouterr().err
    assert systems.names_for(None) == ("memcpy",)
    assert systems.names_for(("none",)) == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"src": "OBJECT"}, "OBJECT"),
        ({"prepared": "no"}, "whole lists go by gRPC"),
        ({"control": "grpc", "wait": "poll"}, "only a ring"),
        ({"scheme": "star"}, "star"),
        ({"op": "SWAP"}, "SWAP"),
        ({"place": Place.LIMIT}, "a limit of the machine"),
    ],
)
def test_xferd_says_what_it_cannot_run(change, why):
    system = Xferd([])
    assert system.refusal(RING) == ""
    assert why in system.refusal(dataclasses.replace(RING, **change))


def test_a_run_that_would_fill_the_memory_is_refused_before_it_starts():
    too_much = Case(Place.LOCAL, "WRITE", 1 << 40, 64, control="ring")
    with pytest.raises(InvalidArgument, match="need 140737488355328 bytes"):
        Xferd([too_much]).__enter__()
