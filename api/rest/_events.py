"""Peers as a stream of server-sent events (``text/event-stream``), which curl and browsers read as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from aiohttp import web

from xferd.api.errors import XferdError
from xferd.api.rest import _bodies as b  # noqa: TC001 - the route's hints are read at run time
from xferd.api.rest._route import EVENTS, SLICE_S, Call
from xferd.api.rest._shapes import shape_of
from xferd.api.timeouts import timeout
from xferd.api.types import PeerInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ALIVE = b": alive\n\n"
"""A comment, which readers pass over. It finds out that a silent reader has gone."""


async def watch_peers(call: Call[b.EventsQuery, None]) -> web.StreamResponse:
    """Stream the present peers, then each one whose state, reason or record changed, as server-sent events.

    Each event is called `peer`, and its data is the peer as `GET /v1/peers` has it. A slow reader gets the newest
    state of each peer, not all that came between.
    """
    peers = call.engine.watch_peers(call.query.name)
    response = web.StreamResponse(headers={"Content-Type": EVENTS})
    await response.prepare(call.request)
    try:
        async with timeout(call.query.timeout or None):
            await _write(call, peers, response)
    except (TimeoutError, XferdError):
        pass  # the time is over, or the session or the daemon has ended: so does the stream
    finally:
        if isinstance(peers, AsyncGenerator):  # lets go of the watch now, not when the collector comes by
            await peers.aclose()
    await response.write_eof()
    return response


async def _write(call: Call[b.EventsQuery, None], peers: AsyncIterator[PeerInfo], response: web.StreamResponse) -> None:
    sent = 0
    encode = shape_of(PeerInfo).encode
    while not call.query.count or sent < call.query.count:
        waiting = asyncio.create_task(_next(peers), name="xferd-peer-events")
        try:
            while not (await asyncio.wait((waiting,), timeout=SLICE_S))[0]:
                call.renew()
                await response.write(_ALIVE)
        finally:
            waiting.cancel()
            await asyncio.wait((waiting,))
        peer = waiting.result()
        if peer is None:
            return
        document = json.dumps(encode(peer), separators=(",", ":"))
        await response.write(f"event: peer\ndata: {document}\n\n".encode())
        sent += 1


async def _next(peers: AsyncIterator[PeerInfo]) -> PeerInfo | None:
    return await anext(peers, None)
