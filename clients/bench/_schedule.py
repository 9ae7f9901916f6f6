"""Who is measured when: all probes in turn, round by round, so that a noisy minute hits them alike."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from xferd.clients.bench._probes import Series, Visit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.clients.bench._pace import Pace
    from xferd.clients.bench._probes import Probe


def measure(probes: Sequence[Probe], pace: Pace, tell: Callable[[Probe], None], *, seed: int = 0) -> list[Series]:
    """Visit every probe once a round, in an order that changes from round to round.

    Args:
        probes: of any systems.
        pace: how long.
        tell: called before each visit.
        seed: of the order, and of arrivals.
    """
    rng = np.random.default_rng(seed)
    series = [Series(probe.system, probe.case) for probe in probes]
    number = 0
    for _ in range(pace.rounds):
        for place in rng.permutation(len(probes)).tolist():
            number += 1
            tell(probes[place])
            series[place].visits.append(visit(probes[place], pace, number, seed))
    return series


def visit(probe: Probe, pace: Pace, number: int, seed: int = 0) -> Visit:
    """Measure one probe for a while. The first request warms up and is the one whose bytes are verified."""
    probe.begin(number)
    most = probe.max_requests
    if most is None:
        probe.request()
    else:  # it times itself: nothing to warm up, and no more runs than it says
        pace = dataclasses.replace(pace, max_requests=most, min_requests=min(most, pace.min_requests), rate=0.0)
    fault = probe.verify()
    server_s, client_s = probe.cpu_s()
    ran = probe.spend(pace, seed * 1_000_003 + number)
    server_end_s, client_end_s = probe.cpu_s()
    return Visit(ran.samples, server_end_s - server_s, client_end_s - client_s, fault, ran.rates, ran.load_rate)
