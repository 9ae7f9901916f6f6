"""Verbs that list what a node has, and the one that ends a session."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from xferd.api.types import Access, RegionId, RegionListing, SessionId
from xferd.clients.ctl import _tables
from xferd.clients.ctl._link import Settings, admin, attach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType


def _show(settings: Settings, name: str, infos: Sequence[object], view: Callable[[], RenderableType]) -> None:
    """Show a list: an object with one member for programs, and a word instead of an empty table for people."""
    settings.output.show({name: infos}, lambda: view() if infos else Text(f"no {name}", "dim"))


def _access(text: str) -> Access:
    try:
        return Access[text.upper()]
    except KeyError:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(Access.__members__)}") from None


def pools(ctx: typer.Context) -> None:
    """List pools and how full they are."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.pools()
    _show(settings, "pools", infos, lambda: _tables.pools(infos))


def devices(ctx: typer.Context) -> None:
    """List GPUs, what their workers did, and what is wrong."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.devices()
    _show(settings, "devices", infos, lambda: _tables.devices(infos))


def sessions(ctx: typer.Context) -> None:
    """List clients and what they hold."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.sessions()
    _show(settings, "sessions", infos, lambda: _tables.sessions(infos, time.time()))


def agents(ctx: typer.Context) -> None:
    """List agents, here and on known nodes."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        nodes = [client.node(), *(peer.node for peer in client.peers())]
        mine = client.address
    found = [(f"{agent}@{node.name}", node.name) for node in nodes for agent in node.agents]
    others = [pair for pair in found if pair[0] != mine]  # this command's own session is no news
    answer = [{"address": address, "node": node} for address, node in others]
    _show(settings, "agents", answer, lambda: _tables.agents(others))


def peers(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with each change, until interrupted.")] = False,
) -> None:
    """List other nodes as this one sees them."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        if watch:
            for peer in client.watch_peers():
                settings.output.event(peer, _tables.peer_line(peer))
            return
        infos = client.peers()
    _show(settings, "peers", infos, lambda: _tables.peers(infos, time.time()))


def nodes(ctx: typer.Context) -> None:
    """List all nodes of the store, this one too."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        infos = client.nodes()
    _show(settings, "nodes", infos, lambda: _tables.nodes(infos))


def regions(
    ctx: typer.Context,
    node: Annotated[str, typer.Option(metavar="NAME", help="Ask this node instead.")] = "",
    agent: Annotated[str, typer.Option(metavar="NAME", help="Only regions of this agent.")] = "",
    label: Annotated[str, typer.Option(metavar="TEXT", help="Only regions with this label.")] = "",
) -> None:
    """List regions that are shared."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        infos = tuple(region.info for region in client.regions(node=node, agent=agent, label=label))
        record = client.node(node)
    listing = RegionListing(record.name, record.epoch, infos)
    settings.output.show(listing, lambda: _tables.regions(infos) if infos else Text("no regions are shared", "dim"))


def backends(ctx: typer.Context) -> None:
    """List backends and what they have moved."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.backends()
    _show(settings, "backends", infos, lambda: _tables.backends(infos))


def routes(ctx: typer.Context) -> None:
    """List how routes have done, by size and peer.

    The planner takes the quickest. One that failed lately is tried last.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.routes()
    _show(settings, "routes", infos, lambda: _tables.routes(infos))


def transfers(
    ctx: typer.Context,
    active: Annotated[bool, typer.Option("--active", help="Only those that have not ended.")] = False,
    agent: Annotated[str, typer.Option(metavar="NAME", help="Only those of this agent.")] = "",
) -> None:
    """List transfers of all sessions.

    One that has ended stays until its client releases it, or goes.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.transfers(active_only=active, agent=agent)
    _show(settings, "transfers", infos, lambda: _tables.transfers(infos, time.time()))


def holds(ctx: typer.Context) -> None:
    """List what is held, by whom and why."""
    settings: Settings = ctx.obj
    with admin(settings) as node:
        infos = node.holds()
    _show(settings, "holds", infos, lambda: _tables.holds(infos, time.time()))


def hand_over(
    ctx: typer.Context,
    regions: Annotated[list[int], typer.Argument(metavar="REGION...", help="Ids, as `regions` and `holds` show them.")],
    to: Annotated[str, typer.Option(metavar="AGENT", help="The new owner, which must be attached to this node.")],
    access: Annotated[
        Access | None,
        typer.Option(parser=_access, metavar="ACCESS", help="What others may do from now on; else as before."),
    ] = None,
) -> None:
    """Give regions to another agent.

    Nothing is copied: the regions keep ids and bytes, and end with their new owner. Their present owner is not asked.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        listing = node.hand_over([RegionId(region) for region in regions], to, access=access)
    settings.output.show(listing, lambda: _tables.regions(listing.regions))


def end_session(
    ctx: typer.Context, session: Annotated[str, typer.Argument(metavar="ID", help="As `sessions` shows it.")]
) -> None:
    """End a session.

    Its transfers are cancelled, and all it holds is released.
    """
    settings: Settings = ctx.obj
    with admin(settings) as node:
        node.end_session(SessionId(session))
    settings.output.show({"ended": session}, lambda: Text(f"session {session} has ended"))
