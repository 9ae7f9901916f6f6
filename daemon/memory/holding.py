"""What the region table keeps of regions, holds and owners, and who asks it. Pure values; ``regions.py`` uses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import asyncio

    from numpy.typing import NDArray

    from xferd.api.descriptors import Column
    from xferd.api.types import RegionInfo, SessionId
    from xferd.daemon.memory.backing import Backing


@dataclass(frozen=True, slots=True)
class LocalActor:
    """A session of this node: may do all with its own regions, and with others' what their access says."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class PeerActor:
    """Another node: may do what a region's access says."""

    node: str


Actor: TypeAlias = LocalActor | PeerActor


@dataclass(frozen=True, slots=True)
class Record:
    """One region."""

    info: RegionInfo
    backing: Backing
    owner: SessionId
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Regions that somebody holds, from one call of ``hold``."""

    ids: Column
    slots: NDArray[np.intp]
    reason: str
    since: float


@dataclass(slots=True, eq=False)
class Owned:
    """A session's regions, and who waits until they are idle."""

    number: int
    slots: set[int] = field(default_factory=set)
    retired: bool = False
    waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = field(default_factory=list)

    def as_array(self) -> NDArray[np.intp]:
        """Return the slots."""
        return np.fromiter(self.slots, dtype=np.intp, count=len(self.slots))
