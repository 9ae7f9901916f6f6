"""Parts close in reverse order, every one of them, whatever the others do; the run directory has one owner."""

import asyncio
import contextlib
import os
import stat

import pytest

from xferd.api.errors import ConfigError, InvalidState
from xferd.daemon.components import Components
from xferd.daemon.rundir import RunDir


class Part:
    def __init__(self, name, events, close=None):
        self.name, self.events, self.close = name, events, close

    async def __aenter__(self):
        self.events.append(f"+{self.name}")
        return self

    async def __aexit__(self, *exc_info):
        self.events.append(f"-{self.name}")
        if self.close is not None:
            await self.close()


async def _fail():
    raise RuntimeError("cannot close")


async def test_reverse_order_and_failures_stay_alone():
    events = []
    async with Components() as components:
        assert (await components.enter("a", Part("a", events))).name == "a"
        await components.enter("b", Part("b", events, _fail))
        components.push("c", lambda: _note(events, "-c"))
        await components.enter("d", Part("d", events))
    assert events == ["+a", "+b", "+d", "-d", "-c", "-b", "-a"]


async def _note(events, what):
    events.append(what)


async def test_the_error_of_the_body_is_raised():
    events = []

    async def run():
        async with Components() as components:
            await components.enter("a", Part("a", events, _fail))
            raise KeyError

    with pytest.raises(KeyError):
        await run()
    assert events == ["+a", "-a"]


async def test_a_part_that_does_not_start_closes_the_others():
    class Broken(Part):
        async def __aenter__(self):
            raise OSError("no")

    events = []

    async def run():
        async with Components() as components:
            await components.enter("a", Part("a", events))
            await components.enter("b", Broken("b", events))

    with pytest.raises(OSError, match="no"):
        await run()
    assert events == ["+a", "-a"]


async def test_a_part_that_hangs_is_given_up():
    events = []
    async with Components(close_timeout_s=0.01) as components:
        await components.enter("a", Part("a", events))
        await components.enter("b", Part("b", events, asyncio.Event().wait))
    assert events == ["+a", "+b", "-b", "-a"]


async def test_cancelled_while_closing_still_closes_all():
    events = []
    closing = asyncio.Event()

    async def hang():
        closing.set()
        await asyncio.Event().wait()

    async def run():
        async with Components() as components:
            await components.enter("a", Part("a", events))
            await components.enter("b", Part("b", events, hang))

    task = asyncio.create_task(run(), name="closer")
    await closing.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert events == ["+a", "+b", "-b", "-a"]


def test_one_daemon_for_each_run_directory(tmp_path):
    path = tmp_path / "run" / "xferd"
    with RunDir(path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
        with pytest.raises(InvalidState, match=f"pid {os.getpid()}"), RunDir(path):
            pass
    with RunDir(path):
        pass


def test_directories_that_others_could_change(tmp_path):
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(ConfigError, match="777"), RunDir(path):
        pass
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="link"), RunDir(link):
        pass
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError), RunDir(file):
        pass
