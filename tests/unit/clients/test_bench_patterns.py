"""Every way in which bytes can be wrong is seen, and called by its name."""

from __future__ import annotations

import numpy as np
import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._patterns import Arrival, Blocks

SOURCE_ROWS, TARGET_ROWS = np.array([5, 2, 7]), np.array([1, 6, 3])
VISIT = 9


def moved(block_nbytes: int = 64, count: int = 8) -> tuple[Blocks, Blocks]:
    """A source that was stamped twice, and a target that got its blocks."""
    source = Blocks(np.zeros(block_nbytes * count, np.uint8), block_nbytes)
    target = Blocks(np.zeros(block_nbytes * count, np.uint8), block_nbytes)
    source.stamp(np.arange(count), VISIT - 1)
    source.stamp(SOURCE_ROWS, VISIT)
    target.words[TARGET_ROWS] = source.words[SOURCE_ROWS]
    return source, target


@pytest.mark.parametrize("block_nbytes", [8, 64, 3 << 20])
def test_bytes_that_are_right_are_right(block_nbytes):
    _, target = moved(block_nbytes)
    assert target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT) is None


def test_a_missing_block_is_seen():
    _, target = moved()
    target.words[6, 3] = 0
    fault = target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT)
    assert (fault.kind, fault.block, fault.word) == ("missing", 6, 3)


def test_a_block_in_another_ones_place_is_seen():
    source, target = moved()
    target.words[6] = source.words[5]
    fault = target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT)
    assert (fault.kind, fault.block) == ("misplaced", 6)


def test_bytes_of_an_earlier_visit_are_seen():
    source, target = moved()
    source.stamp(SOURCE_ROWS, VISIT - 1)
    target.words[3] = source.words[7]
    fault = target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT)
    assert (fault.kind, fault.block) == ("stale", 3)


def test_bytes_outside_the_target_blocks_are_seen():
    source, target = moved()
    target.words[4, 7] = source.words[5, 0]
    fault = target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT)
    assert (fault.kind, fault.block, fault.word) == ("stray", 4, 7)


def test_one_flipped_bit_is_seen():
    _, target = moved(3 << 20)
    target.words[3, -1] ^= np.uint64(1)
    fault = target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT)
    assert (fault.block, fault.word) == (3, target.block_words - 1)
    assert fault.kind != "missing"


def test_a_source_that_was_overwritten_does_not_excuse_the_target():
    source, target = moved()
    source.words[SOURCE_ROWS] = 0
    target.words[TARGET_ROWS] = source.words[SOURCE_ROWS]
    assert target.fault(TARGET_ROWS, SOURCE_ROWS, VISIT).kind == "missing"


def test_no_word_is_zero_and_no_two_are_equal():
    source = Blocks(np.zeros(1 << 16, np.uint8), 4096)
    for visit in (1, 2):
        source.stamp(np.arange(16), visit)
        assert source.words.all()
        assert len(np.unique(source.words)) == source.words.size


def from_two_sources() -> tuple[Blocks, list[Arrival]]:
    """A target that got blocks of two clients, who have the same blocks at the same places."""
    sources = [Blocks(np.zeros(512, np.uint8), 64) for _ in range(2)]
    target = Blocks(np.zeros(512, np.uint8), 64)
    arrivals = [Arrival(np.array([1, 4]), SOURCE_ROWS[:2], 0), Arrival(np.array([0, 7]), SOURCE_ROWS[:2], 1)]
    for number, (source, arrival) in enumerate(zip(sources, arrivals, strict=True)):
        source.stamp(arrival.source_rows, VISIT, number)
        target.words[arrival.rows] = source.words[arrival.source_rows]
    return target, arrivals


def test_several_sources_may_fill_one_target():
    target, arrivals = from_two_sources()
    assert target.fault_of(arrivals, VISIT) is None


def test_another_clients_block_is_seen_though_its_place_was_the_same():
    target, arrivals = from_two_sources()
    target.words[4] = target.words[7]
    fault = target.fault_of(arrivals, VISIT)
    assert (fault.kind, fault.block) == ("misplaced", 4)


@pytest.mark.parametrize("block_nbytes", [0, 4, 13])
def test_blocks_are_whole_words(block_nbytes):
    with pytest.raises(InvalidArgument, match="multiples of 8"):
        Blocks(np.zeros(64, np.uint8), block_nbytes)
