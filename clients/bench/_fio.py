"""fio: what the disk gives to somebody with nothing else to do, with the same blocks and as many requests at once."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from xferd.api.errors import Unavailable
from xferd.clients.bench._cases import MIB, Case, Place
from xferd.clients.bench._probes import Probe, Sample, System

if TYPE_CHECKING:
    from collections.abc import Callable

MOVERS, QUEUE_DEPTH, CHUNK_NBYTES, PIECE_NBYTES = 2, 64, 8 * MIB, MIB
"""What a daemon has by default: so many chunks at once, and so many requests of each, of at most such a size."""

MISSING = "fio is not installed: install your system's package fio"

LEAST_NBYTES = 64 * MIB
"""A run goes over the blocks again until it has moved so much: fio tells its time in milliseconds."""


def depth_of(case: Case) -> int:
    """Return how many requests xferd has under way at most in a case; fio gets the same."""
    request = min(case.block_nbytes, PIECE_NBYTES) if case.order == "random" else PIECE_NBYTES
    within = min(QUEUE_DEPTH, CHUNK_NBYTES // request)
    return max(1, min(MOVERS * within, case.nbytes // request))


class Fio(System):
    """One job of fio on the very file that xferd moves: never more than one at a time, and not while xferd does.

    A file of its own would lie elsewhere on the disk, which alone was seen to make 0.68 and 1.76 of the same speed.

    Args:
        file_of: the path of the file that a case moves, asked for when the case is run.
    """

    name: ClassVar[str] = "fio"
    orders: ClassVar[tuple[str, ...]] = ("random", "sequential")

    def __init__(self, file_of: Callable[[Case], str]) -> None:
        self._file_of = file_of
        self._command = shutil.which("fio")
        self._engine = ""

    def refusal(self, case: Case) -> str:
        """Take what goes between a file and memory of the host."""
        if case.place is not Place.LOCAL or case.ends not in (("DRAM", "FILE"), ("DRAM", "FILE_DIRECT")):
            return "it moves between a file and memory only"
        return "" if self._command else MISSING

    def probe(self, case: Case) -> Probe:
        """Return the probe."""
        assert self._command is not None
        self._engine = self._engine or _engine(self._command)
        return FioProbe(case, [self._command, f"--ioengine={self._engine}"], self._file_of)

    def settings(self) -> dict[str, object]:
        """Return the version, and what every job has."""
        if self._command is None:
            return {"version": None}
        said = subprocess.run([self._command, "--version"], capture_output=True, text=True, check=False).stdout
        return {"version": said.strip(), "ioengine": self._engine, "jobs": 1, "file": "xferd's"}


class FioProbe(Probe):
    """Runs a job; its time is fio's own, without its start."""

    system: ClassVar[str] = Fio.name

    def __init__(self, case: Case, command: list[str], file_of: Callable[[Case], str]) -> None:
        super().__init__(case)
        self._file_of = file_of
        verb = "read" if case.op == "READ" else "write"
        self._verb = verb
        order = "" if case.order == "sequential" else "rand"
        is_direct = "FILE_DIRECT" in case.ends
        self._arguments = [*command, "--name=xferbench", "--thread", "--output-format=json"]
        self._arguments += [f"--rw={order}{verb}", f"--bs={case.block_nbytes}", f"--iodepth={depth_of(case)}"]
        self._arguments += [f"--direct={int(is_direct)}"]
        self._arguments += [f"--io_size={max(case.nbytes, LEAST_NBYTES)}", "--norandommap=0", "--invalidate=0"]

    @property
    def max_requests(self) -> int:
        """Return 2: each starts a process."""
        return 2

    def request(self) -> None:
        """Run a job."""
        self.run()

    def run(self) -> list[Sample]:
        """Run a job."""
        path = self._file_of(self.case)
        file = [f"--filename={path}", f"--size={Path(path).stat().st_size}"]
        done = subprocess.run([*self._arguments, *file], capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise Unavailable(f"fio failed: {done.stderr or done.stdout}", remedy="run it by hand, or leave it out")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][self._verb]
        share = self.case.nbytes / int(job["io_bytes"])
        return [Sample(int(job["runtime"]) / 1e3 * share, self.case.nbytes)]


def _engine(command: str) -> str:
    """Return the engine that works here: io_uring, as xferd has it, or libaio."""
    arguments = [command, "--name=probe", "--ioengine=io_uring", "--filename=/dev/zero", "--rw=read", "--size=4k"]
    done = subprocess.run(arguments, capture_output=True, check=False, timeout=60)
    return "libaio" if done.returncode else "io_uring"
