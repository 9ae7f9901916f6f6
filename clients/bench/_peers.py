"""Other projects' transfer engines under the same cases as xferd: which cases, with what memory, and the probe.

What differs between them is in ``_nixl.py`` and ``_mooncake.py``; their processes are in ``_peer_pair.py``. The memory
is that of the benchmark: memfds, as xferd's pools are, which both sides map and register. So the same patterns are
stamped and looked at as for xferd.
"""

from __future__ import annotations

import abc
import os
from contextlib import ExitStack
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from xferd.api.errors import Unsupported
from xferd.clients.bench._pace import Ran
from xferd.clients.bench._patterns import Blocks
from xferd.clients.bench._peer_pair import Pair
from xferd.clients.bench._probes import Probe, Sample, System
from xferd.clients.memory import make_memfd

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.clients.bench._cases import Case, Place
    from xferd.clients.bench._pace import Pace
    from xferd.clients.memory import ByteArray

LOOPBACK = "127.0.0.1"


class Peer(System):
    """A peer: one pair of processes for each place, started when the first probe of that place is made."""

    driver: ClassVar[str]
    """Which driver of ``_peer_process.py`` speaks to its library."""

    distributions: ClassVar[tuple[str, ...]]
    """Names under which its wheels are known; the first that is installed is used."""

    places: ClassVar[tuple[Place, ...]]

    answer_timeout_s: ClassVar[float] = 60.0
    """A process that takes longer for a visit, or to start, is given up."""

    def __init__(self, region_nbytes: int) -> None:
        self._region_nbytes = region_nbytes
        self._stack = ExitStack()
        self._pairs: dict[tuple[Place, tuple[str, str]], Pair] = {}
        self._memory: tuple[tuple[int, int], tuple[ByteArray, ByteArray]] | None = None

    @classmethod
    def installed(cls) -> tuple[str, str] | None:
        """Return the name and version of the wheel that is installed, or None."""
        for name in cls.distributions:
            try:
                return name, metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    @abc.abstractmethod
    def options(self, place: Place, role: str) -> dict[str, Any]:
        """Return what the driver is told beside ``role`` and ``nbytes``."""

    @abc.abstractmethod
    def environ(self, place: Place) -> dict[str, str]:
        """Return the environment variables that are set for both processes."""

    def refusal(self, case: Case) -> str:
        """Refuse what it has no way for, and everything where its wheel is missing."""
        if case.place not in self.places:
            return f"{self.name} is not measured for {case.place.value}"
        if case.scheme != "pairwise" or (case.src, case.dst) != ("DRAM", "DRAM"):
            return f"{case.scheme} {case.src} to {case.dst} is not implemented for {self.name}"
        return "" if self.installed() else self._missing()

    def probe(self, case: Case) -> Probe:
        """Return the probe, starting the pair of its place where that has not been done."""
        if self.installed() is None:
            raise Unsupported(self._missing())
        if self._memory is None:
            self._memory = self._make_memory()
        fds, spans = self._memory
        kinds = self.kinds(case)
        if (case.place, kinds) not in self._pairs:
            sizes = {"driver": self.driver, "nbytes": self._region_nbytes}
            initiator, target = (
                {**sizes, "role": role, "kind": kind, **self.options(case.place, role)}
                for role, kind in zip(("initiator", "target"), kinds, strict=True)
            )
            pair = Pair(self.name, fds, (initiator, target), self.environ(case.place), self.answer_timeout_s)
            self._pairs[case.place, kinds] = self._stack.enter_context(pair)
        return PeerProbe(self.name, case, self._pairs[case.place, kinds], *spans)

    def kinds(self, case: Case) -> tuple[str, str]:
        """Return the memory kinds of (initiator, target)."""
        return "DRAM", "DRAM"

    def settings(self) -> dict[str, object]:
        """Return the version, and for each place the environment and options of both processes."""
        name, version = self.installed() or (self.distributions[0], None)
        places = {
            place.value: {"environment": self.environ(place), "initiator": self.options(place, "initiator")}
            for place in self.places
        }
        return {"package": name, "version": version, "region_nbytes": self._region_nbytes, **places}

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pairs.clear()
        self._memory = None
        self._stack.close()

    def _make_memory(self) -> tuple[tuple[int, int], tuple[ByteArray, ByteArray]]:
        """Return memfds and their mappings, for the initiator and for the target; the fds end with the system."""
        made = []
        for fd, span in (self._make_near(), self._make_far()):
            self._stack.callback(os.close, fd)
            span[:] = 1  # present, before anybody maps it
            made.append((fd, span))
        (near_fd, near), (far_fd, far) = made
        return (near_fd, far_fd), (near, far)

    def _make_near(self) -> tuple[int, ByteArray]:
        """Return the initiator's memory: a descriptor, which is the caller's, and a mapping."""
        return make_memfd(self._region_nbytes, f"{self.name}-near")

    def _make_far(self) -> tuple[int, ByteArray]:
        """Return the target's memory, likewise."""
        return make_memfd(self._region_nbytes, f"{self.name}-far")

    def _missing(self) -> str:
        return f"{self.name} is not installed: pip install 'xferd[peers]'"


class PeerProbe(Probe):
    """Moves random blocks to random places. A WRITE takes from the initiator's memory, a READ from the target's."""

    system: str  # type: ignore[misc] # one class for all peers: the name is the instance's

    def __init__(self, system: str, case: Case, pair: Pair, near: ByteArray, far: ByteArray) -> None:
        super().__init__(case)
        self.system = system
        self._pair = pair
        source, target = (near, far) if case.op == "WRITE" else (far, near)
        self._source, self._target = Blocks(source, case.block_nbytes), Blocks(target, case.block_nbytes)
        self._visit = 0

    def begin(self, visit: int) -> None:
        """Choose blocks on both sides, stamp the source, clear the target, tell the initiator."""
        rng = np.random.default_rng(visit)
        self._visit = visit
        self._source_rows = rng.permutation(self._source.count)[: self.case.batch]
        self._target_rows = rng.permutation(self._target.count)[: self.case.batch]
        self._source.stamp(self._source_rows, visit)
        self._target.clear()
        self._pair.copy("push")
        sides = self._source_rows, self._target_rows
        work = {"op": self.case.op, "block_nbytes": self.case.block_nbytes, "prepared": self.case.prepared}
        self._pair.begin(work, *(sides if self.case.op == "WRITE" else sides[::-1]))

    def request(self) -> None:
        """Make one request."""
        self._run(1, 1, 0.0)

    def spend(self, pace: Pace, seed: int) -> Ran:
        """Have the initiator make and time requests for a visit, in a closed loop."""
        samples = self._run(pace.min_requests, pace.max_requests, pace.visit_s)
        return Ran(samples, sum(sample.seconds for sample in samples))

    def _run(self, least: int, most: int, seconds: float) -> list[Sample]:
        with self._pair.awake():
            timings = self._pair.run(least, most, seconds).tolist()
        return [Sample(sum(parts), self.case.nbytes, *parts) for parts in timings]

    def verify(self) -> str:
        """Compare with the pattern."""
        self._pair.copy("pull")
        return str(self._target.fault(self._target_rows, self._source_rows, self._visit) or "")

    def cpu_s(self) -> tuple[float, float]:
        """Return that of the target and of the initiator; this process only waits."""
        return self._pair.cpu_s()
