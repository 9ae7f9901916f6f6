"""``[backends.cuda]``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xferd.plugins.options import Nbytes, Options, Seconds


class CudaOptions(Options):
    """GPUs, and the workers that use them.

    Attributes:
        driver: "cuda", or "simulated": host memory that behaves as GPUs, for tests and machines without one.
        devices: numbers of the GPUs to use, as the driver counts them; empty takes all that there are.
        spin: how long an idle worker looks for commands without sleeping; a core is busy meanwhile.
        command_timeout: the longest that a command may take, beside a second for each GiB; a worker that takes longer
            is killed.
        start_timeout: for a worker to make its context.
        slots: chunks under way at once on one device.
        simulated_nbytes: memory of each simulated device.
        simulated_devices: how many there are.
    """

    driver: Literal["cuda", "simulated"] = "cuda"
    devices: tuple[Annotated[int, Field(strict=True, ge=0, lt=256)], ...] = ()
    spin: Seconds = 200e-6
    command_timeout: Annotated[Seconds, Field(gt=0)] = 10.0
    start_timeout: Annotated[Seconds, Field(gt=0)] = 30.0
    slots: Annotated[int, Field(strict=True, ge=1, le=64)] = 8
    simulated_nbytes: Annotated[Nbytes, Field(ge=4096)] = 1 << 30
    simulated_devices: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
