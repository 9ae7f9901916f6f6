"""Daemons on loopback for a demonstration or a test: configured, started, told ready by the daemon itself, stopped.

Each daemon is a child process of its own, with its own run directory, in a folder that the caller gives (keep its
path short: a Unix socket's path has 107 bytes). Nothing else of the machine is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
LOG_TAIL_LINES = 20

_FOREIGN = ("XFERD_", "LISTEN_", "WATCHDOG_", "NOTIFY_", "RUNTIME_DIRECTORY")
"""Environment of whoever starts us that must not reach our daemons."""


class NodeFailed(Exception):
    """A daemon did not start, or died; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One daemon to be. ``listen`` is "host:port" of its peer port, ``peers`` those of the others, by name."""

    name: str
    folder: Path
    listen: str
    secret_file: Path
    pool_nbytes: int
    peers: Mapping[str, str] = field(default_factory=dict)
    file_roots: tuple[Path, ...] = ()

    @property
    def run_dir(self) -> Path:
        """Where its sockets are."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """Where its log goes."""
        return self.folder / f"{self.name}.log"

    def to_toml(self) -> str:
        """Return its configuration file."""
        lines = [
            "[node]",
            f"name = {_text(self.name)}",
            f"run_dir = {_text(self.run_dir)}",
            "",
            "[log]",
            'format = "json"',
            "",
            "[[pools]]",
            'name = "host"',
            f"nbytes = {self.pool_nbytes}",
            "",
            "[files]",
            f"roots = [{', '.join(_text(root) for root in self.file_roots)}]",
            "",
            "[backends.tcp]",
            f"listen = {_text(self.listen)}",
            f"secret_file = {_text(self.secret_file)}",
        ]
        for name, address in self.peers.items():
            lines += ["", "[[metadata.embedded.peers]]", f"name = {_text(name)}", f"address = {_text(address)}"]
        return "\n".join(lines) + "\n"


class Node:
    """A running daemon. A context manager that starts it and returns when it is ready; stops it on leaving."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def session_socket(self) -> Path:
        """What ``Client.connect`` takes."""
        return self.spec.run_dir / "session.sock"

    @property
    def pid(self) -> int:
        """Of the daemon, 0 when it does not run."""
        return self._process.pid if self._process else 0

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; ``wait_ready`` waits for it, so that several can start at once."""
        spec = self.spec
        config = spec.folder / f"{spec.name}.toml"
        config.write_text(spec.to_toml())
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._notify.bind(str(spec.folder / f"{spec.name}.notify"))
            environment = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
            environment["NOTIFY_SOCKET"] = self._notify.getsockname()
            with spec.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "xferd.daemon.cli", "serve", "--config", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,  # Ctrl-C is for whoever started us, who then stops the daemon in order
                )
        except BaseException:
            self._notify.close()
            raise

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for the daemon's READY=1.

        Raises:
            NodeFailed: it died, or did not come up in time.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        pidfd = os.pidfd_open(self._process.pid)
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                ready = wait([self._notify.fileno(), pidfd], left_s)
                if self._notify.fileno() in ready and b"READY=1" in self._notify.recv(65536).split(b"\n"):
                    return
                if pidfd in ready:
                    raise NodeFailed(f"daemon {self.spec.name} ended with {self._process.wait()}{self.log_tail()}")
        finally:
            os.close(pidfd)
        raise NodeFailed(f"daemon {self.spec.name} was not ready after {timeout_s:g} s{self.log_tail()}")

    def stop(self) -> None:
        """Ask the daemon to drain and end, and kill it if it does not. Twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            process.wait()
            self._notify.close()

    def kill(self) -> None:
        """End the daemon at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self.stop()

    def log_tail(self) -> str:
        """Return the end of the daemon's log, on lines of its own."""
        with contextlib.suppress(OSError):
            lines = self.spec.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            return "".join(f"\n  {self.spec.name}: {line}" for line in lines)
        return ""


class Cluster:
    """Nodes that know each other and share a secret. A context manager; ``nodes`` are in the order of ``names``.

    Args:
        folder: for configuration, secret, run directories and logs; exists, and stays.
        names: of the nodes.
        pool_nbytes: of each node's pool. Memory is taken as it is touched, not before.
        file_roots: directories that every node may read and write.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, pool_nbytes: int, file_roots: Sequence[Path] = ()
    ) -> None:
        secret = folder / "secret"
        _write_secret(secret)
        addresses = dict(zip(names, free_addresses(len(names)), strict=True))
        self.nodes = [
            Node(
                NodeSpec(
                    name,
                    folder,
                    address,
                    secret,
                    pool_nbytes,
                    {other: f"tcp://{addresses[other]}" for other in names if other != name},
                    tuple(root.resolve() for root in file_roots),
                )
            )
            for name, address in addresses.items()
        ]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.callback(node.stop)
                node.start()
            for node in self.nodes:
                node.wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def free_addresses(count: int) -> list[str]:
    """Return loopback addresses whose ports nobody uses now; all are taken at once, so they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]


def _write_secret(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))


def _text(value: object) -> str:
    """Return a TOML string; JSON's quoting is a subset of TOML's."""
    return json.dumps(str(value), ensure_ascii=False)
