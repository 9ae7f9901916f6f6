"""Files by the ``posix`` backend beside fio and a loop of preadv: ratios of one run on one machine.

    python tools/bench_files.py [--directory DIR] [--rounds 5] [--depth 16] [--nixl PYTHON] [--json FILE]

Each case alternates between the ways, and compares medians. The backend gets chunks as the daemon cuts them
(``--chunk``), as many at once as it has slots; its queue depth over all movers is fio's. fio is given one job with
``--ioengine=io_uring`` (``libaio`` where it has none). A way that cannot run is left out, with the reason. The test
file takes 1 GiB in ``--directory``, which should be on the disk in question, and is deleted.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import itertools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.descriptors import cut_points
from xferd.api.units import parse_nbytes
from xferd.plugins.base import Chunk, Extent, FileSpace, MappedSpace
from xferd.plugins.posix import PosixBackend, PosixOptions
from xferd.plugins.vectored import preadv, pwritev

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import IovTable

_FILE_NBYTES = 1 << 30
_MIB = 1 << 20

# Runs in the interpreter that has NIXL: reads or writes blocks at the same places, and prints seconds, one a line.
_NIXL = """
import ctypes, json, os, sys, time
job = json.loads(sys.argv[1])
try:
    from nixl._api import nixl_agent, nixl_agent_config
except ImportError:
    from nixl_cu12._api import nixl_agent, nixl_agent_config
agent = nixl_agent("bench", nixl_agent_config(backends=[]))
agent.create_backend("POSIX", {"use_uring": "true"})
fd = os.open(job["path"], os.O_RDWR)
import mmap
memory = mmap.mmap(-1, job["memory"])
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(base, 1, job["memory"])
size = job["block"]
mem = agent.register_memory([(base, job["memory"], 0, "m")], "DRAM")
file = agent.register_memory([(0, job["nbytes"], fd, "f")], "FILE")
local = agent.get_xfer_descs([(base + place, size, 0) for place in job["places"]], "DRAM")
remote = agent.get_xfer_descs([(offset, size, fd) for offset in job["offsets"]], "FILE")
handle = agent.initialize_xfer(job["op"], local, remote, "bench")
for line in sys.stdin:
    began = time.perf_counter()
    state = agent.transfer(handle)
    while state not in ("DONE", "ERR"):
        state = agent.check_xfer_state(handle)
    took = time.perf_counter() - began
    print(took if state == "DONE" else state, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What is moved: ``count`` blocks at random places, or in order where there is one of them a chunk."""

    name: str
    block_nbytes: int
    count: int
    direct: bool
    write: bool

    @property
    def nbytes(self) -> int:
        """Bytes of one round."""
        return self.block_nbytes * self.count

    @property
    def is_sequential(self) -> bool:
        """Whether blocks follow each other in file and memory."""
        return self.nbytes >= _FILE_NBYTES


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one way in one case. ``ratio``: of the posix backend's speed to this way's."""

    case: str
    way: str
    nbytes_per_s: float
    ratio: float
    note: str = ""


def _cases() -> list[Case]:
    found = []
    for verb, write in (("read", False), ("write", True)):
        found += [
            Case(f"sequential 1 GiB O_DIRECT {verb}", _MIB, 1024, direct=True, write=write),
            Case(f"64 KiB x 4096 page cache {verb}", 64 << 10, 4096, direct=False, write=write),
            Case(f"4 KiB x 4096 O_DIRECT {verb}", 4096, 4096, direct=True, write=write),
        ]
    return found


class Bench:
    """One file, one memory, and all ways of moving between them."""

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self._args = args
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self._memory = mmap.mmap(-1, _FILE_NBYTES)
        view = np.frombuffer(self._memory, np.uint8)
        view[:] = np.arange(len(view), dtype=np.uint64).view(np.uint8)[: len(view)]
        self._base = view.ctypes.data
        for at in range(0, _FILE_NBYTES, 8 * _MIB):
            os.pwrite(self._fd, view[at : at + 8 * _MIB].data, at)
        os.fsync(self._fd)

    def run(self, case: Case) -> list[Row]:
        """Measure all ways of a case in turn."""
        ways, notes, closers = self._ways(case)
        self._prepare(case)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        try:
            for number in range(self._args.rounds + 1):
                order = list(ways)
                first = number % len(order)  # who follows whom matters: each comes first in turn
                for name in order[first:] + order[:first]:
                    taken[name].append(ways[name]())
        finally:
            for close in closers:
                close()
        speeds = {name: case.nbytes / statistics.median(seconds[1:]) for name, seconds in taken.items()}
        ours = speeds["posix"]
        rows = [Row(case.name, name, speed, ours / speed) for name, speed in speeds.items()]
        return rows + [Row(case.name, name, 0.0, 0.0, note) for name, note in notes.items()]

    def _ways(self, case: Case) -> tuple[dict[str, Callable[[], float]], dict[str, str], list[Callable[[], object]]]:
        offsets, places = self._spans(case)
        notes: dict[str, str] = {}
        runner = asyncio.Runner()
        backends = [self._backend(runner, engine, case, offsets, places) for engine in self._args.engines]
        ways = {name: way for name, way, _ in backends}
        closers: list[Callable[[], object]] = [close for _, _, close in backends]
        closers.append(runner.close)
        if case.direct:
            if shutil.which("fio"):
                ways["fio"] = lambda: self._fio(case)
            else:
                notes["fio"] = "fio is not installed"
        else:
            for threads in self._args.threads:
                ways[f"preadv loop, {threads} threads"] = lambda n=threads: self._loop(case, offsets, places, n)
            if self._args.nixl:
                try:
                    ways["NIXL POSIX"], close = self._nixl(case, offsets, places)
                    closers.append(close)
                except RuntimeError as error:
                    notes["NIXL POSIX"] = str(error)
            else:
                notes["NIXL POSIX"] = "no --nixl"
        return ways, notes, closers

    def _spans(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        if case.is_sequential:
            order = np.arange(case.count)
            return order * case.block_nbytes, order * case.block_nbytes
        rng = np.random.default_rng(1)
        blocks = _FILE_NBYTES // case.block_nbytes
        # Memory at random places too, within twice what is moved.
        places = rng.permutation(min(blocks, 2 * case.count))[: case.count]
        return rng.permutation(blocks)[: case.count] * case.block_nbytes, places * case.block_nbytes

    def _prepare(self, case: Case) -> None:
        if not case.direct:
            for at in range(0, _FILE_NBYTES, 8 * _MIB):
                os.pread(self._fd, 8 * _MIB, at)
        os.sync()

    def _backend(
        self, runner: asyncio.Runner, engine: str, case: Case, offsets: np.ndarray, places: np.ndarray
    ) -> tuple[str, Callable[[], float], Callable[[], object]]:
        args = self._args
        movers = max(args.movers, args.depth) if engine == "threads" and case.direct else args.movers
        wanted = {"engine": engine, "movers": movers, "direct": case.direct}
        if case.direct:
            wanted["queue_depth"] = max(1, args.depth // movers)  # all movers together have fio's depth
        backend = PosixBackend(PosixOptions.model_validate(wanted))
        runner.run(backend.start())
        file = _merged(offsets, case.block_nbytes)
        memory = _merged(places + self._base, case.block_nbytes)
        cuts = cut_points(file[:, 1], memory[:, 1], chunk_nbytes=args.chunk, max_pieces=args.max_pieces)
        ends = (Extent(FileSpace(self._fd, str(self._path)), file), Extent(MappedSpace(), memory))
        source, target = (end.indexed() for end in (reversed(ends) if case.write else ends))

        async def move() -> None:
            slots = asyncio.Semaphore(backend.slots(source.space, target.space))

            async def one(start: int, stop: int) -> None:
                async with slots:
                    chunk = Chunk(source.cut(start, stop), target.cut(start, stop), stop - start, "t", "c")
                    await backend.move(chunk)

            async with asyncio.TaskGroup() as group:
                for span in itertools.pairwise(cuts):
                    group.create_task(one(*span), name=f"chunk {span[0]}")

        def way() -> float:
            began = time.perf_counter()
            runner.run(move())
            return time.perf_counter() - began

        name = "posix" if engine == args.engines[0] else f"posix, engine {engine}"
        return name, way, lambda: runner.run(backend.aclose())

    def _loop(self, case: Case, offsets: np.ndarray, places: np.ndarray, threads: int) -> float:
        call = pwritev if case.write else preadv
        table = _rows(places + self._base, case.block_nbytes)
        base = table.ctypes.data

        def work(first: int, last: int) -> None:
            for number, offset in enumerate(offsets[first:last].tolist(), first):
                if call(self._fd, base + 16 * number, 1, offset) != case.block_nbytes:
                    raise OSError(ctypes.get_errno(), "short")

        marks = [case.count * number // threads for number in range(threads + 1)]
        workers = [threading.Thread(target=work, args=span) for span in itertools.pairwise(marks)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - began

    def _fio(self, case: Case) -> float:
        order = "" if case.is_sequential else "rand"
        command = ["fio", "--name=bench", f"--filename={self._path}", f"--size={_FILE_NBYTES}", "--direct=1"]
        command += [f"--io_size={case.nbytes}", f"--bs={case.block_nbytes}", f"--iodepth={self._args.depth}"]
        command += [f"--rw={order}{'write' if case.write else 'read'}", "--thread", "--output-format=json"]
        done = None
        for engine in ("io_uring", "libaio"):
            done = subprocess.run([*command, f"--ioengine={engine}"], capture_output=True, text=True, check=False)
            if not done.returncode:
                break
        assert done is not None
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write" if case.write else "read"]
        return float(case.nbytes / job["io_bytes"] * job["runtime"] / 1e3)

    def _nixl(
        self, case: Case, offsets: np.ndarray, places: np.ndarray
    ) -> tuple[Callable[[], float], Callable[[], object]]:
        job = {
            "path": str(self._path),
            "nbytes": _FILE_NBYTES,
            "memory": int(places.max()) + case.block_nbytes,
            "block": case.block_nbytes,
            "places": places.tolist(),
            "offsets": offsets.tolist(),
            "op": "WRITE" if case.write else "READ",
        }
        script = self._path.with_name("job.py")
        script.write_text(_NIXL.replace("sys.argv[1]", "open(sys.argv[1]).read()"))
        described = self._path.with_name(f"job-{case.block_nbytes}-{case.write}.json")
        described.write_text(json.dumps(job))
        child = subprocess.Popen(
            [self._args.nixl, str(script), str(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None

        def way() -> float:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            for line in child.stdout:
                try:
                    return float(line)
                except ValueError:
                    continue  # what the library prints
            raise RuntimeError("NIXL ended")

        def close() -> None:
            child.kill()
            child.communicate()

        try:
            way()
        except (RuntimeError, OSError) as error:
            _, said = child.communicate()
            raise RuntimeError(f"NIXL did not run: {said.strip().splitlines()[-1:] or error}") from error
        return way, close

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _rows(positions: np.ndarray, nbytes: int) -> IovTable:
    table = np.empty((len(positions), 2), np.uint64)
    table[:, 0], table[:, 1] = positions, nbytes
    return table


def _merged(positions: np.ndarray, nbytes: int) -> IovTable:
    """Join neighbours, as the planner does."""
    heads = np.flatnonzero(np.append(True, positions[1:] != positions[:-1] + nbytes))
    table = np.empty((len(heads), 2), np.uint64)
    table[:, 0] = positions[heads]
    table[:, 1] = np.diff(np.append(heads, len(positions))) * nbytes
    return table


def _show(rows: list[Row]) -> None:
    for row in rows:
        figures = row.note or f"{row.nbytes_per_s / 1e9:8.3f} GB/s   posix/this {row.ratio:5.2f}"
        print(f"{row.case:34} {row.way:26} {figures}", flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--movers", type=int, default=2)
    parser.add_argument("--chunk", type=parse_nbytes, default=8 * _MIB)
    parser.add_argument("--max-pieces", type=int, default=8192)
    parser.add_argument("--threads", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--engines", nargs="*", default=["auto", "threads"], choices=["auto", "io_uring", "threads"])
    parser.add_argument("--nixl", default="", help="an interpreter that has NIXL")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--json", default="", help="write the rows there")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="xferd-bench-", dir=args.directory) as directory:
        bench = Bench(args, Path(directory, "data"))
        try:
            for case in _cases():
                if args.only in case.name:
                    found = bench.run(case)
                    _show(found)
                    rows += found
        finally:
            bench.close()
    if args.json:
        document = {"platform": os.uname().release, "cpus": os.cpu_count(), "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(document, indent=1))
    sys.exit(0)


if __name__ == "__main__":
    main()
