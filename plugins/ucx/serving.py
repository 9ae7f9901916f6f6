"""What this node does for peers: chunks that they read or write, each served by a blocking thread.

A grant is opened before a byte moves, and a peer hears where its bytes may go only then. The tag of a message is 64
random bits that only the two nodes know, told over the authenticated control lane: nobody else's message fits.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

from xferd.api.errors import (
    Cancelled,
    InternalError,
    LimitExceeded,
    PeerLost,
    ProtocolViolation,
    ShortTransfer,
    XferdError,
)
from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.api.types import TransferOp
from xferd.plugins import vectored
from xferd.plugins.ucx.messages import Endpoint, Operation

if TYPE_CHECKING:
    from xferd.plugins.base import Grant, IovTable, PeerHandler, PeerIdentity, PeerTransport
    from xferd.plugins.movers import MoverPool
    from xferd.plugins.ucx.options import UcxOptions
    from xferd.plugins.ucx.worker import Worker

REMEMBERED = 4096
"""Aborted chunks and quiesced transfers that are remembered for each peer; older ones are not asked for any more."""

_OPS = {xferd_pb.TRANSFER_OP_READ: TransferOp.READ, xferd_pb.TRANSFER_OP_WRITE: TransferOp.WRITE}


class Served:
    """One chunk of a peer under way: from the request until its grant is closed."""

    def __init__(self, peer: PeerIdentity, transfer_id: str, endpoint: Endpoint, worker: Worker) -> None:
        self.peer = peer
        self.transfer_id = transfer_id
        self.endpoint = endpoint
        self.rest = asyncio.get_running_loop().create_future()
        self._worker = worker
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._operation: Operation | None = None
        self._error: XferdError | None = None

    def begin(self, table: IovTable, tag: int, *, is_send: bool) -> Operation:
        """Begin a message; from the thread that serves the chunk. Raises what it was stopped with."""
        operation = Operation(self.endpoint, table, tag, lambda _: self._ended.set(), is_send=is_send)
        with self._lock:
            self.check()
            self._ended.clear()
            self._operation = operation
            self._worker.begin(operation)
        return operation

    def wait(self, operation: Operation) -> int:
        """Return the bytes of a message that was begun, once it has ended, or raise its error."""
        self._ended.wait()
        with self._lock:
            self._operation = None
            self.check()
        if operation.error is not None:
            raise operation.error
        return operation.moved

    def check(self) -> None:
        """Raise what it was stopped with, if it was."""
        if self._error is not None:
            raise self._error

    def stop(self, error: XferdError) -> None:
        """Let the chunk fail: a receive that has not begun ends at once, what moves goes on to its end."""
        with self._lock:
            self._error = self._error or error
            if self._operation is not None:
                self._worker.cancel(self._operation)


class Serving:
    """The chunks of peers. ``perform`` blocks in threads, everything else is the event loop's."""

    def __init__(
        self,
        worker: Worker,
        movers: MoverPool,
        options: UcxOptions,
        transport: PeerTransport,
        handler: PeerHandler,
    ) -> None:
        self._worker = worker
        self._movers = movers
        self._options = options
        self._transport = transport
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._endpoints: dict[PeerIdentity, Endpoint] = {}
        self._served: dict[tuple[PeerIdentity, int], Served] = {}
        self._refused: defaultdict[PeerIdentity, OrderedDict[int | str, None]] = defaultdict(OrderedDict)
        self._pulls: set[asyncio.Task[None]] = set()

    async def open(self, peer: PeerIdentity, address: bytes) -> None:
        """Connect back to a caller; an endpoint that it had is cut, and has gone before: UCX mixes the two up else."""
        old = self._endpoints.pop(peer, None)
        if old is not None:
            self._worker.close(old, "the peer opened another endpoint")
            await old.closed()
        endpoint = self._endpoints[peer] = Endpoint(peer.node, address)
        self._worker.connect(endpoint)

    async def move(self, peer: PeerIdentity, request: pb.UcxMove) -> pb.DataReply:
        """Serve a chunk to its end, and say how it ended. When it returns its grant is closed."""
        endpoint, key = self._endpoints.get(peer), (peer, request.id)
        transfer_id = request.request.transfer_id
        if endpoint is None or endpoint.failure:
            reason = endpoint.failure if endpoint is not None else "it has opened none"
            raise PeerLost(f"no endpoint of node {peer.node!r}: {reason}", remedy="open one")
        if key in self._served:
            raise ProtocolViolation(f"chunk {request.id} of node {peer.node!r} is under way already")
        refused = self._refused.get(peer)
        if refused is not None and (request.id in refused or transfer_id in refused):
            raise Cancelled(f"a chunk of transfer {transfer_id} was stopped by its owner")
        served = self._served[key] = Served(peer, transfer_id, endpoint, self._worker)
        try:
            return await self._movers.run(self._perform, served, request)
        finally:
            del self._served[key]
            served.rest.set_result(None)

    async def abort(self, peer: PeerIdentity, number: int) -> None:
        """Refuse a chunk from now on, and return when it is at rest."""
        self._refuse(peer, number)
        served = self._served.get((peer, number))
        if served is not None:
            await self._stop([served], "the chunk was aborted by its owner")

    async def quiesce(self, peer: PeerIdentity, transfer_id: str) -> None:
        """Refuse a transfer from now on, and return when all of its chunks are at rest."""
        self._refuse(peer, transfer_id)
        chunks = [one for one in self._served.values() if one.peer == peer and one.transfer_id == transfer_id]
        if chunks:
            await self._stop(chunks, f"transfer {transfer_id} was quiesced")

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Cut the endpoint of a peer that has gone; its chunks end at once."""
        self._refused.pop(peer, None)
        endpoint = self._endpoints.pop(peer, None)
        if endpoint is not None:
            self._worker.close(endpoint, reason)
        for served in list(self._served.values()):
            if served.peer == peer:
                served.stop(PeerLost(f"node {peer.node!r}: {reason}"))

    async def aclose(self) -> None:
        """Cut all endpoints, and wait for what is being served."""
        for peer in list(self._endpoints):
            self.peer_lost(peer, "the node is stopping")
        chunks = [served.rest for served in self._served.values()]
        if chunks:
            await asyncio.wait(chunks)

    def _refuse(self, peer: PeerIdentity, what: int | str) -> None:
        refused = self._refused[peer]
        refused[what] = None
        if len(refused) > REMEMBERED:
            refused.popitem(last=False)

    async def _stop(self, chunks: list[Served], reason: str) -> None:
        for served in chunks:
            served.stop(Cancelled(reason))
        waits = [served.rest for served in chunks]
        _, left = await asyncio.wait(waits, timeout=self._options.abort_grace)
        if left:
            for served in chunks:
                if not served.rest.done():
                    self._worker.close(served.endpoint, reason)
            await asyncio.wait(left)

    # ------------------------------------------------------------------------------------- in a thread

    def _perform(self, served: Served, request: pb.UcxMove) -> pb.DataReply:
        op = _OPS.get(request.request.op)
        if op is None:
            raise ProtocolViolation(f"a chunk with op {request.request.op}", limit="READ or WRITE")
        grant = self._open(served.peer, op, request.request)
        try:
            if op is TransferOp.READ:
                return pb.DataReply(moved_nbytes=self._send(served, grant, request.tag))
            return pb.DataReply(moved_nbytes=self._receive(served, grant, request))
        finally:
            grant.close()

    def _open(self, peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> Grant:
        rows = len(request.offset) // 8
        if rows > self._options.max_descriptors:
            raise LimitExceeded(
                f"a chunk has {rows} rows",
                limit=f"backends.ucx.max_descriptors {self._options.max_descriptors}",
                remedy="lower transfers.max_pieces at the caller",
            )
        grant = self._handler.open_grant(peer, op, request)
        if grant.nbytes != request.total_nbytes:
            grant.close()
            raise InternalError(f"a grant of {grant.nbytes} bytes for a request of {request.total_nbytes}")
        return grant

    def _send(self, served: Served, grant: Grant, tag: int) -> int:
        sent = 0
        for window in grant.windows():
            if len(window):
                sent += served.wait(served.begin(window, tag, is_send=True))
        if sent != grant.nbytes:
            raise ShortTransfer(f"{sent} of {grant.nbytes} bytes could be read")
        return sent

    def _receive(self, served: Served, grant: Grant, request: pb.UcxMove) -> int:
        came = 0
        for window in grant.windows():  # the window before it is in place now
            nbytes = vectored.total_nbytes(window)
            if not nbytes:
                continue
            tag = secrets.randbits(64)
            operation = served.begin(window, tag, is_send=False)
            self._loop.call_soon_threadsafe(self._pull, served, request, tag, nbytes)
            got = served.wait(operation)
            if got != nbytes:
                raise ShortTransfer(f"node {served.peer.node!r} sent {got} of {nbytes} bytes")
            came += got
        if came != grant.nbytes:
            raise ShortTransfer(f"{came} of {grant.nbytes} bytes could be written")
        return came

    # ------------------------------------------------------------------------------------ on the loop

    def _pull(self, served: Served, request: pb.UcxMove, tag: int, nbytes: int) -> None:
        """Ask for the next bytes of a WRITE; what comes of the question stops the chunk if it is bad."""
        ask = pb.PeerRequest(
            cause_id=request.request.cause_id, ucx_pull=pb.UcxPull(id=request.id, tag=tag, nbytes=nbytes)
        )

        async def pull() -> None:
            try:
                await self._transport.request(served.peer.node, ask, timeout_s=self._options.quiesce_timeout)
            except XferdError as exc:
                served.stop(exc)

        task = self._loop.create_task(pull(), name=f"xferd-ucx-pull-{served.peer.node}")
        self._pulls.add(task)
        task.add_done_callback(self._pulls.discard)
