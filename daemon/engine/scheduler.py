"""Who moves next: slots, priority classes, round robin. Pure; the machine asks, the runner performs.

Chunks compete for the slots of what they go through (a backend, or a backend and a peer). Between priority classes
the choice is by stride: a class of weight w moves w chunks where one of weight 1 moves one, so that LOW never
starves and HIGH never waits for more than the chunks under way. Within a class, transfers take turns chunk by chunk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xferd.api.errors import InternalError
from xferd.api.types import Priority

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.api.types import TransferId

SlotKey = tuple[str, str]

WEIGHTS = {Priority.HIGH: 64, Priority.NORMAL: 8, Priority.LOW: 1}
"""Three classes, a factor of eight apart: what a hand-off, an offload and a prefetch deserve of a full pipe."""


@dataclass(slots=True)
class _Queue:
    """The waiting transfers of one slot key."""

    slots: int
    busy: int = 0
    waiting: dict[Priority, deque[TransferId]] = field(default_factory=lambda: {p: deque() for p in Priority})
    now: float = 0.0  # virtual time: how far the class served last had come
    passed: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))

    def next_class(self) -> Priority | None:
        ready = [priority for priority in WEIGHTS if self.waiting[priority]]
        return min(ready, key=lambda priority: self.passed[priority]) if ready else None


class Scheduler:
    """Keeps which transfers have chunks to start, and gives out free slots.

    A transfer is in at most one queue per slot key. ``take`` gives one turn; the machine calls ``enqueue`` again if
    the transfer has more to start.
    """

    def __init__(self) -> None:
        self._queues: dict[SlotKey, _Queue] = {}

    def enqueue(self, key: SlotKey, slots: int, transfer: TransferId, priority: Priority) -> None:
        """Put a transfer at the end of its class; idle classes catch up with the others."""
        queue = self._queues.setdefault(key, _Queue(slots))
        queue.slots = slots
        # A class that was idle gets no credit for the time it did not ask.
        queue.passed[priority] = max(queue.passed[priority], queue.now)
        if transfer not in queue.waiting[priority]:
            queue.waiting[priority].append(transfer)

    def remove(self, transfer: TransferId) -> None:
        """Take a transfer out of every queue."""
        for key, queue in list(self._queues.items()):
            for waiting in queue.waiting.values():
                if transfer in waiting:
                    waiting.remove(transfer)
            self._prune(key, queue)

    def take(self) -> Iterator[tuple[SlotKey, TransferId]]:
        """Yield turns as long as slots are free; each occupies a slot until ``free``."""
        for key, queue in list(self._queues.items()):
            while queue.busy < queue.slots and (priority := queue.next_class()) is not None:
                queue.now = queue.passed[priority]
                queue.passed[priority] += 1.0 / WEIGHTS[priority]
                queue.busy += 1
                yield key, queue.waiting[priority].popleft()

    def free(self, key: SlotKey) -> None:
        """Give a slot back."""
        queue = self._queues[key]
        if queue.busy == 0:
            raise InternalError(f"slot {key} was given back twice")
        queue.busy -= 1
        self._prune(key, queue)

    def _prune(self, key: SlotKey, queue: _Queue) -> None:
        """Drop an idle queue: peers come and go, and their queues with them."""
        if queue.busy == 0 and not any(queue.waiting.values()):
            del self._queues[key]

    def busy(self) -> dict[SlotKey, int]:
        """Return the slots in use by key."""
        return {key: queue.busy for key, queue in self._queues.items()}

    def check_invariants(self) -> None:
        """Assert what must always hold."""
        for key, queue in self._queues.items():
            assert queue.busy >= 0, (key, queue.busy)
            for waiting in queue.waiting.values():
                assert len(set(waiting)) == len(waiting), (key, waiting)
