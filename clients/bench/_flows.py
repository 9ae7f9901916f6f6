"""Which client moves what from where to where: schemes as flows, the memory they need, and where their blocks lie.

An *initiator* asks for transfers and has one side of the bytes; a *partner* owns the other side. Both are processes.
A flow is one (initiator, thread, partner): requests of a flow move the same blocks for a visit, and no two flows of a
visit share a block on either side, so that each can be verified.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xferd.clients.bench._cases import MIB, Case, Place
from xferd.clients.bench._kinds import kind_of, region_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.clients.bench._patterns import Rows

SCATTER = 4
"""A region has room for so many times the blocks of its flows, so that they really lie scattered."""

MAX_REGION_NBYTES = 256 * MIB
MAX_TOTAL_NBYTES = 4 << 30
"""Scatter stops where regions, or all regions together, get larger than this."""

PAGE_NBYTES = 4096

LOAD_REGION_NBYTES = 256 * MIB
"""Memory of the background load's regions; a transfer of 1 GiB goes over it four times."""


class Member(NamedTuple):
    """A client process: on which node, in which role ("initiator", "partner", "load"), and its number."""

    node: str
    role: str
    number: int

    @property
    def agent(self) -> str:
        """Its name at the daemon."""
        return f"{self.role}-{self.number}"


class Need(NamedTuple):
    """A region: of which client, of what kind."""

    member: Member
    kind: str


@dataclass(frozen=True, slots=True)
class Flow:
    """One stream of requests, by number of initiator, thread and partner."""

    initiator: int
    thread: int
    partner: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A flow with its blocks for a visit; ``source`` is the number of the client whose bytes are moved."""

    flow: Flow
    local: Rows
    remote: Rows
    source: int


def flows_of(case: Case) -> tuple[Flow, ...]:
    """Return the flows of a case; a thread of an initiator goes through its flows in turn."""
    match case.scheme:
        case "pairwise":
            pairs = [(number, number) for number in range(case.clients)]
        case "many-to-one":
            pairs = [(number, 0) for number in range(case.clients)]
        case "one-to-many":
            pairs = [(0, number) for number in range(case.clients)]
        case _:
            pairs = [(one, other) for one in range(case.clients) for other in range(case.clients)]
    return tuple(Flow(one, thread, other) for one, other in pairs for thread in range(case.threads))


def initiator_of(case: Case, number: int) -> Member:
    """Return an initiator: between nodes it is at "b", because a decode node asks for what a prefill node has."""
    return Member("b" if case.place is Place.TCP else "a", "initiator", number)


def partner_of(number: int) -> Member:
    """Return a partner, always at "a"."""
    return Member("a", "partner", number)


def kinds_of(case: Case) -> tuple[str, str]:
    """Return the names of the regions of (initiators, partners) in their processes: kinds, for most of them."""
    near, far = case.ends
    return region_name(near, case.nbytes), region_name(far, case.nbytes)


def needs_of(case: Case) -> dict[Need, int]:
    """Return the bytes of each region that a case must have at the least."""
    local_kind, remote_kind = kinds_of(case)
    needs: dict[Need, int] = defaultdict(int)
    for flow in flows_of(case):
        needs[Need(initiator_of(case, flow.initiator), local_kind)] += case.nbytes
        needs[Need(partner_of(flow.partner), remote_kind)] += case.nbytes
    return dict(needs)


def regions_for(cases: Sequence[Case]) -> dict[Need, int]:
    """Return the regions that a run needs, with room for scatter, shared by all cases."""
    found: dict[Need, int] = defaultdict(int)
    for case in cases:
        if not case.is_move:
            continue
        needs = needs_of(case)
        most = min(MAX_REGION_NBYTES, MAX_TOTAL_NBYTES // len(needs))
        for need, nbytes in needs.items():
            is_exact = nbytes == case.block_nbytes or kind_of(need.kind).is_whole
            scattered = nbytes if is_exact else min(SCATTER * nbytes, most)
            found[need] = max(found[need], _pages(max(nbytes, scattered)))
        if case.load:
            found |= dict.fromkeys(load_needs(case), LOAD_REGION_NBYTES)
    return dict(found)


def load_needs(case: Case) -> tuple[Need, Need]:
    """Return the regions of a case's background load: its keeper's own one, and the other side."""
    keeper = Member(initiator_of(case, 0).node, "load", 0)
    # A process has one region of a kind; on one node the second is its memfd.
    other = Need(keeper, "MEMFD") if case.place is Place.LOCAL else Need(Member("a", "load", 0), "DRAM")
    return Need(keeper, "DRAM"), other


def place_flows(case: Case, counts: dict[Need, int], visit: int) -> tuple[Placed, ...]:
    """Give each flow blocks of its own on both sides, the same for the same visit.

    Args:
        case: whose flows.
        counts: blocks in each region.
        visit: seed.
    """
    local_kind, remote_kind = kinds_of(case)
    rng = np.random.default_rng(visit)
    free = {need: iter(_parts(case, counts[need], rng)) for need in needs_of(case)}
    return tuple(
        Placed(
            flow,
            next(free[Need(initiator_of(case, flow.initiator), local_kind)]),
            next(free[Need(partner_of(flow.partner), remote_kind)]),
            flow.partner if case.op == "READ" else flow.initiator,
        )
        for flow in flows_of(case)
    )


def _parts(case: Case, count: int, rng: np.random.Generator) -> list[Rows]:
    """Cut the blocks of a region into parts of a request each."""
    order: Rows = np.arange(count) if case.order == "sequential" else rng.permutation(count)
    return [order[start : start + case.batch] for start in range(0, count - case.batch + 1, case.batch)]


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
