"""SessionService: sessions that live as long as a gRPC stream does."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Any

from xferd.api import types as t, wire
from xferd.api.errors import Unauthenticated, Unavailable
from xferd.api.grpc._rpc import answers, caller_of, token_of
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from xferd.api.engine import Sessions
    from xferd.api.grpc._rpc import Context


class SessionServicer(pb_grpc.SessionServiceServicer):
    """Adapter over ``Sessions``.

    Args:
        engine: who does it.
        open_token: what a client that comes over TCP must show to open a session; "" asks for nothing. Over the Unix
            socket the file's mode has already decided.
    """

    def __init__(self, engine: Sessions, open_token: str) -> None:
        self._engine = engine
        self._open_token = open_token
        self._live: set[t.SessionId] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False

    # A coroutine that writes, where the stub expects a generator: a cancelled one cleans up at once.
    @answers
    async def Open(self, request: pb.OpenSessionRequest, context: Context) -> None:  # type: ignore[override]
        self._check_token(context)
        self._own(asyncio.current_task())
        grant = await self._engine.open_session(request.agent, t.Transport.GRPC)
        self._live.add(grant.session)
        try:
            self._check_running()
            await context.write(pb.SessionEvent(opened=wire.grant_to_message(grant)))
            reason = await self._engine.wait_session_end(grant.session)
            await context.write(pb.SessionEvent(closing=wire.text(reason)))
        finally:
            await self._end(grant.session, "the session's stream ended")

    @answers
    async def Close(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        caller = caller_of(self._engine, context)
        if caller.session is not None:
            await self._engine.end_session(caller.session, "closed by the client")
        return pb.CloseSessionResponse()

    async def end_all(self) -> None:
        """End the sessions of all streams, which tells their clients why, and refuse new ones."""
        self._stopping = True
        for session in list(self._live):
            await self._end(session, "the daemon is stopping")

    async def join(self) -> None:
        """Wait until no stream runs and every session is released; call it once the server has stopped."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _end(self, session: t.SessionId, reason: str) -> None:
        # A task of its own: releasing waits for transfers to come to rest, which a second cancellation (the server
        # stops while the client goes) must not cut short. ``join`` waits for what is left.
        self._live.discard(session)
        task = asyncio.create_task(self._engine.end_session(session, reason), name=f"end session {session}")
        self._own(task)
        await asyncio.shield(task)

    def _own(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _check_running(self) -> None:
        if self._stopping:
            raise Unavailable("the node is stopping", remedy="open the session again when it is back")

    def _check_token(self, context: Context) -> None:
        if not self._open_token or context.peer().startswith("unix"):
            return
        if not hmac.compare_digest(token_of(context).encode(), self._open_token.encode()):
            raise Unauthenticated(
                "opening a session over TCP needs the node's token, and this call has none or another",
                remedy="send the token of grpc.token_file as authorization: Bearer <token>",
            )
