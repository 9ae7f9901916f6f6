"""The rig for the ``tcp`` backend: two of them in this process over loopback, one with regions for the other."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from arenas import MappedArena
from check_backend import Arena, Rig

from xferd.api.errors import NotFound, OutOfBounds, Stale
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.types import NodeInfo
from xferd.plugins import vectored
from xferd.plugins.base import RemoteSpace, SpaceKind
from xferd.plugins.tcp import TcpBackend, TcpOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from check_backend import Pair

    from xferd.api.types import TransferOp
    from xferd.plugins.base import IovTable, PeerIdentity

EPOCH = 3
# No divisor of any block size of the checks, so that windows end in the middle of rows.
WINDOW_NBYTES = 1_000_003


class RemoteArena(Arena):
    """A region of the serving node, which is numpy memory of this process."""

    base = 0

    def __init__(self, regions: dict[int, MappedArena], nbytes: int) -> None:
        self.space = RemoteSpace("serving", EPOCH)
        self.nbytes = nbytes
        self.region = max(regions, default=0) + 1
        self._regions = regions
        self._memory = regions[self.region] = MappedArena(nbytes)

    def fill(self, data: np.ndarray) -> None:
        self._memory.fill(data)

    def read(self) -> np.ndarray:
        return self._memory.read()

    def close(self) -> None:
        self._regions.pop(self.region, None)


class WindowGrant:
    """Yields memory in pieces of one size."""

    def __init__(self, iov: IovTable) -> None:
        self.nbytes = vectored.total_nbytes(iov)
        self._rest = iov

    def windows(self) -> Iterator[IovTable]:
        while len(self._rest):
            size = min(WINDOW_NBYTES, vectored.total_nbytes(self._rest))
            window, self._rest = vectored.split(self._rest, size)
            yield window

    def close(self) -> None:
        pass


class RegionHandler:
    """The serving node's side: regions by number."""

    def __init__(self, transport: TcpBackend) -> None:
        self.regions: dict[int, MappedArena] = {}
        self._transport = transport

    async def handle(self, peer: PeerIdentity, request: pb.PeerRequest) -> pb.PeerReply:
        if request.WhichOneof("request") == "quiesce":
            await self._transport.wait_quiesced(peer, request.quiesce.transfer_id)
            return pb.PeerReply(done=pb.Done())
        raise NotFound(f"no {request.WhichOneof('request')} here")

    def open_grant(self, peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> WindowGrant:
        region, offset, nbytes = (
            np.frombuffer(raw, dtype="<u8") for raw in (request.region, request.offset, request.nbytes)
        )
        memory = self.regions.get(int(region[0]))
        if memory is None:
            raise Stale(f"region {region[0]} has gone")
        if (region != region[0]).any() or (offset + nbytes > memory.nbytes).any():
            raise OutOfBounds("one region a chunk in these checks, and none past its end")
        return WindowGrant(np.stack((offset + np.uint64(memory.base), nbytes), axis=1))

    def peer_connected(self, peer: PeerIdentity) -> None:
        pass

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        pass


class TcpRig(Rig):
    """The calling node's backend, which is checked, and the serving node's."""

    def __init__(self, directory: Path) -> None:
        secret = directory / "secret"
        secret.write_bytes(b"the secret of the conformance suite")
        secret.chmod(0o600)
        self.backend, self.serving = (
            TcpBackend(TcpOptions(listen="127.0.0.1:0", secret_file=str(secret))) for _ in range(2)
        )
        self._handler = RegionHandler(self.serving)

    async def start(self) -> None:
        await self.serving.start()
        await self.backend.start()
        addresses = await self.serving.listen(_node("serving"), self._handler)
        await self.backend.listen(_node("calling"), RegionHandler(self.backend))
        await self.backend.connect(addresses[0], name="serving", epoch=EPOCH)

    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        return RemoteArena(self._handler.regions, nbytes) if kind is SpaceKind.REMOTE else MappedArena(nbytes)

    def broken(self, pair: Pair) -> tuple[Arena, Arena]:
        here, there = MappedArena(4096), RemoteArena(self._handler.regions, 4096)
        there.close()
        return (here, there) if pair[0] is SpaceKind.MAPPED else (there, here)


@asynccontextmanager
async def tcp_maker() -> AsyncIterator[TcpRig]:
    """Make a rig; its serving side is closed at the end."""
    with tempfile.TemporaryDirectory(prefix="xf") as directory:
        rig = TcpRig(Path(directory))
        try:
            yield rig
        finally:
            await rig.backend.aclose()
            await rig.serving.aclose()


def _node(name: str) -> NodeInfo:
    return NodeInfo(name, f"id-{name}", EPOCH, "test", (), ("tcp",), (), (), 0.0)
