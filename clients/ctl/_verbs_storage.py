"""Verbs about storage pools: what they hold, whether it is whole, and a look at a directory without a daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path  # noqa: TC003 - typer reads the hints
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from xferd.api.errors import Unsupported, error_for_code
from xferd.api.types import RegionId
from xferd.clients.ctl import _format as f, _tables
from xferd.clients.ctl._link import Settings, admin

FSCK_MODULE = "xferd.daemon.storage.fsck"
"""Run as a command: it is the daemon's code, and clients import nothing of the daemon."""


def storage(ctx: typer.Context) -> None:
    """Show storage pools and how much of them is proven."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.storage()
    settings.output.show(
        {"pools": infos},
        lambda: _tables.storage(infos, time.time()) if infos else Text("no storage pools", "dim"),
    )


def scrub(ctx: typer.Context, pool: Annotated[str, typer.Argument(help="Name of the storage pool.")]) -> None:
    """Read all that is sealed in a storage pool again, now.

    At the pool's scrub rate. Exit status 1 if damage was found.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        info = node.scrub_storage(pool)
    settings.output.show(info, lambda: _tables.storage([info], time.time()))
    if info.damaged_blocks:
        raise typer.Exit(1)


def free(
    ctx: typer.Context,
    regions: Annotated[list[int], typer.Argument(metavar="REGION...", help="Ids, as `holds` shows them.")],
) -> None:
    """Free persistent regions whose agent is not attached."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        node.free([RegionId(region) for region in regions])
    settings.output.show({"freed": regions}, lambda: Text(f"freed {len(regions)} regions"))


def fsck(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A storage pool's directory on this machine.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every sealed block and compare it.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Keep what is before the damage; the rest is lost.")] = False,
    adopt: Annotated[str, typer.Option(metavar="NODE", help="Hand the directory over to a node of this name.")] = "",
) -> None:
    """Check a storage directory that no daemon uses.

    Changes nothing without --repair or --adopt. Exit status 1 if something is wrong.
    """
    settings: Settings = ctx.obj
    flags = [
        *(["--verify"] if verify else []),
        *(["--repair"] if repair else []),
        *(["--adopt", adopt] if adopt else []),
    ]
    ran = subprocess.run([sys.executable, "-m", FSCK_MODULE, *flags, "--", str(directory)], capture_output=True)
    try:
        report = json.loads(ran.stdout)
    except ValueError:
        raise Unsupported(
            f"the check of storage directories does not run here: {ran.stderr.decode(errors='replace').strip()[-300:]}",
            remedy='install the daemon: pip install "xferd[daemon]"',
        ) from None
    if "error" in report:
        error = report["error"]
        raise error_for_code(error["code"])(error["message"], limit=error["limit"], remedy=error["remedy"])
    settings.output.show(report, lambda: _report(report))
    if ran.returncode:
        raise typer.Exit(1)


def _report(report: dict[str, Any]) -> Group:
    """Return what was found for people."""
    facts = _tables.block(
        [
            ("directory", report["directory"]),
            ("pool", f"{report['pool']} of node {report['node']}, {report['uuid']}"),
            ("slabs", f"{report['slabs']}, {f.nbytes(report['slab_nbytes'])}"),
            ("extents", f"{report['extents']}, {f.nbytes(report['extents_nbytes'])}"),
            ("proven", f"{f.nbytes(report['sealed_nbytes'])}, {f.nbytes(report['summed_nbytes'])} with checksums"),
            ("verified", f.nbytes(report["verified_nbytes"]) if report["verified_nbytes"] else "-"),
            ("last stop", "in order" if report["was_clean"] else "a crash, or the daemon was killed"),
        ]
    )
    lines = [
        Text(f"{mark} {each['what']}: {each['problem']}; {each['remedy']}", style)
        for key, mark, style in (("findings", "FAIL", "red"), ("notes", "note", "dim"))
        for each in report[key]
    ]
    return Group(facts, *lines, Text("something is wrong" if report["findings"] else "all is well", "bold"))
