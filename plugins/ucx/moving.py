"""One chunk as its caller sees it: the messages that belong to it, and how many of its bytes have moved."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from xferd.api.errors import ProtocolViolation, ShortTransfer
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins import vectored
from xferd.plugins.fabric import data_request
from xferd.plugins.ucx.messages import Endpoint, Operation

if TYPE_CHECKING:
    from xferd.plugins.base import Chunk, Extent, IovTable
    from xferd.plugins.ucx.worker import Worker


class Moving:
    """A READ or WRITE under way. Its methods belong to the event loop; messages end in the worker's thread."""

    def __init__(
        self, chunk: Chunk, remote: Extent, local: Extent, endpoint: Endpoint, epoch: int, *, is_write: bool
    ) -> None:
        self.id = secrets.randbits(64)
        self.is_write = is_write
        self.endpoint = endpoint
        self.nbytes = chunk.nbytes
        self.moved = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._rest: IovTable = local.iov
        self._operations: set[Operation] = set()
        self._rested: asyncio.Future[None] | None = None
        self._is_stopped = False
        self._tag = 0 if is_write else secrets.randbits(64)
        self.request = pb.UcxMove(
            request=data_request(chunk, remote, epoch, is_write=is_write), id=self.id, tag=self._tag
        )

    def receive(self, worker: Worker) -> None:
        """READ: receive the next message into what is still missing; messages may be cut as the peer likes."""
        self._begin(worker, self._rest, self._tag)

    def send(self, worker: Worker, tag: int, nbytes: int) -> None:
        """WRITE: send the next bytes, which the peer asks for.

        Raises:
            ProtocolViolation: there are not so many left, or this is no WRITE.
        """
        left = vectored.total_nbytes(self._rest) if self.is_write and len(self._rest) else 0
        if not 0 < nbytes <= left or self.ended.done() or self._is_stopped:
            raise ProtocolViolation(f"the peer asks for {nbytes} bytes of a chunk", limit=f"{left} bytes")
        part, self._rest = vectored.split(self._rest, nbytes)
        self._begin(worker, part, tag)

    def cancel(self, worker: Worker) -> None:
        """End receives for which nothing has come, and begin no more; what moves goes on."""
        self._is_stopped = True
        for operation in self._operations:
            worker.cancel(operation)

    def _begin(self, worker: Worker, table: IovTable, tag: int) -> None:
        def told(ended: Operation) -> None:
            self._loop.call_soon_threadsafe(self._ended_one, worker, ended)

        operation = Operation(self.endpoint, table, tag, told, is_send=self.is_write)
        self._operations.add(operation)
        worker.begin(operation)

    def _ended_one(self, worker: Worker, operation: Operation) -> None:
        self._operations.discard(operation)
        self.moved += operation.moved
        if operation.error is not None:
            self._is_stopped = True
            if not self.ended.done():
                self.ended.set_exception(operation.error)
        elif self.moved == self.nbytes:
            if not self.ended.done():
                self.ended.set_result(None)
        elif not self.is_write and not self._is_stopped:
            # Also when nobody waits for it any more: the peer may be sending, and a message must have its place.
            self._rest = vectored.advance(self._rest, operation.moved)
            self.receive(worker)
        if self._rested is not None and not self._operations and not self._rested.done():
            self._rested.set_result(None)

    def check(self, reply: pb.DataReply) -> int:
        """Return the bytes moved, which both sides must agree on."""
        if not self.moved == reply.moved_nbytes == self.nbytes:
            raise ShortTransfer(
                f"node {self.endpoint.node!r} reports {reply.moved_nbytes} bytes, "
                f"{self.moved} of {self.nbytes} moved here"
            )
        return self.moved

    async def wait_rest(self, timeout_s: float | None) -> bool:
        """Return whether UCX touches no memory of the chunk any more, once it does not or the time is over."""
        if self._operations:
            self._rested = self._loop.create_future()
            await asyncio.wait([self._rested], timeout=timeout_s)
        return not self._operations

    def give_up(self) -> None:
        """Begin nothing more, and let nobody wait for the end."""
        if not self.ended.done():
            self.ended.cancel()
        elif not self.ended.cancelled():
            self.ended.exception()  # it was noticed by other means
