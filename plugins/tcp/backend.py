"""The ``tcp`` backend: moves chunks between memory here and regions of a connected node.

``transport.py`` keeps the lanes, ``flight.py`` is what becomes of a chunk that was given to one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from xferd.api.errors import PeerLost, Stale, XferdError
from xferd.plugins.base import Backend, BackendStatistics, RemoteSpace, SlotClass, SpaceKind
from xferd.plugins.begun import told
from xferd.plugins.movers import MoveCounter
from xferd.plugins.tcp.exchange import Exchange
from xferd.plugins.tcp.flight import Flight
from xferd.plugins.tcp.options import TcpOptions
from xferd.plugins.tcp.transport import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.plugins.base import Begun, Chunk, Extent, Space
    from xferd.plugins.tcp.lanes import Lane, LanePool
    from xferd.plugins.tcp.peers import Peer

# Assumed until measured: a round trip through two threads and a loop, one stream of the network, one iovec row.
ROUND_TRIP_S = 300e-6
BYTES_PER_S = 2e9
PIECE_S = 0.2e-6
SMALL_PIECES = 256
"""Most rows, of both sides together, of a small chunk: more of them take longer to look through than to send."""


class TcpBackend(TcpTransport, Backend):
    """Moves MAPPED to and from REMOTE over data lanes, with no staging copy.

    Each lane has a blocking socket and a thread (``xferd-tcp-<node>-<n>``), because a vectored system call with the
    GIL released moves a thousand blocks, where a selector would come back to the interpreter for each full buffer.
    """

    name: ClassVar[str] = "tcp"
    options: ClassVar[type[TcpOptions]] = TcpOptions

    def __init__(self, options: TcpOptions) -> None:
        super().__init__(options)
        self._counter = MoveCounter()

    async def start(self) -> None:
        """Read the cluster secret. Raises ``ConfigError`` where there is none."""
        self._open()

    async def aclose(self) -> None:
        """Say goodbye to all peers, end all lanes and threads. Twice is fine."""
        await self._close("the node is stopping")

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return memory here to regions there, and back."""
        return frozenset({(SpaceKind.MAPPED, SpaceKind.REMOTE), (SpaceKind.REMOTE, SpaceKind.MAPPED)})

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a guess for a fast network."""
        return ROUND_TRIP_S + nbytes / BYTES_PER_S + pieces * PIECE_S

    def slots(self, source: Space, target: Space) -> int:
        """Return how many chunks the bulk lanes to one peer take, moving or next in line."""
        return self._options.lanes * self._options.depth

    def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
        """Return "small" for what goes over the small lanes: it never waits for a slot behind bulk chunks."""
        if self._is_small(nbytes, pieces):
            return SlotClass("small", self._options.small_lanes)
        return SlotClass("", self.slots(source, target))

    def _is_small(self, nbytes: int, pieces: int) -> bool:
        return bool(self._options.small_lanes) and nbytes <= self._options.small and pieces <= SMALL_PIECES

    def statistics(self) -> BackendStatistics:
        """Return counters of the chunks that this node moved; serving peers does not count."""
        return self._counter.snapshot(sum(len(pool.lanes) for peer in self._peers() for pool in peer.pools))

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk over a data lane of the peer, which must be connected; cancelled, it rests when it raises."""
        peer, pool = self._way(chunk)
        try:
            lane = await pool.acquire(chunk.transfer_id)
        except XferdError:
            self._counter.failures += 1
            raise
        return await told(functools.partial(self._fly, chunk, peer, pool, lane))

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        """Give a chunk to a lane, where one is at hand; a lane is waited for, or opened, by ``move``."""
        peer, pool = self._way(chunk)
        lane = pool.take(chunk.transfer_id)
        return None if lane is None else self._fly(chunk, peer, pool, lane, done)

    def _way(self, chunk: Chunk) -> tuple[Peer, LanePool]:
        """Return the peer of a chunk, and the lanes that are for such a one."""
        remote = _remote_of(chunk)
        assert isinstance(remote.space, RemoteSpace)
        peer = self._peer_of(remote.space)
        pool = peer.small if self._is_small(chunk.nbytes, len(chunk.source.iov) + len(chunk.target.iov)) else peer.pool
        assert pool is not None
        return peer, pool

    def _fly(
        self, chunk: Chunk, peer: Peer, pool: LanePool, lane: Lane, done: Callable[[int | Exception], None]
    ) -> Flight:
        remote = _remote_of(chunk)
        is_write = remote is chunk.target
        local = chunk.source if is_write else chunk.target
        exchange = Exchange.of(chunk, remote, local, peer.identity.epoch, is_write=is_write)
        try:
            exchange.check(lane.limits, peer.identity.node)
        except XferdError:
            pool.release(lane)
            self._counter.failures += 1
            raise
        return Flight(peer, pool, lane, exchange, done, options=self._options, counter=self._counter, tasks=self._tasks)

    def _peer_of(self, space: RemoteSpace) -> Peer:
        peer = self._connected(space.node)
        if space.epoch and space.epoch != peer.identity.epoch:
            raise Stale(
                f"node {space.node!r} has epoch {peer.identity.epoch}, the regions are of epoch {space.epoch}",
                remedy="the node has restarted: ask for its regions again",
            )
        if peer.pool is None or peer.dialled is None:
            raise PeerLost(
                f"node {space.node!r} has called us, and we have not called it", remedy="connect to it first"
            )
        return peer

    def _peers(self) -> list[Peer]:
        return self._home.peers.all() if self._home is not None else []


def _remote_of(chunk: Chunk) -> Extent:
    return chunk.target if isinstance(chunk.target.space, RemoteSpace) else chunk.source
