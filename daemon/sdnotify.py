"""The service manager's side channel: readiness, watchdog, status, stored fds, and sockets opened for us.

Speaks ``sd_notify(3)`` and ``sd_listen_fds(3)`` by their documented wire form, because storing fds needs them passed
along with the message. Where no manager listens every call is a no-op that returns False.
"""

from __future__ import annotations

import array
import os
import socket
import time
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LISTEN_FDS_START = 3
"""The first passed fd, fixed by ``sd_listen_fds(3)``."""

SEND_TIMEOUT_S = 1.0
"""How long one message may wait for room in the manager's queue; it is only ever full when the manager is stuck."""

MAX_FDS = 253  # SCM_MAX_FD of the kernel

log = structlog.get_logger(__name__)


class Notifier:
    """Sends messages to the address in ``NOTIFY_SOCKET``: a path, or an abstract name that starts with "@".

    No method raises: a daemon does not fail because its manager does not listen. Each returns whether the message
    was taken.
    """

    def __init__(self, address: str = "") -> None:
        if address and address[0] not in "/@":
            log.warning("notify_socket_unsupported", address=address, supported="a path, or @name")
            address = ""
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        """Build a notifier for the manager that started this process."""
        return cls(environ.get("NOTIFY_SOCKET", ""))

    @property
    def is_listening(self) -> bool:
        """Whether there is an address to notify."""
        return bool(self._address)

    def ready(self, status: str = "ready") -> bool:
        """Say that start or reload is complete."""
        return self.notify("READY=1", f"STATUS={_line(status)}")

    def reloading(self, status: str = "reloading") -> bool:
        """Say that a reload has begun; ``ready`` ends it. The time lets the manager tell two reloads apart."""
        now_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self.notify("RELOADING=1", f"MONOTONIC_USEC={now_usec}", f"STATUS={_line(status)}")

    def stopping(self, status: str = "stopping", *, extend_s: float = 0.0) -> bool:
        """Say that the stop has begun, and ask for ``extend_s`` seconds to do it in where the unit allows less."""
        extend = [f"EXTEND_TIMEOUT_USEC={int(extend_s * 1e6)}"] if extend_s else []
        return self.notify("STOPPING=1", f"STATUS={_line(status)}", *extend)

    def status(self, status: str) -> bool:
        """Show a line of text in ``systemctl status``."""
        return self.notify(f"STATUS={_line(status)}")

    def watchdog(self) -> bool:
        """Say that we are alive."""
        return self.notify("WATCHDOG=1")

    def store_fds(self, name: str, fds: Sequence[int]) -> bool:
        """Give duplicates of fds to the manager, which hands them to our next process under ``name``."""
        if not name or len(name) > 255 or any(not c.isprintable() or c in ":\n" for c in name):
            raise ValueError(f"{name!r} cannot name stored fds: 1 to 255 printable characters without a colon")
        return self.notify("FDSTORE=1", f"FDNAME={name}", fds=fds)

    def drop_fds(self, name: str) -> bool:
        """Let the manager close what was stored under ``name``."""
        return self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def notify(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        """Send assignments as one datagram, with fds attached."""
        if not self._address:
            return False
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} fds in one message; the kernel takes {MAX_FDS}")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            # A socket for each message: they are rare, and a manager that was restarted has a new one.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(SEND_TIMEOUT_S)
                sock.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._address)
        except OSError as exc:
            log.warning("notify_failed", message=lines[0], error=str(exc))
            return False
        return True


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Return the time within which the manager wants a sign of life, or None where it wants none.

    Raises:
        ConfigError: the variable is set to something that is no time.
    """
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return _number("WATCHDOG_USEC", text, 1, 1 << 62) / 1e6


def inherited_fds(environ: Mapping[str, str], pid: int) -> dict[str, tuple[int, ...]]:
    """Return the fds that the manager passed to this process, by name, and mark them close-on-exec.

    They are opened sockets as well as what an earlier process had stored. The caller owns them. Unnamed ones are
    under "unknown".

    Raises:
        ConfigError: the variables contradict themselves.
    """
    if environ.get("LISTEN_PID", "") != str(pid):
        return {}
    count = _number("LISTEN_FDS", environ.get("LISTEN_FDS", "0"), 0, 1 << 20)
    names = environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in environ else ["unknown"] * count
    if len(names) != count:
        raise ConfigError(f"LISTEN_FDNAMES has {len(names)} names for {count} fds", remedy="start through systemd")
    found: dict[str, tuple[int, ...]] = {}
    for fd, name in enumerate(names, start=LISTEN_FDS_START):
        try:
            os.set_inheritable(fd, False)
        except OSError as exc:
            raise ConfigError(f"LISTEN_FDS={count}, but fd {fd} is not open", remedy="start through systemd") from exc
        found[name] = (*found.get(name, ()), fd)
    return found


def listen_fds(environ: Mapping[str, str], pid: int) -> dict[str, socket.socket]:
    """Return the listening sockets among the passed fds, by ``FileDescriptorName=``; other fds are left alone.

    The caller owns the sockets; they are blocking until it says otherwise.

    Raises:
        ConfigError: two sockets have one name, or the variables contradict themselves.
    """
    found: dict[str, socket.socket] = {}
    for name, fds in inherited_fds(environ, pid).items():
        sockets = [fd for fd in fds if _is_listening(fd)]
        if len(sockets) > 1:
            raise ConfigError(
                f"{len(sockets)} sockets were passed under the name {name!r}",
                limit="1",
                remedy="give each socket unit a FileDescriptorName= of its own",
            )
        if sockets:
            found[name] = socket.socket(fileno=sockets[0])
    return found


def _is_listening(fd: int) -> bool:
    try:
        duplicate = os.dup(fd)
        with socket.socket(fileno=duplicate) as sock:
            return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # a memfd or a file that was stored
        return False


def _number(name: str, text: str, low: int, high: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not low <= number <= high:
        raise ConfigError(f"{name}={text!r} is no number", limit=f"{low} to {high}", remedy="start through systemd")
    return number


def _line(text: str) -> str:
    return " ".join(text.split())
