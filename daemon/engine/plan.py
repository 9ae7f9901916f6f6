"""What the planner hands to the machine: legs, routes and chunk borders. Pure values; made in ``planner.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from xferd.plugins.base import DeviceSpace

if TYPE_CHECKING:
    from xferd.api.types import Hop, RegionId
    from xferd.daemon.engine.candidates import Choice
    from xferd.plugins.base import Extent


class CostKey(NamedTuple):
    """What costs are learned for, beside the size: a route between two kinds of space, with one peer or ""."""

    route: str
    source: str
    target: str
    peer: str


@dataclass(frozen=True, slots=True)
class Route:
    """A way to move a leg: one backend, or two with staging memory between them.

    ``slot_key`` names what its chunks compete for, and ``slots`` how many of them may move at once. ``cost_s`` is what
    the whole leg is expected to take, ``assumed_s`` what the backends assume; without ``cost_key`` nothing is learned.
    ``pin`` names the backend that the caller insists on, "" if there is none.
    """

    hops: tuple[Hop, ...]
    cost_s: float
    slot_key: tuple[str, str]
    slots: int
    is_restartable: bool
    cost_key: CostKey | None = None
    assumed_s: float = 0.0
    pin: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends in the order the bytes pass them."""
        return tuple(hop.backend for hop in self.hops)

    @property
    def name(self) -> str:
        """For logs and errors: "posix+tcp"."""
        return "+".join(self.backends)

    @property
    def is_staged(self) -> bool:
        """Whether chunks pass through staging memory."""
        return len(self.hops) > 1


@dataclass(frozen=True, slots=True, eq=False)
class Leg:
    """The part of a transfer between one source space and one target space.

    ``cuts`` are byte positions 0 = c0 < ... < cn = total; chunk i is the bytes from c[i] to c[i + 1].
    ``routes`` are in the order in which they are tried.
    """

    source: Extent
    target: Extent
    cuts: tuple[int, ...]
    routes: tuple[Route, ...]
    _parts: dict[int, tuple[Extent, Extent]] = field(init=False, repr=False, default_factory=dict)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.cuts) - 1

    def part(self, number: int, *, keep: bool) -> tuple[Extent, Extent]:
        """Return the source and the target of a chunk; those of the leg for one that is all of it.

        With ``keep`` the same two are returned the next time, so that backends know them again. Not to be changed.
        """
        if self.chunks == 1:
            return self.source, self.target
        part = self._parts.get(number)
        if part is None:
            start, stop = self.cuts[number], self.cuts[number + 1]
            part = self.source.cut(start, stop), self.target.cut(start, stop)
            if keep:
                self._parts[number] = part
        return part

    @property
    def kept_parts(self) -> int:
        """How many chunks' lists are kept."""
        return len(self._parts)

    @property
    def memory_nbytes(self) -> int:
        """Size of all tables."""
        extents = [self.source, self.target, *(extent for part in self._parts.values() for extent in part)]
        columns = [column for extent in extents for column in (extent.iov, extent.region, extent.ends)]
        return sum(column.nbytes for column in columns if column is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All legs of a transfer, with what was weighed for each.

    ``pieces`` counts both sides after coalescing. ``source_regions`` and ``target_regions`` are those of this node,
    which must be held while bytes move; ``remote_node`` is "" for a transfer within this node.
    """

    legs: tuple[Leg, ...]
    total_nbytes: int
    descriptors: int
    pieces: int
    choices: tuple[Choice, ...]
    source_regions: tuple[RegionId, ...]
    target_regions: tuple[RegionId, ...]
    remote_node: str

    @property
    def chunks(self) -> int:
        """Number of chunks over all legs."""
        return sum(leg.chunks for leg in self.legs)

    @property
    def devices(self) -> frozenset[int]:
        """GPUs of this node whose memory is read or written."""
        spaces = (extent.space for leg in self.legs for extent in (leg.source, leg.target))
        return frozenset(space.device for space in spaces if isinstance(space, DeviceSpace))

    @property
    def considered(self) -> tuple[str, ...]:
        """Every candidate, what is expected of it and why it was chosen or not."""
        return tuple(dict.fromkeys(line for choice in self.choices for line in choice.lines()))

    @property
    def kept_parts(self) -> int:
        """How many chunks' lists are kept; as long as they are as many, so is ``memory_nbytes``."""
        return sum(leg.kept_parts for leg in self.legs)

    @property
    def memory_nbytes(self) -> int:
        """What keeping the plan costs: the tables of all extents."""
        return sum(leg.memory_nbytes for leg in self.legs)


class ChunkRef(NamedTuple):
    """One chunk of a plan: leg number and chunk number within it."""

    leg: int
    number: int
