"""MetadataService: this node's record, the others', and blobs of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t
from xferd.api import wire
from xferd.api.grpc._rpc import answers, caller_of
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.proto import xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from xferd.api.engine import Engine
    from xferd.api.grpc._rpc import Context


class MetadataServicer(pb_grpc.MetadataServiceServicer):
    """Adapter over ``Metadata``. The engine asks for no caller here; the face still wants a live session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @answers
    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.Node:
        caller_of(self._engine, context)
        return wire.node_to_message(await self._engine.node(request.name))

    @answers
    async def ListPeers(self, request: pb.ListPeersRequest, context: Context) -> pb.PeerList:
        caller_of(self._engine, context)
        return pb.PeerList(peers=[wire.peer_to_message(peer) for peer in self._engine.peers()])

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
