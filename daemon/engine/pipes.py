"""How much of a shared pipe a chunk had: time in which n chunks move at once counts as an n-th of it for each.

Pure bookkeeping. It is the clock of processor sharing: for each pipe a virtual time that runs at 1/n while n chunks
are in it. What a chunk had is the virtual time between its coming and its going, and the shares of all chunks add up
to the time in which the pipe was busy, whoever they belong to. So a transfer that runs beside others is not taken for
one by a slow route, and one of many chunks is measured by what the pipe gave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from xferd.daemon.engine.scheduler import SlotKey


@dataclass(slots=True)
class _Pipe:
    active: int = 0
    shared_s: float = 0.0
    at: float = 0.0

    def advance(self, now: float) -> None:
        if self.active:
            self.shared_s += max(now - self.at, 0.0) / self.active
        self.at = now


class Stay(NamedTuple):
    """A chunk in a pipe."""

    pipe: SlotKey
    entered_at: float


class Pipes:
    """All pipes in which something moves."""

    def __init__(self) -> None:
        self._pipes: dict[SlotKey, _Pipe] = {}

    def __len__(self) -> int:
        return len(self._pipes)

    def enter(self, key: SlotKey, now: float) -> Stay:
        """Note that a chunk begins to move."""
        pipe = self._pipes.get(key)
        if pipe is None:
            pipe = self._pipes[key] = _Pipe(at=now)
        else:
            pipe.advance(now)
        pipe.active += 1
        return Stay(key, pipe.shared_s)

    def leave(self, stay: Stay, now: float) -> float:
        """Note that it came to rest; returns its share of the time, in seconds."""
        pipe = self._pipes[stay.pipe]
        pipe.advance(now)
        pipe.active -= 1
        if not pipe.active:
            del self._pipes[stay.pipe]  # peers come and go, and their pipes with them
        return pipe.shared_s - stay.entered_at

    def check_invariants(self) -> None:
        """Assert what must always hold."""
        assert all(pipe.active > 0 for pipe in self._pipes.values()), self._pipes
