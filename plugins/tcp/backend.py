"""The ``tcp`` backend: moves chunks between memory here and regions of a connected node.

``transport.py`` keeps the lanes; here is what a chunk does with one, and how it is brought to rest.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import structlog

from xferd.api.errors import LimitExceeded, PeerLost, Stale, XferdError
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.proto import xferd_v1_pb2 as xferd_pb
from xferd.plugins.base import Backend, BackendStatistics, Extent, RemoteSpace, SpaceKind
from xferd.plugins.tcp.client import Exchange
from xferd.plugins.tcp.options import TcpOptions
from xferd.plugins.tcp.transport import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from xferd.plugins.base import Chunk, Space
    from xferd.plugins.tcp.client import ClientLane, LanePool
    from xferd.plugins.tcp.peers import Peer

# Assumed until measured: a round trip through two threads and a loop, one stream of the network, one iovec row.
ROUND_TRIP_S = 300e-6
BYTES_PER_S = 2e9
PIECE_S = 0.2e-6

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
        """Return the number of data lanes to one peer."""
        return self._options.lanes

    def statistics(self) -> BackendStatistics:
        """Return counters of the chunks that this node moved; serving peers does not count."""
        counts = self._counts
        lanes = sum(len(peer.pool.lanes) for peer in self._peers() if peer.pool is not None)
        return BackendStatistics(counts.moved_nbytes, counts.chunks, counts.failures, counts.busy, lanes)

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk over a data lane of the peer, which must be connected.

        Cancelled: the exchange may end within ``abort_grace``, else its lane is cut and the peer is asked to
        confirm that it rests; the cancellation goes on after that.
        """
        is_write = isinstance(chunk.target.space, RemoteSpace)
        remote, local = (chunk.target, chunk.source) if is_write else (chunk.source, chunk.target)
        assert isinstance(remote.space, RemoteSpace)
        peer, pool = self._peer_of(remote.space)
        exchange = Exchange(_request_for(chunk, remote, peer.identity.epoch, is_write=is_write), local.iov, is_write)
        self._counts.busy += 1
        try:
            lane = await pool.acquire()
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

    def _peer_of(self, space: RemoteSpace) -> tuple[Peer, LanePool]:
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
        return peer, peer.pool

    async def _exchange(self, peer: Peer, lane: ClientLane, exchange: Exchange) -> int:
        _check_limits(lane, exchange)
        result = lane.submit(exchange)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            await self._see_through(self._bring_to_rest(peer, lane, result, exchange))
            raise
        except XferdError:
            # The lane broke, and the peer may still be writing what it had received.
            must_ask = exchange.is_write and not lane.is_good
            if must_ask and await self._see_through(self._quiesce_peer(peer, exchange)):
                raise asyncio.CancelledError from None
            raise

    async def _bring_to_rest(
        self, peer: Peer, lane: ClientLane, result: asyncio.Future[int], exchange: Exchange
    ) -> None:
        await asyncio.wait([result], timeout=self._options.abort_grace)
        if not result.done():
            lane.abort("the chunk was cancelled")
            await asyncio.wait([result])  # its calls end at once: the socket is shut down
        result.exception()  # the chunk was cancelled, so that nobody else asks how it ended
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


def _request_for(chunk: Chunk, remote: Extent, epoch: int, *, is_write: bool) -> pb.DataRequest:
    assert remote.region is not None
    return pb.DataRequest(
        transfer_id=chunk.transfer_id,
        cause_id=chunk.cause_id,
        op=xferd_pb.TRANSFER_OP_WRITE if is_write else xferd_pb.TRANSFER_OP_READ,
        epoch=epoch,
        region=remote.region.astype("<u8", copy=False).tobytes(),
        offset=remote.iov[:, 0].astype("<u8", copy=False).tobytes(),
        nbytes=remote.iov[:, 1].astype("<u8", copy=False).tobytes(),
        total_nbytes=chunk.nbytes,
        agent=chunk.agent,
    )


def _check_limits(lane: ClientLane, exchange: Exchange) -> None:
    """Refuse here what the peer would refuse by ending the lane."""
    rows, total = len(exchange.request.offset) // 8, exchange.request.total_nbytes
    if rows > lane.limits.max_descriptors:
        raise LimitExceeded(
            f"a chunk has {rows} rows at node {lane.peer.node!r}",
            limit=f"{lane.limits.max_descriptors}, set there by backends.tcp.max_descriptors",
            remedy="lower transfers.max_pieces here",
        )
    if exchange.is_write and total > lane.limits.max_payload_nbytes:
        raise LimitExceeded(
            f"a chunk of {total} bytes for node {lane.peer.node!r}",
            limit=f"{lane.limits.max_payload_nbytes}, set there by backends.tcp.max_frame",
            remedy="lower transfers.chunk here",
        )
