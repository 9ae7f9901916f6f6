"""KV cache in blocks, as a paged engine keeps it: block tables, scattering a cache into blocks, gathering it again.

Pure numpy over arrays that the caller owns (views of pool memory, as a rule); no model and no daemon here. A node's
cache is one region for each layer, shaped (2, capacity, block_tokens, kv_heads, head_dim): keys, then values, each
cut into equal blocks. A sequence owns some of the blocks, in any order; its block table says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xferd.api.descriptors import DescriptorList, IndexColumn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import RegionInfo

FloatArray: TypeAlias = NDArray[np.float32]
BlockTable: TypeAlias = NDArray[np.int64]
"""Number of the block that holds tokens [i * block_tokens, (i + 1) * block_tokens), at place i."""

ITEM_NBYTES = 4
KV = 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a paged cache of float32. ``capacity`` is the number of blocks of each layer."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    capacity: int

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: the keys, or the values, of ``block_tokens`` tokens in one layer."""
        return self.block_tokens * self.kv_heads * self.head_dim * ITEM_NBYTES

    @property
    def layer_nbytes(self) -> int:
        """Bytes of the region of one layer."""
        return KV * self.capacity * self.block_nbytes

    @property
    def layer_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the region of one layer, in elements."""
        return (KV, self.capacity, self.block_tokens, self.kv_heads, self.head_dim)

    def kv_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of a whole cache as a model wants it: layers, keys and values, heads, tokens, dimensions."""
        return (self.layers, KV, self.kv_heads, tokens, self.head_dim)

    def blocks_of(self, tokens: int) -> int:
        """Return how many blocks of a layer hold ``tokens`` tokens; the last one may be partly empty."""
        return -(-tokens // self.block_tokens)

    def spans_of(self, table: BlockTable) -> int:
        """Return how many separate spans of memory a sequence takes in all layers, keys and values."""
        return self.layers * KV * len(table)


def scattered_table(geometry: Geometry, tokens: int, seed: int) -> BlockTable:
    """Pick blocks for ``tokens`` tokens in random order, as an allocator that has been busy for a while would.

    Raises:
        ValueError: they need more blocks than there are.
    """
    needed = geometry.blocks_of(tokens)
    if needed > geometry.capacity:
        raise ValueError(f"{tokens} tokens take {needed} blocks; the cache has {geometry.capacity}")
    return np.random.default_rng(seed).permutation(geometry.capacity)[:needed]


def scatter(kv: FloatArray, layers: Sequence[FloatArray], table: BlockTable) -> None:
    """Write a cache of shape ``kv_shape`` into the blocks of ``table``; the rest of the last block becomes zero."""
    for layer, target in zip(kv, layers, strict=True):
        block_tokens = target.shape[2]
        by_token = layer.transpose(0, 2, 1, 3)
        tokens = by_token.shape[1]
        whole = tokens // block_tokens
        cut = whole * block_tokens
        shape = (KV, whole, *target.shape[2:])
        target[:, table[:whole]] = by_token[:, :cut].reshape(shape)
        if cut < tokens:
            target[:, table[whole], : tokens - cut] = by_token[:, cut:]
            target[:, table[whole], tokens - cut :] = 0


def gather(layers: Sequence[FloatArray], table: BlockTable, out: FloatArray) -> None:
    """Read the blocks of ``table`` into ``out``, of shape ``kv_shape``: what ``scatter`` wrote, bit for bit."""
    tokens = out.shape[3]
    for source, layer in zip(layers, out, strict=True):
        blocks = source[:, table]
        by_token = blocks.reshape(KV, -1, *source.shape[3:])[:, :tokens]
        layer[:] = by_token.transpose(0, 2, 1, 3)


def all_blocks(geometry: Geometry, regions: Sequence[RegionInfo]) -> DescriptorList:
    """Return every block of a cache, given the region of each layer: prepare it once, and let ``block_rows`` pick."""
    ids = np.array([region.id for region in regions], dtype=np.uint64)
    if len(ids) != geometry.layers:
        raise ValueError(f"{len(ids)} regions for {geometry.layers} layers")
    rows = KV * geometry.capacity
    offsets = np.arange(rows, dtype=np.uint64) * np.uint64(geometry.block_nbytes)
    return DescriptorList.from_columns(
        np.repeat(ids, rows),
        np.tile(offsets, geometry.layers),
        geometry.block_nbytes,
        node=regions[0].node,
        epoch=regions[0].epoch,
    )


def block_rows(geometry: Geometry, table: BlockTable) -> IndexColumn:
    """Return the rows of ``all_blocks`` that a sequence owns: by layer, then keys and values, then in token order."""
    planes = np.arange(geometry.layers * KV, dtype=np.int64)[:, np.newaxis] * geometry.capacity
    return (planes + table).ravel().astype(np.uint32)
