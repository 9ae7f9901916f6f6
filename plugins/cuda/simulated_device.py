"""What moves the bytes of a simulated GPU: a thread, and the events that order it with other processes."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import numpy as np

from xferd.api import simulated as handles
from xferd.api.errors import XferdError
from xferd.plugins import vectored
from xferd.plugins.cuda.driver import Flight, Pieces, Plan
from xferd.plugins.cuda.layout import Engine

KERNEL_PIECES = 8
"""From so many pieces on a move counts as a kernel's, so that both names are met."""

_EVENT_STEP_S = 50e-6
"""Between two looks at an event that a move waits for. A GPU looks too: an event is a word in memory."""


@dataclass(slots=True, eq=False)
class SimulatedEvent:
    """An event's page, as ``api/simulated.py`` has it; ``fd`` is ours."""

    page: memoryview
    fd: int

    @property
    def recorded(self) -> int:
        """How often it was recorded."""
        return int(handles.EVENT.unpack_from(self.page)[0])

    def is_reached(self, record: int) -> bool:
        """Whether what came before a record has ended."""
        return int(handles.EVENT.unpack_from(self.page)[1]) >= record

    def record(self) -> int:
        """Record it; returns which record this is."""
        record, done = handles.EVENT.unpack_from(self.page)
        handles.EVENT.pack_into(self.page, 0, record + 1, done)
        return int(record) + 1

    def reach(self, record: int) -> None:
        """Note that what came before a record has ended."""
        recorded, done = handles.EVENT.unpack_from(self.page)
        handles.EVENT.pack_into(self.page, 0, recorded, max(done, record))


class SimulatedPlan(Plan):
    """Pieces as the two tables that the copier takes."""

    def __init__(self, pieces: Pieces) -> None:
        self.nbytes = pieces.nbytes
        self.engine = Engine.KERNEL if len(pieces.table) >= KERNEL_PIECES else Engine.COPY
        self.source = np.ascontiguousarray(pieces.table[:, [0, 2]])
        self.target = np.ascontiguousarray(pieces.table[:, [1, 2]])


class SimulatedFlight(Flight):
    """A move; ``end`` is set by the copier, last of all. With an ``error`` nothing is moved."""

    def __init__(
        self, plan: SimulatedPlan, wait: tuple[SimulatedEvent, int] | None, done: tuple[SimulatedEvent, int] | None
    ) -> None:
        self.plan = plan
        self.wait = wait
        self.done = done
        self.error: XferdError | None = None
        self.taken_ns = 0
        self.end = False

    def is_done(self) -> bool:
        """Whether the copier has ended with it."""
        if self.end and self.error is not None:
            raise self.error
        return self.end

    def device_ns(self) -> int:
        """Return how long the copier was at it."""
        return self.taken_ns


class Copier(threading.Thread):
    """The device: moves bytes, one flight after another, but lets none wait for the event of another."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(name="simulated device", daemon=True)
        self.flights: queue.SimpleQueue[SimulatedFlight | None] = queue.SimpleQueue()
        self._delay_s = delay_s

    def run(self) -> None:
        """Move until ``stop``."""
        held: list[SimulatedFlight] = []
        while True:
            try:
                flight = self.flights.get(timeout=_EVENT_STEP_S if held else None)
                if flight is None:
                    return
                held.append(flight)
            except queue.Empty:
                pass
            for one in [one for one in held if one.wait is None or one.wait[0].is_reached(one.wait[1])]:
                held.remove(one)
                self._fly(one)

    def stop(self) -> None:
        """End after what is under way."""
        self.flights.put(None)
        self.join()

    def _fly(self, flight: SimulatedFlight) -> None:
        begun = time.perf_counter_ns()
        if self._delay_s:
            time.sleep(self._delay_s)
        if flight.error is None:
            try:
                vectored.copy_local(flight.plan.source, flight.plan.target)
            except XferdError as error:
                flight.error = error
        flight.taken_ns = time.perf_counter_ns() - begun
        if flight.done is not None:
            flight.done[0].reach(flight.done[1])
        flight.end = True
