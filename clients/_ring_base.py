"""What goes over a ring and what does not: the part of ``_sync_ring.py`` and ``_aio_ring.py`` that waits for nothing.

Whatever does not fit (lists that are not prepared, index arrays larger than the arena, transfers of which the ring
knows nothing) is left to gRPC, which can do all of it; then these functions return None.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from google.protobuf.message import DecodeError

from xferd.api import spinning, types as t, wire
from xferd.api.descriptors import PreparedRef
from xferd.api.errors import Closed, InvalidState, ProtocolViolation, Unavailable, Unsupported, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.proto.session_v1_pb2 import OpenRing, RingOptions, SessionSocketReply, SessionSocketRequest
from xferd.api.ring import VERSION, Opcode, RingSizes, SubmissionFlag, is_supported
from xferd.clients._ring import Ring
from xferd.clients._ring_tracks import CutNote, RingHome, Track
from xferd.clients._session_socket import close_all, ended
from xferd.clients.transfers import (
    PreparedBase,
    TransferBase,
    check_options,
    event_number,
    id_of,
    notification_of,
    op_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xferd.api.descriptors import IndexColumn
    from xferd.api.types import SessionGrant
    from xferd.clients._ring_tracks import Ask
    from xferd.clients.transfers import ListLike, TransferLike, TransferOptions

RingChoice: TypeAlias = bool | RingSizes | None
"""None: a ring where it can be had. True, or sizes: one must be had. False: none."""

Submission: TypeAlias = tuple[Any, ...]
"""What ``Ring.put`` takes after the ask."""

SPIN_US: Final = 200.0
"""How long a waiting thread looks at the ring before it sleeps.

Where a core has nothing else to do it goes idle, and to wake it costs more than the transfer: one of 4 KiB there and
back took 35 to 65 us with 100, 200 or 500 us of this, and 70 to 175 us with 50 or none (two virtual cores at rest).
"""


def spin_us_here() -> float:
    """Return how long a waiting thread of this process spins. With one core, it keeps the daemon from its work."""
    if spinning.has_many_cores():
        return spinning.SPIN_ON_MANY_S * 1e6
    return SPIN_US if spinning.cores() > 1 else 0.0


CREDITS: Final = 64
"""Notifications that the daemon may send ahead; each keeps room in the completion queue."""

_SUBMIT, _POST, _CANCEL, _LISTEN = (int(o) for o in (Opcode.SUBMIT, Opcode.POST, Opcode.CANCEL, Opcode.LISTEN))
_TELL_ACCEPTED = int(SubmissionFlag.TELL_ACCEPTED)
_READ, _WRITE = wire.enum_to_wire(t.TransferOp.READ), wire.enum_to_wire(t.TransferOp.WRITE)
_MAX_TIMEOUT_MS = (1 << 32) - 1


def ring_request(choice: RingChoice) -> SessionSocketRequest | None:
    """Return the request for a ring, None where there is to be none.

    Raises:
        Unsupported: there has to be one, and this machine has none.
    """
    if choice is False:
        return None
    if not is_supported():
        if choice is None:
            return None
        raise Unsupported("rings need x86-64, whose stores become visible in order", remedy="leave out ring=")
    sizes = choice if isinstance(choice, RingSizes) else RingSizes()
    message = OpenRing(
        version=VERSION,
        sq_entries=sizes.sq_entries,
        cq_entries=sizes.cq_entries,
        detail_nbytes=sizes.detail_nbytes,
        arena_nbytes=sizes.arena_nbytes,
    )
    return SessionSocketRequest(open_ring=message)


def granted(reply: SessionSocketReply, fds: list[int], grant: SessionGrant) -> Ring:
    """Map the ring that an answer brought; its fds are the ring's, or closed."""
    if reply.WhichOneof("reply") != "ring":
        close_all(fds)
        raise ProtocolViolation(f"the answer to OpenRing is {reply.WhichOneof('reply')}", limit="ring")
    return Ring(fds, reply.ring.nbytes, RingHome(grant.node, grant.agent))


def refused(choice: RingChoice, error: XferdError) -> Unsupported | None:
    """Return what to raise when no ring could be had, None where gRPC alone will do."""
    if choice is None:
        return None
    return Unsupported(f"no ring can be had: {error.message}", limit=error.limit, remedy=error.remedy)


class RingBase:
    """A ring and what is known of the transfers and lists that use it."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._nodes: dict[int, str] = {}  # of prepared lists, by handle
        self._tracks: weakref.WeakValueDictionary[t.TransferId, Track] = weakref.WeakValueDictionary()
        self._has_keyed_cause = False
        self.is_listening = False
        self._is_closing = False

    @property
    def is_usable(self) -> bool:
        """Whether it is neither lost nor closed; a child of fork has to learn from its use that it is not its own."""
        return self._ring.lost is None or self._ring.is_disowned

    def _check_owner(self) -> None:
        """Raise in a child of fork, before it waits for what only its parent's threads could bring, or for gRPC."""
        if self._ring.is_disowned and self._ring.lost is not None:
            raise self._ring.lost

    # -- lists

    def know_list(self, info: t.PreparedInfo) -> None:
        """Remember a prepared list of this session: only such lists go over the ring."""
        self._nodes[info.handle] = info.node

    def forget_list(self, handle: t.PreparedHandle) -> None:
        """Leave what is asked of a released list to gRPC."""
        self._nodes.pop(handle, None)

    # -- submissions

    def _submission(
        self, op: t.TransferOp | str, local: ListLike, remote: ListLike, options: TransferOptions, flags: int
    ) -> tuple[Track, Submission] | None:
        """Return a SUBMIT and the track of the transfer to be, or None if it is nothing for the ring."""
        self._check_owner()
        mine, theirs = _rows(local), _rows(remote)
        if mine is None or theirs is None or mine[0] not in self._nodes:
            return None
        node = self._nodes.get(theirs[0])
        if node is None:
            return None
        op = op_of(op)
        key = cause_id = ""
        extra, priority, timeout_ms = b"", t.Priority.NORMAL, 0
        if options:
            check_options(options)
            milliseconds = _milliseconds(options.get("timeout_s", 0.0))
            if milliseconds is None:
                return None
            timeout_ms = milliseconds
            priority = options.get("priority", priority)
            key, cause_id = options.get("key", ""), options.get("cause_id", "")
            # The ring does not tell the cause id of a transfer that a key has found: it is the first request's.
            self._has_keyed_cause = self._has_keyed_cause or bool(key and cause_id)
            if key and self._has_keyed_cause:
                return None
            try:
                extra = _packed(options)
            except (TypeError, ValueError):  # gRPC says what is wrong with it
                return None
        rows = (0 if mine[1] is None else len(mine[1])) + (0 if theirs[1] is None else len(theirs[1]))
        if not self._ring.fits(rows * 4 + len(extra)):
            return None
        track = Track(self._ring.home, op, priority, node, key, cause_id)
        number = _READ if op is t.TransferOp.READ else _WRITE
        urgency = 0 if priority is t.Priority.NORMAL else wire.enum_to_wire(priority)
        return track, (_SUBMIT, mine[0], theirs[0], number, urgency, flags, timeout_ms, mine[1], theirs[1], extra)

    def _track_to_post(self, transfer: TransferBase) -> Track | None:
        """Return the track of a transfer that may be posted over the ring, by what was last heard of it."""
        self._check_owner()
        track = transfer._track
        if track is None:
            track = self._tracks.get(transfer.id)
        if track is None:
            status = transfer.status
            track = self._tracks[status.id] = Track.of(self._ring.home, status)
        if track.is_released or not (track.has_ended or track.status.state is t.TransferState.PREPARED):
            if is_told(track):
                raise InvalidState(
                    f"transfer {track.id} is {track.status.state.value} and cannot be posted",
                    remedy="wait until it has ended, or cancel it first",
                )
            return None
        transfer._track = track
        return track

    def _tracks_to_post(self, transfers: Sequence[TransferBase]) -> list[Track] | None:
        """Return the tracks of different transfers that may all be posted over the ring."""
        tracks = [self._track_to_post(transfer) for transfer in transfers]
        known = [track for track in tracks if track is not None]
        return known if len({track.id for track in known}) == len(tracks) else None

    def _is_posted(self, track: Track, ask: Ask) -> bool:
        """Say whether a post came about; False: gRPC has to find out. Raises what it was refused with."""
        if ask.is_accepted:
            return True
        track.unpost()
        if ask.refusal is not None:
            raise ask.refusal
        if self._is_closing:
            raise closed_meanwhile()
        return False

    def _known(self, transfer: TransferLike) -> Track | None:
        """Return the track of a transfer that the ring can be asked about."""
        track = transfer._track if isinstance(transfer, TransferBase) else self._tracks.get(t.TransferId(transfer))
        return None if track is None or track.is_released else track

    def tracks_to_wait(self, transfers: Iterable[TransferLike]) -> list[Track] | None:
        """Return the tracks of transfers whose ends the ring tells, or has told; None if that is not so of all."""
        self._check_owner()
        tracks = []
        for transfer in transfers:
            track = self._known(transfer)
            if track is None or not is_told(track):
                return None
            tracks.append(track)
        return tracks

    def tracks_to_cancel(self, transfers: Sequence[TransferLike]) -> list[Track] | None:
        """Return tracks of transfers that can be cancelled over the ring: all of which more than the id is known."""
        self._check_owner()
        tracks = []
        for transfer in transfers:
            track = self._known(transfer)
            if track is None:
                if not isinstance(transfer, TransferBase) or transfer._track is not None:
                    return None
                track = Track.of(self._ring.home, transfer.status)
            tracks.append(track)
        return tracks

    def forget_transfers(self, transfers: Iterable[TransferLike]) -> None:
        """Leave what is asked of released transfers to gRPC, which says that there are none."""
        for transfer in transfers:
            track = self._tracks.pop(id_of(transfer), None)
            if isinstance(transfer, TransferBase):
                track = track or transfer._track
            if track is not None:
                track.release()

    # -- ends

    def _answered(self, ask: Ask) -> Track | None:
        """Return the track of what was asked, None if gRPC has to ask.

        Raises:
            XferdError: it was refused.
            LostAnswer: the ring went before it was answered.
        """
        if ask.refusal is not None:
            if ask.is_cut:  # nothing was done, and gRPC has room to say why
                return None
            raise ask.refusal
        if ask.is_lost and not ask.is_accepted:
            raise LostAnswer
        return ask.track

    def _unanswered(self, end_reason: str) -> XferdError:
        """Return the error for a request whose transfer, if there is one, cannot be named."""
        reason = self._ring.lost
        if self._is_closing:
            return closed_meanwhile()
        if self._ring.is_session_over:
            return ended(end_reason or "its ring was closed")
        error = Unavailable(
            f"no answer came over the ring: {reason.message if reason else 'it is lost'}",
            remedy="the transfer may have been made: give a key, and the same request again finds it",
        )
        error.__cause__ = reason
        return error

    # -- notifications

    def _take_notes(self, limit: int) -> tuple[list[t.Notification], CutNote | None]:
        """Return notifications that have come, or what stands for one that gRPC has to take before any other."""
        self._check_owner()
        notes = self._ring.notes
        taken: list[t.Notification] = []
        while notes and len(taken) < limit:
            first = notes[0]
            if isinstance(first, CutNote):
                return taken, None if taken else first
            try:
                detail = notes.popleft()
            except IndexError:  # another thread was faster
                break
            if isinstance(detail, CutNote):
                notes.appendleft(detail)
                break
            taken.append(_notification(detail))
        return taken, None

    def forget_cut(self, cut: CutNote) -> None:
        """Note that gRPC was asked for what ``cut`` stands for, and has it no more."""
        notes = self._ring.notes
        if notes and notes[0] is cut:
            notes.popleft()

    def _credits_wanted(self) -> int:
        """Return how many more notifications the daemon may send; 0 while it has enough leave."""
        ring = self._ring
        most = min(CREDITS, ring.layout.sizes.cq_entries // 4) or 1
        free = most - (ring.allowed - ring.noted) - len(ring.notes)
        return free if free > most // 2 else 0


class LostAnswer(Exception):
    """The ring went before a request was answered; its heirs make a typed error of it."""


def closed_meanwhile() -> Closed:
    """Return the error for whoever waits while the client is closed."""
    return Closed("the client was closed while an answer was waited for")


def is_told(track: Track) -> bool:
    """Say whether the ring tells the end of a transfer's last post, or has told it."""
    return track.ask is not None and not track.ask.is_lost


def needs_poll(track: Track) -> bool:
    """Say whether only gRPC knows all of how a transfer ended."""
    track.status  # noqa: B018 - what is missing shows when it is put together
    return track.is_cut


def post_of(track: Track, *, tells_accepted: bool) -> Submission:
    """Return a POST whose acceptance is told, unless its end is there as soon; or one of which only the end is told."""
    return _POST, int(track.id, 16), 0, 0, 0, _TELL_ACCEPTED if tells_accepted else 0


def cancel_of(track: Track) -> Submission:
    """Return a CANCEL."""
    return _CANCEL, int(track.id, 16)


def fence_of() -> Submission:
    """Return what is refused, and so tells that all that was submitted before it was taken: a CANCEL of no transfer."""
    return _CANCEL, 0


def listen_of(credits_wanted: int) -> Submission:
    """Return a LISTEN."""
    return _LISTEN, credits_wanted


def submit_flags(*, hold: bool) -> int:
    """Return the flags of a SUBMIT whose transfer's id is wanted at once."""
    return int(SubmissionFlag.HOLD) if hold else _TELL_ACCEPTED


def _rows(spec: ListLike) -> tuple[int, IndexColumn | None] | None:
    """Return handle and row numbers of a prepared list; None for all else, and for no rows at all."""
    if isinstance(spec, PreparedRef):
        index = spec.index
        return None if index is not None and not len(index) else (spec.handle, index)
    return (spec.info.handle, None) if isinstance(spec, PreparedBase) else None


def _milliseconds(timeout_s: float) -> int | None:
    """Return a time in the ring's unit, None where that would change it: the same request, the same result."""
    if not timeout_s:
        return 0
    if not math.isfinite(timeout_s):
        return None
    rounded = round(timeout_s * 1000)
    return rounded if rounded / 1000 == timeout_s and 0 < rounded <= _MAX_TIMEOUT_MS else None


def _notification(detail: bytes) -> t.Notification:
    try:
        return wire.notification_from_message(pb.Notification.FromString(detail))
    except DecodeError as exc:
        raise ProtocolViolation("the ring brought no notification that can be read", remedy="is it xferd?") from exc


def _packed(options: TransferOptions) -> bytes:
    """Return what has no field of its own in a SUBMIT; nothing, mostly."""
    key, cause_id, backend = options.get("key", ""), options.get("cause_id", ""), options.get("backend", "")
    notification = notification_of(options)
    verify, durable = options.get("verify", False), options.get("durable", False)
    wait_event, done_event = event_number(options.get("wait_event", 0)), event_number(options.get("done_event", 0))
    if not (key or cause_id or backend or verify or durable or wait_event or done_event) and notification is None:
        return b""
    message = RingOptions(
        key=key,
        cause_id=cause_id,
        backend=backend,
        verify=verify,
        durable=durable,
        wait_event=wait_event,
        done_event=done_event,
    )
    if notification is not None:
        message.notification.CopyFrom(wire.notification_to_message(notification))
    return message.SerializeToString()
