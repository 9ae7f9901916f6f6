"""What moves the bytes of a simulated GPU: a thread, and the events that order it with other processes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np

from xferd.api import simulated as handles
from xferd.api.errors import XferdError
from xferd.plugins import vectored
from xferd.plugins.cuda.driver import Pieces, Plan, ThreadFlight
from xferd.plugins.cuda.layout import Engine

KERNEL_PIECES = 8
"""From so many pieces on a move counts as a kernel's, so that both names are met."""

_EVENT_STEP_S = 50e-6
"""Between two looks at an event that a move waits for. A GPU looks too: an event is a word in memory."""


@dataclass(slots=True, eq=False)
class SimulatedEvent:
    """An event's page, as ``api/simulated.py`` has it."""

    page: memoryview

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


class SimulatedFlight(ThreadFlight):
    """A move by the copier. With an ``error`` from the start nothing is moved."""

    def __init__(
        self, plan: SimulatedPlan, wait: tuple[SimulatedEvent, int] | None, done: tuple[SimulatedEvent, int] | None
    ) -> None:
        super().__init__()
        self.plan = plan
        self.wait = wait
        self.done = done


class Copier(threading.Thread):
    """The device: moves bytes, one flight after another, but lets none wait for the event of another."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(name="simulated device", daemon=True)
        self.flights: queue.SimpleQueue[SimulatedFlight] = queue.SimpleQueue()
        self._delay_s = delay_s

    def run(self) -> None:
        """Move until the process ends."""
        held: list[SimulatedFlight] = []
        while True:
            with contextlib.suppress(queue.Empty):
                held.append(self.flights.get(timeout=_EVENT_STEP_S if held else None))
            for one in [one for one in held if one.wait is None or one.wait[0].is_reached(one.wait[1])]:
                held.remove(one)
                self._fly(one)

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
