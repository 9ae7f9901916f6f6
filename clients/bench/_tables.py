"""Rows as tables: for a terminal (with rich where it is installed), as Markdown, and what progress looks like."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from xferd.clients.bench._cases import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xferd.clients.bench._probes import Probe
    from xferd.clients.bench._rows import Row

Table = tuple[list[str], list[list[str]]]


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return heading -> (columns, cells): moved bytes, then calls and lists."""
    order = {place: number for number, place in enumerate((Place.LIMIT, Place.LOCAL, Place.TCP, Place.CONTROL))}
    ranked = sorted(rows, key=lambda row: order[row.case.place])
    moving = [row for row in ranked if row.gb_per_s is not None]
    calls = [row for row in ranked if row.gb_per_s is None]
    found = {"Bytes moved": _moving_table(moving)} if moving else {}
    if calls:
        found["Calls"] = _calls_table(calls)
    return found


def _moving_table(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    head = ["system", "path", "case", "GB/s", "p10-p90", "p50", "p99", "CPU s/GB", *(f"x {name}" for name in names)]
    cells = [
        [
            row.system,
            row.case.place.value,
            f"{row.case.op} {row.case.size}".strip(),
            _number(row.gb_per_s),
            f"{_number(row.gb_per_s_p10)}-{_number(row.gb_per_s_p90)}",
            _time(row.p50_us) if row.case.nbytes else "",
            _time(row.p99_us) if row.case.nbytes else "",
            _number(row.cpu_s_per_gb),
            *(_number(row.ratios.get(name)) for name in names),
            _verified(row),
        ]
        for row in rows
    ]
    return [*head, "bytes"], cells


def _calls_table(rows: Sequence[Row]) -> Table:
    head = ["system", "call", "p50", "p90", "p99", "daemon CPU", "x echo", "bytes"]
    cells = [
        [
            row.system,
            f"{row.case.op} {row.case.size}".strip(),
            _time(row.p50_us),
            _time(row.p90_us),
            _time(row.p99_us),
            "" if row.server_cpu_ms is None else _time(row.server_cpu_ms * 1e3),
            _number(row.ratios.get("echo")),
            _verified(row),
        ]
        for row in rows
    ]
    return head, cells


def _verified(row: Row) -> str:
    return "" if row.verified is None else "right" if row.verified else "WRONG"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def as_markdown(table: Table) -> str:
    """Return a table in Markdown."""
    head, cells = table
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * len(head)) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def show(found: dict[str, Table], out: TextIO) -> None:
    """Write tables for people; plain columns where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        for heading, (head, cells) in found.items():
            widths = [max(len(row[column]) for row in (head, *cells)) for column in range(len(head))]
            lines = [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *cells)
            ]
            out.write(f"{heading}\n" + "".join(f"{line.rstrip()}\n" for line in lines) + "\n")
        return
    console = Console(file=out, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    for heading, (head, cells) in found.items():
        table = RichTable(title=heading, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row, style="bold red" if "WRONG" in row else None)
        console.print(table)


@contextmanager
def progress(visits: int) -> Iterator[Callable[[Probe], None]]:
    """Show a bar on stderr, where that is a terminal and rich is installed; yields what to call before each visit."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda _probe: None
        return
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=visits)
        begun = False

        def tell(probe: Probe) -> None:
            nonlocal begun
            bar.update(task, description=f"{probe.system} {probe.case.name}", advance=1 if begun else 0)
            begun = True

        yield tell
