"""``[backends.posix]``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from xferd.plugins.options import Nbytes, Options
from xferd.plugins.posix.ring import MAX_DEPTH

PIECE_NBYTES = 1 << 20
"""Most that one request moves with O_DIRECT, and of a long span otherwise. Disks gain nothing from longer ones, and a
cancelled move waits for those under way."""

MIN_BOUNCE_NBYTES = 128 << 10
"""Least bounce memory of a thread."""


class PosixOptions(Options):
    """``[backends.posix]``.

    ``movers`` is the number of threads, and so of chunks that move at once; as many wait at them. ``engine``: how
    requests reach the kernel, by io_uring or by one ``preadv`` or ``pwritev`` each; "auto" takes io_uring where the
    kernel allows it. ``queue_depth``: requests under way for each thread with io_uring.

    ``mapped_reads``: what is in the page cache is read by mapping the file, where that is possible.

    ``direct`` moves files past the page cache (O_DIRECT), ``direct_below`` those below some directories; a descriptor
    that a client opened with O_DIRECT is moved so anyway. ``bounce`` bounds the memory, of all threads together, for
    what O_DIRECT does not take as it lies.

    ``fsync = "data"`` puts what a transfer wrote on the disk (``fdatasync``) before it is DONE; "none" leaves that to
    the kernel, to transfers that ask for it (``durable``), and to the client that may sync its own file.
    """

    movers: int = Field(2, ge=1, le=64)
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    queue_depth: int = Field(64, ge=1, le=MAX_DEPTH)
    mapped_reads: bool = True
    direct: bool = False
    direct_below: tuple[str, ...] = ()
    bounce: Nbytes = 16 << 20
    fsync: Literal["none", "data"] = "none"

    @field_validator("direct_below")
    @classmethod
    def _check_below(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not path.startswith("/"):
                raise ValueError(f"{path!r} is not absolute: start it with /")
        return paths

    @model_validator(mode="after")
    def _check_bounce(self) -> Self:
        least = self.movers * MIN_BOUNCE_NBYTES
        if self.bounce < least:
            raise ValueError(f"bounce is {self.bounce} bytes, and {self.movers} movers need at least {least}")
        return self

    @property
    def bounce_nbytes(self) -> int:
        """Bounce memory of one thread, in whole pages."""
        return self.bounce // self.movers // 4096 * 4096

    @property
    def piece_nbytes(self) -> int:
        """Most that one request moves: a power of two, and at most half of a thread's bounce memory."""
        half = self.bounce_nbytes // 2
        return min(PIECE_NBYTES, 1 << (half.bit_length() - 1))
