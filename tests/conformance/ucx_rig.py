"""The rig for the ``ucx`` backend: two of them in this process, whose requests go over two ``tcp`` backends."""

from __future__ import annotations

import mmap
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arenas import MappedArena
from check_backend import Arena, Rig
from tcp_rig import EPOCH, RegionHandler, RemoteArena

from xferd.api.types import NodeInfo
from xferd.plugins.base import SpaceKind
from xferd.plugins.tcp import TcpBackend, TcpOptions
from xferd.plugins.ucx import UcxBackend, UcxOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from check_backend import Pair

    from xferd.api.proto import peer_v1_pb2 as pb
    from xferd.plugins.base import PeerIdentity


class UcxHandler(RegionHandler):
    """Gives to the backend what is its own, as the daemon does."""

    def __init__(self, transport: TcpBackend, backend: UcxBackend) -> None:
        super().__init__(transport)
        self._backend = backend

    async def handle(self, peer: PeerIdentity, request: pb.PeerRequest) -> pb.PeerReply:
        if request.WhichOneof("request") in self._backend.verbs:
            return await self._backend.serve(peer, request)
        return await super().handle(peer, request)

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        self._backend.peer_lost(peer, reason)


class UcxRig(Rig):
    """The calling node's backend, which is checked, and the serving node's."""

    def __init__(self, directory: Path, **options: object) -> None:
        secret = directory / "secret"
        secret.write_bytes(b"the secret of the conformance suite")
        secret.chmod(0o600)
        self.backend, self.serving = (UcxBackend(UcxOptions.model_validate(options)) for _ in range(2))
        self.calling_transport, self.serving_transport = (
            TcpBackend(TcpOptions(listen="127.0.0.1:0", secret_file=str(secret))) for _ in range(2)
        )
        self.handler = UcxHandler(self.serving_transport, self.serving)

    async def start(self) -> None:
        for part in (self.serving, self.backend, self.serving_transport, self.calling_transport):
            await part.start()
        served, calling = node("serving"), node("calling")
        handler = UcxHandler(self.calling_transport, self.backend)
        self.serving.attach(served, self.serving_transport, self.handler)
        self.backend.attach(calling, self.calling_transport, handler)
        addresses = await self.serving_transport.listen(served, self.handler)
        await self.calling_transport.listen(calling, handler)
        await self.calling_transport.connect(addresses[0], name="serving", epoch=EPOCH)

    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        return RemoteArena(self.handler.regions, nbytes) if kind is SpaceKind.REMOTE else MappedArena(nbytes)

    def broken(self, pair: Pair) -> tuple[Arena, Arena]:
        here, there = MappedArena(4096), RemoteArena(self.handler.regions, 4096)
        there.close()
        return (here, there) if pair[0] is SpaceKind.MAPPED else (there, here)

    async def aclose(self) -> None:
        """Close all four, in any state."""
        for part in (self.backend, self.calling_transport, self.serving, self.serving_transport):
            await part.aclose()


def ucx_maker(**options: object):
    """Return a maker of rigs with these options."""

    @asynccontextmanager
    async def maker() -> AsyncIterator[UcxRig]:
        with tempfile.TemporaryDirectory(prefix="xf") as directory:
            rig = UcxRig(Path(directory), **options)
            try:
                yield rig
            finally:
                await rig.aclose()

    return maker


def node(name: str) -> NodeInfo:
    return NodeInfo(name, f"id-{name}", EPOCH, "test", (), ("tcp", "ucx"), (), (), 0.0)


def take_a_place(pid: int) -> None:
    """Do to the queue in shared memory of a process's one worker what a sender does that dies before it has written.

    A queue begins with the number of places that were taken (``uct_mm_fifo_ctl_t`` of UCX).
    """
    held = [path for path in Path(f"/proc/{pid}/fd").iterdir() if "ucx_shm_posix" in str(path.resolve())]
    queue = min(held, key=lambda path: path.stat().st_size)  # the other one holds long messages
    with queue.open("r+b") as file, mmap.mmap(file.fileno(), 8) as memory:
        memory[:] = (int.from_bytes(memory[:], "little") + 1).to_bytes(8, "little")
