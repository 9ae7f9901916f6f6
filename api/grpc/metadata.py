"""MetadataService: this node's record, the others', and blobs of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t, wire
from xferd.api.grpc._rpc import answers, caller_of, closing, reader_of
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from xferd.api.engine import Engine
    from xferd.api.grpc._rpc import Context


class MetadataServicer(pb_grpc.MetadataServiceServicer):
    """Adapter over ``Metadata``. The engine asks for no caller here; the face still wants a live session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @answers
    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.Node:
        reader_of(self._engine, context)
        return wire.node_to_message(await self._engine.node(request.name))

    @answers
    async def ListPeers(self, request: pb.ListPeersRequest, context: Context) -> pb.PeerList:
        reader_of(self._engine, context)
        return pb.PeerList(peers=[wire.peer_to_message(peer) for peer in self._engine.peers()])

    @answers
    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.NodeList:
        reader_of(self._engine, context)
        return pb.NodeList(nodes=[wire.node_to_message(node) for node in await self._engine.nodes()])

    # A coroutine that writes, where the stub expects a generator: a cancelled one cleans up at once.
    @answers
    async def WatchPeers(self, request: pb.WatchPeersRequest, context: Context) -> None:  # type: ignore[override]
        reader_of(self._engine, context)
        async with closing(self._engine.watch_peers(request.name)) as peers:
            async for peer in peers:
                await context.write(wire.peer_to_message(peer))

    @answers
    async def Export(self, request: pb.ExportRequest, context: Context) -> pb.MetadataBlob:
        caller_of(self._engine, context)
        regions = [t.RegionId(region) for region in request.region] if request.partial else None
        return pb.MetadataBlob(data=await self._engine.export_metadata(regions))

    @answers
    async def Import(self, request: pb.MetadataBlob, context: Context) -> pb.ImportResponse:
        caller_of(self._engine, context)
        listing = await self._engine.import_metadata(request.data)
        node = await self._engine.node(listing.node)
        return pb.ImportResponse(node=wire.node_to_message(node), regions=len(listing.regions))

    @answers
    async def Invalidate(self, request: pb.InvalidateRequest, context: Context) -> pb.InvalidateResponse:
        caller_of(self._engine, context)
        await self._engine.invalidate(request.name)
        return pb.InvalidateResponse()

    @answers
    async def PublishMetadata(self, request: pb.PublishMetadataRequest, context: Context) -> pb.PublishMetadataResponse:
        caller_of(self._engine, context)
        regions = [t.RegionId(region) for region in request.region] if request.partial else None
        await self._engine.publish_metadata(request.label, regions)
        return pb.PublishMetadataResponse()

    @answers
    async def WithdrawMetadata(
        self, request: pb.WithdrawMetadataRequest, context: Context
    ) -> pb.WithdrawMetadataResponse:
        caller_of(self._engine, context)
        await self._engine.withdraw_metadata(request.label)
        return pb.WithdrawMetadataResponse()

    @answers
    async def FetchMetadata(self, request: pb.FetchMetadataRequest, context: Context) -> pb.RegionList:
        caller_of(self._engine, context)
        timeout_s = wire.check_seconds("timeout_s", request.timeout_s)
        return wire.listing_to_message(await self._engine.fetch_metadata(request.node, request.label, timeout_s))
