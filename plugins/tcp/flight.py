"""One chunk under way on a lane: from its request until no byte of it moves, here or at the peer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import Cancelled, Closed, PeerLost, XferdError
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.timeouts import timeout
from xferd.plugins.base import Begun

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from xferd.plugins.movers import MoveCounter
    from xferd.plugins.tcp.exchange import Exchange
    from xferd.plugins.tcp.lanes import Lane, LanePool
    from xferd.plugins.tcp.options import TcpOptions
    from xferd.plugins.tcp.peers import Peer
    from xferd.plugins.tcp.tasks import TaskOwner

log = structlog.get_logger("xferd.tcp")


class Flight(Begun):
    """An exchange that a lane was given; ``done`` hears of its end, and the lane goes back to its pool before.

    Nothing is awaited where all goes well. Aborted before the lane began it, nothing happens. Else the exchange may end
    within ``abort_grace``, or its lane is cut; where a lane broke, the peer is asked to confirm that it rests.
    """

    def __init__(
        self,
        peer: Peer,
        pool: LanePool,
        lane: Lane,
        exchange: Exchange,
        done: Callable[[int | Exception], None],
        *,
        options: TcpOptions,
        counter: MoveCounter,
        tasks: TaskOwner,
    ) -> None:
        self._peer = peer
        self._pool = pool
        self._lane = lane
        self._exchange = exchange
        self._done = done
        self._options = options
        self._counter = counter
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._settled: asyncio.Event | None = None
        self._is_aborted = self._is_withdrawn = self._is_over = False
        counter.busy += 1
        self._ticket = lane.submit(exchange)
        self._ticket.tell(self._go_on)

    def abort(self) -> None:
        """Bring it to rest; twice is fine."""
        if self._is_aborted or self._is_over:
            return
        self._is_aborted = True
        if self._ticket.claim():  # the lane has not begun it, and will not
            self._is_withdrawn = True
            asyncio.get_running_loop().call_soon(self._ticket.settle, 0, self._cancelled())
        elif self._task is None:
            self._settled = asyncio.Event()
            if not self._spawn(self._bring_to_rest(self._settled)):
                self._lane.abort("the node is stopping")

    def _cancelled(self) -> Cancelled:
        return Cancelled(f"a chunk of transfer {self._exchange.request.transfer_id} was stopped")

    def _go_on(self) -> None:
        """Conclude when the lane touches no memory for it and nothing is being waited for."""
        if self._settled is not None and self._ticket.is_settled:
            self._settled.set()
        if self._is_over or not self._ticket.is_settled or (self._task is not None and not self._task.done()):
            return
        error = self._ticket.error
        if error is not None and self._task is None and self._must_ask() and self._spawn(self._quiesce_peer()):
            return
        self._is_over = True
        self._pool.release(self._lane)
        outcome: int | XferdError = self._ticket.moved
        if error is not None:
            outcome = self._cancelled() if self._is_aborted else error
        self._counter.ended(self._ticket.moved, outcome)
        self._done(outcome)

    def _must_ask(self) -> bool:
        """Whether the peer may still be writing what it had received: the lane broke."""
        return self._exchange.is_write and not self._lane.is_good and not self._is_withdrawn

    def _spawn(self, work: Coroutine[None, None, None]) -> bool:
        """Start what is to end before this does; False where all ends anyway."""
        try:
            self._task = self._tasks.spawn(work, "xferd-tcp-rest")
        except Closed:
            return False
        self._task.add_done_callback(lambda _: self._go_on())
        return True

    async def _bring_to_rest(self, settled: asyncio.Event) -> None:
        try:
            async with timeout(self._options.abort_grace):
                await settled.wait()
        except TimeoutError:
            self._lane.abort("the chunk was cancelled")
            await settled.wait()  # its calls end at once: the socket is shut down
        if not self._lane.is_good:
            await self._quiesce_peer()

    async def _quiesce_peer(self) -> None:
        """Return when the peer confirms that it moves no byte of the transfer any more, or cannot be asked."""
        control = self._peer.control
        if control is None:
            return
        asked = self._exchange.request
        request = pb.PeerRequest(cause_id=asked.cause_id, quiesce=pb.Quiesce(transfer_id=asked.transfer_id))
        try:
            await control.request(request, self._options.quiesce_timeout)
        except PeerLost:
            pass  # it serves nothing of a node whose lanes have gone
        except XferdError as exc:
            log.warning(
                "peer does not confirm that a transfer rests",
                peer=self._peer.identity.node,
                transfer=asked.transfer_id,
                cause_id=asked.cause_id,
                error=str(exc),
            )
