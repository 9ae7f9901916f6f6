"""The only module that knows the etcd client library and gRPC: verbs on one etcd member, and its errors as ours.

aetcd carries the generated messages and stubs of etcd's own API, and only those are used. Its ``Client`` knows one
endpoint, no TLS and no deadline per call, and its watcher ends when etcd restarts; what we need instead is in
``_etcd_client.py`` (several endpoints, deadlines) and ``_etcd_cache.py`` (watching).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from aetcd import rpc

from xferd.api.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    InvalidState,
    LimitExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProtocolViolation,
    Stale,
    Unauthenticated,
    Unavailable,
    Unsupported,
    XferdError,
)
from xferd.metadata._etcd_wire import Change, KeyValue, Snapshot, TxnResult, WatchBatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from xferd.metadata._etcd_wire import Endpoint, Guard

MAX_ANSWER_NBYTES = 160 << 20
"""A page of 500 records of the largest size fits; gRPC's own default of 4 MiB would not hold 10,000 small ones."""

_OPTIONS = (
    # A broken channel is thrown away and made anew by us, with our jitter: it must not share gRPC's backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_ANSWER_NBYTES),
    # Finds a member that is cut off or stopped while a watch waits. etcd hangs up on pings more often than each 5 s.
    # Of the two timeouts the second one counts (gRPC 1.85 waits 60 s without it, whatever the first one says).
    ("grpc.keepalive_time_ms", 7000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
)

_ERRORS: dict[object, type[XferdError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # the channel was closed under the call
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.INTERNAL: Unavailable,  # a killed etcd resets its streams with this
    grpc.StatusCode.UNKNOWN: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.OUT_OF_RANGE: Stale,  # the revision was compacted, or is one that etcd has not reached
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidState,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.DATA_LOSS: ProtocolViolation,
}

# etcd reports these as invalid arguments or failed preconditions (api/v3rpc/rpctypes/error.go).
_BY_TEXT: tuple[tuple[str, type[XferdError]], ...] = (
    ("authentication failed", Unauthenticated),
    ("invalid auth token", Unauthenticated),
    ("revision of auth store is old", Unauthenticated),
    ("user name is empty", Unauthenticated),
    ("request is too large", LimitExceeded),
)

_REMEDIES: dict[type[XferdError], str] = {
    Unavailable: "check that etcd runs and has a leader, and metadata.etcd.endpoints; this node tries again by itself",
    DeadlineExceeded: "check that etcd runs and has a leader; this node tries again by itself",
    Unauthenticated: "correct metadata.etcd.user and password_file, or the tls files",
    PermissionDenied: "grant the etcd user read and write on the prefix metadata.etcd.namespace",
    Overloaded: "etcd refuses writes: see its alarms (etcdctl alarm list) and the size of its database",
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The content of the files, None where there is none."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


class Connection:
    """A channel to one member. Every verb takes seconds and raises our errors, never gRPC's.

    Args:
        endpoint: of the member.
        tls: None speaks plain text.
    """

    def __init__(self, endpoint: Endpoint, tls: TlsFiles | None) -> None:
        self.endpoint = endpoint
        self.token = ""
        if tls is None:
            self._channel = grpc.aio.insecure_channel(str(endpoint), options=_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
            self._channel = grpc.aio.secure_channel(str(endpoint), credentials, options=_OPTIONS)
        self._kv = rpc.KVStub(self._channel)
        self._lease = rpc.LeaseStub(self._channel)
        self._keep_alive = self._channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=rpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc.LeaseKeepAliveResponse.FromString,
        )
        self._watch = rpc.WatchStub(self._channel)

    async def aclose(self) -> None:
        """Close the channel; calls on it end as ``Unavailable``. Twice is fine."""
        await self._channel.close()

    async def authenticate(self, user: str, password: str, timeout_s: float) -> None:
        """Log in; later calls carry the token."""
        request = rpc.AuthenticateRequest(name=user, password=password)
        try:
            answer = await self._ask(rpc.AuthStub(self._channel).Authenticate(request, timeout=timeout_s))
        except InvalidState as exc:  # etcd runs without authentication: then nobody needs a token
            if "not enabled" not in exc.message:
                raise
            return
        self.token = answer.token

    async def read(
        self, start: bytes, end: bytes, timeout_s: float, *, limit: int = 0, revision: int = 0, keys_only: bool = False
    ) -> Snapshot:
        """Return the keys from ``start`` up to, not including, ``end`` (b"": that key alone)."""
        request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only)
        answer = await self._ask(self._kv.Range(request, timeout=timeout_s, metadata=self._metadata()))
        items = tuple(_item(item) for item in answer.kvs)
        return Snapshot(answer.header.cluster_id, answer.header.revision, items, answer.more)

    async def write(
        self, guard: Guard, puts: Mapping[bytes, bytes], deletes: Sequence[bytes], lease: int, timeout_s: float
    ) -> TxnResult:
        """Do all puts, under the lease, and all deletes if the guard holds, else nothing."""
        compare = rpc.Compare(
            result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=guard.key, mod_revision=guard.mod_revision
        )
        operations = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease)) for key, value in puts.items()
        ]
        operations.extend(rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key)) for key in deletes)
        look = rpc.RequestOp(request_range=rpc.RangeRequest(key=guard.key))
        request = rpc.TxnRequest(compare=[compare], success=operations, failure=[look])
        answer = await self._ask(self._kv.Txn(request, timeout=timeout_s, metadata=self._metadata()))
        found = [] if answer.succeeded else answer.responses[0].response_range.kvs
        return TxnResult(answer.succeeded, answer.header.revision, _item(found[0]) if found else None)

    async def grant(self, ttl_s: int, timeout_s: float) -> tuple[int, int]:
        """Return a new lease and its TTL in seconds, which etcd may have made longer."""
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        answer = await self._ask(self._lease.LeaseGrant(request, timeout=timeout_s, metadata=self._metadata()))
        if answer.error or answer.ID == 0:
            raise Unavailable(f"etcd at {self.endpoint} granted no lease: {answer.error or 'no id'}")
        return answer.ID, answer.TTL

    async def keep_alive(self, lease: int, timeout_s: float) -> int:
        """Renew a lease and return its TTL in seconds; 0: the lease has ended.

        etcd offers this as a stream; called with one request and one answer it looks the same on the wire. gRPC's own
        streams cannot be used here: the first write to one that fails before it begins waits for ever (1.85).
        """
        request = rpc.LeaseKeepAliveRequest(ID=lease)
        answer = await self._ask(self._keep_alive(request, timeout=timeout_s, metadata=self._metadata()))
        return int(answer.TTL)

    async def time_to_live(self, lease: int, timeout_s: float) -> int:
        """Return the whole seconds that a lease has left, -1 where it has ended. Does not renew it."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease)
        answer = await self._ask(self._lease.LeaseTimeToLive(request, timeout=timeout_s, metadata=self._metadata()))
        return int(answer.TTL)

    async def revoke(self, lease: int, timeout_s: float) -> None:
        """End a lease, and with it all keys under it.

        Raises:
            NotFound: it has ended already.
        """
        request = rpc.LeaseRevokeRequest(ID=lease)
        await self._ask(self._lease.LeaseRevoke(request, timeout=timeout_s, metadata=self._metadata()))

    def watch(self) -> WatchStream:
        """Open a stream that many watches share. It ends when this member loses its leader."""
        return WatchStream(self, self._watch.Watch(metadata=(*self._metadata(), ("hasleader", "true"))))

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self.token),) if self.token else ()

    async def _ask(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as exc:
            raise self._translate(exc) from exc
        except asyncio.InvalidStateError as exc:  # a write to a stream that has ended
            raise Unavailable(f"etcd at {self.endpoint} ended the stream", remedy=_REMEDIES[Unavailable]) from exc
        except asyncio.CancelledError as exc:
            # gRPC cancels the calls of a channel that is closed; that is no cancellation of ours.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"the connection to etcd at {self.endpoint} was closed") from exc

    def _translate(self, exc: grpc.aio.AioRpcError) -> XferdError:
        text = exc.details() or exc.code().name
        kind = next((kind for part, kind in _BY_TEXT if part in text), None)
        if kind is None:
            kind = _ERRORS.get(exc.code(), InternalError)
        return kind(f"etcd at {self.endpoint}: {text}", remedy=_REMEDIES.get(kind, ""))


class WatchStream:
    """Watches on one member, told apart by ids of the caller's choice, never used twice on one stream.

    Somebody must be in ``read`` at all times: where the stream fails, only that returns; ``add`` may wait for ever.
    """

    def __init__(self, connection: Connection, call: Any) -> None:
        self._connection = connection
        self._call = call

    async def add(self, watch_id: int, start: bytes, end: bytes, revision: int) -> None:
        """Begin to watch a range from a revision on, that one included."""
        request = rpc.WatchCreateRequest(
            key=start, range_end=end, start_revision=revision, watch_id=watch_id, progress_notify=True, fragment=True
        )
        await self._connection._ask(self._call.write(rpc.WatchRequest(create_request=request)))

    async def remove(self, watch_id: int) -> None:
        """Stop a watch; what etcd has sent already may still come."""
        request = rpc.WatchCancelRequest(watch_id=watch_id)
        await self._connection._ask(self._call.write(rpc.WatchRequest(cancel_request=request)))

    async def read(self) -> WatchBatch:
        """Wait for what etcd says next.

        Raises:
            Unavailable: the stream ended, for whatever reason.
        """
        answer = await self._connection._ask(self._call.read())
        if answer is grpc.aio.EOF:
            raise Unavailable(f"etcd at {self._connection.endpoint} ended the watch")
        changes = tuple(
            Change(
                event.kv.key,
                None if event.type == rpc.Event.DELETE else event.kv.value,
                event.kv.mod_revision,
                event.kv.lease,
            )
            for event in answer.events
        )
        cancelled = (answer.cancel_reason or "without a reason") if answer.canceled else ""
        return WatchBatch(answer.watch_id, answer.header.revision, changes, cancelled, answer.compact_revision)

    def close(self) -> None:
        """End the stream. Twice is fine."""
        self._call.cancel()


def _item(item: Any) -> KeyValue:
    return KeyValue(item.key, item.value, item.mod_revision, item.lease)
