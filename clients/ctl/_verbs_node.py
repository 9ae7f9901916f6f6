"""Verbs about the node itself."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, TypeAlias

import typer
from rich.text import Text

from xferd.api.errors import InvalidArgument, XferdError
from xferd.api.units import parse_seconds
from xferd.clients.ctl import _tables
from xferd.clients.ctl._link import Settings, admin, is_unreachable

DRAIN_TIMEOUT_S = 30.0


def seconds(text: str) -> float:
    """Read a duration of the command line."""
    try:
        return parse_seconds(text)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from error


Duration: TypeAlias = float
"""A duration as the command line takes it: seconds, or "500ms", "2m"."""


def status(ctx: typer.Context) -> None:
    """Show the node's health and counters."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        info = node.status()
    settings.output.show(info, lambda: _tables.status(info))


def config(ctx: typer.Context) -> None:
    """Print the configuration in force.

    It is TOML that loads back; secrets are replaced.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        toml = node.config()
    settings.output.show({"toml": toml}, lambda: Text(toml.rstrip("\n")))


def log_level(
    ctx: typer.Context,
    level: Annotated[str, typer.Argument(help="debug, info, warning or error; without it, show the level.")] = "",
) -> None:
    """Show or set the log level.

    A level that is set lasts until the daemon's next reload or restart.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        previous = node.set_log_level(level)
    answer = {"level": level or previous, "previous": previous}
    settings.output.show(answer, lambda: Text(f"{level} (was {previous})" if level else previous))


def drain(
    ctx: typer.Context,
    timeout: Annotated[
        Duration,
        typer.Option(
            parser=seconds, metavar="DURATION", help="How long to wait for running transfers.", show_default="30s"
        ),
    ] = DRAIN_TIMEOUT_S,
) -> None:
    """Refuse new work, and wait for what runs.

    The node goes on refusing until `undrain` or a restart. Exit status 1 if transfers still run after the time.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        result = node.drain(timeout)
    answer = {"drained": result.is_drained, "transfers_left": result.transfers_left}
    left = f"{result.transfers_left} transfers still run"
    settings.output.show(answer, lambda: Text("drained" if result.is_drained else left))
    if not result.is_drained:
        raise typer.Exit(1)


def undrain(ctx: typer.Context) -> None:
    """Take new work again."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        node.drain(0.0, undo=True)
        info = node.status()
    settings.output.show(info, lambda: Text("takes new work" if info.ready else f"not ready: {info.reason}"))


def version(ctx: typer.Context) -> None:
    """Show the versions of xferctl and of the daemon."""
    settings: Settings = ctx.obj
    mine = metadata.version("xferd")
    theirs: str | None = None
    try:
        with admin(settings) as node:
            theirs = node.status().node.version
    except XferdError as error:
        if not is_unreachable(error):
            raise
    answer = {"xferctl": mine, "xferd": theirs}
    settings.output.show(answer, lambda: Text(f"xferctl {mine}\nxferd {theirs or 'does not answer'}"))
