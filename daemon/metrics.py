"""Metrics in the Prometheus text format, read from the service's state at each scrape. Nothing is counted here.

Labels are bounded by the configuration: pools, backends, GPUs, peers that are configured or connected; never keys,
agents or sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from xferd.api.types import DeviceInfo, StorageDirectoryInfo, StorageInfo
    from xferd.daemon.service import Service


Info = TypeVar("Info")
_Families: TypeAlias = "tuple[tuple[str, str, bool, Callable[[Info], float]], ...]"
"""Name, help, whether it only grows, and the value."""

_STORAGE: _Families[StorageInfo] = (
    ("extents", "extents of all sessions and agents", False, lambda info: info.extents),
    ("persistent_extents", "those that outlive sessions", False, lambda info: info.persistent_extents),
    ("extents_bytes", "bytes of extents", False, lambda info: info.extents_nbytes),
    ("sealed_bytes", "those that a transfer that was DONE has proven", False, lambda info: info.sealed_nbytes),
    ("damaged_blocks", "found not to be what was sealed", False, lambda info: info.damaged_blocks),
    ("mismatches", "checksums that did not match", True, lambda info: info.mismatches),
    ("verified_bytes", "compared with checksums", True, lambda info: info.verified_total_nbytes),
    ("scrubbed_bytes", "read by the scrubber", True, lambda info: info.scrubbed_total_nbytes),
    ("scrub_passes", "of the scrubber over the whole pool", True, lambda info: info.scrub_passes),
    ("journal_bytes", "of all journals", False, lambda info: sum(each.journal_nbytes for each in info.directories)),
    ("journal_batches", "flushes of journals", True, lambda info: sum(e.journal_batches for e in info.directories)),
    ("failed_directories", "take no records any more", False, lambda info: sum(map(_has_failed, info.directories))),
)
"""For each storage pool."""


def _has_failed(directory: StorageDirectoryInfo) -> bool:
    return bool(directory.failure)


_DEVICES: _Families[DeviceInfo] = (
    ("usable", "1 where the GPU can be used", False, lambda info: 0 if info.reason else 1),
    ("total_bytes", "memory of the GPU", False, lambda info: info.total_nbytes),
    ("free_bytes", "of it, as a worker was told last", False, lambda info: info.free_nbytes),
    ("pinned_bytes", "host memory locked by its driver", False, lambda info: info.pinned_nbytes),
    ("workers", "processes that drive the GPU", False, lambda info: info.workers),
    ("worker_restarts", "workers in the place of one that ended", True, lambda info: info.worker_restarts),
    ("moved_bytes", "bytes that the GPU moved", True, lambda info: info.moved_nbytes),
    ("kernel_seconds", "device time by kernels", True, lambda info: info.kernel_s),
    ("copy_seconds", "device time by copy engines", True, lambda info: info.copy_s),
)
"""For each GPU."""


def _families(subject: str, families: _Families[Info], label: str, infos: Mapping[str, Info]) -> Iterator[Metric]:
    """Yield ``families``, each with a value of every one of ``infos``, whose keys are values of the label."""
    for name, text, total, value in families:
        made = CounterMetricFamily if total else GaugeMetricFamily
        family = made(f"xferd_{subject}_{name}", text, labels=[label])
        for key, info in infos.items():
            family.add_metric([key], value(info))
        yield family


class ServiceCollector(Collector):
    """Asks the service at each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield all families."""
        yield from self._node()
        yield from self._pools()
        yield from self._storage()
        yield from self._devices()
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
        given_regions, given_nbytes = self._service.handed_over()
        yield CounterMetricFamily("xferd_regions_handed_over", "regions that changed their owner", value=given_regions)
        yield CounterMetricFamily("xferd_handed_over_bytes", "bytes of those regions, not copied", value=given_nbytes)
        rings, counted = self._service.rings()
        yield GaugeMetricFamily("xferd_rings_open", "rings in shared memory", value=rings)
        yield CounterMetricFamily("xferd_ring_submissions", "taken from rings", value=counted.submissions)
        yield CounterMetricFamily("xferd_ring_completions", "told on rings", value=counted.completions)
        yield CounterMetricFamily(
            "xferd_ring_violations", "rings closed for what was in them", value=counted.violations
        )
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
        huge = GaugeMetricFamily("xferd_pool_huge_bytes", "in pages of 2 MiB", labels=["pool"])
        for pool in self._service.pools():
            used.add_metric([pool.name], pool.used_nbytes)
            free.add_metric([pool.name], pool.free_nbytes)
            fragmentation.add_metric([pool.name], pool.fragmentation)
            failed.add_metric([pool.name], pool.failed_allocations)
            huge.add_metric([pool.name], pool.huge_nbytes)
        yield from (used, free, fragmentation, failed, huge)

    def _storage(self) -> Iterator[Metric]:
        return _families("storage", _STORAGE, "pool", {info.pool: info for info in self._service.storage()})

    def _devices(self) -> Iterator[Metric]:
        return _families("device", _DEVICES, "device", {str(info.index): info for info in self._service.devices()})

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
        broken = CounterMetricFamily(
            "xferd_backend_integrity_failures", "bytes read that are not those written", labels=["backend"]
        )
        for name, count in self._service.integrity_failures().items():
            broken.add_metric([name], count)
        yield from (moved, chunks, failures, busy, broken)

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
        healthy.add_metric([], 0 if self._service.store_problem() else 1)
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
