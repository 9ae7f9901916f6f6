"""Whether a thread may look for something instead of sleeping: a question of how many cores there are.

A core that has nothing to do goes idle, and to wake it takes longer than a small move. Where there are many cores,
whoever spins takes nothing from those that work.
"""

from __future__ import annotations

import os
from typing import Final

MANY_CORES: Final = 8

SPIN_ON_MANY_S: Final = 2e-3
"""How long to look where there are so many: longer than a GPU takes for 64 MiB over the bus."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def has_many_cores() -> bool:
    """Whether there are so many that a spinning thread is in nobody's way."""
    return cores() >= MANY_CORES
