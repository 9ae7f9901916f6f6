"""What a run on several machines is: its options, its cases, who is who in a scheme, results as they travel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._pace import Ran
from xferd.clients.bench._probes import Sample

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from xferd.clients.bench._flows import Member


MAX_RANKS = 64


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of such a run to the command line."""
    group.add_argument("--etcd", metavar="URL", help="find the other ranks here, like http://HOST:2379")
    group.add_argument("--ranks", type=int, metavar="N", help="how many processes take part, this one included")
    group.add_argument("--name", default="default", help="of the run, the same for all its ranks (default)")
    group.add_argument("--socket", type=Path, metavar="PATH", help="session socket of this rank's daemon")


def cases_together(options: argparse.Namespace, cases: Sequence[Case]) -> tuple[Case, ...]:
    """Return what a run with ``--etcd`` measures of these cases.

    Raises:
        InvalidArgument: options that make no sense together.
    """
    if options.ranks is None:
        raise InvalidArgument("--etcd without --ranks", remedy="say how many processes take part")
    if not 2 <= options.ranks <= MAX_RANKS:
        raise InvalidArgument(f"{options.ranks} ranks", limit=f"2 to {MAX_RANKS}", remedy="choose another number")
    if options.clients is not None:
        raise InvalidArgument("--clients with --etcd", remedy="leave it out: each rank is a client")
    if options.against not in (None, ("none",)):
        raise InvalidArgument("--against with --etcd", remedy="measure the others on one machine")
    return coordinated(cases, options.ranks)


def coordinated(cases: Sequence[Case], ranks: int) -> tuple[Case, ...]:
    """Return the moves among these cases as moves between nodes, with as many clients as the ranks make.

    Raises:
        InvalidArgument: pairs of an odd number, a background load, or no moves at all.
    """
    moves = [case for case in cases if case.is_move]
    if any(case.load for case in moves):
        raise InvalidArgument("--load with --etcd", remedy="leave it out: ranks are the load of each other")
    if not moves:
        raise InvalidArgument("no case moves bytes between nodes", remedy="see --list")
    return tuple(
        dict.fromkeys(
            dataclasses.replace(case, place=Place.TCP, clients=clients_of(case.scheme, ranks), scenario="")
            for case in moves
        )
    )


def clients_of(scheme: str, ranks: int) -> int:
    """Return how many are on the side that there are many of."""
    if scheme == "pairwise":
        if ranks % 2:
            raise InvalidArgument(f"{ranks} ranks in pairs", limit="an even number", remedy="choose another scheme")
        return ranks // 2
    return ranks if scheme == "all-to-all" else ranks - 1


def rank_of(member: Member, scheme: str, ranks: int) -> int:
    """Return which rank an initiator or a partner is."""
    is_partner = member.role == "partner"
    match scheme:
        case "pairwise":
            return member.number + (ranks // 2 if is_partner else 0)
        case "many-to-one":
            return 0 if is_partner else member.number + 1
        case "one-to-many":
            return member.number + 1 if is_partner else 0
        case _:
            return member.number


def packed(ran: Ran) -> dict[str, Any]:
    """Return what a rank measured, for the others; times to the nanosecond."""
    samples = [
        [_rounded(value) for value in (one.seconds, one.prepare_s, one.post_s, one.transfer_s)] for one in ran.samples
    ]
    return {"samples": samples, "seconds": ran.seconds, "rates": ran.rates, "cpu_s": ran.cpu_s}


def unpacked(told: dict[str, Any], nbytes: int) -> Ran:
    """Return what a rank told."""
    samples = [Sample(seconds, nbytes, *parts) for seconds, *parts in told["samples"]]
    return Ran(samples, told["seconds"], tuple(told["rates"]), 0.0, told["cpu_s"])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 9)
