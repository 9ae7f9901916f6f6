"""The named cases: the standard set, the scenarios, and how they are chosen on the command line."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import (
    ECHO,
    EXPLAIN,
    FAIRNESS,
    KIB,
    LIST_NBYTES,
    LIST_ROWS,
    MEMCPY,
    MIB,
    NODE,
    STREAM,
    WAITS,
    Case,
    Place,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (16 * KIB, 1024), (64 * KIB, 1024), (MIB, 128), (256 * MIB, 1))
"""One small message; KV blocks of small and usual sizes; large blocks; one tensor."""

QUICK_SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (64 * KIB, 1024))

LOAD = 8
MANY = 16


def standard_cases(*, quick: bool = False, control: str = "ring") -> tuple[Case, ...]:
    """Return what ``make bench`` runs, over the given control plane."""
    shapes = QUICK_SHAPES if quick else SHAPES
    limited = dict.fromkeys((*shapes, (LIST_NBYTES, LIST_ROWS), (MEMCPY.block_nbytes, MEMCPY.batch)))
    limits = [Case(Place.LIMIT, "memcpy", block, batch) for block, batch in limited]
    roads = ((Place.LOCAL, "READ"), (Place.LOCAL, "WRITE"), (Place.TCP, "READ"), (Place.TCP, "WRITE"))
    moves = [Case(place, op, block, batch, control=control) for place, op in roads for block, batch in shapes]
    lists = Case(Place.LOCAL, "WRITE", LIST_NBYTES, LIST_ROWS, prepared="no", control="grpc")
    return (*limits, STREAM, *moves, lists, ECHO, NODE, EXPLAIN, *small())


def small() -> tuple[Case, ...]:
    """One prepared 4 KiB transfer by each control plane, beside an empty gRPC echo."""
    one = Case(Place.LOCAL, "WRITE", 4 * KIB, 1, scenario="small")
    ways = [("ring", ""), *(("ring", wait) for wait in WAITS), ("grpc", "")]
    return tuple(dataclasses.replace(one, control=control, wait=wait) for control, wait in ways)


def fairness(control: str) -> tuple[Case, ...]:
    """A prepared 4 KiB HIGH transfer alone, and beside eight LOW transfers of 1 GiB, on one node and between two."""
    ones = [Case(place, "READ", 4 * KIB, 1, control=control, scenario=FAIRNESS) for place in (Place.LOCAL, Place.TCP)]
    return tuple(dataclasses.replace(one, load=load) for one in ones for load in (0, LOAD))


def many_clients(control: str) -> tuple[Case, ...]:
    """Sixteen client processes at once, and one."""
    one = Case(Place.LOCAL, "WRITE", 64 * KIB, 256, scheme="many-to-one", control=control, scenario="clients")
    return one, dataclasses.replace(one, clients=MANY)


def named_cases(*, quick: bool = False, control: str = "ring") -> tuple[Case, ...]:
    """Return all that have a name: the standard ones, and those that are run only when asked for."""
    return tuple(
        dict.fromkeys((*standard_cases(quick=quick, control=control), *fairness(control), *many_clients(control)))
    )


def choose(cases: Sequence[Case], patterns: Iterable[str]) -> tuple[Case, ...]:
    """Return the cases that match any of the patterns, and what they are compared with, in the order of ``cases``.

    A pattern is part of a name, and may have shell wildcards: ``tcp``, ``local/*/64KiB``.

    Raises:
        InvalidArgument: a pattern that matches nothing.
    """
    wanted: set[Case] = set()
    for pattern in patterns:
        found = {case for case in cases if fnmatch.fnmatchcase(case.name.lower(), f"*{pattern.lower()}*")}
        if not found:
            raise InvalidArgument(
                f"no case matches {pattern!r}",
                limit=", ".join(case.name for case in cases),
                remedy="give part of a name, or a shell pattern",
            )
        wanted |= found
    beside = {case for one in wanted for case in references(one).values()}
    return tuple(case for case in cases if case in wanted or case in beside)


def with_references(wanted: Sequence[Case]) -> tuple[Case, ...]:
    """Return what cases are compared with, then the cases."""
    beside = [case for one in wanted for case in references(one).values()]
    return tuple(dict.fromkeys([*(case for case in beside if case not in wanted), *wanted]))


def references(case: Case) -> dict[str, Case]:
    """Return what a case is held against on this machine, by the name of the ratio (``_rows.py`` takes them)."""
    found: dict[str, Case] = {}
    if case.place is Place.CONTROL:
        return found if case == ECHO else {"echo": ECHO}
    if not case.is_move:
        return found
    if case.load:
        found["idle p99"] = dataclasses.replace(case, load=0)
    if case.clients > 1 and case.scenario:
        found["one client"] = dataclasses.replace(case, clients=1)
    if case.nbytes <= 4 * KIB:
        found["echo"] = ECHO
    found["memcpy"] = Case(Place.LIMIT, "memcpy", case.block_nbytes, case.batch)
    found["memcpy 256 MiB"] = MEMCPY
    if case.place is Place.TCP:
        found["iperf3"] = STREAM
    return found
