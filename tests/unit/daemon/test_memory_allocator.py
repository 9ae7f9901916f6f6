"""The allocator never overlaps, never loses a byte, and places a group whole or not at all."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from xferd.api.errors import InvalidArgument, PoolExhausted
from xferd.daemon.memory.allocator import ExtentAllocator

PAGE = 4096
UNITS = 48


class AllocatorMachine(RuleBasedStateMachine):
    """Against a model that is a list of units, each with the extent that covers it or None."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(UNITS * PAGE + 17)
        self.model: list[int | None] = [None] * UNITS
        self.failed = 0
        self.peak = 0

    @rule(target=extents, sizes=st.lists(st.integers(1, 12 * PAGE), min_size=1, max_size=6))
    def allocate(self, sizes: list[int]) -> object:
        units = [-(-size // PAGE) for size in sizes]
        before = list(self.model)
        try:
            offsets = self.allocator.allocate_group(sizes)
        except PoolExhausted:
            self.failed += 1
            assert self.model == before
            assert sum(units) > self._longest_free_run(), "a group that fits in one piece was refused"
            return multiple()
        for offset, unit in zip(offsets, units, strict=True):
            start = offset // PAGE
            assert offset % PAGE == 0
            assert self.model[start : start + unit] == [None] * unit, "an extent overlaps another"
            self.model[start : start + unit] = [offset] * unit
        self.peak = max(self.peak, UNITS - self.model.count(None))
        return multiple(*offsets)

    @rule(offset=consumes(extents))
    def free(self, offset: int) -> None:
        size = self.model.count(offset) * PAGE
        assert self.allocator.size_of(offset) == size
        assert self.allocator.free(offset) == size
        self._forget(offset)
        with pytest.raises(InvalidArgument, match="no allocated extent"):
            self.allocator.free(offset)

    @rule(offsets=st.lists(consumes(extents), max_size=5, unique=True))
    def free_group(self, offsets: list[int]) -> None:
        self.allocator.free_group(offsets)
        for offset in offsets:
            self._forget(offset)

    @rule(offset=st.integers(-PAGE, UNITS * PAGE))
    def free_what_is_not_there(self, offset: int) -> None:
        if offset not in self.model:
            with pytest.raises(InvalidArgument):
                self.allocator.free(offset)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.allocator.check_invariants()
        now = self.allocator.statistics()
        free, longest = self.model.count(None), self._longest_free_run()
        assert now.free_nbytes == free * PAGE
        assert now.used_nbytes == (UNITS - free) * PAGE
        assert now.largest_free_nbytes == longest * PAGE
        assert now.fragmentation == (1 - longest / free if free else 0.0)
        assert now.allocations == len({extent for extent in self.model if extent is not None})
        assert now.failed_allocations == self.failed
        assert now.peak_used_nbytes == self.peak * PAGE

    def _forget(self, offset: int) -> None:
        self.model = [None if extent == offset else extent for extent in self.model]

    def _longest_free_run(self) -> int:
        longest = run = 0
        for extent in self.model:
            run = run + 1 if extent is None else 0
            longest = max(longest, run)
        return longest


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def fragmented(units: int) -> ExtentAllocator:
    """An allocator of which every second unit is free."""
    allocator = ExtentAllocator(units * PAGE)
    offsets = allocator.allocate_group([PAGE] * units)
    allocator.free_group(offsets[::2])
    return allocator


def test_a_group_lies_side_by_side_where_there_is_room() -> None:
    assert ExtentAllocator(1 << 20).allocate_group([PAGE, 1, 2 * PAGE]) == [0, PAGE, 2 * PAGE]


def test_a_group_is_scattered_where_there_is_no_room_in_one_piece() -> None:
    allocator = fragmented(16)
    assert sorted(allocator.allocate_group([PAGE] * 8)) == [index * 2 * PAGE for index in range(8)]
    assert allocator.statistics().free_nbytes == 0
    allocator.check_invariants()


def test_a_group_without_room_changes_nothing() -> None:
    allocator = fragmented(16)
    before = allocator.statistics()
    with pytest.raises(PoolExhausted, match="at most 4096 in one piece") as caught:
        allocator.allocate_group([PAGE, PAGE, 2 * PAGE])
    assert caught.value.remedy
    after = allocator.statistics()
    assert (after.used_nbytes, after.free_extents) == (before.used_nbytes, before.free_extents)
    assert after.failed_allocations == before.failed_allocations + 1
    allocator.check_invariants()


def test_best_fit_leaves_the_large_extent_whole() -> None:
    allocator = ExtentAllocator(16 * PAGE)
    first, _, _ = allocator.allocate_group([2 * PAGE, PAGE, PAGE])
    allocator.free(first)
    assert allocator.allocate_group([2 * PAGE]) == [first]


def test_freeing_a_group_with_one_wrong_offset_frees_nothing() -> None:
    allocator = ExtentAllocator(16 * PAGE)
    offsets = allocator.allocate_group([PAGE] * 3)
    for wrong in ([*offsets, 7 * PAGE], [offsets[0], offsets[0]]):
        with pytest.raises(InvalidArgument):
            allocator.free_group(wrong)
        assert allocator.statistics().allocations == 3
        allocator.check_invariants()


@pytest.mark.parametrize("sizes", [[], [0], [4096, -1]])
def test_empty_sizes_are_refused(sizes: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        ExtentAllocator(PAGE).allocate_group(sizes)
