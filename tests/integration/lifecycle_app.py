"""A daemon with nothing in it but its life cycle, run by ``test_systemd.py`` as a process of its own.

Prints one line of JSON for each call that the life cycle makes. Its argument is a configuration file; ``TOY`` in the
environment picks how it misbehaves, and lines on its standard input let it go on where it waits.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from xferd.api.errors import ConfigError, InvalidState
from xferd.daemon import log
from xferd.daemon.components import Components
from xferd.daemon.config import ConfigSource
from xferd.daemon.health import Health
from xferd.daemon.lifecycle import Lifecycle, run_daemon
from xferd.daemon.sdnotify import Notifier, listen_fds, watchdog_interval_s

MODE = os.environ.get("TOY", "")


def say(what, **values):
    print(json.dumps({"say": what, **values}), flush=True)


class ToyService:
    def __init__(self):
        self.draining = False

    def readiness(self):
        return "draining" if self.draining else ""

    def begin_drain(self):
        self.draining = True
        say("begin_drain")

    async def announce(self):
        say("announce")
        if MODE == "announce-fails":
            raise OSError("nobody to tell")

    async def withdraw(self):
        say("withdraw")
        if MODE == "withdraw-fails":
            raise OSError("nobody to tell")

    async def drain(self, timeout_s):
        say("drain", timeout_s=timeout_s)
        if MODE == "drain-waits":
            await asyncio.Event().wait()
        return 3 if MODE == "work-left" else 0

    async def reload(self, config):
        say("reload", level=config.log.level, chunk=config.transfers.chunk, roots=list(config.files.roots))
        return ["files.roots"]


class Part:
    def __init__(self, name):
        self.name = name

    async def __aenter__(self):
        if MODE == "start-waits":
            say("starting")
            await asyncio.Event().wait()
        if MODE == "start-fails":
            raise InvalidState("the socket is taken", remedy="stop the other one")
        if MODE == "config-fails":
            raise ConfigError("the secret is too short")
        if MODE == "start-breaks":
            raise ZeroDivisionError

    async def __aexit__(self, *exc_info):
        say("closed", part=self.name)
        if MODE == "close-fails":
            raise RuntimeError("cannot close")


async def _stubborn():
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def serve(config, source):
    notifier = Notifier.from_environ(os.environ)
    health = Health(notifier, watchdog_interval_s(os.environ, os.getpid()))

    @contextlib.asynccontextmanager
    async def open_components(config):
        async with Components() as components:
            await components.enter("a", Part("a"))
            await components.enter("b", Part("b"))
            for name, sock in listen_fds(os.environ, os.getpid()).items():
                say("socket", name=name, address=sock.getsockname())
                sock.close()
            service = ToyService()
            asyncio.get_running_loop().call_soon(say, "up")
            if MODE == "stray":
                strays.append(asyncio.create_task(asyncio.Event().wait(), name="forgotten"))
            if MODE == "stubborn":
                strays.append(asyncio.create_task(_stubborn(), name="mule"))
            if MODE == "part-breaks":
                asyncio.get_running_loop().call_soon(life.fail, "a mover thread died")
            if MODE == "loop-stuck":
                asyncio.get_running_loop().call_later(0, _stick)
            yield service
        say("left")

    strays = []
    life = Lifecycle(config, source, open_components, notifier=notifier, health=health, stray_grace_s=0.2)
    return await life.run()


def _stick():
    say("stuck")
    time.sleep(3600)


if __name__ == "__main__":
    source = ConfigSource(Path(sys.argv[1]), {})
    config = source.load()
    log.configure(config.log.level, config.log.format)
    sys.exit(run_daemon(serve, config, source))
