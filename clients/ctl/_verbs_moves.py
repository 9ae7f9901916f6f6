"""Verbs that move bytes, or ask about a move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from xferd.api.errors import InvalidArgument, XferdError
from xferd.api.types import TransferState
from xferd.api.units import parse_nbytes
from xferd.clients.ctl import _moves, _tables
from xferd.clients.ctl._link import Settings, attach
from xferd.clients.ctl._places import Place, parse_place
from xferd.clients.ctl._verbs_node import Duration, seconds

if TYPE_CHECKING:
    from rich.progress import Progress

    from xferd.api.types import TransferStatus
    from xferd.clients.ctl._output import Output
    from xferd.clients.sync import Client
    from xferd.clients.transfers import TransferOptions

COPY_TIMEOUT_S = 3600.0
EXIT_INTERRUPTED = 130

_PLACES = "file:PATH, or region:ID[@NODE][+OFFSET]"


def _place(text: str) -> Place:
    try:
        return parse_place(text)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error


def _size(text: str) -> int:
    try:
        return parse_nbytes(text)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error


_Source = Annotated[Place, typer.Argument(parser=_place, metavar="SRC", help=f"From: {_PLACES}.")]
_Target = Annotated[Place, typer.Argument(parser=_place, metavar="DST", help=f"To: {_PLACES}.")]
_Nbytes = Annotated[
    int | None, typer.Option(parser=_size, metavar="SIZE", help="So many bytes from the start; else all of SRC.")
]
_Backend = Annotated[str, typer.Option(metavar="NAME", help="This backend must move the bytes.")]


def cp(
    ctx: typer.Context,
    source: _Source,
    target: _Target,
    nbytes: _Nbytes = None,
    backend: _Backend = "",
    timeout: Annotated[
        Duration,
        typer.Option(parser=seconds, metavar="DURATION", help="The copy fails if it takes longer.", show_default="1h"),
    ] = COPY_TIMEOUT_S,
    durable: Annotated[bool, typer.Option("--durable", help="A file is on the disk when the copy ends.")] = False,
) -> None:
    """Copy between files and regions.

    Files are under the daemon's roots, regions here or on another node. A target file is created.
    Ctrl-C cancels the copy, and returns when no byte of it moves any more.
    """
    settings: Settings = ctx.obj
    with attach(settings) as client:
        move = _moves.copy_between(client, source, target, nbytes)
        options: TransferOptions = {"backend": backend, "timeout_s": timeout, "durable": durable}
        status = _copy(client, move, options, settings.output, f"{source} > {target}")
    settings.output.show(status, lambda: Text(_tables.copied(status, str(source), str(target))))
    if status.state is TransferState.CANCELLED:
        raise typer.Exit(EXIT_INTERRUPTED)


def explain(
    ctx: typer.Context, source: _Source, target: _Target, nbytes: _Nbytes = None, backend: _Backend = ""
) -> None:
    """Show which way a copy would go, and why.

    Nothing is moved. Both ends must be there.
    """
    settings: Settings = ctx.obj
    with attach(settings) as client:
        move = _moves.move_between(client, source, target, nbytes)
        answer = client.explain(move.op, move.local, move.remote, backend=backend)
    settings.output.show(answer, lambda: _tables.explanation(answer))


def estimate(
    ctx: typer.Context, source: _Source, target: _Target, nbytes: _Nbytes = None, backend: _Backend = ""
) -> None:
    """Show how long a copy would take.

    Nothing is moved. Both ends must be there.
    """
    settings: Settings = ctx.obj
    with attach(settings) as client:
        move = _moves.move_between(client, source, target, nbytes)
        answer = client.estimate(move.op, move.local, move.remote, backend=backend)
    settings.output.show(answer, lambda: _tables.estimate(answer))


def _copy(client: Client, move: _moves.Move, options: TransferOptions, output: Output, title: str) -> TransferStatus:
    """Run a copy under a progress bar; returns the status of one that is done, or was interrupted.

    Raises:
        XferdError: what the transfer failed with; the message says how far it had come.
    """
    with client.transfer(move.op, move.local, move.remote, **options) as transfer:
        with _bar(output) as bar:
            task = bar.add_task(title, total=move.nbytes)
            try:
                status = _moves.follow(client, transfer, lambda moved: bar.update(task, completed=moved))
            except KeyboardInterrupt:
                status = transfer.cancel()
        if status.state is TransferState.FAILED:
            raise _with_progress(status)
        return status


def _with_progress(status: TransferStatus) -> XferdError:
    error = status.error or XferdError(f"transfer {status.id} failed without a reason")
    telemetry = status.telemetry
    error.message += f" (after {telemetry.moved_nbytes} of {telemetry.total_nbytes} bytes)"
    return error


def _bar(output: Output) -> Progress:
    """Return a progress bar on stderr, which shows itself on a terminal only."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=output.errors,
        transient=True,
        disable=output.is_json or not output.errors.is_terminal,
    )
