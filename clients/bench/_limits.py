"""What the machine can do without a daemon, measured in the same run: memcpy, and iperf3 where it is installed."""

from __future__ import annotations

import json
import mmap
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from xferd.api.errors import Unavailable
from xferd.clients.bench._cases import STREAM, Case, Place
from xferd.clients.bench._cpu import cpu_of
from xferd.clients.bench._patterns import Blocks
from xferd.clients.bench._probes import Probe, Sample, System

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.clients.bench._patterns import Rows
    from xferd.clients.memory import ByteArray

IPERF3_SECONDS = 1
IPERF3_INTERVAL_S = 0.2


class Memcpy(System):
    """One thread of this process copying between arrays of its own: what no daemon can beat by copying once.

    Scattered blocks are gathered into a contiguous target by ``numpy.take``, one memcpy a block in a loop of C.
    """

    name: ClassVar[str] = "memcpy"

    def __init__(self, region_nbytes: int) -> None:
        self._region_nbytes = region_nbytes
        self._source: ByteArray = np.empty(0, np.uint8)
        self._target: ByteArray = np.empty(0, np.uint8)

    def refusal(self, case: Case) -> str:
        """Take the memcpy cases only."""
        return "" if case.place is Place.LIMIT and case.op == "memcpy" else "not a copy within one process"

    def probe(self, case: Case) -> Probe:
        """Return a probe on memory that all probes share."""
        if not len(self._source):
            self._source, self._target = _shared(self._region_nbytes), _shared(self._region_nbytes)
        return MemcpyProbe(case, self._source, self._target)


def _shared(nbytes: int) -> ByteArray:
    """Return shared memory, the kind that pools are of: page tables and huge pages are as theirs."""
    array = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    array[:] = 1  # present, and not all one page of zeros
    return array


class MemcpyProbe(Probe):
    """Gathers random blocks, or copies one."""

    system: ClassVar[str] = Memcpy.name

    def __init__(self, case: Case, source: ByteArray, target: ByteArray) -> None:
        super().__init__(case)
        self._source = Blocks(source, case.block_nbytes)
        self._target = Blocks(target[: case.nbytes], case.block_nbytes)
        self._rows: Rows = np.zeros(0, np.int64)
        self._visit = 0

    def begin(self, visit: int) -> None:
        """Choose blocks and stamp them."""
        rng = np.random.default_rng(visit)
        self._rows = rng.permutation(self._source.count)[: self.case.batch]
        self._visit = visit
        self._source.stamp(self._rows, visit)
        self._target.clear()

    def request(self) -> None:
        """Copy."""
        if self.case.batch == 1:
            np.copyto(self._target.words[0], self._source.words[self._rows[0]])
        else:
            # mode "clip" because "raise" would copy by way of a buffer of numpy's own.
            np.take(self._source.words, self._rows, axis=0, out=self._target.words, mode="clip")

    def verify(self) -> str:
        """Compare with the pattern."""
        return str(self._target.fault(np.arange(self.case.batch), self._rows, self._visit) or "")


class Iperf3(System):
    """One TCP stream over loopback, by ``iperf3`` with its defaults. Owns a server process while entered."""

    name: ClassVar[str] = "iperf3"

    def __init__(self) -> None:
        self._command = shutil.which("iperf3")
        self._server: subprocess.Popen[str] | None = None
        self._port = 0

    def refusal(self, case: Case) -> str:
        """Take the stream case, if the command is there."""
        if case != STREAM:
            return "not a stream"
        return "" if self._command else "iperf3 is not installed"

    def probe(self, case: Case) -> Probe:
        """Return the probe, starting the server."""
        assert self._command is not None
        if self._server is None:
            self._server, self._port = _start_server(self._command)
        return Iperf3Probe(case, self._command, self._port, self._server.pid)

    def settings(self) -> dict[str, object]:
        """Return the version."""
        if self._command is None:
            return {"version": None}
        said = subprocess.run([self._command, "--version"], capture_output=True, text=True, check=False).stdout
        return {"version": said.partition("\n")[0], "streams": 1, "seconds": IPERF3_SECONDS}

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=10)
            self._server = None


class Iperf3Probe(Probe):
    """Runs the client once a visit; a sample is one of its intervals."""

    system: ClassVar[str] = Iperf3.name

    def __init__(self, case: Case, command: str, port: int, server_pid: int) -> None:
        super().__init__(case)
        self._arguments = [command, "-c", "127.0.0.1", "-p", str(port), "-J"]
        self._arguments += ["-t", str(IPERF3_SECONDS), "-i", str(IPERF3_INTERVAL_S)]
        self._server_pid = server_pid
        self._client_cpu_s = 0.0

    @property
    def max_requests(self) -> int:
        """Return 1: a request is a second of streaming."""
        return 1

    def request(self) -> None:
        """Stream for the configured time."""
        self.run()

    def run(self) -> list[Sample]:
        """Stream; the first interval is left out, because the congestion window still grows."""
        done = subprocess.run(self._arguments, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise Unavailable(f"iperf3 failed: {done.stdout or done.stderr}", remedy="run it by hand, or remove it")
        report = json.loads(done.stdout)
        self._client_cpu_s += IPERF3_SECONDS * report["end"]["cpu_utilization_percent"]["host_total"] / 100
        sums = [interval["sum"] for interval in report["intervals"]]
        return [Sample(float(part["seconds"]), int(part["bytes"])) for part in sums[1:] or sums]

    def cpu_s(self) -> tuple[float, float]:
        """Return the server's CPU seconds, and the client's by its own report."""
        return cpu_of([self._server_pid]), self._client_cpu_s


def _start_server(command: str) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = subprocess.Popen(
        [command, "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        if "listening" in line:
            return server, port
    server.wait()
    raise Unavailable(f"iperf3 does not serve: {''.join(said)}", remedy="run it by hand, or remove it")
