"""The ``ucx`` backend: moves chunks between memory here and regions of a connected node, over UCX.

Requests go over the control lane of the ``PeerTransport``, which has proved who the peer is; UCX carries payload only.
Here is what a chunk does and how it is brought to rest; ``serving.py`` is the other side, ``worker.py`` the thread.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

import structlog

from xferd.api.errors import Closed, LimitExceeded, PeerLost, ProtocolViolation, Unsupported, XferdError
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.base import Backend, BackendStatistics, RemoteSpace, SpaceKind
from xferd.plugins.fabric import PeerService
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.ucx import library
from xferd.plugins.ucx.links import Links
from xferd.plugins.ucx.moving import Moving
from xferd.plugins.ucx.options import UcxOptions
from xferd.plugins.ucx.serving import Serving
from xferd.plugins.ucx.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from xferd.api.types import NodeInfo
    from xferd.plugins.base import Chunk, PeerHandler, PeerIdentity, PeerTransport, Space
    from xferd.plugins.ucx.links import Link

# Assumed until measured: two questions over the control lane, one row of a scatter list.
ROUND_TRIPS_S = 600e-6
PIECE_S = 0.2e-6
LONGEST_CHUNK_S = 3600.0
"""A chunk ends by its transfer's deadline, by the peer's end or by its own; this only bounds a wait of the lane."""

log = structlog.get_logger("xferd.ucx")


class UcxBackend(Backend, PeerService):
    """Moves MAPPED to and from REMOTE as tagged messages whose memory is a scatter list on either side."""

    name: ClassVar[str] = "ucx"
    options: ClassVar[type[UcxOptions]] = UcxOptions
    verbs: ClassVar[frozenset[str]] = frozenset({"ucx_open", "ucx_move", "ucx_pull", "ucx_abort"})

    def __init__(self, options: UcxOptions) -> None:
        self._options = options
        self._counter = MoveCounter()
        self._movers = MoverPool(f"{self.name}-serve", options.servers)
        self._worker: Worker | None = None
        self._links: Links | None = None
        self._serving: Serving | None = None
        self._transport: PeerTransport | None = None
        self._epoch = 0
        self._moving: dict[int, Moving] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._is_closed = False

    # ------------------------------------------------------------------------------------- Backend

    async def start(self) -> None:
        """Load UCX and open its devices. Raises ``Unsupported`` or ``ConfigError`` where that fails."""
        ucp = library.load(self._options.library)
        self._worker = Worker(
            ucp,
            self._options.ucx_settings(),
            spin_us=self._options.spin_us,
            patience_s=self._options.quiesce_timeout,
        )
        log.info("ucx started", version=ucp.version, library=ucp.path, transports=self._options.transports or "all")

    async def aclose(self) -> None:
        """Cut all endpoints, wait until nothing moves, end all threads. Twice is fine."""
        self._is_closed = True
        if self._links is not None:
            await self._links.aclose("the node is stopping")
        if self._serving is not None:
            await self._serving.aclose()
        await self._quiet.wait()
        await self._movers.aclose()
        if self._worker is not None:
            worker, self._worker = self._worker, None
            await asyncio.to_thread(worker.stop)

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return memory here to regions there, and back."""
        return frozenset({(SpaceKind.MAPPED, SpaceKind.REMOTE), (SpaceKind.REMOTE, SpaceKind.MAPPED)})

    def refusal(self, source: Space, target: Space) -> str:
        """Return why not: not this pair, no transport, or a peer that has no ucx backend."""
        reason = super().refusal(source, target)
        if reason:
            return reason
        if self._links is None:
            return "needs the tcp backend, which carries its requests: configure [backends.tcp]"
        remote = target if isinstance(target, RemoteSpace) else source
        assert isinstance(remote, RemoteSpace)
        return self._links.refusal(remote)

    def manner(self, source: Space, target: Space) -> str:
        """Return the transports that UCX may use, where they are configured."""
        return self._options.transports

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a guess for a fabric of ``backends.ucx.bandwidth``."""
        return ROUND_TRIPS_S + nbytes / self._options.bandwidth + pieces * PIECE_S

    def slots(self, source: Space, target: Space) -> int:
        """Return the number of chunks at once with one peer."""
        return self._options.slots

    def statistics(self) -> BackendStatistics:
        """Return counters of the chunks that this node moved; serving peers does not count."""
        return self._counter.snapshot(self._options.slots)

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk. Cancelled or failed, it is brought to rest on both sides before this returns."""
        is_write = isinstance(chunk.target.space, RemoteSpace)
        remote = chunk.target if is_write else chunk.source
        assert isinstance(remote.space, RemoteSpace)
        links = self._at_work()
        self._quiet.clear()
        try:
            with self._counter.moving(chunk.nbytes):
                async with links.peer(remote.space.node).free:
                    link = await links.get(remote.space, chunk.cause_id)
                    try:
                        return await self._move(chunk, link, is_write=is_write)
                    except PeerLost as exc:
                        # An endpoint may be cut while its peer lives: for the sake of another chunk, at either end.
                        log.info("chunk moves again", peer=link.node, cause_id=chunk.cause_id, reason=exc.message)
                        links.cut(link, exc.message)
                    link = await links.get(remote.space, chunk.cause_id)  # raises if the peer itself has gone
                    return await self._move(chunk, link, is_write=is_write)
        finally:
            if not self._counter.busy:
                self._quiet.set()

    # ------------------------------------------------------------------------------------- PeerService

    def attach(self, me: NodeInfo, transport: PeerTransport, handler: PeerHandler) -> None:
        """Take up what carries requests, and who opens grants."""
        assert self._worker is not None, "attached before it was started"
        self._epoch = me.epoch
        self._transport = transport
        self._links = Links(self._worker, self._options, transport)
        self._serving = Serving(self._worker, self._movers, self._options, transport, handler)

    async def serve(self, peer: PeerIdentity, request: pb.PeerRequest) -> pb.PeerReply:
        """Answer a peer's request; its errors are raised."""
        self._at_work()
        assert self._serving is not None
        assert self._worker is not None
        match request.WhichOneof("request"):
            case "ucx_open":
                await self._serving.open(peer, request.ucx_open.address)
                opened = pb.UcxOpened(
                    address=self._worker.address, epoch=self._epoch, max_descriptors=self._options.max_descriptors
                )
                return pb.PeerReply(ucx_opened=opened)
            case "ucx_move":
                return pb.PeerReply(ucx_moved=await self._serving.move(peer, request.ucx_move))
            case "ucx_pull":
                self._pull(peer, request.ucx_pull)
            case "ucx_abort":
                await self._serving.abort(peer, request.ucx_abort.id)
        return pb.PeerReply(done=pb.Done())

    async def quiesce(self, peer: PeerIdentity, transfer_id: str) -> None:
        """Refuse a peer's transfer from now on, and return when no byte of it moves here any more."""
        if self._serving is not None:
            await self._serving.quiesce(peer, transfer_id)

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Cut the endpoints with a peer."""
        if self._links is not None:
            self._links.peer_lost(peer, reason)
        if self._serving is not None:
            self._serving.peer_lost(peer, reason)

    # ------------------------------------------------------------------------------------- a chunk

    def _at_work(self) -> Links:
        if self._is_closed:
            raise Closed("the ucx backend is closed")
        if self._links is None:
            raise Unsupported("the ucx backend has no transport for its requests", remedy="configure [backends.tcp]")
        return self._links

    def _pull(self, peer: PeerIdentity, ask: pb.UcxPull) -> None:
        moving = self._moving.get(ask.id)
        if moving is None or moving.endpoint.node != peer.node:
            raise ProtocolViolation(f"node {peer.node!r} asks for bytes of a chunk that is not under way")
        assert self._worker is not None
        moving.send(self._worker, ask.tag, ask.nbytes)

    async def _move(self, chunk: Chunk, link: Link, *, is_write: bool) -> int:
        remote, local = (chunk.target, chunk.source) if is_write else (chunk.source, chunk.target)
        rows = max(len(remote.iov), len(local.iov))
        if rows > link.max_descriptors:
            raise LimitExceeded(
                f"a chunk has {rows} rows",
                limit=f"{link.max_descriptors}, set at node {link.node!r} by backends.ucx.max_descriptors",
                remedy="lower transfers.max_pieces here",
            )
        moving = Moving(chunk, remote, local, link.endpoint, link.epoch, is_write=is_write)
        self._moving[moving.id] = moving
        try:
            return await self._exchange(moving, link, chunk.cause_id)
        except (XferdError, asyncio.CancelledError) as exc:
            moving.give_up()
            was_cancelled = await self._see_through(self._bring_to_rest(moving, link, chunk.cause_id))
            if was_cancelled and not isinstance(exc, asyncio.CancelledError):
                raise asyncio.CancelledError from None
            raise
        finally:
            del self._moving[moving.id]

    async def _exchange(self, moving: Moving, link: Link, cause_id: str) -> int:
        assert self._transport is not None
        assert self._worker is not None
        if not moving.is_write:
            moving.receive(self._worker)
        ask = pb.PeerRequest(cause_id=cause_id, ucx_move=moving.request)
        asking = asyncio.get_running_loop().create_task(
            self._transport.request(link.node, ask, timeout_s=LONGEST_CHUNK_S), name=f"xferd-ucx-ask-{link.node}"
        )
        ends: tuple[asyncio.Future[pb.PeerReply], asyncio.Future[None]] = asking, moving.ended
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                await moving.ended  # raises if it has failed; else the answer is on its way
            reply = await asking
            await moving.ended
        finally:
            asking.cancel()
            await asyncio.wait([asking])
            if not asking.cancelled():
                asking.exception()  # told above, or the chunk had failed before
        return moving.check(reply.ucx_moved)

    async def _bring_to_rest(self, moving: Moving, link: Link, cause_id: str) -> None:
        """Return when no byte of a chunk moves any more, here and, if it can be asked, at the peer."""
        assert self._worker is not None
        if moving.is_write:  # what the peer has asked for finds its place there, if it is not told to stop before
            await moving.wait_rest(self._options.abort_grace)
        is_sure = await self._abort_there(moving, link, cause_id)
        moving.cancel(self._worker)
        if is_sure and await moving.wait_rest(self._options.abort_grace):
            return
        assert self._links is not None
        self._links.cut(link, "a chunk of it would not come to rest")
        await moving.wait_rest(None)

    async def _abort_there(self, moving: Moving, link: Link, cause_id: str) -> bool:
        """Return whether the peer confirms that it moves no byte of the chunk any more."""
        assert self._transport is not None
        ask = pb.PeerRequest(cause_id=cause_id, ucx_abort=pb.UcxAbort(id=moving.id))
        try:
            await self._transport.request(link.node, ask, timeout_s=self._options.quiesce_timeout)
        except PeerLost:
            return False  # it has noticed too, or is gone
        except XferdError as exc:
            log.warning("peer does not confirm that a chunk rests", peer=link.node, cause_id=cause_id, error=str(exc))
            return False
        return True

    async def _see_through(self, work: Coroutine[object, object, None]) -> bool:
        """Await ``work`` to its end whatever happens; return whether a cancellation came meanwhile."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name="xferd-ucx-rest")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        was_cancelled = False
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                was_cancelled = True
        return was_cancelled
