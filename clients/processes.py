"""Processes of one's own that say when they are ready: started, waited for, stopped. Demos, benchmarks and tests.

Readiness is the process's own word, sent to a notify socket as to systemd: daemons of xferd and etcd both do that.
Which processes those are is for ``nodes.py`` and ``demo/etcd.py`` to know.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from xferd.api.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_NBYTES = 4000

_FOREIGN = ("XFERD_", "ETCD_", "LISTEN_", "WATCHDOG_", "NOTIFY_", "RUNTIME_DIRECTORY")
"""Environment of whoever starts us that must not reach our processes."""


def start_ready(what: str, command: Sequence[str], *, log: Path, remedy: str) -> subprocess.Popen[bytes]:
    """Start a process and return when it says that it is ready. The caller stops it, with ``stop``.

    Args:
        what: the process is, for messages.
        command: program and arguments.
        log: file that all it prints is added to; the notify socket lies beside it, so keep the path short.
        remedy: what to do if it does not start.

    Raises:
        Unavailable: it ended, or was not ready in time, and is gone; the message has the end of its log.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("ab") as output:
        address = log.with_suffix(".notify")
        notify.bind(str(address))
        environ = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ | {"NOTIFY_SOCKET": str(address)},
                process_group=0,  # Ctrl-C is for whoever started us, who then stops the process in order
            )
            try:
                ready = becomes_ready(process, notify)
            except BaseException:
                stop(process)
                raise
        finally:
            address.unlink()
    if not ready:
        stop(process)
        tail = log.read_bytes()[-LOG_TAIL_NBYTES:].decode(errors="replace")
        raise Unavailable(f"{what} did not start:\n{tail}", limit=f"{START_TIMEOUT_S:g} s", remedy=remedy)
    return process


def becomes_ready(process: subprocess.Popen[bytes], notify: socket.socket) -> bool:
    """Return whether the process says READY on its notify socket before it ends, or the time is over."""
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


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, make it end if it does not in time, and return when it has. Twice is fine."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Return different loopback ports that nobody listens at now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
