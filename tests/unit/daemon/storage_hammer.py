"""Kill -9 during writes: a process that hammers a storage pool is killed again and again, and its word is checked.

``python storage_hammer.py DIRECTORY ROUNDS SEED``. Each round forks a child that opens the pool and writes until it
is killed; before each step it says what it is about to do, and after it that it is done, as a daemon tells clients
DONE. The parent kills it after a random number of words, opens the directory, and checks that every extent that was
told DONE is whole, and that no sealed block has bytes other than those that were sealed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import structlog
from storage_rig import KIB, NODE, opened, options, pattern

from xferd.daemon.storage.catalogue import SUMMED
from xferd.daemon.storage.checksums import sums_of
from xferd.daemon.storage.directory import StorageDirectory

POOL = {"nbytes": 4 << 20, "slab_nbytes": 2 << 20}


async def hammer(path: Path, out: int, seed: int) -> None:
    """Allocate, write, write again and free at random, several at a time, until killed."""
    chance = random.Random(seed)

    def say(*words: object) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    async with opened(path, **POOL) as rig:
        rig.pool.volumes[0].directory.compact_nbytes = 2 * KIB
        mine = rig.backings()

        async def live() -> None:
            while True:
                if not mine or (len(mine) < 20 and chance.random() < 0.4):
                    (made,) = await rig.allocate(chance.randrange(1, 128 * KIB))
                    say("ALLOCATED", made.extent.id)
                    mine.append(made)
                backing = mine.pop(chance.randrange(len(mine)))
                id_, nbytes = backing.extent.id, backing.extent.nbytes
                if len(mine) > 8 and chance.random() < 0.3:
                    say("FREEING", id_)
                    await rig.free(backing)
                    say("FREED", id_)
                    continue
                version = chance.randrange(1 << 30)
                say("WRITING", id_)
                await rig.write(backing, pattern(version, nbytes))
                say("DONE", id_, version)
                mine.append(backing)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(live())


def killed_after(path: Path, words: int, seed: int) -> list[list[str]]:
    """Run a child until it has said so many words, kill it, and return all that it had said by then."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        asyncio.run(hammer(path, writing, seed))
        os._exit(1)
    os.close(writing)
    said = b""
    while said.count(b"\n") < words:
        more = os.read(reading, 4096)
        assert more, f"the child ended by itself, status {os.waitpid(pid, 0)[1]}"
        said += more
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(reading, 4096):
        said += more
    os.close(reading)
    return [line.split() for line in said.decode().splitlines()]


def check(path: Path, state: dict[int, list[str]], said: list[list[str]]) -> int:
    """Check what is on the disk against what was said; returns how many extents were told DONE."""
    for word, id_, *rest in said:
        state[int(id_)] = [word, *rest]
    found = StorageDirectory(path, pool=options(path).name, node=NODE, node_id="", **POOL)
    try:
        found.check_invariants()
        extents = found.catalogue.extents
        done = 0
        for id_, (word, *rest) in list(state.items()):
            extent = extents.get(id_)
            if word in ("FREED", "FREEING") and extent is None:
                del state[id_]
                continue
            assert word != "FREED", f"extent {id_} was freed and is back"
            assert extent is not None, f"extent {id_} was told {word} and is gone"
            slab = found.slabs[extent.slab]
            if word == "DONE":
                done += 1
                assert (extent.state == SUMMED).all(), f"extent {id_} was told DONE and is not sealed"
                data = os.pread(slab.fd, extent.nbytes, extent.offset)
                assert data == pattern(int(rest[0]), extent.nbytes), f"extent {id_} has other bytes"
            sums = sums_of(slab.fd, slab.path, extent, 0, extent.blocks)
            wrong = (extent.state == SUMMED) & (sums != extent.sums)
            assert not wrong.any(), f"sealed blocks {np.flatnonzero(wrong)} of extent {id_} ({word}) have other bytes"
        known = {id_ for id_ in extents if id_ in state}
        for id_ in set(extents) - known:  # written down, and the child was killed before it could say so
            state[id_] = ["ALLOCATED"]
        for slab in found.slabs:  # what is free reads as zeros, whoever had it before
            assert all(not any(os.pread(slab.fd, n, at)) for at, n in slab.allocator.gaps()), "free room is not wiped"
        return done
    finally:
        found.close(is_clean=False)


def main() -> None:
    """Kill, look, and again."""
    path, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    chance = random.Random(seed)
    state: dict[int, list[str]] = {}
    done = snapshots = 0
    for number in range(rounds):
        said = killed_after(path, chance.randrange(1, 60), seed + number)
        done += check(path, state, said)
        snapshots = max(snapshots, *(int(p.suffix[1:]) for p in path.glob("snapshot.*")))
    print(f"{rounds} kills, {done} extents checked that were DONE, {snapshots} compactions")


if __name__ == "__main__":
    main()
