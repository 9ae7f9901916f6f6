"""The operator's verbs: as ``admin`` of a client, and on their own without a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import grpc

from xferd.api import types as t
from xferd.clients import _admin_calls as calls
from xferd.clients._admin_calls import DrainResult
from xferd.clients._calls import Methods, bearer, channel_options, hand_over
from xferd.clients._errors import error_of
from xferd.clients._session_socket import find_place

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from xferd.clients._calls import Call

__all__ = ["Admin", "AdminConnection", "AsyncAdmin", "DrainResult"]

R = TypeVar("R")


class Caller(Protocol):
    """Makes a call and returns what its reply says."""

    def __call__(self, call: Call[R], /) -> R:
        """Make it."""


class AsyncCaller(Protocol):
    """Makes a call and returns what its reply says."""

    def __call__(self, call: Call[R], /) -> Awaitable[R]:
        """Make it."""


class Admin:
    """What an operator sees and does. Where the daemon has an admin token, the client must have been given it."""

    def __init__(self, call: Caller) -> None:
        self._call = call

    def status(self) -> t.NodeStatus:
        """Return health and counters."""
        return self._call(calls.status())

    def config(self) -> str:
        """Return the configuration in force as TOML, secrets replaced."""
        return self._call(calls.config())

    def pools(self) -> list[t.PoolInfo]:
        """Return pools with their statistics."""
        return self._call(calls.pools())

    def devices(self) -> list[t.DeviceInfo]:
        """Return the GPUs, those that cannot be used among them."""
        return self._call(calls.devices())

    def sessions(self) -> list[t.SessionInfo]:
        """Return live sessions."""
        return self._call(calls.sessions())

    def backends(self) -> list[t.BackendInfo]:
        """Return the backends with what they moved."""
        return self._call(calls.backends())

    def storage(self) -> list[t.StorageInfo]:
        """Return the storage pools: their directories, how much is proven, what the scrubber found."""
        return self._call(calls.storage())

    def scrub_storage(self, pool: str, *, timeout_s: float = 3600.0) -> t.StorageInfo:
        """Read all sealed blocks of a storage pool now, at its rate; returns when that is done."""
        return self._call(calls.scrub_storage(pool, timeout_s))

    def free(self, regions: Iterable[t.RegionId]) -> None:
        """Free persistent regions whose agent has no session."""
        self._call(calls.free(regions))

    def routes(self) -> list[t.RouteCost]:
        """Return what the planner has learned of routes, and which ones failed lately."""
        return self._call(calls.routes())

    def transfers(self, *, active_only: bool = False, agent: str = "") -> list[t.TransferStatus]:
        """Return transfers of all sessions."""
        return self._call(calls.transfers(active_only, agent))

    def holds(self) -> list[t.HoldInfo]:
        """Return everything held: by whom, why, until when."""
        return self._call(calls.holds())

    def diagnose(self) -> list[t.Check]:
        """Look at the daemon's surroundings: what is wrong, and what to do. May take seconds."""
        return self._call(calls.diagnose())

    def hand_over(
        self, regions: Iterable[t.RegionId], to: str, payload: bytes = b"", *, access: t.Access | None = None
    ) -> t.RegionListing:
        """Give regions of any session to another agent; their owner is not asked."""
        request = t.HandOverRequest(tuple(regions), to, bytes(payload), access)
        return self._call(hand_over(request, is_admin=True))

    def end_session(self, session: t.SessionId) -> None:
        """End a session; returns when all it held is released."""
        self._call(calls.end_session(session))

    def drain(self, timeout_s: float = 10.0, *, undo: bool = False) -> DrainResult:
        """Refuse new work and wait for what runs; ``undo`` takes new work again."""
        return self._call(calls.drain(timeout_s, undo))

    def set_log_level(self, level: str) -> str:
        """Set the daemon's log level; returns the previous one."""
        return self._call(calls.set_log_level(level))


class AsyncAdmin:
    """As ``Admin``, awaited."""

    def __init__(self, call: AsyncCaller) -> None:
        self._call = call

    async def status(self) -> t.NodeStatus:
        """Return health and counters."""
        return await self._call(calls.status())

    async def config(self) -> str:
        """Return the configuration in force as TOML, secrets replaced."""
        return await self._call(calls.config())

    async def pools(self) -> list[t.PoolInfo]:
        """Return pools with their statistics."""
        return await self._call(calls.pools())

    async def devices(self) -> list[t.DeviceInfo]:
        """Return the GPUs, those that cannot be used among them."""
        return await self._call(calls.devices())

    async def sessions(self) -> list[t.SessionInfo]:
        """Return live sessions."""
        return await self._call(calls.sessions())

    async def backends(self) -> list[t.BackendInfo]:
        """Return the backends with what they moved."""
        return await self._call(calls.backends())

    async def storage(self) -> list[t.StorageInfo]:
        """Return the storage pools: their directories, how much is proven, what the scrubber found."""
        return await self._call(calls.storage())

    async def scrub_storage(self, pool: str, *, timeout_s: float = 3600.0) -> t.StorageInfo:
        """Read all sealed blocks of a storage pool now, at its rate; returns when that is done."""
        return await self._call(calls.scrub_storage(pool, timeout_s))

    async def free(self, regions: Iterable[t.RegionId]) -> None:
        """Free persistent regions whose agent has no session."""
        await self._call(calls.free(regions))

    async def routes(self) -> list[t.RouteCost]:
        """Return what the planner has learned of routes, and which ones failed lately."""
        return await self._call(calls.routes())

    async def transfers(self, *, active_only: bool = False, agent: str = "") -> list[t.TransferStatus]:
        """Return transfers of all sessions."""
        return await self._call(calls.transfers(active_only, agent))

    async def holds(self) -> list[t.HoldInfo]:
        """Return everything held: by whom, why, until when."""
        return await self._call(calls.holds())

    async def diagnose(self) -> list[t.Check]:
        """Look at the daemon's surroundings: what is wrong, and what to do. May take seconds."""
        return await self._call(calls.diagnose())

    async def hand_over(
        self, regions: Iterable[t.RegionId], to: str, payload: bytes = b"", *, access: t.Access | None = None
    ) -> t.RegionListing:
        """Give regions of any session to another agent; their owner is not asked."""
        request = t.HandOverRequest(tuple(regions), to, bytes(payload), access)
        return await self._call(hand_over(request, is_admin=True))

    async def end_session(self, session: t.SessionId) -> None:
        """End a session; returns when all it held is released."""
        await self._call(calls.end_session(session))

    async def drain(self, timeout_s: float = 10.0, *, undo: bool = False) -> DrainResult:
        """Refuse new work and wait for what runs; ``undo`` takes new work again."""
        return await self._call(calls.drain(timeout_s, undo))

    async def set_log_level(self, level: str) -> str:
        """Set the daemon's log level; returns the previous one."""
        return await self._call(calls.set_log_level(level))


class AdminConnection(Admin):
    """The operator's verbs without a session of one's own. A context manager.

    Args:
        target: of gRPC; "" is the socket beside the session socket that ``Client.connect`` would use.
        token: admin token, where the daemon has one.
        timeout_s: of one call, beyond what the call waits for on purpose.
    """

    def __init__(self, target: str = "", *, token: str = "", timeout_s: float = 30.0) -> None:
        self.target = target or f"unix:{find_place(None).path.with_name('grpc.sock')}"
        self._channel = grpc.insecure_channel(self.target, options=channel_options())
        self._methods = Methods(self._channel)
        self._auth = bearer(token)
        self._timeout_s = timeout_s
        super().__init__(self._perform)

    def close(self) -> None:
        """Close the connection. Twice is fine."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _perform(self, call: Call[R], /) -> R:
        try:
            reply = self._methods[call.method](call.request, metadata=self._auth, timeout=call.wait_s + self._timeout_s)
        except grpc.RpcError as exc:
            raise error_of(exc, self.target) from exc
        return call.parse(reply)
