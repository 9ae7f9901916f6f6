"""What sessions have of GPUs: registrations are checked and let go of once, events are theirs, others are cut off."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from fake_devices import UUID, FakeDevices

from xferd.api.errors import (
    Closed,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OutOfBounds,
    Overloaded,
    PermissionDenied,
    Unsupported,
)
from xferd.api.types import Access, AllocateRequest, Caller, RegionSource, RegisterDeviceRequest, SessionId
from xferd.daemon.memory import devices
from xferd.daemon.memory.backing import open_memfd
from xferd.daemon.memory.device_pool import DevicePool
from xferd.daemon.memory.devices import DeviceDesk, NoDevices
from xferd.daemon.memory.regions import LocalActor, RegionTable
from xferd.plugins.base import ALLOCATION_SHIFT

ALICE, BOB = SessionId("s-alice"), SessionId("s-bob")
CALLER, OTHER = Caller(ALICE, "alice"), Caller(BOB, "bob")


def wanted(**changes: Any) -> RegisterDeviceRequest:
    values: dict[str, Any] = {"device_uuid": UUID, "allocation_nbytes": 8192, "handle": b"h" * 64}
    return RegisterDeviceRequest(**(values | changes))


class Rig:
    def __init__(self) -> None:
        self.memory = FakeDevices()
        self.regions = RegionTable("n", 1, 64, first_generation=1)
        self.pools: dict[str, DevicePool] = {}
        self.desk = DeviceDesk(self.regions, self.memory, self.pools)

    async def end(self, session: SessionId = ALICE) -> None:
        self.regions.retire(session)
        await self.desk.let_go(self.regions.remove_retired(session))


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_a_region_stands_for_its_span_of_the_allocation(rig: Rig) -> None:
    info = await rig.desk.register(CALLER, wanted(offset=4096, nbytes=100, label="kv", access=Access.READ))
    assert (info.source, info.nbytes, info.device, info.agent) == (RegionSource.DEVICE, 100, 0, "alice")
    backing = rig.regions.backing(info.id)
    assert backing.position == 1 << ALLOCATION_SHIFT | 4096
    assert rig.memory.owners == {1: "alice"}
    whole = await rig.desk.register(CALLER, wanted(offset=4096))
    assert whole.nbytes == 4096
    await rig.end()
    assert rig.memory.open_allocations == set()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"device_uuid": b"x"}, InvalidArgument),
        ({"device_uuid": UUID + b"\0"}, InvalidArgument),
        ({"device_uuid": b"another GPU 0000"}, NotFound),
        ({"handle": b"h" * 63}, InvalidArgument),
        ({"allocation_nbytes": 0}, InvalidArgument),
        ({"allocation_nbytes": 1 << 40}, InvalidArgument),
        ({"offset": 8192}, OutOfBounds),
        ({"offset": 1, "nbytes": 8192}, OutOfBounds),
        ({"offset": (1 << 64) - 1, "nbytes": (1 << 64) - 1}, OutOfBounds),
    ],
    ids=str,
)
async def test_wrong_values_are_refused_before_a_worker_hears_of_them(rig: Rig, changes: Any, error: Any) -> None:
    with pytest.raises(error) as told:
        await rig.desk.register(CALLER, wanted(**changes))
    assert told.value.remedy
    assert rig.memory.open_allocations == set()
    assert len(rig.regions) == 0


async def test_a_session_that_ended_meanwhile_leaves_nothing_open(rig: Rig) -> None:
    rig.memory.gate.clear()
    registering = asyncio.create_task(rig.desk.register(CALLER, wanted()))
    await asyncio.sleep(0)
    await rig.end()
    rig.memory.gate.set()
    with pytest.raises(Closed):
        await registering
    assert rig.memory.open_allocations == set()


async def test_a_passed_fd_is_closed_whatever_happens(rig: Rig) -> None:
    for changes in ({}, {"offset": 9000}):
        read, write = os.pipe()
        os.close(write)
        if changes:
            with pytest.raises(OutOfBounds):
                await rig.desk.register_fd(CALLER, read, wanted(handle=b"", **changes))
        else:
            info = await rig.desk.register_fd(CALLER, read, wanted(handle=b""))
            with pytest.raises(Unsupported):
                rig.desk.export(CALLER, info.id)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read)


async def test_an_export_is_for_the_owner_and_for_those_with_access(rig: Rig) -> None:
    info = await rig.desk.register(CALLER, wanted(offset=4096))
    export = rig.desk.export(CALLER, info.id)
    assert (export.handle, export.allocation_nbytes, export.offset, export.driver) == (
        b"h" * 64,
        8192,
        4096,
        "simulated",
    )
    with pytest.raises(PermissionDenied):
        rig.desk.export(OTHER, info.id)
    shared = await rig.desk.register(CALLER, wanted(access=Access.READ))
    assert rig.desk.export(OTHER, shared.id).offset == 0


async def test_a_group_of_a_pool_that_cannot_be_entered_is_given_back(rig: Rig) -> None:
    rig.pools["vram"] = DevicePool("vram", 0, 1 << 16, rig.memory)
    await rig.end()
    with pytest.raises(Closed):
        await rig.desk.allocate(ALICE, "alice", AllocateRequest((4096, 4096), "vram"))
    assert rig.pools["vram"].info().used_nbytes == 0
    (info,) = await rig.desk.allocate(BOB, "bob", AllocateRequest((4096,), "vram"))
    assert (info.pool, info.kind.value) == ("vram", "VRAM")
    assert rig.desk.export(OTHER, info.id).offset == info.pool_offset


async def test_events_belong_to_a_session_and_to_a_gpu(rig: Rig) -> None:
    made = await rig.desk.open_event(CALLER, 0, b"")
    opened = await rig.desk.open_event(CALLER, 0, b"e" * 64)
    assert (bool(made.handle), opened.handle) == (True, b"")
    rig.desk.check_events(ALICE, (made.event, opened.event), frozenset({0}))
    rig.desk.check_events(ALICE, (0, 0), frozenset())
    for session, event, touched in (
        (BOB, made.event, {0}),
        (ALICE, 99, {0}),
        (ALICE, made.event, {1}),
        (ALICE, made.event, ()),
    ):
        with pytest.raises(InvalidArgument):
            rig.desk.check_events(session, (0, event), frozenset(touched))
    with pytest.raises(NotFound):
        await rig.desk.open_event(CALLER, 1, b"")
    with pytest.raises(InvalidArgument):
        await rig.desk.open_event(CALLER, 0, b"e")
    for _ in range(devices.MAX_EVENTS - 2):
        await rig.desk.open_event(CALLER, 0, b"")
    with pytest.raises(LimitExceeded):
        await rig.desk.open_event(CALLER, 0, b"")
    await rig.desk.end_owner(ALICE, "alice")
    with pytest.raises(InvalidArgument):
        rig.desk.check_events(ALICE, (made.event,), frozenset({0}))
    assert ("end_owner", "alice") in rig.memory.calls


async def test_who_moves_too_long_in_the_memory_of_a_session_that_ends_is_cut_off(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CUT_AFTER_S", 0.01)
    info = await rig.desk.register(CALLER, wanted(access=Access.READ))
    rig.regions.hold([info.id], "transfer 1", "test", LocalActor(BOB), write=False)
    await rig.desk.end_memory(BOB)
    assert rig.memory.calls == []
    rig.regions.retire(ALICE)
    await rig.desk.end_memory(ALICE)
    assert rig.memory.calls == [("cut", 1)], "what is held must not be let go of"
    rig.regions.release("transfer 1")
    await rig.desk.end_memory(ALICE)
    await rig.end()
    assert rig.memory.calls == [("cut", 1), ("close", 1)]


async def test_gpu_memory_goes_before_other_regions_that_are_held_for_long(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow reader of host memory of a dead client must not keep its GPU memory from the driver."""
    monkeypatch.setattr(devices, "CUT_AFTER_S", 0.01)
    rig.pools["vram"] = DevicePool("vram", 0, 1 << 16, rig.memory)
    await rig.desk.register(CALLER, wanted())
    (other,) = await rig.desk.allocate(ALICE, "alice", AllocateRequest((4096,), "vram", Access.READ))
    rig.regions.hold([other.id], "transfer 1", "test", LocalActor(BOB), write=False)
    rig.regions.retire(ALICE)
    rig.memory.calls.clear()
    await rig.desk.end_memory(ALICE)
    assert rig.memory.calls == [("close", 1)]
    rig.regions.release("transfer 1")
    await rig.end()
    assert rig.memory.calls.count(("close", 1)) == 1


async def test_host_memory_is_taken_from_workers_before_it_is_unmapped(rig: Rig) -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    backing = open_memfd(fd)
    backing.host = rig.desk.add_host(backing.position, backing.nbytes, fd)
    os.close(fd)
    assert rig.memory.hosts
    await rig.desk.let_go([backing])
    assert not rig.memory.hosts
    assert backing.view() is not None
    backing.close()


async def test_without_a_file_descriptor_to_spare_host_memory_is_refused(rig: Rig) -> None:
    class Full(NoDevices):
        def add_host(self, address: int, nbytes: int, fd: int) -> int:
            raise OSError(24, "Too many open files")

    with pytest.raises(Overloaded, match="Too many open files"):
        DeviceDesk(rig.regions, Full(), {}).add_host(0, 1, 0)


async def test_without_a_backend_for_gpus_it_says_what_to_configure() -> None:
    desk = DeviceDesk(RegionTable("n", 1, 4), NoDevices(), {})
    with pytest.raises(Unsupported) as told:
        await desk.register(CALLER, wanted())
    assert "backends.cuda" in told.value.remedy
    with pytest.raises(NotFound):
        await desk.open_event(CALLER, 0, b"")
    assert desk.infos() == []
    await desk.drop_host(desk.add_host(0, 1, 0))
    await desk.end_memory(ALICE)
    await desk.end_owner(ALICE, "alice")
