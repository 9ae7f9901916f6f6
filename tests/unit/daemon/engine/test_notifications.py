"""Inboxes are bounded, lose nothing that they took, and wake who waits."""

from __future__ import annotations

import asyncio

import pytest

from xferd.api.errors import AgentUnknown, InvalidArgument, LimitExceeded, Overloaded
from xferd.api.types import Notification
from xferd.daemon.engine.notifications import Inboxes


@pytest.fixture
def inboxes() -> Inboxes:
    made = Inboxes("n", max_nbytes=1000, max_payload_nbytes=500)
    made.open("a")
    return made


async def test_any_bytes_come_out_in_order(inboxes: Inboxes) -> None:
    payloads = [b"", b"\0", bytes(range(256))]
    for payload in payloads:
        inboxes.deliver("a", Notification("a@n", payload))
    assert [n.payload for n in await inboxes.take("a", 2, 0)] == payloads[:2]
    assert [n.payload for n in await inboxes.take("a", 2, 0)] == payloads[2:]
    assert await inboxes.take("a", 2, 0) == []


async def test_who_waits_is_woken_by_the_first(inboxes: Inboxes) -> None:
    waiting = asyncio.ensure_future(inboxes.take("a", 10, 30.0))
    await asyncio.sleep(0)
    inboxes.deliver("a", Notification("a@n", b"x"))
    assert [n.payload for n in await waiting] == [b"x"]


async def test_a_cancelled_wait_takes_nothing(inboxes: Inboxes) -> None:
    waiting = asyncio.ensure_future(inboxes.take("a", 10, 30.0))
    await asyncio.sleep(0)
    inboxes.deliver("a", Notification("a@n", b"x"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(await inboxes.take("a", 10, 0)) == 1


async def test_a_full_inbox_refuses_and_has_room_again_once_emptied(inboxes: Inboxes) -> None:
    inboxes.deliver("a", Notification("a@n", bytes(400)))
    inboxes.deliver("a", Notification("a@n", bytes(400)))
    with pytest.raises(Overloaded, match="max_inbox"):
        inboxes.deliver("a", Notification("a@n", bytes(100)))
    await inboxes.take("a", 1, 0)
    inboxes.deliver("a", Notification("a@n", bytes(100)))


async def test_empty_payloads_take_room_too(inboxes: Inboxes) -> None:
    for _ in range(1000 // 64):
        inboxes.deliver("a", Notification("a@n", b""))
    with pytest.raises(Overloaded):
        inboxes.deliver("a", Notification("a@n", b""))


async def test_closing_wakes_who_waits_with_nothing(inboxes: Inboxes) -> None:
    waiting = asyncio.ensure_future(inboxes.take("a", 10, 30.0))
    await asyncio.sleep(0)
    inboxes.close("a")
    assert await waiting == []
    with pytest.raises(AgentUnknown):
        inboxes.deliver("a", Notification("a@n", b"x"))


def test_bad_notifications_are_refused(inboxes: Inboxes) -> None:
    with pytest.raises(LimitExceeded, match="501 bytes"):
        inboxes.deliver("a", Notification("a@n", bytes(501)))
    with pytest.raises(InvalidArgument):
        inboxes.check(Notification("", b"x"))
    with pytest.raises(AgentUnknown, match="'b'"):
        inboxes.deliver("b", Notification("b@n", b"x"))
