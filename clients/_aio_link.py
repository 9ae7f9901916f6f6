"""How the async client is attached: connecting, calling, mapping, closing. What it offers is in ``aio.py``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import grpc

from xferd.api import types as t, wire
from xferd.api.errors import DeadlineExceeded, ShortTransfer, Unavailable, Unsupported, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.timeouts import timeout
from xferd.clients import _calls as calls
from xferd.clients._aio_ring import AsyncRing
from xferd.clients._aio_session_socket import AsyncSessionSocket
from xferd.clients._base import (
    CALL_TIMEOUT_S,
    CLOSE_LINGER_S,
    CONNECT_TIMEOUT_S,
    END_NEWS_S,
    ClientBase,
    needs_socket,
    no_answer,
    opened,
    write_requests,
)
from xferd.clients._calls import Call, Methods, bearer, channel_options, wait_slices
from xferd.clients._device_regions import check_exportable
from xferd.clients._errors import error_of
from xferd.clients._ring_base import RingChoice, granted, needs_poll, refused, ring_request
from xferd.clients._session_socket import close_all, ended, find_place, hello, map_pool, mapped_pool, open_socket
from xferd.clients.memory import ByteArray, is_mappable
from xferd.clients.transfers import are_over, id_of, ids_of, tell

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
    from pathlib import Path

    from xferd.api.proto.session_v1_pb2 import SessionSocketRequest
    from xferd.clients._ring_tracks import Track
    from xferd.clients.devices import DeviceArray, ElementShape
    from xferd.clients.memory import RegionBase
    from xferd.clients.transfers import TransferBase, TransferLike

R = TypeVar("R")
C = TypeVar("C", bound="AsyncLink")


class AsyncLink(ClientBase):
    """A session with its channel, the socket or the stream that keeps it, and the ring. Owns all of them."""

    def __init__(
        self,
        grant: t.SessionGrant,
        channel: grpc.aio.Channel,
        target: str,
        *,
        socket: AsyncSessionSocket | None = None,
        stream: Any = None,  # grpcio has no types
        ring: AsyncRing | None = None,
        admin_token: str = "",
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        """Take over a session: its channel, the socket or the stream that keeps it, and its ring."""
        super().__init__(grant, target, admin_token=admin_token, call_timeout_s=call_timeout_s)
        self._channel = channel
        self._methods = Methods(channel)
        self._socket = socket
        self._session_stream = stream
        self._ring = ring
        self._map_lock = asyncio.Lock()

    @classmethod
    def connect(
        cls,
        path: str | Path | None = None,
        agent: str = "",
        *,
        ring: RingChoice = None,
        admin_token: str = "",
        timeout_s: float = CONNECT_TIMEOUT_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> Connecting[Self]:
        """Attach over the session socket: ``await`` it, or enter it with ``async with``.

        Args:
            path: of the socket; None takes $XFERD_SOCKET, else that of the default run directory.
            agent: this client's name on the node; "" lets the daemon choose.
            ring: whether prepared transfers go over a ring in shared memory. None: where that can be. True, or the
                sizes of one: it has to be. False: all goes by gRPC.
            admin_token: for ``admin``, where the daemon has one.
            timeout_s: for connecting.
            call_timeout_s: for each call, beyond what it waits for on purpose.

        Raises:
            Unavailable: no daemon answers there.
            AlreadyExists: the agent has a live session.
            PermissionDenied: this user may not attach.
            Unsupported: ``ring`` asks for one, and there is none.
        """

        async def attach() -> Self:
            # A Unix socket connects at once or, when the daemon's backlog is full, not at all.
            socket = AsyncSessionSocket(open_socket(find_place(path), 0.0), timeout_s)
            opened_ring = None
            try:
                reply, fds = await socket.exchange(hello(agent))
                close_all(fds)
                grant = wire.grant_from_message(reply.grant)
                opened_ring = await _open_ring(socket, grant, ring)
                options = channel_options(grant.limits.max_message_nbytes)
                channel = grpc.aio.insecure_channel(grant.grpc_target, options=options)
            except BaseException:
                if opened_ring is not None:
                    opened_ring.close()
                socket.abort()
                raise
            socket.timeout_s = call_timeout_s
            return cls(
                grant,
                channel,
                grant.grpc_target,
                socket=socket,
                ring=opened_ring,
                admin_token=admin_token,
                call_timeout_s=call_timeout_s,
            )

        return Connecting(attach)

    @classmethod
    def connect_grpc(
        cls,
        target: str,
        agent: str = "",
        *,
        token: str = "",
        admin_token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> Connecting[Self]:
        """Attach over gRPC alone, for example from another host: no mapping, no private memory, no passed fds.

        Args:
            target: of gRPC, "host:port" or "unix:/path".
            agent: as in ``connect``.
            token: of the daemon, which it asks for over TCP.
            admin_token: as in ``connect``.
            credentials: for TLS.
            timeout_s: for connecting.
            call_timeout_s: as in ``connect``.
        """

        async def attach() -> Self:
            options = channel_options()
            channel = (
                grpc.aio.secure_channel(target, credentials, options=options)
                if credentials
                else grpc.aio.insecure_channel(target, options=options)
            )
            try:
                async with timeout(timeout_s):
                    await channel.channel_ready()
                    request = pb.OpenSessionRequest(agent=agent)
                    stream = Methods(channel)["SessionService.Open"](request, metadata=bearer(token))
                    grant = wire.grant_from_message(opened(await stream.read()))
            except TimeoutError as exc:
                await channel.close()
                raise no_answer(target, timeout_s) from exc
            except grpc.RpcError as exc:
                await channel.close()
                raise error_of(exc, target) from exc
            except BaseException:
                await channel.close()
                raise
            return cls(
                grant, channel, target, stream=stream, admin_token=admin_token or token, call_timeout_s=call_timeout_s
            )

        return Connecting(attach)

    async def aclose(self) -> None:
        """End the session; returns when the daemon has released all it held, or after 10 s. Twice is fine."""
        if self._is_closed:
            return
        try:
            if self._session_stream is not None:
                await self._close_stream()
        finally:
            self._is_closed = True
            if self._ring is not None:
                self._ring.close()
            self._pools.clear()
            self._kept.clear()
            self._devices.clear()
            try:
                await self._channel.close()
            finally:
                if self._socket is not None:
                    await self._socket.close(CLOSE_LINGER_S)

    @property
    def uses_ring(self) -> bool:
        """Whether prepared transfers go over a ring now; one that the daemon has closed is not used any more."""
        return self._ring is not None and self._ring.is_usable

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- calling

    async def _call(self, call: Call[R], /) -> R:
        self._check_open()
        try:
            reply = await self._methods[call.method](
                call.request, metadata=self._metadata(call), timeout=self._timeout_s(call)
            )
        except grpc.RpcError as exc:
            raise await self._explained(exc, call.is_admin) from exc
        except asyncio.CancelledError:
            self._check_ours()
            raise
        return call.parse(reply)

    async def _wait(
        self, transfers: Sequence[TransferLike], timeout_s: float | None, *, any_of: bool
    ) -> list[t.TransferStatus]:
        """Wait for transfers, tell their objects and return their statuses: over the ring if it tells all ends."""
        ring = self._ring
        tracks = None if ring is None else ring.tracks_to_wait(transfers)
        if ring is not None and tracks:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            if await ring.wait(tracks, timeout_s, any_of=any_of):
                return [await self._whole(track) for track in tracks]
            timeout_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        statuses = await self._wait_by_call(ids_of(transfers), timeout_s, any_of=any_of)
        tell(transfers, statuses)
        return statuses

    async def _whole(self, track: Track) -> t.TransferStatus:
        """Return what the ring has told of a transfer, with what it had no room for."""
        if needs_poll(track):
            [track.status] = await self._call(calls.poll([track.id]))
        return track.status

    async def _wait_by_call(
        self, ids: Sequence[t.TransferId], timeout_s: float | None, *, any_of: bool
    ) -> list[t.TransferStatus]:
        statuses: list[t.TransferStatus] = []
        for wait_s in wait_slices(timeout_s):
            statuses = await self._call(calls.wait(ids, wait_s, any_of=any_of))
            if are_over(statuses, any_of=any_of):
                break
        return statuses

    async def _glance_at(self, transfer: TransferLike) -> t.TransferStatus | None:
        """Return the status of a transfer whose end stands in the ring, or has been told by it."""
        if self._ring is None or self._is_closed:
            return None
        tracks = self._ring.tracks_to_wait((transfer,))
        if not tracks:
            return None
        self._ring.glance()
        return await self._whole(tracks[0]) if tracks[0].has_ended else None

    async def _post_by_call(self, transfer: TransferBase, wait_s: float) -> t.TransferStatus:
        """Post by gRPC; if the ring was lost on the way, find out first whether the daemon has taken the post."""
        is_doubtful = transfer._track is not None and not self.uses_ring
        posts = transfer.telemetry.posts
        transfer._untrack()
        if is_doubtful:
            [transfer.status] = await self._call(calls.poll([transfer.id]))
            if transfer.telemetry.posts > posts:
                [status] = await self._wait([transfer], wait_s, any_of=False)
                return status
        transfer.status = await self._call(calls.post(transfer.id, wait_s))
        return transfer.status

    async def _cancel(self, transfers: Sequence[TransferLike]) -> list[t.TransferStatus]:
        """Cancel, tell the objects and return the statuses."""
        ring = self._ring
        tracks = None if ring is None or not ring.is_usable else ring.tracks_to_cancel(transfers)
        if ring is not None and tracks and await ring.cancel(tracks):
            statuses = [await self._whole(track) for track in tracks]
        else:
            statuses = await self._call(calls.cancel(ids_of(transfers)))
        tell(transfers, statuses)
        return statuses

    async def _release(self, transfers: Iterable[TransferLike]) -> None:
        wanted = list(transfers)
        await self._call(calls.release(id_of(transfer) for transfer in wanted))
        if self._ring is not None:
            self._ring.forget_transfers(wanted)

    async def _notifications(self, timeout_s: float, limit: int) -> list[t.Notification]:
        """Take notifications by the ring, once all that had come before it listened are taken."""
        ring = self._ring
        assert ring is not None
        deadline = time.monotonic() + timeout_s
        wanted = limit or 100  # as the daemon reads it
        if not ring.is_listening and ring.is_usable:
            taken = await self._call(calls.notifications(limit, 0.0))
            if taken:
                return taken
            await ring.listen()
        while wanted > 0:
            self._check_open()
            taken, cut = await ring.notifications(max(deadline - time.monotonic(), 0.0), wanted)
            if cut is not None:
                taken = await self._call(calls.notifications(1, 0.0))
                ring.forget_cut(cut)
            if taken:
                return taken
            if not ring.is_usable:
                break
            if time.monotonic() >= deadline:
                return []
        return await self._notifications_by_call(max(deadline - time.monotonic(), 0.0), limit)

    async def _notifications_by_call(self, timeout_s: float, limit: int) -> list[t.Notification]:
        for wait_s in wait_slices(timeout_s):
            taken = await self._call(calls.notifications(limit, wait_s))
            if taken:
                return taken
        return []

    async def _stream(self, method: str, request: object) -> AsyncGenerator[Any, None]:
        """Yield the messages of a stream, which ends with the generator."""
        self._check_open()
        stream = self._methods[method](request, metadata=self._auth)
        try:
            async for message in stream:
                yield message
        except grpc.RpcError as exc:
            raise await self._explained(exc) from exc
        except asyncio.CancelledError:
            self._check_ours()
            raise
        finally:
            stream.cancel()

    async def _read_stream(self, region: t.RegionId, offset: int, nbytes: int) -> bytes:
        request = pb.ReadRegionRequest(region=region, offset=offset, nbytes=nbytes)
        pieces: list[bytes] = []
        if nbytes:
            async with contextlib.aclosing(self._stream("MemoryService.Read", request)) as messages:
                pieces = [message.data async for message in messages]
        data = b"".join(pieces)
        if len(data) != nbytes:
            raise ShortTransfer(f"region {region} gave {len(data)} bytes", limit=f"{nbytes} bytes asked for")
        return data

    async def _write_stream(self, region: t.RegionId, offset: int, data: ByteArray) -> int:
        self._check_open()
        try:
            requests = write_requests(region, offset, data)
            reply = await self._methods["MemoryService.Write"](requests, metadata=self._auth)
        except grpc.RpcError as exc:
            raise await self._explained(exc) from exc
        except asyncio.CancelledError:
            self._check_ours()
            raise
        return int(reply.nbytes)

    def _check_ours(self) -> None:
        """Tell a closed channel, which cancels its calls, from a cancelled task: raise ``Closed`` for the former."""
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            self._check_open()

    # -- the session socket

    async def _pass_fd(self, request: SessionSocketRequest, fd: int) -> t.RegionInfo:
        self._check_open()
        if self._socket is None:
            raise needs_socket()
        reply, fds = await self._socket.exchange(request, fd)
        close_all(fds)
        return wire.region_from_message(reply.region)

    async def _map(self, info: t.RegionInfo) -> None:
        """Map a region's pool if that is possible and has not been done."""
        if self._socket is None or not is_mappable(info, self.grant.node) or info.pool in self._pools:
            return
        async with self._map_lock:
            if info.pool not in self._pools:
                try:
                    self._pools[info.pool] = mapped_pool(*await self._socket.exchange(map_pool(info.pool)))
                except Unsupported:
                    self._pools[info.pool] = None

    async def _device_array(self, region: RegionBase, elements: ElementShape) -> DeviceArray:
        """Return a region of GPU memory as an array; where it lies is asked once."""
        self._check_open()
        own = self._devices.own_array(region.id, elements)
        if own is not None:
            return own
        check_exportable(region.info, self.grant.node)
        if region._handle is None:
            region._handle = await self._call(calls.export_device(region.id))
        # In a thread, because the first mapping of a process may have to make a context, which takes long.
        return await asyncio.to_thread(self._devices.array, region.info, region._handle, elements, self.agent)

    async def _free(self, regions: Sequence[RegionBase]) -> None:
        """Give regions back, all or none; memory of GPUs that is registered more often is only counted."""
        with self._devices.freeing([region.id for region in regions]) as last:
            if last or not regions:
                await self._call(calls.free(last))
        self._forget_regions(regions)

    # -- the end

    async def _explained(self, failure: grpc.RpcError, is_admin: bool = False) -> XferdError:
        """Return what to raise: why the session ended says more than that its token is dead."""
        error = self._error(failure)
        wait_s = self._doubt_s(error, is_admin)
        reason = "" if wait_s is None else await self._end_reason(wait_s)
        return ended(reason) if reason else error

    async def _end_reason(self, wait_s: float) -> str:
        if self._socket is not None:
            return await self._socket.end_reason(wait_s)
        if not wait_s and not self._session_stream.done():
            return ""  # a read that is given up ends the stream, and with it the session if that still lives
        try:
            async with timeout(END_NEWS_S):
                event = await self._session_stream.read()
        except TimeoutError:
            return ""
        except grpc.RpcError as exc:
            return error_of(exc, self.target).message
        return event.closing if isinstance(event, pb.SessionEvent) and event.closing else "its stream ended"

    async def _close_stream(self) -> None:
        """Ask for the end, which answers when all is released, and let the stream go."""
        try:
            await self._methods["SessionService.Close"](
                pb.CloseSessionRequest(), metadata=self._auth, timeout=CLOSE_LINGER_S
            )
        except grpc.RpcError:
            pass  # the daemon has gone, or has ended the session: what was wanted
        finally:
            self._session_stream.cancel()


class Connecting(Generic[C]):
    """A client about to be attached: ``await`` it, or enter it, which closes the client in the end."""

    def __init__(self, attach: Callable[[], Coroutine[Any, Any, C]]) -> None:
        self._attach = attach
        self._client: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._attach().__await__()

    async def __aenter__(self) -> C:
        self._client = await self._attach()
        return self._client

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()


async def _open_ring(socket: AsyncSessionSocket, grant: t.SessionGrant, choice: RingChoice) -> AsyncRing | None:
    request = ring_request(choice)
    if request is None:
        return None
    try:
        return AsyncRing(granted(*await socket.exchange(request), grant), socket)
    except (Unavailable, DeadlineExceeded):
        raise  # not of the ring
    except XferdError as exc:
        error = refused(choice, exc)
        if error is not None:
            raise error from exc
        return None
