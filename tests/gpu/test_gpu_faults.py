"""What goes wrong with a GPU: clients and workers that die or hang, handles that are none, and who has CUDA mapped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from cluster import eventually
from gpu_memory import DRIVER, GIB, MIB, SETTINGS, free_nbytes

from xferd.api.errors import DeviceLost, InvalidArgument, XferdError
from xferd.api.types import RegisterDeviceRequest, TransferState
from xferd.clients import Client, _calls as calls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster, DaemonProcess
    from gpu_memory import Memory

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
BACK_S = 2.0


class Engine:
    """A process that has registered memory."""

    def __init__(self, daemon: DaemonProcess | None, library: str, nbytes: int) -> None:
        words = [str(daemon.session_socket) if daemon else "", "engine", library, str(nbytes)]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine.py")), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        assert len(said) == 3, "the engine did not come up"
        self.handle, self.uuid, self.nbytes = (
            bytes.fromhex(said[0].decode()),
            bytes.fromhex(said[1].decode()),
            int(said[2]),
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def workers(daemon: DaemonProcess) -> set[int]:
    """Return the daemon's device workers."""
    found = set()
    for child in psutil.Process(daemon.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, too
            if "xferd.plugins.cuda.worker" in child.cmdline():
                found.add(child.pid)
    return found


@pytest.fixture
def fresh_node(gpu_cluster: Cluster) -> Iterator[DaemonProcess]:
    """A daemon of the test's own."""
    daemon = gpu_cluster.make(f"node-{len(gpu_cluster.daemons)}", tcp=False, settings=SETTINGS)
    yield daemon
    daemon.stop()


def test_the_daemon_has_no_cuda(gpu_node: DaemonProcess, memory: Memory) -> None:
    with Client.connect(gpu_node.session_socket, "one") as one, one.register_device(memory.make(MIB)) as region:
        one.read(one.allocate(MIB, "host"), region)
        maps = Path(f"/proc/{gpu_node.process.pid}/maps").read_text()
        assert "libcuda" not in maps
        assert "nvidia" not in maps
        if DRIVER == "cuda":
            assert all("libcuda" in Path(f"/proc/{pid}/maps").read_text() for pid in workers(gpu_node))


def test_memory_of_a_killed_engine_is_back_in_two_seconds(fresh_node: DaemonProcess, memory: Memory) -> None:
    """Nothing keeps it pinned: neither the worker that had mapped it nor anybody else."""
    before_workers = workers(fresh_node)
    free_before = free_nbytes() if DRIVER == "cuda" else 0
    engine = Engine(fresh_node, memory.name, GIB if DRIVER == "cuda" else 64 * MIB)
    assert workers(fresh_node) - before_workers
    if DRIVER == "cuda":
        assert free_nbytes() < free_before - GIB + 64 * MIB
    engine.kill()
    killed_at = time.monotonic()
    eventually(lambda: workers(fresh_node) == before_workers or workers(fresh_node), what="its worker has gone")
    if DRIVER == "cuda":
        # nvidia-smi counts in MiB, and a context's own needs vary by some of them.
        eventually(lambda: free_nbytes() > free_before - 32 * MIB or free_nbytes(), what="its memory is back")
    assert time.monotonic() - killed_at < BACK_S
    with (
        Client.connect(fresh_node.session_socket, "next") as client,
        client.register_device(memory.make(MIB)) as region,
    ):
        client.read(client.allocate(MIB, "host"), region)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_is_lost_fails_its_transfers_only(
    fresh_node: DaemonProcess, memory: Memory, how: signal.Signals
) -> None:
    with Client.connect(fresh_node.session_socket, "one") as one, Client.connect(fresh_node.session_socket) as other:
        idle = workers(fresh_node)
        array, host = memory.make(MIB), one.allocate(MIB, "host")
        memory.put(array, np.full(MIB, 7, np.uint8))
        region = one.register_device(array)
        one.read(host, region)
        [worker] = workers(fresh_node) - idle
        event = one.open_event()
        stream, finish = memory.fill_slowly(array, 8)
        event.record(stream)
        transfer = one.transfer("READ", host, region, wait_event=event)
        eventually(lambda: one.poll_many([transfer])[0].state is TransferState.RUNNING, what="the worker has it")
        os.kill(worker, how)
        with pytest.raises(DeviceLost):
            transfer.wait(30.0)
        pair = other.allocate([MIB, MIB], "host")
        other.write(*pair)
        finish()
        memory.put(array, np.full(MIB, 9, np.uint8))
        one.read(host, region)  # another worker, which maps again what lives
        assert (host.array() == 9).all()
        assert worker not in workers(fresh_node)


def test_rubbish_is_no_handle(gpu_node: DaemonProcess, memory: Memory) -> None:
    with Client.connect(gpu_node.session_socket, "one") as one:
        region = one.register_device(memory.make(MIB))
        uuid = one.devices()[0].device_uuid
        for handle in (bytes(64), b"\xff" * 64, os.urandom(64)):
            with pytest.raises(XferdError) as caught:
                one._call(calls.register_device(RegisterDeviceRequest(uuid, MIB, handle)))
            assert caught.value.message
        with pytest.raises(InvalidArgument):
            one._call(calls.register_device(RegisterDeviceRequest(uuid, MIB, b"short")))
        one.read(one.allocate(MIB, "host"), region)  # whoever was asked lives on, or another one does it


def test_a_handle_of_a_dead_process_is_refused(gpu_node: DaemonProcess, memory: Memory) -> None:
    engine = Engine(None, memory.name, MIB)
    engine.kill()
    with Client.connect(gpu_node.session_socket, "one") as one:
        region = one.register_device(memory.make(MIB))
        with pytest.raises(XferdError):
            one._call(calls.register_device(RegisterDeviceRequest(engine.uuid, engine.nbytes, engine.handle)))
        one.read(one.allocate(MIB, "host"), region)


def test_memory_by_handle_of_a_living_engine_is_reached(gpu_node: DaemonProcess, memory: Memory) -> None:
    engine = Engine(gpu_node, memory.name, MIB)
    try:
        with Client.connect(gpu_node.session_socket, "one") as one:
            [seen] = one.regions(label="engine")
            host = one.allocate(MIB, "host")
            host.array()[:] = 5
            one.write(host, seen)
            back = one.allocate(MIB, "host")
            one.read(back, seen)
            assert (back.array() == 5).all()
            tensor = memory.take(seen.dlpack())
            assert (memory.get(tensor) == 5).all()
            del tensor
    finally:
        engine.kill()


def test_more_than_there_is_degrades_and_no_more(gpu_cluster: Cluster, memory: Memory) -> None:
    """A GPU that is not there, and a pool that does not fit: the daemon says so, and the rest works."""
    pools = 'pools=[{name="host",nbytes="64MiB"},{name="gpu",kind="VRAM",device=0,nbytes="512GiB"}]'
    settings = (SETTINGS[0], "backends.cuda.devices=[0,7]", pools)
    daemon = gpu_cluster.make(f"node-{len(gpu_cluster.daemons)}", tcp=False, settings=settings)
    with Client.connect(daemon.session_socket, "one") as one:
        first, second = one.devices()
        assert (first.index, first.reason, second.index) == (0, "", 7)
        assert second.reason
        [pool] = [pool for pool in one.pools() if pool.name == "gpu"]
        assert pool.reason
        with pytest.raises(XferdError):
            one.allocate(MIB, "gpu")
        with one.register_device(memory.make(MIB)) as region:
            one.read(one.allocate(MIB, "host"), region)
    daemon.stop()


@pytest.mark.skipif(not (ROOT / "tools/gpu_worker_check.py").exists(), reason="there is no tools/gpu_worker_check.py")
def test_the_workers_kernel_is_clean() -> None:
    """compute-sanitizer over the worker's check: no byte outside of what a table names is read or written."""
    if DRIVER != "cuda":
        pytest.skip("simulated devices have no kernel")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--error-exitcode", "99", sys.executable, str(ROOT / "tools/gpu_worker_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
