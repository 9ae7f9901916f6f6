"""A client process of a benchmark: it owns regions, stamps and verifies them, and makes requests when told to.

``_members.py`` starts these processes and calls the methods below by name over a pipe, so all arguments and results
are plain values. Requests are made and timed here, in a loop that speaks to nobody.
"""

from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from xferd.api.types import Priority, TransferOp
from xferd.clients.bench._attach import attach
from xferd.clients.bench._kinds import kind_of
from xferd.clients.bench._load import Load
from xferd.clients.bench._pace import threaded
from xferd.clients.bench._requests import Lists, Move, make_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from xferd.api.types import RegionInfo
    from xferd.clients.bench._owned import Owned
    from xferd.clients.bench._pace import Pace, Ran
    from xferd.clients.bench._patterns import Arrival, Rows
    from xferd.clients.bench._probes import Sample
    from xferd.clients.bench._requests import Request
    from xferd.clients.sync import Client, Region


@dataclass(frozen=True, slots=True)
class Task:
    """What an initiator is to do in a visit: for each thread its flows, as (remote region, local and remote rows)."""

    op: TransferOp
    prepared: str
    control: str
    wait: str
    kind: str
    block_nbytes: int
    threads: tuple[tuple[tuple[RegionInfo, Rows, Rows], ...], ...]
    priority: Priority = Priority.NORMAL


class MemberProcess:
    """What a client process holds: a session for each control plane, its regions, its requests.

    The regions belong to the first session; the others reach them by the rights that the regions give.
    """

    def __init__(self, session_socket: Path, agent: str) -> None:
        self._session_socket = session_socket
        self._agent = agent
        self._stack = ExitStack()
        self._clients: dict[str, Client] = {}
        self._lists: dict[str, Lists] = {}
        self._owned: dict[str, Owned] = {}
        self._requests: list[list[Request]] = []
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._load: Load | None = None

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    def make(self, kind: str, nbytes: int) -> RegionInfo:
        """Make this process's region of a kind."""
        self._owned[kind] = kind_of(kind).make(self._client("grpc"), nbytes)
        return self._owned[kind].region.info

    def file(self, kind: str) -> str:
        """Return a path by which other processes of this user can open the file of a region; "" for what is none."""
        fd = self._owned[kind].fd
        return f"/proc/{os.getpid()}/fd/{fd}" if fd >= 0 else ""

    def stamp(self, kind: str, block_nbytes: int, rows: Rows, visit: int, source: int) -> None:
        """Write a visit's pattern into blocks."""
        owned = self._owned[kind]
        owned.blocks(block_nbytes).stamp(rows, visit, source)
        owned.push()

    def clear(self, kind: str, block_nbytes: int) -> None:
        """Fill the region with zeros."""
        owned = self._owned[kind]
        owned.blocks(block_nbytes).clear()
        owned.push()

    def fault(self, kind: str, block_nbytes: int, arrivals: Sequence[Arrival], visit: int) -> str:
        """Return what is wrong with the bytes of the region, "" if nothing is."""
        owned = self._owned[kind]
        owned.pull()
        return str(owned.blocks(block_nbytes).fault_of(arrivals, visit) or "")

    def get_ready(self, task: Task) -> None:
        """Make the requests of a visit, letting go of those before."""
        self._drop_requests()
        client = self._client(task.control, task.wait)
        lists = self._lists.setdefault(f"{task.control}-{task.wait}", Lists(client))
        local = client.region(self._owned[task.kind].region.info)

        def request(remote: Region, local_rows: Rows, remote_rows: Rows) -> Request:
            move = Move(client, task.op, local, remote, local_rows, remote_rows, task.block_nbytes, task.priority)
            return make_request(task.prepared, move, lists)

        for flows in task.threads:
            made = [request(client.region(info), mine, theirs) for info, mine, theirs in flows]
            self._requests.append(made)

    def warm(self) -> None:
        """Make each request once, untimed."""
        for requests in self._requests:
            for request in requests:
                request()

    def spend(self, pace: Pace, seed: int) -> Ran:
        """Make requests for a visit, from a thread for each list of flows."""
        runs = [_in_turn(requests) for requests in self._requests]
        pool = self._pools.setdefault(len(runs), ThreadPoolExecutor(len(runs), thread_name_prefix="requests"))
        gc.collect()  # what earlier visits left is not cleared away in this one's time
        started_s = time.process_time()
        ran = threaded(runs, pool, pace, seed)
        ran.cpu_s = time.process_time() - started_s
        return ran

    def load_begin(self, op: TransferOp, remote: RegionInfo, count: int) -> None:
        """Keep so many transfers of 1 GiB going, LOW, until ``load_end``."""
        client = self._client("grpc")
        local = self._owned["DRAM"].region
        self._load = Load(client, op, local, client.region(remote), count)

    def load_end(self) -> float:
        """Stop the load; returns the bytes a second that it moved."""
        assert self._load is not None
        load, self._load = self._load, None
        return load.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._load is not None:
            self._load.stop()
        for pool in self._pools.values():
            pool.shutdown()
        self._requests.clear()  # their daemon forgets them with the session
        self._owned.clear()
        self._stack.close()

    def _client(self, control: str, wait: str = "") -> Client:
        agent = "-".join(part for part in (self._agent, control, wait) if part)
        if agent not in self._clients:
            self._clients[agent] = self._stack.enter_context(attach(self._session_socket, agent, control, wait))
        return self._clients[agent]

    def _drop_requests(self) -> None:
        requests, self._requests = self._requests, []
        for request in (one for part in requests for one in part):
            request.close()


def _in_turn(requests: Sequence[Request]) -> Callable[[], list[Sample]]:
    """Return what makes one request each time it is called: each of these in turn."""
    number = 0

    def run() -> list[Sample]:
        nonlocal number
        number += 1
        return [requests[number % len(requests)]()]

    return run
