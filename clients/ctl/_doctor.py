"""The verb ``doctor``: what the daemon says of its surroundings; where none answers, what is seen from outside."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from xferd.api.errors import XferdError
from xferd.api.types import Check, CheckState
from xferd.clients.ctl import _tables
from xferd.clients.ctl._link import GRPC_SOCKET, PROBE_TIMEOUT_S, Settings, admin, is_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_FAILED, EXIT_UNREACHABLE = 1, 3
LOCK = "xferd.lock"
"""The daemon writes its pid there, and holds a lock on it as long as it lives."""

LOCKS = Path("/proc/locks")
START = "systemctl start xferd, or `xferd serve` as this user; its log says why it ended (journalctl -u xferd)"


def doctor(ctx: typer.Context) -> None:
    """Look for what is wrong, and say what to do.

    Exit status 1 if a check failed, 3 if no daemon answered.
    """
    settings: Settings = ctx.obj
    status = 0
    try:
        with admin(settings, timeout_s=PROBE_TIMEOUT_S) as node:
            node.status()  # a daemon that hangs shows here already, without the time that a look may take
            found = node.diagnose()
    except XferdError as error:
        if not is_unreachable(error):
            raise
        found = [Check("daemon", CheckState.FAIL, error.message, error.remedy), *from_outside(settings)]
        status = EXIT_UNREACHABLE
    settings.output.show({"checks": found}, lambda: _tables.checks(found))
    if not status and any(check.state is CheckState.FAIL for check in found):
        status = EXIT_FAILED
    if status:
        raise typer.Exit(status)


def from_outside(settings: Settings) -> list[Check]:
    """Say what this process can see of a daemon that does not answer."""
    if settings.grpc and not settings.grpc.startswith("unix:"):
        remedy = "see that the daemon runs there with grpc.listen set, and that no firewall is between"
        return [Check("grpc", CheckState.FAIL, f"nothing else can be seen of {settings.grpc} from here", remedy)]
    return list(look_around(_run_dir(settings)))


def _run_dir(settings: Settings) -> Path:
    if settings.grpc:
        return Path(settings.grpc.removeprefix("unix:")).absolute().parent
    if settings.socket is not None:
        return settings.socket.absolute().parent
    from xferd.clients._session_socket import find_place

    return find_place(None).path.parent


def look_around(run_dir: Path) -> Iterator[Check]:
    """Yield checks of a run directory: there, ours to enter, its sockets, and whether a process holds it."""
    try:
        list(run_dir.iterdir())
    except FileNotFoundError:
        remedy = f"{START}; or name its session socket with --socket or $XFERD_SOCKET"
        yield Check("run-dir", CheckState.FAIL, f"{run_dir} does not exist: no daemon has run there", remedy)
        return
    except OSError as exc:
        remedy = "run xferctl as a user who may enter it, or name another with --socket or $XFERD_SOCKET"
        yield Check("run-dir", CheckState.FAIL, f"{run_dir}: {exc.strerror}", remedy)
        return
    yield Check("run-dir", CheckState.OK, str(run_dir), "")
    holder = _holder(run_dir / LOCK)
    yield from (_socket(run_dir / name, holder) for name in ("session.sock", GRPC_SOCKET))
    if holder is None:
        yield Check("process", CheckState.FAIL, f"no process holds {run_dir / LOCK}: the daemon is not running", START)
    else:
        remedy = f"see its log; if it stays so, `kill -ABRT {holder}` and start it again"
        found = f"process {holder} holds {run_dir / LOCK}, but its gRPC does not answer: starting, stopping or stopped"
        yield Check("process", CheckState.WARN, found, remedy)


def _socket(path: Path, holder: int | None) -> Check:
    try:
        status = path.stat()
    except OSError as exc:
        remedy = (
            START if holder is None else "it may be starting, or has other names for its sockets: see `sessions.socket`"
        )
        return Check(path.name, CheckState.FAIL, f"{path}: {exc.strerror}", remedy)
    if not stat.S_ISSOCK(status.st_mode):
        return Check(path.name, CheckState.FAIL, f"{path} is no socket", "move it away, and start the daemon")
    if not os.access(path, os.W_OK):
        mode = f"mode {stat.S_IMODE(status.st_mode):04o}, uid {status.st_uid}, gid {status.st_gid}"
        remedy = f"join the group {status.st_gid} (usermod -aG), or run as uid {status.st_uid}"
        return Check(path.name, CheckState.FAIL, f"{path}: uid {os.geteuid()} may not open it ({mode})", remedy)
    return _listener(path)


def _listener(path: Path) -> Check:
    kind = socket.SOCK_SEQPACKET if path.name == "session.sock" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError as exc:
            found = f"{path}: nobody listens ({exc.strerror or exc})"
            return Check(path.name, CheckState.FAIL, found, f"it was left behind by a daemon that died: {START}")
    return Check(path.name, CheckState.OK, f"{path} takes connections", "")


def _holder(lock: Path) -> int | None:
    """Return the process that holds the lock, as the kernel says: the pid in the file may be a dead one's."""
    try:
        inode = lock.stat().st_ino
        rows = [line.split() for line in LOCKS.read_text().splitlines()]
    except OSError:
        return None
    # "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF": the device's form differs by file system, the inode does not.
    holders = [int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5].endswith(f":{inode}")]
    return holders[0] if holders else None
