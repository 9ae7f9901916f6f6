"""N light nodes with real records in one real etcd: what joining, churn, a mass restart and an etcd restart cost.

    python tests/sim/etcd_sim.py --nodes 100 1000 --peers 8

Each node is a real ``EtcdStore`` with a lease, keepalives, a connection and a stream of its own, watching k peers by
name as a daemon does. Counts are etcd's own, from its /metrics. Prints a table for each number of nodes, or one JSON
object a line with ``--json``. ``test_etcd_sim.py`` asserts what must hold for any number.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from etcd_server import EtcdServer

from xferd.api.types import MemoryKind, NodeInfo
from xferd.metadata.etcd import EtcdStore
from xferd.metadata.etcd_options import EtcdOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from xferd.metadata._watching import Watch

COUNTS = {
    "unary": 'grpc_server_handled_total{grpc_code="OK",grpc_method="%s"',
    "puts": "etcd_mvcc_put_total",
    "events": "etcd_debugging_mvcc_events_total",
    "sent_nbytes": "etcd_network_client_grpc_sent_bytes_total",
    "received_nbytes": "etcd_network_client_grpc_received_bytes_total",
}
COLUMNS = {
    "phase": "phase",
    "seconds": "seconds",
    "Range": "reads",
    "Txn": "txns",
    "LeaseGrant": "leases",
    "LeaseKeepAlive": "renewals",
    "events": "events",
    "watchers": "watchers",
    "keys": "keys",
    "sent_nbytes": "sent bytes",
    "etcd_cpu_s": "etcd cpu s",
    "etcd_rss_mb": "etcd MB",
}
METHODS = ("Range", "Txn", "LeaseGrant", "LeaseRevoke", "LeaseKeepAlive", "Watch", "Authenticate")


@dataclasses.dataclass
class SimNode:
    """One node: its record, its store, and its watches of peers."""

    record: NodeInfo
    store: EtcdStore
    watches: dict[str, Watch] = dataclasses.field(default_factory=dict)


def record(number: int, epoch: int = 1) -> NodeInfo:
    return NodeInfo(
        name=f"gpu-node-{number:05}.cluster.example",
        id=f"{number:032x}",
        epoch=epoch,
        version="0.1.0",
        addresses=(f"tcp://10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:7000",),
        backends=("local", "posix", "tcp"),
        kinds=(MemoryKind.DRAM, MemoryKind.FILE),
        agents=("decode", "prefill"),
        started_at=1.8e9,
    )


class Sim:
    """The nodes, and what etcd counted meanwhile."""

    def __init__(self, etcd: EtcdServer, options: EtcdOptions, peers: int, at_once: int) -> None:
        self.etcd = etcd
        self.options = options
        self.peers = peers
        self.at_once = at_once
        self.nodes: list[SimNode] = []
        self.rows: list[dict[str, float | str]] = []

    async def phase(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        before = await asyncio.to_thread(self.etcd.metrics)
        assert self.etcd.process is not None
        cpu = psutil.Process(self.etcd.process.pid).cpu_times()
        own = time.process_time()
        began = time.monotonic()
        await work()
        took = time.monotonic() - began
        own = time.process_time() - own
        after = await asyncio.to_thread(self.etcd.metrics)
        process = psutil.Process(self.etcd.process.pid)
        later = process.cpu_times()
        used = later.user + later.system - cpu.user - cpu.system
        restarted = after.get("process_start_time_seconds") != before.get("process_start_time_seconds")
        row: dict[str, float | str] = {"phase": name, "seconds": round(took, 2), "nodes": len(self.nodes)}
        for method in METHODS:
            row[method] = int(
                _sum(after, "grpc_server_started_total", method)
                - (0 if restarted else _sum(before, "grpc_server_started_total", method))
            )
        for short in ("puts", "events", "sent_nbytes", "received_nbytes"):
            row[short] = int(after.get(COUNTS[short], 0) - (0 if restarted else before.get(COUNTS[short], 0)))
        row["keys"] = int(after.get("etcd_debugging_mvcc_keys_total", 0))
        row["watchers"] = int(after.get("etcd_debugging_mvcc_watcher_total", 0))
        row["streams"] = int(after.get("etcd_debugging_mvcc_watch_stream_total", 0))
        row["etcd_cpu_s"] = round(max(0.0, used), 2) if not restarted else round(later.user + later.system, 2)
        row["own_cpu_s"] = round(own, 2)
        row["etcd_rss_mb"] = round(process.memory_info().rss / 1e6)
        self.rows.append(row)

    async def each(self, items: Iterable[object], work: Callable[[object], Awaitable[None]]) -> None:
        gate = asyncio.Semaphore(self.at_once)

        async def one(item: object) -> None:
            async with gate:
                await work(item)

        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))

    async def join(self, number: int, epoch: int = 1) -> SimNode:
        node = SimNode(record(number, epoch), EtcdStore(self.options))
        await node.store.start()
        await node.store.publish(node.record)
        return node

    async def join_all(self, total: int) -> None:
        made: dict[int, SimNode] = {}

        async def one(number: object) -> None:
            assert isinstance(number, int)
            made[number] = await self.join(number)

        await self.each(range(total), one)
        self.nodes = [made[number] for number in range(total)]

    async def watch_peers(self) -> None:
        """Each node watches the k after it, and has seen them all."""
        total = len(self.nodes)

        async def one(node: object) -> None:
            assert isinstance(node, SimNode)
            await self.watch(
                node, [self.nodes[(self.nodes.index(node) + 1 + step) % total] for step in range(self.peers)]
            )

        await self.each(self.nodes, one)

    async def watch(self, node: SimNode, peers: list[SimNode]) -> None:
        for peer in peers:
            watch = node.watches[peer.record.name] = node.store.watch(peer.record.name)
            change = await anext(watch)
            assert change.node is not None

    async def agents_change(self, share: float) -> None:
        """So many nodes get another agent; each of their watchers hears of it."""
        chosen = random.sample(range(len(self.nodes)), max(1, int(len(self.nodes) * share)))

        async def one(index: object) -> None:
            assert isinstance(index, int)
            node = self.nodes[index]
            node.record = dataclasses.replace(node.record, agents=(*node.record.agents, f"agent-{random.random()}"))
            await node.store.publish(node.record)
            for watcher in self.watchers_of(index):
                await self.hears(watcher, node)

        await self.each(chosen, one)

    def watchers_of(self, index: int) -> list[SimNode]:
        total = len(self.nodes)
        return [self.nodes[(index - 1 - step) % total] for step in range(min(self.peers, total - 1))]

    async def hears(self, watcher: SimNode, node: SimNode) -> None:
        async with asyncio.timeout(120):
            async for change in watcher.watches[node.record.name]:
                if (
                    change.node is not None
                    and set(change.node.agents) == set(node.record.agents)
                    and change.node.epoch == node.record.epoch
                ):
                    return

    async def mass_restart(self) -> None:
        """All nodes die without a word, and come back at once under the next epoch."""
        for node in self.nodes:
            await crash(node.store)
        old = self.nodes
        made: dict[int, SimNode] = {}

        async def one(number: object) -> None:
            assert isinstance(number, int)
            made[number] = await self.join(number, old[number].record.epoch + 1)

        await self.each(range(len(old)), one)
        self.nodes = [made[number] for number in range(len(old))]
        await self.watch_peers()

    async def etcd_restart(self, *, empty: bool) -> None:
        await asyncio.to_thread(self.etcd.restart, empty=empty)
        await asyncio.gather(*(self._healthy(node) for node in self.nodes))

    async def _healthy(self, node: SimNode) -> None:
        while node.store.health():  # noqa: ASYNC110 -- health has no event
            await asyncio.sleep(0.1)

    async def idle(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def leave(self) -> None:
        async def one(node: object) -> None:
            assert isinstance(node, SimNode)
            await node.store.aclose()

        await self.each(self.nodes, one)


async def crash(store: EtcdStore) -> None:
    """End a store as kill -9 would: its lease and its keys stay."""
    task = store._task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])
    await store._client.aclose()


def _sum(metrics: dict[str, float], name: str, method: str) -> float:
    return sum(
        value for key, value in metrics.items() if key.startswith(name + "{") and f'grpc_method="{method}"' in key
    )


async def simulate(
    etcd: EtcdServer, *, nodes: int, peers: int = 8, ttl_s: float = 10.0, idle_s: float = 20.0, at_once: int = 100
) -> list[dict[str, float | str]]:
    """Run all phases and return a row for each."""
    options = EtcdOptions(endpoints=(etcd.endpoint,), ttl=ttl_s, request_timeout=min(3.0, ttl_s / 3))
    sim = Sim(etcd, options, min(peers, nodes - 1), at_once)
    await sim.phase("join", lambda: sim.join_all(nodes))
    await sim.phase("watch k peers", sim.watch_peers)
    await sim.phase(f"idle {idle_s:g} s", lambda: sim.idle(idle_s))
    await sim.phase("churn 10 %", lambda: sim.agents_change(0.1))
    await sim.phase("mass restart", sim.mass_restart)
    await sim.phase("etcd restart", lambda: sim.etcd_restart(empty=False))
    await sim.phase("etcd restart, empty", lambda: sim.etcd_restart(empty=True))
    await sim.phase("leave", sim.leave)
    return sim.rows


def table(rows: list[dict[str, float | str]]) -> str:
    """Return the main columns, for people."""
    cells = [list(COLUMNS.values()), *([str(row[key]) for key in COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100])
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--ttl", type=float, default=10.0)
    parser.add_argument("--idle", type=float, default=20.0)
    parser.add_argument("--at-once", type=int, default=100, help="nodes that act at the same moment")
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for nodes in given.nodes:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="xfsim") as folder, EtcdServer(Path(folder)) as etcd:
            rows = asyncio.run(
                simulate(
                    etcd, nodes=nodes, peers=given.peers, ttl_s=given.ttl, idle_s=given.idle, at_once=given.at_once
                )
            )
        head = {"nodes": nodes, "peers": given.peers, "ttl_s": given.ttl, "cpus": os.cpu_count(), "load_before": load}
        if given.json:
            print(json.dumps({**head, "phases": rows}), flush=True)
        else:
            print(", ".join(f"{key} {value:g}" for key, value in head.items() if value is not None))
            print(table(rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
