"""GPU memory without workers, for tests of what the daemon keeps of it: allocations are bytearrays."""

from __future__ import annotations

import asyncio
import itertools

from xferd.api.errors import DeviceLost, NotFound, PoolExhausted
from xferd.api.types import DeviceInfo
from xferd.plugins.devices import DeviceExport, DeviceMemory

UUID = b"fake GPU number0"


class FakeDevices(DeviceMemory):
    """One GPU of ``nbytes``. ``gate`` holds up whoever opens or wipes; ``calls`` says what was asked, in order."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        self.nbytes = nbytes
        self.memory: dict[int, bytearray] = {}
        self.counts: dict[int, int] = {}
        self.owners: dict[int, str] = {}
        self.lost: set[int] = set()
        self.hosts: dict[int, tuple[int, int]] = {}
        self.calls: list[tuple[object, ...]] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._numbers = itertools.count(1)

    def facts(self) -> tuple[DeviceInfo, ...]:
        return (DeviceInfo(0, UUID, "fake", "simulated", total_nbytes=self.nbytes),)

    async def open(self, owner: str, export: DeviceExport) -> tuple[int, int]:
        await self.gate.wait()
        if export.device_uuid != UUID:
            raise NotFound("no such GPU", remedy="see the list")
        number = next(self._numbers)
        self.counts[number], self.owners[number] = 1, owner
        return 0, number

    async def allocate(self, device: int, nbytes: int) -> tuple[int, DeviceExport]:
        self._fail()
        if nbytes > self.nbytes:
            raise PoolExhausted(f"{nbytes} bytes", limit=f"{self.nbytes} bytes are free", remedy="use less")
        number = next(self._numbers)
        self.memory[number] = bytearray(b"\xff" * nbytes)
        self.counts[number] = 1
        return number, DeviceExport(UUID, nbytes, bytes([number]) * 64)

    async def close(self, allocation: int) -> None:
        self.calls.append(("close", allocation))
        self.counts[allocation] -= 1

    async def cut(self, allocation: int) -> None:
        self.calls.append(("cut", allocation))

    async def wipe(self, allocation: int, offset: int, nbytes: int) -> None:
        await self.gate.wait()
        self._fail()
        self.calls.append(("wipe", allocation, offset, nbytes))
        self.memory[allocation][offset : offset + nbytes] = bytes(nbytes)

    async def end_owner(self, owner: str) -> None:
        self.calls.append(("end_owner", owner))

    async def open_event(self, owner: str, device: int, handle: bytes) -> int:
        return next(self._numbers)

    async def make_event(self, owner: str, device: int) -> tuple[int, bytes]:
        return next(self._numbers), b"e" * 64

    def is_lost(self, allocation: int) -> bool:
        return allocation in self.lost

    def add_host(self, address: int, nbytes: int, fd: int) -> int:
        number = next(self._numbers)
        self.hosts[number] = address, nbytes
        return number

    async def drop_host(self, number: int) -> None:
        self.calls.append(("drop_host", number))
        del self.hosts[number]

    def lose(self) -> None:
        """Have the worker of the daemon's own memory die."""
        self.lost |= set(self.memory)

    @property
    def open_allocations(self) -> set[int]:
        """Those whose count is not 0."""
        assert min(self.counts.values(), default=0) >= 0
        return {number for number, count in self.counts.items() if count}

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def lost() -> DeviceLost:
    """Return what a worker's death is told as."""
    return DeviceLost("the worker died", remedy="try again")
