"""A time limit holds whatever became of its task before, on every Python that xferd runs on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from xferd.api.timeouts import timeout


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def failing() -> None:
    raise ValueError


async def cancelled_and_gone_on() -> None:
    """Leave the task as one that was cancelled and went on."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert task.cancelling()


async def after_a_failed_group() -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(failing())
            group.create_task(never())
    except* ValueError:
        pass


async def nothing() -> None:
    pass


@pytest.mark.parametrize("before", [nothing, cancelled_and_gone_on, after_a_failed_group])
@pytest.mark.parametrize("delay_s", [0.0, 0.005])
async def test_a_limit_is_a_timeout_whatever_was_before(before, delay_s: float) -> None:
    async def work() -> str:
        await before()
        for _ in range(3):
            try:
                async with timeout(delay_s):
                    await never()
            except TimeoutError:
                continue
        return "went on"

    assert await asyncio.create_task(work()) == "went on"


@pytest.mark.parametrize("before", [nothing, cancelled_and_gone_on])
async def test_a_cancellation_that_comes_meanwhile_wins(before) -> None:
    async def work() -> None:
        await before()
        async with timeout(0.01):
            try:
                await never()
            finally:
                await asyncio.shield(told)

    told = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(work())
    await asyncio.sleep(0.05)  # the limit is over, and what it ended is still being tidied up
    task.cancel()
    told.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_ends_in_time_or_fails_is_left_alone() -> None:
    async with timeout(5.0), timeout(None):
        await asyncio.sleep(0)
    with pytest.raises(KeyError):
        async with timeout(0.0):
            raise KeyError
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_the_outer_of_two_limits_is_told_as_its_own() -> None:
    with pytest.raises(TimeoutError):
        async with timeout(0.005), timeout(5.0):
            await never()


def test_nothing_of_ours_uses_the_limits_of_asyncio() -> None:
    root = Path(__file__).resolve().parents[3]
    sources = [
        path for part in ("api", "clients", "daemon", "metadata", "plugins") for path in (root / part).rglob("*.py")
    ]
    assert len(sources) > 100
    users = [path.name for path in sources if "asyncio.timeout(" in path.read_text()]
    assert users == ["timeouts.py"]
