"""The interfaces between the daemon and what moves bytes: ``Backend``, and ``PeerTransport`` between nodes.

No implementation is here: the vectored primitive is in ``vectored.py``, the registry in ``registry.py``.
``docs/backends.md`` is the guide for authors; ``tests/conformance/`` is what a backend must pass.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pydantic import BaseModel

    from xferd.api.proto import peer_v1_pb2 as peer_pb
    from xferd.api.types import NodeInfo, TransferOp

IovTable: TypeAlias = NDArray[np.uint64]
"""Shape (n, 2), C order: (position, nbytes) rows. For memory it is an array of ``struct iovec`` as it stands."""


class SpaceKind(enum.Enum):
    """Where the positions of an extent have a meaning."""

    MAPPED = "mapped"  # memory of this process
    PROCESS = "process"  # private memory of another process of this node
    FILE = "file"  # an open file
    OBJECT = "object"  # an object in a configured store
    DEVICE = "device"  # memory of a GPU
    REMOTE = "remote"  # regions of another node


@dataclass(frozen=True, slots=True)
class MappedSpace:
    """Memory mapped into this process: positions are addresses."""

    kind: ClassVar[SpaceKind] = SpaceKind.MAPPED

    def __str__(self) -> str:
        return "DRAM"


@dataclass(frozen=True, slots=True)
class ProcessSpace:
    """Private memory of another process: positions are its addresses.

    ``pidfd`` stays open as long as any extent of the space is in use. A backend checks it after each system call,
    because the pid may have been given to another process once the pidfd reads as ended.
    """

    pid: int
    pidfd: int
    kind: ClassVar[SpaceKind] = SpaceKind.PROCESS

    def __str__(self) -> str:
        return f"DRAM(pid {self.pid})"


@dataclass(frozen=True, slots=True)
class FileSpace:
    """An open regular file: positions are offsets in it. The fd stays open as long as the extent is in use."""

    fd: int
    path: str
    kind: ClassVar[SpaceKind] = SpaceKind.FILE

    def __str__(self) -> str:
        return "FILE"


class ObjectVersion:
    """Which version of an object a region means: pinned when it is registered, moved on by the region's own writes.

    Attributes:
        etag: as the store gives it; "" where the object is not there yet, or the store has none.
        nbytes: size of that version; 0 where it is not there yet.
    """

    __slots__ = ("etag", "nbytes")

    def __init__(self, etag: str = "", nbytes: int = 0) -> None:
        self.etag = etag
        self.nbytes = nbytes

    def __repr__(self) -> str:
        return f"ObjectVersion({self.etag!r}, {self.nbytes})"


@dataclass(frozen=True, slots=True)
class ObjectSpace:
    """An object in a store: positions are offsets in it.

    ``nbytes`` is the region's size, which is what a write of the whole has. Two registrations of one key are two
    spaces: each has pinned a version of its own.
    """

    store: str
    key: str
    nbytes: int
    version: ObjectVersion
    kind: ClassVar[SpaceKind] = SpaceKind.OBJECT

    def __str__(self) -> str:
        return "OBJECT"


@dataclass(frozen=True, slots=True)
class ObjectsSpace:
    """Several objects of one store that are read together; only ever a source.

    Positions are offsets in an object, and the extent's region column says in which: it is an index into ``members``.
    """

    store: str
    members: tuple[ObjectSpace, ...]
    kind: ClassVar[SpaceKind] = SpaceKind.OBJECT

    def __str__(self) -> str:
        return "OBJECT"


ALLOCATION_SHIFT = 40
"""Bits of a position in a ``DeviceSpace`` that are the offset: an allocation has at most 1 TiB."""


@dataclass(frozen=True, slots=True)
class DeviceSpace:
    """Memory of one GPU: positions are ``allocation << ALLOCATION_SHIFT | offset``.

    Addresses mean nothing here, because every device worker has mapped an allocation elsewhere. Allocations are
    numbered by the ``DeviceMemory`` that opened them.
    """

    device: int
    kind: ClassVar[SpaceKind] = SpaceKind.DEVICE

    def __str__(self) -> str:
        return f"VRAM({self.device})"


@dataclass(frozen=True, slots=True)
class RemoteSpace:
    """Regions of another node at one epoch: positions are offsets, and the extent has a region column too.

    ``memory`` says for people what the regions are, as far as their records tell.
    """

    node: str
    epoch: int
    memory: str = field(default="regions", compare=False)
    kind: ClassVar[SpaceKind] = SpaceKind.REMOTE

    def __str__(self) -> str:
        return f"{self.memory}@{self.node}"


Space: TypeAlias = MappedSpace | ProcessSpace | FileSpace | ObjectSpace | ObjectsSpace | DeviceSpace | RemoteSpace


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Extent:
    """A list of spans in one space, in order.

    Attributes:
        space: what the positions mean.
        iov: (position, nbytes) rows; no row is empty.
        region: u64 (n,) for REMOTE the regions' ids, for several objects their numbers; None for other spaces.
        ends: u64 (n,) running sum of the rows, where somebody is going to cut often (``indexed``).
    """

    space: Space
    iov: IovTable
    region: NDArray[np.uint64] | None = None
    ends: NDArray[np.uint64] | None = None

    @property
    def nbytes(self) -> int:
        """Sum of the rows."""
        return int(self.iov[:, 1].sum())

    def cut(self, start: int, stop: int) -> Extent:
        """Return the part between two byte positions of the list, splitting rows at the borders.

        Copies at most the rows it returns; ``start < stop <= nbytes``. Goes through the whole list each time, unless
        it was ``indexed``.
        """
        ends = self.iov[:, 1].cumsum() if self.ends is None else self.ends
        # By the methods: numpy's functions of these names take longer to find them than they take.
        first = int(ends.searchsorted(np.uint64(start), side="right"))
        last = int(ends.searchsorted(np.uint64(stop), side="left"))
        iov = self.iov[first : last + 1].copy()
        skip = start - (int(ends[first]) - int(self.iov[first, 1]))
        iov[-1, 1] -= np.uint64(int(ends[last]) - stop)
        iov[0, 0] += np.uint64(skip)
        iov[0, 1] -= np.uint64(skip)
        region = None if self.region is None else self.region[first : last + 1]
        return Extent(self.space, iov, region)

    def indexed(self) -> Extent:
        """Return the same list, made for many cuts: each then costs what it returns, not the list's length."""
        return Extent(self.space, self.iov, self.region, np.cumsum(self.iov[:, 1]))


@dataclass(frozen=True, slots=True, eq=False)
class BlockSums:
    """Blocks of a chunk of which somebody wants the xxh3 (64 bits) of the bytes that arrive.

    A backend that passes over the bytes anyway may fill in what it likes; whoever wants them makes the others. Threads
    fill in blocks of their own.

    Attributes:
        begin: i64 (n,) where each begins in the chunk, ascending and apart from each other.
        stop: where it ends.
        values: u64 (n,) the sums.
        is_known: whether a value is there; set after it, and only once all of the block has arrived.
    """

    begin: NDArray[np.int64]
    stop: NDArray[np.int64]
    values: NDArray[np.uint64]
    is_known: NDArray[np.bool_]

    @classmethod
    def of(cls, begin: NDArray[np.int64], stop: NDArray[np.int64]) -> BlockSums:
        """Return blocks none of which is known."""
        return cls(begin, stop, np.zeros(len(begin), np.uint64), np.zeros(len(begin), np.bool_))

    def cut(self, start: int, stop: int) -> BlockSums:
        """Return the blocks that lie in a part of the chunk as a whole; what is filled in there is so here."""
        first = int(self.begin.searchsorted(start))
        last = max(first, int(self.stop.searchsorted(stop, side="right")))
        begin, end = self.begin[first:last] - start, self.stop[first:last] - start
        return BlockSums(begin, end, self.values[first:last], self.is_known[first:last])


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The unit of work of a backend: ``nbytes`` bytes from ``source`` to ``target``, both in list order.

    Totals are equal; rows need not pair up. ``agent`` is on whose behalf; ``cause_id`` goes into every log line and
    to the other node. Events are numbers of a ``DeviceMemory``, 0 for none: what reads or writes GPU memory waits for
    the first before it begins, and records the second at its end. ``verify``: another node compares what it sends from
    a storage pool with its checksums first. ``durable``: another node has what it writes to files on the disk before it
    answers; files of this node are left to the leg. ``sums``: what may be summed on the way; leaving it alone is right
    too.
    """

    source: Extent
    target: Extent
    nbytes: int
    transfer_id: str
    cause_id: str
    agent: str = ""
    wait_event: int = 0
    done_event: int = 0
    verify: bool = False
    durable: bool = False
    sums: BlockSums | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LegScope:
    """One leg of a transfer as the backend sees it that opens it: all that its chunks are going to move.

    ``source`` or ``target`` is None where it is staging memory, which is another piece for each chunk. ``durable``: the
    target is a file, and ``commit`` must put on the disk what was written to it.
    """

    source: Extent | None
    target: Extent | None
    nbytes: int
    transfer_id: str
    cause_id: str
    agent: str = ""
    durable: bool = False


class Begun(abc.ABC):
    """A chunk that ``Backend.begin`` has started."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Let it come to rest as soon as may be; ``done`` is told once it has. Does not wait; late or twice is fine."""


class OpenLeg(abc.ABC):
    """A leg under way; the runner moves its chunks by this, and ends it by ``commit`` or by ``abort``, never both."""

    @abc.abstractmethod
    async def move(self, chunk: Chunk) -> int:
        """Move one chunk; the promises are those of ``Backend.move``. What was moved may not be visible yet.

        Chunks may be started in any number at once, but in the order of their bytes; a later one may wait for an
        earlier one.
        """

    @abc.abstractmethod
    async def commit(self) -> None:
        """Make visible what was moved, as a whole. Called once every chunk has moved; waits as long as it takes.

        When it raises nothing of the leg is visible, and nothing is left behind; no ``abort`` follows.
        """

    @abc.abstractmethod
    async def abort(self) -> None:
        """Drop what was moved. Called when no chunk is under way, also where none ever was; does not raise."""


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """Counters since start; the daemon exports them as metrics."""

    moved_nbytes: int = 0
    chunks: int = 0
    failures: int = 0
    busy: int = 0
    slots: int = 0
    integrity_failures: int = 0


@dataclass(frozen=True, slots=True)
class SlotClass:
    """What a chunk competes for: chunks of one class share ``slots`` places, those of other classes have their own."""

    name: str
    slots: int


class Backend(abc.ABC):
    """Moves bytes between some pairs of spaces.

    Life: constructed by the registry with its own options, ``start`` once on the event loop, then any number of
    ``move`` at once, then ``aclose`` once. Blocking calls go to threads that the backend owns and names
    ``xferd-<name>-*``. Errors are raised as ``XferdError``; those of libraries are translated here.
    """

    name: ClassVar[str]
    options: ClassVar[type[BaseModel]]
    """The backend's section of the configuration."""

    is_restartable: ClassVar[bool] = True
    """Whether a chunk may be moved again after a failure, on this or another route. If false the daemon fails the
    transfer at the first error."""

    is_transactional: ClassVar[bool] = False
    """Whether a leg must be opened (``open_leg``) before its chunks move, because what it writes appears as a whole or
    not at all. If false the runner calls ``move`` for each chunk, and nothing else; but see ``needs_leg``."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Acquire threads and descriptors. Raises ``Unsupported`` with the remedy where the machine lacks something."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release everything; moves under way have ended before. Twice is fine."""

    @abc.abstractmethod
    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return the (source, target) kinds that this backend moves between."""

    def refusal(self, source: Space, target: Space) -> str:
        """Return why this backend cannot move between two spaces now, or "". Called by the planner; must not block."""
        if (source.kind, target.kind) in self.pairs():
            return ""
        return f"cannot move {source.kind.value} to {target.kind.value}"

    def manner(self, source: Space, target: Space) -> str:
        """Return how it moves between two spaces that it does not refuse, where it has a choice; for ``explain``.

        A few words, or ""; called by the planner, must not block.
        """
        return ""

    @abc.abstractmethod
    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return the expected seconds for one transfer, before anything was measured."""

    @abc.abstractmethod
    def slots(self, source: Space, target: Space) -> int:
        """Return how many chunks between these spaces make sense at once; the scheduler gives no more."""

    def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
        """Return which slots a move of this size takes; for backends whose small chunks never queue behind large ones.

        ``pieces`` counts the rows of both sides. Called by the planner; one class with all ``slots`` by default.
        """
        return SlotClass("", self.slots(source, target))

    def chunk_limits(self, source: Space, target: Space) -> tuple[int, int] | None:
        """Return (nbytes, rows) that one chunk of a route of this backend alone may have, or None for the daemon's own.

        For backends that move so fast that a chunk of the usual size would cost more to start than to move. A chunk is
        what cancel and deadlines wait for. Called by the planner; must not block.
        """
        return None

    @abc.abstractmethod
    async def move(self, chunk: Chunk) -> int:
        """Move one chunk and return the bytes moved, which equals ``chunk.nbytes``.

        When it returns, raises or is cancelled, **no byte of the chunk moves any more**, here or at the peer;
        it may take as long as it needs to make sure.

        Raises:
            ShortTransfer: fewer bytes could be moved.
            MoveFailed, PeerLost, Stale, PermissionDenied, OutOfBounds: as they say.
        """

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        """Start a chunk without a coroutine and have ``done`` told of its end; None where ``move`` must be used.

        What a chunk of microseconds needs: no task, no future. The runner asks for chunks of one hop that nothing
        encloses, and uses ``move`` for all others; a backend that has both makes ``move`` of it (``begun.py``).

        ``done`` is called on the event loop, exactly once, and never from inside ``begin`` or ``abort``; as with
        ``move``, **no byte of the chunk moves any more** by then. It is told the bytes moved, or the error, which is
        ``Cancelled`` where the chunk was aborted before all had moved. What is no ``XferdError`` is a bug, and logged.
        Where this raises, nothing was started and ``done`` is not called.
        """
        return None

    def move_now(self, source: Extent, target: Extent, agent: str = "") -> Callable[[], int] | None:
        """Return a call that moves all bytes at once, or None where ``move`` must be used; ``agent`` as in a ``Chunk``.

        The call never blocks, takes some 50 us at most, which is what giving it to a thread would take of the event
        loop, and returns the bytes moved, which are all of them; it counts in ``statistics`` as a chunk. It is made
        once for a plan, and called on the event loop as often as the plan is posted, as long as the regions are held.
        Errors as with ``move``. Where the call raises, the bytes are moved by ``move``, which waits for what may be
        under way still.
        """
        return None

    def arrange(self, source: Extent, target: Extent) -> tuple[Extent, Extent]:
        """Return the two sides of a leg in the order in which this backend wants them; both keep their bytes.

        Called by the planner before it cuts chunks, where the backend is the last hop of the leg's first route.

        Raises:
            InvalidArgument: this backend can never move these spans, for example a part of what it writes as a whole.
        """
        return source, target

    def can_flush(self) -> bool:
        """Return whether the commit of a ``durable`` leg puts on the disk what was written to a file.

        If false, nothing that must be durable goes to a file by this backend: the runner takes another route, or fails
        the transfer.
        """
        return False

    def needs_leg(self, target: Space, *, durable: bool) -> bool:
        """Return whether a leg must be opened before chunks move to a space; called for each transfer, must not block.

        ``durable`` as in a ``LegScope``; a backend that cannot flush is not asked for it.
        """
        return self.is_transactional or durable

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        """Begin a leg; called by the runner before its first chunk, where ``needs_leg`` says so. Cancel-safe.

        Raises:
            InvalidArgument: see ``arrange``.
            Others: as ``move`` does.
        """
        raise NotImplementedError(f"{self.name} is not transactional")

    @abc.abstractmethod
    def statistics(self) -> BackendStatistics:
        """Return counters; cheap, called at each scrape."""


# --------------------------------------------------------------------------------------- objects


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a store says of an object. ``modified_at`` is UNIX time."""

    key: str
    nbytes: int
    modified_at: float
    etag: str = ""


class ObjectCatalog(abc.ABC):
    """What can be asked of object stores beside moving bytes. The ``object`` backend is one, as well as a ``Backend``.

    Every method may raise ``NotFound`` (no such store, or bucket), ``PermissionDenied``, ``Unauthenticated``,
    ``InvalidArgument`` (a key that no store takes), ``Overloaded`` and ``MoveFailed``. All are cancel-safe.
    """

    @abc.abstractmethod
    def stores(self) -> tuple[str, ...]:
        """Return the names of the configured stores."""

    @abc.abstractmethod
    def check_writable(self, store: str) -> None:
        """Raise ``PermissionDenied`` where the store is configured to be read only."""

    @abc.abstractmethod
    async def find_object(self, store: str, key: str) -> ObjectFacts | None:
        """Return the facts of an object; None where there is none of this key."""

    @abc.abstractmethod
    async def delete_objects(self, store: str, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are fine. Where it raises, some may be gone."""

    @abc.abstractmethod
    async def list_objects(self, store: str, prefix: str, after: str, limit: int) -> tuple[ObjectFacts, ...]:
        """Return at most ``limit`` objects whose keys begin with ``prefix`` and come after ``after``, in key order."""


# --------------------------------------------------------------------------------------- between nodes


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who is at the other end, after the handshake proved it."""

    node: str
    node_id: str
    epoch: int


class Grant(Protocol):
    """Checked leave for a peer to read or write spans here, held while a lane serves them.

    Used from a lane's thread. The regions cannot be freed while it is open.
    """

    nbytes: int

    def windows(self) -> Iterator[IovTable]:
        """Yield tables of this process's memory that make up the list, in order.

        READ: a window holds the bytes when it is yielded. WRITE: the caller fills a window, and its bytes are in
        place when the iterator is advanced past it. Either step may raise an ``XferdError``.
        """

    def close(self) -> None:
        """Let go of the regions. Twice is fine."""


class PeerHandler(Protocol):
    """What the daemon does for peers; a ``PeerTransport`` calls it."""

    async def handle(self, peer: PeerIdentity, request: peer_pb.PeerRequest) -> peer_pb.PeerReply:
        """Answer a control request, on the event loop. Errors are raised; the transport puts them in the reply."""

    def open_grant(self, peer: PeerIdentity, op: TransferOp, request: peer_pb.DataRequest) -> Grant:
        """Check a data request: epoch, generations, bounds, access, sums. Thread-safe and quick.

        Raises:
            Stale, OutOfBounds, PermissionDenied, InvalidDescriptor, SizeMismatch, Unavailable.
        """

    def peer_connected(self, peer: PeerIdentity) -> None:
        """Be told that the first lane with a peer is up; on the event loop."""

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Be told that the last lane with a peer has gone; on the event loop."""


@dataclass(frozen=True, slots=True)
class PeerLinkStatistics:
    """Lanes and bytes with one peer, both directions."""

    lanes: int = 0
    sent_nbytes: int = 0
    received_nbytes: int = 0


class PeerTransport(abc.ABC):
    """Carries control requests between nodes. The ``tcp`` backend is one, beside being a ``Backend``."""

    @abc.abstractmethod
    async def listen(self, me: NodeInfo, handler: PeerHandler) -> tuple[str, ...]:
        """Accept peers; returns the addresses ("tcp://host:port") under which they reach this node."""

    @abc.abstractmethod
    async def connect(self, address: str, *, name: str = "", epoch: int = 0) -> PeerIdentity:
        """Open the control lane to the node at ``address``; at once if it is open.

        Args:
            address: "tcp://host:port".
            name: the node that must answer; "" takes whoever does.
            epoch: the epoch that it must have; 0 takes any.

        Raises:
            PeerLost: nobody answers in time.
            Unauthenticated: the secrets differ.
            Stale: another epoch, or another node than the one named.
        """

    @abc.abstractmethod
    async def request(self, node: str, request: peer_pb.PeerRequest, *, timeout_s: float) -> peer_pb.PeerReply:
        """Send a control request to a connected node and return its reply; raises what the reply says."""

    @abc.abstractmethod
    async def disconnect(self, node: str, reason: str) -> None:
        """Close all lanes with a node; chunks under way fail with ``PeerLost``."""

    @abc.abstractmethod
    async def wait_quiesced(self, peer: PeerIdentity, transfer_id: str) -> None:
        """Refuse further frames of a peer's transfer, cut the lanes that serve it, return when none does any more.

        Takes as long as a grant's windows take to let go; to bound it is the caller's business.
        """

    @abc.abstractmethod
    def link(self, node: str) -> PeerLinkStatistics:
        """Return the state of the lanes with a node."""
