"""Data lanes that peers opened: each served by its own thread, and the table of what is being served."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

import structlog

from xferd.api import wire
from xferd.api.errors import Cancelled, InternalError, PeerLost, ProtocolViolation, ShortTransfer, XferdError
from xferd.api.proto import peer_v1_pb2 as pb, xferd_v1_pb2 as xferd_pb
from xferd.api.types import TransferOp
from xferd.plugins import vectored
from xferd.plugins.courtesy import give_way
from xferd.plugins.tcp.frames import FrameLimits, FrameType, decode_control
from xferd.plugins.tcp.streams import BlockingStream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from xferd.plugins.base import Grant, PeerHandler, PeerIdentity
    from xferd.plugins.tcp.frames import Header
    from xferd.plugins.tcp.options import TcpOptions

REMEMBERED = 4096
"""Quiesced transfers that are remembered for each peer; older ones have no frames under way any more."""

log = structlog.get_logger("xferd.tcp")

_OPS = {xferd_pb.TRANSFER_OP_READ: TransferOp.READ, xferd_pb.TRANSFER_OP_WRITE: TransferOp.WRITE}


class ServingTable:
    """Which lane serves which transfer, and which transfers are refused. Thread-safe; nothing blocks under the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serving: defaultdict[tuple[PeerIdentity, str], set[ServedLane]] = defaultdict(set)
        self._refused: defaultdict[PeerIdentity, OrderedDict[str, None]] = defaultdict(OrderedDict)

    def begin(self, peer: PeerIdentity, transfer_id: str, lane: ServedLane) -> None:
        """Note that a lane serves a transfer from here on.

        Raises:
            Cancelled: the transfer was quiesced.
        """
        with self._lock:
            if transfer_id in self._refused.get(peer, ()):
                raise Cancelled(f"transfer {transfer_id} was quiesced by its owner")
            self._serving[peer, transfer_id].add(lane)

    def end(self, peer: PeerIdentity, transfer_id: str, lane: ServedLane) -> None:
        """Note that it does no longer: its grant is closed."""
        with self._lock:
            lanes = self._serving.get((peer, transfer_id))
            if lanes is not None:
                lanes.discard(lane)
                if not lanes:
                    del self._serving[peer, transfer_id]

    def quiesce(self, peer: PeerIdentity, transfer_id: str) -> bool:
        """Refuse the transfer from now on, cut the lanes that serve it, return whether there are none."""
        with self._lock:
            refused = self._refused[peer]
            refused[transfer_id] = None
            refused.move_to_end(transfer_id)
            if len(refused) > REMEMBERED:
                refused.popitem(last=False)
            lanes = list(self._serving.get((peer, transfer_id), ()))
        for lane in lanes:
            lane.abort(f"transfer {transfer_id} was quiesced")
        return not lanes

    def lanes(self, peer: PeerIdentity, transfer_id: str) -> list[ServedLane]:
        """List the lanes that serve a transfer."""
        with self._lock:
            return list(self._serving.get((peer, transfer_id), ()))

    def forget(self, peer: PeerIdentity) -> None:
        """Drop what is remembered of a peer all of whose lanes have gone."""
        with self._lock:
            self._refused.pop(peer, None)


class ServedLane:
    """One data connection from a peer, with its thread."""

    def __init__(
        self,
        peer: PeerIdentity,
        sock: socket.socket,
        options: TcpOptions,
        handler: PeerHandler,
        table: ServingTable,
        name: str,
        on_left: Callable[[ServedLane], None],
    ) -> None:
        self.peer = peer
        self.stream = BlockingStream(sock, options.turn)
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._options = options
        self._handler = handler
        self._table = table
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._is_bulk = False
        self._limits = FrameLimits.of({FrameType.DATA_REQUEST}, payload_nbytes=options.max_frame)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    def abort(self, reason: str) -> None:
        """End the lane: blocking calls of its thread end at once. Thread-safe; twice is fine."""
        self.stream.abort(reason)

    def _leave(self) -> None:
        self.thread.join()  # it has nothing left to do
        if not self.left.done():
            self.left.set_result(None)
        self._on_left(self)

    # ---------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            while (head := self.stream.receive_head(self._limits)) is not None:
                self._serve(*head)
        except PeerLost as exc:
            log.debug("data lane ended", peer=self.peer.node, reason=self.stream.reason or str(exc))
        except XferdError as exc:
            log.warning("data lane failed", peer=self.peer.node, error=str(exc))
            self.stream.refuse(exc)
        except Exception as exc:
            # A bug of the handler's or ours: the peer must not be left waiting on this lane.
            log.exception("data lane failed", peer=self.peer.node)
            self.stream.refuse(InternalError(f"{type(exc).__name__} in the peer; its log has the traceback"))
        finally:
            self.stream.close()
            self._loop.call_soon_threadsafe(self._leave)

    def _serve(self, header: Header, control: bytes) -> None:
        if header.type is FrameType.ERROR:
            raise PeerLost(
                f"the peer ends the lane: {wire.error_from_detail(decode_control(xferd_pb.ErrorDetail, control))}"
            )
        request = decode_control(pb.DataRequest, control)
        op = _OPS.get(request.op)
        if op is None:
            raise ProtocolViolation(f"a data request with op {request.op}", limit="READ or WRITE")
        payload = request.total_nbytes if op is TransferOp.WRITE else 0
        if header.payload_nbytes != payload:
            raise ProtocolViolation(
                f"a {op.value} of {request.total_nbytes} bytes has a payload of {header.payload_nbytes}",
                limit=f"{payload} bytes",
            )
        if not self._is_bulk and request.total_nbytes > self._options.small:
            # The caller does not say what it uses the lane for; what it asks for first does.
            self._is_bulk = True
            give_way(self._options.nice)
        reply = pb.DataReply()
        try:
            reply.moved_nbytes = self._answer(op, request, header)
        except _Refused as exc:
            reply.error.CopyFrom(wire.error_to_detail(exc.error))
        self.stream.send(FrameType.END, reply, request_id=header.request_id)

    def _answer(self, op: TransferOp, request: pb.DataRequest, header: Header) -> int:
        """Serve one request; when it returns or raises, the grant is closed and the payload is used up.

        Raises:
            _Refused: with the error to be reported; the lane is good.
            XferdError: the lane is out of step.
        """
        try:
            self._table.begin(self.peer, request.transfer_id, self)
        except Cancelled as exc:
            self.stream.discard(header.payload_nbytes)
            raise _Refused(exc) from exc
        try:
            return self._answer_within(op, request, header)
        finally:
            self._table.end(self.peer, request.transfer_id, self)

    def _answer_within(self, op: TransferOp, request: pb.DataRequest, header: Header) -> int:
        try:
            grant = self._open(op, request)
        except XferdError as exc:
            self.stream.discard(header.payload_nbytes)
            raise _Refused(exc) from exc
        try:
            if op is TransferOp.READ:
                return self._send_windows(grant, header.request_id)
            return self._fill_windows(grant, header.payload_nbytes)
        finally:
            grant.close()

    def _open(self, op: TransferOp, request: pb.DataRequest) -> Grant:
        rows = len(request.offset) // 8
        if rows > self._options.max_descriptors:
            raise ProtocolViolation(
                f"a data request has {rows} rows",
                limit=f"backends.tcp.max_descriptors {self._options.max_descriptors}",
            )
        grant = self._handler.open_grant(self.peer, op, request)
        if grant.nbytes != request.total_nbytes:
            grant.close()
            raise InternalError(f"a grant of {grant.nbytes} bytes for a request of {request.total_nbytes}")
        return grant

    def _send_windows(self, grant: Grant, request_id: int) -> int:
        sent = 0
        windows = grant.windows()
        while True:
            try:
                window = next(windows, None)
            except XferdError as exc:
                raise _Refused(exc) from exc
            if window is None:
                break
            while vectored.total_nbytes(window) > self._options.max_frame:  # no frame is larger than we would accept
                part, window = vectored.split(window, self._options.max_frame)
                sent += self.stream.send_payload(part, request_id=request_id)
            if len(window):
                sent += self.stream.send_payload(window, request_id=request_id)
        if sent != grant.nbytes:
            raise _Refused(ShortTransfer(f"{sent} of {grant.nbytes} bytes could be read"))
        return sent

    def _fill_windows(self, grant: Grant, payload_nbytes: int) -> int:
        rest = payload_nbytes
        windows = grant.windows()
        while True:
            try:
                window = next(windows, None)  # the window before it is in place now
            except XferdError as exc:
                self.stream.discard(rest)
                raise _Refused(exc) from exc
            if window is None:
                break
            nbytes = vectored.total_nbytes(window)
            if nbytes > rest:
                self.stream.discard(rest)
                raise _Refused(InternalError(f"a window of {nbytes} bytes where {rest} are left"))
            self.stream.receive_payload(window)
            rest -= nbytes
        if rest:
            self.stream.discard(rest)
            raise _Refused(ShortTransfer(f"{payload_nbytes - rest} of {payload_nbytes} bytes could be written"))
        return payload_nbytes


class _Refused(Exception):  # it carries an error to its END frame, within this module
    def __init__(self, error: XferdError) -> None:
        super().__init__(str(error))
        self.error = error
