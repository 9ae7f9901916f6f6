"""Who is measured when: all probes in turn, round by round, so that a noisy minute hits them alike."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xferd.clients.bench._probes import Series, Visit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xferd.clients.bench._probes import Probe


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure. A visit lasts ``visit_s``, but has no fewer and no more requests than said."""

    rounds: int = 5
    visit_s: float = 0.3
    min_requests: int = 3
    max_requests: int = 300


def measure(probes: Sequence[Probe], pace: Pace, tell: Callable[[Probe], None], *, seed: int = 0) -> list[Series]:
    """Visit every probe once a round, in an order that changes from round to round.

    Args:
        probes: of any systems.
        pace: how long.
        tell: called before each visit.
        seed: of the order.
    """
    rng = np.random.default_rng(seed)
    series = [Series(probe.system, probe.case) for probe in probes]
    number = 0
    for _ in range(pace.rounds):
        for place in rng.permutation(len(probes)).tolist():
            number += 1
            tell(probes[place])
            series[place].visits.append(visit(probes[place], pace, number))
    return series


def visit(probe: Probe, pace: Pace, number: int) -> Visit:
    """Measure one probe for a while. The first request warms up and is the one whose bytes are verified."""
    probe.begin(number)
    probe.request() if probe.max_requests is None else None
    fault = probe.verify()
    most = pace.max_requests if probe.max_requests is None else probe.max_requests
    samples = []
    requests = 0
    server_s, client_s = probe.cpu_s()
    until = time.perf_counter() + pace.visit_s
    while requests < most and (requests < pace.min_requests or time.perf_counter() < until):
        samples += probe.run()
        requests += 1
    server_end_s, client_end_s = probe.cpu_s()
    return Visit(samples, server_end_s - server_s, client_end_s - client_s, fault)
