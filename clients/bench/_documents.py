"""Results for others: one JSON document, a CSV file, the measured section of ``docs/performance.md``."""

from __future__ import annotations

import contextlib
import csv
import json
from typing import TYPE_CHECKING

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import EXPLAIN, KIB, Place
from xferd.clients.bench._plan import is_peer
from xferd.clients.bench._tables import PAGE_WIDTH, as_markdown, narrow, tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from xferd.clients.bench._rows import Row

BEGIN, END = "<!-- xferbench: begin -->", "<!-- xferbench: end -->"


def document(rows: Sequence[Row], environment: Mapping[str, object]) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {"environment": dict(environment), "rows": [row.document() for row in rows]}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of which file it is if it cannot be written.

    Raises:
        InvalidArgument: for an ``OSError`` within.
    """
    try:
        yield
    except OSError as exc:
        raise InvalidArgument(f"{path} cannot be written: {exc.strerror}", remedy="choose another file") from exc


def write_json(rows: Sequence[Row], environment: Mapping[str, object], path: Path) -> None:
    """Write what ``--json`` prints into a file.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(document(rows, environment), indent=2) + "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write a line for each row; each ratio has a column of its own, ``x NAME``.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    lines = []
    for row in rows:
        told = row.document()
        ratios = told.pop("ratios")
        assert isinstance(ratios, dict)
        told["faults"] = "; ".join(row.faults)
        lines.append(told | {f"x {name}": value for name, value in ratios.items()})
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with writing(path), path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)


def section(rows: Sequence[Row], environment: Mapping[str, object], picture: str = "") -> str:
    """Return the measured section in Markdown, with date and machine, and a picture if there is one."""
    systems = environment["systems"]
    assert isinstance(systems, dict)
    packages = environment["packages"]
    assert isinstance(packages, dict)
    lines = [
        f"Measured on {str(environment['date'])[:10]}: {environment['cores']} cores of {environment['cpu']}, "
        f"{environment['memory_gib']} GiB, {environment['kernel']}, Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        + (f", {systems['iperf3']['version']}" if systems.get("iperf3", {}).get("version") else "")
        + f"; load average when done {environment['load']}.",
        "",
    ]
    lines += [f"- {line}" for line in (*findings(rows), *peer_settings(environment))]
    if picture:
        lines += ["", f"![GB/s of each case]({picture})"]
    for heading, table in tables(rows).items():
        lines += ["", f"### {heading}", "", as_markdown(narrow(table, PAGE_WIDTH))]
    return "\n".join(lines)


def peer_settings(environment: Mapping[str, object]) -> list[str]:
    """Return a line for each peer that was measured, with what it ran with."""
    systems = environment["systems"]
    assert isinstance(systems, dict)
    return [f"{name} ran with {json.dumps(told, default=str)}." for name, told in systems.items() if is_peer(name)]


def findings(rows: Sequence[Row]) -> list[str]:
    """Return the few ratios that a reader looks for first."""
    found = []
    for row in rows:
        case, where = row.case, {Place.LOCAL: "same node", Place.TCP: "two nodes over TCP"}.get(row.case.place, "")
        if row.system == "xferd" and where and (case.block_nbytes, case.batch) == (64 * KIB, 1024):
            told = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row.ratios.items())
            found.append(f"{where}, {case.op} {case.size}: {row.gb_per_s:.2f} GB/s ({told}).")
        if case == EXPLAIN and row.server_cpu_ms is not None:
            found.append(
                f"{case.batch} descriptors taken in, checked and coalesced: {row.server_cpu_ms:.1f} ms of CPU."
            )
        found += _scenario(row)
    wrong = [row for row in rows if row.verified is False]
    checked = sum(row.verified is True for row in rows)
    found.append(f"Bytes verified in {checked} cases" + (f", wrong in {len(wrong)}." if wrong else ", all right."))
    return found


def _scenario(row: Row) -> list[str]:
    """Return the answer to the question that a scenario asks."""
    case = row.case
    if "idle p99" in row.ratios and row.load_gb_per_s is not None:
        load = f"beside {case.load} LOW transfers of 1 GiB, which move {row.load_gb_per_s:.2f} GB/s"
        told = f"p99 {row.p99_us:.0f} us, {row.ratios['idle p99']:.2f} x of its idle p99"
        return [f"{case.place.value}, {case.op} {case.size} HIGH {load}: {told}."]
    if "one client" in row.ratios and row.slowest_share is not None:
        speed = f"{case.clients} clients at once: {row.ratios['one client']:.2f} x the speed of one"
        return [f"{speed}; the slowest has {row.slowest_share:.2f} of its fair share."]
    if case.scenario == "small":
        beside = f", {row.ratios['echo']:.2f} x an empty gRPC echo" if "echo" in row.ratios else ""
        return [f"one {case.size} by {case.manner}: p50 {row.p50_us:.0f} us, p99 {row.p99_us:.0f} us{beside}."]
    return []


def rewrite(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Put a text between the two markers of a file; the rest of the file stays.

    Raises:
        InvalidArgument: the file is missing or has not exactly one of each marker, in order.
    """
    first, last = markers
    try:
        before = path.read_text()
    except OSError as exc:
        raise InvalidArgument(f"{path} cannot be read: {exc.strerror}", remedy="run it from the repository") from exc
    head, begin, rest = before.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end or first in rest or last in tail:
        raise InvalidArgument(f"{path} has no section to fill", limit=f"{first} ... {last}", remedy="add the two lines")
    path.write_text(f"{head}{first}\n{text}\n{last}{tail}")
