"""Endpoints that this node opened to peers: one to each, opened when first needed and again after it was cut."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xferd.api.errors import Closed, InternalError, ProtocolViolation, Stale, Unsupported
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.ucx.messages import Endpoint

if TYPE_CHECKING:
    from xferd.plugins.base import PeerIdentity, PeerTransport, RemoteSpace
    from xferd.plugins.ucx.options import UcxOptions
    from xferd.plugins.ucx.worker import Worker


@dataclass(slots=True, eq=False)
class Link:
    """A peer at one epoch, with our endpoint to it."""

    node: str
    epoch: int
    endpoint: Endpoint
    max_descriptors: int


@dataclass(slots=True, eq=False)
class _Peer:
    free: asyncio.Semaphore
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    link: Link | None = None
    refusal: tuple[int, str] = (0, "")  # at which epoch, and why


class Links:
    """All links of this node, on the event loop."""

    def __init__(self, worker: Worker, options: UcxOptions, transport: PeerTransport) -> None:
        self._worker = worker
        self._options = options
        self._transport = transport
        self._peers: dict[str, _Peer] = {}
        self._opening: set[asyncio.Task[Link]] = set()

    def peer(self, node: str) -> _Peer:
        """Return the entry of a node, made when first asked for."""
        known = self._peers.get(node)
        if known is None:
            known = self._peers[node] = _Peer(asyncio.Semaphore(self._options.slots))
        return known

    def refusal(self, space: RemoteSpace) -> str:
        """Return why a node is not reached by UCX, as far as it is known, or ""."""
        known = self._peers.get(space.node)
        if known is None or not known.refusal[1] or (space.epoch and known.refusal[0] != space.epoch):
            return ""
        return known.refusal[1]

    async def get(self, space: RemoteSpace, cause_id: str) -> Link:
        """Return a good link to a node, which must be connected.

        Raises:
            PeerLost, DeadlineExceeded: it is not, or does not answer.
            Unsupported: it has no ucx backend.
            Stale: it is at another epoch.
            Closed: the backend was closed meanwhile.
        """
        peer = self.peer(space.node)
        if (link := _good(peer.link, space)) is not None:
            return link
        # Who asks may be cancelled, the opening is not: the peer has connected back to us then, and UCX gives the
        # next endpoint what is left of the one that nobody took.
        opening = asyncio.get_running_loop().create_task(
            self._get(peer, space, cause_id), name=f"xferd-ucx-open-{space.node}"
        )
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if opening.cancelled() and me is not None and not me.cancelling():
                raise Closed("the ucx backend is closed") from None
            raise

    def _opened(self, opening: asyncio.Task[Link]) -> None:
        self._opening.discard(opening)
        if not opening.cancelled():
            opening.exception()  # who asked for it may have gone

    async def _get(self, peer: _Peer, space: RemoteSpace, cause_id: str) -> Link:
        async with peer.opening:
            link = _good(peer.link, space)
            if link is None:
                if peer.link is not None:
                    self._worker.close(peer.link.endpoint, "another one is opened")
                    await peer.link.endpoint.closed()
                peer.link = link = await self._open(peer, space, cause_id)
        return link

    async def _open(self, peer: _Peer, space: RemoteSpace, cause_id: str) -> Link:
        ask = pb.PeerRequest(cause_id=cause_id, ucx_open=pb.UcxOpen(address=self._worker.address))
        try:
            reply = await self._transport.request(space.node, ask, timeout_s=self._options.connect_timeout)
        except (ProtocolViolation, Unsupported) as exc:
            peer.refusal = (space.epoch, f"node {space.node!r} has no ucx backend")
            raise Unsupported(
                peer.refusal[1], remedy=f"configure [backends.ucx] on {space.node!r}, or pin another backend"
            ) from exc
        opened = reply.ucx_opened
        if space.epoch and opened.epoch != space.epoch:
            raise Stale(
                f"node {space.node!r} has epoch {opened.epoch}, the regions are of epoch {space.epoch}",
                remedy="the node has restarted: ask for its regions again",
            )
        if not opened.address:
            raise InternalError(f"node {space.node!r} opened an endpoint and told no address")
        peer.refusal = (0, "")
        endpoint = Endpoint(space.node, opened.address)
        self._worker.connect(endpoint)
        return Link(space.node, opened.epoch, endpoint, opened.max_descriptors)

    def cut(self, link: Link, reason: str) -> None:
        """Cut a link; what moves by it ends. The next ``get`` opens another."""
        self._worker.close(link.endpoint, reason)

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Cut the link to a peer that is no longer connected."""
        known = self._peers.get(peer.node)
        if known is not None and known.link is not None and known.link.epoch == peer.epoch:
            self.cut(known.link, reason)

    async def aclose(self, reason: str) -> None:
        """Cut all links, and open no more."""
        for opening in self._opening:
            opening.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        for peer in self._peers.values():
            if peer.link is not None:
                self.cut(peer.link, reason)


def _good(link: Link | None, space: RemoteSpace) -> Link | None:
    if link is None or link.endpoint.failure or (space.epoch and link.epoch != space.epoch):
        return None
    return link
