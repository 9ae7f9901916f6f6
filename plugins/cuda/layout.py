"""The shared memory between the daemon and one device worker: commands, completions, and tables of pieces.

One memfd: a queue of commands, a queue of completions, and slots for tables. Entries are fixed structs whose last
field is their number, counted from 1 and written last, so that neither side reads an index of the other and a half
written entry is never taken (as in ``api/ring.py``). Each side rings the other's eventfd after writing; whoever spins
meanwhile has seen the entry already. Both ends are ours, so nothing here is checked against malice.

What is rare (opening memory, facts, the end) goes over a socket instead: ``control.py``.
"""

from __future__ import annotations

import enum
import struct
import threading
from typing import TYPE_CHECKING, Final

import numpy as np

from xferd.api.mapping import map_shared

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMMANDS: Final = 256
"""Slots of either queue; the daemon has no more commands under way."""

TABLES: Final = 16
TABLE_NBYTES: Final = 2 << 20
MAX_ROWS: Final = TABLE_NBYTES // 16
"""A table slot holds the rows of both sides of one command, (position, nbytes) of u64 each: source, then target."""

COMMAND: Final = struct.Struct("<QQQIIBBHiIIIIQ")
"""cookie, table id, nbytes, source rows, target rows, source side, target side, flags, table slot, wait event,
done event, device of the source, file, number. 64 bytes. ``file`` is the daemon's descriptor of the file of a FILE
side, which the worker opens anew by ``/proc`` while the command lasts."""

COMPLETION: Final = struct.Struct("<QQQIHH208sQ")
"""cookie, nbytes, device time in ns, outcome, engine, text nbytes, text (UTF-8), number."""

COMMAND_NBYTES: Final = 64
COMPLETION_NBYTES: Final = 256
NUMBER_OF_COMMAND_AT: Final = COMMAND_NBYTES - 8
NUMBER_OF_COMPLETION_AT: Final = COMPLETION.size - 8
TEXT_NBYTES: Final = 208

COMMANDS_AT: Final = 0
COMPLETIONS_AT: Final = COMMANDS_AT + COMMANDS * COMMAND_NBYTES
TABLES_AT: Final = COMPLETIONS_AT + COMMANDS * COMPLETION_NBYTES
TOTAL_NBYTES: Final = TABLES_AT + TABLES * TABLE_NBYTES

assert COMMAND.size == COMMAND_NBYTES
assert COMPLETION.size <= COMPLETION_NBYTES

NO_TABLE: Final = -1
"""As the table slot: the worker has the table of this id already."""


class Side(enum.IntEnum):
    """What the positions of one side of a table are."""

    HOST = 0  # addresses in the daemon; the worker has mapped the same memory elsewhere
    DEVICE = 1  # allocation << ALLOCATION_SHIFT | offset
    FILE = 2  # offsets in a file; the other side is DEVICE


class Outcome(enum.IntEnum):
    """How a command ended. No byte of it moves any more."""

    DONE = 0
    MISSING = 1  # a row lies in memory that the worker has not mapped: nothing moved; map it and send again
    UNKNOWN_TABLE = 2  # the worker does not have the table of this id (any more): nothing moved; send it along
    FAILED = 3  # the text says why
    REFUSED = 4  # bad values that sending again cannot mend; nothing moved; the text says why


class Engine(enum.IntEnum):
    """Which part of the device moved the bytes, for statistics."""

    NONE = 0
    COPY = 1
    KERNEL = 2
    FILE = 3


class SharedQueues:
    """The memfd, mapped. One object on each side; not thread-safe.

    Attributes:
        memory: all bytes of it, writable.
        tables: the slots for tables, of ``MAX_ROWS`` rows each.
    """

    def __init__(self, fd: int) -> None:
        array = map_shared(fd, TOTAL_NBYTES)
        self.memory: memoryview = array.data
        self.tables: NDArray[np.uint64] = array[TABLES_AT:].view(np.uint64).reshape(TABLES, MAX_ROWS, 2)
        self._written = 0
        self._read = 0
        self._fence = threading.Lock()

    # -- the daemon's side

    def put_command(self, *fields: int) -> None:
        """Write the next command, all fields of ``COMMAND`` but the number. The caller keeps below ``COMMANDS``."""
        self._written += 1
        at = COMMANDS_AT + (self._written - 1) % COMMANDS * COMMAND_NBYTES
        COMMAND.pack_into(self.memory, at, *fields, 0)
        self._publish(at + NUMBER_OF_COMMAND_AT)

    def has_completion(self) -> bool:
        """Whether ``take_completion`` would return one."""
        return self._is_there(COMPLETIONS_AT + self._read % COMMANDS * COMPLETION_NBYTES + NUMBER_OF_COMPLETION_AT)

    def take_completion(self) -> tuple[int, int, int, int, int, str] | None:
        """Return (cookie, nbytes, device ns, outcome, engine, text) of the next completion, or None."""
        at = COMPLETIONS_AT + self._read % COMMANDS * COMPLETION_NBYTES
        if not self._is_there(at + NUMBER_OF_COMPLETION_AT):
            return None
        cookie, nbytes, device_ns, outcome, engine, length, text, _ = COMPLETION.unpack_from(self.memory, at)
        self._read += 1
        return cookie, nbytes, device_ns, outcome, engine, text[:length].decode("utf-8", "replace")

    # -- the worker's side

    def take_command(self) -> tuple[int, ...] | None:
        """Return the fields of the next command; None where there is none."""
        at = COMMANDS_AT + self._read % COMMANDS * COMMAND_NBYTES
        if not self._is_there(at + NUMBER_OF_COMMAND_AT):
            return None
        self._read += 1
        return COMMAND.unpack_from(self.memory, at)

    def put_completion(
        self, cookie: int, nbytes: int, device_ns: int, outcome: Outcome, engine: Engine, text: str = ""
    ) -> None:
        """Write the next completion. There is always room: the daemon has read those of ``COMMANDS`` ago."""
        self._written += 1
        at = COMPLETIONS_AT + (self._written - 1) % COMMANDS * COMPLETION_NBYTES
        said = text.encode()[:TEXT_NBYTES]
        COMPLETION.pack_into(self.memory, at, cookie, nbytes, device_ns, outcome, engine, len(said), said, 0)
        self._publish(at + NUMBER_OF_COMPLETION_AT)

    # -- both

    def _publish(self, at: int) -> None:
        with self._fence:  # an atomic operation: what was written before is seen before the number, on any machine
            pass
        self.memory[at : at + 8] = self._written.to_bytes(8, "little")

    def _is_there(self, at: int) -> bool:
        if int.from_bytes(self.memory[at : at + 8], "little") != self._read + 1:
            return False
        with self._fence:
            pass
        return True
