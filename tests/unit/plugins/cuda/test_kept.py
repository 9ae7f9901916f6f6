"""Plans are kept within bounds, and dropped once, when nothing of them is under way."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xferd.plugins.cuda.driver import Plan
from xferd.plugins.cuda.kept import Kept, KeptPlans
from xferd.plugins.cuda.layout import Engine


class CountedPlan(Plan):
    nbytes = 1
    engine = Engine.KERNEL

    def __init__(self):
        self.drops = 0

    def drop(self):
        self.drops += 1


def kept(nbytes=100, allocations=(), segments=()):
    return Kept(CountedPlan(), nbytes, frozenset(allocations), frozenset(segments))


def test_what_was_not_used_for_longest_goes_first():
    plans = KeptPlans(max_count=2)
    one, two, three = kept(), kept(), kept()
    plans.put(1, one)
    plans.put(2, two)
    assert plans.get(1) is one
    plans.put(3, three)
    assert plans.get(2) is None
    assert (one.plan.drops, two.plan.drops, three.plan.drops) == (0, 1, 0)


def test_bytes_bound_too_and_a_table_larger_than_all_is_not_kept():
    plans = KeptPlans(max_nbytes=250)
    for number in range(3):
        plans.put(number, kept(100))
    assert (len(plans), plans.nbytes) == (2, 200)
    large = kept(251)
    large.flights = 1
    plans.put(9, large)
    assert plans.get(9) is None
    assert (len(plans), plans.nbytes) == (2, 200)
    large.end_flight()
    assert large.plan.drops == 1


def test_a_plan_under_way_is_dropped_at_its_last_end():
    plans = KeptPlans()
    one = kept(allocations=[4])
    one.flights = 2
    plans.put(1, one)
    plans.drop_allocation(4)
    assert plans.get(1) is None
    assert one.plan.drops == 0
    one.end_flight()
    assert one.plan.drops == 0
    one.end_flight()
    assert one.plan.drops == 1


def test_a_kept_plan_outlives_its_flights():
    plans = KeptPlans()
    one = kept(allocations=[4])
    plans.put(1, one)
    one.flights = 1
    one.end_flight()
    assert one.plan.drops == 0
    plans.drop_allocation(4)
    assert one.plan.drops == 1


def test_memory_that_goes_takes_the_plans_that_name_it():
    plans = KeptPlans()
    for number in range(4):
        plans.put(number, kept(allocations=[number % 2], segments=[number // 2]))
    plans.drop_allocation(0)
    assert [number for number in range(4) if plans.get(number)] == [1, 3]
    plans.drop_segment(1)
    assert [number for number in range(4) if plans.get(number)] == [1]


class Keeping(RuleBasedStateMachine):
    """Any order of calls: sums are right, and no plan is dropped twice or while it is under way."""

    def __init__(self):
        super().__init__()
        self.plans = KeptPlans(max_count=3, max_nbytes=400)
        self.all = []

    @rule(number=st.integers(0, 5), nbytes=st.integers(1, 500), memory=st.integers(0, 2), flies=st.booleans())
    def put(self, number, nbytes, memory, flies):
        one = kept(nbytes, [memory], [memory])
        self.plans.put(number, one)
        one.flights = 1  # as the worker does: a plan is kept when it is compiled, and then begun
        if not flies:
            one.end_flight()
        self.all.append(one)

    @rule(number=st.integers(0, 5))
    def fly(self, number):
        one = self.plans.get(number)
        if one is not None:
            one.flights += 1

    @rule(data=st.data())
    def land(self, data):
        flying = [one for one in self.all if one.flights]
        if flying:
            data.draw(st.sampled_from(flying)).end_flight()

    @rule(memory=st.integers(0, 2))
    def drop(self, memory):
        self.plans.drop_allocation(memory)

    @invariant()
    def agrees(self):
        alive = [one for one in self.all if one.is_kept]
        assert len(self.plans) == len(alive) <= 3
        assert self.plans.nbytes == sum(one.table_nbytes for one in alive) <= 400
        for one in self.all:
            assert one.plan.drops == (0 if one.is_kept or one.flights else 1)


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
