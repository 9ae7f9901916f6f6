"""What both clients are before they wait for anything: the grant, the token, what must be kept alive, the end."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

from xferd.api.errors import Closed, ProtocolViolation, Unauthenticated, Unavailable, Unsupported, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.clients._calls import bearer
from xferd.clients._device_regions import DeviceBook
from xferd.clients._errors import error_of
from xferd.clients.memory import STREAM_NBYTES, pool_view

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import grpc

    from xferd.api.types import RegionId, RegionInfo, SessionGrant
    from xferd.clients._calls import Call
    from xferd.clients.memory import ByteArray, RegionBase

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 60.0
END_NEWS_S = 1.0
CLOSE_LINGER_S = 10.0
"""Closing waits this long for the daemon to bring the session's transfers to rest; twice its own default."""


class ClientBase:
    """State of one attached client.

    Private arrays and memory of GPUs that are registered are kept alive here until they are freed or the session ends:
    the daemon writes into them.
    """

    def __init__(self, grant: SessionGrant, target: str, *, admin_token: str, call_timeout_s: float) -> None:
        self.grant = grant
        self.target = target
        self._auth = bearer(grant.token)
        self._admin_auth = bearer(admin_token or grant.token)
        self._call_timeout_s = call_timeout_s
        self._pools: dict[str, ByteArray | None] = {}
        self._kept: dict[RegionId, ByteArray] = {}
        self._devices = DeviceBook()
        self._doubtful: list[object] = []
        self._is_closed = False

    @property
    def agent(self) -> str:
        """This client's name on its node."""
        return self.grant.agent

    @property
    def address(self) -> str:
        """This client's name for agents of other nodes: "agent@node"."""
        return f"{self.grant.agent}@{self.grant.node}"

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"<{type(self).__name__} {self.address} session {self.grant.session}{state}>"

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True):
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Closed(f"the client of session {self.grant.session} is closed", remedy="connect again")

    def _metadata(self, call: Call[object]) -> tuple[tuple[str, str], ...]:
        return self._admin_auth if call.is_admin else self._auth

    def _timeout_s(self, call: Call[object]) -> float:
        return call.wait_s + self._call_timeout_s

    def _error(self, failure: grpc.RpcError) -> XferdError:
        """Return the typed error of a failed call."""
        if self._is_closed:
            return Closed(f"the client of session {self.grant.session} was closed during the call")
        return error_of(failure, self.target)

    def _doubt_s(self, error: XferdError, is_admin: bool) -> float | None:
        """Return how long to listen for the end of the session as the reason of an error; None: not at all.

        A session's token lives as long as the session, so that a refused one means that word of its end is coming.
        """
        if isinstance(error, Unauthenticated):
            return None if is_admin else END_NEWS_S
        return 0.0 if isinstance(error, Unavailable) else None

    @contextlib.contextmanager
    def _keeping(self, memory: object) -> Iterator[None]:
        """Keep memory for good if its registration ends without word: the daemon may know of it."""
        try:
            yield
        except BaseException as exc:
            if not isinstance(exc, XferdError) or exc.retryable:
                self._doubtful.append(memory)
            raise

    def _view(self, info: RegionInfo) -> ByteArray | None:
        """Return a region's bytes in a pool that is mapped already."""
        pool = self._pools.get(info.pool) if info.node == self.grant.node else None
        return None if pool is None else pool_view(info, pool, self.grant.agent)

    def _forget_regions(self, regions: Iterable[RegionBase], fate: str = "freed") -> None:
        for region in regions:
            self._kept.pop(region.id, None)
            region._forget(fate)


def opened(event: pb.SessionEvent) -> pb.SessionGrant:
    """Return the grant of a stream's first event."""
    if event.WhichOneof("event") != "opened":
        raise ProtocolViolation(f"the session's stream began with {event.WhichOneof('event')}", remedy="is it xferd?")
    return event.opened


def needs_socket() -> Unsupported:
    """Return the error for passing a file descriptor in a session that has no session socket."""
    return Unsupported(
        "this session came over gRPC alone and cannot pass file descriptors",
        remedy="connect over the session socket, or register the file by path",
    )


def no_answer(target: str, timeout_s: float) -> Unavailable:
    """Return the error for a target that did not take a connection in time."""
    return Unavailable(
        f"no daemon answers at {target}", limit=f"{timeout_s:g} s", remedy="start xferd, or check grpc.listen"
    )


def write_requests(region: RegionId, offset: int, data: ByteArray) -> Iterator[pb.WriteRegionRequest]:
    """Yield the messages of a streaming write."""
    for start in range(0, len(data), STREAM_NBYTES):
        piece = data[start : start + STREAM_NBYTES].tobytes()
        yield pb.WriteRegionRequest(region=region, offset=offset + start, data=piece)
