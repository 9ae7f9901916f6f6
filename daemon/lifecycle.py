"""From start to stop: open the parts, say READY, reload on SIGHUP, drain on SIGTERM, name what would not end.

Knows no part of the daemon by name: ``app.py`` supplies them as an async context manager that yields a ``Service``.
Parts themselves are stacked by ``components.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Protocol

import structlog
import uvloop

from xferd.api.errors import ConfigError, XferdError
from xferd.api.timeouts import timeout
from xferd.daemon import log as logs
from xferd.daemon.config import diff, merge_live
from xferd.daemon.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager
    from typing import TypeAlias

    from xferd.daemon.config import Config, ConfigSource
    from xferd.daemon.health import Health
    from xferd.daemon.sdnotify import Notifier

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2

TELL_TIMEOUT_S = 5.0
"""What telling the others may take, each time; they notice by themselves when we are gone."""

RELOAD_TIMEOUT_S = 10.0
"""What taking over a tree may take; a stop that comes meanwhile waits for it."""

SETTLE_S = 0.2
"""For tasks that are ending already: gRPC's own of a cancelled call end a moment after the call, and nobody can wait
for them."""

STRAY_GRACE_S = 2.0
"""What a cancelled task may take to end before it is named and given up."""

log = structlog.get_logger(__name__)


class Service(Protocol):
    """What the life cycle asks of the daemon while it is up."""

    def readiness(self) -> str:
        """Return "" if new work is taken, else why not."""

    def begin_drain(self) -> None:
        """Refuse new work from now on, and say so in ``readiness``."""

    async def announce(self) -> None:
        """Tell the other nodes that this one takes no new work."""

    async def drain(self, timeout_s: float) -> int:
        """Wait for running work to end; returns how many transfers are left at the deadline."""

    async def withdraw(self) -> None:
        """Tell the other nodes that this one is going; nothing of theirs runs here any more."""

    async def reload(self, config: Config) -> list[str]:
        """Take over a tree whose live keys may differ; returns the keys that it could not take over."""


if TYPE_CHECKING:
    OpenComponents: TypeAlias = Callable[[Config], AbstractAsyncContextManager[Service]]
    Serve: TypeAlias = Callable[[Config, ConfigSource], Coroutine[None, None, int]]


class Lifecycle:
    """One life of the daemon, on the running loop of the main thread.

    Args:
        config: what to start with.
        source: where SIGHUP loads it again from.
        open_components: starts every part and yields the service; closes them, in reverse, on leaving. It is cancelled
            by a signal that comes before it is done.
        notifier: the service manager.
        health: entered for the life of the daemon.
        stray_grace_s: what a task that outlived its owner may take to end once cancelled.
    """

    def __init__(
        self,
        config: Config,
        source: ConfigSource,
        open_components: OpenComponents,
        *,
        notifier: Notifier,
        health: Health,
        stray_grace_s: float = STRAY_GRACE_S,
    ) -> None:
        self.config = config
        self._source = source
        self._open_components = open_components
        self._notifier = notifier
        self._health = health
        self._stray_grace_s = stray_grace_s
        self._signals: Signals | None = None
        self._failure = ""

    def fail(self, reason: str) -> None:
        """Stop in order, and exit with 1, because a part broke that the daemon cannot do without."""
        self._failure = self._failure or reason
        if self._signals is not None:
            self._signals.request_stop()

    async def run(self) -> int:
        """Run until told to stop; returns the exit status.

        It is 0 after a stop that was asked for, 1 after a failure or where a task would not end, 2 where the
        configuration was found wrong at the start.
        """
        with Signals() as self._signals:
            async with self._health:
                code = await self._run(self._signals)
            if not await self._end_strays():
                code = code or EXIT_FAILED
        log.info("stopped", exit_status=code)
        return code

    async def _run(self, signals: Signals) -> int:
        stage, started = "start", time.monotonic()
        self._notifier.status("starting")
        try:
            interrupt = _Interrupt(signals)
            async with interrupt, self._open_components(self.config) as service:
                interrupt.disarm()
                stage = "run"
                log.info("ready", took_s=round(time.monotonic() - started, 3), pid=os.getpid())
                self._notifier.ready(self._summary(service))
                await self._serve(service, signals)
                stage = "stop"
                await self._drain(service)
        except ConfigError as exc:
            log.error("daemon_failed", stage=stage, error=str(exc), code=exc.code)
            return EXIT_CONFIG
        except XferdError as exc:
            log.error("daemon_failed", stage=stage, error=str(exc), code=exc.code)
            return EXIT_FAILED
        except Exception:
            log.exception("daemon_failed", stage=stage)
            return EXIT_FAILED
        return EXIT_FAILED if self._failure else EXIT_OK

    async def _serve(self, service: Service, signals: Signals) -> None:
        while True:
            await signals.wait()
            if signals.stop.is_set():
                name = signals.stop_signal.name if signals.stop_signal else self._failure
                log.info("stop_requested", cause=name, drain_timeout_s=self.config.shutdown.drain_timeout)
                return
            signals.reload.clear()
            await self._reload(service)

    async def _reload(self, service: Service) -> None:
        self._notifier.reloading()
        try:
            new = self._source.load()
            merged = merge_live(self.config, new)
            async with timeout(RELOAD_TIMEOUT_S):
                not_taken = await service.reload(merged)
            changes = diff(self.config, new)
            logs.set_level(merged.log.level)
            self.config = merged
            log.info(
                "reloaded",
                changed=[key for key in changes.live if key not in not_taken],
                needs_restart=sorted({*changes.fixed, *not_taken}),
            )
        except XferdError as exc:
            log.error("reload_failed", error=str(exc), remedy="the old configuration stays in force")
        except Exception:
            log.exception("reload_failed", remedy="the old configuration stays in force")
        self._notifier.ready(self._summary(service))

    async def _drain(self, service: Service) -> None:
        """Stop in order: refusing, the others told, drained until the deadline, withdrawn. No failure stops it.

        The record goes last: peers whose transfers run to their end here must not take this node for dead.
        """
        timeout_s = self.config.shutdown.drain_timeout
        deadline = time.monotonic() + timeout_s
        self._notifier.stopping("draining", extend_s=timeout_s + 2 * TELL_TIMEOUT_S + self._stray_grace_s)
        try:
            service.begin_drain()
        except Exception:
            log.exception("stop_step_failed", step="begin_drain")
        await _attempt("announce", service.announce(), TELL_TIMEOUT_S)
        left_s = max(deadline - time.monotonic(), 0.0)
        # The service keeps to the deadline itself; the margin is for one that does not.
        remaining = await _attempt("drain", service.drain(left_s), left_s + TELL_TIMEOUT_S)
        if remaining:
            log.warning("drain_deadline_passed", transfers=remaining, drain_timeout_s=timeout_s)
        await _attempt("withdraw", service.withdraw(), TELL_TIMEOUT_S)
        self._notifier.status("closing")

    async def _end_strays(self) -> bool:
        """Cancel tasks that outlived their owners; names each, and returns whether all of them ended."""
        strays = asyncio.all_tasks() - {asyncio.current_task()}
        if strays:
            _, strays = await asyncio.wait(strays, timeout=SETTLE_S)
        if not strays:
            return True
        for task in strays:
            log.warning("task_outlived_its_owner", task=task.get_name(), coroutine=_where(task))
            task.cancel()
        _, stubborn = await asyncio.wait(strays, timeout=self._stray_grace_s)
        for task in stubborn:
            log.error("task_would_not_stop", task=task.get_name(), coroutine=_where(task))
        return not stubborn

    def _summary(self, service: Service) -> str:
        return service.readiness() or f"ready: node {self.config.node_name}"


def run_daemon(serve: Serve, config: Config, source: ConfigSource) -> int:
    """Run ``serve`` on a new event loop of this thread; returns the exit status.

    Where a task refuses to end, closing the loop would wait for it for ever; the process is then ended at once.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(serve(config, source))
        if any(not task.done() for task in asyncio.all_tasks(runner.get_loop())):
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code or EXIT_FAILED)
    return code


class _Interrupt:
    """Turns a stop that comes before ``disarm`` into a quiet end of the block, by cancelling the current task."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._is_armed = True
        self._has_fired = False
        self._watcher: asyncio.Task[bool] | None = None

    def disarm(self) -> None:
        """Leave further stops to ``Signals.wait``."""
        self._is_armed = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None

        def interrupt(watcher: asyncio.Task[bool]) -> None:
            if self._is_armed and not watcher.cancelled():
                self._has_fired = True
                task.cancel()

        self._watcher = asyncio.create_task(self._signals.stop.wait(), name="lifecycle-start-watcher")
        self._watcher.add_done_callback(interrupt)

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> bool:
        assert self._watcher is not None
        self._is_armed = False
        self._watcher.cancel()
        await asyncio.wait([self._watcher])
        task = asyncio.current_task()
        if not self._has_fired or exc_type is None or not issubclass(exc_type, asyncio.CancelledError):
            return False
        log.info("stopped_while_starting")
        return task is not None and task.uncancel() == 0


async def _attempt(what: str, work: Awaitable[int | None], timeout_s: float) -> int | None:
    try:
        async with timeout(timeout_s):
            return await work
    except TimeoutError:
        log.error("stop_step_timed_out", step=what, timeout_s=timeout_s)
    except Exception:
        log.exception("stop_step_failed", step=what)
    return None


def _where(task: asyncio.Task[object]) -> str:
    """Return where the task waits: the name alone does not say what it waits for."""
    frames = task.get_stack(limit=1)
    qualname = getattr(task.get_coro(), "__qualname__", "?")
    return f"{qualname} at {frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else qualname
