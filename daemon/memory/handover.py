"""Handing regions over: a change of owner instead of a copy, for two agents of this node.

The bytes stay where they are and the ids stay good; who frees them, and with whose session they end, changes. Checks,
the new owner's notification and the change are one step of the event loop under the region table's lock: either all of
it happens or nothing. Not here: the table (``regions.py``), inboxes (``engine/notifications.py``).
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import structlog

from xferd.api.errors import AgentUnknown, InvalidArgument, LimitExceeded, Unsupported
from xferd.api.types import Notification, RegionListing
from xferd.daemon.sessions.caller import session_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.types import Caller, HandOverRequest, RegionInfo, SessionId
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.memory.regions import RegionTable

log = structlog.get_logger(__name__)


class HandOverDesk:
    """Gives regions of one agent to another.

    Args:
        regions: whose owners change.
        inboxes: where the new owner is told.
        find_session: the open session of an agent, or None.
        max_group: most regions of one call.
    """

    def __init__(
        self,
        node: str,
        epoch: int,
        regions: RegionTable,
        inboxes: Inboxes,
        find_session: Callable[[str], SessionId | None],
        *,
        max_group: int,
    ) -> None:
        self._node = node
        self._epoch = epoch
        self._regions = regions
        self._inboxes = inboxes
        self._find_session = find_session
        self.max_group = max_group
        self.given_regions = 0
        self.given_nbytes = 0

    def hand_over(self, caller: Caller, request: HandOverRequest) -> RegionListing:
        """Change the owner of regions, all or none; see ``xferd.api.engine.Memory.hand_over``.

        A session gives its own regions, an operator those of any session. Transfers that the giver has prepared are
        left alone: rights are looked at whenever one is posted.
        """
        giver = None if caller.admin and caller.session is None else session_of(caller)
        agent = self._target(request.to)
        self._check_size(request)
        taker = self._find_session(agent)
        if taker is None:
            raise AgentUnknown(f"no agent {agent!r} on node {self._node}", remedy="the new owner must have a session")
        if taker == giver:
            raise InvalidArgument(
                f"agent {agent!r} gives regions to itself", limit="another agent", remedy="name the new owner"
            )
        source = f"{caller.agent}@{self._node}"

        def announce(infos: tuple[RegionInfo, ...]) -> None:
            ids = tuple(info.id for info in infos)
            self._inboxes.deliver(
                agent, Notification(f"{agent}@{self._node}", request.payload, source=source, regions=ids)
            )

        infos = self._regions.hand_over(request.regions, giver, taker, agent, access=request.access, announce=announce)
        nbytes = sum(info.nbytes for info in infos)
        self.given_regions += len(infos)
        self.given_nbytes += nbytes
        log.info(
            "regions_handed_over",
            cause_id=request.cause_id or secrets.token_hex(8),
            source=source,
            agent=agent,
            session=taker,
            regions=len(infos),
            first_region=infos[0].id,
            nbytes=nbytes,
        )
        return RegionListing(self._node, self._epoch, infos)

    def _target(self, to: str) -> str:
        agent, _, node = to.partition("@")
        if not agent:
            raise InvalidArgument("the hand-over names no agent", remedy="give the agent that is to own the regions")
        if node not in ("", self._node):
            raise Unsupported(
                f"agent {agent!r} is on node {node!r}",
                limit=f"agents of node {self._node}",
                remedy="move the bytes by a transfer; memory cannot change nodes",
            )
        return agent

    def _check_size(self, request: HandOverRequest) -> None:
        if not request.regions:
            raise InvalidArgument("the hand-over names no region", limit="at least one", remedy="name regions")
        if len(request.regions) > self.max_group:
            raise LimitExceeded(
                f"a hand-over of {len(request.regions)} regions",
                limit=f"{self.max_group} regions (limits.max_group)",
                remedy="hand them over in several calls",
            )
