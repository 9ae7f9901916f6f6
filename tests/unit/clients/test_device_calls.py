"""GPU memory by both clients against the real faces: what is registered again costs no call, what is freed goes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from xferd.api.errors import Busy, Closed, NotFound, OutOfBounds, Unavailable, Unsupported
from xferd.api.types import Access, MemoryKind, RegionSource, TransferOp
from xferd.clients import AsyncClient, Client
from xferd.clients.devices import SimulatedBuffer


@pytest.fixture
def client(threaded):
    with Client.connect(threaded.path, "me") as client:
        yield client


def test_memory_of_a_gpu_becomes_a_region(threaded, client):
    buffer = SimulatedBuffer(8192)
    region = client.register_device(buffer[4096:], access=Access.READ, label="kv", writable=False)
    info = region.info
    assert (info.kind, info.source, info.nbytes) == (MemoryKind.VRAM, RegionSource.DEVICE, 4096)
    assert (info.access, info.label, info.writable) == (Access.READ, "kv", False)
    assert threaded.engine.device_handles[info.id].offset == 4096
    with pytest.raises(Unsupported, match="dlpack"):
        region.array()
    region.free()


def test_the_same_memory_again_is_no_call_and_one_region(threaded, client):
    buffer = SimulatedBuffer(8192)
    first = client.register_device(buffer[:4096])
    calls = len(threaded.engine.calls)
    second = client.register_device(buffer[:4096])
    assert second.id == first.id
    assert len(threaded.engine.calls) == calls
    first.free()
    first.free()
    assert threaded.engine.calls.count("free") == 0
    assert client.register_device(buffer[:4096]).id == second.id
    client.free([second])
    with pytest.raises(Closed):
        second.dlpack()
    assert threaded.engine.calls.count("free") == 0
    client.free(client.regions())
    assert threaded.engine.calls.count("free") == 1
    assert client.register_device(buffer[:4096]).id != first.id


def test_tensors_of_one_allocation_share_its_handle(threaded, client):
    buffer = SimulatedBuffer(1 << 16)
    regions = [client.register_device(buffer[start : start + 4096]) for start in (0, 2048, 8192)]
    handles = [threaded.engine.device_handles[region.id] for region in regions]
    assert len({handle.handle for handle in handles}) == 1
    assert [handle.offset for handle in handles] == [0, 2048, 8192]
    client.free(regions)


def test_memory_by_fd_goes_over_the_session_socket(threaded, client, open_fds):
    buffer = SimulatedBuffer(8192, is_vmm=True)
    before = open_fds()
    region = client.register_device(buffer[:4096])
    assert threaded.engine.passed_nbytes == 8192
    assert open_fds() == before
    region.free()
    with Client.connect_grpc(threaded.target) as other, pytest.raises(Unsupported, match="cannot pass"):
        other.register_device(buffer)
    assert open_fds() == before


def test_memory_lives_until_its_last_region_is_freed(client):
    buffer = SimulatedBuffer(4096)
    alive = weakref.ref(buffer)
    regions = [client.register_device(buffer), client.register_device(buffer)]
    del buffer
    for region in regions:
        gc.collect()
        assert alive() is not None
        region.free()
    del region, regions
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("error", "is_kept"), [(Unavailable("who knows"), True), (NotFound("no such GPU"), False)])
def test_memory_that_the_daemon_may_know_of_is_kept_for_good(threaded, client, error, is_kept):
    buffer = SimulatedBuffer(4096)
    alive = weakref.ref(buffer)
    threaded.engine.fail_next("register_device", error)
    with pytest.raises(type(error)):
        client.register_device(buffer)
    del buffer
    gc.collect()
    assert (alive() is not None) == is_kept


def test_what_could_not_be_freed_is_still_there(threaded, client):
    buffer = SimulatedBuffer(4096)
    region = client.register_device(buffer)
    threaded.engine.fail_next("free", Busy("a transfer moves bytes of it"))
    with pytest.raises(Busy):
        region.free()
    assert client.register_device(buffer).id == region.id
    region.free()
    assert threaded.engine.calls.count("free") == 1


def test_own_memory_is_given_without_a_call(threaded, client):
    buffer = SimulatedBuffer(4096)
    region = client.register_device(buffer[1024:], writable=False)
    view = np.asarray(region.dlpack(np.uint32, 4))
    assert np.shares_memory(view, buffer.array)
    assert not view.flags.writeable
    assert "export_device" not in threaded.engine.calls
    with pytest.raises(OutOfBounds):
        region.dlpack(np.uint32, 4096)
    region.free()
    with pytest.raises(Closed):
        region.dlpack()


def test_anothers_memory_is_mapped_and_where_it_lies_is_asked_once(threaded, client):
    buffer = SimulatedBuffer(8192)
    with Client.connect(threaded.path, "other") as other:
        other.register_device(buffer[256:], access=Access.READ, label="shared")
        [region] = client.regions(label="shared")
        view = np.asarray(region.dlpack())
        again = np.asarray(region.dlpack(np.uint8, 16))
        assert threaded.engine.calls.count("export_device") == 1
        buffer.array[256] = 77
        assert (view[0], again[0]) == (77, 77)
        assert not view.flags.writeable
    host = client.allocate(4096)
    with pytest.raises(Unsupported, match="no GPU memory"):
        host.dlpack()


def test_devices_and_events(threaded, client):
    assert [info.reason for info in client.devices()] == ["", "device 1 of 1"]
    event = client.open_event()
    event.record()
    event.synchronize()
    buffer = SimulatedBuffer(4096)
    region = client.register_device(buffer)
    host = client.allocate(4096)
    client.write(region, host, wait_event=event, done_event=7)
    with client.transfer(TransferOp.READ, region, host, hold=True, wait_event=event.number) as held:
        request = threaded.engine._transfers[held.id].request
        assert (request.wait_event, request.done_event) == (event.number, 0)
    with pytest.raises(NotFound):
        client.open_event(device=9)
    region.free()
    host.free()


def test_closing_lets_go_of_events_and_memory(threaded, open_fds):
    before = open_fds()
    with Client.connect(threaded.path) as client:
        client.open_event()
        client.register_device(SimulatedBuffer(4096))
    assert open_fds() == before


async def test_the_async_client_does_all_of_it(daemon, open_fds):
    before = open_fds()
    async with AsyncClient.connect(daemon.path, "me") as client, AsyncClient.connect(daemon.path, "other") as other:
        buffer = SimulatedBuffer(8192)
        first = await client.register_device(buffer[:4096], access=Access.READ_WRITE, label="kv")
        calls = len(daemon.engine.calls)
        second = await client.register_device(buffer[:4096], access=Access.READ_WRITE, label="kv")
        assert (second.id, len(daemon.engine.calls)) == (first.id, calls)
        assert np.shares_memory(np.asarray(await first.dlpack()), buffer.array)
        [theirs] = await other.regions(label="kv")
        np.asarray(await theirs.dlpack())[5] = 9
        assert buffer.array[5] == 9
        await first.free()
        assert "free" not in daemon.engine.calls
        await client.free([second])
        assert daemon.engine.calls.count("free") == 1

        fd = await client.register_device(SimulatedBuffer(4096, is_vmm=True))
        assert daemon.engine.passed_nbytes == 4096
        event = await client.open_event()
        event.record()
        host = await client.allocate(4096)
        held = await client.transfer(TransferOp.WRITE, fd, host, hold=True, wait_event=event)
        assert daemon.engine._transfers[held.id].request.wait_event == event.number
        assert len(await client.devices()) == 2
        with pytest.raises(Unsupported, match="no GPU memory"):
            await host.dlpack()
        del buffer, fd, first, second, theirs, event, held
    gc.collect()
    assert open_fds() == before
