"""What becomes of transfers and notifications as completions: the numbers of an entry, and the detail beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import ring, wire
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.types import TransferState

if TYPE_CHECKING:
    from xferd.api.errors import XferdError
    from xferd.api.types import Hop, Notification
    from xferd.daemon.engine.machine import Transfer
    from xferd.daemon.engine.plan import Route

_STATES = {state: wire.enum_to_wire(state) for state in TransferState}
_DONE = _STATES[TransferState.DONE]  # as a number: to look up a member of an enumeration takes longer
_ENDED = ring.Kind.ENDED.value
_NOTHING = (0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0, 0)
_MAX_U32 = (1 << 32) - 1


class Completions:
    """Makes completions of one ring, which remembers the routes that its client has been told."""

    def __init__(self, detail_nbytes: int) -> None:
        self._detail_nbytes = detail_nbytes
        self._numbers: dict[tuple[Hop, ...], int] = {}
        self._last: tuple[tuple[Route, ...], int] = (), 0

    def ended(self, user_data: int, transfer: Transfer) -> tuple[tuple[float, ...], bytes]:
        """Return the fields and the detail that tell how a transfer ended."""
        flags, route, detail, state = 0, 0, b"", _DONE
        if transfer.state is TransferState.DONE:
            route, detail = self._route(transfer.last_routes)
            flags = ring.CompletionFlag.ROUTE if detail else 0
        else:
            state = _STATES[transfer.state]
            detail = wire.status_to_message(transfer.status()).SerializeToString()
            flags = ring.CompletionFlag.STATUS
        if len(detail) > self._detail_nbytes:
            flags, detail = ring.CompletionFlag.CUT, b""
        posted_at, started_at, ended_at = transfer.posted_at, transfer.started_at, transfer.ended_at
        return (
            user_data,
            int(transfer.id, 16),
            _ENDED,
            state,
            flags,
            len(detail),
            transfer.total_nbytes,
            transfer.moved_nbytes,
            transfer.created_at,
            posted_at,
            transfer.first_byte_at,
            ended_at,
            max(started_at - posted_at, 0.0) if started_at else 0.0,
            max(ended_at - started_at, 0.0) if started_at and ended_at else 0.0,
            min(transfer.descriptors, _MAX_U32),
            min(transfer.pieces, _MAX_U32),
            min(transfer.chunks, _MAX_U32),
            transfer.posts,
            route,
            0,
        ), detail

    def accepted(self, user_data: int, transfer: Transfer) -> tuple[tuple[float, ...], bytes]:
        """Return what tells that a transfer exists."""
        rest = (transfer.total_nbytes, 0, transfer.created_at, *_NOTHING[3:])
        return (user_data, int(transfer.id, 16), ring.Kind.ACCEPTED, _STATES[transfer.state], 0, 0, *rest), b""

    def refused(self, user_data: int, error: XferdError) -> tuple[tuple[float, ...], bytes]:
        """Return what tells that nothing was done, and why."""
        detail = wire.error_to_detail(error)
        if detail.ByteSize() > self._detail_nbytes:
            detail = pb.ErrorDetail(code=detail.code, message=error.message[: self._detail_nbytes // 8])
        raw = detail.SerializeToString()
        return (user_data, 0, ring.Kind.REFUSED, 0, 0, len(raw), *_NOTHING), raw

    def notification(self, user_data: int, notification: Notification) -> tuple[tuple[float, ...], bytes] | None:
        """Return what hands a notification over, or None if it does not fit into a slot."""
        raw = wire.notification_to_message(notification).SerializeToString()
        if len(raw) > self._detail_nbytes:
            return None
        return (user_data, 0, ring.Kind.NOTIFICATION, 0, 0, len(raw), *_NOTHING), raw

    def cut_notification(self, user_data: int) -> tuple[tuple[float, ...], bytes]:
        """Return what tells that a notification waits which must be taken by a call."""
        return (user_data, 0, ring.Kind.NOTIFICATION, 0, ring.CompletionFlag.CUT, 0, *_NOTHING), b""

    def _route(self, routes: tuple[Route, ...]) -> tuple[int, bytes]:
        """Return a route's number and, if the client does not know it, the hops as a detail."""
        if routes is self._last[0] and self._last[1]:
            return self._last[1], b""
        hops = tuple(hop for route in routes for hop in route.hops)
        known = self._numbers.get(hops, 0)
        if known:
            self._last = routes, known
            return known, b""
        message = pb.TransferStatus(telemetry=pb.Telemetry(route=wire.hops_to_messages(hops)))
        detail = message.SerializeToString()
        if len(self._numbers) >= ring.MAX_ROUTES or len(detail) > self._detail_nbytes:
            return 0, detail
        number = self._numbers[hops] = len(self._numbers) + 1
        self._last = routes, number
        return number, detail
