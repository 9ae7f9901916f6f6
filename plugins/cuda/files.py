"""Files to GPU memory and back in a device worker: kvikio on a GPU, plain system calls on a simulated one.

Only where the daemon has a ``gds`` backend. A library call blocks, so it runs in threads of its own, and the worker's
loop looks at its end as at any other move.
"""

from __future__ import annotations

import abc
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from xferd.api.errors import MoveFailed, ShortTransfer, XferdError
from xferd.plugins import vectored
from xferd.plugins.cuda.driver import Plan, ThreadFlight
from xferd.plugins.cuda.layout import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

THREADS = 2
"""Chunks that are with the library at once; it has threads of its own for the parts of each."""

LIBRARY_THREADS = 8
"""kvikio's own."""


class FileLibrary(abc.ABC):
    """What moves between a file and GPU memory. Thread-safe."""

    manner: str

    @abc.abstractmethod
    def move(self, path: str, rows: NDArray[np.uint64], *, is_write: bool) -> int:
        """Move (file offset, address, nbytes) rows; returns the bytes moved, fewer where a file that is read ends.

        Raises:
            MoveFailed: the library or the file system says no.
        """


class SystemCalls(FileLibrary):
    """For simulated GPUs, whose memory is host memory."""

    manner = "a simulated device"

    def move(self, path: str, rows: NDArray[np.uint64], *, is_write: bool) -> int:
        """Read or write, one call for a span of the file or more."""
        call = vectored.write_file_spans if is_write else vectored.read_file_spans
        spans, memory = np.ascontiguousarray(rows[:, [0, 2]]), np.ascontiguousarray(rows[:, [1, 2]])
        try:
            with Path(path).open("r+b" if is_write else "rb", buffering=0) as file:
                return call(file.fileno(), spans, memory)
        except ShortTransfer:
            return 0
        except OSError as exc:
            raise MoveFailed(f"{path}: {exc.strerror}", remedy="see the file system of the file") from exc


class _Span:
    """GPU memory as kvikio takes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class Kvikio(FileLibrary):
    """GPUDirect Storage where the machine has it, else kvikio's way through host memory."""

    def __init__(self, kvikio: Any) -> None:  # no types: a library that only machines with a GPU can import
        self._kvikio = kvikio
        is_compatible = kvikio.defaults.is_compat_mode_preferred()
        self.manner = (
            "kvikio's compatibility mode, through host memory: no GPUDirect Storage here"
            if is_compatible
            else "GPUDirect Storage, past host memory"
        )
        kvikio.defaults.set("num_threads", LIBRARY_THREADS)

    def move(self, path: str, rows: NDArray[np.uint64], *, is_write: bool) -> int:
        """Give kvikio all rows, then wait for all: none may be under way when this returns."""
        try:
            with self._kvikio.CuFile(path, "r+" if is_write else "r") as file:
                call = file.pwrite if is_write else file.pread
                futures: list[Any] = []
                try:
                    for offset, at, nbytes in rows.tolist():
                        futures.append(call(_Span(at, nbytes), nbytes, offset))
                finally:
                    moved = _sum_of(futures)  # also of those that it took before it refused one
                return moved
        except (OSError, RuntimeError, ValueError) as exc:
            raise MoveFailed(f"kvikio: {exc}", remedy="see the file, or route by posix") from exc


def look(driver: str) -> tuple[FileLibrary | None, str]:
    """Return the library for a driver; or None, and why there is none. Needs a CUDA context."""
    if driver == "simulated":
        return SystemCalls(), ""
    try:
        import kvikio
        import kvikio.defaults
    except (ImportError, RuntimeError, OSError) as exc:
        return None, f"kvikio cannot be used: {exc}; pip install 'xferd[gds]'"
    return Kvikio(kvikio), ""


class FilePlan(Plan):
    """Rows of a file and of GPU memory. ``nbytes`` is what moved, once it has."""

    engine = Engine.FILE

    def __init__(self, path: str, rows: NDArray[np.uint64], *, is_write: bool) -> None:
        self.path = path
        self.rows = rows
        self.is_write = is_write
        self.nbytes = 0


class FileFlight(ThreadFlight):
    """A move by the library."""

    def __init__(self, plan: FilePlan) -> None:
        super().__init__()
        self.plan = plan


class FileMovers:
    """Threads that call the library; they end with the process."""

    def __init__(self, library: FileLibrary) -> None:
        self._library = library
        self._queue: SimpleQueue[FileFlight] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def begin(self, plan: FilePlan) -> FileFlight:
        """Start a move, and return at once."""
        if len(self._threads) < THREADS:
            thread = threading.Thread(target=self._run, name=f"files-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        flight = FileFlight(plan)
        self._queue.put(flight)
        return flight

    def _run(self) -> None:
        """Call the library for ever; what it raises that is no error of ours is a bug, and the worker's end."""
        while True:
            flight = self._queue.get()
            begun = time.perf_counter_ns()
            try:
                flight.plan.nbytes = self._library.move(
                    flight.plan.path, flight.plan.rows, is_write=flight.plan.is_write
                )
            except XferdError as error:
                flight.error = error
            flight.taken_ns = time.perf_counter_ns() - begun
            flight.end = True


def _sum_of(futures: list[Any]) -> int:
    """Wait for all, also where one fails, and return the sum."""
    total, first = 0, None
    for future in futures:
        try:
            total += future.get()
        except (OSError, RuntimeError) as exc:
            first = first or exc
    if first is not None:
        raise first
    return total
