"""Arenas of this node for ``check_backend``: mapped memory, another process's memory, files."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile

import numpy as np
from check_backend import Arena

from xferd.plugins.base import FileSpace, MappedSpace, ProcessSpace

# The other process: maps an inherited memory file where it likes, says where, and waits until its input ends.
_CHILD = """
import ctypes, mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


class MappedArena(Arena):
    """Anonymous memory of this process."""

    space = MappedSpace()

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = np.zeros(nbytes, dtype=np.uint8)
        self.base = self._bytes.ctypes.data

    def fill(self, data: np.ndarray) -> None:
        self._bytes[:] = data

    def read(self) -> np.ndarray:
        return self._bytes.copy()

    def close(self) -> None:
        pass


class ProcessArena(Arena):
    """Memory of a child process; a memory file shared with it lets the test see it without ``process_vm``."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        fd = os.memfd_create("arena")
        os.ftruncate(fd, nbytes)
        self._map = mmap.mmap(fd, nbytes)
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-c", _CHILD, str(fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
        )
        os.close(fd)
        assert self._child.stdout is not None
        self.base = int(self._child.stdout.readline())
        self.pidfd = os.pidfd_open(self._child.pid)
        self.space = ProcessSpace(self._child.pid, self.pidfd)

    def fill(self, data: np.ndarray) -> None:
        self._map[:] = data.tobytes()

    def read(self) -> np.ndarray:
        return np.frombuffer(self._map[:], dtype=np.uint8)

    def kill(self) -> None:
        """End the process; the arena is still to be closed."""
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        os.close(self.pidfd)
        self._map.close()


class FileArena(Arena):
    """A file in the directory for temporary files, of as many bytes as the arena has."""

    base = 0

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._file = tempfile.NamedTemporaryFile(buffering=0)  # noqa: SIM115  # closed by close()
        self._file.truncate(nbytes)
        self.space = FileSpace(self._file.fileno(), self._file.name)

    def fill(self, data: np.ndarray) -> None:
        os.pwrite(self.space.fd, data.tobytes(), 0)

    def read(self) -> np.ndarray:
        return np.frombuffer(os.pread(self.space.fd, self.nbytes + 1, 0), dtype=np.uint8)

    def cut(self, nbytes: int) -> None:
        """Make the file shorter than its extents say."""
        os.ftruncate(self.space.fd, nbytes)

    def close(self) -> None:
        self._file.close()
