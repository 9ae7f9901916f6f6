"""Which system runs which case, and what each result is held against."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xferd.clients.bench._cases import PREPARED, Case, Place
from xferd.clients.bench._standard import references

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.clients.bench._probes import Probe, System

Key = tuple[str, Case]
"""A series: system and case."""

OWN = "xferd"


@dataclass(slots=True)
class Plan:
    """What is run.

    Attributes:
        probes: one for each system and case.
        beside: for each of them, what it is held against, by the name of the ratio.
        left_out: a line for each case that nobody runs, and for each reason for which a peer refuses some.
    """

    probes: list[Probe] = field(default_factory=list)
    beside: dict[Key, dict[str, Key]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def make_plan(cases: Sequence[Case], systems: Sequence[System]) -> Plan:
    """Ask every system for every case; the systems have been entered."""
    plan = Plan()
    made: dict[Key, Probe] = {}
    refused: dict[tuple[str, str], list[Case]] = defaultdict(list)
    peers = [system for system in systems if is_peer(system.name)]
    others = [system for system in systems if not is_peer(system.name)]
    for case in cases:
        refusals = {system.name: system.refusal(case) for system in others}
        for system in others:
            if not refusals[system.name]:
                made.setdefault((system.name, case), system.probe(case))
        if all(refusals.values()):
            if case.place is Place.LIMIT:
                continue  # run beside others only where somebody wants to
            why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            plan.left_out.append(f"{case.name} left out: {why}")
        elif case.is_move:
            found = {peer.name: stand_in_for(peer, case) for peer in peers}
            for peer in peers:
                stand_in = found[peer.name]
                if isinstance(stand_in, str):
                    refused[peer.name, stand_in].append(case)
                elif (peer.name, stand_in) not in made:
                    made[peer.name, stand_in] = peer.probe(stand_in)
            plan.beside[OWN, case] = {name: (name, twin) for name, twin in found.items() if isinstance(twin, Case)}
    for (name, why), left in refused.items():
        told = left[0].name if len(left) == 1 else f"{len(left)} cases"
        plan.left_out.append(f"{told} not run by {name}: {why}")
    plan.probes = list(made.values())
    for name, case in made:
        plan.beside[name, case] = _beside(name, case, made) | plan.beside.get((name, case), {})
    return plan


def is_peer(name: str) -> bool:
    """Say whether a system runs xferd's cases, and is neither xferd nor has cases of its own."""
    return name not in (OWN, "memcpy", "iperf3")


def stand_in_for(peer: System, case: Case) -> Case | str:
    """Return the case as a peer runs it: prepared in the same way, or in its own best; or why it does not."""
    if not case.is_alone or case.load or case.order not in peer.orders:
        return f"it is run one request at a time, with {' or '.join(peer.orders)} blocks"
    seen = dataclasses.replace(case.for_peer(), scenario="")
    ways = dict.fromkeys((case.prepared, *PREPARED))
    twins = [dataclasses.replace(seen, prepared=way) for way in ways]
    refusals = [peer.refusal(twin) for twin in twins]
    return next((twin for twin, why in zip(twins, refusals, strict=True) if not why), refusals[0])


def _beside(name: str, case: Case, made: dict[Key, Probe]) -> dict[str, Key]:
    """Return the references of a case that are run."""
    found: dict[str, Key] = {}
    for ratio, other in references(case).items():
        owner = {"memcpy": "memcpy", "memcpy 256 MiB": "memcpy", "iperf3": "iperf3"}.get(ratio, name)
        if is_peer(name) and owner == name:
            continue
        if (owner, other) in made:
            found[ratio] = owner, other
    return found
