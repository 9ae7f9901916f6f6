"""A proxy between a client and an HTTP server that delays, cuts, truncates, hangs, or answers in the server's place.

It understands as much HTTP/1.1 as obstore and the test's server speak: requests with Content-Length, answers that
are passed on as they come. A rule is asked about each request, in order, and the first that has an opinion acts.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

Action = Literal["pass", "hang", "reset", "cut", "answer", "delay"]


@dataclass
class Rule:
    """What to do with requests; ``first`` is set when it has acted for the first time.

    Attributes:
        action: "pass" on, "hang" for ever, "reset" at once, "cut" the answer after ``after_nbytes`` of its body,
            "answer" with ``status`` and ``body`` in the server's place, "delay" the server's answer by ``delay_s``.
        match: whether a request (method, target) is meant.
        times: how often; -1 is always.
    """

    action: Action
    match: Callable[[str, str], bool] = lambda method, target: True
    times: int = -1
    status: int = 503
    body: bytes = b""
    after_nbytes: int = 0
    delay_s: float = 0.0
    struck: int = 0
    first: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class FaultProxy:
    """A running proxy; ``rules`` may be changed at any time."""

    upstream_port: int
    port: int = 0
    rules: list[Rule] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    active: int = 0
    peak: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _rule(self, method: str, target: str) -> Rule | None:
        for rule in self.rules:
            if rule.times and rule.match(method, target):
                rule.times -= rule.times > 0
                rule.struck += 1
                rule.first.set()
                return rule
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                while await self._one(reader, writer):
                    pass
            finally:
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        body = await reader.readexactly(_length(head))
        self.requests.append((method, target))
        self.heads.append(head)
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            return await self._act(self._rule(method, target), method, head, body, writer)
        finally:
            self.active -= 1

    async def _act(
        self, rule: Rule | None, method: str, head: bytes, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        action = rule.action if rule else "pass"
        if rule is not None and action == "hang":
            await asyncio.Event().wait()
        if action == "reset":
            writer.transport.abort()
            return False
        if rule is not None and action == "answer":
            answer = f"HTTP/1.1 {rule.status} X\r\nContent-Length: {len(rule.body)}\r\n\r\n".encode() + rule.body
            writer.write(answer)
            await writer.drain()
            return True
        return await self._pass_on(rule, method, head, body, writer)

    async def _pass_on(
        self, rule: Rule | None, method: str, head: bytes, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        self.writers.append(up_writer)
        try:
            up_writer.write(head + body)
            await up_writer.drain()
            answer = await up_reader.readuntil(b"\r\n\r\n")
            if rule is not None and rule.action == "delay":
                await asyncio.sleep(rule.delay_s)  # the server has done it, and the client does not know yet
            writer.write(answer)
            left = 0 if method == "HEAD" or b" 204 " in answer[:16] else _length(answer)
            if rule is not None and rule.action == "cut" and rule.after_nbytes < left:
                writer.write(await up_reader.readexactly(rule.after_nbytes))
                await writer.drain()
                writer.close()
                return False
            while left:
                block = await up_reader.read(min(left, 1 << 20))
                if not block:
                    return False
                left -= len(block)
                writer.write(block)
                await writer.drain()
            return b"connection: close" not in answer.lower()
        finally:
            up_writer.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


@contextlib.asynccontextmanager
async def fault_proxy(upstream_port: int) -> AsyncIterator[FaultProxy]:
    """Run a proxy before the server at a port of this machine."""
    proxy = FaultProxy(upstream_port)
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await proxy.serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # the proxy closes; what hangs, hangs no more
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in proxy.writers:  # some are still closing, which ends with a turn of the loop
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
