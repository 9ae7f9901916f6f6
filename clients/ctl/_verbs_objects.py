"""Verbs about files and objects that are in no region: look at them, list and delete them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from xferd.api.types import ObjectPage
from xferd.clients.ctl import _format as f, _tables
from xferd.clients.ctl._link import Settings, attach
from xferd.clients.ctl._places import parse_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from xferd.api.types import ObjectEntry, QueryResult

_PLACES = typer.Argument(metavar="PLACE...", help="file:PATH or object:STORE/KEY.")


def query(ctx: typer.Context, places: Annotated[list[str], _PLACES]) -> None:
    """Say which files and objects exist.

    For those that do, also how large they are, and how old.
    """
    settings: Settings = ctx.obj
    asked = [parse_place(place) for place in places]
    for place in asked:
        if place.region is not None:
            raise typer.BadParameter(f"{place} is a region; name files and objects")
    with attach(settings) as client:
        results = client.query((place.store, place.key) if place.store else place.path for place in asked)
    settings.output.show({"results": results}, lambda: _query_table(places, results, time.time()))


def objects(
    ctx: typer.Context,
    store: Annotated[str, typer.Argument(help="As configured under backends.object.stores.")],
    prefix: Annotated[str, typer.Argument(help="Beginning of the keys.")] = "",
    after: Annotated[str, typer.Option(metavar="KEY", help="Only keys after this one.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 1000,
) -> None:
    """List objects of a store, a page of them."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        page = client.list_objects(store, prefix, after=after, limit=limit)
    settings.output.show(
        ObjectPage(page.objects, page.next),
        lambda: _object_table(page.objects, time.time()) if page.objects else Text("no objects", "dim"),
    )


def delete_objects(
    ctx: typer.Context,
    store: Annotated[str, typer.Argument(help="As configured under backends.object.stores.")],
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Objects; absent ones are fine.")],
) -> None:
    """Delete objects of a store."""
    settings: Settings = ctx.obj
    with attach(settings) as client:
        client.delete_objects(store, keys)
    settings.output.show({"store": store, "keys": keys}, lambda: Text(f"deleted {len(keys)} from {store}"))


def _query_table(places: Sequence[str], results: Iterable[QueryResult], now: float) -> Table:
    rows = []
    for place, result in zip(places, results, strict=True):
        if result.error is not None:
            rows.append((place, "?", "", "", f"{result.error.code}: {result.error.message}"))
        elif result.exists:
            age = f.duration(max(now - result.modified_at, 0.0))
            rows.append((place, "yes", f.nbytes(result.nbytes), age, result.etag))
        else:
            rows.append((place, "no", "", "", ""))
    return _tables.table(("PLACE", "EXISTS", ">SIZE", ">AGE", "ETAG"), rows)


def _object_table(entries: Iterable[ObjectEntry], now: float) -> Table:
    rows = [
        (entry.key, f.nbytes(entry.nbytes), f.duration(max(now - entry.modified_at, 0.0)), entry.etag)
        for entry in entries
    ]
    return _tables.table(("KEY", ">SIZE", ">AGE", "ETAG"), rows)
