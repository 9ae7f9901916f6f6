"""The run directory: made if need be, refused if others could meddle with it, and held by one daemon at a time."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Self

from xferd.api.errors import ConfigError, InvalidState

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

LOCK_NAME = "xferd.lock"


class RunDir:
    """Holds a lock file in the directory while entered; the kernel lets go of it however the process ends.

    Sockets that a killed daemon left behind can thus be removed without asking: whoever holds the lock owns them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> Self:
        """Make the directory (0755, for the sockets' own modes say who may connect) and take the lock.

        Raises:
            ConfigError: the directory cannot be made, or is another user's, or others may write to it.
            InvalidState: a daemon is running there; the message has its pid.
        """
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            status = os.lstat(self.path)
        except OSError as exc:
            raise ConfigError(f"{self.path}: cannot be made: {exc.strerror}", remedy="set node.run_dir") from exc
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{self.path} is no directory, or a link to one", remedy="set node.run_dir")
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{self.path} can be changed by others (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})",
                remedy="set node.run_dir to a directory that only this user can write to",
            )
        self._fd = self._lock()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # the file stays: removing it would let two daemons hold two files of one name
            self._fd = -1

    def _lock(self) -> int:
        path = self.path / LOCK_NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}", remedy="set node.run_dir to a directory of this user") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as exc:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise InvalidState(
                f"another xferd (pid {pid or 'unknown'}) has the run directory {self.path}",
                limit="one daemon for each run directory",
                remedy="stop it, or set node.run_dir",
            ) from exc
        except OSError as exc:
            os.close(fd)
            raise ConfigError(f"{path}: {exc.strerror}", remedy="set node.run_dir") from exc
        return fd
