"""The command ``xferbench``: measure, show, write.

Exit status: 0, or 1 for an error or for bytes that were wrong, 2 for a wrong command line, or a system that was asked
for and is not installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument, XferdError
from xferd.clients.bench import _documents as documents, _plot as plots, profile
from xferd.clients.bench._coordination import Coordinator
from xferd.clients.bench._coordination_plan import cases_together
from xferd.clients.bench._coordination_run import run_coordinated
from xferd.clients.bench._environment import environment
from xferd.clients.bench._options import cases_of, pace_of, parser
from xferd.clients.bench._plan import is_peer, make_plan
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import measure
from xferd.clients.bench._systems import missing, names_for, systems_for
from xferd.clients.bench._tables import progress, show, tables
from xferd.clients.workers import WorkerFailed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from xferd.clients.bench._cases import Case
    from xferd.clients.bench._pace import Pace
    from xferd.clients.bench._probes import System
    from xferd.clients.bench._rows import Row


INTERRUPTED = 130
"""Exit status of what Ctrl-C has ended, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["profile"]:
        return profile.main(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        absent = [why for name in options.against or () if name not in ("available", "none") if (why := missing(name))]
        if absent:
            sys.stderr.write("".join(f"xferbench: {why}\n" for why in absent))
            return 2
        return _run(options)
    except KeyboardInterrupt:  # all that was started has been ended on the way here
        sys.stderr.write("xferbench: interrupted\n")
        return INTERRUPTED
    except (XferdError, WorkerFailed) as error:
        sys.stderr.write(f"xferbench: {error}\n")
        return 1


def run(
    cases: Sequence[Case], systems: Sequence[System], pace: Pace, *, seed: int = 0
) -> tuple[list[Row], dict[str, object]]:
    """Measure cases on every system that can run them; returns rows and the environment record.

    The systems are entered and left here. A case that all refuse is left out, with a line on stderr.
    """
    with ExitStack() as stack:
        for system in systems:
            stack.enter_context(system)
        plan = make_plan(cases, systems)
        for line in plan.left_out:
            sys.stderr.write(f"xferbench: {line}\n")
        with progress(pace.rounds * len(plan.probes)) as tell:
            series = measure(plan.probes, pace, tell, seed=seed)
        record = environment(systems) | {"pace": dataclasses.asdict(pace), "seed": seed}
        plan.probes.clear()  # they hold memory of daemons that end now
    return make_rows(series, plan.beside, is_open=pace.rate > 0), record


def _run(options: argparse.Namespace) -> int:
    if options.plot is not None:
        plots.check_plot(options.plot)
    cases = cases_of(options)
    if options.etcd is not None:
        cases = cases_together(options, cases)
    if options.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in cases))
        return 0
    if options.model_shape is not None:
        sys.stderr.write(f"xferbench: {options.model_shape}\n")
    if options.etcd is not None:
        return _run_together(options, cases)
    names = names_for(options.against)
    if options.rate and any(is_peer(name) for name in names):
        raise InvalidArgument("--rate beside a peer", remedy="peers are measured in a closed loop: leave one out")
    rows, record = run(
        cases, systems_for(cases, names, options.store, options.set), pace_of(options), seed=options.seed
    )
    if not rows:
        raise InvalidArgument("none of these cases could be run", remedy="see the reasons above")
    return report(rows, record, options)


def _picture(options: argparse.Namespace) -> str:
    """Return where the plot lies, seen from the page that results are written into; "" for none."""
    return "" if options.plot is None else os.path.relpath(options.plot, options.write_docs.parent)


def _run_together(options: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Run cases with the other ranks; all have the results, and rank 0 shows them."""
    with Coordinator(options.etcd, options.name, options.ranks) as coordinator:
        rows, record = run_coordinated(coordinator, options.socket, cases, pace_of(options), seed=options.seed)
    if coordinator.rank == 0:
        return report(rows, record, options)
    sys.stderr.write(f"xferbench: rank {coordinator.rank} is done; rank 0 has the results\n")
    return 1 if any(row.verified is False for row in rows) else 0


def report(rows: Sequence[Row], record: Mapping[str, object], options: argparse.Namespace) -> int:
    """Show and write results as the options say; returns the exit status, 1 if any bytes were wrong."""
    if options.json:
        json.dump(documents.document(rows, record), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        show(tables(rows), sys.stdout)
        lines = [*documents.findings(rows), *documents.peer_settings(record)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    if options.save is not None:
        documents.write_json(rows, record, options.save)
    if options.csv is not None:
        documents.write_csv(rows, options.csv)
    if options.plot is not None:
        plots.plot(rows, record, options.plot)
    if options.write_docs is not None:
        documents.rewrite(options.write_docs, documents.section(rows, record, _picture(options)))
    wrong = [row for row in rows if row.verified is False]
    for row in wrong:
        sys.stderr.write(f"xferbench: {row.system} {row.case.name}: {row.faults[0]}\n")
    return 1 if wrong else 0
