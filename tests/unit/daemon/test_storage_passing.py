"""Checksums of bytes as they pass: the same as those of the disk, and only of blocks that really passed whole."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings, strategies as st
from storage_rig import KIB, damage, extent, opened, pattern, span

from xferd.api.errors import IntegrityError
from xferd.daemon.storage.catalogue import SUMMED
from xferd.daemon.storage.checksums import sums_of
from xferd.daemon.storage.footprints import Footprint, Footprints
from xferd.daemon.storage.passing import Awaited, covered, passed
from xferd.daemon.storage.reading import Arriving
from xferd.daemon.storage.touching import BlockSpan, ExtentIndex, spans_of
from xferd.plugins.base import Extent, MappedSpace
from xferd.plugins.posix import xxh3
from xferd.plugins.vectored import iov_of

if TYPE_CHECKING:
    from collections.abc import Sequence


@st.composite
def cuts(draw, nbytes: int):
    """Return sizes that add up to a number of bytes."""
    borders = sorted({0, nbytes, *draw(st.lists(st.integers(0, nbytes), max_size=4))})
    return [b - a for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("summer", [None, xxh3.load()], ids=["calls", "C"])
@given(st.data())
@settings(max_examples=60)
def test_sums_from_memory_are_those_of_the_bytes_where_they_go(summer, data):
    """Whatever the rows on both sides: gathered from pieces in any order, scattered over extents and gaps."""
    sizes = data.draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=3))
    index, extents, at = ExtentIndex(), [], 0
    for number, size in enumerate(sizes):
        extents.append(extent(number, at, size, data.draw(st.sampled_from([4096, 5000]))))
        at += extents[-1].room
    index.add(extents)
    slab = np.zeros(at, np.uint8)
    start = data.draw(st.integers(0, at - 1))
    total = data.draw(st.integers(1, at - start))
    order = data.draw(st.permutations(range(len(pieces := data.draw(cuts(total))))))
    offsets = np.cumsum([0, *pieces[:-1]])
    file = np.array([[start + offsets[i], pieces[i]] for i in order], dtype=np.uint64)
    memory_sizes = data.draw(cuts(total))
    store = [np.frombuffer(pattern(i, size), np.uint8) for i, size in enumerate(memory_sizes)]
    memory = np.concatenate([iov_of(each) for each in store])
    stream = np.concatenate(store)
    done = 0
    for position, size in file.tolist():
        slab[position : position + size] = stream[done : done + size]
        done += size
    chunk = passed(index.touched(file), file, memory)
    fd = os.memfd_create("slab")
    os.pwrite(fd, slab.tobytes(), 0)
    try:
        awaited = Awaited(chunk)
        for i in range(0, len(awaited.sums.begin), 2):  # as if a backend had summed every other one
            begin, stop = int(awaited.sums.begin[i]), int(awaited.sums.stop[i])
            awaited.sums.values[i] = xxhash.xxh3_64_intdigest(stream[begin:stop].tobytes())
            awaited.sums.is_known[i] = True
        if not awaited.sums.is_known.all():
            xxh3.sum_memory(awaited.sums, memory, summer)
        assert awaited.sums.is_known.all()
        for whole, sums in zip(chunk.whole, awaited.by_extent(), strict=True):
            for number, value in zip(whole.numbers.tolist(), sums.tolist(), strict=True):
                assert value == int(sums_of(fd, "slab", whole.extent, number, number + 1)[0])
    finally:
        os.close(fd)
    named = {(w.extent.id, n) for w in chunk.whole for n in w.numbers.tolist()}
    named |= {(e.id, n) for e, numbers in chunk.partial for n in numbers}
    assert named == {(s.extent.id, n) for s in index.touched(file) for n in range(s.first, s.stop)}


async def _write(rig, made, data: bytes, offset: int = 0, *, lie: bytes = b""):
    """Write as the engine does when it tells of each chunk; ``lie``: what stands in memory afterwards."""
    target = span(made, offset, len(data))
    ticket = await rig.sealer.begin([target])
    os.pwrite(made.space.fd, data, made.position + offset)
    await _tell(rig, ticket, lie or data, target)
    return ticket


async def _tell(rig, ticket, data: bytes, target) -> None:
    source = Extent(MappedSpace(), iov_of(data))
    await rig.sealer.left(ticket, rig.sealer.leaving(ticket, source, target), source)


async def test_what_was_summed_as_it_passed_is_not_read_back(tmp_path):
    """Seen by a lie: the sums are those of the memory."""
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        await rig.sealer.seal(await _write(rig, made, pattern(1, 64 * KIB), lie=pattern(2, 64 * KIB)))
        with pytest.raises(IntegrityError, match="block 0"):
            await rig.verify(made)


@pytest.mark.parametrize("has_checksums", [True, False])
async def test_sums_are_wanted_where_they_are_kept(tmp_path, has_checksums):
    async with opened(tmp_path, has_checksums=has_checksums) as rig:
        (made,) = await rig.allocate(64 * KIB)
        target, source = span(made, 0, 64 * KIB), Extent(MappedSpace(), iov_of(bytes(64 * KIB)))
        ticket = await rig.sealer.begin([target])
        assert (rig.sealer.leaving(ticket, source, target).sums is not None) == has_checksums
        assert rig.sealer.leaving(ticket, Extent(made.space, source.iov), target) is None
        rig.sealer.abandon(ticket)


async def test_blocks_that_did_not_pass_whole_or_once_are_read_back(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        first = await _write(rig, made, pattern(1, 40 * KIB), 2 * KIB)
        target = span(made, 8 * KIB, 8 * KIB)
        os.pwrite(made.space.fd, pattern(2, 8 * KIB), made.position + 8 * KIB)
        await _tell(rig, first, pattern(2, 8 * KIB), target)
        await rig.sealer.seal(first)
        assert made.extent.state.tolist() == [SUMMED] * 11 + [0] * 5
        await rig.verify(made, 0, 44 * KIB)


async def test_a_block_that_another_wrote_to_meanwhile_is_read_back(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        first = await _write(rig, made, pattern(1, 64 * KIB))
        second = await _write(rig, made, pattern(2, 32 * KIB), 16 * KIB)
        await rig.sealer.seal(second)
        await rig.sealer.seal(first)
        await rig.verify(made)


async def test_a_read_is_compared_where_it_arrives_and_damage_is_the_disks_or_the_memorys(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        data = pattern(1, 64 * KIB)
        await rig.write(made, data)
        whole = span(made, 0, 64 * KIB)

        async def read(got: bytes) -> None:
            ticket = rig.sealer.reading([whole], is_asked=True)
            target = Extent(MappedSpace(), iov_of(got))
            awaited = rig.sealer.arriving(ticket, whole, 0, whole.nbytes, target)
            await rig.sealer.arrived(ticket, awaited, whole, target)
            await rig.sealer.finish(ticket)

        before = rig.pool.counters.verified_nbytes
        await read(data)
        assert rig.pool.counters.verified_nbytes - before == 64 * KIB, "compared once, and not again from the disk"
        with pytest.raises(IntegrityError, match=r"block 3 .* arrived with other bytes"):
            await read(data[: 12 * KIB] + bytes(4 * KIB) + data[16 * KIB :])
        assert rig.pool.statistics().damaged_blocks == 0
        damage(made, 20 * KIB)
        with pytest.raises(IntegrityError, match=r"block 5 of extent 1 .* has checksum"):
            await read(os.pread(made.space.fd, 64 * KIB, made.position))
        assert rig.pool.statistics().damaged_blocks == 1


@given(st.data())
@settings(max_examples=60)
def test_blocks_of_a_leg_are_known_by_whichever_chunks_bring_them_whole(data):
    """Rows in any order, chunks cut anywhere that arrive in any order or twice: each block once, with its own sum."""
    index, extents, at = ExtentIndex(), [], 0
    for number, size in enumerate(data.draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=3))):
        extents.append(extent(number, at, size, data.draw(st.sampled_from([4096, 5000]))))
        at += extents[-1].room
    index.add(extents)
    start = data.draw(st.integers(0, at - 1))
    total = data.draw(st.integers(1, at - start))
    pieces = data.draw(cuts(total))
    offsets = np.cumsum([0, *pieces[:-1]])
    order = data.draw(st.permutations(range(len(pieces))))
    file = np.array([[start + offsets[i], pieces[i]] for i in order], dtype=np.uint64)
    stream = np.frombuffer(pattern(1, total), np.uint8)
    leg = covered(index.touched(file), file)
    arriving = Arriving(Footprint(file, index.touched(file)))
    marks = np.cumsum([0, *data.draw(cuts(total))]).tolist()
    chunks = list(itertools.pairwise(marks))
    for begin, stop in [*data.draw(st.permutations(chunks)), chunks[0]]:
        chunk = arriving.chunk(begin, stop)
        if chunk is not None:
            assert (chunk.sums.begin >= 0).all()
            assert (chunk.sums.stop <= stop - begin).all()
            here = stream[begin:stop].tobytes()
            xxh3.sum_memory(chunk.sums, iov_of(here), None)
            chunk.note()
    cut = set(marks)
    expected = {
        (whole.extent.id, number): xxhash.xxh3_64_intdigest(stream[begin:end].tobytes())
        for whole in leg.whole
        for number, begin, end in zip(*(column.tolist() for column in whole[1:]), strict=True)
        if not any(begin < mark < end for mark in cut)
    }
    found = [
        ((whole.extent.id, number), value)
        for whole, sums in arriving.by_extent()
        for number, value in zip(whole.numbers.tolist(), sums.tolist(), strict=True)
    ]
    assert len(found) == len(dict(found))
    assert dict(found) == expected


async def test_chunks_of_a_scattered_read_are_compared_at_its_end_each_block_once(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(256 * KIB)
        data = pattern(1, 256 * KIB)
        await rig.write(made, data)
        places = np.random.default_rng(1).permutation(16).tolist()  # pieces of 16 KiB, four blocks each
        rows = np.array([[made.position + place * 16 * KIB, 16 * KIB] for place in places], np.uint64)
        whole = Extent(made.space, rows)
        got = bytearray(b"".join(data[place * 16 * KIB : (place + 1) * 16 * KIB] for place in places))

        async def read(*, told: Sequence[int]) -> None:
            ticket = rig.sealer.reading([whole], is_asked=True)
            for start in told:
                part = whole.cut(start, start + 40 * KIB)  # ends within a piece, not within a block
                here = bytes(got[start : start + 40 * KIB])
                target = Extent(MappedSpace(), iov_of(here))
                awaited = rig.sealer.arriving(ticket, whole, start, part.nbytes, target)
                await rig.sealer.arrived(ticket, awaited, part, target)
            await rig.sealer.finish(ticket)

        chunks = range(0, 240 * KIB, 40 * KIB)
        for told in (chunks, [80 * KIB, 0], []):
            before = rig.pool.counters.verified_nbytes
            await read(told=told)
            assert rig.pool.counters.verified_nbytes - before == 256 * KIB
        got[50 * KIB] ^= 1
        await read(told=[0])
        with pytest.raises(IntegrityError, match="arrived with other bytes"):
            await read(told=chunks)


async def test_what_cannot_be_summed_where_it_arrives_is_read_once_more(tmp_path):
    """Memory of another kind, and pieces that are too small to be worth it."""
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        await rig.write(made, pattern(1, 64 * KIB))
        whole = span(made, 0, 64 * KIB)
        memory = bytearray(64 * KIB)
        pieces = np.array([[iov_of(memory)[0, 0] + i * 4 * KIB, 4 * KIB] for i in range(16)], np.uint64)
        for target in (Extent(whole.space, iov_of(memory)), Extent(MappedSpace(), pieces)):
            ticket = rig.sealer.reading([whole], is_asked=True)
            assert rig.sealer.arriving(ticket, whole, 0, whole.nbytes, target) is None
            before = rig.pool.counters.verified_nbytes
            await rig.sealer.finish(ticket)
            assert rig.pool.counters.verified_nbytes - before == 64 * KIB


async def test_a_block_that_is_written_while_it_arrives_is_nobodys_fault(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB)
        await rig.write(made, pattern(1, 64 * KIB))
        whole, target = span(made, 0, 64 * KIB), Extent(MappedSpace(), iov_of(late := pattern(2, 64 * KIB)))
        ticket = rig.sealer.reading([whole], is_asked=True)
        awaited = rig.sealer.arriving(ticket, whole, 0, whole.nbytes, target)
        await rig.write(made, late)
        await rig.sealer.arrived(ticket, awaited, whole, target)
        await rig.write(made, pattern(3, 64 * KIB))
        await rig.sealer.finish(ticket)


def test_blocks_whose_numbers_follow_each_other_are_one_span():
    one = extent(1, 0, 64 * KIB, 4096)
    numbers = np.array([7, 8, 9, 3, 5, 6], np.int64)
    assert spans_of(one, numbers) == [BlockSpan(one, 7, 10), BlockSpan(one, 3, 4), BlockSpan(one, 5, 7)]
    assert spans_of(one, numbers[:0]) == []


async def test_a_read_that_nobody_wants_compared_has_no_ticket(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(4 * KIB)
        await rig.write(made, pattern(1, 4 * KIB))
        assert rig.sealer.reading([span(made, 0, 4 * KIB)], is_asked=False) is None
        rig.pool.verifies = True
        assert rig.sealer.reading([span(made, 0, 4 * KIB)], is_asked=False) is not None


async def test_what_a_list_touches_is_looked_up_once_until_extents_come_or_go(tmp_path):
    async with opened(tmp_path) as rig:
        first, second = await rig.allocate(64 * KIB, 64 * KIB)
        index = rig.pool.volumes[0].indexes[0]
        known_ones, source = Footprints(), span(second, 0, 64 * KIB)
        known = known_ones.of(source, index)
        assert known.spans == (BlockSpan(second.extent, 0, 16),)
        assert known_ones.of(source, index) is known
        assert known_ones.of(span(second, 0, 64 * KIB), index) is not known, "another list, of which nothing is known"
        assert known_ones.of(source, ExtentIndex()).spans == ()
        await rig.free(first)
        assert known_ones.of(source, index) is not known
        known = known_ones.of(source, index)
        await rig.allocate(64 * KIB)
        assert known_ones.of(source, index) is not known
        await rig.free(second)
        assert known_ones.of(source, index).spans == ()
        gone = weakref.ref(source)
        del source
        assert gone() is None, "the plan may go"


def test_a_chunk_that_comes_twice_counts_as_it_comes_last():
    index = ExtentIndex()
    index.add([extent(1, 0, 8 * KIB, 4096)])
    rows = np.array([[0, 8 * KIB]], np.uint64)
    arriving = Arriving(Footprint(rows, index.touched(rows)))
    for seed in (1, 2):
        got = pattern(seed, 8 * KIB)
        chunk = arriving.chunk(0, 8 * KIB)
        xxh3.sum_memory(chunk.sums, iov_of(got), None)
        chunk.note()
    [(_, sums)] = arriving.by_extent()
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(got[at : at + 4096]) for at in (0, 4096)]
