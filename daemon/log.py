"""Logging: structlog events with bound context, and everything that logs the standard way routed through it.

One line of JSON an event where no person watches (systemd, a pipe), colours on a terminal. Modules do
``log = structlog.get_logger(__name__)`` and log constant event names with values beside them; who does something on
behalf of a transfer or an agent puts that into the context with ``bound``, and every line below has it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, TextIO

import structlog

from xferd.api.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS: dict[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

STORM_BURST = 20
STORM_WINDOW_S = 10.0
"""Twenty lines of one event in ten seconds tell a reader all that two thousand would."""

_MAX_STORM_EVENTS = 1024

_CHATTY = ("aiohttp.access", "asyncio", "grpc", "grpc._cython.cygrpc")
"""Loggers whose INFO is about every call: it shows at level debug only."""


class StormFilter:
    """A processor that lets ``burst`` lines of one event name through per window and counts the rest.

    The first line of the name after the window carries the count as ``suppressed``. Thread-safe; remembers the 1024
    names used last. Lines at debug level pass: who asks for them wants them all.
    """

    def __init__(
        self,
        *,
        burst: int = STORM_BURST,
        window_s: float = STORM_WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._window_s = window_s
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()  # name -> (start, lines seen)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Pass the line on, or raise ``DropEvent``."""
        if method == "debug":
            return event
        suppressed = self.admit(str(event.get("event")))
        if suppressed is None:
            raise structlog.DropEvent
        if suppressed:
            event["suppressed"] = suppressed
        return event

    def admit(self, name: str) -> int | None:
        """Count a line; returns None if it is to be dropped, else how many were dropped in the window just ended."""
        now = self._clock()
        with self._lock:
            start, seen = self._windows.pop(name, (now, 0))
            suppressed = 0
            if now - start >= self._window_s:
                suppressed, start, seen = max(seen - self._burst, 0), now, 0
            self._windows[name] = (start, seen + 1)
            if len(self._windows) > _MAX_STORM_EVENTS:
                self._windows.popitem(last=False)
            return suppressed if seen < self._burst else None


def configure(
    level: str = "info", style: str = "auto", *, stream: TextIO | None = None, storms: StormFilter | None = None
) -> None:
    """Set up all logging of the process, replacing what was set up before.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "json", "console", or "auto" for console on a terminal only.
        stream: where to; standard error if None.
        storms: the rate filter; one with the usual bounds if None.
    """
    stream = sys.stderr if stream is None else stream
    is_console = style == "console" or (style == "auto" and stream.isatty())
    storms = storms or StormFilter()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    handler = logging.StreamHandler(stream)
    handler.addFilter(_StormGate(storms))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_suppressed],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(is_console, stream)],
        )
    )
    logging.getLogger().handlers[:] = [handler]
    wrap = structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, storms, wrap],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # so that a second call, as tests make, reaches loggers already in use
    )
    set_level(level)


def level_in_force() -> str:
    """Return the level in force."""
    return next((name for name, number in LEVELS.items() if number >= logging.getLogger().level), "error")


def set_level(level: str) -> str:
    """Set the level for all loggers; returns the previous one.

    Raises:
        InvalidArgument: no such level.
    """
    if level not in LEVELS:
        raise InvalidArgument(f"no log level {level!r}", limit=", ".join(LEVELS), remedy="choose one of these")
    previous = level_in_force()
    logging.getLogger().setLevel(LEVELS[level])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else max(LEVELS[level], logging.WARNING))
    return previous


def bound(**context: object) -> AbstractContextManager[None]:
    """Put values (agent, transfer, cause_id) into every line of this task and of those it starts, while entered."""
    return structlog.contextvars.bound_contextvars(**context)


def bind_process(**context: object) -> None:
    """Put values (node) into every line of this task and of those that it starts from now on."""
    structlog.contextvars.bind_contextvars(**context)


class _StormGate(logging.Filter):
    """Applies the rate filter to lines of standard loggers; ours have passed it as a processor."""

    def __init__(self, storms: StormFilter) -> None:
        super().__init__()
        self._storms = storms

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, dict) or record.levelno <= logging.DEBUG:
            return True
        # The template, not the text: a storm of one message usually differs in its arguments.
        suppressed = self._storms.admit(f"{record.name}:{record.msg}")
        record.suppressed = suppressed or 0
        return suppressed is not None


def _add_suppressed(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    suppressed = getattr(event["_record"], "suppressed", 0)
    if suppressed:
        event["suppressed"] = suppressed
    return event


def _renderers(is_console: bool, stream: TextIO) -> list[Processor]:
    # Plain tracebacks in both: the pretty ones print local variables, and those may be secrets.
    if is_console:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(default=str),
    ]
