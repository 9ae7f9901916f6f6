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
from xferd.clients.bench._kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (16 * KIB, 1024), (64 * KIB, 1024), (MIB, 128), (256 * MIB, 1))
"""One small message; KV blocks of small and usual sizes; large blocks; one tensor."""

QUICK_SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (64 * KIB, 1024))

STANDARD = "standard"
"""The pattern that stands for the standard cases."""

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


def files(control: str) -> tuple[Case, ...]:
    """Files in order and scattered, past the page cache and from it; and storage pools with and without checksums."""
    read = Case(Place.LOCAL, "READ", src="FILE_DIRECT", control=control, scenario="files")
    write = Case(Place.LOCAL, "WRITE", dst="FILE_DIRECT", control=control, scenario="files")
    in_order = [dataclasses.replace(one, block_nbytes=MIB, batch=1024, order="sequential") for one in (read, write)]
    small = [dataclasses.replace(one, block_nbytes=4 * KIB, batch=4096) for one in (read, write)]
    cached = dataclasses.replace(read, src="FILE", block_nbytes=64 * KIB, batch=4096)
    large = [dataclasses.replace(one, block_nbytes=MIB, batch=128) for one in (read, write)]
    stored = [_with_file(one, kind) for one in large for kind in ("STORAGE", "STORAGE_PLAIN")]
    past = [dataclasses.replace(one, batch=256, order="sequential") for one in large]
    stored += [_with_file(one, kind) for one in past for kind in ("STORAGE_DIRECT", "STORAGE_DIRECT_PLAIN")]
    return (*in_order, cached, *small, *stored)


def _with_file(case: Case, kind: str) -> Case:
    """Return a case with another kind in place of the file."""
    is_read = case.op == "READ"
    return dataclasses.replace(case, src=kind if is_read else case.src, dst=case.dst if is_read else kind)


def objects(control: str) -> tuple[Case, ...]:
    """One object of 64 MiB into scattered memory, and back."""
    one = Case(Place.LOCAL, "READ", MIB, 64, src="OBJECT", control=control, scenario="objects")
    return one, dataclasses.replace(one, op="WRITE", src="DRAM", dst="OBJECT")


def gpus(control: str) -> tuple[Case, ...]:
    """KV blocks and one tensor between two clients' memory of a GPU, and between it and a pool of the host."""
    shapes = ((4 * KIB, 1024), (64 * KIB, 1024), (256 * MIB, 1))
    within = [
        Case(Place.LOCAL, op, *shape, "VRAM", "VRAM", control=control, scenario="gpu")
        for op in ("WRITE", "READ")
        for shape in shapes
    ]
    across = [
        Case(Place.LOCAL, op, *shape, *kinds, control=control, scenario="gpu")
        for op, kinds in (("WRITE", ("DRAM", "VRAM")), ("READ", ("VRAM", "DRAM")))
        for shape in shapes[1:]
    ]
    return (*within, *across)


def named_cases(*, quick: bool = False, control: str = "ring") -> tuple[Case, ...]:
    """Return all that have a name: the standard ones, and those that are run only when asked for."""
    return tuple(
        dict.fromkeys(
            (
                *standard_cases(quick=quick, control=control),
                *fairness(control),
                *many_clients(control),
                *files(control),
                *objects(control),
                *gpus(control),
            )
        )
    )


def choose(cases: Sequence[Case], patterns: Iterable[str]) -> tuple[Case, ...]:
    """Return the cases that match any of the patterns, and what they are compared with, in the order of ``cases``.

    A pattern is part of a name, and may have shell wildcards: ``tcp``, ``local/*/64KiB``.

    Raises:
        InvalidArgument: a pattern that matches nothing.
    """
    wanted: set[Case] = set()
    for pattern in patterns:
        if pattern.lower() == STANDARD:
            wanted |= {case for case in cases if not case.scenario or case.scenario == "small"}
            continue
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
    plain = {kind.name: kind.plain or kind.name for kind in KINDS.values()}
    without = dataclasses.replace(case, src=plain[case.src], dst=plain[case.dst])
    if without != case:
        found["no checksum"] = without
    found["memcpy"] = Case(Place.LIMIT, "memcpy", case.block_nbytes, case.batch)
    found["memcpy 256 MiB"] = MEMCPY
    if case.place is Place.TCP:
        found["iperf3"] = STREAM
    return found
