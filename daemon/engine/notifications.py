"""Inboxes of agents: bytes that others sent them, kept until they are taken or the session ends."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xferd.api.errors import AgentUnknown, InvalidArgument, LimitExceeded, Overloaded

if TYPE_CHECKING:
    from xferd.api.types import Notification


@dataclass(slots=True)
class _Inbox:
    waiting: deque[Notification] = field(default_factory=deque)
    nbytes: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


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
        # A payload of nothing still takes room, or a flood of them would have no bound.
        size = len(notification.payload) + 64
        if inbox.nbytes + size > self.max_nbytes:
            raise Overloaded(
                f"the inbox of agent {agent!r} holds {inbox.nbytes} bytes",
                limit=f"{self.max_nbytes} bytes (limits.max_inbox)",
                remedy="the agent must take its notifications",
            )
        inbox.waiting.append(notification)
        inbox.nbytes += size
        inbox.arrived.set()

    async def take(self, agent: str, limit: int, timeout_s: float) -> list[Notification]:
        """Take up to ``limit`` notifications, waiting for the first; empty when the time is over. Cancel-safe."""
        inbox = self._inboxes.get(agent)
        if inbox is None:
            raise AgentUnknown(f"no agent {agent!r} on node {self._node}", remedy="open a session")
        if not inbox.waiting and timeout_s > 0:
            try:
                async with asyncio.timeout(timeout_s):
                    while not inbox.waiting and self._inboxes.get(agent) is inbox:
                        inbox.arrived.clear()
                        await inbox.arrived.wait()
            except TimeoutError:
                return []
        taken = [inbox.waiting.popleft() for _ in range(min(limit, len(inbox.waiting)))]
        inbox.nbytes -= sum(len(notification.payload) + 64 for notification in taken)
        return taken
