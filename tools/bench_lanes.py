"""Measure what lies between the engine's ``move(chunk)`` and its return: the tcp backend, no control plane around it.

Two processes on loopback, the real region table and grants at the serving one. For each case READ and WRITE take turns,
round after round, and the medians are printed. Run it on an otherwise idle machine, and compare settings in turn:

    .venv/bin/python tools/bench_lanes.py [--rounds N] [lanes=4 sndbuf=1MiB turn=8MiB nice=0 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import structlog
import uvloop

from xferd.api.errors import NotFound
from xferd.api.types import Access, NodeInfo, RegionSource, SessionId
from xferd.daemon.memory.backing import Backing
from xferd.daemon.memory.regions import RegionTable
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.serving import PeerServing
from xferd.plugins.base import Chunk, Extent, MappedSpace, RemoteSpace
from xferd.plugins.tcp import TcpBackend, TcpOptions

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from xferd.api.proto import peer_v1_pb2 as pb
    from xferd.api.types import TransferOp
    from xferd.plugins.base import Grant, PeerIdentity

EPOCH = 1
MEMORY_NBYTES = 256 << 20
ROUND_NBYTES = 64 << 20
CASES = ((4096, 1), (65536, 1), (4096, 1024), (65536, 1024), (MEMORY_NBYTES, 1))
CHUNK_NBYTES = 8 << 20


class OwnMemory(Backing):
    """Memory of this process."""

    source = RegionSource.POOL

    def __init__(self, address: int) -> None:
        self.position = address

    def _close(self) -> None:
        pass


class Events:
    """Hears of connections, and does nothing about them."""

    def peer_connected(self, peer: PeerIdentity) -> None:
        """Ignore it."""

    def peer_lost(self, peer: PeerIdentity, reason: str) -> None:
        """Ignore it."""

    def peer_leaving(self, peer: PeerIdentity, reason: str) -> None:
        """Ignore it."""


class NothingHere(Events):
    """The calling side: has no regions."""

    async def handle(self, peer: PeerIdentity, request: pb.PeerRequest) -> pb.PeerReply:
        """Refuse."""
        raise NotFound("nothing is served here")

    def open_grant(self, peer: PeerIdentity, op: TransferOp, request: pb.DataRequest) -> Grant:
        """Refuse."""
        raise NotFound("nothing is served here")


@dataclass(frozen=True, slots=True)
class Work:
    """One case in one direction, as the engine would cut it."""

    name: str
    nbytes: int
    chunks: tuple[Chunk, ...]


def be_quiet() -> None:
    """Log as a daemon does: nothing about single requests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def info(name: str) -> NodeInfo:
    """Return a node's record."""
    return NodeInfo(name, f"id-{name}", EPOCH, "bench", (), ("tcp",), (), (), 0.0)


async def serve(options: TcpOptions, pipe: Connection) -> None:
    """Serve one region until the other side says enough."""
    memory = np.ones(MEMORY_NBYTES, dtype=np.uint8)
    backend, regions = TcpBackend(options), RegionTable("far", EPOCH, 1)
    region = regions.add(
        SessionId("bench"), "bench", OwnMemory(memory.ctypes.data), MEMORY_NBYTES, access=Access.READ_WRITE
    )
    serving = PeerServing(
        me=lambda: info("far"),
        regions=regions,
        staging=StagingPool(2 * CHUNK_NBYTES, CHUNK_NBYTES),
        learn=lambda _node: None,
        deliver=lambda _notification: None,
        transport=backend,
        events=Events(),
    )
    await backend.start()
    pipe.send((await backend.listen(info("far"), serving), region.id))
    await asyncio.to_thread(pipe.recv)
    await backend.aclose()


def run_server(options: TcpOptions, pipe: Connection) -> None:
    """Be the serving process."""
    be_quiet()
    uvloop.run(serve(options, pipe))


def works(region: int, memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[Work]:
    """Build all cases, scattered at both ends."""
    rng, made = np.random.default_rng(1), []
    for block, count in CASES:
        sizes = np.full(count, block, dtype=np.uint64)
        there, here = (
            rng.permutation(MEMORY_NBYTES // block)[:count].astype(np.uint64) * np.uint64(block) for _ in range(2)
        )
        remote = Extent(
            RemoteSpace("far", EPOCH), np.column_stack((there, sizes)), np.full(count, region, dtype=np.uint64)
        )
        local = Extent(MappedSpace(), np.column_stack((here + np.uint64(memory.ctypes.data), sizes)))
        total = block * count
        cuts = [*range(0, total, CHUNK_NBYTES), total]
        for op, source, target in (("READ", remote, local), ("WRITE", local, remote)):
            chunks = tuple(
                Chunk(source.cut(start, stop), target.cut(start, stop), stop - start, "bench", "bench")
                for start, stop in itertools.pairwise(cuts)
            )
            made.append(Work(f"{op:5} {block:>9} x {count:<4}", total, chunks))
    return made


async def measure(options: TcpOptions, addresses: tuple[str, ...], region: int, rounds: int) -> None:
    """Move everything, round after round, and print."""
    memory = np.ones(MEMORY_NBYTES, dtype=np.uint8)
    backend = TcpBackend(options)
    await backend.start()
    await backend.listen(info("near"), NothingHere())
    await backend.connect(addresses[0])
    took: dict[str, list[float]] = defaultdict(list)
    todo = works(region, memory)
    for number in range(rounds + 1):  # the first is warm-up
        for work in todo:
            for _ in range(max(1, min(20, ROUND_NBYTES // work.nbytes))):
                start = time.perf_counter()
                await asyncio.gather(*map(backend.move, work.chunks))
                if number:
                    took[work.name].append(time.perf_counter() - start)
    for work in todo:
        p50, p99 = np.percentile(took[work.name], (50, 99))
        rate = work.nbytes / p50 / 1e9
        sys.stdout.write(f"{work.name}  p50 {p50 * 1e6:9.0f} us  p99 {p99 * 1e6:9.0f} us  {rate:5.2f} GB/s\n")
    await backend.aclose()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("setting", nargs="*", help="option=value of [backends.tcp], for both sides")
    asked = parser.parse_args()
    be_quiet()
    settings = dict(setting.split("=", 1) for setting in asked.setting)
    with tempfile.TemporaryDirectory(prefix="xf") as directory:
        secret = Path(directory) / "secret"
        secret.touch(0o600)
        secret.write_bytes(b"a secret for one measurement")
        near, far = (
            TcpOptions.model_validate({"secret_file": str(secret), "listen": listen, **settings})
            for listen in ("", "127.0.0.1:0")
        )
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        server = context.Process(target=run_server, args=(far, theirs))
        server.start()
        theirs.close()  # so that a server that fails is noticed
        addresses, region = mine.recv()
        uvloop.run(measure(near, addresses, region, asked.rounds))
        mine.send("enough")
        server.join()


if __name__ == "__main__":
    main()
