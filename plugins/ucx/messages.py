"""What moves over UCX: messages, and the endpoints by which they go."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from xferd.plugins import vectored
from xferd.plugins.ucx import library as lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from xferd.api.errors import XferdError
    from xferd.plugins.base import IovTable


class Endpoint:
    """A connection to a peer's worker. ``failure`` is why it is no longer good; it is never good again then."""

    def __init__(self, node: str, address: bytes) -> None:
        self.node = node
        self.address = address
        self.failure = ""
        self.handle: int | None = None
        self.operations: set[Operation] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._waiting: list[Callable[[], None]] = []

    async def closed(self) -> None:
        """Return when it was cut and nothing of it is left, so that another one to the same peer may be opened."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not done.done():
                done.set_result(None)

        def tell() -> None:
            loop.call_soon_threadsafe(settle)

        with self._lock:
            if self._is_closed:
                return
            self._waiting.append(tell)
        await done

    def note_closed(self) -> None:
        """Let go of who waits for it; from the worker's thread."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell()


class Operation:
    """One message that is sent or received. ``error`` and ``moved`` are set when ``on_end`` is called.

    By then UCX touches no memory of ``table`` any more.
    """

    __slots__ = (
        "endpoint",
        "error",
        "is_send",
        "moved",
        "nbytes",
        "on_end",
        "param",
        "request",
        "status",
        "table",
        "tag",
    )

    def __init__(
        self, endpoint: Endpoint, table: IovTable, tag: int, on_end: Callable[[Operation], None], *, is_send: bool
    ) -> None:
        self.endpoint = endpoint
        self.table = table
        self.tag = tag
        self.nbytes = vectored.total_nbytes(table)
        self.on_end = on_end
        self.is_send = is_send
        self.request: int | None = None
        self.moved = 0
        self.status = lib.IN_PROGRESS
        self.error: XferdError | None = None
        one_row = len(table) == 1
        self.param = lib.RequestParam(
            op_attr_mask=lib.OP_DATATYPE | lib.OP_NO_IMMEDIATE,
            datatype=lib.DATATYPE_BYTES if one_row else lib.DATATYPE_IOV,
        )

    @property
    def span(self) -> tuple[int, int]:
        """Buffer and count as the datatype wants them."""
        if len(self.table) == 1:
            return int(self.table[0, 0]), int(self.table[0, 1])
        return int(self.table.ctypes.data), len(self.table)
