"""Closed loops keep within their bounds; open loops count from when a request was due, whoever was late."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from xferd.clients.bench._pace import Arrivals, Pace, Ran, due_times, loop, threaded, together
from xferd.clients.bench._probes import Sample


class Requests:
    """Counts requests; each takes so long."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.made = 0

    def __call__(self) -> list[Sample]:
        took_s = self.seconds[min(self.made, len(self.seconds) - 1)]
        self.made += 1
        started = time.perf_counter()
        while time.perf_counter() - started < took_s:
            pass
        return [Sample(took_s, 1000)]


def test_a_closed_loop_makes_no_fewer_and_no_more_requests_than_said():
    assert len(loop(Requests(0.0), Pace(visit_s=0.0, min_requests=4), 0).samples) == 4
    assert len(loop(Requests(0.0), Pace(visit_s=60.0, max_requests=9), 0).samples) == 9


def test_rates_are_of_the_whole_visit():
    ran = loop(Requests(0.002), Pace(visit_s=0.0, min_requests=5), 0)
    assert ran.rates[0] == pytest.approx(5000 / ran.seconds)
    assert ran.seconds >= 0.01


def test_a_slow_request_is_seen_in_the_latency_of_those_that_wait_for_it():
    """The classic of coordinated omission: one stall of 50 ms, then fast again, at 1,000 arrivals a second."""
    pace = Pace(visit_s=0.1, rate=1000.0)
    ran = loop(Requests(0.05, 0.0), pace, 3)
    latencies = np.array([sample.seconds for sample in ran.samples])
    due = due_times(1000.0, 0.1, 3)
    assert len(ran.samples) == len(due)
    waiting = int(np.count_nonzero((due > due[0]) & (due < due[0] + 0.04)))
    assert waiting > 10
    assert np.count_nonzero(latencies > 0.01) >= waiting
    closed = loop(Requests(0.05, 0.0), Pace(visit_s=0.0, min_requests=len(due)), 3)
    assert sum(sample.seconds > 0.01 for sample in closed.samples) == 1


@pytest.mark.parametrize("rate", [0.5, 100.0, 20_000.0])
def test_arrivals_come_at_their_rate_and_are_the_same_for_the_same_seed(rate):
    times = due_times(rate, 2.0, 1)
    assert np.array_equal(times, due_times(rate, 2.0, 1))
    assert (np.diff(times) > 0).all()
    assert len(times) == 1 or times[-1] <= 2.0
    if rate > 1:
        assert len(times) == pytest.approx(2.0 * rate, abs=6 * (2.0 * rate) ** 0.5)


def test_threads_take_each_arrival_once():
    pace = Pace(visit_s=0.05, rate=4000.0)
    seen: list[float] = []
    arrivals = Arrivals(pace, 0)
    lock = threading.Lock()

    def take() -> None:
        while (due := arrivals.take()) is not None:
            with lock:
                seen.append(due)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == due_times(pace.rate, pace.visit_s, 0).tolist()


def test_threads_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=10)

    def meet() -> list[Sample]:
        meeting.wait()
        return [Sample(0.0, 1)]

    with ThreadPoolExecutor(3) as pool:
        ran = threaded([meet] * 3, pool, Pace(visit_s=0.0, min_requests=2), 0)
    assert len(ran.samples) == 6


def test_clients_share_the_rate_and_add_up():
    assert Pace(rate=100.0).share(4).rate == 25.0
    both = together([Ran([Sample(1.0, 10)], 1.0, cpu_s=0.5), Ran([Sample(1.0, 30)], 2.0, cpu_s=0.25)])
    assert both.rates == (10.0, 15.0)
    assert (both.seconds, both.cpu_s, len(both.samples)) == (2.0, 0.75, 2)
