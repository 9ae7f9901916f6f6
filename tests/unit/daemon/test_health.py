"""Liveness follows the loop's heartbeat; the watchdog is fed only while all is well."""

import asyncio

import pytest

from xferd.daemon.health import Health
from xferd.daemon.sdnotify import Notifier


class CountingNotifier(Notifier):
    """Tells waiters of each ping."""

    def __init__(self):
        super().__init__()
        self.pings = 0
        self.pinged = asyncio.Event()

    def watchdog(self):
        self.pings += 1
        self.pinged.set()
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


async def test_a_loop_that_stopped_is_not_live(clock):
    async with Health(Notifier(), stall_s=15.0, clock=clock) as health:
        clock.now = 15.0
        assert health.liveness() == ""
        clock.now = 16.0
        assert health.liveness() == "the event loop has not run for 16.0 s"


async def test_a_ping_is_a_sign_of_life(clock):
    notifier = CountingNotifier()
    async with Health(notifier, watchdog_s=0.002, stall_s=15.0, clock=clock) as health:
        clock.now = 100.0
        assert health.liveness()
        notifier.pinged.clear()
        await notifier.pinged.wait()  # on the loop, which therefore runs
        assert health.liveness() == ""


async def test_checks_count_too(clock):
    health = Health(Notifier(), clock=clock)
    reason = ""
    health.register("movers", lambda: reason)
    assert health.liveness() == ""
    reason = "thread 2 died"
    assert health.liveness() == "movers: thread 2 died"


async def test_pings_stop_when_not_live():
    notifier = CountingNotifier()
    reason = ""
    asked = asyncio.Event()

    def check():
        asked.set()
        return reason

    async with Health(notifier, watchdog_s=0.002) as health:
        health.register("part", check)
        notifier.pinged.clear()
        await notifier.pinged.wait()
        reason = "broken"
        pings = notifier.pings
        for _ in range(3):
            asked.clear()
            await asked.wait()
        assert notifier.pings == pings
        reason = ""
        notifier.pinged.clear()
        await notifier.pinged.wait()


async def test_no_watchdog_no_pings():
    notifier = CountingNotifier()
    async with Health(notifier, None, interval_s=0.001) as health:
        assert list(health._timers) == ["beat"]
    assert notifier.pings == 0
    assert health._timers == {}
