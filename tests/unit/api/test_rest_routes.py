"""Every route does what it says and answers in the shape that the OpenAPI document declares."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeEngine
from rest_harness import Rest, serving

from xferd.api.rest._table import ROUTES
from xferd.api.types import MemoryKind, NodeInfo, PeerInfo, PeerState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    async with serving() as client:
        yield client


def span(region: str, nbytes: int, offset: int = 0) -> dict[str, object]:
    return {"columns": {"region": region, "offset": [offset], "nbytes": nbytes}}


async def test_every_route_answers_as_declared(rest: Rest) -> None:
    """One story through all routes; the harness checks each answer, the end that none was left out."""
    rest.engine.files["weights.bin"] = bytearray(8192)
    for path in ("/", "/livez", "/readyz", "/metrics", "/openapi.json"):
        assert (await rest("GET", path)).status == 200
    for path in (
        "node",
        "config",
        "pools",
        "backends",
        "routes",
        "holds",
        "doctor",
        "peers",
        "agents",
        "sessions",
        "log-level",
    ):
        assert (await rest("GET", f"/v1/{path}")).status == 200
    grant = (await rest("POST", "/v1/sessions", {"agent": "a", "ttl_s": 30})).json
    token = grant["token"]

    source, target = await rest.allocate(token, 4096, 4096, access="READ")
    await rest("POST", "/v1/regions", {"kind": "file", "path": "weights.bin"}, token=token)
    listed = (await rest("GET", "/v1/regions?agent=a", token=token)).json["regions"]
    assert [region["nbytes"] for region in listed] == [4096, 4096, 8192]
    payload = os.urandom(4096)
    written = await rest("PUT", f"/v1/regions/{source}/bytes", token=token, data=payload)
    assert written.json == {"nbytes": 4096}

    transfer = {"op": "WRITE", "local": span(source, 4096), "remote": span(target, 4096)}
    assert (await rest("POST", "/v1/transfers/estimate", transfer, token=token)).json["basis"] == "assumed"
    assert (await rest("POST", "/v1/transfers/explain", transfer, token=token)).json["total_nbytes"] == 4096
    held = (await rest("POST", "/v1/transfers", {**transfer, "hold": True, "key": "k"}, token=token)).json
    assert held["state"] == "PREPARED"
    at = f"/v1/transfers/{held['id']}"
    assert (await rest("POST", f"{at}/post", {"wait_s": 5}, token=token)).json["state"] == "DONE"
    assert (await rest("POST", f"{at}/wait", token=token)).json["state"] == "DONE"
    assert (await rest("POST", f"{at}/cancel", token=token)).json["state"] == "DONE"
    assert (await rest("GET", at, token=token)).json["telemetry"]["moved_nbytes"] == 4096
    assert [item["id"] for item in (await rest("GET", "/v1/transfers", token=token)).json["transfers"]] == [held["id"]]
    assert (await rest("GET", f"/v1/regions/{target}/bytes?offset=96", token=token)).body == payload[96:]

    made = {"kind": "object", "store": "s", "key": "a/b", "nbytes": 7, "writable": True, "create": True}
    (record,) = (await rest("POST", "/v1/regions", made, token=token)).json["regions"]
    assert (record["kind"], record["source"], record["path"], record["nbytes"]) == ("OBJECT", "OBJECT", "s/a/b", 7)
    items = [{"store": "s", "key": "a/b"}, {"path": "weights.bin"}, {"path": "../x"}, {"path": "absent"}]
    results = (await rest("POST", "/v1/query", {"items": items}, token=token)).json["results"]
    assert [(result["exists"], result["nbytes"]) for result in results] == [
        (True, 7),
        (True, 8192),
        (False, 0),
        (False, 0),
    ]
    assert [result["error"] and result["error"]["code"] for result in results] == [
        None,
        None,
        "permission_denied",
        None,
    ]
    page = (await rest("GET", "/v1/stores/s/objects?prefix=a&limit=5", token=token)).json
    assert ([entry["key"] for entry in page["objects"]], page["next"]) == (["a/b"], "")
    assert (await rest("POST", "/v1/stores/s/objects/delete", {"keys": ["a/b"]}, token=token)).status == 204
    assert (await rest("GET", "/v1/stores/s/objects")).json["objects"] == []
    assert (await rest("DELETE", f"/v1/regions/{record['id']}", token=token)).status == 204

    gpu = (await rest("GET", "/v1/devices")).json["devices"]
    assert [(info["index"], info["reason"]) for info in gpu] == [(0, ""), (1, "device 1 of 1")]
    handle = base64.b64encode(b"h" * 64).decode()
    exported = {"device_uuid": gpu[0]["device_uuid"], "handle": handle, "allocation_nbytes": 8192, "offset": 4096}
    (record,) = (await rest("POST", "/v1/regions", {"kind": "device", **exported}, token=token)).json["regions"]
    assert (record["kind"], record["source"], record["nbytes"]) == ("VRAM", "DEVICE", 4096)
    told = (await rest("GET", f"/v1/regions/{record['id']}/export", token=token)).json
    assert told == {**exported, "driver": "simulated"}
    assert (await rest("GET", f"/v1/regions/{source}/export", token=token)).code == "invalid_argument"
    assert (await rest("POST", "/v1/devices/0/events", {"handle": handle}, token=token)).json["handle"] == ""
    made = (await rest("POST", "/v1/devices/0/events", token=token)).json
    assert made["event"] > 0
    assert made["handle"]
    assert (await rest("DELETE", f"/v1/regions/{record['id']}", token=token)).status == 204

    prepared = (await rest("POST", "/v1/prepared", span(source, 64), token=token)).json
    assert (prepared["count"], prepared["total_nbytes"]) == (1, 64)
    assert (await rest("DELETE", f"/v1/prepared/{prepared['handle']}", token=token)).status == 204
    note = {"target": "a", "payload": base64.b64encode(b"\0\xff").decode()}
    assert (await rest("POST", "/v1/notifications", note, token=token)).status == 204
    (taken,) = (await rest("GET", "/v1/notifications?timeout=1", token=token)).json["notifications"]
    assert base64.b64decode(taken["payload"]) == b"\0\xff"

    assert (await rest("GET", "/v1/storage")).json["pools"][0]["directories"][0]["path"] == "/ssd"
    assert (await rest("POST", "/v1/storage/ssd/scrub")).json["scrub_passes"] == 3
    assert (await rest("POST", "/v1/storage/none/scrub")).code == "not_found"

    other = (await rest("POST", "/v1/sessions", {"agent": "heir", "ttl_s": 30})).json
    (gift,) = await rest.allocate(token, 4096)
    given = {"regions": [gift], "to": "heir", "payload": base64.b64encode(b"yours").decode(), "access": "READ"}
    (record,) = (await rest("POST", "/v1/regions/hand-over", given, token=token)).json["regions"]
    assert (record["id"], record["agent"], record["access"]) == (gift, "heir", "READ")
    (taken,) = (await rest("GET", "/v1/notifications?timeout=1", token=other["token"])).json["notifications"]
    assert (taken["regions"], base64.b64decode(taken["payload"])) == ([gift], b"yours")
    assert (await rest("POST", "/v1/regions/hand-over", given, token=token)).code == "permission_denied"
    assert (await rest("DELETE", f"/v1/sessions/{other['session']}", token=other["token"])).status == 204

    assert [node["name"] for node in (await rest("GET", "/v1/nodes")).json["nodes"]] == ["node-a"]
    assert (await rest("GET", "/v1/peers/events?timeout=0.01")).body == b""
    assert (await rest("GET", "/v1/nodes/node-a")).json["agents"] == ["a"]
    assert len((await rest("GET", "/v1/nodes/node-a/regions")).json["regions"]) == 3
    blob = (await rest("POST", "/v1/metadata/export")).body
    assert (await rest("PUT", "/v1/metadata/import", data=blob)).json["node"] == "node-a"
    assert (await rest("DELETE", "/v1/metadata/node-a")).status == 204
    assert (await rest("PUT", "/v1/metadata/labels/kv")).code == "unsupported"
    rest.engine.labels = {}
    assert (await rest("PUT", "/v1/metadata/labels/kv", {"regions": [source]})).status == 204
    assert len((await rest("GET", "/v1/metadata/labels/kv?node=node-a")).json["regions"]) == 1
    assert (await rest("GET", "/v1/metadata/labels/kv?node=other")).code == "not_found"
    assert (await rest("DELETE", "/v1/metadata/labels/kv")).status == 204
    rest.engine.degraded_reason = "the store is away"
    assert (await rest("GET", "/readyz")).json == {"status": "degraded", "reason": "the store is away"}
    assert (await rest("PUT", "/v1/log-level", {"level": "debug"})).json == {"level": "debug", "previous": "info"}
    assert (await rest("POST", "/v1/drain", {"timeout_s": 0})).json == {"drained": True, "transfers_left": 0}
    assert (await rest("GET", "/readyz")).status == 503
    assert (await rest("DELETE", "/v1/drain")).status == 204

    assert (await rest("GET", f"/v1/regions/{source}", token=token)).json["access"] == "READ"
    assert (await rest("DELETE", at, token=token)).status == 204
    assert (await rest("DELETE", f"/v1/regions/{source}", token=token)).status == 204
    assert (await rest("DELETE", f"/v1/sessions/{grant['session']}", token=token)).status == 204
    assert rest.engine.nothing_held()
    assert rest.seen - {""} == {route.name for route in ROUTES}


async def test_identifiers_of_64_bits_are_strings_and_taken_as_strings_or_integers(rest: Rest) -> None:
    token = await rest.session()
    (region,) = await rest.allocate(token, 4096)
    assert isinstance(region, str)
    assert isinstance((await rest("GET", "/v1/node")).json["node"]["epoch"], str)
    for given in (region, int(region), [region], [int(region)]):
        body = {"epoch": "7", "columns": {"region": given, "offset": ["0"], "nbytes": 64}}
        assert (await rest("POST", "/v1/prepared", body, token=token)).status == 201


async def test_runs_and_prepared_lists_with_an_index(rest: Rest) -> None:
    token = await rest.session()
    source, target = await rest.allocate(token, 4096, 4096)
    await rest("PUT", f"/v1/regions/{source}/bytes", token=token, data=bytes(range(256)) * 16)
    run = {"region": source, "offset": 0, "nbytes": 16, "stride": 256, "count": 16}
    handle = (await rest("POST", "/v1/prepared", {"runs": [run]}, token=token)).json["handle"]
    local = {"prepared": handle, "index": [3, 1]}
    body = {"op": "WRITE", "local": local, "remote": span(target, 32), "wait_s": 5}
    assert (await rest("POST", "/v1/transfers", body, token=token)).json["state"] == "DONE"
    assert bytes(rest.engine.data(int(target))[:32]) == bytes(range(16)) * 2


async def test_the_same_key_is_the_same_transfer(rest: Rest) -> None:
    token = await rest.session()
    source, target = await rest.allocate(token, 4096, 4096)
    body = {"op": "READ", "local": span(target, 8), "remote": span(source, 8), "key": "once"}
    first, second = [(await rest("POST", "/v1/transfers", body, token=token)).json["id"] for _ in range(2)]
    assert first == second


async def test_a_failed_transfer_carries_its_error(rest: Rest) -> None:
    token = await rest.session()
    source, target = await rest.allocate(token, 4096, 4096)
    body = {
        "op": "READ",
        "local": span(target, 8),
        "remote": span(source, 8),
        "notification": {"target": "nobody"},
        "wait_s": 1,
    }
    reply = await rest("POST", "/v1/transfers", body, token=token)
    assert (reply.status, reply.json["state"], reply.json["error"]["code"]) == (201, "FAILED", "agent_unknown")


async def test_a_session_sees_its_own_part_and_the_operator_all(rest: Rest) -> None:
    mine, other = await rest.session("mine"), await rest.session("other")
    await rest.allocate(mine, 4096)
    await rest.allocate(other, 4096)
    assert len((await rest("GET", "/v1/regions", token=mine)).json["regions"]) == 1
    assert len((await rest("GET", "/v1/regions")).json["regions"]) == 2


async def test_configuration_as_plain_toml(rest: Rest) -> None:
    reply = await rest("GET", "/v1/config", headers={"Accept": "text/plain"})
    assert reply.headers["Content-Type"].startswith("text/plain")
    assert reply.body.startswith(b"[node]")


async def test_agents_of_known_nodes_are_listed_by_address(rest: Rest) -> None:
    await rest.session("here")
    node = NodeInfo("node-b", "id-b", 1 << 62, "0.1.0", ("tcp://127.0.0.1:1",), (), (MemoryKind.DRAM,), ("there",), 0.0)
    rest.engine.peer_list.append(PeerInfo(node, PeerState.READY, "", 0.0, 2, 0, 0))
    agents = (await rest("GET", "/v1/agents")).json["agents"]
    assert [agent["address"] for agent in agents] == ["here@node-a", "there@node-b"]
    assert (await rest("GET", "/v1/peers")).json["peers"][0]["node"]["epoch"] == str(1 << 62)


async def test_a_session_ends_by_its_own_token_or_the_operators_alone() -> None:
    async with serving(FakeEngine(admin_token="secret"), admin_token="secret") as rest:
        assert (await rest("POST", "/v1/sessions", {})).status == 401
        grants = [(await rest("POST", "/v1/sessions", {}, token="secret")).json for _ in range(2)]
        own, other = (grant["session"] for grant in grants)
        token = grants[0]["token"]
        assert (await rest("DELETE", f"/v1/sessions/{other}", token=token)).code == "permission_denied"
        assert (await rest("DELETE", f"/v1/sessions/{other}")).code == "unauthenticated"
        assert (await rest("DELETE", f"/v1/sessions/{own}", token=token)).status == 204
        assert (await rest("DELETE", f"/v1/sessions/{other}", token="secret")).status == 204
        assert (await rest("DELETE", f"/v1/sessions/{other}", token="secret")).code == "not_found"
        assert (await rest("GET", "/v1/regions", token="secret")).status == 200
        assert (await rest("GET", "/v1/regions", token="wrong")).code == "unauthenticated"
        assert (await rest("GET", "/v1/holds", token="wrong")).headers["WWW-Authenticate"].startswith("Bearer")


def peer_of(name: str, state: PeerState, epoch: int = 1) -> PeerInfo:
    return PeerInfo(NodeInfo(name, f"id-{name}", epoch, "0.1.0", (), (), (), (), 0.0), state, "", 0.0, 0, 0, 0)


async def test_peer_events_are_told_as_they_come_and_the_watch_is_let_go() -> None:
    """The first event comes before the second happened; whoever hangs up ends the watch behind it."""
    async with serving() as rest:
        await rest.engine.set_peers(peer_of("node-b", PeerState.READY), peer_of("node-c", PeerState.READY))
        url = "http://xferd/v1/peers/events?name=node-b"
        async with rest.client.get(url) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            for state in ("READY", "GONE"):
                event, data, blank = [await response.content.readline() for _ in range(3)]
                assert (event, blank) == (b"event: peer\n", b"\n")
                found = json.loads(data.removeprefix(b"data: "))
                assert (found["node"]["name"], found["state"]) == ("node-b", state)
                await rest.engine.set_peers(peer_of("node-b", PeerState.GONE), peer_of("node-c", PeerState.GONE))
        await rest.engine.was_cancelled("watch_peers")


async def test_peer_events_end_after_a_count_or_a_time() -> None:
    async with serving() as rest:
        await rest.engine.set_peers(*(peer_of(f"n{number}", PeerState.READY) for number in range(3)))
        body = (await rest("GET", "/v1/peers/events?count=2")).body
        assert body.count(b"event: peer\n") == 2
        assert (await rest("GET", "/v1/peers/events?timeout=0.01&name=nobody")).body == b""
        assert (await rest("GET", "/v1/peers/events?count=-1")).code == "invalid_argument"
