"""Cases are chosen with what they are compared with; samples become the figures of tables and documents."""

from __future__ import annotations

import json

import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._app import main, parser, region_for, report
from xferd.clients.bench._cases import ECHO, MEMCPY, STREAM, Case, Place, choose, standard_cases
from xferd.clients.bench._documents import BEGIN, END, document, rewrite, section
from xferd.clients.bench._probes import Probe, Sample, Series, Visit
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import Pace, measure

LOCAL = Case(Place.LOCAL, "WRITE", 64 << 10, 1024)
TCP = Case(Place.TCP, "READ", 64 << 10, 1024)
COPY = Case(Place.LIMIT, "memcpy", 64 << 10, 1024)
SUBMIT = Case(Place.CONTROL, "submit", 4096, 1)

ENVIRONMENT = {
    "date": "2026-01-01",
    "cores": 2,
    "cpu": "a cpu",
    "memory_gib": 1.0,
    "kernel": "Linux",
    "python": "3.11",
    "packages": {"numpy": "2", "uvloop": None},
    "load": 0.1,
    "systems": {"iperf3": {"version": "iperf 3"}},
}


def series(system: str, case: Case, *rounds: list[float], fault: str | None = "") -> Series:
    return Series(
        system, case, [Visit([Sample(s, case.nbytes or 10**9) for s in visit], 0.5, 0.25, fault) for visit in rounds]
    )


def test_names_are_what_patterns_match():
    assert TCP.name == "tcp/READ/64KiB x 1024"
    assert set(choose(standard_cases(), ["tcp/*/64kib x *"])) == {TCP, Case(Place.TCP, "WRITE", 64 << 10, 1024)} | {
        STREAM,
        MEMCPY,
    }


def test_references_come_along_once_and_in_order():
    chosen = choose(standard_cases(), ["local/write/64KiB", "submit"])
    assert chosen == tuple(case for case in standard_cases() if case in {LOCAL, COPY, MEMCPY, SUBMIT, ECHO})


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(InvalidArgument, match="no case matches 'rdma'"):
        choose(standard_cases(), ["tcp", "rdma"])


def test_the_quick_set_is_part_of_the_standard_set():
    assert set(standard_cases(quick=True)) < set(standard_cases())


@pytest.mark.parametrize(
    ("cases", "nbytes"),
    [
        ((), 4096),
        ((Case(Place.LOCAL, "WRITE", 100, 3),), 4096),
        ((Case(Place.LOCAL, "WRITE", 1 << 20, 2),), 8 << 20),
        (standard_cases(), 256 << 20),
        ((Case(Place.LOCAL, "WRITE", 1 << 20, 512),), 512 << 20),
    ],
)
def test_a_region_has_room_for_scatter_within_bounds(cases, nbytes):
    assert region_for(cases) == nbytes


def test_figures_are_medians_and_percentiles_of_all_requests():
    [row] = make_rows([series("xferd", LOCAL, [0.010, 0.020], [0.030, 0.040, 0.050])])
    assert row.requests == 5
    assert row.p50_us == pytest.approx(30_000)
    assert row.gb_per_s == pytest.approx(LOCAL.nbytes / 0.030 / 1e9)
    assert row.gb_per_s_p10 < row.gb_per_s < row.gb_per_s_p90
    assert row.cpu_s_per_gb == pytest.approx(1.5 / (5 * LOCAL.nbytes / 1e9))
    assert row.server_cpu_ms == pytest.approx(200)
    assert row.verified is True


def test_ratios_are_taken_within_a_round():
    """A minute in which all is twice as slow leaves the ratio as it is."""
    rows = make_rows([series("xferd", LOCAL, [0.02], [0.04], [0.02]), series("memcpy", COPY, [0.01], [0.02], [0.01])])
    assert rows[0].ratios == {"memcpy": pytest.approx(0.5)}
    assert rows[1].ratios == {}


def test_a_call_is_compared_by_time_and_has_no_speed():
    rows = make_rows([series("xferd", SUBMIT, [0.002]), series("xferd", ECHO, [0.001], fault=None)])
    assert rows[0].ratios == {"echo": pytest.approx(2.0)}
    assert rows[0].gb_per_s is rows[1].gb_per_s is rows[1].verified is None


def test_one_wrong_visit_makes_the_case_wrong():
    one = series("xferd", TCP, [0.01], [0.01])
    one.visits[1].fault = "stale bytes"
    [row] = make_rows([one])
    assert row.verified is False
    assert row.faults == ("stale bytes",)


def test_the_document_has_the_fields_that_were_agreed():
    told = document(make_rows([series("xferd", TCP, [0.01])]), ENVIRONMENT)
    again = json.loads(json.dumps(told))
    wanted = "system op scheme src dst block_nbytes batch gb_per_s p50_us p99_us cpu_s_per_gb verified place prepared"
    assert set(wanted.split()) <= set(again["rows"][0])
    assert (again["rows"][0]["op"], again["rows"][0]["place"]) == ("READ", "tcp")
    assert again["environment"]["cpu"] == "a cpu"


class FakeProbe(Probe):
    """Notes what is done to it."""

    system = "fake"

    def __init__(self, name: str, story: list[str], most: int | None = None) -> None:
        super().__init__(Case(Place.CONTROL, name))
        self.story = story
        self.most = most

    @property
    def max_requests(self) -> int | None:
        return self.most

    def begin(self, visit: int) -> None:
        self.story.append(f"{self.case.op} begin {visit}")

    def request(self) -> None:
        self.story.append(f"{self.case.op} request")

    def verify(self) -> str:
        self.story.append(f"{self.case.op} verify")
        return ""


def test_all_are_visited_in_each_round_and_verified_after_the_first_request():
    story: list[str] = []
    told: list[str] = []
    pace = Pace(rounds=3, visit_s=0.0, min_requests=2)
    found = measure([FakeProbe("a", story), FakeProbe("b", story)], pace, lambda probe: told.append(probe.case.op))
    assert [len(one.visits) for one in found] == [3, 3]
    assert [len(visit.samples) for visit in found[0].visits] == [2, 2, 2]
    assert [sorted(told[start : start + 2]) for start in (0, 2, 4)] == [["a", "b"]] * 3
    name = told[0]
    assert story[:5] == [f"{name} begin 1", f"{name} request", f"{name} verify", f"{name} request", f"{name} request"]


def test_a_probe_that_times_itself_is_asked_no_more_often_than_it_says():
    story: list[str] = []
    [one] = measure([FakeProbe("a", story, most=1)], Pace(rounds=1, min_requests=3), lambda _probe: None)
    assert story == ["a begin 1", "a verify", "a request"]
    assert len(one.visits[0].samples) == 1


def test_the_section_between_the_markers_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rewrite(page, section(make_rows([series("xferd", TCP, [0.01]), series("xferd", SUBMIT, [0.001])]), ENVIRONMENT))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nMeasured on 2026-01-01: 2 cores of a cpu")
    assert text.endswith(f"{END}\nafter\n")
    assert "| xferd | tcp | READ 64KiB x 1024 |" in text
    assert "old" not in text
    rewrite(page, "again")
    assert page.read_text() == f"before\n{BEGIN}\nagain\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}", BEGIN])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "performance.md"
    page.write_text(text)
    with pytest.raises(InvalidArgument, match="no section to fill"):
        rewrite(page, "new")
    assert page.read_text() == text


def test_the_command_lists_cases_without_running_any(capsys):
    assert main(["--list", "--cases", "tcp/READ"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "tcp/READ/256MiB x 1" in listed
    assert "limit/stream" in listed
    assert not any(line.startswith("local") for line in listed)


@pytest.mark.parametrize("arguments", [["--cases", "nothing"], ["--plot", "figure.txt"]])
def test_what_cannot_be_done_is_said_before_anything_is_measured(capsys, arguments):
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("xferbench: ")


@pytest.mark.parametrize("fault", ["", "stale bytes at word 0 of target block 7"])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_wrong_bytes_decide_the_exit_status_and_are_named(capsys, fault, arguments):
    rows = make_rows([series("xferd", TCP, [0.01], fault=fault), series("xferd", SUBMIT, [0.001])])
    assert report(rows, ENVIRONMENT, parser().parse_args(arguments)) == bool(fault)
    said = capsys.readouterr()
    assert said.err == (f"xferbench: xferd tcp/READ/64KiB x 1024: {fault}\n" if fault else "")
    if arguments:
        assert [row["verified"] for row in json.loads(said.out)["rows"]] == [not fault, True]
    else:
        assert ("WRONG" in said.out) == bool(fault)
