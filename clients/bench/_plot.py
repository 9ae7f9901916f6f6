"""Results as a picture: lines over the block size where that was swept, else a bar for each case."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xferd.api.errors import InvalidArgument, Unsupported
from xferd.api.units import format_nbytes
from xferd.clients.bench._cases import Place
from xferd.clients.bench._documents import writing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from xferd.clients.bench._rows import Row

PLOT_SUFFIXES = (".svg", ".png")
LINE_POINTS = 3
"""A line needs so many block sizes; with fewer, bars say more."""


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
    """Draw the speed of each case with its p10 to p90, and write the file.

    Raises:
        InvalidArgument: the file cannot be written.
    """
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    shown = [row for row in rows if row.gb_per_s is not None]
    lines = as_lines(shown)
    figure, axes = pyplot.subplots(figsize=(9, 5 if lines else 1 + 0.25 * len(shown)), layout="constrained")
    if lines:
        _draw_lines(axes, lines)
    else:
        _draw_bars(axes, shown)
    axes.set_title(f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}", fontsize="small")
    try:
        with writing(path):
            figure.savefig(path)
    finally:
        pyplot.close(figure)


def as_lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows by what they have in common beside the block size; none where it was not swept."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        case = row.case
        if case.block_nbytes:
            road = "" if case.place is Place.LIMIT else f"{case.place.value} "
            told = f"{row.system} {road}{case.op} x {case.batch}" + (f", {case.manner}" if case.manner else "")
            found[told].append(row)
    moves = [line for line in found.values() if line[0].case.is_move]
    if not moves or any(len(line) < LINE_POINTS for line in moves) or len(found) > 12:
        return {}
    return {
        name: sorted(line, key=lambda row: row.case.block_nbytes)
        for name, line in found.items()
        if len(line) >= LINE_POINTS
    }


def _draw_lines(axes: Any, lines: Mapping[str, Sequence[Row]]) -> None:
    for name, line in lines.items():
        sizes = [row.case.block_nbytes for row in line]
        axes.plot(sizes, [row.gb_per_s for row in line], marker="o", label=name)
        axes.fill_between(sizes, [row.gb_per_s_p10 for row in line], [row.gb_per_s_p90 for row in line], alpha=0.15)
    ticks = sorted({row.case.block_nbytes for line in lines.values() for row in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [format_nbytes(size) for size in ticks], rotation=45)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes a block")
    axes.set_ylabel("GB/s, median; shade from p10 to p90")
    axes.legend(fontsize="small")


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    speeds = [row.gb_per_s or 0.0 for row in rows]
    below = [speed - min(row.gb_per_s_p10 or 0.0, speed) for row, speed in zip(rows, speeds, strict=True)]
    above = [max(row.gb_per_s_p90 or 0.0, speed) - speed for row, speed in zip(rows, speeds, strict=True)]
    colours = {system: f"C{number}" for number, system in enumerate(dict.fromkeys(row.system for row in rows))}
    axes.barh(
        [f"{row.system} {row.case.name}" for row in rows],
        speeds,
        xerr=[below, above],
        color=[colours[row.system] for row in rows],
    )
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, median; whiskers from p10 to p90")
