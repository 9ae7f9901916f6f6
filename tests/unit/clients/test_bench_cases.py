"""Cases are chosen by name with what they are compared with, or swept; a wrong wish is refused before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._app import main
from xferd.clients.bench._cases import ECHO, EXPLAIN, MEMCPY, STREAM, Case, Place
from xferd.clients.bench._options import cases_of, pace_of, parser
from xferd.clients.bench._rows import Row
from xferd.clients.bench._standard import choose, named_cases, references, standard_cases
from xferd.clients.bench._sweeps import Sweep, clients, counts, kinds, sizes

LOCAL = Case(Place.LOCAL, "WRITE", 64 << 10, 1024, control="ring")
TCP = Case(Place.TCP, "READ", 64 << 10, 1024, control="ring")
COPY = Case(Place.LIMIT, "memcpy", 64 << 10, 1024)


def test_names_are_what_patterns_match():
    assert TCP.name == "tcp/READ/64KiB x 1024/ring"
    found = choose(named_cases(), ["tcp/*/64kib x *"])
    assert set(found) == {TCP, dataclasses.replace(TCP, op="WRITE"), COPY, STREAM, MEMCPY}


def test_names_differ_where_cases_do():
    cases = named_cases()
    assert len({case.name for case in cases}) == len(cases)
    swept = cases_of(
        options("--threads 1,2 --clients 1:4 --prepared all --wait all --src all --scheme all --order sequential")
    )
    assert len({case.name for case in swept}) < len(swept), "one client is the same by every scheme"
    assert len({case.name for case in swept if case.clients > 1}) == len([case for case in swept if case.clients > 1])


def test_references_come_along_once_and_in_order():
    cases = named_cases()
    chosen = choose(cases, ["explain", "local/write/64KiB x 1024/ring"])
    assert chosen == tuple(case for case in cases if case in {LOCAL, COPY, MEMCPY, EXPLAIN, ECHO})


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(InvalidArgument, match="no case matches 'rdma'"):
        choose(standard_cases(), ["tcp", "rdma"])


def test_the_quick_set_is_part_of_the_standard_set():
    assert set(standard_cases(quick=True)) < set(standard_cases())


def test_scenarios_have_a_name_and_what_they_are_held_against():
    by_name = {word: choose(named_cases(), [word]) for word in ("fairness", "clients", "small/")}
    loaded = [case for case in by_name["fairness"] if case.load]
    assert {case.place for case in loaded} == {Place.LOCAL, Place.TCP}
    assert all(references(case)["idle p99"] in by_name["fairness"] for case in loaded)
    [many] = [case for case in by_name["clients"] if case.clients == 16]
    assert references(many)["one client"] in by_name["clients"]
    ways = [(case.control, case.wait) for case in by_name["small/"] if case.is_move]
    assert sorted(ways) == [("grpc", ""), ("ring", ""), ("ring", "block"), ("ring", "poll")]
    assert ECHO in by_name["small/"]
    assert not set(by_name["fairness"]) & {case for case in standard_cases() if case.is_move}


def test_peers_see_host_memory_only():
    case = Case(Place.LOCAL, "READ", 4096, 1, src="MEMFD", dst="FILE", control="ring")
    assert case.for_peer() == Case(Place.LOCAL, "READ", 4096, 1, src="DRAM", dst="FILE")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4KiB", (4096,)),
        ("4KiB:32KiB", (4096, 8192, 16384, 32768)),
        ("1KiB:5KiB", (1024, 2048, 4096)),
        ("512,4KiB:8KiB", (512, 4096, 8192)),
        ("8:8", (8,)),
    ],
)
def test_sizes_are_values_or_doubling_ranges(text, found):
    assert sizes(text) == found


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (sizes, "8KiB:4KiB"),
        (sizes, "0"),
        (sizes, "12"),
        (sizes, "4kb"),
        (sizes, ""),
        (sizes, "4KiB:"),
        (counts, "0:4"),
        (counts, "-1"),
        (counts, "x"),
        (counts, "1,,2"),
        (clients, "1:1024"),
        (kinds, "DRAM,tape"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_value(parse, text):
    with pytest.raises(InvalidArgument):
        parse(text)


def test_a_sweep_is_a_product():
    cases = Sweep(place=(Place.LOCAL, Place.TCP), block=(4096, 8192), batch=(1, 2, 4), threads=(1, 2)).cases()
    assert len(set(cases)) == len(cases) == 24


def test_a_sweep_that_nobody_waits_for_is_refused():
    with pytest.raises(InvalidArgument, match="4500 cases"):
        Sweep(block=tuple(range(8, 36008, 8))).cases()


def options(text: str):
    return parser().parse_args(text.split())


def test_any_dimension_makes_a_sweep_with_its_limits():
    cases = cases_of(options("--block 4KiB:16KiB --place local,tcp --op READ --control grpc"))
    moves = [case for case in cases if case.is_move]
    assert [(case.place.value, case.block_nbytes) for case in moves] == [
        (place, size << 10) for place in ("local", "tcp") for size in (4, 8, 16)
    ]
    assert {case for case in cases if not case.is_move} == {
        Case(Place.LIMIT, "memcpy", size << 10, 1024) for size in (4, 8, 16)
    } | {MEMCPY, STREAM}


def test_a_sweep_beside_names_is_refused():
    with pytest.raises(InvalidArgument, match="--cases beside --block"):
        cases_of(options("--cases tcp --block 4KiB"))


def test_the_pace_follows_the_options():
    pace = pace_of(options("--quick --rounds 7 --visit 20ms --rate 50"))
    assert (pace.rounds, pace.visit_s, pace.rate) == (7, 0.02, 50.0)


def test_the_command_lists_cases_without_running_any(capsys):
    assert main(["--list", "--cases", "tcp/READ"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("tcp/READ/256MiB x 1") for line in listed)
    assert "limit/stream" in listed
    assert not any(line.startswith("local") for line in listed)


@pytest.mark.parametrize(
    "arguments",
    [["--cases", "nothing"], ["--plot", "figure.txt"], ["--cases", "tcp", "--batch", "2"]],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(capsys, arguments):
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("xferbench: ")


@pytest.mark.parametrize(
    "arguments", [["--block", "3"], ["--against", "nobody"], ["--rate", "0"], ["--rounds", "0"], ["--src", "TAPE"]]
)
def test_a_wrong_command_line_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_guide_names_every_option_and_every_field():
    guide = (Path(__file__).resolve().parents[3] / "docs/xferbench.md").read_text()
    wanted = {text for action in parser()._actions for text in action.option_strings if text.startswith("--")}
    assert {option for option in wanted - {"--help"} if option not in guide} == set()
    fields = {item.name for item in dataclasses.fields(Row)} - {"system", "case", "requests", "faults"}
    assert {name for name in fields if f"`{name}`" not in guide} == set()


@given(st.integers(1, 1 << 20), st.integers(0, 12))
def test_a_range_doubles_from_first_to_last(first, doublings):
    last = first << doublings
    assert counts(f"{first}:{last}") == tuple(first << n for n in range(doublings + 1))
    assert counts(f"{first}:{2 * last - 1}") == counts(f"{first}:{last}")
