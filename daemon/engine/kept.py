"""Plans of ended transfers, kept so that they can be posted again: so many bytes, the oldest given up first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xferd.api.types import TransferId
    from xferd.daemon.engine.machine import Transfer


class _Kept(NamedTuple):
    """What a plan took when it was last looked at, with how many chunks' lists."""

    nbytes: int
    parts: int


_NOTHING = _Kept(0, -1)


class KeptPlans:
    """Keeps the book of plans and takes those away that there is no room for.

    Args:
        transfers: all of them, by id.
        max_nbytes: memory for plans of ended transfers; the last one is kept whatever its size.
    """

    def __init__(self, transfers: Mapping[TransferId, Transfer], max_nbytes: int) -> None:
        self._transfers = transfers
        self._max_nbytes = max_nbytes
        self._kept: OrderedDict[TransferId, _Kept] = OrderedDict()
        self._nbytes = 0

    def keep(self, transfer: Transfer) -> list[TransferId]:
        """Keep the plan of a transfer that has ended; returns the transfers that have lost theirs for it.

        It stays in the book while the transfer is posted again.
        """
        if transfer.plan is None:
            return []
        before = self._kept.pop(transfer.id, _NOTHING)
        parts = transfer.plan.kept_parts
        if before.parts == parts:  # each post of a small transfer comes by here
            self._kept[transfer.id] = before
            return []
        now = self._kept[transfer.id] = _Kept(transfer.plan.memory_nbytes, parts)
        self._nbytes += now.nbytes - before.nbytes
        lost = []
        while self._nbytes > self._max_nbytes and len(self._kept) > 1:
            oldest, freed = self._kept.popitem(last=False)
            self._nbytes -= freed.nbytes
            dropped = self._transfers[oldest]
            if not dropped.is_active:  # else it is used now, and kept anew when it ends
                dropped.plan = dropped.quick = None
                lost.append(oldest)
        return lost

    def drop(self, transfer_id: TransferId) -> None:
        """Strike a transfer that is forgotten; fine if it is not in the book."""
        self._nbytes -= self._kept.pop(transfer_id, _NOTHING).nbytes
