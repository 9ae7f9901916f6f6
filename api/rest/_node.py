"""Handlers about the node and the others: health, configuration, listings, metadata, drain, log level."""

from __future__ import annotations

import json

from aiohttp import web

from xferd.api import types as t
from xferd.api.rest import _answers as a, _bodies as b
from xferd.api.rest._route import JSON, OCTETS, TEXT, Call
from xferd.api.rest._shapes import shape_of


async def livez(call: Call[None, None]) -> web.Response:
    """Say whether the daemon's event loop ran lately.

    200: it did. 503: it did not; the reason says for how long. Restart the daemon.
    """
    return _health(call.engine.liveness())


async def readyz(call: Call[None, None]) -> web.Response:
    """Say whether new work is taken.

    200: it is; where the status is `degraded`, the reason says what does not work meanwhile: the store is away, and
    transfers between nodes that know each other go on. 503: starting, draining or stopping; the reason says which. Send
    new work elsewhere.
    """
    return _health(call.engine.readiness(), call.engine.degraded())


def _health(reason: str, degraded: str = "") -> web.Response:
    status = "failing" if reason else "degraded" if degraded else "ok"
    health = a.Health(status, reason or degraded)
    body = json.dumps(shape_of(a.Health).encode(health)).encode() + b"\n"
    return web.Response(status=503 if reason else 200, body=body, content_type=JSON)


async def metrics(call: Call[None, None]) -> web.Response:
    """Return all metrics in the Prometheus text format."""
    headers = {"Content-Type": f"{TEXT}; version=0.0.4; charset=utf-8"}
    return web.Response(body=call.engine.metrics(), headers=headers)


async def get_node(call: Call[None, None]) -> t.NodeStatus:
    """Return this node's record, health and counters."""
    return call.engine.status()


async def get_config(call: Call[None, None]) -> a.ConfigDocument | web.Response:
    """Return the configuration in force; as plain TOML to a client that accepts text/plain."""
    toml = call.engine.config_toml()
    if TEXT in call.request.headers.get("Accept", ""):
        return web.Response(text=toml, content_type=TEXT)
    return a.ConfigDocument(toml)


async def list_pools(call: Call[None, None]) -> a.PoolList:
    """List pools with their statistics."""
    return a.PoolList(tuple(call.engine.pools()))


async def list_devices(call: Call[None, None]) -> a.DeviceList:
    """List the GPUs, with what their workers did; the reason says why one cannot be used."""
    return a.DeviceList(tuple(call.engine.devices()))


async def list_backends(call: Call[None, None]) -> a.BackendList:
    """List the configured backends with what they can move and have moved."""
    return a.BackendList(tuple(call.engine.backends()))


async def get_storage(call: Call[None, None]) -> a.StorageReport:
    """Describe the storage pools: their directories, how much of them is proven, and what the scrubber found."""
    return a.StorageReport(tuple(call.engine.storage()))


async def scrub_storage(call: Call[None, None]) -> t.StorageInfo:
    """Read all sealed blocks of a storage pool now, at its rate; answers when that is done, with what was found."""
    return await call.engine.scrub_storage(call.part("pool"))


async def list_routes(call: Call[None, None]) -> a.RouteList:
    """List what the planner has learned of routes: how fast by size class and peer, and which ones failed lately."""
    return a.RouteList(tuple(call.engine.routes()))


async def list_holds(call: Call[None, None]) -> a.HoldList:
    """List everything held: by whom, why, since when, until when."""
    return a.HoldList(tuple(call.engine.holds()))


async def diagnose(call: Call[None, None]) -> a.DiagnoseReport:
    """Look at the daemon's surroundings now: what is wrong, and what to do. May take seconds."""
    return a.DiagnoseReport(tuple(await call.engine.diagnose()))


async def list_peers(call: Call[None, None]) -> a.PeerList:
    """List the nodes that this one knows, itself left out: with a central store those that it deals with."""
    return a.PeerList(tuple(call.engine.peers()))


async def list_nodes(call: Call[None, None]) -> a.NodeList:
    """List all nodes of the store, asked from it now; the answer grows with the cluster."""
    return a.NodeList(tuple(await call.engine.nodes()))


async def list_agents(call: Call[None, None]) -> a.AgentList:
    """List agents of this node and of the nodes it knows."""
    nodes = [await call.engine.node(), *(peer.node for peer in call.engine.peers())]
    return a.AgentList(tuple(a.Agent(f"{agent}@{node.name}", node.name) for node in nodes for agent in node.agents))


async def get_other_node(call: Call[None, None]) -> t.NodeInfo:
    """Return a node's record by its name."""
    return await call.engine.node(call.part("name"))


async def list_node_regions(call: Call[b.FilterQuery, None]) -> t.RegionListing:
    """List the regions of a node that the caller may see, asked from that node."""
    query = t.RegionQuery(call.part("name"), call.query.agent, call.query.label)
    return await call.engine.regions(call.caller, query)


async def export_metadata(call: Call[None, b.ExportBody]) -> web.Response:
    """Return this node's record and regions as a blob, to be carried by any means and loaded elsewhere."""
    regions = None if call.body.regions is None else b.region_ids(call.body.regions)
    return web.Response(body=await call.engine.export_metadata(regions), content_type=OCTETS)


async def import_metadata(call: Call[None, None]) -> t.RegionListing:
    """Load another node's blob; what was known of that node is replaced."""
    return await call.engine.import_metadata(await call.raw())


async def publish_metadata(call: Call[None, b.ExportBody]) -> None:
    """Put this node's record and regions under a label into the store, for other nodes to fetch; replaces it."""
    regions = None if call.body.regions is None else b.region_ids(call.body.regions)
    await call.engine.publish_metadata(call.part("label"), regions)


async def withdraw_metadata(call: Call[None, None]) -> None:
    """Take a label of this node back."""
    await call.engine.withdraw_metadata(call.part("label"))


async def fetch_metadata(call: Call[b.FetchQuery, None]) -> t.RegionListing:
    """Load what a node put under a label, waiting for it to appear; what was known of that node is replaced."""
    return await call.engine.fetch_metadata(call.query.node, call.part("label"), call.query.timeout)


async def forget_metadata(call: Call[None, None]) -> None:
    """Forget a node that came by a blob."""
    await call.engine.invalidate(call.part("node"))


async def drain(call: Call[None, b.DrainBody]) -> a.Drained:
    """Refuse new work and wait until what runs has ended or the time is over.

    The node goes on refusing work after the answer, until the drain is taken back.
    """
    left = await call.engine.drain(call.body.timeout_s)
    return a.Drained(left == 0, left)


async def undrain(call: Call[None, None]) -> None:
    """Take new work again."""
    call.engine.undrain()


async def get_log_level(call: Call[None, None]) -> a.LogLevel:
    """Return the log level in force, as level and as previous."""
    level = call.engine.log_level()
    return a.LogLevel(level, level)


async def set_log_level(call: Call[None, b.LogLevelBody]) -> a.LogLevel:
    """Set the log level until the next reload or restart; answers the previous one too."""
    previous = call.engine.set_log_level(call.body.level)
    return a.LogLevel(call.body.level, previous)
