"""The processes of a peer under measurement, as the benchmark sees them: started, asked, paused, ended.

Their libraries are never imported here: a crash of theirs ends a process of theirs, and their environment variables
hold for one pair only. What runs in them is in ``_peer_process.py``, what is asked of them is for ``_peers.py`` to say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from xferd.api.errors import DeadlineExceeded, InternalError
from xferd.clients.bench import _peer_process as wire
from xferd.clients.bench._cpu import cpu_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from xferd.clients.bench._patterns import Rows

END_TIMEOUT_S = 5.0
LOG_TAIL_NBYTES = 2000


class PeerProcess:
    """One process of a peer, and the way to it. A context manager: on leaving, the process has ended.

    Args:
        what: it is, for messages, like "nixl target".
        memory_fd: the memfd that it maps; the caller's.
        options: for the driver, with ``driver``, ``role`` and ``nbytes``.
        environ: variables set for it beside our own.
        timeout_s: for an answer.

    Raises:
        InternalError: it ended before it was asked to; the message has the end of what it printed.
        DeadlineExceeded: it did not answer in time, and was made to end.
    """

    def __init__(
        self, what: str, memory_fd: int, options: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float
    ) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._connection, theirs = Pipe()
        script = Path(wire.__file__)
        # -P: the folder of the script is no place to import from; its neighbours are not the libraries' modules.
        command = [sys.executable, "-P", str(script), str(theirs.fileno()), str(memory_fd), json.dumps(dict(options))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                pass_fds=(theirs.fileno(), memory_fd),
                process_group=0,  # Ctrl-C is for us, who then end it
            )
        except BaseException:
            self._connection.close()
            self._log.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """The process, whose CPU time is counted."""
        return self._process.pid

    def ask(self, message: Mapping[str, Any], *arrays: NDArray[Any]) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        """Send a message and wait for the answer."""
        try:
            wire.send(self._connection, dict(message), *arrays)
        except OSError as exc:  # it has gone, and its end of the connection with it
            raise self._ended() from exc
        return self.answer()

    def answer(self) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        """Wait for a message."""
        if not wait([self._connection], self._timeout_s):
            self._process.kill()
            raise DeadlineExceeded(
                f"{self._what} did not answer: {self._tail()}", limit=f"{self._timeout_s:g} s", remedy="leave it out"
            )
        try:
            return wire.receive(self._connection)
        except (EOFError, OSError) as exc:
            raise self._ended() from exc

    def pause(self) -> None:
        """Stop it until ``resume``. Were we to die meanwhile, the kernel would kill it (``_peer_process.main``)."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process: it goes when its connection closes, or is killed. Twice is fine."""
        self._connection.close()
        self.resume()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ended(self) -> InternalError:
        status = self._process.wait(END_TIMEOUT_S)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return InternalError(f"{self._what} ended with {how}: {self._tail()}", remedy="run without it, or mend it")

    def _tail(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - LOG_TAIL_NBYTES))
        return self._log.read().decode(errors="replace").strip() or "it printed nothing"


class Pair:
    """A target and an initiator that is connected to it. A context manager that ends both."""

    def __init__(
        self,
        name: str,
        fds: tuple[int, int],
        options: tuple[Mapping[str, Any], Mapping[str, Any]],
        environ: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        """Start both; ``fds`` and ``options`` are those of the initiator, then those of the target."""
        with ExitStack() as stack:
            self.initiator, self.target = (
                stack.enter_context(PeerProcess(f"{name} {role}", fd, told, environ, timeout_s))
                for role, fd, told in zip(("initiator", "target"), fds, options, strict=True)
            )
            self.initiator.answer()
            invitation, _ = self.target.answer()
            self.initiator.ask({"verb": "connect", "invitation": invitation})
            for process in (self.initiator, self.target):
                process.pause()
            self._stack = stack.pop_all()

    @contextmanager
    def awake(self) -> Iterator[Self]:
        """Let both run while inside. Otherwise they are stopped: idle NIXL agents keep a core busy each.

        What is measured in between would be slowed down by them, other peers and xferd alike.
        """
        for process in (self.target, self.initiator):
            process.resume()
        yield self
        for process in (self.initiator, self.target):
            process.pause()

    def begin(self, work: Mapping[str, Any], near: Rows, far: Rows) -> None:
        """Tell the initiator what its requests are from now on: ``op``, ``block_nbytes``, ``prepared``; the blocks."""
        with self.awake():
            self.initiator.ask({"verb": "begin", **work}, near, far)

    def copy(self, verb: str) -> None:
        """Have both bring the copies of memory of a GPU there ("push") or back ("pull"); that of the host has none."""
        with self.awake():
            for process in (self.initiator, self.target):
                process.ask({"verb": verb})

    def run(self, least: int, most: int, seconds: float) -> wire.Timings:
        """Have requests made and timed, one after the other; returns their parts, a row each. Both must be awake."""
        verb = {"verb": "run", "least": least, "most": most, "seconds": seconds}
        _, [flat] = self.initiator.ask(verb)
        return flat.reshape(-1, 3)

    def cpu_s(self) -> tuple[float, float]:
        """Return CPU seconds of (target, initiator)."""
        return cpu_of([self.target.pid]), cpu_of([self.initiator.pid])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
