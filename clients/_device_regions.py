"""What a client knows of its GPU memory: what it has registered, so that it is done once, and what it has opened.

Registrations are found again by the allocation's own name, which the driver never gives twice, and by the span in it:
the same memory registered again is the same region, counted. Nothing here waits or speaks to the daemon.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xferd.api import types as t
from xferd.api.errors import NotFound, Unsupported
from xferd.clients import _dlpack as dlpack
from xferd.clients._device_driver import CUDA, ClientDriver, Exported, driver_named
from xferd.clients.devices import CudaArray, DeviceArray, DeviceSpan, Event, SimulatedArray, device_span, handle_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xferd.clients._device_driver import Allocation
    from xferd.clients.devices import ElementShape


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two registrations the same."""

    driver: str
    buffer_id: int
    offset: int
    nbytes: int
    access: t.Access
    writable: bool
    label: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A registration that is asked for."""

    key: Key
    span: DeviceSpan
    allocation: Allocation
    driver: ClientDriver

    def request(self, exported: Exported) -> t.RegisterDeviceRequest:
        """Return what the daemon is asked for."""
        return t.RegisterDeviceRequest(
            device_uuid=self.allocation.device_uuid,
            allocation_nbytes=self.allocation.nbytes,
            handle=exported.handle,
            offset=self.key.offset,
            nbytes=self.key.nbytes,
            access=self.key.access,
            label=self.key.label,
            writable=self.key.writable,
        )


def wanted(array: Any, access: t.Access, label: str, writable: bool | None) -> Wanted:
    """Look at what is to be registered, without a call of the daemon.

    Raises:
        XferdError: as ``device_span`` and ``ClientDriver.allocation_of``.
    """
    span = device_span(array)
    driver = driver_named(span.driver)
    allocation = driver.allocation_of(span)
    can_write = span.writable if writable is None else writable
    offset = span.address - allocation.address
    return Wanted(
        Key(driver.name, allocation.buffer_id, offset, span.nbytes, access, can_write, label), span, allocation, driver
    )


@dataclass(slots=True)
class _Entry:
    info: t.RegionInfo
    span: DeviceSpan
    key: Key
    count: int = 1


class Mapping:
    """An allocation of another process, mapped for as long as anybody has this object."""

    def __init__(self, driver: ClientDriver, handle: t.DeviceHandle) -> None:
        self.handle = handle
        self.driver = driver
        self.address = driver.open(handle)
        finalizer = weakref.finalize(self, driver.close, handle, self.address)
        finalizer.atexit = False  # the driver may have gone before, and the process's end unmaps all


@dataclass
class DeviceBook:
    """One client's. Safe between threads; holds no lock while a driver or the daemon works."""

    _entries: dict[t.RegionId, _Entry] = field(default_factory=dict)
    _by_key: dict[Key, t.RegionId] = field(default_factory=dict)
    _mappings: weakref.WeakValueDictionary[bytes, Mapping] = field(default_factory=weakref.WeakValueDictionary)
    _pools: dict[str, Mapping] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opening: threading.Lock = field(default_factory=threading.Lock)

    # -- what is registered

    def again(self, key: Key) -> t.RegionInfo | None:
        """Return the region that the same memory has already, counted once more."""
        with self._lock:
            region = self._by_key.get(key)
            if region is None:
                return None
            entry = self._entries[region]
            entry.count += 1
            return entry.info

    def add(self, wanted: Wanted, info: t.RegionInfo) -> None:
        """Note a new region, and keep its memory alive."""
        with self._lock:
            self._entries[info.id] = _Entry(info, wanted.span, wanted.key)
            self._by_key.setdefault(wanted.key, info.id)

    @contextlib.contextmanager
    def freeing(self, regions: Sequence[t.RegionId]) -> Iterator[list[t.RegionId]]:
        """Take a count off each region, and give those whose last it was, to be freed; undone if that raises."""
        with self._lock:
            others = [region for region in regions if region not in self._entries]
            counts = Counter(region for region in regions if region in self._entries)
            last = others + [region for region, count in counts.items() if not self._take(region, count)]
        try:
            yield last
        except BaseException:
            with self._lock:
                for region, count in counts.items():
                    self._put_back(region, count)
            raise
        with self._lock:
            for region in last:
                self._entries.pop(region, None)

    def _take(self, region: t.RegionId, count: int) -> int:
        entry = self._entries[region]
        entry.count -= count
        if entry.count <= 0 and self._by_key.get(entry.key) == region:
            del self._by_key[entry.key]  # whoever wants the memory again meanwhile gets a new region
        return max(entry.count, 0)

    def _put_back(self, region: t.RegionId, count: int) -> None:
        entry = self._entries.get(region)
        if entry is not None:
            entry.count += count
            self._by_key.setdefault(entry.key, region)

    # -- arrays

    def own_array(self, region: t.RegionId, elements: ElementShape) -> DeviceArray | None:
        """Return memory that this client has registered, which it cannot open as another's; None for other regions."""
        entry = self._entries.get(region)
        if entry is None:
            return None
        span, driver = entry.span, driver_named(entry.span.driver)
        uuid = driver.allocation_of(span).device_uuid
        return _array_at(driver, uuid, span.address, elements, span, is_read_only=not entry.info.writable)

    def array(self, info: t.RegionInfo, handle: t.DeviceHandle, elements: ElementShape, agent: str) -> DeviceArray:
        """Return a region in an allocation of the daemon's or of another client, which is mapped if it was not."""
        mapping = self._mapping(info.pool, handle)
        is_read_only = not info.writable or (info.agent != agent and t.Access.WRITE not in info.access)
        address = mapping.address + handle.offset
        return _array_at(mapping.driver, handle.device_uuid, address, elements, mapping, is_read_only=is_read_only)

    def _mapping(self, pool: str, handle: t.DeviceHandle) -> Mapping:
        """Map an allocation once, however many regions are in it.

        A pool stays mapped while the client is attached, as one of host memory does; the rest while it is used.
        """
        with self._opening:
            mapping = self._mappings.get(handle.handle)
            if mapping is None:
                mapping = self._mappings[handle.handle] = Mapping(driver_named(handle.driver), handle)
            if pool:
                self._pools[pool] = mapping  # another one than before if the pool was lost and made anew
            return mapping

    def note_event(self, event: Event) -> Event:
        """Keep an event until the session ends."""
        self._events.append(event)
        return event

    def clear(self) -> None:
        """Forget everything: the session is over. What consumers still have stays mapped for them."""
        with self._lock:
            self._entries.clear()
            self._by_key.clear()
            self._pools.clear()
            events, self._events = self._events, []
        for event in events:
            event.drop()


def check_exportable(info: t.RegionInfo, node: str) -> None:
    """Check that a region is GPU memory of this node.

    Raises:
        Unsupported: it is not.
    """
    if info.kind is not t.MemoryKind.VRAM or info.node != node:
        raise Unsupported(
            f"region {info.id} ({info.kind.value} on {info.node}) is no GPU memory of this node",
            limit=f"VRAM regions of {node}",
            remedy="use array() for memory of the host, and a transfer for other nodes",
        )


def _array_at(
    driver: ClientDriver, device_uuid: bytes, address: int, elements: ElementShape, keep: object, *, is_read_only: bool
) -> DeviceArray:
    if driver.name == CUDA:
        return CudaArray(address, (dlpack.CUDA, driver.ordinal(device_uuid)), elements, keep, is_read_only=is_read_only)
    return SimulatedArray(address, (dlpack.CPU, 0), elements, keep, is_read_only=is_read_only)


# --------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class WantedEvent:
    """An event of this process that the daemon is to open: ours, or ``owner``'s, of another library."""

    device: int
    handle: bytes
    driver: ClientDriver
    event: int = 0
    owner: object = None

    def opened(self, told: t.DeviceEvent) -> Event:
        """Return it with the daemon's number."""
        return Event(told.event, None if self.event == 0 else self.driver, self.event, self.owner)


def wanted_event(devices: Sequence[t.DeviceInfo], event: object, device: int | None) -> WantedEvent:
    """Make an event on a device of the daemon, or take another library's.

    Raises:
        NotFound: the daemon has no such device, or none that this thread uses now.
    """
    if device is None:
        usable = [info for info in devices if not info.reason]
        uuids = {driver_named(name).current_device() for name in {info.driver for info in usable}}
        found = next((info for info in usable if info.device_uuid in uuids), None)
    else:
        found = next((info for info in devices if info.index == device), None)
    if found is None:
        raise NotFound(
            f"device {device}" if device is not None else "the device that this thread uses",
            limit=f"the daemon's devices {[info.index for info in devices]}",
            remedy="name one of devices()",
        )
    driver = driver_named(found.driver)
    if event is None:
        made = driver.make_event(found.device_uuid)
        return WantedEvent(found.index, driver.event_handle(made), driver, made)
    handle, number = handle_of(event)
    return WantedEvent(found.index, handle or driver.event_handle(number), driver, owner=event)


def opened_event(devices: Sequence[t.DeviceInfo], device: int, told: t.DeviceEvent) -> Event:
    """Open an event that the daemon has made."""
    info = next(info for info in devices if info.index == device)
    driver = driver_named(info.driver)
    return Event(told.event, driver, driver.open_event(info.device_uuid, told.handle))
