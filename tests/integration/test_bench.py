"""The benchmark runs against real daemons, verifies their bytes, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from xferd.clients.bench._app import region_for, run, systems_for
from xferd.clients.bench._cases import ECHO, EXPLAIN, NODE, Case, Place
from xferd.clients.bench._schedule import Pace
from xferd.clients.bench._xferd import MoveProbe, Xferd

if TYPE_CHECKING:
    from xferd.clients.bench._probes import Probe

CASES = (
    Case(Place.LIMIT, "memcpy", 4096, 64),
    Case(Place.LOCAL, "WRITE", 4096, 64),
    Case(Place.LOCAL, "READ", 4096, 64, prepared=False),
    Case(Place.TCP, "READ", 4096, 64),
    Case(Place.TCP, "WRITE", 4096, 64),
    Case(Place.CONTROL, "submit", 4096, 1),
    Case(Place.CONTROL, EXPLAIN.op, 512, 100, prepared=False),
    ECHO,
    NODE,
)
BRIEF = Pace(rounds=2, visit_s=0.0, min_requests=2)


@pytest.mark.slow
def test_every_kind_of_case_runs_and_is_verified():
    folders = set(Path(tempfile.gettempdir()).glob("xferd-*"))
    rows, record = run(CASES, systems_for(CASES), BRIEF)
    by_case = {row.case: row for row in rows}
    assert set(by_case) == set(CASES)
    assert {case for case, row in by_case.items() if row.verified} == set(CASES[:6])
    assert all(row.verified is None for case, row in by_case.items() if case in CASES[6:])
    assert all(row.gb_per_s for row in rows if row.case.place is not Place.CONTROL)
    assert all(row.server_cpu_ms for row in rows if row.system == "xferd"), "the daemons' CPU time was not seen"
    assert by_case[CASES[1]].ratios["memcpy"] > 0
    assert record["systems"]["xferd"]["version"]
    assert not psutil.Process().children(recursive=True)
    assert set(Path(tempfile.gettempdir()).glob("xferd-*")) <= folders


class Forgetful(Xferd):
    """Says that it moved bytes, and did not."""

    def probe(self, case: Case) -> Probe:
        probe = super().probe(case)
        assert isinstance(probe, MoveProbe)
        probe._call = lambda: None
        return probe


@pytest.mark.slow
def test_bytes_that_did_not_arrive_are_noticed():
    case = Case(Place.TCP, "READ", 4096, 64)
    [row], _ = run([case], [Forgetful(region_for([case]))], BRIEF)
    assert row.verified is False
    assert "missing bytes" in row.faults[0]
