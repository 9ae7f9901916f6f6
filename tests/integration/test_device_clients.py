"""GPU memory by both clients, by ring and by gRPC, with a daemon of simulated GPUs: every byte is compared."""

from __future__ import annotations

import numpy as np
import pytest

from xferd.api.errors import NotFound, PermissionDenied
from xferd.api.types import Access, MemoryKind
from xferd.clients import AsyncClient, Client
from xferd.clients.devices import SimulatedBuffer, SimulatedStream

pytestmark = pytest.mark.slow

NBYTES = 1 << 20
BLOCK = 4096
COUNT = NBYTES // BLOCK
SETTINGS = (
    "backends.cuda.driver=simulated",
    "backends.cuda.simulated_devices=2",
    'pools=[{name="host",nbytes="16MiB"},{name="gpu",kind="VRAM",device=1,nbytes="16MiB"}]',
)


@pytest.fixture(scope="module")
def gpus(module_cluster):
    """A daemon with two simulated GPUs and a pool on the second, shared by a module's tests."""
    return module_cluster.make("gpus", tcp=False, settings=SETTINGS)


@pytest.fixture(params=[None, False], ids=["ring", "grpc"])
def two(request, gpus):
    """Two clients in one process: what they share goes through the daemon."""
    with (
        Client.connect(gpus.session_socket, "one", ring=request.param) as one,
        Client.connect(gpus.session_socket, "two", ring=request.param) as other,
    ):
        yield one, other


def filled(seed: int, nbytes: int = NBYTES, device: int = 0) -> SimulatedBuffer:
    buffer = SimulatedBuffer(nbytes, device)
    buffer.array[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return buffer


@pytest.mark.parametrize("is_vmm", [False, True], ids=["handle", "fd"])
def test_memory_of_two_engines_is_gathered_and_scattered(two, is_vmm):
    one, other = two
    source, target = filled(1), SimulatedBuffer(NBYTES, is_vmm=is_vmm)
    theirs = one.register_device(source, access=Access.READ, label="kv")
    [seen] = other.regions(label="kv")
    assert (seen.info.kind, seen.info.device) == (MemoryKind.VRAM, 0)
    order = np.random.default_rng(2).permutation(COUNT)
    with (
        other.register_device(target) as mine,
        other.prepare(mine.blocks(np.arange(COUNT), BLOCK)) as slots,
        other.prepare(seen.blocks(np.arange(COUNT), BLOCK)) as blocks,
    ):
        status = other.read(slots.select(np.arange(COUNT)), blocks.select(order))
        assert {hop.backend for hop in status.telemetry.route} == {"cuda"}
        assert np.array_equal(target.array.reshape(COUNT, BLOCK), source.array.reshape(COUNT, BLOCK)[order])
    theirs.free()


def test_a_pool_of_gpu_memory_is_seen_and_moved_to_and_fro(two):
    one, _ = two
    first, second = one.allocate([NBYTES, NBYTES], "gpu")
    host = one.allocate(NBYTES)
    values = np.random.default_rng(3).standard_normal(NBYTES // 8)
    np.asarray(first.dlpack(np.float64))[:] = values
    one.read(second, first)
    view = np.from_dlpack(second.dlpack(np.float64, (512, 256)))
    assert np.array_equal(view.reshape(-1), values)
    one.read(host, second)
    assert np.array_equal(host.array(np.float64), values)
    host.array()[:] = 5
    one.write(host.rows(100, 999), first.rows(7, 999))
    assert np.asarray(first.dlpack())[7:1006].tolist() == [5] * 999
    assert first.read(6, 3)[1:] == b"\5\5"
    assert first.write(b"by gRPC", 11) == 7
    assert np.asarray(first.dlpack())[11:18].tobytes() == b"by gRPC"
    del view
    one.free([first, second, host])


def test_regions_of_a_pool_are_the_same_memory_for_both(two):
    one, other = two
    region = one.allocate(8192, "gpu", access=Access.READ_WRITE, label="shared")
    [seen] = other.regions(label="shared")
    np.asarray(seen.dlpack())[100] = 42
    assert np.asarray(region.dlpack())[100] == 42
    one.hand_over([region], "two", b"yours")
    [word] = other.notifications(timeout_s=5.0)
    [mine] = other.accept(word)
    assert np.asarray(mine.dlpack())[100] == 42
    mine.free()


def test_what_may_not_be_written_is_not(two):
    one, other = two
    with one.register_device(filled(4), access=Access.READ, writable=False) as region, one.allocate(NBYTES) as host:
        with pytest.raises(PermissionDenied):
            one.write(host, region)
        with pytest.raises(PermissionDenied):
            other.write(other.allocate(NBYTES), other.region(region.info))
        one.read(host, region)


def test_a_transfer_waits_for_what_is_on_the_stream(two):
    """An engine's kernel writes what a transfer reads: the transfer is posted before the kernel has ended."""
    one, _ = two
    event, stream = one.open_event(), SimulatedStream()
    buffer = SimulatedBuffer(NBYTES)
    host = one.allocate(NBYTES)
    with (
        one.register_device(buffer) as region,
        one.prepare(region) as source,
        one.prepare(host) as target,
        one.transfer("READ", target, source, hold=True, wait_event=event) as transfer,
    ):
        for value in (7, 8):
            event.record(stream)
            transfer.post()
            with pytest.raises(TimeoutError):
                wait_until_ended(transfer, 0.05)
            buffer.array[:] = value  # the kernel's last store
            stream.finish()
            transfer.wait(10.0)
            assert host.array()[0] == host.array()[-1] == value
    host.free()


def test_the_end_of_a_transfer_is_recorded(two):
    one, _ = two
    done = one.make_event(1)
    with one.allocate(NBYTES, "gpu") as region, one.allocate(NBYTES) as host:
        host.array()[:] = 3
        one.write(host, region, done_event=done)
        done.synchronize()
        done.wait()
        assert np.asarray(region.dlpack())[-1] == 3


def test_a_device_that_the_daemon_has_not_is_named(two):
    one, _ = two
    with pytest.raises(NotFound):
        one.register_device(SimulatedBuffer(4096, device=9))
    with pytest.raises(NotFound):
        one.make_event(9)


def wait_until_ended(transfer, timeout_s: float) -> None:
    """Wait; ``TimeoutError`` while it runs."""
    transfer._client.wait_many([transfer], timeout_s)
    if not transfer.is_ended:
        raise TimeoutError


@pytest.mark.parametrize("ring", [None, False], ids=["ring", "grpc"])
async def test_the_async_client_does_the_same(gpus, ring):
    async with (
        AsyncClient.connect(gpus.session_socket, "one", ring=ring) as one,
        AsyncClient.connect(gpus.session_socket, "two", ring=ring) as other,
    ):
        source = filled(5)
        theirs = await one.register_device(source, access=Access.READ, label="kv")
        assert (await one.register_device(source, access=Access.READ, label="kv")).id == theirs.id
        [seen] = await other.regions(label="kv")
        pool, host = await other.allocate(NBYTES, "gpu"), await other.allocate(NBYTES)
        order = np.random.default_rng(6).permutation(COUNT)
        slots = await other.prepare(pool.blocks(np.arange(COUNT), BLOCK))
        blocks = await other.prepare(seen.blocks(np.arange(COUNT), BLOCK))
        await other.read(slots.select(np.arange(COUNT)), blocks.select(order))
        expected = source.array.reshape(COUNT, BLOCK)[order]
        assert np.array_equal(np.asarray(await pool.dlpack(np.uint8, (COUNT, BLOCK))), expected)
        assert (await pool.read(8, 8)) == expected.tobytes()[8:16]

        event, stream, done = await other.open_event(device=1), SimulatedStream(), await other.make_event(1)
        event.record(stream)
        transfer = await other.transfer("READ", host, pool, wait_event=event, done_event=done)
        await other.wait_many([transfer], 0.05)
        assert not transfer.is_ended
        stream.finish()
        await transfer
        done.synchronize()
        assert np.array_equal(host.array(np.uint8, (COUNT, BLOCK)), expected)
