"""The object backend passes the suite that every backend must pass, as far as objects are read.

They are written as a whole only, which the suite's shapes are not: ``tests/integration/test_object_backend.py``.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from arenas import MappedArena, ProcessArena
from check_backend import CHECKS, Arena, Rig

from xferd.plugins.base import ObjectSpace, ObjectVersion, SpaceKind
from xferd.plugins.object import ObjectBackend, ObjectOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from check_backend import Pair


class ObjectArena(Arena):
    """An object of a directory; the version is not pinned, because each ``fill`` makes another."""

    base = 0

    def __init__(self, root: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        handle, name = tempfile.mkstemp(dir=root)
        os.close(handle)
        self.path = Path(name)
        self.fill(np.zeros(nbytes, dtype=np.uint8))
        self.space = ObjectSpace("dir", self.path.name, nbytes, ObjectVersion("", nbytes))

    def fill(self, data: np.ndarray) -> None:
        self.path.write_bytes(data.tobytes())

    def read(self) -> np.ndarray:
        return np.frombuffer(self.path.read_bytes(), dtype=np.uint8)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class ObjectRig(Rig):
    def __init__(self, root: Path, **options: object) -> None:
        self._root = root
        stores = {"dir": {"url": f"file://{root}", "max_concurrency": 3}}
        self.backend = ObjectBackend(ObjectOptions.model_validate({"stores": stores, **options}))

    def pairs(self) -> frozenset[Pair]:
        return frozenset(pair for pair in self.backend.pairs() if pair[0] is SpaceKind.OBJECT)

    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        if kind is SpaceKind.OBJECT:
            return ObjectArena(self._root, nbytes)
        return MappedArena(nbytes) if kind is SpaceKind.MAPPED else ProcessArena(nbytes)

    def broken(self, pair: Pair) -> tuple[Arena, Arena] | None:
        source, target = self.arena(pair[0], 4096), self.arena(pair[1], 4096)
        if isinstance(target, ProcessArena):
            target.kill()
        else:
            source.close()
        return source, target


def maker_of(**options: object):
    @asynccontextmanager
    async def maker() -> AsyncIterator[ObjectRig]:
        with tempfile.TemporaryDirectory(prefix="xf") as root:
            yield ObjectRig(Path(root), **options)

    return maker


MAKERS = {
    "defaults": maker_of(),
    "small": maker_of(read_memory="2MiB", read_range="1MiB", merge_gap=0, movers=1, checksum=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", MAKERS)
def test_objects_conform(name, check):
    check(MAKERS[name])
