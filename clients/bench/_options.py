"""The command line: which cases, how long, beside whom, and where results go."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from xferd.api.errors import InvalidArgument
from xferd.api.units import parse_seconds
from xferd.clients.bench import _sweeps as sweeps
from xferd.clients.bench._cases import KINDS
from xferd.clients.bench._coordination_plan import add_options as add_coordination
from xferd.clients.bench._models import model_shape
from xferd.clients.bench._pace import Pace
from xferd.clients.bench._standard import choose, named_cases, standard_cases, with_references
from xferd.clients.bench._store import Store
from xferd.clients.bench._sweeps import Sweep
from xferd.clients.bench._systems import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.clients.bench._cases import Case

T = TypeVar("T")

DOCS = Path("docs/performance.md")
STANDARD, QUICK = Pace(), Pace(rounds=2, visit_s=0.1, max_requests=500)

_DIMENSIONS = [field.name for field in dataclasses.fields(Sweep)]


def cases_of(options: argparse.Namespace) -> tuple[Case, ...]:
    """Return the cases that were asked for, with the limits that they are compared with.

    Any option of a sweep asks for a sweep; else ``--cases`` for named ones; else the standard ones.

    Raises:
        InvalidArgument: a pattern that matches nothing, or patterns beside a sweep.
    """
    standard = standard_cases(quick=options.quick)
    named = named_cases(quick=options.quick)
    given = {name: getattr(options, name) for name in _DIMENSIONS if getattr(options, name) is not None}
    if options.model_shape is not None:
        if "block" in given:
            raise InvalidArgument("--block beside --model-shape", remedy="give one of them")
        given["block"] = (options.model_shape.block_nbytes,)
    if not given:
        return choose(named, options.cases) if options.cases else standard
    if options.cases:
        raise InvalidArgument(
            f"--cases beside --{next(iter(given))}", remedy="give names, or the dimensions of a sweep"
        )
    return with_references(dataclasses.replace(Sweep(), **given).cases())


def pace_of(options: argparse.Namespace) -> Pace:
    """Return how long to measure."""
    pace = QUICK if options.quick else STANDARD
    given = {name: getattr(options, name) for name in ("rounds", "visit_s", "rate") if getattr(options, name)}
    return dataclasses.replace(pace, **given)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="xferbench",
        description="Measure how fast xferd moves bytes on this machine, beside others in the same run.",
        epilog="It starts daemons and clients of its own on loopback. Sizes: 4KiB,64KiB or, doubling, 4KiB:64MiB. "
        "docs/xferbench.md has examples, and says what is measured and how.",
    )
    _add_cases(made.add_argument_group("cases"))
    _add_sweep(made.add_argument_group("sweeps", "each takes a comma list; together they make a product"))
    _add_pace(made.add_argument_group("how long, and beside whom"))
    _add_daemons(made.add_argument_group("daemons"))
    _add_output(made.add_argument_group("results"))
    coordination = "start one xferbench beside the daemon of each machine, with the same options; the first prints"
    add_coordination(made.add_argument_group("several machines", coordination))
    return made


def _add_cases(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--quick", action="store_true", help="fewer cases and rounds, in seconds")
    group.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="named cases that have this in their name (wildcards allowed), and what they are compared with; "
        "also the scenarios fairness, clients, small, files and objects, and standard for the standard cases",
    )
    group.add_argument("--list", action="store_true", help="list the cases and end")


def _add_sweep(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--block", type=_read(sweeps.sizes), metavar="SIZES", help="bytes a block (4KiB)")
    group.add_argument(
        "--model-shape",
        type=_read(model_shape),
        metavar="SHAPE",
        help="take the block size from a KV cache: layers=32,kv_heads=8,head_dim=128,dtype=bf16,page=16,tp=1",
    )
    group.add_argument("--batch", type=_read(sweeps.counts), metavar="N", help="blocks a request (1024)")
    group.add_argument("--op", type=_read(sweeps.ops), help="READ, WRITE (WRITE)")
    group.add_argument("--place", type=_read(sweeps.places), help="local, tcp (local)")
    group.add_argument("--src", type=_read(sweeps.kinds), metavar="KIND", help=f"{', '.join(KINDS)} (DRAM)")
    group.add_argument("--dst", type=_read(sweeps.kinds), metavar="KIND", help="as --src")
    group.add_argument("--scheme", type=_read(sweeps.schemes), help="pairwise, many-to-one, one-to-many, all-to-all")
    group.add_argument("--clients", type=_read(sweeps.clients), metavar="N", help="processes on the many side (1)")
    group.add_argument("--threads", type=_read(sweeps.counts), metavar="N", help="threads of each client (1)")
    group.add_argument("--prepared", type=_read(sweeps.ways), help="transfer, lists, no (transfer)")
    group.add_argument("--control", type=_read(sweeps.controls), help="ring, grpc (ring)")
    group.add_argument("--wait", type=_read(sweeps.waits), help="at the ring: adaptive, poll, block (adaptive)")
    group.add_argument("--order", type=_read(sweeps.order), help="random or sequential blocks (random)")
    group.add_argument("--load", type=_whole, metavar="N", help="LOW transfers of 1 GiB that run beside (0)")


def _add_pace(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rounds", type=positive, metavar="N", help="how often each case is visited")
    group.add_argument("--visit", dest="visit_s", type=_read(parse_seconds), metavar="TIME", help="time of a visit")
    group.add_argument(
        "--rate",
        type=_rate,
        metavar="R",
        help="open loop: R requests arrive a second, at random; latency counts from the arrival",
    )
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the order of cases, and of arrivals")
    group.add_argument(
        "--against",
        type=_against,
        default=None,
        metavar="SYSTEMS",
        help=f"run the same cases with {', '.join(NAMES)}; or available, or none (memcpy and iperf3 if there)",
    )


def _add_daemons(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--store",
        type=_read(Store.parse),
        metavar="SETTINGS",
        help="where objects are, as url=s3://BUCKET,endpoint=http://HOST:PORT,...; else a small server is started",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemons, as of xferd serve"
    )


def add_documents(group: argparse._ActionsContainer) -> None:
    """Add where results go that every command of the benchmark knows."""
    group.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    group.add_argument(
        "--write-docs",
        type=Path,
        nargs="?",
        const=DOCS,
        metavar="FILE",
        help=f"put tables, date and machine between the markers of a file (default {DOCS})",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add_documents(group)
    group.add_argument("--save", type=Path, metavar="FILE", help="write the JSON document into a file, beside all else")
    group.add_argument("--csv", type=Path, metavar="FILE", help="write rows as CSV")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw into an .svg or .png (needs matplotlib)")


def _read(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return a parser whose errors argparse shows."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except InvalidArgument as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return read


def _against(text: str) -> tuple[str, ...]:
    if text in ("available", "none"):
        return (text,)
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; there are {', '.join(NAMES)}, available, none")
    return names


def positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} requests a second; from above 0 to 1000000")
    return rate
