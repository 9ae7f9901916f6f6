"""What other nodes said of their regions, kept so that a list is checked before its transfer is prepared.

An id is never given twice, so an entry stays right for as long as its region lives; that a region was freed is found
out by its node, which checks every request itself. Entries are therefore a saving of round trips, never a permission.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.api.types import RegionId, RegionInfo


class RemoteRegions:
    """A cache of region records by (node, epoch); one epoch a node.

    Args:
        max_regions: of one node. A node's entries are dropped when they would be more, and asked anew.
    """

    def __init__(self, max_regions: int = 131072) -> None:
        self._max_regions = max_regions
        self._nodes: dict[str, tuple[int, dict[RegionId, RegionInfo]]] = {}

    def __repr__(self) -> str:
        counts = ", ".join(f"{node}@{epoch}: {len(regions)}" for node, (epoch, regions) in self._nodes.items())
        return f"RemoteRegions({counts})"

    def known(self, node: str, epoch: int) -> dict[RegionId, RegionInfo]:
        """Return what is known of a node at one epoch; the caller must not change it."""
        at, regions = self._nodes.get(node, (0, {}))
        return regions if at == epoch else {}

    def put(self, node: str, epoch: int, regions: Iterable[RegionInfo]) -> None:
        """Keep records. Those of another epoch of the node are dropped."""
        kept = self.known(node, epoch)
        new = {region.id: region for region in regions}
        if len(kept) + len(new) > self._max_regions:
            kept = {}
        if len(new) <= self._max_regions:
            self._nodes[node] = (epoch, {**kept, **new})

    def drop(self, node: str) -> None:
        """Forget a node's regions."""
        self._nodes.pop(node, None)
