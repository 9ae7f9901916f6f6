"""The command ``xferbench``: which cases, how long, and where results go.

Exit status: 0, or 1 for an error or for bytes that were wrong, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import XferdError
from xferd.clients.bench import _documents as documents
from xferd.clients.bench._cases import choose, standard_cases
from xferd.clients.bench._environment import environment
from xferd.clients.bench._limits import Iperf3, Memcpy
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import Pace, measure
from xferd.clients.bench._tables import progress, show, tables
from xferd.clients.bench._xferd import Xferd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xferd.clients.bench._cases import Case
    from xferd.clients.bench._probes import Probe, System
    from xferd.clients.bench._rows import Row

DOCS = Path("docs/performance.md")
MAX_REGION_NBYTES = 256 << 20
SCATTER = 4
"""A region has room for so many times the blocks of the largest request, so that they really lie scattered."""

STANDARD, QUICK = Pace(), Pace(rounds=2, visit_s=0.1, max_requests=50)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except XferdError as error:
        sys.stderr.write(f"xferbench: {error}\n")
        return 1


def systems_for(cases: Sequence[Case]) -> list[System]:
    """Return the systems that there are, with memory for these cases; none is started yet."""
    region_nbytes = region_for(cases)
    return [Memcpy(region_nbytes), Iperf3(), Xferd(region_nbytes)]


def run(cases: Sequence[Case], systems: Sequence[System], pace: Pace) -> tuple[list[Row], dict[str, object]]:
    """Measure cases on every system that can run them; returns rows and the environment record.

    The systems are entered and left here. A case that all refuse is left out, with a line on stderr.
    """
    with ExitStack() as stack:
        for system in systems:
            stack.enter_context(system)
        probes: list[Probe] = []
        for case in cases:
            refusals = {system.name: system.refusal(case) for system in systems}
            able = [system for system in systems if not refusals[system.name]]
            probes += [system.probe(case) for system in able]
            if not able:
                why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
                sys.stderr.write(f"xferbench: {case.name} left out: {why}\n")
        with progress(pace.rounds * len(probes)) as tell:
            series = measure(probes, pace, tell)
        record = environment(systems)
        probes.clear()  # they hold memory of daemons that end now
    return make_rows(series), record


def region_for(cases: Sequence[Case]) -> int:
    """Return the bytes of each region that these cases need."""
    largest = max((case.nbytes for case in cases), default=0)
    scattered = max((case.nbytes for case in cases if case.batch > 1), default=0)
    rows = max((case.block_nbytes for case in cases), default=0)
    wanted = max(largest, rows, min(SCATTER * scattered, MAX_REGION_NBYTES), 4096)
    return -(-wanted // 4096) * 4096


def _run(options: argparse.Namespace) -> int:
    if options.plot is not None:
        documents.check_plot(options.plot)
    cases = choose(standard_cases(quick=options.quick), options.cases)
    if options.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in cases))
        return 0
    pace = QUICK if options.quick else STANDARD
    if options.rounds:
        pace = Pace(options.rounds, pace.visit_s, pace.min_requests, pace.max_requests)
    rows, record = run(cases, systems_for(cases), pace)
    return report(rows, record, options)


def report(rows: Sequence[Row], record: Mapping[str, object], options: argparse.Namespace) -> int:
    """Show and write results as the options say; returns the exit status, 1 if any bytes were wrong."""
    if options.json:
        json.dump(documents.document(rows, record), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        show(tables(rows), sys.stdout)
        sys.stdout.write("".join(f"{line}\n" for line in documents.findings(rows)))
    if options.plot is not None:
        documents.plot(rows, record, options.plot)
    if options.write_docs is not None:
        documents.rewrite(options.write_docs, documents.section(rows, record))
    wrong = [row for row in rows if row.verified is False]
    for row in wrong:
        sys.stderr.write(f"xferbench: {row.system} {row.case.name}: {row.faults[0]}\n")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="xferbench",
        description="Measure how fast xferd moves bytes on this machine, beside memcpy and iperf3 in the same run.",
        epilog="It starts daemons of its own on loopback. Needs up to 2 GiB of memory with the standard cases.",
    )
    made.add_argument("--quick", action="store_true", help="fewer cases and rounds, in seconds")
    made.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only cases whose name has this in it (wildcards allowed), and what they are compared with",
    )
    made.add_argument("--list", action="store_true", help="list the cases and end")
    made.add_argument("--rounds", type=_positive, default=0, metavar="N", help="how often each case is visited")
    made.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw into an .svg or .png (needs matplotlib)")
    made.add_argument(
        "--write-docs",
        type=Path,
        nargs="?",
        const=DOCS,
        metavar="FILE",
        help=f"put tables, date and machine between the markers of a file (default {DOCS})",
    )
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number
