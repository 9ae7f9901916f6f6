"""Every backend that ships passes the suite that every backend must pass; and the suite notices one that does not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from arenas import FileArena, MappedArena, ProcessArena
from check_backend import (
    CHECKS,
    Rig,
    check_cancellation,
    check_close,
    check_concurrency,
    check_exact,
    check_failures,
    check_large,
    check_many_rows,
)
from device_rig import device_maker, gds_maker
from tcp_rig import tcp_maker

from xferd.plugins.base import FileSpace, SpaceKind
from xferd.plugins.faulty import FaultOptions, FaultyBackend, FaultyOptions
from xferd.plugins.local import LocalBackend, LocalOptions
from xferd.plugins.posix import PosixBackend, PosixOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from check_backend import Arena, Maker, Pair

    from xferd.plugins.base import Backend, Chunk


class NodeRig(Rig):
    """Memory of this node for backends that need no other."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        kinds = {SpaceKind.MAPPED: MappedArena, SpaceKind.PROCESS: ProcessArena, SpaceKind.FILE: FileArena}
        return kinds[kind](nbytes)

    def broken(self, pair: Pair) -> tuple[Arena, Arena] | None:
        source, target = self.arena(pair[0], 4096), self.arena(pair[1], 4096)
        for arena in (source, target):
            if isinstance(arena, ProcessArena):
                arena.kill()
                return source, target
        if isinstance(source, FileArena):
            source.cut(4000)
            return source, target
        if isinstance(target, FileArena):
            target.space = FileSpace(-1, "closed")
            return source, target
        for arena in (source, target):
            arena.close()
        return None


def maker_of(make) -> Maker:
    @asynccontextmanager
    async def maker() -> AsyncIterator[NodeRig]:
        yield NodeRig(make())

    return maker


def faulty(*faults: FaultOptions, inner: Backend | None = None) -> FaultyBackend:
    return FaultyBackend(
        FaultyOptions(inner="local", faults=faults), inner or LocalBackend(LocalOptions()), owns_inner=True
    )


MAKERS = {
    "local": maker_of(lambda: LocalBackend(LocalOptions())),
    "local-one-mover": maker_of(lambda: LocalBackend(LocalOptions(movers=1))),
    "posix": maker_of(lambda: PosixBackend(PosixOptions())),
    "posix-threads": maker_of(lambda: PosixBackend(PosixOptions(engine="threads"))),
    "posix-unmapped": maker_of(lambda: PosixBackend(PosixOptions(mapped_reads=False))),
    "posix-shallow": maker_of(lambda: PosixBackend(PosixOptions(queue_depth=3, bounce=256 << 10))),
    "posix-direct": maker_of(lambda: PosixBackend(PosixOptions(direct=True))),
    "posix-direct-threads": maker_of(lambda: PosixBackend(PosixOptions(direct=True, engine="threads", movers=4))),
    "posix-direct-small-bounce": maker_of(lambda: PosixBackend(PosixOptions(direct=True, bounce=256 << 10))),
    "posix-fsync": maker_of(lambda: PosixBackend(PosixOptions(movers=3, fsync="data"))),
    "faulty-local": maker_of(faulty),
    "faulty-posix": maker_of(lambda: faulty(inner=PosixBackend(PosixOptions()))),
    "tcp": tcp_maker,
    "cuda-simulated": device_maker(),
    "cuda-simulated-bounce": device_maker(shares_host=False),
    "gds-simulated": gds_maker(),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", MAKERS)
def test_backend_conforms(name, check):
    check(MAKERS[name])


# ------------------------------------------------------------------------------------------ the suite can fail


class Careless(LocalBackend):
    """Comes back from a cancelled move at once, and moves its bytes later."""

    def __init__(self) -> None:
        super().__init__(LocalOptions())
        self._left: list[Chunk] = []

    async def move(self, chunk: Chunk) -> int:
        for left in self._left:
            await super().move(left)
        self._left.clear()
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._left.append(chunk)
            raise
        return await super().move(chunk)


class OneByteOff(LocalBackend):
    """Moves all but the last byte of a chunk that has several, and says that it moved all."""

    async def move(self, chunk: Chunk) -> int:
        if chunk.nbytes > 1:
            short = type(chunk)(
                chunk.source.cut(0, chunk.nbytes - 1), chunk.target.cut(0, chunk.nbytes - 1), chunk.nbytes - 1, "", ""
            )
            return await super().move(short) + 1
        return await super().move(chunk)


class StaysOpen(LocalBackend):
    """Goes on after its close."""

    async def aclose(self) -> None:
        pass


class Foreign(PosixBackend):
    """Lets an error of the system through."""

    async def move(self, chunk: Chunk) -> int:
        try:
            return await super().move(chunk)
        except Exception as exc:
            raise OSError("raw") from exc


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "make", "noticed"),
    [
        (check_cancellation, Careless, AssertionError),
        (check_many_rows, lambda: OneByteOff(LocalOptions()), AssertionError),
        (check_concurrency, lambda: OneByteOff(LocalOptions()), AssertionError),
        (check_exact, lambda: faulty(FaultOptions(kind="corrupt")), AssertionError),
        (check_large, lambda: faulty(FaultOptions(kind="short", mode="lie")), AssertionError),
        (check_many_rows, lambda: faulty(FaultOptions(kind="short", mode="hide")), AssertionError),
        (check_close, lambda: StaysOpen(LocalOptions()), AssertionError),
        (check_failures, lambda: Foreign(PosixOptions()), OSError),
    ],
)
def test_suite_notices(check, make, noticed):
    with pytest.raises(noticed):
        check(maker_of(make))
