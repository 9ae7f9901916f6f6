"""A cache laid into blocks comes out of them bit for bit, also after its blocks were moved one by one."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.strategies import composite

from xferd.api.types import Access, MemoryKind, RegionId, RegionInfo, RegionSource
from xferd.clients.demo import paging
from xferd.clients.demo.paging import Geometry


@composite
def caches(draw):
    """A geometry and a number of tokens that fits into it."""
    geometry = Geometry(
        layers=draw(st.integers(1, 4)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 8])),
        block_tokens=draw(st.integers(1, 17)),
        capacity=draw(st.integers(1, 9)),
    )
    return geometry, draw(st.integers(1, geometry.capacity * geometry.block_tokens))


def some_kv(geometry, tokens):
    return np.random.default_rng(1).standard_normal(geometry.kv_shape(tokens)).astype(np.float32)


def some_layers(geometry, fill=np.nan):
    """Layers side by side in one span of memory, as regions in a pool."""
    memory = np.full((geometry.layers, *geometry.layer_shape), fill, dtype=np.float32)
    return memory, list(memory)


def some_regions(geometry):
    """Records of one region for each layer; ids are not in order, as after many allocations."""
    return [
        RegionInfo(
            id=RegionId(1000 - layer),
            node="a",
            epoch=7,
            kind=MemoryKind.DRAM,
            source=RegionSource.POOL,
            device=0,
            nbytes=geometry.layer_nbytes,
            agent="prefill",
            access=Access.READ,
            writable=True,
        )
        for layer in range(geometry.layers)
    ]


@given(caches(), st.integers(0, 2**32))
def test_gather_returns_what_scatter_wrote(cache, seed):
    geometry, tokens = cache
    kv, (_, layers) = some_kv(geometry, tokens), some_layers(geometry)
    table = paging.scattered_table(geometry, tokens, seed)
    paging.scatter(kv, layers, table)
    out = np.empty_like(kv)
    paging.gather(layers, table, out)
    assert out.tobytes() == kv.tobytes()


@given(caches(), st.integers(0, 2**32))
def test_scatter_touches_no_other_block_and_leaves_no_rest(cache, seed):
    geometry, tokens = cache
    memory, layers = some_layers(geometry)
    table = paging.scattered_table(geometry, tokens, seed)
    paging.scatter(some_kv(geometry, tokens), layers, table)
    others = np.setdiff1d(np.arange(geometry.capacity), table)
    assert np.isnan(memory[:, :, others]).all()
    assert not np.isnan(memory[:, :, table]).any()


@given(caches(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_blocks_moved_by_their_rows_make_the_same_cache(cache, seed_here, seed_there):
    """Moving bytes as the descriptors say, from one order of blocks to another, hands the cache over."""
    geometry, tokens = cache
    kv = some_kv(geometry, tokens)
    (there, layers_there), (here, layers_here) = some_layers(geometry), some_layers(geometry)
    table_there = paging.scattered_table(geometry, tokens, seed_there)
    table_here = paging.scattered_table(geometry, tokens, seed_here)
    paging.scatter(kv, layers_there, table_there)

    blocks = paging.all_blocks(geometry, some_regions(geometry))
    source, target = (blocks.select(paging.block_rows(geometry, table)) for table in (table_there, table_here))
    assert len(source) == geometry.spans_of(table_there)
    assert source.total_nbytes == geometry.spans_of(table_here) * geometry.block_nbytes
    for number in range(len(source)):
        span_of(here, geometry, target, number)[:] = span_of(there, geometry, source, number)

    out = np.empty_like(kv)
    paging.gather(layers_here, table_here, out)
    assert out.tobytes() == kv.tobytes()


def span_of(memory, geometry, rows, number):
    """Return the bytes that a descriptor names; region ids are those of ``some_regions``."""
    layer = memory[1000 - int(rows.region[number])].reshape(-1).view(np.uint8)
    assert len(layer) == geometry.layer_nbytes
    start = int(rows.offset[number])
    return layer[start : start + int(rows.nbytes[number])]


def test_the_list_of_blocks_names_node_and_epoch():
    geometry = Geometry(layers=2, kv_heads=1, head_dim=2, block_tokens=4, capacity=3)
    blocks = paging.all_blocks(geometry, some_regions(geometry))
    assert (blocks.node, blocks.epoch, len(blocks)) == ("a", 7, 2 * 2 * 3)


def test_the_blocks_of_a_sequence_are_scattered_and_the_same_in_each_run():
    geometry = Geometry(layers=1, kv_heads=1, head_dim=1, block_tokens=16, capacity=100)
    table = paging.scattered_table(geometry, 700, seed=1)
    assert len(table) == len(set(table.tolist())) == 44
    assert (np.diff(table) != 1).mean() > 0.9
    assert table.tolist() == paging.scattered_table(geometry, 700, seed=1).tolist()
    assert table.tolist() != paging.scattered_table(geometry, 700, seed=2).tolist()


def test_a_sequence_that_does_not_fit_is_refused():
    geometry = Geometry(layers=1, kv_heads=1, head_dim=1, block_tokens=16, capacity=2)
    with pytest.raises(ValueError, match="33 tokens take 3 blocks; the cache has 2"):
        paging.scattered_table(geometry, 33, seed=1)


def test_regions_must_be_one_for_each_layer():
    geometry = Geometry(layers=2, kv_heads=1, head_dim=1, block_tokens=16, capacity=2)
    with pytest.raises(ValueError, match="1 regions for 2 layers"):
        paging.all_blocks(geometry, some_regions(geometry)[:1])
