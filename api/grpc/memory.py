"""MemoryService: pools and regions, and the slow road to their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t, wire
from xferd.api.grpc._rpc import answers, caller_of, closing, reader_of
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from xferd.api.engine import Engine
    from xferd.api.grpc._rpc import Context


class MemoryServicer(pb_grpc.MemoryServiceServicer):
    """Adapter over ``Memory``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @answers
    async def Allocate(self, request: pb.AllocateRequest, context: Context) -> pb.RegionList:
        caller = caller_of(self._engine, context)
        return wire.listing_to_message(await self._engine.allocate(caller, wire.allocate_from_message(request)))

    @answers
    async def RegisterPrivate(self, request: pb.RegisterPrivateRequest, context: Context) -> pb.Region:
        caller = caller_of(self._engine, context)
        wanted = wire.register_private_from_message(request)
        return wire.region_to_message(await self._engine.register_private(caller, wanted))

    @answers
    async def RegisterFile(self, request: pb.RegisterFileRequest, context: Context) -> pb.Region:
        caller = caller_of(self._engine, context)
        wanted = wire.register_file_from_message(request)
        return wire.region_to_message(await self._engine.register_file(caller, wanted))

    @answers
    async def Free(self, request: pb.FreeRequest, context: Context) -> pb.FreeResponse:
        caller = reader_of(self._engine, context)  # an operator may free what outlived its session
        await self._engine.free(caller, [t.RegionId(region) for region in request.region])
        return pb.FreeResponse()

    @answers
    async def RegisterObject(self, request: pb.RegisterObjectRequest, context: Context) -> pb.Region:
        caller = caller_of(self._engine, context)
        wanted = wire.register_object_from_message(request)
        return wire.region_to_message(await self._engine.register_object(caller, wanted))

    @answers
    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        caller = reader_of(self._engine, context)
        items = [wire.query_item_from_message(item) for item in request.item]
        found = await self._engine.query(caller, items)
        return pb.QueryResponse(result=[wire.query_result_to_message(result) for result in found])

    @answers
    async def DeleteObjects(self, request: pb.DeleteObjectsRequest, context: Context) -> pb.DeleteObjectsResponse:
        caller = reader_of(self._engine, context)
        await self._engine.delete_objects(caller, request.store, tuple(request.key))
        return pb.DeleteObjectsResponse()

    @answers
    async def ListObjects(self, request: pb.ListObjectsRequest, context: Context) -> pb.ObjectPage:
        caller = reader_of(self._engine, context)
        page = await self._engine.list_objects(caller, wire.object_query_from_message(request))
        return wire.object_page_to_message(page)

    @answers
    async def RegisterDevice(self, request: pb.RegisterDeviceRequest, context: Context) -> pb.Region:
        caller = caller_of(self._engine, context)
        wanted = wire.register_device_from_message(request)
        return wire.region_to_message(await self._engine.register_device(caller, wanted))

    @answers
    async def ExportDevice(self, request: pb.ExportDeviceRequest, context: Context) -> pb.DeviceExport:
        caller = caller_of(self._engine, context)
        return wire.device_handle_to_message(await self._engine.export_device(caller, t.RegionId(request.region)))

    @answers
    async def ListDevices(self, request: pb.ListDevicesRequest, context: Context) -> pb.DeviceList:
        reader_of(self._engine, context)
        return pb.DeviceList(devices=[wire.device_to_message(info) for info in self._engine.devices()])

    @answers
    async def OpenDeviceEvent(self, request: pb.OpenDeviceEventRequest, context: Context) -> pb.DeviceEvent:
        caller = caller_of(self._engine, context)
        event = await self._engine.open_device_event(caller, request.device, request.handle)
        return wire.device_event_to_message(event)

    @answers
    async def HandOver(self, request: pb.HandOverRequest, context: Context) -> pb.RegionList:
        caller = reader_of(self._engine, context)  # an operator may give regions of any session
        return wire.listing_to_message(await self._engine.hand_over(caller, wire.hand_over_from_message(request)))

    @answers
    async def ListRegions(self, request: pb.ListRegionsRequest, context: Context) -> pb.RegionList:
        caller = caller_of(self._engine, context)
        return wire.listing_to_message(await self._engine.regions(caller, wire.region_query_from_message(request)))

    @answers
    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.PoolList:
        caller_of(self._engine, context)
        return pb.PoolList(pools=[wire.pool_to_message(pool) for pool in self._engine.pools()])

    # A coroutine that writes, where the stub expects a generator: a cancelled one cleans up at once.
    @answers
    async def Read(self, request: pb.ReadRegionRequest, context: Context) -> None:  # type: ignore[override]
        caller = caller_of(self._engine, context)
        stream = self._engine.read_region(caller, t.RegionId(request.region), request.offset, request.nbytes)
        async with closing(stream) as chunks:
            async for chunk in chunks:
                await context.write(pb.Bytes(data=chunk))

    @answers
    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteRegionRequest], context: Context
    ) -> pb.WriteRegionResponse:
        caller = caller_of(self._engine, context)
        nbytes = 0
        async for request in request_iterator:
            region = t.RegionId(request.region)
            nbytes += await self._engine.write_region(caller, region, request.offset, request.data)
        return pb.WriteRegionResponse(nbytes=nbytes)
