"""Daemons of one's own on this machine, for demos and benchmarks: started as processes, joined as peers, stopped.

A daemon is started by its command, as a service manager would do it; nothing of it is imported here. Production
daemons are started by systemd (``systemd/``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Self

from xferd.api.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_NBYTES = 4000

_FOREIGN = ("XFERD_", "LISTEN_", "WATCHDOG_", "NOTIFY_", "RUNTIME_DIRECTORY")
"""Environment of whoever starts us that must not reach our daemons."""


class Node:
    """One running daemon; ``process`` belongs to the ``Nodes`` that started it."""

    def __init__(self, name: str, run_dir: Path, files: Path, peer_port: int, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.run_dir = run_dir
        self.files = files
        self.peer_port = peer_port
        self.process = process

    def __repr__(self) -> str:
        return f"<Node {self.name} pid {self.pid} at {self.run_dir}>"

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.process.pid

    @property
    def session_socket(self) -> Path:
        """Where clients attach."""
        return self.run_dir / "session.sock"

    @property
    def admin_socket(self) -> Path:
        """Where REST is served."""
        return self.run_dir / "admin.sock"

    @property
    def log_path(self) -> Path:
        """What the daemon printed."""
        return _log_path(self.run_dir)


class Nodes:
    """Daemons in a temporary directory, with a cluster secret of their own. A context manager that ends them all.

    >>> with Nodes() as nodes:  # doctest: +SKIP
    ...     a = nodes.start("a")
    ...     b = nodes.start("b", peers=[a])
    """

    def __init__(self) -> None:
        # Short, because a Unix socket's path has at most 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="xferd-"))
        self._secret = self.root / "secret"
        with os.fdopen(os.open(self._secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as secret:
            secret.write(secrets.token_hex(32))
        self._nodes: list[Node] = []

    def start(self, name: str, *, peers: Sequence[Node] = (), settings: Sequence[str] = ()) -> Node:
        """Start a daemon and return when it is ready.

        Args:
            name: of the node.
            peers: nodes that it knows from its configuration; they learn of it when it connects.
            settings: ``section.key=value``, as for ``xferd serve --set``.

        Raises:
            Unavailable: it did not come up; the message has the end of its log.
            InvalidArgument: the name is taken.
        """
        if any(node.name == name for node in self._nodes):
            raise InvalidArgument(f"node {name!r} is running", remedy="give each node a name of its own")
        run_dir, files, port = self.root / name, self.root / f"{name}-files", _free_port()
        run_dir.mkdir()
        files.mkdir()
        wanted = [
            f"node.name={name}",
            f"node.run_dir={run_dir}",
            f'files.roots=["{files}"]',
            f"backends.tcp.listen=127.0.0.1:{port}",
            f"backends.tcp.secret_file={self._secret}",
        ]
        if peers:
            known = ", ".join(f'{{name="{peer.name}", address="tcp://127.0.0.1:{peer.peer_port}"}}' for peer in peers)
            wanted.append(f"metadata.embedded.peers=[{known}]")
        arguments = [part for setting in (*wanted, *settings) for part in ("--set", setting)]
        node = Node(name, run_dir, files, port, self._spawn(run_dir, arguments))
        self._nodes.append(node)
        return node

    def close(self) -> None:
        """Stop all daemons, the youngest first, and remove their directory. Twice is fine."""
        for node in reversed(self._nodes):
            _stop(node.process)
        self._nodes.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, run_dir: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start the process and wait until it says that it is ready, over a notify socket, as to systemd."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, _log_path(run_dir).open("ab") as log:
            address = str(self.root / f"{run_dir.name}.notify")
            notify.bind(address)
            environ = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
            process = subprocess.Popen(
                [sys.executable, "-m", "xferd.daemon.cli", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ | {"NOTIFY_SOCKET": address},
                process_group=0,  # Ctrl-C is for whoever started us, who then stops the daemon in order
            )
            try:
                ready = _is_ready(notify, process)
            except BaseException:
                _stop(process)
                raise
        if not ready:
            _stop(process)
            tail = _log_path(run_dir).read_bytes()[-LOG_TAIL_NBYTES:].decode(errors="replace")
            raise Unavailable(
                f"daemon {run_dir.name} did not start:\n{tail}",
                limit=f"{START_TIMEOUT_S:g} s",
                remedy="is the daemon installed? pip install 'xferd[daemon]'",
            )
        return process


def _is_ready(notify: socket.socket, process: subprocess.Popen[bytes]) -> bool:
    """Return whether the daemon says READY before it ends, or the time is over."""
    deadline = time.monotonic() + START_TIMEOUT_S
    pidfd = os.pidfd_open(process.pid)
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            heard = wait([notify.fileno(), pidfd], left_s)
            if notify.fileno() in heard and b"READY=1" in notify.recv(65536).split(b"\n"):
                return True
            if pidfd in heard:
                return False
    finally:
        os.close(pidfd)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _log_path(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
