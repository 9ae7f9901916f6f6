"""``xferbench profile``: where the microseconds of one prepared transfer go: on one node and between two."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from xferd.api.errors import XferdError
from xferd.clients.bench._documents import rewrite
from xferd.clients.bench._environment import environment
from xferd.clients.bench._options import add_documents, positive
from xferd.clients.bench._stage_points import SUBJECTS
from xferd.clients.bench._stages import Profile, profile
from xferd.clients.bench._tables import as_markdown, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xferd.clients.bench._tables import Table

MARKERS = "<!-- xferbench profile: begin -->", "<!-- xferbench profile: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(argv)
    try:
        profiles = [profile(name, options.requests) for name in options.only or SUBJECTS]
        record = environment([])
        if options.json:
            json.dump({"environment": record, "profiles": [document(one) for one in profiles]}, sys.stdout, indent=2)
            sys.stdout.write("\n")
        else:
            show({_title(one): table(one) for one in profiles}, sys.stdout)
        if options.write_docs is not None:
            rewrite(options.write_docs, section(profiles, record), MARKERS)
    except XferdError as error:
        sys.stderr.write(f"xferbench profile: {error}\n")
        return 1
    return 0


def table(one: Profile) -> Table:
    """Return stages with their median times and their share of the whole."""
    known = [(stage, us) for stage, us in one.stages if us is not None]
    total = sum(us for _, us in known)
    cells = [[stage.at, stage.what, f"{us:.1f}", f"{us / total:.0%}"] for stage, us in known]
    cells.append(["", "whole, median", f"{one.p50_us:.1f}", ""])
    cells.append(["", "the same without stamps in the daemon", f"{one.plain_p50_us:.1f}", ""])
    return ["where", "what", "us", "share"], cells


def document(one: Profile) -> dict[str, object]:
    """Return a profile as it stands in JSON."""
    return {
        "subject": one.subject,
        "requests": one.requests,
        "p50_us": one.p50_us,
        "plain_p50_us": one.plain_p50_us,
        "stages": [{"where": stage.at, "what": stage.what, "us": us} for stage, us in one.stages],
    }


def section(profiles: Sequence[Profile], record: Mapping[str, object]) -> str:
    """Return the measured section in Markdown, with date and machine."""
    machine = f"{record['cores']} cores of {record['cpu']}, {record['kernel']}, Python {record['python']}"
    told = f"load average when done {record['load']}. Medians of {profiles[0].requests} requests, one at a time."
    lines = [f"Measured on {str(record['date'])[:10]}: {machine}; {told}"]
    for one in profiles:
        lines += ["", f"### {_title(one)}", "", as_markdown(table(one))]
    return "\n".join(lines)


def _title(one: Profile) -> str:
    return SUBJECTS[one.subject].title


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="xferbench profile",
        description="Show where the time of one prepared transfer goes, on one node and between two.",
        epilog="The stamps cost some of the time that they show: compare the two whole times.",
    )
    made.add_argument("--requests", type=positive, default=3000, metavar="N", help="to measure (3000)")
    made.add_argument("--only", action="append", choices=list(SUBJECTS), help="profile this one (all); may be repeated")
    add_documents(made)
    return made


if __name__ == "__main__":
    sys.exit(main())
