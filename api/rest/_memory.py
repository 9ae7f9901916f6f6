"""Handlers about sessions, regions and their bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from xferd.api import types as t
from xferd.api.errors import NotFound, OutOfBounds, PermissionDenied, ShortTransfer, XferdError
from xferd.api.rest import _answers as a, _bodies as b
from xferd.api.rest._route import OCTETS, Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_log = structlog.get_logger("xferd.rest")


async def list_sessions(call: Call[None, None]) -> a.SessionList:
    """List live sessions with what each holds."""
    return a.SessionList(tuple(call.engine.sessions()))


async def open_session(call: Call[None, b.SessionBody]) -> t.SessionGrant:
    """Open a session; its token goes with every call that owns or moves something.

    The token is secret. The session ends by DELETE, or when no call carried the token for `ttl_s` seconds; all that
    it holds is then released.
    """
    ttl_s = call.settings.session_ttl_s if call.body.ttl_s is None else call.body.ttl_s
    return await call.engine.open_session(call.body.agent, t.Transport.REST, ttl_s=ttl_s)


async def end_session(call: Call[None, None]) -> None:
    """End a session: cancel its transfers, release all it holds. With its own token, or by the operator."""
    session = t.SessionId(call.part("id"))
    if call.caller.session not in (None, session):
        raise PermissionDenied(
            f"session {session[:80]!r} is not the caller's",
            limit="the own session",
            remedy="send the token of that session, or the admin token",
        )
    if all(info.session != session for info in call.engine.sessions()):
        raise NotFound(f"no live session {session[:80]!r}", remedy="GET /v1/sessions lists them")
    await call.engine.end_session(session, "ended over REST")


async def list_regions(call: Call[b.RegionsQuery, None]) -> t.RegionListing:
    """List regions: a session's own and those of others that grant access; all of them to the operator."""
    query = t.RegionQuery(call.query.node, call.query.agent, call.query.label)
    return await call.engine.regions(call.caller, query)


async def create_regions(
    call: Call[None, b.AllocateBody | b.FileBody | b.PrivateBody | b.ObjectBody | b.DeviceBody],
) -> t.RegionListing:
    """Allocate a group of regions from a pool, or register a file, an object or exported GPU memory.

    The body's `kind` says which. Private memory cannot be registered by a session that was opened over HTTP, because
    HTTP does not tell the daemon which process calls.
    """
    body = call.body
    if isinstance(body, b.AllocateBody):
        return await call.engine.allocate(call.caller, body.to_request())
    if isinstance(body, b.FileBody):
        region = await call.engine.register_file(call.caller, body.to_request())
    elif isinstance(body, b.ObjectBody):
        region = await call.engine.register_object(call.caller, body.to_request())
    elif isinstance(body, b.DeviceBody):
        region = await call.engine.register_device(call.caller, body.to_request())
    else:
        region = await call.engine.register_private(call.caller, body.to_request())
    return t.RegionListing(region.node, region.epoch, (region,))


async def export_region(call: Call[None, None]) -> t.DeviceHandle:
    """Say how another process opens the GPU memory of a region, and where in the allocation it is."""
    return await call.engine.export_device(call.caller, call.region())


async def open_event(call: Call[None, b.EventBody]) -> t.DeviceEvent:
    """Open a GPU event of the caller for its transfers to wait for; or, without a handle, make one that they record.

    It is good until the session ends; transfers name it as `wait_event` or `done_event`.
    """
    return await call.engine.open_device_event(call.caller, call.device(), call.body.handle)


async def get_region(call: Call[None, None]) -> t.RegionInfo:
    """Return a region's record."""
    return await _find(call, call.region())


async def free_region(call: Call[None, None]) -> None:
    """Free a region of the calling session; the operator frees a persistent one whose agent has no session."""
    await call.engine.free(call.caller, (call.region(),))


async def hand_over(call: Call[None, b.HandOverBody]) -> t.RegionListing:
    """Give regions to another agent of this node, all or none, without copying a byte.

    They keep ids and bytes, and end with their new owner, which is told by a notification that lists them. A session
    gives its own; the operator gives any. Private memory of a process cannot be given.
    """
    return await call.engine.hand_over(call.caller, call.body.to_request())


async def query(call: Call[None, b.QueryBody]) -> a.QueryResults:
    """Say of files and objects whether they exist, how large and how old they are, in the order of the items.

    What goes wrong with one of them is the `error` of its result; the others are told all the same.
    """
    return a.QueryResults(tuple(await call.engine.query(call.caller, call.body.to_items())))


async def list_objects(call: Call[b.ObjectsQuery, None]) -> t.ObjectPage:
    """List objects of a store in key order, at most 1000 at a time; `next` is the `after` of the next page."""
    asked = t.ObjectQuery(call.part("store"), call.query.prefix, call.query.after, call.query.limit)
    return await call.engine.list_objects(call.caller, asked)


async def delete_objects(call: Call[None, b.KeysBody]) -> None:
    """Delete objects of a store; those that are not there are fine. Where it fails, some may be gone."""
    await call.engine.delete_objects(call.caller, call.part("store"), call.body.keys)


async def read_bytes(call: Call[b.SpanQuery, None]) -> web.StreamResponse:
    """Return the bytes of a span, streamed; Content-Length says how many.

    A failure after the first byte breaks the connection off, so that a short body never looks whole.
    """
    info = await _find(call, call.region())
    offset = call.query.offset
    nbytes = info.nbytes - offset if call.query.nbytes is None else call.query.nbytes
    _check_span(info, offset, nbytes)
    if nbytes == 0:
        return web.Response(content_type=OCTETS)
    blocks = call.engine.read_region(call.caller, info.id, offset, nbytes)
    try:
        return await _stream(call, blocks, info.id, nbytes)
    finally:
        if isinstance(blocks, AsyncGenerator):  # lets go of the region now, not when the collector comes by
            await blocks.aclose()


async def _stream(
    call: Call[b.SpanQuery, None], blocks: AsyncIterator[bytes], region: t.RegionId, nbytes: int
) -> web.StreamResponse:
    first = await anext(blocks, b"")  # errors come up here, while the status can still tell them
    response = web.StreamResponse(headers={"Content-Type": OCTETS, "Content-Length": str(nbytes)})
    await response.prepare(call.request)
    try:
        await response.write(first)
        sent = len(first)
        async for block in blocks:
            await response.write(block)
            sent += len(block)
            call.renew()
        if sent != nbytes:
            raise ShortTransfer(f"{sent} bytes of {nbytes} read", limit=f"{nbytes} bytes")
    except XferdError as error:
        _log.warning("rest.read_broken_off", region=region, error=str(error), code=error.code)
        if call.request.transport is not None:
            call.request.transport.abort()
    return response


async def write_bytes(call: Call[b.OffsetQuery, None]) -> a.Written:
    """Write the body into a region from `offset` on; answers when all bytes are in place.

    The body is streamed. One that announces more bytes than fit is refused before any is written; one of unknown
    length that turns out too long has filled the region up to the part that did not fit.
    """
    region, offset = call.region(), call.query.offset
    info = await _find(call, region)
    _check_span(info, offset, call.request.content_length or 0)
    written = 0
    async for block in call.blocks():
        written += await call.engine.write_region(call.caller, region, offset + written, block)
        call.renew()
    return a.Written(written)


async def _find(call: Call[Any, Any], region: t.RegionId) -> t.RegionInfo:
    listing = await call.engine.regions(call.caller, t.RegionQuery(regions=(region,)))
    if not listing.regions:
        raise NotFound(f"no region {region} that the caller may see", remedy="GET /v1/regions lists them")
    return listing.regions[0]


def _check_span(info: t.RegionInfo, offset: int, nbytes: int) -> None:
    if nbytes < 0 or offset + nbytes > info.nbytes:
        raise OutOfBounds(
            f"offset {offset} and {max(nbytes, 0)} bytes in region {info.id}",
            limit=f"{info.nbytes} bytes",
            remedy="stay inside the region",
        )
