"""What the region table keeps of regions, holds and owners, and who asks it. Pure; ``regions.py`` uses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from xferd.api.errors import InvalidArgument
from xferd.api.types import Access

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


@dataclass(slots=True, eq=False)
class Hold:
    """Regions that somebody holds, from one call of ``hold``; ``since`` is new each time that they are held again."""

    ids: Column
    slots: NDArray[np.intp]
    reason: str
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """What a holder held at a revision of the region table, so that it can hold it again without being checked."""

    holder: str
    holds: tuple[Hold, ...]
    revision: int


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


def may_see(actor: Actor | None, record: Record, retired: set[SessionId]) -> bool:
    """Whether an actor may see a region; None is an operator, who sees all."""
    if actor is None or (isinstance(actor, LocalActor) and actor.session == record.owner):
        return True
    return record.info.access is not Access.NONE and record.owner not in retired


def names_of(ids: Column) -> str:
    """Return the first few ids for people."""
    shown = ", ".join(str(int(i)) for i in ids[:4])
    return shown if len(ids) <= 4 else f"{shown} and {len(ids) - 4} more"


def check_span(backing: Backing, nbytes: int) -> None:
    """Raise InvalidArgument where a region would be empty, or pass the end of what can be addressed."""
    if nbytes <= 0:
        raise InvalidArgument(f"a region of {nbytes} bytes", limit="at least 1 byte", remedy="give its size")
    if backing.position + nbytes > 1 << 64:
        raise InvalidArgument(
            f"a region of {nbytes} bytes", limit="an end of at most 2**64", remedy="check address and nbytes"
        )
