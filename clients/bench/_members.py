"""The client processes of a run: started when first needed, each with the regions that all cases need of it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from xferd.clients.bench._member import MemberProcess
from xferd.clients.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from xferd.api.types import RegionInfo
    from xferd.clients.bench._flows import Member, Need


class Members:
    """Client processes by who they are. A context manager that ends them.

    Args:
        session_sockets: by node, where to attach.
        regions: bytes of every region that will be asked for.
    """

    def __init__(self, session_sockets: Mapping[str, Path], regions: Mapping[Need, int]) -> None:
        self._session_sockets = session_sockets
        self._sizes = regions
        self._stack = ExitStack()
        self._workers: dict[Member, Worker] = {}
        self._pids: dict[Member, int] = {}
        self._regions: dict[Need, RegionInfo] = {}

    def call(self, member: Member, method: str, *args: object) -> Any:  # as the method of MemberProcess
        """Call a method in a process, which is started if it was not, and return what it returns."""
        return self._worker(member).call(method, *args)

    def call_all(self, calls: Mapping[Member, tuple[str, tuple[object, ...]]]) -> list[Any]:
        """Call a method in each of several processes at the same time; returns what they return, in order."""
        workers = [self._worker(member) for member in calls]
        for worker, (method, args) in zip(workers, calls.values(), strict=True):
            worker.begin(method, *args)
        return [worker.result() for worker in workers]

    def region(self, need: Need) -> RegionInfo:
        """Return the record of a region, which is made if it was not."""
        if need not in self._regions:
            self._regions[need] = self.call(need.member, "make", need.kind, self._sizes[need])
        return self._regions[need]

    def pids(self) -> list[int]:
        """Return the processes that run."""
        return list(self._pids.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.clear()
        self._stack.__exit__(exc_type, exc, traceback)

    def _worker(self, member: Member) -> Worker:
        if member not in self._workers:
            make = partial(MemberProcess, self._session_sockets[member.node], member.agent)
            self._workers[member] = self._stack.enter_context(Worker(f"{member.agent}@{member.node}", make))
            self._pids[member] = self._workers[member].call("pid")
        return self._workers[member]
