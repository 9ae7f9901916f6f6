"""Where the time of one prepared transfer goes: stamps in the client and in the daemon, put side by side.

The daemon runs with stamps on a few of its functions (``_stamped_daemon.py``), the client with stamps on its own end.
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
from xferd.clients.bench._attach import attach
from xferd.clients.nodes import Nodes
from xferd.clients.processes import start_ready
from xferd.clients.transfers import checked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from subprocess import Popen
    from types import TracebackType

    from numpy.typing import NDArray

Stamp = tuple[str, int]

SMALL_NBYTES, LARGE_NBYTES = 4096, 4 << 20
POOL_NBYTES = 4 * LARGE_NBYTES
WARM_UP, BATCH = 50, 250
WAIT_S = 30.0

RING_POINTS = (
    "awake=xferd.daemon.rings.ring:Ring._on_doorbell:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "copy=xferd.daemon.engine.runner:Runner.quick:call",
    "told=xferd.daemon.rings.ring:Ring._tell:enter",
)
THREADS_POINTS = (
    "awake=xferd.daemon.rings.ring:Ring._on_doorbell:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "begin=xferd.plugins.local.backend:LocalBackend.begin:enter",
    "given=xferd.plugins.local.backend:LocalBackend.begin:exit",
    "copy=xferd.plugins.movers:Batch.perform_next:enter",
    "copied=xferd.plugins.movers:MoverPool._report:enter",
    "back=xferd.plugins.movers:MoverPool._collect:enter",
    "told=xferd.daemon.rings.ring:Ring._tell:enter",
)
GRPC_POINTS = (
    "awake=xferd.api.grpc.transfers:TransferServicer.Post:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "copy=xferd.daemon.engine.runner:Runner.quick:call",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the way: what happens until its stamp is reached, and at which end."""

    stamp: str
    at: str
    what: str


RING_STAGES = (
    Stage("sent", "client", "find the transfer, write the submission"),
    Stage(
        "awake", "both", "ring the doorbell (one system call); the daemon's loop wakes up and calls the ring's reader"
    ),
    Stage("posting", "daemon", "empty the doorbell, read and check the submission, find the transfer"),
    Stage("copy", "daemon", "check rights and state, note who hears of the end"),
    Stage("copy+", "daemon", "copy 4 KiB"),
    Stage("told", "daemon", "end the transfer: state, metrics, log"),
    Stage("seen", "both", "write the completion, signal; the client wakes up, or still looks, and takes it"),
    Stage("end", "client", "put the status together and return"),
)
THREADS_STAGES = (
    *RING_STAGES[:3],
    Stage("begin", "daemon", "check state and rights, hold the regions, take a slot, arm the deadline"),
    Stage("given", "daemon", "give the chunk to the mover threads"),
    Stage("copy", "daemon", "the first thread wakes up"),
    Stage("copied", "daemon", "copy 4 MiB"),
    Stage("back", "daemon", "the event loop wakes up"),
    Stage("told", "daemon", "end the chunk and the transfer: cost, state, holds, metrics"),
    *RING_STAGES[-2:],
)
GRPC_STAGES = (
    Stage("sent", "client", "build the request"),
    Stage("awake", "both", "gRPC: serialize, send, wake the daemon, parse, start the handler"),
    Stage("posting", "daemon", "check the token, find session and transfer"),
    Stage("copy", "daemon", "check rights and state"),
    Stage("copy+", "daemon", "copy 4 KiB"),
    Stage("awake+", "daemon", "end the transfer: state, metrics, log; build the answer"),
    Stage("seen", "both", "gRPC: serialize, send, wake the client, parse"),
    Stage("end", "client", "make the status and return"),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is profiled: by which control plane, of how many bytes, with which stamps in the daemon."""

    control: str
    nbytes: int
    points: tuple[str, ...]
    stages: tuple[Stage, ...]


SUBJECTS = {
    "ring": Subject("ring", SMALL_NBYTES, RING_POINTS, RING_STAGES),
    "threads": Subject("ring", LARGE_NBYTES, THREADS_POINTS, THREADS_STAGES),
    "grpc": Subject("grpc", SMALL_NBYTES, GRPC_POINTS, GRPC_STAGES),
}


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
    """Measure one prepared transfer on one node, again and again, without and with stamps.

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
    """A daemon, a client and a prepared transfer. A context manager that ends them.

    Attributes:
        spans: begin and end of each request, in nanoseconds.
        stamps: of the client.
    """

    def __init__(self, nodes: Nodes, subject: Subject) -> None:
        self._nodes = nodes
        self._control = subject.control
        self._nbytes = subject.nbytes
        self._stack = ExitStack()
        self.spans: list[tuple[int, int]] = []
        self.stamps: list[Stamp] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._nodes)
            node = self._nodes.start("a", settings=[f'pools=[{{name="host", nbytes={POOL_NBYTES}}}]'])
            self._client = stack.enter_context(attach(node.session_socket, "profile", self._control))
            source, target = self._client.allocate([self._nbytes] * 2)
            self._transfer = self._client.transfer("WRITE", source, target, hold=True)
            self._stack = stack.pop_all()
        return self

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
        if self._control == "ring":
            ring = inner._ring._ring
            # Before and not after: the daemon may be awake before the system call returns.
            ring.ring = _noting(ring.ring, "sent", self.stamps, after=False)
            ring.reap = _noting(ring.reap, "seen", self.stamps, after=True)
            return
        stub = inner._methods._stubs["TransferService"]
        stub.Post = _noting(_noting(stub.Post, "sent", self.stamps, after=False), "seen", self.stamps, after=True)


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
