"""Everything logged comes out as one line with its context; storms are thinned with their count; no secrets leak."""

import asyncio
import io
import json
import logging

import pytest
import structlog

from xferd.api.errors import InvalidArgument
from xferd.daemon import log as logs


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    logs.set_level("debug")  # gives chatty loggers back their own level
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def clock():
    return Clock()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_with_context(stream):
    logs.configure("info", "auto", stream=stream)
    with logs.bound(agent="a", cause_id="c1"):
        structlog.get_logger("x.y").info("moved", nbytes=3, raw=b"\0")
        logging.getLogger("grpc").warning("lost %s", "peer")
    structlog.get_logger("x.y").info("later")
    ours, theirs, later = lines(stream)
    assert ours.items() >= {"event": "moved", "nbytes": 3, "agent": "a", "cause_id": "c1", "logger": "x.y"}.items()
    assert theirs.items() >= {"event": "lost peer", "level": "warning", "agent": "a", "logger": "grpc"}.items()
    assert ours["timestamp"].endswith("Z")
    assert "agent" not in later


async def test_context_follows_tasks(stream):
    logs.configure("info", "json", stream=stream)
    logs.bind_process(node="n")

    async def work(agent):
        with logs.bound(agent=agent):
            await asyncio.sleep(0)
            structlog.get_logger().info("done")

    async with asyncio.TaskGroup() as group:
        group.create_task(work("a"))
        group.create_task(work("b"))
    assert [(line["node"], line["agent"]) for line in lines(stream)] == [("n", "a"), ("n", "b")]


def test_tracebacks_show_no_values(stream):
    logs.configure("info", "json", stream=stream)
    secret = "hunter" + "2"
    try:
        raise ValueError("plain")
    except ValueError:
        structlog.get_logger().exception("ours")
        logging.getLogger("other").exception("theirs")
    assert secret
    for line in lines(stream):
        assert "ValueError: plain" in line["exception"]
        assert "hunter2" not in line["exception"]


def test_console_is_readable(stream):
    logs.configure("info", "console", stream=stream)
    structlog.get_logger("x").warning("odd", why="because")
    assert "odd" in stream.getvalue()
    assert "why=because" in stream.getvalue()
    assert "\x1b" not in stream.getvalue(), "colours are for terminals"


def test_level_changes_live(stream):
    logs.configure("warning", "json", stream=stream)
    log = structlog.get_logger("x")
    log.info("hidden")
    assert logs.set_level("debug") == "warning"
    log.debug("shown")
    logging.getLogger("asyncio").debug("shown too")
    assert logs.set_level("error") == "debug"
    log.warning("hidden")
    logging.getLogger("asyncio").warning("hidden")
    assert [line["event"] for line in lines(stream)] == ["shown", "shown too"]
    with pytest.raises(InvalidArgument, match="loud"):
        logs.set_level("loud")


def test_storms_are_thinned_and_counted(stream, clock):
    storms = logs.StormFilter(burst=3, window_s=10.0, clock=clock)
    logs.configure("debug", "json", stream=stream, storms=storms)
    log = structlog.get_logger("x")
    for number in range(10):
        log.warning("storm", number=number)
        logging.getLogger("lib").warning("item %d", number)
    log.warning("calm")
    for _ in range(5):
        log.debug("asked for")
    clock.now += 10.0
    log.warning("storm", number=10)
    logging.getLogger("lib").warning("item %d", 10)
    found = lines(stream)
    assert [line["number"] for line in found if line["event"] == "storm"] == [0, 1, 2, 10]
    assert [line["event"] for line in found if line["logger"] == "lib"] == ["item 0", "item 1", "item 2", "item 10"]
    assert [line.get("suppressed") for line in found[-2:]] == [7, 7]
    assert sum(line["event"] == "asked for" for line in found) == 5
    assert sum("suppressed" in line for line in found) == 2


def test_the_storm_filter_forgets_old_names(clock):
    storms = logs.StormFilter(burst=1, clock=clock)
    for number in range(5000):
        assert storms.admit(f"event {number}") == 0
    assert len(storms._windows) <= 1024
    assert storms.admit("event 4999") is None
