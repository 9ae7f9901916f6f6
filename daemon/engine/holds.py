"""The regions of this node that a transfer's bytes lie in: checked against its session's rights, and held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from xferd.api.errors import XferdError
from xferd.daemon.memory.regions import LocalActor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import RegionId, TransferId
    from xferd.daemon.engine.machine import Transfer
    from xferd.daemon.memory.regions import RegionTable, Standing


class _Look(Protocol):
    """What is done with the regions on one side of a transfer: checked, or held."""

    def __call__(self, regions: Sequence[RegionId], actor: LocalActor, *, write: bool) -> None: ...


class TransferHolds:
    """Checks and holds the local regions of transfers. What was checked is good while the table has not changed."""

    def __init__(self, regions: RegionTable) -> None:
        self._regions = regions
        self._checked: dict[TransferId, int] = {}
        self._standing: dict[TransferId, Standing] = {}

    def check(self, transfer: Transfer) -> None:
        """Check what ``take`` checks; for bytes that move before the event loop goes on. Raises as ``take``."""
        if self._checked.get(transfer.id) != self._regions.revision:
            self._each_side(transfer, self._regions.check)
            self._checked[transfer.id] = self._regions.revision

    def take(self, transfer: Transfer) -> None:
        """Hold the regions until ``release``, all or none.

        Raises:
            NotFound, Stale: a region has gone, or is going with its session.
            PermissionDenied: the session may not read (or write) one of them.
        """
        standing = self._standing.get(transfer.id)
        if standing is not None and self._regions.hold_again(standing):
            return
        holder, reason = holder_of(transfer), f"transfer of agent {transfer.agent}"
        try:
            self._each_side(
                transfer,
                lambda regions, actor, *, write: self._regions.hold(regions, holder, reason, actor, write=write),
            )
        except XferdError:
            self._regions.release(holder)
            raise
        self._standing[transfer.id] = self._regions.standing(holder)

    def release(self, transfer: Transfer) -> None:
        """Let go of what a transfer holds; fine if it holds nothing."""
        self._regions.release(holder_of(transfer))

    def forget(self, transfer_id: TransferId) -> None:
        """Forget what was checked for a transfer, which holds nothing."""
        self._checked.pop(transfer_id, None)
        self._standing.pop(transfer_id, None)

    def _each_side(self, transfer: Transfer, look: _Look) -> None:
        """Look at the regions of this node on either side of a transfer."""
        actor = LocalActor(transfer.session)
        assert transfer.plan is not None
        for regions, write in ((transfer.plan.source_regions, False), (transfer.plan.target_regions, True)):
            if regions:
                look(regions, actor, write=write)


def holder_of(transfer: Transfer) -> str:
    """Return the name under which a transfer holds regions."""
    return f"transfer {transfer.id}"
