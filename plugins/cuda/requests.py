"""What a device worker does when it is asked over its socket: memory, events, facts.

Rare, and synchronous: a command that comes meanwhile waits. ``loop.py`` is the loop.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from xferd.api.errors import DeviceLost, InvalidArgument, Unsupported, XferdError
from xferd.api.mapping import map_shared
from xferd.plugins.cuda import control
from xferd.plugins.cuda.tables import Missing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xferd.plugins.cuda.driver import Driver
    from xferd.plugins.cuda.kept import KeptPlans
    from xferd.plugins.cuda.tables import Places


class Requests:
    """Answers requests, and knows what they brought: allocations, host memory, events."""

    def __init__(self, driver: Driver, places: Places, kept: KeptPlans) -> None:
        self._driver = driver
        self._places = places
        self._kept = kept
        self._addresses: dict[int, int] = {}
        self._segments: dict[int, NDArray[np.uint8]] = {}
        self._events: dict[int, int] = {0: 0}

    def event(self, number: int) -> int:
        """Return the driver's event; 0 for 0.

        Raises:
            Missing: not one that was opened or made here.
        """
        try:
            return self._events[number]
        except KeyError:
            raise Missing from None

    def answer(self, received: control.Received) -> control.Reply:
        """Do what is asked. The fds that came along are closed.

        Raises:
            DeviceLost: the device is of no more use.
        """
        try:
            reply = self._perform(received.message, received.fds[0] if received.fds else -1)
        except DeviceLost:
            raise
        except XferdError as error:
            reply = control.Reply.of(error)
        finally:
            for fd in received.fds:
                os.close(fd)
        return replace(reply, pinned_nbytes=self._places.locked_nbytes)

    def _perform(self, message: object, fd: int) -> control.Reply:
        match message:
            case control.Open():
                self._close(message.allocation)  # a number that is given anew
                address = self._driver.open(message.nbytes, _bytes_of(message.handle), fd)
                self._enter(message.allocation, address, message.nbytes)
            case control.Allocate():
                self._close(message.allocation)
                address, handle = self._driver.allocate(message.nbytes)
                self._enter(message.allocation, address, message.nbytes)
                return control.Reply(handle=handle.hex(), free_nbytes=self._driver.free_nbytes())
            case control.Close():
                self._close(message.allocation)
                return control.Reply(free_nbytes=self._driver.free_nbytes())
            case control.Wipe():
                address = self._places.span(message.allocation, message.offset, message.nbytes)
                self._driver.wipe(address, message.nbytes)
            case control.MapHost():
                self._drop_host(message.segment)
                self._map_host(message, fd)
            case control.DropHost():
                self._drop_host(message.segment)
            case control.OpenEvent():
                self._events[message.event] = self._driver.open_event(_bytes_of(message.handle))
            case control.MakeEvent():
                self._events[message.event], handle = self._driver.make_event()
                return control.Reply(handle=handle.hex())
            case control.Ask():
                return control.Reply(free_nbytes=self._driver.free_nbytes())
            case _:
                raise Unsupported(f"a device worker cannot do {type(message).__name__}")
        return control.Reply()

    def _enter(self, number: int, address: int, nbytes: int) -> None:
        self._addresses[number] = address
        self._places.add_allocation(number, address, nbytes)

    def _close(self, number: int) -> None:
        address = self._addresses.pop(number, None)
        if address is not None:
            self._kept.drop_allocation(number)
            self._places.drop_allocation(number)
            self._driver.close(address)

    def _map_host(self, message: control.MapHost, fd: int) -> None:
        if fd < 0:
            raise InvalidArgument("host memory came without its fd", remedy="send it along")
        is_writable = True
        try:
            try:
                array = map_shared(fd, message.nbytes)
            except PermissionError:  # sealed against writing, or opened for reading
                array = map_shared(fd, message.nbytes, writable=False)
                is_writable = False
        except OSError as exc:
            raise InvalidArgument(
                f"{message.nbytes} bytes of host memory cannot be mapped: {exc.strerror}",
                remedy="raise the limits on memory of the daemon's unit",
            ) from exc
        self._segments[message.segment] = array
        own = int(array.ctypes.data)
        self._places.add_segment(message.segment, message.address, message.nbytes, own, is_writable=is_writable)

    def _drop_host(self, number: int) -> None:
        array = self._segments.pop(number, None)
        if array is None:
            return
        self._kept.drop_segment(number)
        if self._places.drop_segment(number):
            self._driver.unlock_host(int(array.ctypes.data))


def _bytes_of(handle: str) -> bytes:
    try:
        return bytes.fromhex(handle)
    except ValueError as exc:
        raise InvalidArgument(f"the handle {handle[:16]!r} is no hex number", remedy="send it as hex") from exc
