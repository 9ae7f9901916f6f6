"""What a client remembers of what goes over the ring: an ``Ask`` for each submission, a ``Track`` for each transfer.

A completion stays the tuple that it was unpacked to until somebody wants the status; most are never looked at whole.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from google.protobuf.message import DecodeError

from xferd.api import wire
from xferd.api.errors import XferdError
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.ring import CompletionFlag, Kind
from xferd.api.types import (
    ENDED,
    Hop,
    Priority,
    Telemetry,
    TransferId,
    TransferOp,
    TransferState,
    TransferStatus,
)

if TYPE_CHECKING:
    from collections.abc import Callable

Entry: TypeAlias = tuple[Any, ...]
"""A completion as ``api/ring.py``'s COMPLETION unpacks it."""


class CutNote:
    """Stands for a notification that does not fit into the ring: it is the first that gRPC gives."""


Note: TypeAlias = bytes | CutNote
"""A serialised notification, or what stands for one."""

_CUT, _STATUS, _ROUTE = (int(flag) for flag in (CompletionFlag.CUT, CompletionFlag.STATUS, CompletionFlag.ROUTE))
_STATES: Final = {wire.enum_to_wire(state): state for state in TransferState}
_ENDED: Final = int(Kind.ENDED)


@dataclass(slots=True)
class RingHome:
    """What is the same in all statuses of a session, and what the ring's route numbers mean, as it was told."""

    node: str
    agent: str
    routes: dict[int, bytes] = field(default_factory=dict)


class Ask:
    """One submission that waits for its completions.

    Attributes:
        is_held: the one completion is ACCEPTED.
        is_accepted: the transfer exists; ``track`` knows its id.
        is_over: nothing more will come.
        refusal: why nothing was done.
        is_cut: the refusal's text did not fit into the ring.
        is_lost: the ring went before the answer came.
        waiters: called, with no lock held, whenever one of these changes.
    """

    __slots__ = ("is_accepted", "is_cut", "is_held", "is_lost", "is_over", "refusal", "track", "waiters")

    def __init__(self, track: Track | None = None, *, is_held: bool = False) -> None:
        self.track = track
        self.is_held = is_held
        self.is_accepted = False
        self.is_over = False
        self.is_cut = False
        self.is_lost = False
        self.refusal: XferdError | None = None
        self.waiters: list[Callable[[], object]] = []

    def accept(self, entry: Entry, detail: bytes) -> None:
        """Take an ACCEPTED."""
        if self.track is not None:
            self.track.accept(entry, detail)
        self.is_accepted = True
        self.is_over = self.is_held
        self._wake()

    def end(self, entry: Entry, detail: bytes) -> None:
        """Take an ENDED."""
        if self.track is not None:
            self.track.tell(entry, detail)
        self.is_accepted = True
        self.finish()

    def refuse(self, error: XferdError, *, is_cut: bool) -> None:
        """Take a REFUSED."""
        self.refusal = error
        self.is_cut = is_cut
        self.finish()

    def lose(self) -> None:
        """Note that no answer will come."""
        self.is_lost = True
        self.finish()

    def finish(self) -> None:
        """Say that this is over."""
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self.waiters:
            waiter()


class Track:
    """One transfer: what does not change of it, and the last completion that told of it.

    Several objects of the user may stand for one transfer and share its track. What the ring told of an end counts for
    more than what gRPC said at about the same time.

    Attributes:
        ask: the post that is under way, or the last one; None if the last one did not go over the ring.
        is_released: the daemon was told to forget it.
        is_cut: what the ring told of its end is not all; gRPC knows the rest.
    """

    __slots__ = (
        "__weakref__",
        "_before",
        "_built",
        "_detail",
        "_entry",
        "_heard",
        "ask",
        "cause_id",
        "home",
        "id",
        "is_cut",
        "is_released",
        "key",
        "op",
        "priority",
        "remote_node",
    )

    def __init__(
        self, home: RingHome, op: TransferOp, priority: Priority, remote_node: str, key: str, cause_id: str
    ) -> None:
        self.home = home
        self.id = TransferId("")
        self.op = op
        self.priority = priority
        self.remote_node = remote_node
        self.key = key
        self.cause_id = cause_id
        self.ask: Ask | None = None
        self.is_cut = False
        self.is_released = False
        self._entry: Entry | None = None  # of the present post
        self._detail = b""
        self._built: tuple[Entry, TransferStatus] | None = None
        self._heard: TransferStatus | None = None  # by gRPC, or of a refusal
        self._before: TransferStatus | None = None  # what held before the present post

    @classmethod
    def of(cls, home: RingHome, status: TransferStatus) -> Track:
        """Return a track of a transfer that was made by gRPC."""
        track = cls(home, status.op, status.priority, status.remote_node, status.key, status.cause_id)
        track.id = status.id
        track._heard = status
        return track

    def tell(self, entry: Entry, detail: bytes) -> None:
        """Take a completion."""
        if not self.id:
            self.id = TransferId(f"{entry[1]:016x}")
        self._detail = detail
        self._entry = entry
        self._heard = None

    def accept(self, entry: Entry, detail: bytes) -> None:
        """Take an ACCEPTED; of a post it tells nothing that is not known."""
        if self._before is None:
            self.tell(entry, detail)

    def post(self, ask: Ask) -> None:
        """Note that it is about to be posted."""
        self._before = self.status
        self.ask = ask
        self.is_cut = False
        self._entry = self._heard = None

    def unpost(self) -> None:
        """Note that the post did not come about."""
        self._heard, self.ask = self._before, None

    def release(self) -> None:
        """Leave the transfer to gRPC: it is forgotten, or the ring is."""
        self._heard = self.status
        self.is_released = True
        self._entry = self.ask = None

    @property
    def status(self) -> TransferStatus:
        """What was last heard, put together when it is first wanted."""
        entry, heard = self._entry, self._heard
        if heard is not None and (entry is None or not _is_end(entry) or (self.is_cut and heard.state in ENDED)):
            return heard
        if entry is None:
            assert self._before is not None, "asked for before it was accepted"
            return _posted(self._before)
        built = self._built
        if built is None or built[0] is not entry:
            self._built = built = (entry, self._status_of(entry, self._detail))
        return built[1]

    @status.setter
    def status(self, status: TransferStatus) -> None:
        """Note what was heard by gRPC."""
        self._heard = status

    @property
    def has_ended(self) -> bool:
        """Whether no byte moves any more, as last heard; without building the status."""
        entry, heard = self._entry, self._heard
        return (entry is not None and _is_end(entry)) or (heard is not None and heard.state in ENDED)

    def _status_of(self, entry: Entry, detail: bytes) -> TransferStatus:
        flags = entry[4]
        if flags & _STATUS and not flags & _CUT:
            try:
                return wire.status_from_message(pb.TransferStatus.FromString(detail))
            except (DecodeError, XferdError):
                self.is_cut = True
        state = _STATES.get(entry[3], TransferState.POSTED)
        if state in ENDED and not _is_end(entry):
            state = TransferState.POSTED  # its end came before it was told of; that comes next
        error = None
        if state is TransferState.FAILED:
            error = XferdError(
                f"transfer {self.id} failed, for a reason that the ring has no room for", remedy="poll it"
            )
        if flags & _CUT or error is not None:
            self.is_cut = True
        return TransferStatus(
            self.id,
            self.key,
            self.op,
            state,
            self.priority,
            self.cause_id or str(self.id),
            self.home.node,
            self.remote_node,
            self.home.agent,
            error,
            _telemetry(entry, self._route(entry, detail)),
        )

    def _route(self, entry: Entry, detail: bytes) -> tuple[Hop, ...]:
        number, flags = entry[18], entry[4]
        told: bytes | None = b""
        if number:
            told = self.home.routes.get(number)
        elif flags & _ROUTE and not flags & _CUT:
            told = detail
        try:
            if told is not None:
                return _hops(told)
        except DecodeError:
            pass
        self.is_cut = True
        return ()


@functools.lru_cache(maxsize=256)
def _hops(detail: bytes) -> tuple[Hop, ...]:
    """Return the hops of a ROUTE's detail; a session sees few different ones."""
    return wire.hops_from_messages(pb.TransferStatus.FromString(detail).telemetry.route)


def _telemetry(entry: Entry, route: tuple[Hop, ...]) -> Telemetry:
    # fmt: off
    (
        _, _, _, _, _, _, total_nbytes, moved_nbytes,
        created_at, posted_at, first_byte_at, ended_at, queued_s, moving_s,
        descriptors, pieces, chunks, posts, _, _, _,
    ) = entry
    # fmt: on
    return Telemetry(
        created_at,
        posted_at,
        first_byte_at,
        ended_at,
        queued_s,
        moving_s,
        total_nbytes,
        moved_nbytes,
        descriptors,
        pieces,
        chunks,
        posts,
        route,
    )


def _is_end(entry: Entry) -> bool:
    kind: int = entry[2]
    return kind == _ENDED


def _posted(before: TransferStatus) -> TransferStatus:
    """Return what is told of a post until the daemon has answered."""
    told = before.telemetry
    return TransferStatus(  # field by field, because this is the hot path and `replace` takes three times as long
        before.id,
        before.key,
        before.op,
        TransferState.POSTED,
        before.priority,
        before.cause_id,
        before.local_node,
        before.remote_node,
        before.agent,
        None,
        Telemetry(
            told.created_at,
            time.time(),
            0.0,
            0.0,
            0.0,
            0.0,
            told.total_nbytes,
            0,
            told.descriptors,
            told.pieces,
            told.chunks,
            told.posts + 1,
            told.route,
        ),
    )
