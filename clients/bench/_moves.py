"""The probe of a move: clients of several processes get blocks of their own, move them, and look at what arrived."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from xferd.api.types import Priority, TransferOp
from xferd.clients.bench._cases import FAIRNESS
from xferd.clients.bench._cpu import cpu_of
from xferd.clients.bench._flows import (
    Need,
    flows_of,
    initiator_of,
    kinds_of,
    load_needs,
    needs_of,
    partner_of,
    place_flows,
)
from xferd.clients.bench._member import Task
from xferd.clients.bench._pace import Ran, together
from xferd.clients.bench._patterns import Arrival
from xferd.clients.bench._probes import Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import RegionInfo
    from xferd.clients.bench._cases import Case
    from xferd.clients.bench._flows import Member, Placed
    from xferd.clients.bench._members import Members
    from xferd.clients.bench._pace import Pace
    from xferd.clients.bench._patterns import Rows

LOAD_VISIT_S = 2.0
"""A visit beside a load lasts so long at the least: transfers of 1 GiB take a while to get going and to end."""

Calls: TypeAlias = "dict[Member, tuple[str, tuple[object, ...]]]"


class MoveProbe(Probe):
    """Moves blocks from region to region by as many client processes as the case has."""

    system: ClassVar[str] = "xferd"

    def __init__(self, case: Case, members: Members, daemons: Sequence[int]) -> None:
        super().__init__(case)
        self._members = members
        self._daemons = list(daemons)
        self._op = TransferOp(case.op)
        self._local_kind, self._remote_kind = kinds_of(case)
        self._initiators = [initiator_of(case, n) for n in sorted({flow.initiator for flow in flows_of(case)})]
        self._counts = {need: members.region(need).nbytes // case.block_nbytes for need in needs_of(case)}
        self._placed: tuple[Placed, ...] = ()
        self._visit = 0
        self._clients_cpu_s = 0.0

    def begin(self, visit: int) -> None:
        """Choose blocks, stamp the sources, clear the targets, and let all clients prepare."""
        self._visit = visit
        self._placed = place_flows(self.case, self._counts, visit)
        for target in dict.fromkeys(self._target(placed)[0] for placed in self._placed):
            self._members.call(target.member, "clear", target.kind, self.case.block_nbytes)
        for placed in self._placed:
            source, rows = self._source(placed)
            stamp = source.kind, self.case.block_nbytes, rows, visit, placed.source
            self._members.call(source.member, "stamp", *stamp)
        self._members.call_all({member: ("get_ready", (self._task(member),)) for member in self._initiators})

    def request(self) -> None:
        """Make each client's requests once."""
        self._members.call_all(dict.fromkeys(self._initiators, ("warm", ())))

    def verify(self) -> str:
        """Compare what each target got with the pattern."""
        arrivals: dict[Need, list[Arrival]] = defaultdict(list)
        for placed in self._placed:
            target, rows = self._target(placed)
            arrivals[target].append(Arrival(rows, self._source(placed)[1], placed.source))
        calls = {
            target.member: ("fault", (target.kind, self.case.block_nbytes, found, self._visit))
            for target, found in arrivals.items()
        }
        return next((str(fault) for fault in self._members.call_all(calls) if fault), "")

    def spend(self, pace: Pace, seed: int) -> Ran:
        """Let all clients make requests at the same time, beside the load if the case has one."""
        if self.case.load or self.case.scenario == FAIRNESS:
            pace = dataclasses.replace(pace, visit_s=max(pace.visit_s, LOAD_VISIT_S))
        share = pace.share(len(self._initiators))
        calls: Calls = {
            member: ("spend", (share, seed + 7919 * number)) for number, member in enumerate(self._initiators)
        }
        ran = self._beside_load(calls) if self.case.load else together(self._members.call_all(calls))
        self._clients_cpu_s += ran.cpu_s
        return ran

    def cpu_s(self) -> tuple[float, float]:
        """Return that of the daemons, and of the clients while they made requests."""
        return cpu_of(self._daemons), self._clients_cpu_s

    def _beside_load(self, calls: Calls) -> Ran:
        own, other = load_needs(self.case)
        remote = self._members.region(other)
        self._members.region(own)
        self._members.call(own.member, "load_begin", self._op, remote, self.case.load)
        try:
            ran = together(self._members.call_all(calls))
        finally:
            rate = self._members.call(own.member, "load_end")
        ran.load_rate = rate
        return ran

    def _task(self, member: Member) -> Task:
        threads: dict[int, list[tuple[RegionInfo, Rows, Rows]]] = defaultdict(list)
        for placed in self._placed:
            if placed.flow.initiator == member.number:
                remote = self._members.region(Need(partner_of(placed.flow.partner), self._remote_kind))
                threads[placed.flow.thread].append((remote, placed.local, placed.remote))
        case = self.case
        is_urgent = case.load or case.scenario == FAIRNESS
        return Task(
            self._op,
            case.prepared,
            case.control,
            case.wait,
            self._local_kind,
            case.block_nbytes,
            tuple(tuple(flows) for _, flows in sorted(threads.items())),
            Priority.HIGH if is_urgent else Priority.NORMAL,
        )

    def _local(self, placed: Placed) -> tuple[Need, Rows]:
        return Need(initiator_of(self.case, placed.flow.initiator), self._local_kind), placed.local

    def _remote(self, placed: Placed) -> tuple[Need, Rows]:
        return Need(partner_of(placed.flow.partner), self._remote_kind), placed.remote

    def _source(self, placed: Placed) -> tuple[Need, Rows]:
        return self._remote(placed) if self._op is TransferOp.READ else self._local(placed)

    def _target(self, placed: Placed) -> tuple[Need, Rows]:
        return self._local(placed) if self._op is TransferOp.READ else self._remote(placed)
