"""``[backends.cuda]``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xferd.api.spinning import SPIN_ON_MANY_S, has_many_cores
from xferd.plugins.options import Nbytes, Options, Seconds

SPIN_ON_FEW_S = 200e-6
"""A worker's where there are few cores; the daemon sleeps there."""


class CudaOptions(Options):
    """GPUs, and the workers that use them.

    Attributes:
        driver: "cuda", or "simulated": host memory that behaves as GPUs, for tests and machines without one.
        devices: numbers of the GPUs to use, as the driver counts them; empty takes all that there are.
        spin: how long an idle worker looks for commands without sleeping, and the daemon's event loop, which goes on
            serving others, for its answers; a core each is busy meanwhile. To be woken costs both more than a small
            move does. "auto" is 2 ms where there are many cores; else 200 us, by the worker alone.
        command_timeout: the longest that a command may take, beside a second for each GiB; a worker that takes longer
            is killed.
        start_timeout: for a worker to make its context.
        slots: chunks under way at once on one device.
        simulated_nbytes: memory of each simulated device.
        simulated_devices: how many there are.
    """

    driver: Literal["cuda", "simulated"] = "cuda"
    devices: tuple[Annotated[int, Field(strict=True, ge=0, lt=256)], ...] = ()
    spin: Literal["auto"] | Seconds = "auto"
    command_timeout: Annotated[Seconds, Field(gt=0)] = 10.0
    start_timeout: Annotated[Seconds, Field(gt=0)] = 30.0
    slots: Annotated[int, Field(strict=True, ge=1, le=64)] = 8
    simulated_nbytes: Annotated[Nbytes, Field(ge=4096)] = 1 << 30
    simulated_devices: Annotated[int, Field(strict=True, ge=1, le=64)] = 1

    @property
    def worker_spin_s(self) -> float:
        """How long a worker spins."""
        if self.spin != "auto":
            return self.spin
        return SPIN_ON_MANY_S if has_many_cores() else SPIN_ON_FEW_S

    @property
    def daemon_spin_s(self) -> float:
        """How long the event loop keeps looking after the last command and the last answer."""
        if self.spin != "auto":
            return self.spin
        return SPIN_ON_MANY_S if has_many_cores() else 0.0
