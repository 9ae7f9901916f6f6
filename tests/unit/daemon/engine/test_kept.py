"""Plans of ended transfers stay as long as there is room, those that are used now always."""

from __future__ import annotations

from typing import TYPE_CHECKING

from test_machine import plan, route, transfer

from xferd.api.types import TransferState
from xferd.daemon.engine.kept import KeptPlans

if TYPE_CHECKING:
    from xferd.api.types import TransferId
    from xferd.daemon.engine.machine import Transfer

PLAN_NBYTES = 32
"""Two tables of one row."""


def ended(book: dict[TransferId, Transfer], name: str) -> Transfer:
    t = transfer(plan((1, (route("r"),))), name)
    assert t.plan is not None
    assert t.plan.memory_nbytes == PLAN_NBYTES
    t.state = TransferState.DONE
    book[t.id] = t
    return t


def test_the_one_that_ended_first_loses_its_plan() -> None:
    book: dict[TransferId, Transfer] = {}
    kept = KeptPlans(book, 2 * PLAN_NBYTES)
    a, b, c = (ended(book, name) for name in "abc")
    assert kept.keep(a) == kept.keep(b) == kept.keep(a) == []  # a was posted again
    assert kept.keep(c) == ["b"]
    assert b.plan is None
    assert a.plan is not None


def test_one_that_is_posted_again_keeps_its_plan_and_comes_back_into_the_book() -> None:
    book: dict[TransferId, Transfer] = {}
    kept = KeptPlans(book, PLAN_NBYTES)
    a, b = ended(book, "a"), ended(book, "b")
    kept.keep(a)
    a.state = TransferState.RUNNING
    assert kept.keep(b) == []
    assert a.plan is not None
    a.state = TransferState.DONE
    assert kept.keep(a) == ["b"]


def test_the_last_one_is_kept_whatever_its_size_and_a_forgotten_one_makes_room() -> None:
    book: dict[TransferId, Transfer] = {}
    kept = KeptPlans(book, 2 * PLAN_NBYTES - 1)
    a, b = ended(book, "a"), ended(book, "b")
    kept.keep(a)
    kept.drop(a.id)
    kept.drop(a.id)
    assert kept.keep(b) == []
    assert KeptPlans(book, 0).keep(a) == []


def test_a_plan_that_has_grown_takes_the_room_of_others() -> None:
    book: dict[TransferId, Transfer] = {}
    kept = KeptPlans(book, 4 * PLAN_NBYTES)
    a, b = ended(book, "a"), transfer(plan((2, (route("r"),))), "b")
    book[b.id] = b
    b.state = TransferState.DONE
    assert b.plan is not None
    assert kept.keep(a) == kept.keep(b) == []
    for number in range(2):
        b.plan.legs[0].part(number, keep=True)
    assert kept.keep(b) == []  # three times its size, and one of the other
    assert kept.keep(ended(book, "c")) == ["a"]
    kept.drop("b")
    assert kept.keep(ended(book, "d")) == []
