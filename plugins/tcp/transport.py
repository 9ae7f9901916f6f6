"""The ``PeerTransport`` over TCP: accepts and dials peers, and keeps their lanes.

Handshakes and control lanes run on the event loop; each data lane has a thread of its own (``client.py``,
``server.py``). Moving chunks over the lanes is in ``backend.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from xferd.api import wire
from xferd.api.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    InvalidState,
    Overloaded,
    PeerLost,
    Unauthenticated,
    XferdError,
)
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.timeouts import timeout
from xferd.plugins.base import PeerIdentity, PeerLinkStatistics, PeerTransport
from xferd.plugins.tcp import sockets
from xferd.plugins.tcp.client import ClientLane
from xferd.plugins.tcp.control import ControlLane
from xferd.plugins.tcp.exchange import PeerLimits
from xferd.plugins.tcp.frames import FrameType
from xferd.plugins.tcp.handshake import ClientHandshake, Expectation, ServerHandshake
from xferd.plugins.tcp.lanes import LanePool
from xferd.plugins.tcp.options import Address, read_secret
from xferd.plugins.tcp.peers import Peer, PeerTable
from xferd.plugins.tcp.server import ServedLane, ServingTable
from xferd.plugins.tcp.small import SmallLane
from xferd.plugins.tcp.tasks import TaskOwner

if TYPE_CHECKING:
    from xferd.api.types import NodeInfo
    from xferd.plugins.base import PeerHandler
    from xferd.plugins.tcp.options import TcpOptions

ACCEPT_RETRY_S = 0.2
"""Pause after a failed accept (no descriptors left, usually): nothing tells when one is free again."""

log = structlog.get_logger("xferd.tcp")


class TcpTransport(PeerTransport):
    """Lanes to and from peers. ``refusals`` counts refused callers by error code."""

    def __init__(self, options: TcpOptions) -> None:
        self._options = options
        self.refusals: Counter[str] = Counter()
        self._secret = b""
        self._tasks = TaskOwner()
        self._serving = ServingTable()
        self._home: _Home | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes = 0
        self._served: Counter[str] = Counter()  # data lanes by peer
        self._threads: set[ClientLane | ServedLane] = set()
        self._controls: set[asyncio.Task[None]] = set()
        self._dials: dict[str, tuple[Expectation, asyncio.Task[PeerIdentity]]] = {}
        self._numbers = itertools.count(1)
        self._is_closed = False

    # ------------------------------------------------------------------------------------- life

    def _open(self) -> None:
        """Read and check what is needed before the first peer."""
        sockets.check_congestion(self._options.congestion)
        self._secret = self._secret or read_secret(self._options.secret_file)

    async def _close(self, reason: str) -> None:
        """Say goodbye, end all lanes and threads. Twice is fine."""
        self._is_closed = True
        if self._accepting is not None:  # must have left the socket before that is closed
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
        if self._home is not None:
            for peer in self._home.peers.all():
                self._home.peers.drop(peer, reason, goodbye=True)
        await self._tasks.aclose()
        if self._controls:
            await asyncio.wait(self._controls)
        for lane in self._threads:
            lane.abort(reason)
        if self._threads:
            await asyncio.wait([lane.left for lane in self._threads], timeout=self._options.quiesce_timeout)
        for lane in self._threads:
            log.error("thread does not stop", thread=lane.thread.name, peer=lane.peer.node)

    def _at_home(self) -> _Home:
        if self._is_closed:
            raise Closed("the tcp backend is closed")
        if self._home is None:
            raise InvalidState("the tcp transport does not know its node yet", remedy="call listen first")
        return self._home

    # ---------------------------------------------------------------------------- PeerTransport

    async def listen(self, me: NodeInfo, handler: PeerHandler) -> tuple[str, ...]:
        """Take up this node's identity and, where ``listen`` is configured, accept peers."""
        if self._home is not None:
            raise InvalidState("the tcp transport listens already")
        identity = PeerIdentity(me.name, me.id, me.epoch)
        self._open()
        self._home = _Home(identity, handler, PeerTable(identity.node, handler, self._serving))
        if not self._options.listen:
            return ()
        wanted = Address.parse(self._options.listen)
        try:
            self._listener = await sockets.listen(wanted, self._options)
        except OSError as exc:
            raise ConfigError(f"cannot listen at {wanted}: {exc.strerror}", remedy="set backends.tcp.listen") from exc
        bound = Address(wanted.host, self._listener.getsockname()[1])
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener), name="xferd-tcp-accept")
        return (str(self._advertised(bound)),)

    def _advertised(self, bound: Address) -> Address:
        if self._options.advertise:
            return Address.parse(self._options.advertise)
        is_wildcard = bound.host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
        return Address(socket.gethostname(), bound.port) if is_wildcard else bound

    async def connect(self, address: str, *, name: str = "", epoch: int = 0) -> PeerIdentity:
        """Open the control lane to the node at ``address``; calls at once share one connection attempt."""
        target, expected = Address.parse(address), Expectation(name, epoch)
        key = str(target)
        while True:
            peer = self._at_home().peers.at(key)
            if peer is not None:
                expected.check(peer.identity)
                return peer.identity
            under_way = self._dials.get(key)
            if under_way is not None and under_way[0] != expected:
                await asyncio.wait([under_way[1]])  # it may bring what we want, or not
                continue
            if under_way is None:
                task = self._tasks.spawn(self._dial_control(target, expected), f"xferd-tcp-connect-{key}")
                self._dials[key] = under_way = (expected, task)
                task.add_done_callback(lambda _: self._dials.pop(key, None))
            # Others may wait for it too, so a cancelled caller leaves it running; connect_timeout bounds it.
            return await asyncio.shield(under_way[1])

    async def request(self, node: str, request: pb.PeerRequest, *, timeout_s: float) -> pb.PeerReply:
        """Send a control request and return its reply, over whichever control lane there is."""
        control = self._connected(node).control
        assert control is not None
        return await control.request(request, timeout_s)

    async def disconnect(self, node: str, reason: str) -> None:
        """Say goodbye to a node and close all lanes with it; nothing happens where there are none."""
        peers = self._at_home().peers
        peer = peers.get(node)
        if peer is not None:
            peers.drop(peer, reason, goodbye=True)

    async def wait_quiesced(self, peer: PeerIdentity, transfer_id: str) -> None:
        """Refuse a peer's transfer from now on; return when no lane serves it any more.

        Takes as long as a grant's windows take to let go; to bound it is the caller's business.
        """
        while not self._serving.quiesce(peer, transfer_id):
            left = [lane.left for lane in self._serving.lanes(peer, transfer_id)]
            if left:  # they were cut, so they leave
                await asyncio.wait(left)

    def link(self, node: str) -> PeerLinkStatistics:
        """Return the lanes and bytes with a node, zeros where it is not connected."""
        peer = self._home.peers.get(node) if self._home is not None else None
        return peer.link() if peer is not None else PeerLinkStatistics()

    def _connected(self, node: str) -> Peer:
        peer = self._at_home().peers.get(node)
        if peer is None:
            raise PeerLost(f"node {node!r} is not connected", remedy="connect to it first")
        return peer

    # ---------------------------------------------------------------------------------- dialling

    async def _dial(
        self, address: Address, lane: pb.LaneKind.ValueType, expected: Expectation
    ) -> tuple[socket.socket, PeerIdentity, pb.Welcome]:
        try:
            async with timeout(self._options.connect_timeout):
                sock = await sockets.dial(address, self._options)
                try:
                    sockets.tune(sock, self._options, is_data=lane == pb.LANE_KIND_DATA)
                    shaking = ClientHandshake(self._secret, self._at_home().me, lane, expected)
                    await sockets.send_message(sock, FrameType.HELLO, shaking.hello())
                    challenge = await sockets.receive_message(sock, FrameType.CHALLENGE, pb.Challenge)
                    proof, identity = shaking.answer(challenge)
                    await sockets.send_message(sock, FrameType.PROOF, proof)
                    welcome = await sockets.receive_message(sock, FrameType.WELCOME, pb.Welcome)
                except XferdError as exc:
                    await sockets.refuse(sock, exc)
                    raise
                except BaseException:  # cancelled or out of time: nothing may be left open
                    sock.close()
                    raise
                return sock, identity, welcome
        except TimeoutError as exc:
            raise PeerLost(
                f"no handshake with {address} in time",
                limit=f"backends.tcp.connect_timeout {self._options.connect_timeout} s",
                remedy="check that the peer runs and that nothing else listens there",
            ) from exc

    async def _dial_control(self, address: Address, expected: Expectation) -> PeerIdentity:
        sock, identity, welcome = await self._dial(address, pb.LANE_KIND_CONTROL, expected)
        home = self._at_home()
        try:
            home.peers.check(identity)
        except XferdError:
            sock.close()
            raise
        lane = await self._open_control(sock, identity, is_dialled=True)
        known = home.peers.get(identity.node)
        if known is not None and known.identity == identity and known.dialled is not None:
            known.addresses.add(str(address))  # the same node under another address: one lane is enough
            lane.close("another control lane is open")
            self._run_control(lane)
            return identity
        peer = home.peers.add_control(lane)
        limits = PeerLimits(welcome.max_frame_nbytes, welcome.max_descriptors)
        peer.addresses.add(str(address))
        peer.pool = LanePool(self._options.lanes, lambda: self._dial_bulk(peer, address, limits), self._options.depth)
        if self._options.small_lanes:
            peer.small = LanePool(self._options.small_lanes, lambda: self._dial_small(peer, address, limits))
        self._run_control(lane)
        return identity

    async def _dial_data(self, peer: Peer, address: Address) -> socket.socket:
        node = peer.identity.node
        try:
            sock, _, _ = await self._dial(address, pb.LANE_KIND_DATA, Expectation(node, peer.identity.epoch))
        except PeerLost as exc:
            remedy = exc.remedy or "post it again"
            raise PeerLost(f"node {node!r}: no data lane: {exc.message}", limit=exc.limit, remedy=remedy) from exc
        return sock

    async def _dial_bulk(self, peer: Peer, address: Address, limits: PeerLimits) -> ClientLane:
        sock, pool = await self._dial_data(peer, address), peer.pool
        assert pool is not None

        def left(lane: ClientLane) -> None:
            self._threads.discard(lane)
            pool.forget(lane)
            peer.fold(lane)

        name = f"xferd-tcp-{peer.identity.node}-{next(self._numbers)}"
        lane = ClientLane(peer.identity, sock, limits, self._options, name, left)
        self._threads.add(lane)
        return lane

    async def _dial_small(self, peer: Peer, address: Address, limits: PeerLimits) -> SmallLane:
        sock, pool = await self._dial_data(peer, address), peer.small
        assert pool is not None

        def left(lane: SmallLane) -> None:
            pool.forget(lane)
            peer.fold(lane)

        return SmallLane(peer.identity, sock, limits, left)

    async def _open_control(self, sock: socket.socket, identity: PeerIdentity, *, is_dialled: bool) -> ControlLane:
        lane = ControlLane(identity, self._options, self._tasks, self._at_home().handler.handle, is_dialled=is_dialled)
        try:
            await lane.open(sock)
        except BaseException:
            sock.close()
            raise
        return lane

    def _run_control(self, lane: ControlLane) -> None:
        async def run() -> None:
            reason = await lane.run()
            peers.remove_control(lane, reason)

        assert self._home is not None
        peers = self._home.peers
        task = asyncio.get_running_loop().create_task(run(), name=f"xferd-tcp-control-{lane.peer.node}")
        self._controls.add(task)
        task.add_done_callback(self._controls.discard)

    # --------------------------------------------------------------------------------- accepting

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as exc:
                log.error("accept failed", error=str(exc))
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            if self._handshakes >= self._options.max_handshakes:
                self.refusals["overloaded"] += 1
                sock.close()  # strangers get no words, and no time
                continue
            self._handshakes += 1
            self._tasks.spawn(self._greet(sock), "xferd-tcp-greet")

    async def _greet(self, sock: socket.socket) -> None:
        """Carry a caller through the handshake, into a lane or out of the door."""
        try:
            try:
                async with timeout(self._options.connect_timeout):
                    await self._shake_hands(sock)
            except TimeoutError:
                limit = f"backends.tcp.connect_timeout {self._options.connect_timeout} s"
                await self._turn_away(sock, DeadlineExceeded("the handshake takes too long", limit=limit))
            except XferdError as exc:
                await self._turn_away(sock, exc)
            except BaseException:
                sock.close()
                raise
        finally:
            self._handshakes -= 1

    async def _turn_away(self, sock: socket.socket, error: XferdError) -> None:
        self.refusals[error.code] += 1
        # A wrong secret needs an operator; rubbish comes from every port scanner.
        (log.warning if isinstance(error, Unauthenticated) else log.debug)(
            "caller refused", error=str(error), code=error.code
        )
        await sockets.refuse(sock, error)

    async def _shake_hands(self, sock: socket.socket) -> None:
        home = self._at_home()
        shaking = ServerHandshake(self._secret, home.me)
        hello = await sockets.receive_message(sock, FrameType.HELLO, pb.Hello)
        await sockets.send_message(sock, FrameType.CHALLENGE, shaking.challenge(hello))
        identity = shaking.accept(await sockets.receive_message(sock, FrameType.PROOF, pb.Proof))
        is_data = shaking.lane == pb.LANE_KIND_DATA
        home.peers.check_accept(identity, is_data=is_data)
        sockets.tune(sock, self._options, is_data=is_data)
        if is_data:
            await self._accept_data(sock, identity)
        else:
            await self._accept_control(sock, identity)

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(max_frame_nbytes=self._options.max_frame, max_descriptors=self._options.max_descriptors)

    async def _accept_control(self, sock: socket.socket, identity: PeerIdentity) -> None:
        lane = await self._open_control(sock, identity, is_dialled=False)
        try:
            self._at_home().peers.check_accept(identity, is_data=False)  # again: we have waited
        except XferdError as exc:
            lane.greet(FrameType.ERROR, wire.error_to_detail(exc))
            lane.close(str(exc))
            self._run_control(lane)
            return
        # Entered before it is welcomed, so that a peer that has its welcome may open data lanes at once.
        self._at_home().peers.add_control(lane)
        lane.greet(FrameType.WELCOME, self._welcome())
        self._run_control(lane)

    def _check_room(self, node: str) -> None:
        """Raise ``Overloaded`` if a peer may not have one more data lane served."""
        total, of_peer = self._served.total(), self._served[node]
        if total >= self._options.max_lanes:
            raise Overloaded(
                f"{total} data lanes are being served",
                limit=f"backends.tcp.max_lanes {self._options.max_lanes}",
                remedy="raise backends.tcp.max_lanes here, or lower backends.tcp.lanes at the peers",
            )
        if of_peer >= self._options.max_peer_lanes:
            raise Overloaded(
                f"{of_peer} data lanes of node {node!r} are being served",
                limit=f"backends.tcp.max_peer_lanes {self._options.max_peer_lanes}",
                remedy="raise backends.tcp.max_peer_lanes here, or lower backends.tcp.lanes there",
            )

    def _unserve(self, node: str) -> None:
        self._served[node] -= 1
        if not self._served[node]:
            del self._served[node]

    async def _accept_data(self, sock: socket.socket, identity: PeerIdentity) -> None:
        self._check_room(identity.node)
        self._served[identity.node] += 1
        try:
            await sockets.send_message(sock, FrameType.WELCOME, self._welcome())
            home = self._at_home()
            home.peers.check_accept(identity, is_data=True)  # again: we have waited
        except BaseException:
            self._unserve(identity.node)
            raise
        peer = self._connected(identity.node)
        name = f"xferd-tcp-serve-{identity.node}-{next(self._numbers)}"

        def left(lane: ServedLane) -> None:
            self._unserve(identity.node)
            self._threads.discard(lane)
            peer.served.discard(lane)
            peer.fold(lane)

        lane = ServedLane(identity, sock, self._options, home.handler, self._serving, name, left)
        self._threads.add(lane)
        peer.served.add(lane)
        lane.start()


@dataclass(frozen=True, slots=True)
class _Home:
    """What ``listen`` tells the transport."""

    me: PeerIdentity
    handler: PeerHandler
    peers: PeerTable
