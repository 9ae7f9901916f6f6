"""When UCX is busy with nothing: how its worker's thread waits then, and how it knows that this will not end.

A worker has one queue in shared memory for all peers of its machine. A sender takes the queue's next place and then
fills it; one that dies in between leaves a place that is never filled, and the receiver takes nothing that comes after
it, from whomever. With payload copied through the queue, 8 KiB a place, every sixth kill of a busy sender did that. UCX
notices nothing. It shows only in this: progress finds nothing to do, and arming says "busy", for good.

The same, but for a while, is seen of a sender that waits for room in a peer's queue. So it counts as a fault only after
an endpoint was cut, and no more once the worker could be armed: an armed worker has an empty queue.
"""

from __future__ import annotations

CERTAIN_S = 0.5
"""Time for nothing, in all, after which it will not end. A place is filled in microseconds, unless its sender waits for
a processor meanwhile."""

LOOKS = 32
"""Looks in a row that find nothing before the thread pauses between two: mostly something comes within microseconds."""

PAUSE_S = 1e-3

LONGEST_S = 10 * PAUSE_S
"""What counts at most between two looks: for all that is longer the thread itself had to wait, or was stopped."""


class Stall:
    """The state of one worker; for its thread only. Times are seconds of any clock that does not go back.

    ``suspects`` are the nodes whose endpoints were cut since the worker could be armed.
    """

    def __init__(self) -> None:
        self.suspects: set[str] = set()
        self._looks = 0
        self._seen_at = 0.0
        self._wasted_s = 0.0

    @property
    def is_certain(self) -> bool:
        """Whether the queue will not move again."""
        return bool(self.suspects) and self._wasted_s >= CERTAIN_S

    def suspect(self, node: str) -> None:
        """Take note that a peer may have died: its endpoint was cut."""
        if not self.suspects:
            self._wasted_s = 0.0
        self.suspects.add(node)

    def armed(self) -> None:
        """Take note that nothing is in the queue, so that nobody has harmed it."""
        self.suspects.clear()
        self._looks = 0
        self._wasted_s = 0.0

    def moved(self) -> None:
        """Take note that there was something to do, if only by another transport or to see whether peers live."""
        self._looks = 0

    def busy(self, now_s: float) -> float:
        """Take note that there was nothing to do, and yet UCX could not be armed; return how long to pause."""
        if self._looks:
            self._wasted_s += min(now_s - self._seen_at, LONGEST_S)
        self._looks += 1
        self._seen_at = now_s
        return PAUSE_S if self._looks > LOOKS else 0.0
