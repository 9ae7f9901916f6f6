"""Many clients at once move blocks between all kinds of memory in every way of asking, and every byte is looked at."""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from xferd.api.types import Access
from xferd.clients.sync import Client

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from cluster import DaemonProcess
    from numpy.typing import NDArray

    from xferd.clients.sync import Region

NBYTES = 4 << 20
BLOCKS = (64, 512, 4096, 16384, 65536)
BATCHES = (1, 2, 7, 31, 64, 300, 1024)
DURATION_S = 6.0
CLIENTS = 4


def _ask(client: Client, source: Any, target: Any, count: int, nbytes: int, rows: Any, places: Any, way: int) -> None:
    if way == 0:
        client.write(source.blocks(rows, nbytes), target.blocks(places, nbytes))
    elif way == 1:
        client.read(target.blocks(places, nbytes), source.blocks(rows, nbytes))
    else:
        every = np.arange(count)
        with (
            client.prepare(source.blocks(every, nbytes)) as here,
            client.prepare(target.blocks(every, nbytes)) as there,
        ):
            if way == 2:
                client.write(here.select(rows), there.select(places))
                return
            with client.transfer("WRITE", here.select(rows), there.select(places), hold=True) as transfer:
                transfer.post(wait_s=10)
                target.array()[: count * nbytes].reshape(count, nbytes)[places] = 0
                transfer.post()
                transfer.wait()


def _regions(client: Client) -> list[tuple[Region, NDArray[np.uint8]]]:
    pool, other = client.allocate([NBYTES, NBYTES], access=Access.READ_WRITE)
    private = client.register(np.zeros(NBYTES, np.uint8), access=Access.READ_WRITE)
    memfd = client.register_memfd(NBYTES, access=Access.READ_WRITE)
    return [(region, region.array()) for region in (pool, other, private, memfd)]


def _client(socket: str, seed: int, told: Queue[str]) -> None:
    rng = np.random.default_rng(seed)
    moves = 0
    with Client.connect(socket, agent=f"torture-{seed}", ring=bool(seed % 4)) as client:
        regions = _regions(client)
        until = time.monotonic() + DURATION_S
        while time.monotonic() < until:
            nbytes = int(rng.choice(BLOCKS))
            count = NBYTES // nbytes
            batch = int(min(count, rng.choice(BATCHES)))
            (source, left), (target, right) = (regions[i] for i in rng.choice(4, 2, replace=False))
            rows, places = rng.permutation(count)[:batch], rng.permutation(count)[:batch]
            written, read = (array.reshape(count, nbytes).view(np.uint64) for array in (left, right))
            moves += 1
            written[rows] = (np.uint64(seed) << np.uint64(56)) | (np.uint64(moves) << np.uint64(24))
            written[rows] |= rows.astype(np.uint64)[:, None]
            read[places] = 0
            way = int(rng.integers(4))
            _ask(client, source, target, count, nbytes, rows, places, way)
            if not np.array_equal(read[places], written[rows]):
                told.put(f"client {seed}: {batch} x {nbytes} bytes, way {way}, {source} to {target}: wrong bytes")
                return
    told.put(f"ok {moves}")


@pytest.mark.slow
def test_every_byte_is_the_right_one_whatever_the_others_do(daemon: DaemonProcess) -> None:
    spawn = multiprocessing.get_context("spawn")
    told: Queue[str] = spawn.Queue()
    clients = [
        spawn.Process(target=_client, args=(str(daemon.session_socket), seed, told), daemon=True)
        for seed in range(1, CLIENTS + 1)
    ]
    for process in clients:
        process.start()
    words = [told.get(timeout=90) for _ in clients]
    for process in clients:
        process.join(timeout=30)
    assert all(word.startswith("ok") for word in words), words
    assert all(int(word.split()[1]) > 20 for word in words), words
    assert [process.exitcode for process in clients] == [0] * CLIENTS
