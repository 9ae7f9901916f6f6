"""Samples become the figures of tables and documents, and wrong bytes decide how it ends."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._app import report
from xferd.clients.bench._cases import ECHO, Case, Place
from xferd.clients.bench._documents import (
    BEGIN,
    END,
    document,
    findings,
    peer_settings,
    rewrite,
    section,
    write_csv,
    write_json,
)
from xferd.clients.bench._options import parser
from xferd.clients.bench._pace import Pace
from xferd.clients.bench._plot import as_lines, plot
from xferd.clients.bench._probes import Probe, Sample, Series, Visit
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import measure
from xferd.clients.bench._tables import narrow, tables

LOCAL = Case(Place.LOCAL, "WRITE", 64 << 10, 1024, control="grpc")
TCP = Case(Place.TCP, "READ", 64 << 10, 1024, control="grpc")
COPY = Case(Place.LIMIT, "memcpy", 64 << 10, 1024)
SUBMIT = Case(Place.LOCAL, "WRITE", 4096, 1, control="grpc")
FAIR = Case(Place.TCP, "READ", 4096, 1, control="ring", scenario="fairness")
MANY = Case(Place.LOCAL, "WRITE", 4096, 8, scheme="many-to-one", clients=2, scenario="clients", control="ring")

ENVIRONMENT = {
    "date": "2026-01-01",
    "cores": 2,
    "cpu": "a cpu",
    "memory_gib": 1.0,
    "kernel": "Linux",
    "python": "3.11",
    "packages": {"numpy": "2", "uvloop": None},
    "load": 0.1,
    "systems": {"iperf3": {"version": "iperf 3"}, "nixl": {"version": "1.5.1", "tcp": {"UCX_TLS": "tcp"}}},
}


def series(system: str, case: Case, *rounds: list[float], fault: str | None = "", rates=(1e9,)) -> Series:
    return Series(
        system,
        case,
        [Visit([Sample(s, case.nbytes or 10**9) for s in visit], 0.5, 0.25, fault, rates) for visit in rounds],
    )


def test_figures_are_medians_and_percentiles_of_all_requests():
    [row] = make_rows([series("xferd", LOCAL, [0.010, 0.020], [0.030, 0.040, 0.050])])
    assert row.requests == 5
    assert row.p50_us == pytest.approx(30_000)
    assert row.p50_us < row.p90_us < row.p99_us < row.p999_us <= 50_000
    assert row.gb_per_s == pytest.approx(LOCAL.nbytes / 0.030 / 1e9)
    assert row.gb_per_s_p10 < row.gb_per_s < row.gb_per_s_p90
    assert row.cpu_s_per_gb == pytest.approx(1.5 / (5 * LOCAL.nbytes / 1e9))
    assert row.server_cpu_ms == pytest.approx(200)
    assert row.verified is True
    assert row.prepare_us is row.post_us is row.transfer_us is None


def test_the_parts_of_a_request_are_medians_too():
    one = series("xferd", LOCAL)
    one.visits.append(Visit([Sample(6e-6 * n, 1, 1e-6 * n, 2e-6 * n, 3e-6 * n) for n in (1, 2, 9)], 0, 0, ""))
    [row] = make_rows([one])
    assert (row.prepare_us, row.post_us, row.transfer_us) == pytest.approx((2, 4, 6))


def test_clients_at_once_are_added_up_and_the_slowest_is_seen():
    one = series("xferd", MANY, [0.5], [0.5], [0.5], rates=(3e9, 1e9))
    [row] = make_rows([one])
    assert row.gb_per_s == pytest.approx(4.0)
    assert row.slowest_share == pytest.approx(0.5)


def test_speed_in_an_open_loop_is_what_was_moved():
    [row] = make_rows([series("xferd", LOCAL, [0.001], rates=(2e9,))], is_open=True)
    assert row.gb_per_s == pytest.approx(2.0)


def test_ratios_are_taken_within_a_round():
    """A minute in which all is twice as slow leaves the ratio as it is."""
    both = [series("xferd", LOCAL, [0.02], [0.04], [0.02]), series("memcpy", COPY, [0.01], [0.02], [0.01])]
    rows = make_rows(both, {("xferd", LOCAL): {"memcpy": ("memcpy", COPY), "nixl": ("nixl", LOCAL)}})
    assert rows[0].ratios == {"memcpy": pytest.approx(0.5)}
    assert rows[1].ratios == {}


def test_a_call_is_compared_by_time_and_has_no_speed():
    rows = make_rows(
        [series("xferd", SUBMIT, [0.002]), series("xferd", ECHO, [0.001], fault=None)],
        {("xferd", SUBMIT): {"echo": ("xferd", ECHO)}},
    )
    assert rows[0].ratios == {"echo": pytest.approx(2.0)}
    assert rows[1].gb_per_s is rows[1].verified is None


def test_a_loaded_case_is_compared_by_p99():
    loaded = dataclasses.replace(FAIR, load=8)
    times = [0.001] * 90 + [0.004] * 10
    one, other = series("xferd", loaded, times), series("xferd", FAIR, [0.001] * 100)
    one.visits[0].load_rate = 2e9
    rows = make_rows([one, other], {("xferd", loaded): {"idle p99": ("xferd", FAIR)}})
    assert rows[0].ratios == {"idle p99": pytest.approx(4.0)}
    assert rows[0].load_gb_per_s == pytest.approx(2.0)
    assert rows[0].cpu_s_per_gb is None, "the daemons were at work for the load"
    assert any("4.00 x of its idle p99" in line for line in findings(rows))


def test_one_wrong_visit_makes_the_case_wrong():
    one = series("xferd", TCP, [0.01], [0.01])
    one.visits[1].fault = "stale bytes"
    [row] = make_rows([one])
    assert row.verified is False
    assert row.faults == ("stale bytes",)


def test_the_document_has_the_fields_that_were_agreed():
    told = document(make_rows([series("xferd", TCP, [0.01])]), ENVIRONMENT)
    again = json.loads(json.dumps(told))
    wanted = (
        "system op scheme src dst block_nbytes batch threads clients prepared control place gb_per_s p50_us p90_us "
        "p99_us p999_us prepare_us post_us transfer_us cpu_s_per_gb verified ratios"
    )
    assert set(wanted.split()) <= set(again["rows"][0])
    assert (again["rows"][0]["op"], again["rows"][0]["place"]) == ("READ", "tcp")
    assert again["environment"]["cpu"] == "a cpu"


def test_csv_has_a_line_for_each_row_and_a_column_for_each_ratio(tmp_path):
    both = [series("xferd", LOCAL, [0.02]), series("memcpy", COPY, [0.01])]
    rows = make_rows(both, {("xferd", LOCAL): {"memcpy": ("memcpy", COPY)}})
    write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["system"] for line in lines] == ["xferd", "memcpy"]
    assert float(lines[0]["x memcpy"]) == pytest.approx(0.5)
    assert lines[1]["x memcpy"] == ""
    assert float(lines[0]["p50_us"]) == pytest.approx(20_000)
    with pytest.raises(InvalidArgument, match="cannot be written"):
        write_csv(rows, tmp_path / "missing" / "rows.csv")


def test_the_document_is_saved_as_it_is_printed(tmp_path):
    rows = make_rows([series("xferd", LOCAL, [0.02])])
    write_json(rows, ENVIRONMENT, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads(json.dumps(document(rows, ENVIRONMENT)))
    with pytest.raises(InvalidArgument, match="cannot be written"):
        write_json(rows, ENVIRONMENT, tmp_path / "missing" / "rows.json")


def test_tables_have_no_empty_columns():
    found = tables(make_rows([series("xferd", LOCAL, [0.02]), series("xferd", MANY, [0.02], rates=(1e9, 1e9))]))
    head, cells = found["Bytes moved"]
    assert "slowest client" in head
    assert "prepare" not in head
    assert "load GB/s" not in head
    assert all(any(line[number] for line in cells) for number in range(len(head)))


def test_a_table_that_is_too_wide_does_without_what_matters_least():
    whole = tables(make_rows([series("xferd", LOCAL, [0.02, 0.03])]))["Bytes moved"]
    assert narrow(whole, 400) == whole
    head, cells = narrow(whole, 90)
    assert {"system", "case", "GB/s", "p50", "bytes"} <= set(head)
    assert "p99.9" not in head
    assert [len(line) for line in cells] == [len(head)]
    assert cells[0][head.index("GB/s")] == whole[1][0][whole[0].index("GB/s")]


def swept(system: str, count: int) -> list[Series]:
    return [series(system, dataclasses.replace(LOCAL, block_nbytes=4096 << n), [0.01]) for n in range(count)]


def test_a_sweep_is_drawn_as_lines_and_few_sizes_as_bars(tmp_path):
    rows = make_rows([*swept("xferd", 4), *swept("nixl", 4)])
    lines = as_lines(rows)
    assert [len(line) for line in lines.values()] == [4, 4]
    assert as_lines(make_rows(swept("xferd", 2))) == {}
    for name, shown in (("lines.svg", rows), ("bars.png", rows[:2])):
        plot(shown, ENVIRONMENT, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


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
    assert 'nixl ran with {"version": "1.5.1", "tcp": {"UCX_TLS": "tcp"}}' in text
    assert "old" not in text
    rewrite(page, "again")
    assert page.read_text() == f"before\n{BEGIN}\nagain\n{END}\nafter\n"


def test_settings_are_printed_for_peers_alone():
    assert [line.split()[0] for line in peer_settings(ENVIRONMENT)] == ["nixl"]


def test_the_section_shows_the_plot_that_lies_beside_it(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    rows = make_rows([series("xferd", TCP, [0.01])])
    options = parser().parse_args(["--write-docs", str(page), "--plot", str(tmp_path / "run.svg")])
    assert report(rows, ENVIRONMENT, options) == 0
    assert "![GB/s of each case](run.svg)" in page.read_text()
    assert (tmp_path / "run.svg").exists()


@pytest.mark.parametrize("text", ["", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}", BEGIN])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "performance.md"
    page.write_text(text)
    with pytest.raises(InvalidArgument, match="no section to fill"):
        rewrite(page, "new")
    assert page.read_text() == text


@pytest.mark.parametrize("fault", ["", "stale bytes at word 0 of target block 7"])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_wrong_bytes_decide_the_exit_status_and_are_named(capsys, fault, arguments):
    rows = make_rows([series("xferd", TCP, [0.01], fault=fault), series("xferd", SUBMIT, [0.001])])
    assert report(rows, ENVIRONMENT, parser().parse_args(arguments)) == bool(fault)
    said = capsys.readouterr()
    assert said.err == (f"xferbench: xferd {TCP.name}: {fault}\n" if fault else "")
    if arguments:
        assert [row["verified"] for row in json.loads(said.out)["rows"]] == [not fault, True]
    else:
        assert ("WRONG" in said.out) == bool(fault)
