"""Metrics in the Prometheus text format, read from the service's state at each scrape. Nothing is counted here.

Labels are bounded by the configuration: pools, backends, peers that are configured or connected; never keys, agents
or sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric

    from xferd.daemon.service import Service


class ServiceCollector(Collector):
    """Asks the service at each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield all families."""
        yield from self._node()
        yield from self._pools()
        yield from self._backends()
        yield from self._peers()
        yield from self._store()

    def _node(self) -> Iterator[Metric]:
        status = self._service.status()
        info = GaugeMetricFamily("xferd_node_info", "1; the labels say who this is", labels=["node", "version"])
        info.add_metric([status.node.name, status.node.version], 1)
        yield info
        yield GaugeMetricFamily("xferd_node_ready", "1 when new work is taken", value=int(status.ready))
        yield GaugeMetricFamily("xferd_node_epoch", "grows at each start", value=status.node.epoch)
        yield GaugeMetricFamily("xferd_node_uptime_seconds", "since the start", value=status.uptime_s)
        yield GaugeMetricFamily("xferd_sessions_open", "attached clients", value=status.sessions)
        yield GaugeMetricFamily("xferd_regions_registered", "regions of all sessions", value=status.regions)
        yield GaugeMetricFamily("xferd_holds_open", "things held, of any kind", value=len(self._service.holds()))
        yield GaugeMetricFamily("xferd_transfers_active", "posted or running", value=status.transfers_active)
        ended = CounterMetricFamily("xferd_transfers_ended", "transfers by how they ended", labels=["state"])
        ended.add_metric(["done"], status.transfers_done)
        ended.add_metric(["failed"], status.transfers_failed)
        ended.add_metric(["cancelled"], status.transfers_cancelled)
        yield ended
        yield CounterMetricFamily(
            "xferd_transfers_moved_bytes", "payload bytes of ended transfers", value=status.moved_nbytes
        )

    def _pools(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("xferd_pool_used_bytes", "allocated", labels=["pool"])
        free = GaugeMetricFamily("xferd_pool_free_bytes", "not allocated", labels=["pool"])
        fragmentation = GaugeMetricFamily(
            "xferd_pool_fragmentation_ratio", "1 - largest free extent / free bytes", labels=["pool"]
        )
        failed = CounterMetricFamily("xferd_pool_failed_allocations", "groups that found no room", labels=["pool"])
        for pool in self._service.pools():
            used.add_metric([pool.name], pool.used_nbytes)
            free.add_metric([pool.name], pool.free_nbytes)
            fragmentation.add_metric([pool.name], pool.fragmentation)
            failed.add_metric([pool.name], pool.failed_allocations)
        yield from (used, free, fragmentation, failed)

    def _backends(self) -> Iterator[Metric]:
        moved = CounterMetricFamily("xferd_backend_moved_bytes", "bytes moved", labels=["backend"])
        chunks = CounterMetricFamily("xferd_backend_chunks", "chunks moved", labels=["backend"])
        failures = CounterMetricFamily("xferd_backend_failures", "chunks that failed", labels=["backend"])
        busy = GaugeMetricFamily("xferd_backend_busy", "chunks under way", labels=["backend"])
        for backend in self._service.backends():
            moved.add_metric([backend.name], backend.moved_nbytes)
            chunks.add_metric([backend.name], backend.chunks)
            failures.add_metric([backend.name], backend.failures)
            busy.add_metric([backend.name], backend.busy)
        yield from (moved, chunks, failures, busy)

    def _peers(self) -> Iterator[Metric]:
        states: dict[str, int] = {}
        for peer in self._service.peers():
            states[peer.state.value.lower()] = states.get(peer.state.value.lower(), 0) + 1
        family = GaugeMetricFamily("xferd_peers", "known nodes by state", labels=["state"])
        for state, count in states.items():
            family.add_metric([state], count)
        yield family
        yield CounterMetricFamily("xferd_peer_lost", "connected peers lost", value=self._service.peer_losses())

    def _store(self) -> Iterator[Metric]:
        healthy = GaugeMetricFamily("xferd_store_healthy", "1 where the store of nodes works, 0 where it is away")
        healthy.add_metric([], 0 if self._service.degraded() else 1)
        yield healthy
        for name, value in self._service.store_statistics().items():
            yield UnknownMetricFamily(f"xferd_store_{name}", "of the store's own, see docs/operations.md", value=value)


def exporter(service: Service) -> CollectorRegistry:
    """Return a registry of its own (never the library's global one) over a service and this process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(service))
    ProcessCollector(namespace="xferd", registry=registry)
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """Return the text format of all metrics."""
    return generate_latest(registry)
