"""How requests follow each other within a visit: closed loop, or open loop at a given rate.

In a closed loop the next request starts when the last one is done. In an open loop arrivals have been drawn before,
as a Poisson process, and a request's time counts from its arrival, so that a request that had to wait for a slow one
before it shows that wait (no coordinated omission).
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from numpy.typing import NDArray

    from xferd.clients.bench._probes import Sample

_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000
"""The kernel's default of 50 us would be seen in the latency of every request that is not late."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure. A visit lasts ``visit_s``, but has no fewer and no more requests than said.

    Attributes:
        rounds: visits of each probe.
        visit_s: time of a visit.
        min_requests: of each thread in a closed loop, whatever time they take.
        max_requests: of each thread in a closed loop.
        rate: arrivals a second of the whole probe; 0.0 is a closed loop.
    """

    rounds: int = 5
    visit_s: float = 0.3
    min_requests: int = 3
    max_requests: int = 5000
    rate: float = 0.0

    def share(self, clients: int) -> Pace:
        """Return the pace of one of so many clients."""
        return dataclasses.replace(self, rate=self.rate / clients)


@dataclass(slots=True)
class Ran:
    """What one client did in a visit: its requests, and how long it was at it."""

    samples: list[Sample]
    seconds: float
    rates: tuple[float, ...] = ()
    load_rate: float = 0.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.rates and self.seconds > 0:
            self.rates = (sum(sample.nbytes for sample in self.samples) / self.seconds,)


def together(parts: Sequence[Ran]) -> Ran:
    """Return what clients that ran at the same time did."""
    return Ran(
        [sample for part in parts for sample in part.samples],
        max(part.seconds for part in parts),
        tuple(rate for part in parts for rate in part.rates),
        sum(part.load_rate for part in parts),
        sum(part.cpu_s for part in parts),
    )


def loop(run: Callable[[], list[Sample]], pace: Pace, seed: int) -> Ran:
    """Make requests from this thread for a visit."""
    started = time.perf_counter()
    samples = _open(run, Arrivals(pace, seed), started) if pace.rate else _closed(run, pace, started)
    return Ran(samples, time.perf_counter() - started)


def threaded(runs: Sequence[Callable[[], list[Sample]]], pool: ThreadPoolExecutor, pace: Pace, seed: int) -> Ran:
    """Make requests from a thread for each of ``runs``; in an open loop whichever is free takes the next arrival."""
    arrivals = Arrivals(pace, seed) if pace.rate else None
    started = time.perf_counter()

    def work(run: Callable[[], list[Sample]]) -> list[Sample]:
        return _open(run, arrivals, started) if arrivals else _closed(run, pace, started)

    samples = [sample for found in pool.map(work, runs) for sample in found]
    return Ran(samples, time.perf_counter() - started)


class Arrivals:
    """When requests are due, from the start of the visit; threads take them in order."""

    def __init__(self, pace: Pace, seed: int) -> None:
        self._due_s = due_times(pace.rate, pace.visit_s, seed)
        self._next = 0
        self._lock = threading.Lock()

    def take(self) -> float | None:
        """Return when the next request is due, None if there is none."""
        with self._lock:
            if self._next == len(self._due_s):
                return None
            self._next += 1
            return float(self._due_s[self._next - 1])


def due_times(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Return Poisson arrivals within a time, at least one; the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    wanted = max(int(rate * seconds + 6 * (rate * seconds) ** 0.5) + 8, 1)
    times = np.cumsum(rng.exponential(1.0 / rate, wanted))
    return times[: max(int(np.searchsorted(times, seconds)), 1)]


def _closed(run: Callable[[], list[Sample]], pace: Pace, started: float) -> list[Sample]:
    samples: list[Sample] = []
    requests = 0
    until = started + pace.visit_s
    while requests < pace.max_requests and (requests < pace.min_requests or time.perf_counter() < until):
        samples += run()
        requests += 1
    return samples


def _open(run: Callable[[], list[Sample]], arrivals: Arrivals, started: float) -> list[Sample]:
    _precise_sleep()
    samples: list[Sample] = []
    while (due_s := arrivals.take()) is not None:
        due = started + due_s
        early_s = due - time.perf_counter()
        if early_s > 0:
            time.sleep(early_s)
        begun = time.perf_counter()
        late_s = max(begun - due, 0.0)
        samples += [dataclasses.replace(sample, seconds=sample.seconds + late_s) for sample in run()]
    return samples


def _precise_sleep() -> None:
    """Let this thread be woken when it is due."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)
