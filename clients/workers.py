"""Processes that hold one object each, called by name over a pipe: the parts of a demonstration, or of a benchmark.

Each is a fresh interpreter: nothing of gRPC or torch lives through a fork. A worker ends when its pipe does, so it
does not outlive whoever started it. What a worker raises goes to the standard error stream, and ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection
    from types import FrameType

CALL_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 5.0

_context = multiprocessing.get_context("spawn")


class WorkerFailed(Exception):
    """A worker ended, or did not answer; its standard error stream says why."""


class Worker:
    """A process that holds one object, and calls its methods.

    Args:
        name: for messages.
        make: a class or function without arguments, importable by name, that returns the object; a context manager.
    """

    def __init__(self, name: str, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._name = name
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, make), name=f"worker-{name}", daemon=True)
        # Inherited, so that Ctrl-C stays with us, who then stop the worker; it ignores the signal once it is up, too,
        # because multiprocessing lifts the mask when it starts its own helper process, with the first worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def call(self, method: str, *args: object) -> Any:  # as the method: seam between processes
        """Call a method and wait for what it returns."""
        self.begin(method, *args)
        return self.result()

    def begin(self, method: str, *args: object) -> None:
        """Call a method; ``result`` waits. Calls are answered in order."""
        try:
            self._pipe.send((method, args))
        except OSError as exc:
            raise self._failure() from exc

    def result(self) -> Any:
        """Return what the oldest call that was not waited for returned.

        Raises:
            WorkerFailed: the process ended, or 10 minutes passed.
        """
        if not self._pipe.poll(CALL_TIMEOUT_S):
            raise WorkerFailed(f"the {self._name} process has not answered for {CALL_TIMEOUT_S:g} s")
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError) as exc:
            raise self._failure() from exc

    def stop(self) -> None:
        """Let the worker end, and make it end if it does not."""
        self._pipe.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.terminate()
            self._process.join(STOP_TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()

    def abort(self) -> None:
        """End the worker at once, whatever it is at."""
        self._process.terminate()
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.stop()
        else:
            self.abort()

    def _failure(self) -> WorkerFailed:
        self._process.join(STOP_TIMEOUT_S)
        return WorkerFailed(f"the {self._name} process ended with exit status {self._process.exitcode}")


def _serve(pipe: Connection, make: Callable[[], AbstractContextManager[Any]]) -> None:
    """Answer calls until the pipe ends; the main function of a worker."""
    os.dup2(2, 1)  # the standard output stream belongs to the report
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    with make() as target:
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(target, method)(*args))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """End in order on SIGTERM: what libraries keep in shared memory is given back."""
    sys.exit(128 + signal.SIGTERM)
