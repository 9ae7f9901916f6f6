"""The benchmark runs against real daemons and clients, verifies their bytes, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from xferd.clients.bench._app import run
from xferd.clients.bench._cases import ECHO, EXPLAIN, NODE, WAITS, Case, Place
from xferd.clients.bench._pace import Pace
from xferd.clients.bench._stage_points import SUBJECTS
from xferd.clients.bench._stages import profile
from xferd.clients.bench._store import Store
from xferd.clients.bench._systems import systems_for
from xferd.clients.bench._xferd import Xferd

if TYPE_CHECKING:
    from xferd.clients.bench._moves import MoveProbe
    from xferd.clients.bench._probes import Probe

ONE = Case(Place.LOCAL, "WRITE", 4096, 64, control="grpc")
MOVES = (
    ONE,
    dataclasses.replace(ONE, op="READ", prepared="no"),
    dataclasses.replace(ONE, place=Place.TCP, op="READ", prepared="lists"),
    dataclasses.replace(ONE, place=Place.TCP),
    dataclasses.replace(ONE, src="PRIVATE", dst="FILE"),
    dataclasses.replace(ONE, op="READ", src="MEMFD", dst="PRIVATE"),
    dataclasses.replace(ONE, scheme="many-to-one", clients=2, threads=2),
    dataclasses.replace(ONE, place=Place.TCP, op="READ", scheme="all-to-all", clients=2, order="sequential"),
)
OTHERS = (Case(Place.LIMIT, "memcpy", 4096, 64), Case(Place.CONTROL, EXPLAIN.op, 512, 100, prepared="no"), ECHO, NODE)
BRIEF = Pace(rounds=2, visit_s=0.0, min_requests=2)


@pytest.fixture
def nothing_left(monkeypatch):
    home = Path(tempfile.mkdtemp(prefix="xb-"))  # short: paths of sockets are
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    # The tracker of multiprocessing's semaphores serves all workers and ends with this process.
    assert not [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]
    assert not list(home.iterdir())
    home.rmdir()


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_every_kind_of_case_runs_and_is_verified():
    cases = (*OTHERS, *MOVES)
    rows, record = run(cases, systems_for(cases, ["memcpy"]), BRIEF)
    by_case = {row.case: row for row in rows}
    assert set(by_case) == set(cases)
    assert {case for case, row in by_case.items() if row.verified} == {*MOVES, OTHERS[0]}
    assert all(by_case[case].gb_per_s for case in MOVES)
    assert all(row.server_cpu_ms for row in rows if row.system == "xferd"), "the daemons' CPU time was not seen"
    assert all(by_case[case].ratios["memcpy"] > 0 for case in MOVES)
    assert record["systems"]["xferd"]["version"]
    for case in MOVES:
        row = by_case[case]
        assert row.requests == 2 * 2 * case.clients * case.threads
        assert 0 < row.transfer_us < row.p50_us * 1.5
        assert row.post_us > 0
        assert (row.prepare_us > 0) == (case.prepared != "transfer")
        assert (row.slowest_share is None) == (case.clients == 1)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_the_ring_moves_the_same_bytes():
    cases = [dataclasses.replace(case, control="ring") for case in MOVES if case.prepared != "no"]
    cases += [dataclasses.replace(cases[0], wait=wait) for wait in WAITS]
    rows, _ = run(cases, systems_for(cases, []), BRIEF)
    assert len(rows) == len(cases)
    assert all(row.verified for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_load_runs_beside_and_what_it_moves_is_told():
    idle = dataclasses.replace(ONE, batch=1, scenario="fairness")
    loaded = dataclasses.replace(idle, load=2)
    rows, _ = run([idle, loaded], systems_for([idle, loaded], []), dataclasses.replace(BRIEF, rounds=1))
    by_case = {row.case: row for row in rows}
    assert by_case[loaded].verified
    assert by_case[loaded].load_gb_per_s > 0
    assert by_case[loaded].ratios["idle p99"] > 0
    assert by_case[idle].load_gb_per_s is None


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_an_open_loop_makes_the_requests_that_arrive():
    case = dataclasses.replace(ONE, threads=2)
    pace = Pace(rounds=1, visit_s=0.5, rate=100.0)
    [row], record = run([case], systems_for([case], []), pace)
    assert 20 < row.requests < 90
    assert row.verified
    assert row.gb_per_s < 100 * 64 * 4096 / 1e9 * 2
    assert record["pace"]["rate"] == 100.0


FILES = (
    Case(Place.LOCAL, "READ", 4096, 64, src="FILE_DIRECT", control="ring"),
    Case(Place.LOCAL, "WRITE", 4096, 64, dst="FILE_DIRECT", control="ring", order="sequential"),
    Case(Place.LOCAL, "READ", 4096, 64, src="FILE", control="ring"),
    Case(Place.LOCAL, "WRITE", 4096, 64, dst="FILE", control="ring"),
    Case(Place.LOCAL, "READ", 4096, 64, src="STORAGE", control="ring"),
    Case(Place.LOCAL, "READ", 4096, 64, src="STORAGE_PLAIN", control="ring"),
    Case(Place.LOCAL, "WRITE", 4096, 64, dst="STORAGE", control="ring"),
    Case(Place.LOCAL, "READ", 4096, 64, src="OBJECT", control="ring"),
    Case(Place.LOCAL, "WRITE", 64 << 10, 200, dst="OBJECT", control="grpc"),
    Case(Place.TCP, "READ", 4096, 64, src="OBJECT", control="ring"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_files_storage_pools_and_objects_are_measured_and_verified():
    """Objects of one request and of several parts; what cannot be here is refused with the reason."""
    xferd = Xferd(FILES, Store())
    able = [case for case in FILES if not xferd.refusal(case)]
    settings = ["backends.object.part=5MiB"]
    rows, record = run(FILES, systems_for(FILES, ["preadv", "obstore"], settings=settings), BRIEF)
    assert record["systems"]["xferd"]["configuration"] == settings
    own = {row.case: row for row in rows if row.system == "xferd"}
    assert len(able) >= 6
    assert set(own) == set(able)
    assert all(row.verified for row in own.values())
    assert own[FILES[2]].ratios["preadv"] > 0
    assert own[FILES[4]].ratios["no checksum"] > 0
    assert all(row.verified for row in rows if row.system == "preadv")
    assert [row.case.op for row in rows if row.system == "obstore"].count("READ") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")
def test_fio_runs_the_same_blocks():
    rows, record = run(FILES[:3], systems_for(FILES[:3], ["fio"]), dataclasses.replace(BRIEF, rounds=1))
    assert {row.case.src for row in rows if row.system == "fio"} <= {"FILE_DIRECT", "FILE", "DRAM"}
    assert all(row.ratios["fio"] > 0 for row in rows if row.system == "xferd")
    assert record["systems"]["fio"]["ioengine"] in ("io_uring", "libaio")


class Forgetful(Xferd):
    """Says that it moved bytes, and did not."""

    def probe(self, case: Case) -> Probe:
        probe: MoveProbe = super().probe(case)  # type: ignore[assignment]
        probe.request = lambda: None  # type: ignore[method-assign]
        return probe


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_gpu_memory_is_measured_and_verified_beside_plain_copies():
    """On a real GPU where there is one, on a simulated one elsewhere."""
    one = dataclasses.replace(ONE, src="VRAM", dst="VRAM", control="ring")
    cases = (
        one,
        dataclasses.replace(one, src="DRAM"),
        dataclasses.replace(one, op="READ", dst="DRAM"),
        dataclasses.replace(one, op="READ", place=Place.TCP),
    )
    rows, _ = run(cases, systems_for(cases, ["gpu-copy"]), BRIEF)
    own = {row.case: row for row in rows if row.system == "xferd"}
    assert set(own) == set(cases)
    assert all(row.verified for row in own.values())
    assert [case for case in cases if "gpu-copy" in own[case].ratios] == list(cases[:3]), "it knows one node only"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_bytes_that_did_not_arrive_are_noticed():
    case = dataclasses.replace(ONE, place=Place.TCP, op="READ")
    [row], _ = run([case], [Forgetful([case])], BRIEF)
    assert row.verified is False
    assert "missing bytes" in row.faults[0]


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_profile_finds_every_stage(subject):
    """The daemon's functions are known by name only: this is where a renamed one is noticed."""
    one = profile(subject, 30)
    assert {stage.stamp for stage, us in one.stages if us is None} == set()
    assert all(us >= 0 for _, us in one.stages)
    assert sum(us for _, us in one.stages) == pytest.approx(one.p50_us, rel=0.8)
    assert one.requests == 30
