"""One case on several machines: each process of the run is beside the daemon of its own, and all move at once.

Who moves what is the same for all of them to see: it follows from the case, the number of ranks and the visit. So
they only have to wait for each other (``_coordination.py``) and to tell what they measured.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from xferd.api.errors import InvalidArgument, MoveFailed, NoRoute, PeerLost, Stale, Unavailable
from xferd.api.types import TransferOp
from xferd.clients._session_socket import find_place
from xferd.clients.bench._attach import attach
from xferd.clients.bench._coordination_plan import packed, rank_of, unpacked
from xferd.clients.bench._cpu import cpu_of
from xferd.clients.bench._environment import environment
from xferd.clients.bench._flows import (
    flows_of,
    initiator_of,
    kinds_of,
    needs_of,
    partner_of,
    place_flows,
    regions_for,
)
from xferd.clients.bench._member import MemberProcess, Task
from xferd.clients.bench._pace import Ran, together
from xferd.clients.bench._patterns import Arrival
from xferd.clients.bench._probes import Probe
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import measure
from xferd.clients.bench._tables import progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from xferd.api.types import RegionInfo
    from xferd.clients.bench._cases import Case
    from xferd.clients.bench._coordination import Coordinator
    from xferd.clients.bench._flows import Placed
    from xferd.clients.bench._pace import Pace
    from xferd.clients.bench._patterns import Rows
    from xferd.clients.bench._rows import Row

_UCRED = struct.Struct("3i")


class Site:
    """What this rank has at its daemon: memory as an initiator and as a partner, and all partners' regions.

    A context manager; all ranks enter it at the same time.

    Args:
        coordinator: entered.
        session_socket: of the daemon, None for the default one.
        cases: all that will be run.
    """

    def __init__(self, coordinator: Coordinator, session_socket: Path | None, cases: Sequence[Case]) -> None:
        self.coordinator = coordinator
        self._session_socket = find_place(session_socket).path
        self._daemon = daemon_pid(self._session_socket)
        self._kinds = {kind for case in cases for kind in kinds_of(case)}
        self.region_nbytes = max(regions_for(cases).values())
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        told = self.coordinator
        agent = f"xferbench-{told.run[:8]}-{told.rank}"
        with ExitStack() as stack:
            self._client = stack.enter_context(attach(self._session_socket, agent, "grpc"))
            self.initiator, self.partner = (
                stack.enter_context(MemberProcess(self._session_socket, f"{agent}-{role}"))
                for role in ("initiator", "partner")
            )
            for kind in self._kinds:
                self.initiator.make(kind, self.region_nbytes)
            own = {kind: self.partner.make(kind, self.region_nbytes).id for kind in self._kinds}
            node = self._client.node()
            self.about = {"node": node.name, "version": node.version}
            self._ranks = told.exchange("regions", {**self.about, "regions": own})
            names = [rank["node"] for rank in self._ranks]
            if len(set(names)) < len(names):
                raise InvalidArgument(
                    f"ranks are beside {', '.join(names)}", limit="one on each node", remedy="start each on its own"
                )
            self._regions: dict[tuple[int, str], RegionInfo] = {}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def region(self, rank: int, kind: str) -> RegionInfo:
        """Return the region of a rank as a partner, as its daemon tells it to ours."""
        if (rank, kind) not in self._regions:
            there = self._ranks[rank]
            [found] = self._client.regions(node=there["node"], ids=[there["regions"][kind]])
            self._regions[rank, kind] = found.info
        return self._regions[rank, kind]

    def daemon_cpu_s(self) -> float:
        """Return CPU seconds of the daemon, 0.0 where it cannot be seen from here."""
        return cpu_of([self._daemon]) if self._daemon else 0.0


class Side(NamedTuple):
    """One end of the bytes on this rank: who holds the region, and of what kind it is."""

    process: MemberProcess
    kind: str
    is_partner: bool

    def rows(self, placed: Placed) -> Rows:
        """Return the blocks of a flow on this side."""
        return placed.remote if self.is_partner else placed.local


class RankProbe(Probe):
    """This rank's part of a case. What it returns is of all ranks together."""

    system: ClassVar[str] = "xferd"

    def __init__(self, case: Case, site: Site) -> None:
        super().__init__(case)
        self._site = site
        self._all = site.coordinator
        kinds = kinds_of(case)
        local, remote = Side(site.initiator, kinds[0], False), Side(site.partner, kinds[1], True)
        self._remote_kind = remote.kind
        self._source, self._target = (remote, local) if case.op == "READ" else (local, remote)
        self._local_kind = local.kind
        self._counts = dict.fromkeys(needs_of(case), site.region_nbytes // case.block_nbytes)
        self._initiators = sorted({flow.initiator for flow in flows_of(case)})
        self._placed: list[Placed] = []
        self._visit = 0
        self._client_cpu_s = 0.0

    def begin(self, visit: int) -> None:
        """Choose blocks, as all others do; stamp and clear the own ones; prepare; wait for the others."""
        self._visit = visit
        placed = place_flows(self.case, self._counts, visit)
        self._placed = [one for one in placed if len(set(self._ends(one))) == 2]  # no rank moves to itself
        block_nbytes = self.case.block_nbytes
        self._target.process.clear(self._target.kind, block_nbytes)
        for one in self._mine(self._source):
            self._source.process.stamp(self._source.kind, block_nbytes, self._source.rows(one), visit, one.source)
        if self._is_initiator:
            self._site.initiator.get_ready(self._task())
        self._all.barrier(f"{self.case.name} ready")

    def request(self) -> None:
        """Make each request once."""
        if self._is_initiator:
            self._site.initiator.warm()
        self._all.barrier("warm")

    def verify(self) -> str:
        """Compare what each target got with the pattern; returns what the first rank with a fault found."""
        target = self._target
        arrivals = [Arrival(target.rows(one), self._source.rows(one), one.source) for one in self._mine(target)]
        fault = target.process.fault(target.kind, self.case.block_nbytes, arrivals, self._visit) if arrivals else ""
        found = self._all.exchange("verified", fault)
        return next((f"rank {rank}: {fault}" for rank, fault in enumerate(found) if fault), "")

    def spend(self, pace: Pace, seed: int) -> Ran:
        """Make requests at the same time as all others, for one visit."""
        ran = Ran([], 0.0)
        if self._is_initiator:
            ran = self._site.initiator.spend(pace.share(len(self._initiators)), seed + 7919 * self._all.rank)
        self._client_cpu_s += ran.cpu_s
        found = [unpacked(told, self.case.nbytes) for told in self._all.exchange("ran", packed(ran))]
        return together([one for one in found if one.samples])

    def cpu_s(self) -> tuple[float, float]:
        """Return that of all daemons, and of all initiators while they made requests."""
        found = self._all.exchange("cpu", [self._site.daemon_cpu_s(), self._client_cpu_s])
        return sum(daemon for daemon, _ in found), sum(client for _, client in found)

    @property
    def _is_initiator(self) -> bool:
        return any(self._ends(one)[0] == self._all.rank for one in self._placed)

    def _ends(self, placed: Placed) -> tuple[int, int]:
        """Return the ranks of initiator and partner."""
        members = initiator_of(self.case, placed.flow.initiator), partner_of(placed.flow.partner)
        first, second = (rank_of(member, self.case.scheme, self._all.ranks) for member in members)
        return first, second

    def _mine(self, side: Side) -> list[Placed]:
        """Return the flows that have this rank on a side."""
        return [one for one in self._placed if self._ends(one)[side.is_partner] == self._all.rank]

    def _task(self) -> Task:
        threads: dict[int, list[tuple[RegionInfo, Rows, Rows]]] = defaultdict(list)
        for one in self._placed:
            initiator, partner = self._ends(one)
            if initiator == self._all.rank:
                region = self._site.region(partner, self._remote_kind)
                threads[one.flow.thread].append((region, one.local, one.remote))
        case = self.case
        return Task(
            op=TransferOp(case.op),
            prepared=case.prepared,
            control=case.control,
            wait=case.wait,
            kind=self._local_kind,
            block_nbytes=case.block_nbytes,
            threads=tuple(tuple(flows) for _, flows in sorted(threads.items())),
        )


def run_coordinated(
    coordinator: Coordinator, session_socket: Path | None, cases: Sequence[Case], pace: Pace, *, seed: int = 0
) -> tuple[list[Row], dict[str, object]]:
    """Measure cases together with the other ranks; returns rows and the environment record, the same on all ranks.

    Raises:
        InvalidArgument: ranks were started with different options.
    """
    plan = {"cases": [case.name for case in cases], "pace": dataclasses.asdict(pace), "seed": seed}
    for rank, theirs in enumerate(coordinator.exchange("plan", plan)):
        if theirs != plan:
            raise InvalidArgument(f"rank {rank} has another plan", remedy="start all ranks with the same options")
    with Site(coordinator, session_socket, cases) as site:
        probes = [RankProbe(case, site) for case in cases]
        with progress(pace.rounds * len(probes)) as tell:
            try:
                series = measure(probes, pace, tell if coordinator.rank == 0 else lambda _probe: None, seed=seed)
            except (MoveFailed, NoRoute, PeerLost, Stale) as error:  # what comes of memory that has gone with its rank
                coordinator.blame(error)
                raise
        machines = coordinator.exchange("machines", environment([]) | site.about)
    record = environment([]) | {"pace": dataclasses.asdict(pace), "seed": seed, "run": coordinator.run}
    systems = {"xferd": {"version": site.about["version"], "ranks": machines, "region_nbytes": site.region_nbytes}}
    return make_rows(series, is_open=pace.rate > 0), record | {"systems": systems}


def daemon_pid(session_socket: Path) -> int:
    """Return the process behind a session socket, 0 if it cannot be seen from here.

    Raises:
        Unavailable: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(session_socket))
        except OSError as exc:
            raise Unavailable(
                f"no daemon at {session_socket}: {exc.strerror}", remedy="start xferd there, or name it with --socket"
            ) from exc
        pid: int = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    return pid if Path(f"/proc/{pid}/task").exists() else 0
