"""The little of etcd that a coordinated benchmark needs, over its JSON gateway: a lease, keys under it, one watch.

Only the standard library is used: ``xferbench`` needs no client library of etcd. Daemons have a client of their own
(``xferd.metadata``), which benchmarks do not import. No login: this is for the etcd of a test bed.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from xferd.api.errors import InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CALL_TIMEOUT_S = 5.0
LEASE_ENDED = "requested lease not found"


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a key: its new value, or None where it has gone."""

    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The outcome of ``Etcd.claim``: whose value the key has now, and at which revision of etcd that was so."""

    is_ours: bool
    value: bytes
    revision: int


class Etcd:
    """Calls to one member. Methods may be called from any thread; each call has a connection of its own.

    Args:
        url: like ``http://host:2379``; https trusts the system's certificates.

    Raises:
        InvalidArgument: the URL is none.
        Unavailable: from every method, if etcd does not answer in time, or refuses; ``__cause__`` has the reason.
        NotFound: from those that take a lease, if that has ended.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname, parts.port or 2379
        except ValueError as exc:
            raise InvalidArgument(f"etcd at {url!r}: {exc}", remedy="give http://HOST:PORT") from exc
        if parts.scheme not in ("http", "https") or not self._host or parts.path.strip("/"):
            raise InvalidArgument(f"etcd at {url!r}", limit="http or https", remedy="give http://HOST:PORT")
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def grant(self, ttl_s: int) -> str:
        """Make a lease, which ends unless it is renewed in time; returns its id."""
        return str(self._call("lease/grant", {"TTL": ttl_s})["ID"])

    def renew(self, lease: str) -> bool:
        """Renew a lease; returns False where it has ended."""
        return int(self._call("lease/keepalive", {"ID": lease}).get("result", {}).get("TTL", 0)) > 0

    def revoke(self, lease: str) -> None:
        """End a lease, and all keys under it."""
        self._call("lease/revoke", {"ID": lease})

    def put(self, key: str, value: bytes, lease: str) -> None:
        """Write a key under a lease."""
        self._call("kv/put", {"key": encoded(key), "value": _base64(value), "lease": lease})

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        self._call("kv/deleterange", {"key": encoded(key)})

    def claim(self, key: str, value: bytes, lease: str) -> Claim:
        """Write a key under a lease unless it is there, and tell whose it is."""
        put = {"request_put": {"key": encoded(key), "value": _base64(value), "lease": lease}}
        absent = {"key": encoded(key), "result": "EQUAL", "target": "CREATE", "create_revision": "0"}
        otherwise = {"request_range": {"key": encoded(key)}}
        answer = self._call("kv/txn", {"compare": [absent], "success": [put], "failure": [otherwise]})
        revision = int(answer["header"]["revision"])
        if answer.get("succeeded"):
            return Claim(True, value, revision)
        [item] = answer["responses"][0]["response_range"]["kvs"]
        return Claim(False, base64.b64decode(item.get("value", "")), revision)

    def range(self, prefix: str) -> tuple[list[Change], int]:
        """Return the keys that begin with a prefix, and the revision at which that was so."""
        answer = self._call("kv/range", {"key": encoded(prefix), "range_end": end_of(prefix)})
        return [_change(item) for item in answer.get("kvs", [])], int(answer["header"]["revision"])

    def watch(self, prefix: str, revision: int) -> Watch:
        """Watch the keys that begin with a prefix, from a revision on, that one included; the caller closes it."""
        return Watch(self, prefix, revision)

    def connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        """Return a connection that is not open yet."""
        assert self._host is not None
        return self._make(self._host, self._port, timeout=timeout_s)

    def failed(self, why: object) -> Unavailable:
        """Return the error for etcd not answering."""
        return Unavailable(f"etcd at {self.url}: {why}", remedy="is it up, and reachable from here?")

    def _call(self, path: str, body: Mapping[str, object]) -> Any:  # JSON of etcd's
        connection = self.connection(CALL_TIMEOUT_S)
        try:
            connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            found = json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise self.failed(exc) from exc
        finally:
            connection.close()
        if answer.status != 200:
            why = str(found.get("message") or found)
            raise NotFound(f"etcd at {self.url}: {why}") if LEASE_ENDED in why else self.failed(why)
        return found


class Watch:
    """A stream of changes. One thread iterates; ``close`` may be called from another, and ends the iteration."""

    def __init__(self, etcd: Etcd, prefix: str, revision: int) -> None:
        self._etcd = etcd
        self._connection = etcd.connection(CALL_TIMEOUT_S)
        self._closed = threading.Event()
        wanted = {"key": encoded(prefix), "range_end": end_of(prefix), "start_revision": str(revision)}
        try:
            self._connection.request("POST", "/v3/watch", json.dumps({"create_request": wanted}))
            assert self._connection.sock is not None
            self._socket = self._connection.sock
            self._answer = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            raise etcd.failed(exc) from exc
        self._socket.settimeout(None)  # nothing may happen for long

    def __iter__(self) -> Iterator[Change]:
        """Yield changes in etcd's order until closed; raises Unavailable when etcd ends the stream."""
        while not self._closed.is_set():
            try:
                line = self._answer.readline()
            except (OSError, http.client.HTTPException, ValueError) as exc:
                if self._closed.is_set():
                    return
                raise self._etcd.failed(exc) from exc
            if self._closed.is_set():
                return
            yield from self._changes(line)

    def close(self) -> None:
        """End the stream. Twice is fine."""
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader, which closing alone would not
        except OSError:
            return  # it has ended already

    def release(self) -> None:
        """Close the connection, when nobody iterates any more."""
        self._answer.close()
        self._connection.close()

    def _changes(self, line: bytes) -> Iterator[Change]:
        if not line:
            raise self._etcd.failed("it ended the watch")
        told = json.loads(line)
        result = told.get("result", {})
        if "error" in told or result.get("canceled"):
            raise self._etcd.failed(told.get("error") or result.get("cancel_reason") or "it cancelled the watch")
        for event in result.get("events", []):
            yield _change(event["kv"], is_gone=event.get("type") == "DELETE")


def encoded(key: str) -> str:
    """Return a key as the gateway wants it."""
    return _base64(key.encode())


def end_of(prefix: str) -> str:
    """Return the end of the range of all keys that begin with a prefix of ASCII, as the gateway wants it."""
    return _base64(prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1]))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _change(item: Mapping[str, str], *, is_gone: bool = False) -> Change:
    key = base64.b64decode(item["key"]).decode()
    return Change(key, None if is_gone else base64.b64decode(item.get("value", "")))
