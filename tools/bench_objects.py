"""Gets of objects into scattered memory, beside obstore alone: ratios of one run on one machine.

    python tools/bench_objects.py [--count 64] [--nbytes 1MiB] [--rows 256] [--rounds 15]

The server is one of ours, in a process of its own: it knows just enough of S3 to answer ranges from memory, and is
quick, so that what is compared is the client's side. obstore alone leaves the bytes in its own buffers; the backend
puts them into memory in ``--rows`` places an object. The last line is a client, a daemon, one transfer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import obstore
from obstore.store import S3Store

from xferd.api.descriptors import DescriptorList
from xferd.api.units import parse_nbytes
from xferd.clients import Client
from xferd.plugins.base import Chunk, Extent, MappedSpace, ObjectSpace, ObjectVersion
from xferd.plugins.object import ObjectBackend, ObjectOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_SERVER = """
import asyncio, sys
nbytes = int(sys.argv[1])
body = memoryview(bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
meta = "ETag: \\"e\\"\\r\\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\\r\\n"

class Http(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.pending = transport, b""
    def data_received(self, data):
        self.pending += data
        while b"\\r\\n\\r\\n" in self.pending:
            head, _, self.pending = self.pending.partition(b"\\r\\n\\r\\n")
            self.answer(head.decode("latin-1"))
    def answer(self, head):
        start, stop, status, span = 0, nbytes, "200 OK", ""
        for line in head.split("\\r\\n"):
            if line.lower().startswith("range:"):
                first, last = line.split("=")[1].split("-")
                start, stop = int(first), min(int(last) + 1, nbytes)
                status, span = "206 Partial Content", f"Content-Range: bytes {start}-{stop - 1}/{nbytes}\\r\\n"
        text = f"HTTP/1.1 {status}\\r\\nContent-Length: {stop - start}\\r\\n{meta}{span}\\r\\n"
        self.transport.write(text.encode())
        if not head.startswith("HEAD"):
            self.transport.write(body[start:stop])

async def main():
    server = await asyncio.get_running_loop().create_server(Http, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def _section(endpoint: str, concurrency: int) -> dict[str, object]:
    return {
        "url": "s3://bench",
        "endpoint": endpoint,
        "region": "us-east-1",
        "anonymous": True,
        "allow_http": True,
        "max_concurrency": concurrency,
    }


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def _compare(endpoint: str, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return seconds of obstore alone and of the backend, alternating."""
    keys = [f"object-{n}" for n in range(args.count)]
    store = S3Store(
        "bench", endpoint=endpoint, region="us-east-1", skip_signature=True, client_options={"allow_http": True}
    )
    gate = asyncio.Semaphore(args.concurrency)

    async def get(key: str) -> int:
        async with gate:
            return len(await (await obstore.get_async(store, key)).bytes_async())

    options = {"stores": {"s": _section(endpoint, args.concurrency)}, "checksum": False}
    backend = ObjectBackend(ObjectOptions.model_validate(options))
    await backend.start()
    memory = np.zeros(2 * args.count * args.nbytes, dtype=np.uint8)
    row = args.nbytes // args.rows
    version = ObjectVersion('"e"', args.nbytes)

    def chunk(number: int) -> Chunk:
        space = ObjectSpace("s", keys[number], args.nbytes, version)
        places = np.random.default_rng(number).permutation(args.rows) * 2 * row
        places += memory.ctypes.data + number * 2 * args.nbytes
        target = np.column_stack((places.astype(np.uint64), np.full(args.rows, row, dtype=np.uint64)))
        whole = np.array([[0, args.rows * row]], dtype=np.uint64)
        return Chunk(Extent(space, whole), Extent(MappedSpace(), target), args.rows * row, "t", "c")

    chunks = [chunk(number) for number in range(args.count)]
    alone, ours = [], []
    for _ in range(args.rounds + 2):
        alone.append(await _timed(lambda: asyncio.gather(*map(get, keys))))
        ours.append(await _timed(lambda: asyncio.gather(*map(backend.move, chunks))))
    assert memory[: row // 2].any()
    await backend.aclose()
    return alone[2:], ours[2:]  # the first ones open connections


def _by_daemon(endpoint: str, args: argparse.Namespace) -> list[float]:
    """Return seconds of one READ of all objects, by a client of a daemon."""
    with tempfile.TemporaryDirectory(prefix="xf") as directory:
        wanted = [
            f"node.run_dir={directory}/run",
            "node.name=bench",
            f"pools=[{{nbytes={4 * args.count * args.nbytes}}}]",
        ]
        for key, value in _section(endpoint, args.concurrency).items():
            text = str(value).lower() if isinstance(value, bool) else value
            wanted.append(f"backends.object.stores.s.{key}={text}")
        command = [sys.executable, "-m", "xferd.daemon.cli", "serve"]
        command += [part for setting in wanted for part in ("--set", setting)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
            try:
                socket = Path(directory, "run", "session.sock")
                while not socket.exists() and daemon.poll() is None:
                    time.sleep(0.05)
                return _reads(socket, args)
            finally:
                daemon.terminate()
                daemon.wait(20)


def _reads(socket: Path, args: argparse.Namespace) -> list[float]:
    row = args.nbytes // args.rows
    with Client.connect(socket, agent="bench") as client:
        block = client.allocate(2 * args.count * args.nbytes)
        objects = [client.register_object("s", f"object-{n}") for n in range(args.count)]
        places = np.random.default_rng(0).permutation(args.count * args.rows) * 2 * row
        local = DescriptorList.from_columns(block.id, places, row)
        starts = np.zeros(args.count, dtype=np.uint64)
        remote = DescriptorList.from_columns([region.id for region in objects], starts, args.rows * row)
        with client.prepare(local) as into, client.prepare(remote) as out:
            seconds = []
            for _ in range(args.rounds + 2):
                began = time.perf_counter()
                client.read(into, out)
                seconds.append(time.perf_counter() - began)
    return seconds[2:]


def main() -> None:
    """Run, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--nbytes", type=parse_nbytes, default=1 << 20)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with subprocess.Popen([sys.executable, "-c", _SERVER, str(args.nbytes)], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            alone, ours = asyncio.run(_compare(endpoint, args))
            daemon = _by_daemon(endpoint, args)
        finally:
            server.kill()
    total = args.count * args.nbytes
    base = statistics.median(alone)
    print(f"{args.count} gets of {args.nbytes} bytes, {args.concurrency} at once, {args.rounds} rounds, medians")
    for name, seconds in (("obstore alone", alone), ("backend, scattered", ours), ("client and daemon", daemon)):
        median = statistics.median(seconds)
        print(f"{name:20} {median * 1e3:8.1f} ms {total / median / 1e9:6.2f} GB/s {base / median:6.2f} x")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
