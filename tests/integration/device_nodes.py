"""Daemons with simulated GPUs for tests, and the processes around them: workers, clients that are killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from xferd.api.types import Access, RegionId
from xferd.clients._simulated_device import SimulatedBuffer

if TYPE_CHECKING:
    import numpy as np
    from cluster import Cluster, DaemonProcess

    from xferd.api.descriptors import DescriptorList
    from xferd.clients import Client, Region

SIMULATED = ("backends.cuda.driver=simulated", "backends.cuda.simulated_nbytes=256MiB")
POOLS = 'pools=[{name="host", nbytes="64MiB"}, {name="vram", kind="VRAM", device=0, nbytes="64MiB"}]'


def make_gpu_node(
    cluster: Cluster,
    name: str,
    *settings: str,
    gpus: int = 1,
    peers: tuple[DaemonProcess, ...] = (),
    tcp: bool = False,
    faults: str = "",
) -> DaemonProcess:
    """Start a daemon with simulated GPUs; ``faults`` as ``plugins/cuda/faults.py`` has them."""
    prefix = ("env", f"XFERD_SIMULATED_FAULTS={faults}") if faults else ()
    return cluster.make(
        name,
        peers=peers,
        tcp=tcp,
        settings=(*SIMULATED, f"backends.cuda.simulated_devices={gpus}", POOLS, *settings),
        prefix=prefix,
    )


def worker_pids(daemon: DaemonProcess) -> set[int]:
    """Return the device workers of a daemon."""
    found = set()
    for child in psutil.Process(daemon.process.pid).children():
        try:
            if "xferd.plugins.cuda.worker" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


class Vram:
    """A client's own memory on a simulated GPU, registered, whose bytes a test can see without xferd."""

    def __init__(self, client: Client, nbytes: int, *, device: int = 0, is_vmm: bool = False) -> None:
        self.buffer = SimulatedBuffer(nbytes, device, is_vmm=is_vmm)
        self.region: Region = client.register_device(self.buffer, access=Access.READ_WRITE)

    @property
    def array(self) -> np.ndarray:
        return self.buffer.array


def device_of(daemon: DaemonProcess, index: int = 0) -> dict:
    """Return what the node says of a GPU."""
    return daemon.get("/v1/devices")[1]["devices"][index]


def pool_of(daemon: DaemonProcess, name: str) -> dict:
    """Return what the node says of a pool."""
    return next(pool for pool in daemon.get("/v1/pools")[1]["pools"] if pool["name"] == name)


def remote_rows(client: Client, region: Region, offsets: list[int], sizes: list[int]) -> DescriptorList:
    """Return rows of a region that another client has, here or on another node."""
    found = client.region(region.info)
    return found.rows(offsets, sizes)


class ClientProcess:
    """A client in a process of its own, to be killed: registers GPU memory and, if told so, moves it for ever."""

    SCRIPT = textwrap.dedent("""
        import sys
        from xferd.api.types import Access
        from xferd.clients import Client, _calls as calls
        from xferd.clients._simulated_device import SimulatedBuffer, simulated
        socket, agent, nbytes, event = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
        client = Client.connect(socket, agent=agent)
        buffer = SimulatedBuffer(nbytes)
        buffer.array[:] = 7
        region = client.register_device(buffer, access=Access.READ_WRITE)
        transfer = None
        if event == "stuck":
            driver = simulated()
            made = driver.make_event(buffer.allocation.device_uuid)
            driver._events[made].begin()  # recorded, and never over
            number = client._call(calls.open_device_event(0, driver.event_handle(made))).event
            target = client.allocate(nbytes)
            transfer = client.transfer("WRITE", region, target, wait_event=number)
        print(region.id, flush=True)
        sys.stdin.read()
    """)

    def __init__(self, daemon: DaemonProcess, agent: str, nbytes: int, *, stuck: bool = False) -> None:
        words = [str(daemon.session_socket), agent, str(nbytes), "stuck" if stuck else ""]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip(), "the client did not come up"
        self.region = RegionId(int(line))

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it, and close its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def mapped_names(pid: int) -> set[str]:
    """Return the files that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
