"""A paged cache that an engine keeps in its daemon's pool: allocated, mapped, prepared once; then moved by index."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from xferd.api.types import RegionId
from xferd.clients.demo import paging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.descriptors import PreparedRef
    from xferd.api.types import Access
    from xferd.clients.demo.paging import BlockTable, FloatArray, Geometry
    from xferd.clients.sync import Client, PreparedList


class PagedCache:
    """One region for each layer, seen as arrays without a copy, and one prepared list of all blocks.

    Args:
        client: attached to the daemon whose pool is used; the regions go when its session does.
        geometry: of the cache.
        access: what other agents, also those of other nodes, may do with it.
        label: of the regions, for operators.
    """

    def __init__(self, client: Client, geometry: Geometry, *, access: Access, label: str) -> None:
        self.geometry = geometry
        self._client = client
        self._regions = client.allocate([geometry.layer_nbytes] * geometry.layers, access=access, label=label)
        self.layers = [cast("FloatArray", region.array(np.float32, geometry.layer_shape)) for region in self._regions]
        self._prepared = client.prepare(paging.all_blocks(geometry, [region.info for region in self._regions]))

    @property
    def region_ids(self) -> tuple[int, ...]:
        """Ids of the regions, in the order of the layers."""
        return tuple(region.id for region in self._regions)

    def blocks(self, table: BlockTable) -> PreparedRef:
        """Return a sequence's blocks as one side of a transfer."""
        return self._prepared.select(paging.block_rows(self.geometry, table))

    def wipe(self) -> None:
        """Overwrite everything, so that what is found in the cache later can only have come by a transfer."""
        for layer in self.layers:
            layer.fill(np.nan)

    def free(self) -> None:
        """Give the pool its memory back. The arrays must not be used any more."""
        self._prepared.release()
        self.layers.clear()
        self._client.free(self._regions)


def prepare_remote(client: Client, node: str, geometry: Geometry, region_ids: Sequence[int]) -> PreparedList:
    """Let the daemon check and keep a list of every block of another node's cache; what engines do when they meet.

    Raises:
        LookupError: a region is not there, or not shared with us.
    """
    found = {int(region.id): region.info for region in client.regions(node=node, ids=map(RegionId, region_ids))}
    missing = [region for region in region_ids if region not in found]
    if missing:
        raise LookupError(f"node {node} does not share regions {missing}")
    return client.prepare(paging.all_blocks(geometry, [found[region] for region in region_ids]))
