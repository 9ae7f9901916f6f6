"""The table of a transfer's states. What happens on a transition is in ``machine.py``.

::

    PREPARED --post--> POSTED --start--> RUNNING --finish--> DONE
        |                 |                 |---fail-------> FAILED
        '-----cancel------'-----cancel------'---cancel-----> CANCELLED
    DONE | FAILED | CANCELLED --post--> POSTED
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from xferd.api.errors import InternalError, InvalidState
from xferd.api.types import ENDED, TransferState

if TYPE_CHECKING:
    from collections.abc import Sequence


class Event(enum.Enum):
    """What moves a transfer from one state to the next."""

    __hash__ = object.__hash__  # as ``TransferState``

    POST = "post"
    START = "start"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


ACTIVE = frozenset({TransferState.POSTED, TransferState.RUNNING})

_S, _E = TransferState, Event
TRANSITIONS: dict[tuple[TransferState, Event], TransferState] = {
    (_S.PREPARED, _E.POST): _S.POSTED,
    (_S.PREPARED, _E.CANCEL): _S.CANCELLED,
    (_S.POSTED, _E.START): _S.RUNNING,
    (_S.POSTED, _E.FAIL): _S.FAILED,
    (_S.POSTED, _E.CANCEL): _S.CANCELLED,
    (_S.RUNNING, _E.FINISH): _S.DONE,
    (_S.RUNNING, _E.FAIL): _S.FAILED,
    (_S.RUNNING, _E.CANCEL): _S.CANCELLED,
    **{(state, _E.POST): _S.POSTED for state in ENDED},
}


class Step(NamedTuple):
    """One line of a transfer's story; it becomes text only where somebody reads it."""

    at: float
    event: Event
    state: TransferState

    def __str__(self) -> str:
        return f"{self.at:.6f} {self.event.value} {self.state.value}"


def next_state(what: str, state: TransferState, event: Event, story: Sequence[object]) -> TransferState:
    """Return the state that follows, or raise.

    Raises:
        InvalidState: a client posted something that is posted or running.
        InternalError: any other pair; the message carries the object's recent history.
    """
    after = TRANSITIONS.get((state, event))
    if after is not None:
        return after
    if event is Event.POST:
        raise InvalidState(
            f"{what} is {state.value} and cannot be posted", remedy="wait until it has ended, or cancel it first"
        )
    raise InternalError(
        f"{what}: no transition from {state.value} on {event.value}; story: {' > '.join(map(str, story))}"
    )
