"""What ranks of a run know from etcd's changes; who they are in a scheme; what a coordinated run is made of."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._app import main, parser
from xferd.clients.bench._cases import ECHO, SCHEMES, Case, Place
from xferd.clients.bench._coordination import Coordinator
from xferd.clients.bench._coordination_board import Board, parts_of
from xferd.clients.bench._coordination_etcd import Change, Etcd, encoded, end_of
from xferd.clients.bench._coordination_plan import cases_together, clients_of, packed, rank_of, unpacked
from xferd.clients.bench._flows import flows_of, initiator_of, partner_of
from xferd.clients.bench._pace import Ran
from xferd.clients.bench._probes import Sample

LOCAL = Case(Place.LOCAL, "READ", 4096, 16)
ROOT = "/xferbench/x/"


def board(*members: str) -> Board:
    made = Board(ROOT, "run")
    group = [(member, f"host of {member}") for member in members]
    made.see(Change(f"{ROOT}run/group", json.dumps(group).encode()))
    return made


def say(told: Board, step: int, rank: int, value: object, nbytes: int = 1 << 20) -> None:
    for number, part in enumerate(parts_of(value, nbytes)):
        told.see(Change(f"{ROOT}run/steps/{step}/{rank}/{number}", part))


@given(st.recursive(st.integers() | st.text() | st.none(), st.lists), st.integers(1, 50))
def test_what_is_said_in_parts_arrives_whole(value, nbytes):
    told = board("a", "b")
    parts = parts_of(["name", value], nbytes)
    for number, part in reversed(list(enumerate(parts))):
        assert told.said(1, 0) is None
        told.see(Change(f"{ROOT}run/steps/1/0/{number}", part))
    assert told.said(1, 0) == ("name", value)
    assert told.said(1, 1) is told.said(2, 0) is None


def test_what_was_said_stays_said_when_its_rank_has_gone():
    told = board("a", "b")
    say(told, 1, 1, ["end", 7])
    told.see(Change(f"{ROOT}run/steps/1/1/0", None))
    told.see(Change(f"{ROOT}run/members/b", None))
    assert told.said(1, 1) == ("end", 7)
    assert told.lost == {1}
    assert told.who(1) == "rank 1 (host of b)"


def test_members_that_go_before_there_is_a_group_are_not_missed():
    told = Board(ROOT, "run")
    told.see(Change(f"{ROOT}run/members/a", b"here"))
    told.see(Change(f"{ROOT}run/members/b", b"there"))
    told.see(Change(f"{ROOT}run/members/b", None))
    assert list(told.members) == ["a"]
    assert not told.lost


def test_other_runs_of_the_name_are_of_no_interest():
    told = board("a", "b")
    told.see(Change(f"{ROOT}old/members/a", None))
    told.see(Change(f"{ROOT}old/group", b"[]"))
    assert (told.group, told.lost, told.is_leaderless) == (["a", "b"], set(), False)
    told.see(Change(f"{ROOT}leader", None))
    assert told.is_leaderless


@given(st.text(st.characters(min_codepoint=33, max_codepoint=125), min_size=1, max_size=20), st.text(max_size=5))
def test_the_end_of_a_prefix_is_behind_all_keys_that_begin_with_it(prefix, rest):
    end = base64.b64decode(end_of(prefix))
    key = base64.b64decode(encoded(prefix + rest))
    assert base64.b64decode(encoded(prefix)) <= key < end


@pytest.mark.parametrize("url", ["", "127.0.0.1:2379", "ftp://host", "http://", "http://host:port", "http://host/v3"])
def test_what_is_no_url_of_etcd_is_said_at_once(url):
    with pytest.raises(InvalidArgument, match="etcd at"):
        Etcd(url)


@pytest.mark.parametrize("name", ["", "a/b", "x" * 65, "a b"])
def test_a_name_that_would_reach_into_other_runs_is_refused(name):
    with pytest.raises(InvalidArgument, match="run"):
        Coordinator("http://host:1", name, 2)


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_take_their_parts_in_a_scheme(scheme, ranks):
    case = Case(Place.TCP, "READ", 4096, 16, scheme=scheme, clients=clients_of(scheme, ranks))
    ends = [
        (
            rank_of(initiator_of(case, flow.initiator), scheme, ranks),
            rank_of(partner_of(flow.partner), scheme, ranks),
        )
        for flow in flows_of(case)
    ]
    others = list(range(1, ranks))
    assert (
        sorted(ends)
        == {
            "pairwise": [(number, number + ranks // 2) for number in range(ranks // 2)],
            "many-to-one": [(number, 0) for number in others],
            "one-to-many": [(0, number) for number in others],
            "all-to-all": [(one, other) for one in range(ranks) for other in range(ranks)],
        }[scheme]
    )


def options(*arguments: str):
    return parser().parse_args(["--etcd", "http://host:2379", *arguments])


def test_moves_are_between_nodes_with_the_clients_that_ranks_make():
    both = [LOCAL, Case(Place.TCP, "READ", 4096, 16), ECHO, Case(Place.LIMIT, "memcpy", 4096, 16)]
    assert cases_together(options("--ranks", "2"), both) == (Case(Place.TCP, "READ", 4096, 16),)
    [case] = cases_together(options("--ranks", "5"), [Case(Place.TCP, "READ", 4096, 16, scheme="many-to-one")])
    assert case.clients == 4


@pytest.mark.parametrize(
    ("arguments", "cases", "why"),
    [
        ((), [LOCAL], "without --ranks"),
        (("--ranks", "1"), [LOCAL], "1 ranks"),
        (("--ranks", "1000"), [LOCAL], "1000 ranks"),
        (("--ranks", "3"), [LOCAL], "3 ranks in pairs"),
        (("--ranks", "2", "--clients", "2"), [LOCAL], "--clients with --etcd"),
        (("--ranks", "2", "--against", "memcpy"), [LOCAL], "--against with --etcd"),
        (("--ranks", "2"), [ECHO], "no case moves bytes"),
    ],
)
def test_options_that_make_no_sense_together_are_said(arguments, cases, why):
    with pytest.raises(InvalidArgument, match=why):
        cases_together(options(*arguments), cases)


def test_the_command_lists_what_ranks_would_run(capsys):
    arguments = ["--etcd", "http://host:2379", "--ranks", "4", "--scheme", "all-to-all", "--block", "4KiB", "--list"]
    assert main(arguments) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("tcp/WRITE/4KiB x 1024")
    assert "4 clients all-to-all" in line


def test_results_travel_as_they_are():
    ran = Ran([Sample(0.5, 4096, 0.125, None, 0.25), Sample(1 / 3, 4096)], 0.75, (1e9,), 0.0, 0.5)
    again = unpacked(json.loads(json.dumps(packed(ran))), 4096)
    assert again.samples[0] == ran.samples[0]
    assert again.samples[1].seconds == pytest.approx(1 / 3, abs=1e-9)
    assert (again.seconds, again.rates, again.cpu_s) == (0.75, (1e9,), 0.5)
