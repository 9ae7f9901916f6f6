"""What a benchmark does to a system again and again, and what comes out: probes, samples, series.

A system (xferd, memcpy, iperf3, a peer) makes one probe for each case that it can run. The schedule
(``_schedule.py``) visits probes in turn and knows nothing else of them.
"""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from xferd.clients.bench._pace import Ran, loop

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.clients.bench._cases import Case
    from xferd.clients.bench._pace import Pace


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: how long it took, how many bytes it moved, and of what parts its time was; None where unknown.

    Attributes:
        seconds: from when it was due to when its end was known.
        nbytes: moved.
        prepare_s: building lists, or picking rows of prepared ones.
        post_s: telling the system, and hearing of the end.
        transfer_s: from posted to ended, as the system says.
    """

    seconds: float
    nbytes: int
    prepare_s: float | None = None
    post_s: float | None = None
    transfer_s: float | None = None


class Probe(abc.ABC):
    """One case on one system. Methods are called by the schedule, from one thread."""

    system: ClassVar[str]

    def __init__(self, case: Case) -> None:
        self.case = case

    def begin(self, visit: int) -> None:  # noqa: B027 - many have nothing to get ready
        """Get ready for a visit, untimed: new positions, new bytes. Visits count from 1 over the whole run."""

    def run(self) -> list[Sample]:
        """Make one request; a system that times by itself may return several samples."""
        started = time.perf_counter()
        self.request()
        return [Sample(time.perf_counter() - started, self.case.nbytes)]

    @abc.abstractmethod
    def request(self) -> None:
        """Do once what is timed."""

    def verify(self) -> str | None:
        """Look at the bytes of the first request of this visit: "" if all is well, else what is wrong; None: no bytes.

        Called once a visit, after the first request and before the others.
        """
        return None

    def spend(self, pace: Pace, seed: int) -> Ran:
        """Make requests for one visit. A probe whose requests are made elsewhere (other processes) does it anew."""
        return loop(self.run, pace, seed)

    def cpu_s(self) -> tuple[float, float]:
        """Return CPU seconds used so far by (daemons or other servers, clients)."""
        return 0.0, time.process_time()

    @property
    def max_requests(self) -> int | None:
        """Requests a visit at most; None leaves it to the schedule."""
        return None


class System(abc.ABC):
    """Something that can be measured. A context manager: inside, probes can be made and used."""

    name: ClassVar[str]

    orders: ClassVar[tuple[str, ...]] = ("random",)
    """Orders of blocks that it knows, where it stands beside xferd."""

    @abc.abstractmethod
    def refusal(self, case: Case) -> str:
        """Return why this system cannot run a case, "" if it can."""

    @abc.abstractmethod
    def probe(self, case: Case) -> Probe:
        """Make the probe for a case that was not refused."""

    def settings(self) -> dict[str, object]:
        """Return the settings and versions that a reader must know to judge the figures."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


@dataclass(slots=True)
class Visit:
    """What one visit of a probe gave. CPU seconds are those of all its samples together.

    ``rates`` are the bytes per second of each client over its whole visit, the time between requests included.
    """

    samples: list[Sample]
    server_cpu_s: float
    client_cpu_s: float
    fault: str | None
    rates: tuple[float, ...] = ()
    load_rate: float = 0.0


@dataclass(slots=True)
class Series:
    """All visits of one probe, in the order of rounds."""

    system: str
    case: Case
    visits: list[Visit] = field(default_factory=list)
