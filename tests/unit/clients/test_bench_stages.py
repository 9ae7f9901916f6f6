"""Stamps of several processes become stages; a function that is not there is left out and not made up."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from xferd.clients.bench._stage_points import SUBJECTS
from xferd.clients.bench._stages import Profile, stage_medians
from xferd.clients.bench._stamped_daemon import wrap
from xferd.clients.bench.profile import section, table

ORDER = ["sent", "awake", "end"]


def spans(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, np.int64)


def test_stages_are_from_stamp_to_stamp_within_a_request():
    stamps = [("awake", 5_000), ("sent", 1_000), ("sent", 101_000), ("awake", 103_000)]
    assert stage_medians(spans((0, 10_000), (100_000, 110_000)), stamps, ORDER) == {
        "sent": pytest.approx(1.0),
        "awake": pytest.approx(3.0),
        "end": pytest.approx(6.0),
    }


def test_stamps_between_requests_belong_to_none():
    stamps = [("sent", 50_000), ("awake", 5_000)]
    found = stage_medians(spans((0, 10_000), (100_000, 110_000)), stamps, ORDER)
    assert found == {"sent": None, "awake": pytest.approx(5.0), "end": pytest.approx(7.5)}


def test_the_first_of_several_stamps_counts():
    stamps = [("sent", 1_000), ("sent", 2_000), ("awake", 3_000)]
    assert stage_medians(spans((0, 4_000)), stamps, ORDER)["sent"] == pytest.approx(1.0)


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("stamped_for_test")

    class Desk:
        def post(self, value: int) -> int:
            return value + 1

        async def answer(self) -> str:
            return "yes"

        def plan(self):
            return lambda: 7

        def nothing(self) -> None:
            return None

    made.Desk = Desk
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


async def test_wrapped_functions_do_what_they_did_and_are_noted(module):
    stamps: list[tuple[str, int]] = []
    specs = ("post:enter", "answer:enter", "plan:call", "nothing:call")
    assert all(wrap(f"{spec[:4]}=stamped_for_test:Desk.{spec}", stamps) for spec in specs)
    desk = module.Desk()
    assert desk.post(1) == 2
    assert await desk.answer() == "yes"
    move = desk.plan()
    assert not [name for name, _ in stamps if name == "plan"], "made, not yet called"
    assert move() == 7
    assert desk.nothing() is None
    assert [name for name, _ in stamps] == ["post", "answ", "answ+", "plan", "plan+"]
    times = [at for _, at in stamps]
    assert times == sorted(times)


@pytest.mark.parametrize("place", ["stamped_for_test:Desk.gone", "stamped_for_test:Gone.post", "no.such.module:f"])
@pytest.mark.usefixtures("module")
def test_a_function_that_is_not_there_is_left_out(place):
    assert wrap(f"x={place}:enter", []) is False


@pytest.mark.parametrize("name", SUBJECTS)
def test_tables_tell_every_stage_and_the_whole(name):
    stages = SUBJECTS[name].stages
    one = Profile(name, tuple((stage, 2.0) for stage in stages), 20.0, 18.0, 100)
    head, cells = table(one)
    assert len(cells) == len(stages) + 2
    assert all(len(line) == len(head) for line in cells)
    record = {"date": "2026-01-01T00", "cores": 2, "cpu": "a cpu", "kernel": "Linux", "python": "3.11", "load": 0.1}
    assert "Measured on 2026-01-01: 2 cores of a cpu" in section([one], record)
