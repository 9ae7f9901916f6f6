"""A gRPC face over the fake engine on a real Unix socket, and a client of it, for the tests of the face."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from xferd.api.grpc.server import GrpcFace
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from fake_engine import FakeEngine


def column(*values: int) -> bytes:
    """Pack a column as the proto file says."""
    return np.array(values, dtype="<u8").tobytes()


def columns(region: int, offsets: list[int], nbytes: int, *, node: str = "", epoch: int = 0) -> pb.DescriptorList:
    """Return a list of equal spans of one region."""
    return pb.DescriptorList(
        node=node,
        epoch=epoch,
        columns=pb.Columns(region=column(region), offset=column(*offsets), nbytes=column(nbytes)),
    )


@dataclass
class Client:
    """Stubs on one channel, and the metadata of one session."""

    channel: grpc.aio.Channel
    grant: pb.SessionGrant = field(default_factory=pb.SessionGrant)
    stream: object = None

    def __post_init__(self) -> None:
        self.sessions = pb_grpc.SessionServiceStub(self.channel)
        self.memory = pb_grpc.MemoryServiceStub(self.channel)
        self.transfers = pb_grpc.TransferServiceStub(self.channel)
        self.notifications = pb_grpc.NotificationServiceStub(self.channel)
        self.metadata = pb_grpc.MetadataServiceStub(self.channel)
        self.admin = pb_grpc.AdminServiceStub(self.channel)

    @property
    def auth(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that every call carries."""
        return (("authorization", f"Bearer {self.grant.token}"),)

    async def allocate(self, *nbytes: int, access: int = pb.ACCESS_NONE) -> list[int]:
        """Allocate regions; return their ids."""
        request = pb.AllocateRequest(nbytes=nbytes, access=access)
        return [region.id for region in (await self.memory.Allocate(request, metadata=self.auth)).regions]

    async def submit(self, local: pb.DescriptorList, remote: pb.DescriptorList, **fields: object) -> pb.TransferStatus:
        """Submit a READ unless ``op`` says otherwise."""
        request = pb.SubmitRequest(**{"op": pb.TRANSFER_OP_READ, "local": local, "remote": remote} | fields)
        return await self.transfers.Submit(request, metadata=self.auth)


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine, **options: object) -> AsyncIterator[GrpcFace]:
    """Serve the engine on a socket in a short folder of its own."""
    with tempfile.TemporaryDirectory(prefix="xf") as folder:
        async with GrpcFace(engine, socket_path=str(Path(folder) / "g.sock"), **options) as face:
            yield face


@contextlib.asynccontextmanager
async def attached(face: GrpcFace, agent: str = "", *, target: str = "") -> AsyncIterator[Client]:
    """Open a session by stream; it ends with the block."""
    async with grpc.aio.insecure_channel(target or f"unix:{face.socket_path}") as channel:
        client = Client(channel)
        stream = client.sessions.Open(pb.OpenSessionRequest(agent=agent))
        try:
            event = await stream.read()
            client.grant, client.stream = event.opened, stream
            yield client
        finally:
            stream.cancel()


async def failure(call: Awaitable[object]) -> tuple[grpc.StatusCode, pb.ErrorDetail]:
    """Return the status of a call that must fail, and the detail of its trailer."""
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call
    trailer = dict(info.value.trailing_metadata())
    return info.value.code(), pb.ErrorDetail.FromString(trailer.get("xferd-error-bin", b""))
