"""From a request to a plan: its lists checked, its rights and totals looked at, a route planned; nothing is changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.api.descriptors import check_total
from xferd.api.errors import InvalidArgument, PermissionDenied
from xferd.api.types import Access, TransferOp
from xferd.daemon.engine.lists import LARGE_ROWS

if TYPE_CHECKING:
    from xferd.api.types import Caller, SessionId, TransferRequest
    from xferd.daemon.engine.lists import CheckedList, ListBook
    from xferd.daemon.engine.notifications import Inboxes
    from xferd.daemon.engine.plan import Plan
    from xferd.daemon.engine.planner import Planner


class Intake:
    """Plans what sessions ask for."""

    def __init__(self, node: str, lists: ListBook, planner: Planner, inboxes: Inboxes) -> None:
        self._node = node
        self._lists = lists
        self._planner = planner
        self._inboxes = inboxes

    async def plan(self, caller: Caller, request: TransferRequest, *, explore: bool = False) -> Plan:
        """Check a request's lists and rights and plan it, changing nothing; ``explore`` as the planner says."""
        self._check_request(request)
        local = await self._lists.checked(caller.session, request.local)
        remote = await self._lists.checked(caller.session, request.remote)
        source, target = self._ends(request, local, remote)
        if len(source) + len(target) > LARGE_ROWS:
            return await asyncio.to_thread(self._planner.plan, source, target, pin=request.backend, explore=explore)
        return self._planner.plan(source, target, pin=request.backend, explore=explore)

    def plan_now(self, session: SessionId, request: TransferRequest) -> Plan | None:
        """As ``plan`` of what will be posted, in one step; None where it must wait for a peer or a thread."""
        self._check_request(request)
        local = self._lists.checked_now(session, request.local)
        remote = None if local is None else self._lists.checked_now(session, request.remote)
        if local is None or remote is None or len(local) + len(remote) > LARGE_ROWS:
            return None
        source, target = self._ends(request, local, remote)
        return self._planner.plan(source, target, pin=request.backend, explore=True)

    def _check_request(self, request: TransferRequest) -> None:
        if request.notification is not None:
            self._inboxes.check(request.notification)
        if request.timeout_s < 0:
            raise InvalidArgument(f"timeout_s is {request.timeout_s}", limit="at least 0", remedy="0 is the default")

    def _ends(
        self, request: TransferRequest, local: CheckedList, remote: CheckedList
    ) -> tuple[CheckedList, CheckedList]:
        """Return the lists as (source, target), after checking that they fit each other and the op."""
        if local.node:
            raise InvalidArgument(
                f"the local list is of node {local.node}",
                limit=f"node {self._node}",
                remedy="swap the lists and the op",
            )
        check_total(local, remote)
        _check_remote_rights(remote, request.op)
        return (remote, local) if request.op is TransferOp.READ else (local, remote)


def _check_remote_rights(remote: CheckedList, op: TransferOp) -> None:
    need = Access.READ if op is TransferOp.READ else Access.WRITE
    if remote.node and need not in remote.rights:
        raise PermissionDenied(
            f"a region of the remote list does not grant {need.name}",
            limit=f"access {remote.rights.name or 'NONE'} on node {remote.node}",
            remedy=f"its owner must register it with access {need.name}",
        )
