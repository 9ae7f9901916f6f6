"""Rows as tables: for a terminal (with rich where it is installed), as Markdown, and what progress looks like."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TextIO, TypeAlias

from xferd.clients.bench._cases import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xferd.clients.bench._probes import Probe
    from xferd.clients.bench._rows import Row

Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Names of columns, and lines of cells."""

TEXT_COLUMNS = 4

PAGE_WIDTH = 180
"""Characters of a line of a table on a page."""

DISPENSABLE = (
    "prepare",
    "p99.9",
    "p90",
    "x memcpy 256 MiB",
    "post",
    "transfer",
    "p10-p90",
    "CPU s/GB",
    "p99",
    "load GB/s",
    "slowest client",
)
"""Columns that a table does without where it is too wide, the first one first. JSON and CSV have them all."""

Column: TypeAlias = "tuple[str, Callable[[Row], str]]"


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return heading -> (columns, cells): moved bytes, beside each other for each case; then calls and lists."""
    order = {place: number for number, place in enumerate((Place.LIMIT, Place.LOCAL, Place.TCP, Place.CONTROL))}
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(_shape(row), len(first))
    ranked = sorted(rows, key=lambda row: (order[row.case.place], first[_shape(row)]))
    moving = [row for row in ranked if row.gb_per_s is not None]
    calls = [row for row in ranked if row.gb_per_s is None]
    found = {"Bytes moved": _moving_table(moving)} if moving else {}
    if calls:
        found["Calls"] = _calls_table(calls)
    return found


def _shape(row: Row) -> str:
    return f"{row.case.place.value} {row.case.op} {row.case.size}"


def _moving_table(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    columns: list[Column] = [
        ("system", lambda row: row.system),
        ("path", lambda row: row.case.place.value),
        ("case", lambda row: f"{row.case.op} {row.case.size}".strip()),
        ("how", lambda row: row.case.manner),
        ("GB/s", lambda row: _number(row.gb_per_s)),
        ("p10-p90", lambda row: f"{_number(row.gb_per_s_p10)}-{_number(row.gb_per_s_p90)}"),
        ("p50", lambda row: _request_time(row, row.p50_us)),
        ("p90", lambda row: _request_time(row, row.p90_us)),
        ("p99", lambda row: _request_time(row, row.p99_us)),
        ("p99.9", lambda row: _request_time(row, row.p999_us)),
        ("prepare", lambda row: _time(row.prepare_us)),
        ("post", lambda row: _time(row.post_us)),
        ("transfer", lambda row: _time(row.transfer_us)),
        ("CPU s/GB", lambda row: _number(row.cpu_s_per_gb)),
        ("slowest client", lambda row: _number(row.slowest_share)),
        ("load GB/s", lambda row: _number(row.load_gb_per_s)),
        *((f"x {name}", partial(_ratio, name=name)) for name in names),
        ("bytes", _verified),
    ]
    return _table(rows, columns)


def _calls_table(rows: Sequence[Row]) -> Table:
    return _table(
        rows,
        [
            ("system", lambda row: row.system),
            ("call", lambda row: f"{row.case.op} {row.case.size}".strip()),
            ("p50", lambda row: _time(row.p50_us)),
            ("p90", lambda row: _time(row.p90_us)),
            ("p99", lambda row: _time(row.p99_us)),
            ("daemon CPU", lambda row: _time(None if row.server_cpu_ms is None else row.server_cpu_ms * 1e3)),
            ("x echo", partial(_ratio, name="echo")),
        ],
    )


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Return a table without the columns that have nothing in them."""
    full = [[cell(row) for row in rows] for _, cell in columns]
    kept = [number for number, cells in enumerate(full) if any(cells)]
    head = [columns[number][0] for number in kept]
    return head, [[full[number][line] for number in kept] for line in range(len(rows))]


def _ratio(row: Row, name: str) -> str:
    return _number(row.ratios.get(name))


def _request_time(row: Row, microseconds: float) -> str:
    return _time(microseconds) if row.case.nbytes else ""


def _verified(row: Row) -> str:
    return "" if row.verified is None else "right" if row.verified else "WRONG"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return ""
    if microseconds < 10:
        return f"{microseconds:.1f} us"
    if microseconds < 1000:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1000:.3g} ms" if microseconds < 999_500 else f"{microseconds / 1e6:.3g} s"


def narrow(table: Table, width: int) -> Table:
    """Return a table that fits into so many characters, without the columns that can best be missed if it must be."""
    head, cells = table
    sizes = {name: max(len(name), *(len(row[place]) for row in cells)) + 3 for place, name in enumerate(head)}
    for name in DISPENSABLE:
        if sum(sizes.values()) < width:
            break
        sizes.pop(name, None)
    kept = [place for place, name in enumerate(head) if name in sizes]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in cells]


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
        console.width = 400
    for heading, whole in found.items():
        head, cells = narrow(whole, console.width)
        table = RichTable(title=heading, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number < TEXT_COLUMNS else "right", no_wrap=True)
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
