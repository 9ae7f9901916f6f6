"""Files to a real GPU and back: by GPUDirect Storage or what stands in for it, and by staging memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gpu_memory import DRIVER, MIB, SETTINGS

from xferd.clients import Client

if TYPE_CHECKING:
    from cluster import Cluster, DaemonProcess
    from gpu_memory import Memory

pytestmark = pytest.mark.gpu

NBYTES = 32 * MIB


@pytest.fixture(scope="module")
def file_node(gpu_cluster: Cluster) -> DaemonProcess:
    return gpu_cluster.make("gpu-files", tcp=False, settings=(*SETTINGS, "backends.gds={}"))


@pytest.mark.parametrize("backend", ["gds", ""])
def test_scattered_spans_of_a_file_reach_tensors_and_come_back(
    file_node: DaemonProcess, memory: Memory, backend: str
) -> None:
    if backend and DRIVER == "cuda" and not find_spec("kvikio"):
        pytest.skip("kvikio is not installed")
    data = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
    path = file_node.files / f"kv-{memory.name}-{backend}.bin"
    path.write_bytes(data.tobytes())
    array = memory.make(NBYTES)
    memory.put(array, np.zeros(NBYTES, np.uint8))
    count, size = 400, 60_001
    order = np.random.default_rng(2).permutation(count)
    spots = np.arange(count) * 65_537 + 3
    with Client.connect(file_node.session_socket, "files") as client:
        file, vram = client.register_file(str(path), writable=True), client.register_device(array)
        rows = vram.rows(spots, size), file.rows(spots[order], size)
        told = client.explain("READ", *rows, backend=backend)
        if backend:
            assert "kvikio" in told.route[0].reason or "GPUDirect" in told.route[0].reason or DRIVER == "simulated"
        status = client.read(*rows, backend=backend)
        assert status.telemetry.moved_nbytes == count * size
        expected = np.zeros(NBYTES, np.uint8)
        for spot, place in zip(spots.tolist(), spots[order].tolist(), strict=True):
            expected[spot : spot + size] = data[place : place + size]
        assert np.array_equal(memory.get(array), expected)
        changed = np.random.default_rng(3).integers(0, 256, NBYTES, dtype=np.uint8)
        memory.put(array, changed)
        client.write(vram, file, backend=backend)
        assert path.read_bytes() == changed.tobytes()
