"""A REST face over the fake engine and a client that holds every answer against the OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from fake_engine import FakeEngine
from jsonschema import Draft202012Validator

from xferd.api.rest import RestFace
from xferd.api.rest._openapi import document
from xferd.api.rest._table import ROUTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DOCUMENT = document(ROUTES)


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code; "" when it is none."""
        return self.json["code"] if self.status >= 400 else ""


class CallLog(list[str]):
    """What was called, with a way to wait for a call."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = asyncio.Event()

    def append(self, name: str) -> None:
        super().append(name)
        self._grown.set()

    async def has(self, name: str, count: int = 1) -> None:
        """Wait until ``name`` was called so often; the test's own timeout ends it."""
        while self.count(name) < count:
            self._grown.clear()
            await self._grown.wait()


class Rest:
    """A client; ``seen`` has the operation of each call that did not fail."""

    def __init__(self, engine: FakeEngine, face: RestFace, socket_path: str, client: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.calls, self.cancelled = CallLog(), CallLog()
        engine.calls, engine.cancelled = self.calls, self.cancelled
        self.face = face
        self.socket_path = socket_path
        self.client = client
        self.seen: set[str] = set()

    async def __call__(self, method: str, path: str, body: Any = None, *, token: str = "", **more: Any) -> Reply:
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **more.pop("headers", {})}
        if body is not None:
            more["data"] = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        async with self.client.request(method, f"http://xferd{path}", headers=headers, **more) as response:
            reply = Reply(response.status, dict(response.headers), await response.read())
        self._check(method, path.partition("?")[0], reply)
        return reply

    async def session(self, agent: str = "") -> str:
        """Open a session and return its token."""
        return (await self("POST", "/v1/sessions", {"agent": agent})).json["token"]

    async def allocate(self, token: str, *nbytes: int, access: str = "NONE") -> list[str]:
        """Allocate regions and return their ids."""
        body = {"kind": "allocate", "nbytes": list(nbytes), "access": access}
        reply = await self("POST", "/v1/regions", body, token=token)
        assert reply.status == 201, reply.json
        return [region["id"] for region in reply.json["regions"]]

    def _check(self, method: str, path: str, reply: Reply) -> None:
        media = reply.headers.get("Content-Type", "").partition(";")[0]
        operation = _operation(method, path)
        if operation is None:
            assert reply.status in (404, 405)
            check_schema({"$ref": "#/components/schemas/Problem"}, reply.json)
            return
        declared = operation["responses"].get(str(reply.status), operation["responses"]["default"])
        if str(reply.status) not in operation["responses"]:
            assert reply.status >= 400, f"{method} {path} answers {reply.status}, which is not declared"
        else:
            self.seen.add(operation["operationId"] if reply.status < 400 else "")
        assert set(declared.get("content", {})) >= ({media} if reply.body else set())
        if reply.body and media.endswith("json"):
            check_schema(declared["content"][media]["schema"], reply.json)


def check_schema(schema: dict[str, Any], value: Any) -> None:
    """Hold a value against a schema of the document."""
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def _operation(method: str, path: str) -> dict[str, Any] | None:
    """Find the operation of a path; a literal path comes before one with parts, as in the server."""
    for pattern in sorted(DOCUMENT["paths"], key=lambda text: text.count("{")):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path) and method.lower() in DOCUMENT["paths"][pattern]:
            return DOCUMENT["paths"][pattern][method.lower()]
    return None


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[Rest]:
    """Serve an engine; at the end nothing of the face may be left: no task, no socket file."""
    engine = engine or FakeEngine()
    folder = Path(tempfile.mkdtemp(prefix="xf"))
    path = str(folder / "admin.sock")
    before = asyncio.all_tasks()
    face = RestFace(engine, socket_path=path, **options)
    try:
        await face.start()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as client:
            yield Rest(engine, face, path, client)
        await face.aclose()
        assert not os.path.exists(path)  # noqa: PTH110, ASYNC240 - nothing else runs
        assert not asyncio.all_tasks() - before - {asyncio.current_task()}
    finally:
        await face.aclose()
        shutil.rmtree(folder)
