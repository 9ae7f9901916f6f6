"""Files to GPU memory by the device workers: exact, said plainly, and not in the way where it cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from device_nodes import Vram, device_of, make_gpu_node

from xferd.api.errors import ShortTransfer, XferdError
from xferd.api.types import Access
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster, DaemonProcess

NBYTES = 4 << 20


@pytest.fixture(scope="module")
def gds_node(module_cluster: Cluster) -> DaemonProcess:
    return make_gpu_node(module_cluster, "gds", "backends.gds={}")


@pytest.fixture
def client(gds_node: DaemonProcess) -> Iterator[Client]:
    with Client.connect(gds_node.session_socket, agent="reader") as client:
        yield client


def made_file(node: DaemonProcess, name: str, nbytes: int = NBYTES) -> tuple[Path, np.ndarray]:
    path = node.files / name
    data = np.random.default_rng(7).integers(0, 256, nbytes, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    return path, data


def test_scattered_spans_of_a_file_reach_gpu_memory_and_come_back(gds_node, client) -> None:
    path, data = made_file(gds_node, "kv.bin")
    file = client.register_file(str(path), writable=True)
    vram = Vram(client, NBYTES)
    count, size = 300, 3001
    order = np.random.default_rng(1).permutation(count)
    places, spots = order * 7001 + 13, np.sort(order) * 7919 + 5
    explained = client.explain("READ", vram.region.rows(spots, size), file.rows(places, size), backend="gds")
    assert [(hop.backend, hop.source, hop.target) for hop in explained.route] == [("gds", "FILE@gds", "VRAM(0)@gds")]
    assert "by a simulated device" in explained.route[0].reason
    client.read(vram.region.rows(spots, size), file.rows(places, size), backend="gds")
    expected = np.zeros(NBYTES, dtype=np.uint8)
    for place, spot in zip(places.tolist(), spots.tolist(), strict=True):
        expected[spot : spot + size] = data[place : place + size]
    assert (vram.array == expected).all()

    vram.array[:] = np.random.default_rng(2).integers(0, 256, NBYTES, dtype=np.uint8)
    client.write(vram.region.rows(spots, size), file.rows(places, size), backend="gds")
    for place, spot in zip(places.tolist(), spots.tolist(), strict=True):
        data[place : place + size] = vram.array[spot : spot + size]
    assert path.read_bytes() == data.tobytes()
    assert device_of(gds_node)["moved_nbytes"] >= 2 * count * size


def test_a_file_that_was_cut_is_a_short_transfer(gds_node, client) -> None:
    path, _ = made_file(gds_node, "cut.bin")
    file = client.register_file(str(path))
    vram = Vram(client, NBYTES)
    with path.open("r+b") as opened:
        opened.truncate(NBYTES // 2)
    with pytest.raises(ShortTransfer):
        client.read(vram.region, file, backend="gds")


def test_a_transfer_with_events_goes_through_staging_memory(gds_node, client) -> None:
    path, data = made_file(gds_node, "events.bin")
    file = client.register_file(str(path))
    vram = Vram(client, NBYTES)
    event = client.make_event(0)
    status = client.read(vram.region, file, done_event=event)
    assert (vram.array == data).all()
    assert {hop.backend for hop in status.telemetry.route} == {"posix", "cuda"}
    with pytest.raises(XferdError, match="events with GPUDirect Storage"):
        client.read(vram.region, file, done_event=event, backend="gds")


def test_pool_memory_takes_files_too(gds_node, client) -> None:
    path, data = made_file(gds_node, "pool.bin")
    file = client.register_file(str(path))
    region = client.allocate(NBYTES, pool="vram", access=Access.READ)
    client.read(region, file, backend="gds")
    assert region.read() == data.tobytes()
