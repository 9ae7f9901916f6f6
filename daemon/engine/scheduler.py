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

MAX_IDLE = 16
"""Idle queues that are kept, so that a transfer that is posted again and again does not make its queue each time."""

WEIGHTS = {Priority.HIGH: 64, Priority.NORMAL: 8, Priority.LOW: 1}
"""Three classes, a factor of eight apart: what a hand-off, an offload and a prefetch deserve of a full pipe."""


@dataclass(slots=True)
class _Class:
    """The waiting transfers of one priority; ``passed`` is how far it has come in virtual time."""

    step: float
    passed: float = 0.0
    waiting: deque[TransferId] = field(default_factory=deque)


@dataclass(slots=True)
class _Queue:
    """The waiting transfers of one slot key."""

    slots: int
    busy: int = 0
    length: int = 0  # of all that wait
    classes: dict[Priority, _Class] = field(
        default_factory=lambda: {priority: _Class(1.0 / weight) for priority, weight in WEIGHTS.items()}
    )
    now: float = 0.0  # virtual time: how far the class served last had come

    def pop(self) -> TransferId:
        """Take the first of the class whose turn it is; somebody waits."""
        found = None
        for one in self.classes.values():
            if one.waiting and (found is None or one.passed < found.passed):
                found = one
        assert found is not None
        self.now = found.passed
        found.passed += found.step
        self.length -= 1
        return found.waiting.popleft()


class Scheduler:
    """Keeps which transfers have chunks to start, and gives out free slots.

    A transfer is in at most one queue per slot key. ``take`` gives one turn; the machine calls ``enqueue`` again if
    the transfer has more to start.
    """

    def __init__(self) -> None:
        self._queues: dict[SlotKey, _Queue] = {}

    def enqueue(self, key: SlotKey, slots: int, transfer: TransferId, priority: Priority) -> None:
        """Put a transfer at the end of its class; idle classes catch up with the others."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(slots)
        queue.slots = slots
        mine = queue.classes[priority]
        # A class that was idle gets no credit for the time it did not ask.
        mine.passed = max(mine.passed, queue.now)
        if transfer not in mine.waiting:
            mine.waiting.append(transfer)
            queue.length += 1

    def remove(self, transfer: TransferId) -> None:
        """Take a transfer out of every queue."""
        for key, queue in list(self._queues.items()):
            for one in queue.classes.values() if queue.length else ():
                if transfer in one.waiting:
                    one.waiting.remove(transfer)
                    queue.length -= 1
            self._prune(key, queue)

    def take(self) -> Iterator[tuple[SlotKey, TransferId]]:
        """Yield turns as long as slots are free; each occupies a slot until ``free``."""
        for key, queue in list(self._queues.items()):
            while queue.length and queue.busy < queue.slots:
                queue.busy += 1
                yield key, queue.pop()

    def free(self, key: SlotKey) -> None:
        """Give a slot back."""
        queue = self._queues[key]
        if queue.busy == 0:
            raise InternalError(f"slot {key} was given back twice")
        queue.busy -= 1
        self._prune(key, queue)

    def _prune(self, key: SlotKey, queue: _Queue) -> None:
        """Drop an idle queue: peers come and go, and their queues with them."""
        if queue.busy == 0 and not queue.length and len(self._queues) > MAX_IDLE:
            del self._queues[key]

    def busy(self) -> dict[SlotKey, int]:
        """Return the slots in use by key."""
        return {key: queue.busy for key, queue in self._queues.items()}

    def check_invariants(self) -> None:
        """Assert what must always hold."""
        for key, queue in self._queues.items():
            assert queue.busy >= 0, (key, queue.busy)
            assert queue.length == sum(len(one.waiting) for one in queue.classes.values()), (key, queue.length)
            for one in queue.classes.values():
                assert len(set(one.waiting)) == len(one.waiting), (key, one.waiting)
