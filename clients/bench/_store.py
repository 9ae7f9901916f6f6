"""Where objects are in a benchmark: a store that somebody gives, or a server of its own (``_store_server.py``)."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Self

from xferd.api.errors import InvalidArgument, Unavailable
from xferd.clients.bench import _store_server
from xferd.clients.bench._kinds import STORE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

BUCKET = "xferbench"


class Store:
    """A store for objects. A context manager; entered again before it was left, it is the same.

    Args:
        section: as in ``[backends.object.stores.NAME]``; empty for a server of its own.
    """

    def __init__(self, section: Mapping[str, str] | None = None) -> None:
        self.section = dict(section or {})
        self._server: subprocess.Popen[str] | None = None
        self._has_own = not self.section
        self._entered = 0

    @staticmethod
    def parse(text: str) -> Store:
        """Return the store of ``url=s3://BUCKET/PREFIX,endpoint=http://HOST,…``.

        Raises:
            InvalidArgument: something in it has no value, or there is no url.
        """
        pairs = [part.partition("=") for part in text.split(",") if part]
        if not all(equals and value for _, equals, value in pairs) or "url" not in {key for key, _, _ in pairs}:
            raise InvalidArgument(f"{text!r} is no store", remedy="write url=s3://BUCKET,endpoint=http://HOST:PORT,...")
        return Store({key.strip(): value for key, _, value in pairs})

    def settings(self) -> list[str]:
        """Return what a daemon is told of the store; only while entered."""
        return [f"backends.object.stores.{STORE}.{key}={value}" for key, value in self.section.items()]

    def __enter__(self) -> Self:
        if self._has_own and not self._entered:
            port = self._start()
            self.section = {
                "url": f"s3://{BUCKET}",
                "endpoint": f"http://127.0.0.1:{port}",
                "region": "us-east-1",
                "anonymous": "true",
                "allow_http": "true",
            }
        self._entered += 1
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._server is not None and not self._entered:
            self._server.communicate("")
            self._server = None

    def _start(self) -> int:
        command = [sys.executable, "-P", _store_server.__file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise Unavailable("the server for objects does not start", remedy="give a store with --store")
        return int(line)
