"""Daemons of one's own on this machine, for demos and benchmarks: started as processes, joined as peers, stopped.

A daemon is started by its command, as a service manager would do it; nothing of it is imported here. Production
daemons are started by systemd (``systemd/``).
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from xferd.api.errors import InvalidArgument
from xferd.clients.processes import free_ports, start_ready, stop

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from types import TracebackType


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
        run_dir, files, (port,) = self.root / name, self.root / f"{name}-files", free_ports(1)
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
            stop(node.process)
        self._nodes.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, run_dir: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start the process and return when it is ready."""
        return start_ready(
            f"daemon {run_dir.name}",
            [sys.executable, "-m", "xferd.daemon.cli", "serve", *arguments],
            log=_log_path(run_dir),
            remedy="is the daemon installed? pip install 'xferd[daemon]'",
        )


def _log_path(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")
