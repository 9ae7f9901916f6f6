"""The ``tcp`` backend: moves chunks between memory here and regions of a connected node.

``transport.py`` keeps the lanes; here is what a chunk does with one, and how it is brought to rest.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import structlog

from xferd.api.errors import PeerLost, Stale, XferdError
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.base import Backend, BackendStatistics, RemoteSpace, SlotClass, SpaceKind
from xferd.plugins.tcp.exchange import Exchange
from xferd.plugins.tcp.options import TcpOptions
from xferd.plugins.tcp.transport import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from xferd.plugins.base import Chunk, Space
    from xferd.plugins.tcp.lanes import Lane, Ticket
    from xferd.plugins.tcp.peers import Peer

# Assumed until measured: a round trip through two threads and a loop, one stream of the network, one iovec row.
ROUND_TRIP_S = 300e-6
BYTES_PER_S = 2e9
PIECE_S = 0.2e-6
SMALL_PIECES = 256
"""Most rows, of both sides together, of a small chunk: more of them take longer to look through than to send."""

log = structlog.get_logger("xferd.tcp")


class TcpBackend(TcpTransport, Backend):
    """Moves MAPPED to and from REMOTE over data lanes, with no staging copy.

    Each lane has a blocking socket and a thread (``xferd-tcp-<node>-<n>``), because a vectored system call with the
    GIL released moves a thousand blocks, where a selector would come back to the interpreter for each full buffer.
    """

    name: ClassVar[str] = "tcp"
    options: ClassVar[type[TcpOptions]] = TcpOptions

    def __init__(self, options: TcpOptions) -> None:
        super().__init__(options)
        self._counts = _Counts()

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
        counts = self._counts
        lanes = sum(len(pool.lanes) for peer in self._peers() for pool in peer.pools)
        return BackendStatistics(counts.moved_nbytes, counts.chunks, counts.failures, counts.busy, lanes)

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk over a data lane of the peer, which must be connected.

        Cancelled before the lane began it, nothing happens. Else the exchange may end within ``abort_grace``, or its
        lane is cut and the peer is asked to confirm that it rests; the cancellation goes on after that.
        """
        is_write = isinstance(chunk.target.space, RemoteSpace)
        remote, local = (chunk.target, chunk.source) if is_write else (chunk.source, chunk.target)
        assert isinstance(remote.space, RemoteSpace)
        peer = self._peer_of(remote.space)
        is_small = self._is_small(chunk.nbytes, len(remote.iov) + len(local.iov))
        pool = peer.small if is_small else peer.pool
        assert pool is not None
        exchange = Exchange.of(chunk, remote, local, peer.identity.epoch, is_write=is_write)
        self._counts.busy += 1
        try:
            lane = await pool.acquire(chunk.transfer_id)
            try:
                moved = await self._exchange(peer, lane, exchange)
            finally:
                pool.release(lane)
        except XferdError:
            self._counts.failures += 1
            raise
        finally:
            self._counts.busy -= 1
        self._counts.chunks += 1
        self._counts.moved_nbytes += moved
        return moved

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

    async def _exchange(self, peer: Peer, lane: Lane, exchange: Exchange) -> int:
        exchange.check(lane.limits, peer.identity.node)
        ticket = lane.submit(exchange)
        try:
            return await ticket.result
        except asyncio.CancelledError:
            if not ticket.result.cancelled():
                ticket.result.exception()  # it ended as we were cancelled, and nobody else asks how
            if ticket.claim():
                raise  # the lane has not begun it, and will not
            await self._see_through(self._bring_to_rest(peer, lane, ticket, exchange))
            raise
        except XferdError:
            # The lane broke, and the peer may still be writing what it had received.
            must_ask = exchange.is_write and not lane.is_good
            if must_ask and await self._see_through(self._quiesce_peer(peer, exchange)):
                raise asyncio.CancelledError from None
            raise

    async def _bring_to_rest(self, peer: Peer, lane: Lane, ticket: Ticket, exchange: Exchange) -> None:
        await asyncio.wait([ticket.rest], timeout=self._options.abort_grace)
        if not ticket.rest.done():
            lane.abort("the chunk was cancelled")
            await asyncio.wait([ticket.rest])  # its calls end at once: the socket is shut down
        if not lane.is_good:
            await self._quiesce_peer(peer, exchange)

    async def _quiesce_peer(self, peer: Peer, exchange: Exchange) -> None:
        """Return when the peer confirms that it moves no byte of the transfer any more, or cannot be asked."""
        control = peer.control
        if control is None:
            return
        transfer_id, cause_id = exchange.request.transfer_id, exchange.request.cause_id
        request = pb.PeerRequest(cause_id=cause_id, quiesce=pb.Quiesce(transfer_id=transfer_id))
        try:
            await control.request(request, self._options.quiesce_timeout)
        except PeerLost:
            pass  # it serves nothing of a node whose lanes have gone
        except XferdError as exc:
            log.warning(
                "peer does not confirm that a transfer rests",
                peer=peer.identity.node,
                transfer=transfer_id,
                cause_id=cause_id,
                error=str(exc),
            )

    async def _see_through(self, work: Coroutine[object, object, None]) -> bool:
        """Await ``work`` to its end whatever happens; return whether a cancellation came meanwhile."""
        task = self._tasks.spawn(work, "xferd-tcp-rest")
        was_cancelled = False
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                was_cancelled = True
        return was_cancelled

    def _peers(self) -> list[Peer]:
        return self._home.peers.all() if self._home is not None else []


@dataclass(slots=True)
class _Counts:
    moved_nbytes: int = 0
    chunks: int = 0
    failures: int = 0
    busy: int = 0
