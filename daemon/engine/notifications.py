"""Inboxes of agents: bytes that others sent them, kept until they are taken or the session ends."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xferd.api.errors import AgentUnknown, InvalidArgument, LimitExceeded, Overloaded
from xferd.api.timeouts import timeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import Notification


@dataclass(slots=True)
class _Inbox:
    waiting: deque[Notification] = field(default_factory=deque)
    nbytes: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    listener: Callable[[], None] | None = None

    def changed(self) -> None:
        if self.listener is not None:
            self.listener()


class Inboxes:
    """One bounded inbox for each live agent of this node. Used on the event loop only.

    Args:
        max_nbytes: what one inbox holds; a sender gets ``Overloaded`` beyond it, and nothing is dropped.
        max_payload_nbytes: the largest single notification.
    """

    def __init__(self, node: str, *, max_nbytes: int, max_payload_nbytes: int) -> None:
        self._node = node
        self.max_nbytes = max_nbytes
        self.max_payload_nbytes = max_payload_nbytes
        self._inboxes: dict[str, _Inbox] = {}

    def open(self, agent: str) -> None:
        """Give a new agent an empty inbox."""
        self._inboxes[agent] = _Inbox()

    def close(self, agent: str) -> None:
        """Drop an agent's inbox and what is in it; whoever waits on it gets an empty answer."""
        inbox = self._inboxes.pop(agent, None)
        if inbox is not None:
            inbox.arrived.set()

    def check(self, notification: Notification) -> None:
        """Raise ``LimitExceeded`` if the payload is too large, ``InvalidArgument`` if no target is named."""
        if not notification.target:
            raise InvalidArgument("a notification names no target", remedy="give agent@node, or agent for this node")
        if len(notification.payload) > self.max_payload_nbytes:
            raise LimitExceeded(
                f"a notification of {len(notification.payload)} bytes",
                limit=f"{self.max_payload_nbytes} bytes (limits.max_notification)",
                remedy="move large data by a transfer and notify its place",
            )

    def deliver(self, agent: str, notification: Notification) -> None:
        """Put a notification into a local agent's inbox.

        Raises:
            AgentUnknown: no live session has this agent.
            Overloaded: the inbox is full.
        """
        self.check(notification)
        inbox = self._inboxes.get(agent)
        if inbox is None:
            raise AgentUnknown(f"no agent {agent!r} on node {self._node}", remedy="the target must have a session open")
        size = _room_of(notification)
        if inbox.nbytes + size > self.max_nbytes:
            raise Overloaded(
                f"the inbox of agent {agent!r} holds {inbox.nbytes} bytes",
                limit=f"{self.max_nbytes} bytes (limits.max_inbox)",
                remedy="the agent must take its notifications",
            )
        inbox.waiting.append(notification)
        inbox.nbytes += size
        inbox.arrived.set()
        inbox.changed()

    def listen(self, agent: str, listener: Callable[[], None] | None) -> None:
        """Have ``listener`` called whenever the agent's inbox has changed; there is one, None takes it back."""
        inbox = self._inboxes.get(agent)
        if inbox is not None:
            inbox.listener = listener

    def first(self, agent: str) -> Notification | None:
        """Return the oldest notification that waits, and leave it there."""
        inbox = self._inboxes.get(agent)
        return inbox.waiting[0] if inbox is not None and inbox.waiting else None

    def drop_first(self, agent: str) -> None:
        """Take the oldest notification out: it was told in another way."""
        inbox = self._inboxes[agent]
        inbox.nbytes -= _room_of(inbox.waiting.popleft())

    async def take(self, agent: str, limit: int, timeout_s: float) -> list[Notification]:
        """Take up to ``limit`` notifications, waiting for the first; empty when the time is over. Cancel-safe."""
        inbox = self._inboxes.get(agent)
        if inbox is None:
            raise AgentUnknown(f"no agent {agent!r} on node {self._node}", remedy="open a session")
        if not inbox.waiting and timeout_s > 0:
            try:
                async with timeout(timeout_s):
                    while not inbox.waiting and self._inboxes.get(agent) is inbox:
                        inbox.arrived.clear()
                        await inbox.arrived.wait()
            except TimeoutError:
                return []
        taken = [inbox.waiting.popleft() for _ in range(min(limit, len(inbox.waiting)))]
        inbox.nbytes -= sum(map(_room_of, taken))
        if taken:
            inbox.changed()  # a listener may have waited for this: what it had no room for is out of its way
        return taken


def _room_of(notification: Notification) -> int:
    """Return what a notification takes of its inbox; an empty one takes room too, or a flood would have no bound."""
    return len(notification.payload) + 8 * len(notification.regions) + 64
