"""The table of routes: one entry a verb. The server and the OpenAPI document are both made from it."""

from __future__ import annotations

import functools
import json

from aiohttp import web

from xferd.api import errors as e, types as t
from xferd.api.rest import (
    _answers as a,
    _bodies as b,
    _events as events,
    _memory as memory,
    _node as node,
    _transfers as transfers,
)
from xferd.api.rest._openapi import document
from xferd.api.rest._route import EVENTS, JSON, OCTETS, TEXT, Answer, Auth, Call, Route


async def index(call: Call[None, None]) -> web.Response:
    """List the routes, for people."""
    lines = ["xferd: the routes, whose token each takes (see /openapi.json)\n\n"]
    lines += [f"{route.method:7}{route.path:38}{route.auth.value:9}{route.summary}\n" for route in ROUTES]
    return web.Response(text="".join(lines), content_type=TEXT)


async def openapi(call: Call[None, None]) -> web.Response:
    """Return the OpenAPI 3.1 document of this face."""
    return web.Response(body=_document(), content_type=JSON)


@functools.cache
def _document() -> bytes:
    return json.dumps(document(ROUTES)).encode() + b"\n"


NOTHING = Answer(None, 204)
HEALTH = Answer(a.Health, also={503: "It is not; the reason says why."})

OPEN, SESSION, ADMIN, EITHER = Auth.OPEN, Auth.SESSION, Auth.ADMIN, Auth.EITHER

_LIST_ERRORS = (e.InvalidDescriptor, e.OutOfBounds, e.NotFound, e.Stale, e.PermissionDenied, e.LimitExceeded)
_PLAN_ERRORS = (*_LIST_ERRORS, e.SizeMismatch, e.NoRoute, e.PeerUnknown, e.PeerLost)
_QUERY_ERRORS = (e.LimitExceeded,)
_STORE_ERRORS = (e.NotFound, e.PermissionDenied, e.Unauthenticated, e.LimitExceeded, e.Unsupported, e.MoveFailed)
_DEVICE_ERRORS = (e.Unsupported, e.Unavailable, e.DeviceLost)
_SPAN_ERRORS = (e.NotFound, e.Stale, e.PermissionDenied, e.OutOfBounds)

ROUTES: tuple[Route, ...] = (
    # -- health and description
    Route("GET", "/", index, OPEN, Answer(media=TEXT)),
    Route("GET", "/livez", node.livez, OPEN, HEALTH),
    Route("GET", "/readyz", node.readyz, OPEN, HEALTH),
    Route("GET", "/metrics", node.metrics, OPEN, Answer(media=TEXT)),
    Route("GET", "/openapi.json", openapi, OPEN, Answer(media=JSON)),
    # -- the node
    Route("GET", "/v1/node", node.get_node, EITHER, Answer(t.NodeStatus)),
    Route("GET", "/v1/config", node.get_config, ADMIN, Answer(a.ConfigDocument, alternative=TEXT)),
    Route("GET", "/v1/pools", node.list_pools, EITHER, Answer(a.PoolList)),
    Route("GET", "/v1/devices", node.list_devices, EITHER, Answer(a.DeviceList)),
    Route(
        "POST",
        "/v1/devices/{index}/events",
        memory.open_event,
        SESSION,
        Answer(t.DeviceEvent, 201),
        body=b.EventBody,
        optional_body=True,
        errors=(*_DEVICE_ERRORS, e.NotFound, e.LimitExceeded),
    ),
    Route("GET", "/v1/backends", node.list_backends, EITHER, Answer(a.BackendList)),
    Route("GET", "/v1/storage", node.get_storage, ADMIN, Answer(a.StorageReport)),
    Route(
        "POST",
        "/v1/storage/{pool}/scrub",
        node.scrub_storage,
        ADMIN,
        Answer(t.StorageInfo),
        errors=(e.NotFound, e.MoveFailed, e.ShortTransfer),
    ),
    Route("GET", "/v1/routes", node.list_routes, ADMIN, Answer(a.RouteList)),
    Route("GET", "/v1/holds", node.list_holds, ADMIN, Answer(a.HoldList)),
    Route("GET", "/v1/doctor", node.diagnose, ADMIN, Answer(a.DiagnoseReport)),
    Route("POST", "/v1/drain", node.drain, ADMIN, Answer(a.Drained), body=b.DrainBody, optional_body=True),
    Route("DELETE", "/v1/drain", node.undrain, ADMIN, NOTHING, errors=(e.InvalidState,)),
    Route("GET", "/v1/log-level", node.get_log_level, ADMIN, Answer(a.LogLevel)),
    Route("PUT", "/v1/log-level", node.set_log_level, ADMIN, Answer(a.LogLevel), body=b.LogLevelBody),
    # -- sessions
    Route("GET", "/v1/sessions", memory.list_sessions, ADMIN, Answer(a.SessionList)),
    Route(
        "POST",
        "/v1/sessions",
        memory.open_session,
        ADMIN,
        Answer(t.SessionGrant, 201),
        body=b.SessionBody,
        optional_body=True,
        errors=(e.AlreadyExists, e.Unavailable, e.Overloaded),
    ),
    Route("DELETE", "/v1/sessions/{id}", memory.end_session, EITHER, NOTHING, errors=(e.NotFound, e.PermissionDenied)),
    # -- regions
    Route("GET", "/v1/regions", memory.list_regions, EITHER, Answer(t.RegionListing), query=b.RegionsQuery),
    Route(
        "POST",
        "/v1/regions",
        memory.create_regions,
        SESSION,
        Answer(t.RegionListing, 201),
        body=b.RegionBody,
        errors=(e.PoolExhausted, e.LimitExceeded, e.PermissionDenied, e.NotFound, e.OutOfBounds, *_DEVICE_ERRORS),
    ),
    Route(
        "POST",
        "/v1/regions/hand-over",
        memory.hand_over,
        EITHER,
        Answer(t.RegionListing),
        body=b.HandOverBody,
        errors=(
            e.NotFound,
            e.Stale,
            e.PermissionDenied,
            e.Busy,
            e.AgentUnknown,
            e.Overloaded,
            e.LimitExceeded,
            e.Unsupported,
        ),
    ),
    Route(
        "GET",
        "/v1/regions/{id}/export",
        memory.export_region,
        SESSION,
        Answer(t.DeviceHandle),
        errors=(e.NotFound, e.Stale, e.PermissionDenied, e.Unsupported),
    ),
    Route("GET", "/v1/regions/{id}", memory.get_region, EITHER, Answer(t.RegionInfo), errors=(e.NotFound, e.Stale)),
    Route(
        "DELETE",
        "/v1/regions/{id}",
        memory.free_region,
        EITHER,
        NOTHING,
        errors=(e.NotFound, e.Stale, e.PermissionDenied, e.Busy),
    ),
    Route(
        "GET",
        "/v1/regions/{id}/bytes",
        memory.read_bytes,
        SESSION,
        Answer(media=OCTETS),
        query=b.SpanQuery,
        errors=_SPAN_ERRORS,
    ),
    Route(
        "PUT",
        "/v1/regions/{id}/bytes",
        memory.write_bytes,
        SESSION,
        Answer(a.Written),
        query=b.OffsetQuery,
        raw_body=True,
        errors=_SPAN_ERRORS,
    ),
    # -- files and objects
    Route("POST", "/v1/query", memory.query, EITHER, Answer(a.QueryResults), body=b.QueryBody, errors=_QUERY_ERRORS),
    Route(
        "GET",
        "/v1/stores/{store}/objects",
        memory.list_objects,
        EITHER,
        Answer(t.ObjectPage),
        query=b.ObjectsQuery,
        errors=_STORE_ERRORS,
    ),
    Route(
        "POST",
        "/v1/stores/{store}/objects/delete",
        memory.delete_objects,
        EITHER,
        NOTHING,
        body=b.KeysBody,
        errors=_STORE_ERRORS,
    ),
    # -- lists and transfers
    Route(
        "POST",
        "/v1/prepared",
        transfers.prepare,
        SESSION,
        Answer(t.PreparedInfo, 201),
        body=b.DescriptorsBody,
        errors=(*_LIST_ERRORS, e.PeerUnknown, e.PeerLost),
    ),
    Route("DELETE", "/v1/prepared/{handle}", transfers.release_prepared, SESSION, NOTHING, errors=(e.NotFound,)),
    Route("GET", "/v1/transfers", transfers.list_transfers, EITHER, Answer(a.TransferList), query=b.TransfersQuery),
    Route(
        "POST",
        "/v1/transfers",
        transfers.submit_transfer,
        SESSION,
        Answer(t.TransferStatus, 201),
        body=b.SubmitBody,
        errors=(*_PLAN_ERRORS, e.AlreadyExists, e.Overloaded, e.Unavailable),
    ),
    Route(
        "POST",
        "/v1/transfers/estimate",
        transfers.estimate_transfer,
        EITHER,
        Answer(t.Estimate),
        body=b.TransferBody,
        errors=_PLAN_ERRORS,
    ),
    Route(
        "POST",
        "/v1/transfers/explain",
        transfers.explain_transfer,
        EITHER,
        Answer(t.Explanation),
        body=b.TransferBody,
        errors=_PLAN_ERRORS,
    ),
    Route("GET", "/v1/transfers/{id}", transfers.get_transfer, EITHER, Answer(t.TransferStatus), errors=(e.NotFound,)),
    Route(
        "POST",
        "/v1/transfers/{id}/post",
        transfers.post_transfer,
        SESSION,
        Answer(t.TransferStatus),
        body=b.PostBody,
        optional_body=True,
        errors=(e.NotFound, e.InvalidState, e.Stale, e.Unavailable),
    ),
    Route(
        "POST",
        "/v1/transfers/{id}/wait",
        transfers.wait_transfer,
        EITHER,
        Answer(t.TransferStatus),
        body=b.WaitBody,
        optional_body=True,
        errors=(e.NotFound,),
    ),
    Route(
        "POST",
        "/v1/transfers/{id}/cancel",
        transfers.cancel_transfer,
        EITHER,
        Answer(t.TransferStatus),
        errors=(e.NotFound,),
    ),
    Route("DELETE", "/v1/transfers/{id}", transfers.release_transfer, EITHER, NOTHING, errors=(e.NotFound,)),
    # -- notifications
    Route(
        "GET",
        "/v1/notifications",
        transfers.receive_notifications,
        SESSION,
        Answer(a.NotificationList),
        query=b.ReceiveQuery,
    ),
    Route(
        "POST",
        "/v1/notifications",
        transfers.send_notification,
        SESSION,
        NOTHING,
        body=b.NotificationBody,
        errors=(e.AgentUnknown, e.PeerUnknown, e.PeerLost, e.LimitExceeded, e.Overloaded),
    ),
    # -- who else is there
    Route("GET", "/v1/agents", node.list_agents, EITHER, Answer(a.AgentList)),
    Route("GET", "/v1/peers", node.list_peers, EITHER, Answer(a.PeerList)),
    Route("GET", "/v1/peers/events", events.watch_peers, EITHER, Answer(media=EVENTS), query=b.EventsQuery),
    Route("GET", "/v1/nodes", node.list_nodes, EITHER, Answer(a.NodeList), errors=(e.Unavailable,)),
    Route("GET", "/v1/nodes/{name}", node.get_other_node, EITHER, Answer(t.NodeInfo), errors=(e.PeerUnknown,)),
    Route(
        "GET",
        "/v1/nodes/{name}/regions",
        node.list_node_regions,
        EITHER,
        Answer(t.RegionListing),
        query=b.FilterQuery,
        errors=(e.PeerUnknown, e.PeerLost),
    ),
    Route(
        "POST",
        "/v1/metadata/export",
        node.export_metadata,
        EITHER,
        Answer(media=OCTETS),
        body=b.ExportBody,
        optional_body=True,
        errors=(e.NotFound, e.Stale),
    ),
    Route(
        "PUT",
        "/v1/metadata/import",
        node.import_metadata,
        EITHER,
        Answer(t.RegionListing),
        raw_body=True,
        errors=(e.LimitExceeded, e.IntegrityError, e.Stale),
    ),
    Route(
        "PUT",
        "/v1/metadata/labels/{label}",
        node.publish_metadata,
        EITHER,
        NOTHING,
        body=b.ExportBody,
        optional_body=True,
        errors=(e.Unsupported, e.LimitExceeded, e.NotFound, e.Stale, e.Unavailable),
    ),
    Route(
        "GET",
        "/v1/metadata/labels/{label}",
        node.fetch_metadata,
        EITHER,
        Answer(t.RegionListing),
        query=b.FetchQuery,
        errors=(e.Unsupported, e.NotFound, e.Unavailable),
    ),
    Route(
        "DELETE",
        "/v1/metadata/labels/{label}",
        node.withdraw_metadata,
        EITHER,
        NOTHING,
        errors=(e.Unsupported, e.NotFound),
    ),
    Route("DELETE", "/v1/metadata/{node}", node.forget_metadata, EITHER, NOTHING, errors=(e.NotFound, e.PeerUnknown)),
)
