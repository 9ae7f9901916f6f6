"""What the sync and the async client share about lists and transfers: building requests, judging ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np

from xferd.api.descriptors import U32, DescriptorList, IndexColumn, PreparedRef
from xferd.api.errors import Cancelled, DeadlineExceeded, InvalidArgument, OutOfBounds, XferdError
from xferd.api.types import (
    ENDED,
    Notification,
    Priority,
    TransferId,
    TransferOp,
    TransferRequest,
    TransferState,
    TransferStatus,
)
from xferd.clients.memory import RegionBase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from xferd.api.types import PreparedHandle, PreparedInfo, Telemetry
    from xferd.clients._ring_tracks import Track
    from xferd.clients.devices import Event


class PreparedBase:
    """A list that the daemon has checked and keeps; use it, or rows of it, in transfers."""

    def __init__(self, info: PreparedInfo) -> None:
        self.info = info
        self._is_released = False

    @property
    def handle(self) -> PreparedHandle:
        """The daemon's handle."""
        return self.info.handle

    def __len__(self) -> int:
        return self.info.count

    def select(self, index: ArrayLike) -> PreparedRef:
        """Return rows by number, in the order of ``index``.

        Raises:
            OutOfBounds: a number outside the list.
            InvalidArgument: no integers.
        """
        return PreparedRef(self.handle, index_column(index, self.info.count))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.handle}: {self.info.count} rows, {self.info.total_nbytes} bytes>"


ListLike: TypeAlias = DescriptorList | PreparedRef | PreparedBase | RegionBase
"""What a transfer takes: a list, a prepared list, rows of one, or a whole region."""

NotificationLike: TypeAlias = Notification | tuple[str, bytes]
"""A notification, or (target, payload)."""


def index_column(index: ArrayLike, count: int) -> IndexColumn:
    """Return row numbers as they travel."""
    numbers = np.atleast_1d(np.asarray(index))
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise InvalidArgument(
            f"row numbers of dtype {numbers.dtype} and {numbers.ndim} dimensions",
            limit="one dimension of integers",
            remedy="give an index array",
        )
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= count):
        wrong = int(numbers.min()) if int(numbers.min()) < 0 else int(numbers.max())
        raise OutOfBounds(f"row {wrong}", limit=f"0 to {count - 1}", remedy="number rows of the prepared list from 0")
    return numbers.astype(U32)


def as_list(spec: ListLike) -> DescriptorList | PreparedRef:
    """Return what the wire knows."""
    if isinstance(spec, RegionBase):
        return spec.whole()
    if isinstance(spec, PreparedBase):
        return PreparedRef(spec.handle)
    return spec


class TransferOptions(TypedDict, total=False):
    """Keyword arguments of everything that makes a transfer, or asks about one.

    Attributes:
        key: idempotency key; the same key twice in a session gives the same transfer.
        timeout_s: deadline of the transfer, from posting; 0.0, the default, takes the daemon's.
        priority: class for the daemon's scheduler.
        notification: delivered to its target after the last byte.
        backend: pins the backend that moves; "" lets the planner choose.
        cause_id: stands in the logs of both nodes; "" lets the daemon make one.
        verify: compare what is read from storage pools with its checksums; the transfer fails where they differ.
        durable: what is written to files is on the disk before the transfer is DONE; it fails where the disk says no.
        wait_event: of ``open_event``: what touches GPU memory waits for its last record before the transfer was posted.
        done_event: of ``make_event``: what touches GPU memory records it when it has ended.
    """

    key: str
    timeout_s: float
    priority: Priority
    notification: NotificationLike | None
    backend: str
    cause_id: str
    verify: bool
    durable: bool
    wait_event: Event | int
    done_event: Event | int


_OPTIONS = frozenset(TransferOptions.__annotations__)


def check_options(options: TransferOptions) -> None:
    """Refuse what no transfer knows: a misspelt ``backend`` must not become the planner's choice.

    Raises:
        TypeError: an unknown name, as Python says it of any keyword argument; it names those that there are.
    """
    if not options.keys() <= _OPTIONS:
        unknown = ", ".join(repr(name) for name in sorted(options.keys() - _OPTIONS))
        raise TypeError(f"unexpected keyword argument {unknown} of a transfer; there are {', '.join(sorted(_OPTIONS))}")


def transfer_request(
    op: TransferOp | str, local: ListLike, remote: ListLike, options: TransferOptions, *, hold: bool = False
) -> TransferRequest:
    """Build a request from what users have at hand."""
    check_options(options)
    return TransferRequest(
        op=op_of(op),
        local=as_list(local),
        remote=as_list(remote),
        key=options.get("key", ""),
        timeout_s=options.get("timeout_s", 0.0),
        priority=options.get("priority", Priority.NORMAL),
        cause_id=options.get("cause_id", ""),
        notification=notification_of(options),
        backend=options.get("backend", ""),
        verify=options.get("verify", False),
        durable=options.get("durable", False),
        hold=hold,
        wait_event=event_number(options.get("wait_event", 0)),
        done_event=event_number(options.get("done_event", 0)),
    )


def event_number(event: Event | int) -> int:
    """Return the daemon's number of an event; 0 is none."""
    return event if isinstance(event, int) else event.number


def notification_of(options: TransferOptions) -> Notification | None:
    """Return the notification that is asked for."""
    notification = options.get("notification")
    if isinstance(notification, tuple):
        target, payload = notification
        return Notification(target, bytes(payload))
    return notification


def op_of(op: TransferOp | str) -> TransferOp:
    """Return the operation by itself or by its name."""
    try:
        return op if isinstance(op, TransferOp) else TransferOp(op.upper())
    except ValueError as exc:
        raise InvalidArgument(f"transfer op {op!r}", limit="READ or WRITE", remedy="use TransferOp") from exc


def checked(status: TransferStatus) -> TransferStatus:
    """Return the status of a transfer that is DONE or has not ended.

    Raises:
        XferdError: it FAILED; this is its error.
        Cancelled: it was cancelled.
    """
    if status.state is TransferState.FAILED:
        raise status.error or XferdError(f"transfer {status.id} failed without a reason")
    if status.state is TransferState.CANCELLED:
        raise Cancelled(f"transfer {status.id} was cancelled", remedy="post it again if it is still wanted")
    return status


def check_in_time(status: TransferStatus, timeout_s: float | None) -> TransferStatus:
    """Return the status of a transfer that is DONE; raises as ``checked``, and ``DeadlineExceeded`` while it runs."""
    if status.state in ENDED or timeout_s is None:
        return checked(status)
    raise DeadlineExceeded(
        f"transfer {status.id} is still {status.state.value}",
        limit=f"{timeout_s:g} s of waiting",
        remedy="it goes on: wait again, or cancel it",
    )


class TransferBase:
    """A transfer and what was last heard of it.

    ``status`` is not asked for anew: ``poll`` does that. Where the client has a ring and the transfer went over it, its
    end is heard as soon as it stands in the ring, with no system call.
    """

    def __init__(self, told: TransferStatus | Track) -> None:
        self._track: Track | None = None
        self._status: TransferStatus | None = None
        if isinstance(told, TransferStatus):
            self._status = told
        else:
            self._track = told

    def _glance(self) -> None:
        """Take what stands in the ring, if there is one."""

    def _untrack(self) -> None:
        """Leave it to gRPC from here on: the ring is lost, or cannot do what is wanted of it."""
        if self._track is not None:
            self._track.release()

    @property
    def status(self) -> TransferStatus:
        """As last heard."""
        track = self._track
        if track is None:
            assert self._status is not None
            return self._status
        if track.ask is not None and not track.ask.is_over:
            self._glance()
        return track.status

    @status.setter
    def status(self, status: TransferStatus) -> None:
        if self._track is None:
            self._status = status
        else:
            self._track.status = status

    @property
    def id(self) -> TransferId:
        """The daemon's id."""
        return self.status.id if self._track is None else self._track.id

    @property
    def state(self) -> TransferState:
        """As last heard."""
        return self.status.state

    @property
    def is_ended(self) -> bool:
        """Whether no byte of it moves any more, as last heard."""
        track = self._track
        if track is None:
            return self.status.state in ENDED
        if track.ask is not None and not track.ask.is_over:
            self._glance()
        return track.has_ended

    @property
    def telemetry(self) -> Telemetry:
        """As last heard."""
        return self.status.telemetry

    def __repr__(self) -> str:
        counts = f"{self.telemetry.moved_nbytes}/{self.telemetry.total_nbytes} bytes"
        return f"<{type(self).__name__} {self.id} {self.status.op.value} {self.state.value} {counts}>"


TransferLike: TypeAlias = TransferBase | TransferId | str


def id_of(transfer: TransferLike) -> TransferId:
    """Return a transfer's id."""
    return transfer.id if isinstance(transfer, TransferBase) else TransferId(transfer)


def ids_of(transfers: Iterable[TransferLike]) -> list[TransferId]:
    """Return the ids, in order."""
    return [id_of(transfer) for transfer in transfers]


def are_over(statuses: list[TransferStatus], *, any_of: bool) -> bool:
    """Say whether all, or any, have ended; none at all is over."""
    ended = [status.state in ENDED for status in statuses]
    return not ended or (any(ended) if any_of else all(ended))


def tell(transfers: Iterable[TransferLike], statuses: Iterable[TransferStatus]) -> None:
    """Let transfer objects know what was heard of them."""
    for transfer, status in zip(transfers, statuses, strict=True):
        if isinstance(transfer, TransferBase):
            transfer.status = status
