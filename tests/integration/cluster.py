"""Real daemons for tests: started as processes, joined as peers, killed, stopped, looked into for leaks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 30.0

LANES_BOUND = 16
"""Sockets between two nodes: a listener, and a control and two data lanes each way, some of them just closing."""

QUEUES_BOUND = 16
"""io_uring descriptors of a daemon, a few for each mover thread of files."""

THREADS_BOUND = 44
"""Two movers a backend, six of the default executor, four lanes a peer, eight gets of a store, and gRPC's own."""


def free_port() -> int:
    """Return a loopback port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class DaemonProcess:
    """One running daemon and where it is reached. ``prefix``: a command that becomes it, as ``ip netns exec`` does."""

    name: str
    run_dir: Path
    args: list[str]
    peer_port: int
    files: Path
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def session_socket(self) -> Path:
        return self.run_dir / "session.sock"

    @property
    def grpc_socket(self) -> Path:
        return self.run_dir / "grpc.sock"

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / "admin.sock"

    def start(self) -> None:
        """Start it and return when it is ready: it says so over a notify socket, as it would to systemd."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        notify_path = self.run_dir.parent / f"{self.name}.notify"
        notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(notify_path))
            notify.settimeout(START_TIMEOUT_S)
            environ = {k: v for k, v in os.environ.items() if not k.startswith("XFERD_")}
            environ |= {"NOTIFY_SOCKET": str(notify_path), "PYTHONWARNINGS": "default"}
            with self.log_path.open("ab") as log:
                self.process = subprocess.Popen(
                    [*self.prefix, sys.executable, "-m", "xferd.daemon.cli", "serve", *self.args],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environ,
                )
            try:
                while b"READY=1" not in notify.recv(4096):
                    pass
            except TimeoutError:
                self.kill()
                raise AssertionError(f"daemon {self.name} did not start:\n{self.log()}") from None

    @property
    def log_path(self) -> Path:
        return self.run_dir.parent / f"{self.name}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, method: str = "GET", body: object = None, token: str = "") -> Any:
        """Ask the REST face over its Unix socket; returns (status, document)."""
        connection = _UnixConnection(str(self.admin_socket))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body), "application/json"
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        try:
            return answer.status, json.loads(raw)
        except ValueError:
            return answer.status, raw

    def footprint(self) -> dict[str, int]:
        """Return what must not grow: fds, threads, children, pool bytes, regions, holds, sessions, transfers.

        Lanes, mover threads and their io_uring queues are made when first needed and kept: up to their bounds they are
        no leak.
        """
        process = psutil.Process(self.process.pid)
        lanes = len(process.net_connections(kind="tcp"))
        queues = self._io_uring_fds()
        status = self.get("/v1/node")[1]
        pools = self.get("/v1/pools")[1]["pools"]
        return {
            "fds": process.num_fds() - lanes - queues,
            "queues": max(queues, QUEUES_BOUND),
            "lanes": max(lanes, LANES_BOUND),
            "threads": max(process.num_threads(), THREADS_BOUND),
            "children": len(process.children()),
            "used_nbytes": sum(pool["used_nbytes"] for pool in pools),
            "regions": status["regions"],
            "sessions": status["sessions"],
            "active": status["transfers_active"],
            "holds": len(self.get("/v1/holds")[1]["holds"]),
        }

    def _io_uring_fds(self) -> int:
        found = 0
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found += "io_uring" in str(entry.readlink())
        return found

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and wait for the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)


def unix_connection(path: Path) -> http.client.HTTPConnection:
    """Return a connection to a REST face over its Unix socket."""
    return _UnixConnection(str(path))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("xferd", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Cluster:
    """Makes daemons that share a secret; stops them all at the end."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="xf"))
        self.secret = self.root / "secret"
        self.secret.write_text(secrets.token_hex(32))
        self.secret.chmod(0o600)
        self.daemons: list[DaemonProcess] = []

    def make(
        self,
        name: str,
        *,
        peers: tuple[DaemonProcess, ...] = (),
        tcp: bool = True,
        settings: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
        start: bool = True,
    ) -> DaemonProcess:
        """Start a daemon; ``peers`` are those that it knows from its configuration."""
        files = self.root / f"{name}-files"
        files.mkdir(exist_ok=True)
        port = free_port() if tcp else 0
        wanted = [f"node.name={name}", f"node.run_dir={self.root / name}", f'files.roots=["{files}"]']
        if tcp:
            wanted += [f"backends.tcp.listen=127.0.0.1:{port}", f"backends.tcp.secret_file={self.secret}"]
        if peers:
            known = ", ".join(f'{{name="{p.name}", address="tcp://127.0.0.1:{p.peer_port}"}}' for p in peers)
            wanted.append(f"metadata.embedded.peers=[{known}]")
        args = [part for setting in (*wanted, *settings) for part in ("--set", setting)]
        daemon = DaemonProcess(name, self.root / name, args, port, files, prefix)
        if start:
            daemon.start()
            self.daemons.append(daemon)
        return daemon

    def close(self) -> list[str]:
        """Stop all; returns what went wrong while stopping."""
        problems = []
        for daemon in reversed(self.daemons):
            if daemon.process.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                daemon.process.send_signal(signal.SIGCONT)
            try:
                code = daemon.stop()
            except subprocess.TimeoutExpired:
                daemon.kill()
                problems.append(f"daemon {daemon.name} did not stop within 20 s:\n{daemon.log()[-3000:]}")
                continue
            if code != 0:
                problems.append(f"daemon {daemon.name} exited with {code}:\n{daemon.log()[-3000:]}")
        signs = ("Traceback (most recent call last)", "task_outlived_its_owner", "ResourceWarning")
        problems.extend(
            f"daemon {daemon.name} logged {sign!r}:\n{daemon.log()[-5000:]}"
            for daemon in self.daemons
            for sign in signs
            if sign in daemon.log()
        )
        if not problems:
            shutil.rmtree(self.root, ignore_errors=True)
        return problems


def eventually(condition: Any, timeout_s: float = 10.0, what: str = "condition") -> None:
    """Wait for another process to come to a state that it does not announce; fails with what was last seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = condition()
        if seen is True:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} not reached within {timeout_s} s; last seen: {seen!r}")
        time.sleep(0.02)
