"""What is measured: cases as values, the standard set, and how they are chosen on the command line.

Sweeps only add cases; who can run one is for the systems to say (``_systems.py``).
"""

from __future__ import annotations

import enum
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument
from xferd.api.units import format_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Place(enum.Enum):
    """Where source and target are to each other."""

    LOCAL = "local"  # both in a pool of one daemon
    TCP = "tcp"  # pools of two daemons, over loopback
    CONTROL = "control"  # no payload to speak of: calls and lists
    LIMIT = "limit"  # what the machine can do without a daemon


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure; equal cases of different systems are compared.

    Attributes:
        place: which road.
        op: READ, WRITE, or the name of a call or of a limit.
        block_nbytes: bytes a block; 0 where there are none.
        batch: blocks a request.
        src: memory kind of the source.
        dst: memory kind of the target.
        scheme: who sends to whom; "pairwise" is one to one.
        prepared: prepared lists and index arrays, or lists with each request.
    """

    place: Place
    op: str
    block_nbytes: int = 0
    batch: int = 1
    src: str = "DRAM"
    dst: str = "DRAM"
    scheme: str = "pairwise"
    prepared: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes a request."""
        return self.block_nbytes * self.batch

    @property
    def size(self) -> str:
        """Block size and batch for people, "" where there are no blocks."""
        return f"{format_nbytes(self.block_nbytes)} x {self.batch}" if self.block_nbytes else ""

    @property
    def name(self) -> str:
        """What ``--cases`` is matched with, like ``tcp/READ/64KiB x 1024``."""
        return "/".join(part for part in (self.place.value, self.op, self.size) if part)


KIB, MIB = 1 << 10, 1 << 20

SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (64 * KIB, 1024), (MIB, 128), (256 * MIB, 1))
"""One small message; KV blocks of small and usual size; large blocks; one tensor."""

QUICK_SHAPES = ((4 * KIB, 1), (4 * KIB, 1024), (64 * KIB, 1024))

LIST_ROWS, LIST_NBYTES = 100_000, 512

NODE, ECHO = Case(Place.CONTROL, "node"), Case(Place.CONTROL, "echo")
SUBMIT = Case(Place.CONTROL, "submit", 4 * KIB, 1)
EXPLAIN = Case(Place.CONTROL, "explain", LIST_NBYTES, LIST_ROWS, prepared=False)
MOVE_LIST = Case(Place.LOCAL, "WRITE", LIST_NBYTES, LIST_ROWS, prepared=False)
MEMCPY = Case(Place.LIMIT, "memcpy", 256 * MIB, 1)
STREAM = Case(Place.LIMIT, "stream")


def standard_cases(*, quick: bool = False) -> tuple[Case, ...]:
    """Return what ``make bench`` runs."""
    shapes = QUICK_SHAPES if quick else SHAPES
    limited = dict.fromkeys((*shapes, (LIST_NBYTES, LIST_ROWS), (MEMCPY.block_nbytes, MEMCPY.batch)))
    limits = [Case(Place.LIMIT, "memcpy", block, batch) for block, batch in limited]
    roads = ((Place.LOCAL, "WRITE"), (Place.TCP, "READ"), (Place.TCP, "WRITE"))
    moves = [Case(place, op, block, batch) for place, op in roads for block, batch in shapes]
    return (*limits, STREAM, *moves, ECHO, NODE, SUBMIT, EXPLAIN, MOVE_LIST)


def choose(cases: Sequence[Case], patterns: Iterable[str]) -> tuple[Case, ...]:
    """Return the cases that match any of the patterns, and the limits that they are compared with.

    A pattern is part of a name, and may have shell wildcards: ``tcp``, ``local/*/64KiB``. None given: all.

    Raises:
        InvalidArgument: a pattern that matches nothing.
    """
    wanted: set[Case] = set()
    given = [pattern.lower() for pattern in patterns]
    for pattern in given:
        found = {case for case in cases if _matches(case, pattern)}
        if not found:
            raise InvalidArgument(
                f"no case matches {pattern!r}",
                limit=", ".join(case.name for case in cases),
                remedy="give part of a name, or a shell pattern",
            )
        wanted |= found
    if not given:
        return tuple(cases)
    beside = {reference for case in wanted for reference in references(case)}
    return tuple(case for case in cases if case in wanted | beside)


def references(case: Case) -> tuple[Case, ...]:
    """Return the limits that a case is held against."""
    match case.place:
        case Place.LOCAL:
            return Case(Place.LIMIT, "memcpy", case.block_nbytes, case.batch), MEMCPY
        case Place.TCP:
            return (STREAM, MEMCPY)
        case Place.CONTROL:
            return (ECHO,)
        case Place.LIMIT:
            return ()


def _matches(case: Case, pattern: str) -> bool:
    return fnmatch.fnmatchcase(case.name.lower(), f"*{pattern}*")
