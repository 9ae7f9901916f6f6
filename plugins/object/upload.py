"""An upload in parts: chunks in, in their order; an object out at the end, or nothing.

How much memory uploads have together, and what happens to an object of one chunk, is in ``writing.py``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import structlog

from xferd.api.errors import Cancelled, IntegrityError, XferdError
from xferd.plugins.object.digests import LeafHasher, attribute_of

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from typing import TypeVar

    from numpy.typing import NDArray

    from xferd.plugins.base import Chunk, Extent, ObjectSpace
    from xferd.plugins.object.store import Store, Writer
    from xferd.plugins.object.writing import Uploads

    T = TypeVar("T")

log = structlog.get_logger(__name__)


class Upload:
    """An object in parts. The writer takes bytes in order, so a chunk waits until those before it have been taken.

    It holds memory while a chunk is sent and until its parts have arrived. When no chunk is there to go on with, it
    rests: it waits for the parts and lets go of the memory. What is left of an unfinished part, less than one part,
    stays with it.
    """

    def __init__(
        self,
        uploads: Uploads,
        store: Store,
        space: ObjectSpace,
        source: Extent | None,
        part_nbytes: int,
        parts: int,
    ) -> None:
        self._uploads = uploads
        self._store = store
        self._space = space
        self._source = source
        self._part_nbytes = part_nbytes
        self._parts = parts
        self._need_nbytes = min(part_nbytes * (parts + 2), space.nbytes + 2 * part_nbytes)
        self._taken_nbytes = 0
        self._writer: Writer | None = None
        self._expected: NDArray[np.uint64] | None = None
        self._hasher: LeafHasher | None = None
        self._position = 0
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._rest: asyncio.Task[None] | None = None
        self._failure: XferdError | None = None

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk in its turn; returns when its bytes were taken, which its last part's arrival is not."""
        await self._turn(int(chunk.target.iov[0, 0]))
        try:
            writer = await self._wake_up()
            await self._write(writer, chunk)
        except BaseException as exc:
            self._fail(exc if isinstance(exc, XferdError) else Cancelled("an earlier part of the object was not sent"))
            raise
        turn = self._turns.get(self._position)
        if turn is not None and not turn.done():
            turn.set_result(None)
        else:
            self._rest = asyncio.create_task(self._go_to_rest(writer), name=f"object upload {self._store.name} rests")

    async def finish(self) -> str:
        """Make the object visible and return its etag; drop what was sent where that fails."""
        try:
            await self._wait_rest()
            self._check_unchanged()
            writer = self._writer
            assert writer is not None
            await writer.flush()
        except BaseException:
            await self.abort()
            raise
        try:
            await writer.close()
        except XferdError as error:
            self._note_left_behind(error)
            raise
        facts = await self._store.find(self._space.key)
        return "" if facts is None else facts.etag

    async def abort(self) -> None:
        """Have the store drop the parts; does not raise."""
        if self._rest is not None:
            self._rest.cancel()
            await asyncio.wait((self._rest,))
        try:
            if self._writer is not None:
                await self._writer.abort()
        except XferdError as error:
            self._note_left_behind(error)
        finally:
            self._release()

    # ------------------------------------------------------------------------------------ a chunk

    async def _turn(self, start: int) -> None:
        if self._failure is not None:
            raise self._after_failure()
        if start == self._position:
            return
        turn = self._turns[start] = asyncio.get_running_loop().create_future()
        try:
            await turn
        finally:
            self._turns.pop(start, None)

    async def _wake_up(self) -> Writer:
        """Take memory if none is held, and begin the upload if it has not been; returns the writer."""
        await self._wait_rest()
        if not self._taken_nbytes:
            self._taken_nbytes = await self._uploads.budget.take(self._need_nbytes)
        if self._writer is None:
            if self._source is not None and self._uploads.has_checksum(self._store):
                self._expected, self._hasher = await self._uploads.digest(self._source), LeafHasher()
            attributes = {} if self._expected is None else attribute_of(self._expected)
            self._writer = await self._store.writer(self._space.key, self._part_nbytes, self._parts, attributes)
        return self._writer

    async def _write(self, writer: Writer, chunk: Chunk) -> None:
        source = chunk.source.indexed()
        for start in range(0, chunk.nbytes, self._part_nbytes):
            part = source.cut(start, min(chunk.nbytes, start + self._part_nbytes))
            data = bytearray(part.nbytes)
            await self._uploads.gather(part, memoryview(data), self._hasher)
            is_begun = self._position >= self._part_nbytes
            writing = writer.write(data)
            # Until the store has answered that the upload began, nobody but this request knows how to abort it.
            await (writing if is_begun else to_its_end(writing))
            self._position += len(data)

    # ------------------------------------------------------------------------------------ rest

    async def _go_to_rest(self, writer: Writer) -> None:
        try:
            await writer.flush()
        except XferdError as error:
            self._fail(error)
        finally:
            self._release()

    async def _wait_rest(self) -> None:
        if self._rest is not None:
            await asyncio.wait((self._rest,))  # cancelled, this leaves the rest alone
        if self._failure is not None:
            raise self._after_failure()

    def _release(self) -> None:
        taken, self._taken_nbytes = self._taken_nbytes, 0
        self._uploads.budget.give_back(taken)

    # ------------------------------------------------------------------------------------ failure

    def _fail(self, error: XferdError) -> None:
        self._failure = self._failure or error
        for turn in self._turns.values():
            if not turn.done():
                turn.set_exception(self._after_failure())

    def _after_failure(self) -> XferdError:
        """Return the failure for another chunk than the one that met it first."""
        assert self._failure is not None
        error = type(self._failure)(self._failure.message, limit=self._failure.limit, remedy=self._failure.remedy)
        error.__cause__ = self._failure
        return error

    def _check_unchanged(self) -> None:
        if self._hasher is None or self._expected is None:
            return
        if not np.array_equal(self._hasher.leaves(), self._expected):
            raise IntegrityError(
                f"object {self._space.key!r} of store {self._store.name!r}: the memory changed while it was sent",
                limit="memory that nobody writes to during the transfer",
                remedy="write it again when its producer has finished",
            )

    def _note_left_behind(self, error: XferdError) -> None:
        self._uploads.left_behind += 1
        log.warning(
            "object_parts_left_behind",
            store=self._store.name,
            key=self._space.key,
            error=error.message,
            remedy="have the bucket drop unfinished uploads by a lifecycle rule",
        )


async def to_its_end(work: Awaitable[T]) -> T:
    """Await something that must not be left half done; a cancellation is raised when it has ended."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is None:
        return task.result()
    task.exception()  # seen
    raise cancelled
