"""Where the time of one prepared transfer goes: stamps in the client and in the daemons, put side by side.

A daemon runs with stamps on a few of its functions (``_stamped_daemon.py``), the client with stamps on its own end.
A stage is the time from one stamp to the next; medians of stages need not add up to the median of the whole.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from xferd.api.errors import InternalError
from xferd.api.types import Access
from xferd.clients.bench._attach import attach
from xferd.clients.bench._stage_points import SUBJECTS
from xferd.clients.nodes import Nodes
from xferd.clients.processes import start_ready
from xferd.clients.transfers import checked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from subprocess import Popen
    from types import TracebackType

    from numpy.typing import NDArray

    from xferd.api.descriptors import DescriptorList
    from xferd.clients import Region
    from xferd.clients.bench._stage_points import Stage, Subject

Stamp = tuple[str, int]

POOL_NBYTES = 64 << 20
WARM_UP, BATCH = 50, 250
WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one subject; times in microseconds.

    Attributes:
        subject: its name in ``SUBJECTS``.
        stages: with the median of each, and None where its stamp was not found.
        p50_us: of a whole request, with stamps.
        plain_p50_us: of a whole request, without stamps in the daemon.
        requests: measured.
    """

    subject: str
    stages: tuple[tuple[Stage, float | None], ...]
    p50_us: float
    plain_p50_us: float
    requests: int


def profile(name: str, requests: int) -> Profile:
    """Measure one prepared transfer, again and again, without and with stamps.

    Raises:
        InternalError: no request went past any stamp of the daemon.
    """
    subject = SUBJECTS[name]
    stages, stamped_nodes = subject.stages, StampedNodes(subject.points)
    with Road(Nodes(), subject) as plain, Road(stamped_nodes, subject) as stamped:
        stamped.stamp()
        for road in (plain, stamped):
            road.spend(WARM_UP)
            road.spans.clear()
        for start in range(0, requests, BATCH):  # in turn, so that a noisy minute hits both
            for road in (plain, stamped):
                road.spend(min(BATCH, requests - start))
    spans = np.array(stamped.spans, np.int64)
    medians = stage_medians(spans, [*stamped.stamps, *stamped_nodes.stamps], [stage.stamp for stage in stages])
    if all(medians[name] is None for name in ("awake", "posting", "copy")):
        raise InternalError("no request was seen in the daemon", remedy="the names of its functions in _stages.py")
    return Profile(
        name,
        tuple((stage, medians[stage.stamp]) for stage in stages),
        _median_us(spans),
        _median_us(np.array(plain.spans, np.int64)),
        len(spans),
    )


def stage_medians(spans: NDArray[np.int64], stamps: Sequence[Stamp], order: Sequence[str]) -> dict[str, float | None]:
    """Return the median microseconds from each stamp to the one before it, request by request.

    Args:
        spans: begin and end of each request, in nanoseconds.
        stamps: of all processes, in any order.
        order: names of stamps as they come in a request; the last one is its end.

    Returns:
        A value for each name; None where no request has that stamp, whose time is then part of the next one's.
    """
    reached = {name: _first_within(spans, [at for known, at in stamps if known == name]) for name in order[:-1]}
    reached[order[-1]] = spans[:, 1].astype(float)
    before = spans[:, 0].astype(float)
    medians: dict[str, float | None] = {}
    for name in order:
        here = reached[name]
        if np.isnan(here).all():
            medians[name] = None
            continue
        steps = here - before
        medians[name] = float(np.nanmedian(steps)) / 1e3
        before = np.where(np.isnan(here), before, here)
    return medians


def _first_within(spans: NDArray[np.int64], times: Sequence[int]) -> NDArray[np.float64]:
    """Return the first of the times within each span, NaN where there is none."""
    ordered = np.sort(np.array([*times, np.iinfo(np.int64).max], np.int64))
    found = ordered[np.searchsorted(ordered, spans[:, 0])]
    return np.where(found <= spans[:, 1], found.astype(float), np.nan)


class StampedNodes(Nodes):
    """Daemons that note when they come past certain functions; ``stamps`` are theirs once they have ended."""

    def __init__(self, points: Sequence[str]) -> None:
        super().__init__()
        self._points = points
        self.stamps: list[Stamp] = []

    def close(self) -> None:
        """Stop the daemons and read what they noted."""
        for node in reversed(self._nodes):
            node.process.terminate()
            node.process.wait()
            told = json.loads(self._target(node.run_dir).read_text())
            self.stamps += [(name, at) for name, at in told["stamps"]]
        super().close()

    def _spawn(self, run_dir: Path, arguments: list[str]) -> Popen[bytes]:
        command = [sys.executable, "-m", "xferd.clients.bench._stamped_daemon", str(self._target(run_dir))]
        return start_ready(
            f"daemon {run_dir.name}",
            [*command, *self._points, "--", "serve", *arguments],
            log=run_dir.with_suffix(".log"),
            remedy="is the daemon installed? pip install 'xferd[daemon]'",
        )

    def _target(self, run_dir: Path) -> Path:
        return run_dir.with_suffix(".stamps")


class Road:
    """A daemon, or two, a client and a prepared transfer. A context manager that ends them.

    Attributes:
        spans: begin and end of each request, in nanoseconds.
        stamps: of the client.
    """

    def __init__(self, nodes: Nodes, subject: Subject) -> None:
        self._nodes = nodes
        self._subject = subject
        self._stack = ExitStack()
        self.spans: list[tuple[int, int]] = []
        self.stamps: list[Stamp] = []

    def __enter__(self) -> Self:
        subject = self._subject
        with ExitStack() as stack:
            stack.enter_context(self._nodes)
            settings = [f'pools=[{{name="host", nbytes={POOL_NBYTES}}}]']
            there = here = self._nodes.start("a", settings=settings)
            if subject.is_remote:
                here = self._nodes.start("b", peers=[there], settings=settings)
            self._client = stack.enter_context(attach(here.session_socket, "profile", subject.control))
            source, target = self._regions(stack, there.session_socket)
            self._transfer = self._client.transfer(subject.op, source, target, hold=True)
            self._stack = stack.pop_all()
        return self

    def _regions(self, stack: ExitStack, there: Path) -> Sequence[Region | DescriptorList]:
        """Return the two sides of the transfer, the client's own first."""
        subject = self._subject
        nbytes = subject.blocks * subject.block_nbytes
        if not subject.is_remote:
            return self._client.allocate([nbytes] * 2)
        peer = stack.enter_context(attach(there, "peer", subject.control))
        theirs = self._client.region(peer.allocate(2 * nbytes, access=Access.READ_WRITE).info)
        mine = self._client.allocate(2 * nbytes)
        return [_scattered(region, subject, seed) for seed, region in enumerate((mine, theirs))]

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def spend(self, requests: int) -> None:
        """Make so many requests, one at a time."""
        post, clock = self._transfer.post, time.perf_counter_ns
        for _ in range(requests):
            started = clock()
            status = post(wait_s=WAIT_S)
            self.spans.append((started, clock()))
            checked(status)

    def stamp(self) -> None:
        """Note from now on when the client has sent and when the answer has come: around the ring, or the stub."""
        inner: Any = self._client
        if self._subject.control == "ring":
            ring = inner._ring._ring
            # Before and not after: the daemon may be awake before the system call returns.
            ring.ring = _noting(ring.ring, "sent", self.stamps, after=False)
            ring.reap = _noting(ring.reap, "seen", self.stamps, after=True)
            return
        stub = inner._methods._stubs["TransferService"]
        stub.Post = _noting(_noting(stub.Post, "sent", self.stamps, after=False), "seen", self.stamps, after=True)


def _scattered(region: Region, subject: Subject, seed: int) -> DescriptorList:
    """Return the blocks of a subject at random places of a region that has room for more."""
    places = region.nbytes // subject.block_nbytes
    chosen = np.random.default_rng(seed).choice(places, subject.blocks, replace=False)
    return region.blocks(chosen, subject.block_nbytes)


def _noting(function: Callable[..., Any], name: str, stamps: list[Stamp], *, after: bool) -> Callable[..., Any]:
    """Return a function that notes when it is called, or when it has returned something."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        if not after:
            stamps.append((name, time.perf_counter_ns()))
        result = function(*args, **kwargs)
        if after and result:
            stamps.append((name, time.perf_counter_ns()))
        return result

    return noted


def _median_us(spans: NDArray[np.int64]) -> float:
    return float(np.median(spans[:, 1] - spans[:, 0])) / 1e3
