"""TransferService and NotificationService: lists, transfers, and word of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t, wire
from xferd.api.descriptors import PreparedRef
from xferd.api.errors import InvalidDescriptor
from xferd.api.grpc._rpc import answers, caller_of, closing
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xferd.api.engine import Engine
    from xferd.api.grpc._rpc import Context

DEFAULT_RECEIVE = 100
"""Notifications in one answer where the client names no number, as the proto file says."""


class TransferServicer(pb_grpc.TransferServiceServicer):
    """Adapter over ``Transfers``; ``max_descriptors`` limits one list of one request."""

    def __init__(self, engine: Engine, max_descriptors: int) -> None:
        self._engine = engine
        self._max_descriptors = max_descriptors

    @answers
    async def Prepare(self, request: pb.PrepareRequest, context: Context) -> pb.PreparedList:
        caller = caller_of(self._engine, context)
        descriptors = wire.list_from_message(request.list, self._max_descriptors)
        if isinstance(descriptors, PreparedRef):
            raise InvalidDescriptor(
                f"prepared list {descriptors.handle} cannot be prepared again",
                limit="columns or strided",
                remedy="use its handle with an index",
            )
        return wire.prepared_to_message(await self._engine.prepare(caller, descriptors))

    @answers
    async def ReleasePrepared(self, request: pb.ReleasePreparedRequest, context: Context) -> pb.ReleasePreparedResponse:
        caller = caller_of(self._engine, context)
        await self._engine.release_prepared(caller, [t.PreparedHandle(handle) for handle in request.handle])
        return pb.ReleasePreparedResponse()

    @answers
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.TransferStatus:
        caller = caller_of(self._engine, context)
        wait_s = wire.check_seconds("wait_s", request.wait_s)
        wanted = wire.transfer_request_from_message(request, self._max_descriptors)
        status = await self._engine.submit(caller, wanted)
        return wire.status_to_message(await self._settled(caller, status, wait_s))

    @answers
    async def Post(self, request: pb.PostRequest, context: Context) -> pb.TransferStatus:
        caller = caller_of(self._engine, context)
        wait_s = wire.check_seconds("wait_s", request.wait_s)
        status = await self._engine.post(caller, t.TransferId(request.id))
        return wire.status_to_message(await self._settled(caller, status, wait_s))

    @answers
    async def Poll(self, request: pb.PollRequest, context: Context) -> pb.TransferStatusList:
        caller = caller_of(self._engine, context)
        return wire.statuses_to_message(self._engine.poll(caller, _ids(request.id)))

    @answers
    async def Wait(self, request: pb.WaitRequest, context: Context) -> pb.TransferStatusList:
        caller = caller_of(self._engine, context)
        timeout_s = wire.check_seconds("timeout_s", request.timeout_s)
        statuses = await self._engine.wait(caller, _ids(request.id), timeout_s, any_of=request.any)
        return wire.statuses_to_message(statuses)

    # A coroutine that writes, where the stub expects a generator: a cancelled one cleans up at once.
    @answers
    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:  # type: ignore[override]
        caller = caller_of(self._engine, context)
        async with closing(self._engine.watch(caller, _ids(request.id))) as statuses:
            async for status in statuses:
                await context.write(wire.status_to_message(status))

    @answers
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.TransferStatusList:
        caller = caller_of(self._engine, context)
        return wire.statuses_to_message(await self._engine.cancel(caller, _ids(request.id)))

    @answers
    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        caller = caller_of(self._engine, context)
        await self._engine.release(caller, _ids(request.id))
        return pb.ReleaseResponse()

    @answers
    async def Estimate(self, request: pb.SubmitRequest, context: Context) -> pb.EstimateResponse:
        caller = caller_of(self._engine, context)
        wanted = wire.transfer_request_from_message(request, self._max_descriptors)
        return wire.estimate_to_message(await self._engine.estimate(caller, wanted))

    @answers
    async def Explain(self, request: pb.SubmitRequest, context: Context) -> pb.ExplainResponse:
        caller = caller_of(self._engine, context)
        wanted = wire.transfer_request_from_message(request, self._max_descriptors)
        return wire.explanation_to_message(await self._engine.explain(caller, wanted))

    async def _settled(self, caller: t.Caller, status: t.TransferStatus, wait_s: float) -> t.TransferStatus:
        if not wait_s or status.state in t.ENDED or status.state is t.TransferState.PREPARED:
            return status  # one that is held would only be waited for in vain
        return (await self._engine.wait(caller, [status.id], wait_s))[0]


class NotificationServicer(pb_grpc.NotificationServiceServicer):
    """Adapter over the notifications of ``Transfers``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @answers
    async def Send(self, request: pb.Notification, context: Context) -> pb.SendNotificationResponse:
        caller = caller_of(self._engine, context)
        await self._engine.notify(caller, wire.notification_asked_for(request))
        return pb.SendNotificationResponse()

    @answers
    async def Receive(self, request: pb.ReceiveRequest, context: Context) -> pb.NotificationList:
        caller = caller_of(self._engine, context)
        timeout_s = wire.check_seconds("timeout_s", request.timeout_s)
        taken = await self._engine.notifications(caller, request.max or DEFAULT_RECEIVE, timeout_s)
        return pb.NotificationList(notifications=[wire.notification_to_message(item) for item in taken])


def _ids(ids: Iterable[str]) -> list[t.TransferId]:
    return [t.TransferId(item) for item in ids]
