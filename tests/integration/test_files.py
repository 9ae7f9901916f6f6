"""Files through a daemon, past the page cache and through it: the bytes are right, and ``explain`` says how."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from xferd.api.descriptors import DescriptorList
from xferd.clients import Client

if TYPE_CHECKING:
    from cluster import Cluster

pytestmark = pytest.mark.slow

NBYTES = 5 << 20
WAYS = {
    "past the cache": ("backends.posix.direct=true", "O_DIRECT"),
    "threads past the cache": ("backends.posix.direct=true", "backends.posix.engine=threads", "threads, O_DIRECT"),
    "durable": ("backends.posix.fsync=data", ""),
    "durable past the cache": ("backends.posix.direct=true", "backends.posix.fsync=data", "O_DIRECT"),
}


@pytest.mark.parametrize("way", WAYS)
def test_file_is_written_and_read_back_in_odd_places(cluster: Cluster, way: str) -> None:
    *settings, said = WAYS[way]
    daemon = cluster.make("a", tcp=False, settings=tuple(settings))
    path = daemon.files / "data"
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, NBYTES, np.uint8)
    offsets = np.sort(rng.permutation(NBYTES // 2048)[:900]) * 2048 + rng.integers(0, 700, 900)
    sizes = rng.integers(1, 1300, 900)
    with Client.connect(daemon.session_socket, agent="x") as client:
        memory, back = client.allocate(NBYTES), client.allocate(NBYTES)
        file = client.register_file(str(path), writable=True, create=True, nbytes=NBYTES)
        memory.array()[:] = data
        [hop] = client.explain("WRITE", memory, file).route
        assert said in hop.reason
        client.write(memory, file)
        scattered = DescriptorList.from_columns([file.id] * 900, offsets, sizes)
        packed = DescriptorList.from_columns([back.id], [17], [int(sizes.sum())])
        client.read(packed, scattered)
        expected = np.concatenate([data[at : at + size] for at, size in zip(offsets, sizes, strict=True)])
        assert np.array_equal(back.array()[17 : 17 + len(expected)], expected)
        client.write(packed, scattered)
        client.read(back, file)
        assert np.array_equal(back.array(), data)
    assert path.read_bytes() == data.tobytes()


def test_file_that_is_cut_under_a_region_is_no_read_of_zeros(cluster: Cluster) -> None:
    from xferd.api.errors import ShortTransfer

    daemon = cluster.make("a", tcp=False, settings=("backends.posix.direct=true",))
    path = daemon.files / "data"
    path.write_bytes(bytes(NBYTES))
    with Client.connect(daemon.session_socket, agent="x") as client:
        memory = client.allocate(NBYTES)
        file = client.register_file(str(path))
        client.read(memory, file)
        os.truncate(path, NBYTES - 4096)
        with pytest.raises(ShortTransfer, match="ended after"):
            client.read(memory, file)
