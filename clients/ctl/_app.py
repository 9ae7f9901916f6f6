"""The command ``xferctl``: its global options, and how it ends.

Exit status: 0 for success, 1 for an error that the daemon reported, 2 for a wrong command line, 3 where no daemon
answered, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path  # noqa: TC003 - typer reads the hints
from typing import TYPE_CHECKING, Annotated

import typer

from xferd.api.errors import XferdError
from xferd.clients.ctl import _format
from xferd.clients.ctl._doctor import doctor
from xferd.clients.ctl._link import Settings, is_unreachable
from xferd.clients.ctl._output import Output
from xferd.clients.ctl._verbs_lists import (
    agents,
    backends,
    devices,
    end_session,
    hand_over,
    holds,
    nodes,
    peers,
    pools,
    regions,
    routes,
    sessions,
    transfers,
)
from xferd.clients.ctl._verbs_moves import EXIT_INTERRUPTED, cp, estimate, explain
from xferd.clients.ctl._verbs_node import config, drain, log_level, status, undrain, version
from xferd.clients.ctl._verbs_objects import delete_objects, objects, query
from xferd.clients.ctl._verbs_storage import free, fsck, scrub, storage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_ERROR, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 3

_FLAGS = frozenset({"--json"})
_WITH_VALUE = frozenset({"--socket", "--grpc", "--token"})

app = typer.Typer(
    name="xferctl",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it answers sooner, and reads the same everywhere
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Node": {
        "status": status,
        "doctor": doctor,
        "config": config,
        "log-level": log_level,
        "drain": drain,
        "undrain": undrain,
        "version": version,
    },
    "What is there": {
        "pools": pools,
        "devices": devices,
        "sessions": sessions,
        "agents": agents,
        "peers": peers,
        "nodes": nodes,
        "regions": regions,
        "backends": backends,
        "routes": routes,
        "transfers": transfers,
        "holds": holds,
        "query": query,
        "objects": objects,
        "delete-objects": delete_objects,
        "hand-over": hand_over,
        "free": free,
        "end-session": end_session,
    },
    "Storage pools": {"storage": storage, "scrub": scrub, "fsck": fsck},
    "Moving bytes": {"cp": cp, "explain": explain, "estimate": estimate},
}


def _interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """Let Ctrl-C end a verb quietly with the shell's status for it; typer would say "Aborted!" and exit with 1."""

    @functools.wraps(verb)
    def wrapped(*args: object, **options: object) -> None:
        try:
            verb(*args, **options)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped


for _panel, _verbs in _VERBS.items():
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_panel)(_interruptible(_verb))


@app.callback(help="Look at an xferd daemon, run it, and move bytes with it.")
def _global_options(
    ctx: typer.Context,
    socket: Annotated[
        Path | None, typer.Option(envvar="XFERD_SOCKET", help="Session socket of the daemon; gRPC's lies beside it.")
    ] = None,
    grpc: Annotated[
        str, typer.Option(envvar="XFERD_GRPC", metavar="TARGET", help="gRPC alone, as host:port or unix:/path.")
    ] = "",
    token: Annotated[
        str, typer.Option(envvar="XFERD_TOKEN", help="Token of the daemon, where it has one.", show_envvar=True)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")] = False,
) -> None:
    ctx.obj = Settings(socket, grpc, token, Output(is_json=json))


def hoist(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with global options in front, so that they may stand anywhere before ``--``."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*front, *rest, word, *words]
        if word in _FLAGS or word.partition("=")[0] in _WITH_VALUE:
            front.append(word)
            if word in _WITH_VALUE:
                front.extend(value for value in [next(words, None)] if value is not None)
        else:
            rest.append(word)
    return front + rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        app(args=hoist(sys.argv[1:] if argv is None else argv))
    except SystemExit as exit_:  # typer's own way of ending, after success too
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except XferdError as error:
        line = _format.error_line(error.message, error.limit, error.remedy, error.routes_tried)
        print(f"xferctl: {line}", file=sys.stderr)
        return EXIT_UNREACHABLE if is_unreachable(error) else EXIT_ERROR
    return 0
