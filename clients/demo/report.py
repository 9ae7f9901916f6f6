"""What the demonstration says: progress on the standard error stream, a table and one JSON line on the output.

Uses rich where it is installed and the stream is a terminal; plain text says the same.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the client library does without
    HAS_RICH = False
else:
    HAS_RICH = True

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xferd.api.types import Hop, TransferStatus
    from xferd.clients.demo.checks import Verdict

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; an empty cell has nothing to say."""

    what: str
    blocks: str = ""
    nbytes: str = ""
    ms: str = ""
    rate: str = ""
    route: str = ""


HEADINGS = Row("", "blocks", "bytes", "ms", "GB/s", "route")


@dataclass(frozen=True, slots=True)
class Summary:
    """The last line: the fields and no others, in this order; a field that is None is left out."""

    tokens_equal: bool
    logits_equal: bool
    kv_nbytes: int
    blocks: int
    transfer_ms: float
    file_ms: float
    ttft_transfer_ms: float
    ttft_recompute_ms: float
    lookup_ms: float | None = None

    def to_json(self) -> str:
        """Return the line."""
        every = {name: getattr(self, name) for name in self.__slots__}
        values = {name: value for name, value in every.items() if value is not None}
        return json.dumps({name: round(value, 3) if type(value) is float else value for name, value in values.items()})


def transfer_row(what: str, wall_s: float, status: TransferStatus, blocks: int) -> Row:
    """Return the line of a transfer, timed by its client."""
    nbytes = status.telemetry.moved_nbytes
    return Row(
        what,
        f"{blocks:,}",
        f"{nbytes:,}",
        f"{wall_s * 1e3:.1f}",
        f"{nbytes / wall_s / 1e9:.2f}",
        route_text(status.telemetry.route),
    )


def time_row(what: str, seconds: float) -> Row:
    """Return a line that has but a time."""
    return Row(what, ms=f"{seconds * 1e3:.1f}")


def route_text(route: Sequence[Hop]) -> str:
    """Return a route as people read it: "DRAM@a -tcp-> DRAM@b"."""
    if not route:
        return ""
    return route[0].source + "".join(f" -{hop.backend}-> {hop.target}" for hop in route)


class Screen:
    """Where all output goes. ``quiet`` leaves nothing but the last line."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._status = Console(stderr=True, highlight=False) if HAS_RICH else None

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that something is under way, and how long it took once it is done."""
        if self._quiet:
            yield
            return
        started = time.monotonic()
        if self._status is not None and self._status.is_terminal:
            with self._status.status(text):
                yield
            self._status.print(f"[green]✓[/] {text} [dim]{time.monotonic() - started:.1f} s[/]")
        else:
            print(f"{text} ...", file=sys.stderr, flush=True)
            yield
            print(f"{text}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    def paragraph(self, heading: str, text: str) -> None:
        """Show a heading and text of any length."""
        if not self._quiet:
            lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
            print("\n".join(["", heading, *lines]), flush=True)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Show the table."""
        if self._quiet:
            return
        print(flush=True)
        if HAS_RICH:
            console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH + 20)
            table = Table(title=title, title_justify="left", header_style="bold")
            for heading in _cells(HEADINGS):
                table.add_column(heading, justify="left" if heading in ("", "route") else "right", no_wrap=True)
            for row in rows:
                table.add_row(*_cells(row))
            console.print(table)
        else:
            print("\n".join([title, *_plain([HEADINGS, *rows])]), flush=True)

    def verdict(self, what: str, verdict: Verdict) -> None:
        """Show how a comparison ended."""
        if self._quiet and verdict.is_same:
            return
        said = "the same tokens, logits equal to the last bit" if verdict.is_same else f"DIFFERS: {verdict.detail}"
        print(f"{what}: {said}", file=sys.stderr if self._quiet else sys.stdout, flush=True)

    def failure(self, text: str) -> None:
        """Say what went wrong."""
        print(f"demo: {text}", file=sys.stderr, flush=True)

    def last_line(self, summary: Summary) -> None:
        """Print the JSON line, in full and on one line however wide the terminal is."""
        if not self._quiet:
            print()
        print(summary.to_json(), flush=True)


def _cells(row: Row) -> list[str]:
    return [row.what, row.blocks, row.nbytes, row.ms, row.rate, row.route]


def _plain(rows: Sequence[Row]) -> list[str]:
    """Return lines with columns aligned: words to the left, numbers to the right."""
    lines = [_cells(row) for row in rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))]
    words = (0, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if number in words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
