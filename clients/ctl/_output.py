"""Where answers go: a table or a line for people, or one JSON document, on stdout; all else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from xferd.clients.ctl._documents import document

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from rich.console import RenderableType

UNBOUNDED = 10_000
"""Columns where no terminal sets a limit: tables in a pipe are not wrapped, so that ``grep`` finds whole rows."""


class Output:
    """Shows the answer of one command.

    Args:
        is_json: show documents, not tables.
        stdout: for the answer.
        stderr: for progress and errors.
        width: of the table; None takes the terminal's.
    """

    def __init__(
        self, *, is_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None, width: int | None = None
    ) -> None:
        self.is_json = is_json
        self._stdout = stdout or sys.stdout
        self._console = Console(file=self._stdout, width=width, highlight=False, emoji=False, markup=False)
        if width is None and not self._console.is_terminal:
            self._console.width = UNBOUNDED
        self.errors = Console(file=stderr or sys.stderr, highlight=False, emoji=False, markup=False)

    def show(self, answer: object, view: Callable[[], RenderableType]) -> None:
        """Show an answer; ``view`` makes what people see, and is only called for them."""
        if self.is_json:
            self._stdout.write(json.dumps(document(answer), indent=2) + "\n")
            return
        with self._console.capture() as captured:
            self._console.print(view())
        lines = (line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
        self._stdout.write("\n".join(lines) + "\n")

    def event(self, answer: object, text: str) -> None:
        """Show one of a series at once: a line for people, a document on one line for programs."""
        line = json.dumps(document(answer), separators=(",", ":")) if self.is_json else text
        self._stdout.write(line + "\n")
        self._stdout.flush()

    def note(self, text: str) -> None:
        """Say something beside the answer."""
        self.errors.print(text, soft_wrap=True)
