"""Host memory of clients is known to device workers exactly as long as it is a region."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import pytest
from fake_devices import FakeDevices

from xferd.api.errors import Closed
from xferd.api.types import Access, Caller, SessionId
from xferd.daemon.memory import desk as desks
from xferd.daemon.memory.desk import MemoryDesk
from xferd.daemon.memory.devices import DeviceDesk
from xferd.daemon.memory.regions import RegionTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.memory.backing import Backing

NBYTES = 8192
ALICE = SessionId("s-alice")
CALLER = Caller(ALICE, "alice")


class NoStorage:
    """There are no storage pools."""

    async def free(self, backings: Sequence[Backing]) -> None:
        assert not backings


class Rig:
    def __init__(self) -> None:
        self.memory = FakeDevices()
        self.regions = RegionTable("n", 1, 8)
        devices = DeviceDesk(self.regions, self.memory, {})
        none = cast("Any", {})
        self.desk = MemoryDesk("n", 1, self.regions, {}, none, none, {}, cast("Any", NoStorage()), devices, max_group=8)

    async def register(self) -> None:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(fd, NBYTES)
        await self.desk.register_memfd(CALLER, fd, NBYTES, Access.NONE, "")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


async def test_workers_forget_host_memory_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    await rig.register()
    [(_, nbytes)] = rig.memory.hosts.values()
    assert nbytes == NBYTES
    close, known = desks.close_backings, []
    monkeypatch.setattr(desks, "close_backings", lambda gone: (known.append(len(rig.memory.hosts)), close(gone)))
    await rig.desk.close_session(ALICE)
    assert known == [0]


async def test_host_memory_that_became_no_region_is_no_workers() -> None:
    rig = Rig()
    rig.regions.retire(ALICE)
    rig.regions.remove_retired(ALICE)
    with pytest.raises(Closed):
        await rig.register()
    assert not rig.memory.hosts
    assert [call[0] for call in rig.memory.calls] == ["drop_host"]
