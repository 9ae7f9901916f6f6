"""Results for others: one JSON document, the measured section of ``docs/performance.md``, a plot."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xferd.api.errors import InvalidArgument, Unsupported
from xferd.clients.bench._cases import EXPLAIN, Place
from xferd.clients.bench._tables import as_markdown, tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from xferd.clients.bench._rows import Row

BEGIN, END = "<!-- xferbench: begin -->", "<!-- xferbench: end -->"
PLOT_SUFFIXES = (".svg", ".png")


def document(rows: Sequence[Row], environment: Mapping[str, object]) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {"environment": dict(environment), "rows": [row.document() for row in rows]}


def section(rows: Sequence[Row], environment: Mapping[str, object]) -> str:
    """Return the measured section in Markdown, with date and machine."""
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
    lines += [f"- {line}" for line in findings(rows)]
    for heading, table in tables(rows).items():
        lines += ["", f"### {heading}", "", as_markdown(table)]
    return "\n".join(lines)


def findings(rows: Sequence[Row]) -> list[str]:
    """Return the few ratios that a reader looks for first."""
    found = []
    for row in rows:
        case, where = row.case, {Place.LOCAL: "same node", Place.TCP: "two nodes over TCP"}.get(row.case.place, "")
        if where and (case.block_nbytes, case.batch) == (64 << 10, 1024):
            told = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row.ratios.items())
            found.append(f"{where}, {case.op} {case.size}: {row.gb_per_s:.2f} GB/s ({told}).")
        if case == EXPLAIN and row.server_cpu_ms is not None:
            found.append(
                f"{case.batch} descriptors taken in, checked and coalesced: {row.server_cpu_ms:.1f} ms of CPU."
            )
    wrong = [row for row in rows if row.verified is False]
    checked = sum(row.verified is True for row in rows)
    found.append(f"Bytes verified in {checked} cases" + (f", wrong in {len(wrong)}." if wrong else ", all right."))
    return found


def rewrite(path: Path, text: str) -> None:
    """Put a text between the two markers of a file; the rest of the file stays.

    Raises:
        InvalidArgument: the file is missing or has not exactly one of each marker, in order.
    """
    try:
        before = path.read_text()
    except OSError as exc:
        raise InvalidArgument(f"{path} cannot be read: {exc.strerror}", remedy="run it from the repository") from exc
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise InvalidArgument(f"{path} has no section to fill", limit=f"{BEGIN} ... {END}", remedy="add the two lines")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def check_plot(path: Path) -> None:
    """Say before anything is measured whether a plot can be made.

    Raises:
        InvalidArgument: a file that is neither SVG nor PNG.
        Unsupported: matplotlib is not installed.
    """
    if path.suffix not in PLOT_SUFFIXES:
        raise InvalidArgument(f"plot {path}", limit=" or ".join(PLOT_SUFFIXES), remedy="choose another name")
    try:
        import_module("matplotlib")
    except ImportError as exc:
        raise Unsupported("plots need matplotlib", remedy="pip install 'xferd[bench]'") from exc


def plot(rows: Sequence[Row], environment: Mapping[str, object], path: Path) -> None:
    """Draw the speed of each case as a bar, with its p10 to p90, and write the file."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    shown = [row for row in rows if row.gb_per_s is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(shown)), layout="constrained")
    speeds = [row.gb_per_s or 0.0 for row in shown]
    below = [speed - min(row.gb_per_s_p10 or 0.0, speed) for row, speed in zip(shown, speeds, strict=True)]
    above = [max(row.gb_per_s_p90 or 0.0, speed) - speed for row, speed in zip(shown, speeds, strict=True)]
    colours = {system: f"C{number}" for number, system in enumerate(dict.fromkeys(row.system for row in shown))}
    axes.barh(
        [f"{row.system} {row.case.name}" for row in shown],
        speeds,
        xerr=[below, above],
        color=[colours[row.system] for row in shown],
    )
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, median; whiskers from p10 to p90")
    axes.set_title(f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}", fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
