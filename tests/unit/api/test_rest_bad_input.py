"""Bad requests get a typed problem that names value, limit and remedy, and change nothing."""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeEngine
from rest_harness import Rest, serving

from xferd.api.types import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

UNKNOWN = str(99 << 32 | 12345)


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    async with serving(max_body_nbytes=1 << 20, max_descriptors=1000) as client:
        yield client


@pytest.fixture
async def token(rest: Rest) -> str:
    return await rest.session()


@pytest.fixture
async def region(rest: Rest, token: str) -> str:
    return (await rest.allocate(token, 4096))[0]


def transfer(local: Any, remote: Any) -> dict[str, Any]:
    return {"op": "READ", "local": local, "remote": remote}


def columns(region: Any, offset: Any, nbytes: Any) -> dict[str, Any]:
    return {"columns": {"region": region, "offset": offset, "nbytes": nbytes}}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/v1/regions/{UNKNOWN}", None),
        ("DELETE", f"/v1/regions/{UNKNOWN}", None),
        ("GET", f"/v1/regions/{UNKNOWN}/bytes", None),
        ("PUT", f"/v1/regions/{UNKNOWN}/bytes", None),
        ("GET", "/v1/transfers/none", None),
        ("DELETE", "/v1/transfers/none", None),
        ("POST", "/v1/transfers/none/post", {}),
        ("POST", "/v1/transfers/none/wait", {}),
        ("POST", "/v1/transfers/none/cancel", None),
        ("DELETE", "/v1/prepared/4711", None),
        ("POST", "/v1/prepared", columns(UNKNOWN, [0], 1)),
        ("DELETE", "/v1/metadata/none", None),
        ("GET", "/v1/nowhere", None),
    ],
)
async def test_unknown_ids_and_routes_are_not_found(rest: Rest, token: str, method: str, path: str, body: Any) -> None:
    reply = await rest(method, path, body, token=token)
    assert (reply.status, reply.code) == (404, "not_found")
    assert reply.json["type"] == "urn:xferd:error:not_found"
    assert reply.json["remedy"]


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        (columns(1, [0, 1], [1]), "", ""),  # one value stands for all rows
        (columns([1, 1, 1], [0, 1], 1), "invalid_descriptor", "column region has 3 rows"),
        (columns(1, [0, 1], [1, 2, 3]), "invalid_descriptor", "column nbytes has 3 rows"),
        (columns(1, [], 1), "invalid_descriptor", "no descriptors"),
        (columns(1, [0], [0]), "invalid_descriptor", "nbytes 0"),
        (columns(1, [-1], 1), "invalid_descriptor", "column offset has the value -1"),
        (columns(1, [1 << 64], 1), "invalid_descriptor", "column offset has the value 18446744073709551616"),
        (columns(1, [10**400], 1), "invalid_descriptor", "of many digits"),
        (columns(1, [(1 << 64) - 1], 1), "invalid_descriptor", "wraps around"),
        (columns(1, ["18446744073709551615", 5], 1), "invalid_descriptor", "wraps around"),
        (columns(1, [4096], 1), "out_of_bounds", "offset 4096"),
        (columns(1, [0.5], 1), "invalid_descriptor", "column offset holds float"),
        (columns(1, [1.0], 1), "invalid_descriptor", "column offset holds float"),
        (columns(1, [True], 1), "invalid_descriptor", "column offset holds bool"),
        (columns(1, [None], 1), "invalid_descriptor", "column offset holds NoneType"),
        (columns(1, [[0]], 1), "invalid_descriptor", "column offset holds list"),
        (columns(1, {"0": 0}, 1), "invalid_descriptor", "column offset holds dict"),
        (columns(1, ["-1"], 1), "invalid_descriptor", "column offset"),
        (columns(1, ["1e3"], 1), "invalid_descriptor", "column offset"),
        (columns(1, list(range(1001)), 1), "limit_exceeded", "1001 descriptors"),
        (
            {"runs": [{"region": 1, "offset": 0, "nbytes": 1, "stride": 1, "count": 1 << 60}]},
            "limit_exceeded",
            "1152921504606846976 descriptors",
        ),
        (
            {"runs": [{"region": 1, "offset": (1 << 64) - 4, "nbytes": 1, "stride": 2, "count": 9}]},
            "invalid_descriptor",
            "run 0",
        ),
        ({"runs": []}, "invalid_descriptor", "no descriptors"),
        ({"runs": [{"region": 1, "offset": 0, "nbytes": 1, "stride": 1, "count": 1.5}]}, "invalid_argument", "count"),
        ({}, "invalid_argument", "exactly one of columns, runs, prepared"),
        ({"prepared": 1, **columns(1, [0], 1)}, "invalid_argument", "exactly one"),
        ({"prepared": "4711"}, "not_found", "4711"),
        ({"prepared": 1, "index": [1 << 32]}, "invalid_descriptor", "column index has the value 4294967296"),
        ({**columns(1, [0], 1), "index": [0]}, "invalid_argument", "index"),
        ({**columns(1, [0], 1), "rows": []}, "invalid_argument", "rows"),
        ({"columns": {"region": 1, "offset": [0]}}, "invalid_argument", "columns.nbytes"),
        ({"columns": 5}, "invalid_argument", "columns"),
        ({**columns(1, [0], 1), "epoch": -1}, "invalid_argument", "epoch"),
        ({**columns(1, [0], 1), "epoch": 6}, "stale", "epoch 6"),
        ({**columns(1, [0], 1), "node": "elsewhere"}, "peer_unknown", "elsewhere"),
    ],
)
async def test_descriptor_lists(rest: Rest, token: str, region: str, spec: Any, code: str, words: str) -> None:
    """Each wrong list is refused with its own code, in prepare and in submit alike."""
    spec = json.loads(json.dumps(spec).replace('"region": 1,', f'"region": "{region}",'))
    if "columns" in spec or "runs" in spec:
        reply = await rest("POST", "/v1/prepared", spec, token=token)
        assert (reply.code, reply.status == 201) == (code, not code), reply.body
        assert words in str(reply.json.get("detail", "")) or not words
    reply = await rest("POST", "/v1/transfers/explain", transfer(spec, columns(region, [0], 2)), token=token)
    assert reply.code == code
    if code:
        assert words in reply.json["detail"]
        assert reply.json["limit"] or reply.json["remedy"]


async def test_totals_that_differ(rest: Rest, token: str, region: str) -> None:
    reply = await rest(
        "POST", "/v1/transfers", transfer(columns(region, [0], 8), columns(region, [64], 9)), token=token
    )
    assert (reply.status, reply.code) == (400, "size_mismatch")
    assert "8 bytes" in reply.json["detail"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/regions", {"kind": "allocate", "nbytes": [-1]}, "nbytes.0"),
        ("/v1/regions", {"kind": "allocate", "nbytes": [1 << 64]}, "nbytes.0"),
        ("/v1/regions", {"kind": "allocate", "nbytes": [4096.0]}, "nbytes.0"),
        ("/v1/regions", {"kind": "allocate", "nbytes": [1], "acces": "READ"}, "acces"),
        ("/v1/regions", {"kind": "allocate", "nbytes": [1], "access": "ALL"}, "access"),
        ("/v1/regions", {"kind": "magic"}, "magic"),
        ("/v1/regions", {"nbytes": [1]}, "kind"),
        ("/v1/regions", {"kind": "file", "path": 7}, "path"),
        ("/v1/notifications", {"target": "a", "payload": "no base64!"}, "payload"),
        ("/v1/transfers", {"op": "MOVE", "local": {}, "remote": {}}, "op"),
        ("/v1/transfers/x-1/wait", {"timeout_s": -1}, "timeout_s"),
        ("/v1/transfers/x-1/wait", {"timeout_s": 1e9}, "timeout_s"),
        ("/v1/transfers/x-1/wait", {"timeout_s": "5"}, "timeout_s"),
        ("/v1/metadata/export", {"regions": ["x"]}, "regions.0"),
    ],
)
async def test_a_wrong_field_is_named(rest: Rest, token: str, path: str, body: Any, field: str) -> None:
    reply = await rest("POST", path, body, token=token)
    assert (reply.status, reply.code) == (400, "invalid_argument")
    assert field in reply.json["detail"]


@pytest.mark.parametrize("body", ["", "{", "[]", '"x"', "null", '{"level": NaN}', "\xff", '{"level": "loud"}'])
async def test_bodies_that_are_no_such_document(rest: Rest, body: str) -> None:
    data = body.encode("latin-1")
    reply = await rest("PUT", "/v1/log-level", data=data, headers={"Content-Type": "application/json"})
    assert (reply.status, reply.code) == (400, "invalid_argument")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/regions/abc",
        "/v1/regions/-1",
        f"/v1/regions/{1 << 64}",
        "/v1/regions/1.0/bytes",
        "/v1/regions/{region}/bytes?offset=-1",
        "/v1/regions/{region}/bytes?nbytes=1e3",
        "/v1/regions/{region}/bytes?offset=0&offset=1",
        "/v1/regions/{region}/bytes?ofset=0",
        "/v1/regions/{region}?offset=0",
        "/v1/notifications?timeout=nan",
        "/v1/notifications?timeout=-1",
        "/v1/notifications?limit=0",
        "/v1/transfers?active=perhaps",
    ],
)
async def test_paths_and_queries_that_are_wrong(rest: Rest, token: str, region: str, path: str) -> None:
    reply = await rest("GET", path.format(region=region), token=token)
    assert (reply.status, reply.code) == (400, "invalid_argument")


async def test_spans_past_the_region(rest: Rest, token: str, region: str) -> None:
    for query in ("offset=4097", "offset=4096&nbytes=1", f"offset={(1 << 64) - 1}", f"nbytes={(1 << 64) - 1}"):
        reply = await rest("GET", f"/v1/regions/{region}/bytes?{query}", token=token)
        assert (reply.status, reply.code, reply.json["limit"]) == (416, "out_of_bounds", "4096 bytes")
    reply = await rest("PUT", f"/v1/regions/{region}/bytes?offset=1", token=token, data=b"x" * 4096)
    assert (reply.status, reply.code) == (416, "out_of_bounds")
    assert not any(rest.engine.data(int(region))), "an announced overrun writes nothing"
    assert (await rest("GET", f"/v1/regions/{region}/bytes?offset=4096", token=token)).body == b""


async def test_tokens(rest: Rest) -> None:
    for token in ("", "wrong"):
        reply = await rest("POST", "/v1/regions", {"kind": "allocate", "nbytes": [1]}, token=token)
        assert (reply.status, reply.code) == (401, "unauthenticated")
    reply = await rest("GET", "/v1/regions", token="wrong")
    assert reply.code == "unauthenticated", "a session that ended must not turn into the operator"
    reply = await rest("GET", "/v1/node", headers={"Authorization": "Basic eDp5"})
    assert (reply.code, reply.json["limit"]) == ("unauthenticated", "Bearer")


async def test_what_another_session_holds(rest: Rest, region: str) -> None:
    stranger = await rest.session()
    at = f"/v1/regions/{region}"
    assert (await rest("DELETE", at, token=stranger)).code == "permission_denied"
    assert (await rest("GET", f"{at}/bytes", token=stranger)).code == "not_found"
    assert (await rest("GET", at, token=stranger)).code == "not_found"
    (own,) = await rest.allocate(stranger, 4096)
    body = transfer(columns(own, [0], 8), columns(region, [0], 8))
    reply = await rest("POST", "/v1/transfers", body, token=stranger)
    assert (reply.status, reply.code) == (403, "permission_denied")


async def test_private_memory_and_paths_outside_the_roots(rest: Rest, token: str) -> None:
    body = {"kind": "private", "address": 4096, "nbytes": 4096}
    reply = await rest("POST", "/v1/regions", body, token=token)
    assert (reply.status, reply.code) == (501, "unsupported")
    reply = await rest("POST", "/v1/regions", {"kind": "file", "path": "../etc/passwd"}, token=token)
    assert (reply.status, reply.code) == (403, "permission_denied")


async def test_a_full_pool_and_a_full_inbox_can_be_tried_again() -> None:
    async with serving(FakeEngine(pool_nbytes=8192, max_inbox=1)) as rest:
        token = await rest.session("a")
        reply = await rest("POST", "/v1/regions", {"kind": "allocate", "nbytes": [4096] * 3}, token=token)
        assert (reply.status, reply.code, reply.json["retryable"]) == (507, "pool_exhausted", True)
        assert rest.engine.pools()[0].used_nbytes == 0
        await rest("POST", "/v1/notifications", {"target": "a"}, token=token)
        reply = await rest("POST", "/v1/notifications", {"target": "a"}, token=token)
        assert (reply.status, reply.code, reply.json["retryable"]) == (429, "overloaded", True)


async def test_a_notification_over_the_limit() -> None:
    async with serving(FakeEngine(limits=Limits(10, 1 << 20, 2, 10))) as rest:
        token = await rest.session("a")
        reply = await rest("POST", "/v1/notifications", {"target": "a", "payload": "AAAA"}, token=token)
        assert (reply.status, reply.code, reply.json["limit"]) == (413, "limit_exceeded", "2 bytes")


async def test_bodies_over_the_limit_announced_or_not(rest: Rest, token: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    big = b" " * ((1 << 20) + 1)
    for data in (io.BytesIO(big), endless()):
        reply = await rest("POST", "/v1/prepared", token=token, data=data, headers={"Content-Type": "application/json"})
        assert (reply.status, reply.code, reply.json["limit"]) == (413, "limit_exceeded", "1048576 bytes")
    assert (await rest("PUT", "/v1/metadata/import", data=io.BytesIO(big))).code == "limit_exceeded"


@pytest.mark.slow
async def test_the_face_stays_responsive_under_a_million_descriptors() -> None:
    """Health is answered while the list is taken in; as runs the same list is small."""
    async with serving() as rest:
        token = await rest.session()
        (region,) = await rest.allocate(token, 4096)
        rows = {"columns": {"region": region, "offset": list(range(1_000_000)), "nbytes": 1}}
        data = io.BytesIO(json.dumps(rows).encode())
        headers = {"Content-Type": "application/json"}
        big = asyncio.create_task(rest("POST", "/v1/prepared", token=token, data=data, headers=headers))
        async with asyncio.timeout(2):
            assert (await rest("GET", "/livez")).status == 200
        reply = await big
        assert (reply.code, reply.json["limit"]) in (
            ("out_of_bounds", "4096 bytes"),
            ("limit_exceeded", "8388608 bytes"),
        )
        runs = {"runs": [{"region": region, "offset": 0, "nbytes": 4096, "stride": 0, "count": 1_000_000}]}
        assert (await rest("POST", "/v1/prepared", runs, token=token)).json["count"] == 1_000_000


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("PUT", "/v1/log-level", {"Content-Type": "text/plain"}),
        ("PUT", "/v1/log-level", {"Content-Type": "application/x-www-form-urlencoded"}),
        ("PUT", "/v1/log-level", {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
        ("POST", "/v1/drain", {"Content-Type": "text/plain"}),
        ("PUT", "/v1/metadata/import", {"Content-Type": "application/json"}),
        ("DELETE", "/v1/drain", {"Content-Type": "text/plain"}),
    ],
)
async def test_media_types(rest: Rest, method: str, path: str, headers: dict[str, str]) -> None:
    reply = await rest(method, path, data=b"{}", headers=headers)
    assert (reply.status, reply.code) == (415, "invalid_argument")
    assert reply.json["limit"]
    assert not rest.engine.draining


async def test_a_wrong_method_names_the_right_ones(rest: Rest) -> None:
    reply = await rest("PATCH", "/v1/drain")
    assert (reply.status, reply.code, reply.json["limit"]) == (405, "invalid_argument", "DELETE, POST")
    assert set(reply.headers["Allow"].split(",")) == {"DELETE", "POST"}


async def test_work_is_refused_while_draining(rest: Rest, token: str) -> None:
    await rest("POST", "/v1/drain", {"timeout_s": 0})
    reply = await rest("POST", "/v1/regions", {"kind": "allocate", "nbytes": [1]}, token=token)
    assert (reply.status, reply.code, reply.json["retryable"]) == (503, "unavailable", True)
