"""What every backend must do, as functions that any backend's tests can call.

Give ``check_backend`` a maker: an async context manager factory that yields a ``Rig`` with a backend that was not
started. The rig supplies real memory on both sides of every pair; the checks fill and read it by other means than the
backend. Each function in ``CHECKS`` may be called alone. They run event loops of their own.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

from xferd.api.errors import Cancelled, Closed, XferdError
from xferd.plugins.base import Backend, Begun, Chunk, Extent, LegScope, RemoteSpace, Space, SpaceKind

ARENA_NBYTES = 1 << 20
LARGE_NBYTES = 16 << 20
Row: TypeAlias = tuple[int, int]
"""(offset in the arena, nbytes)."""
Pair: TypeAlias = tuple[SpaceKind, SpaceKind]


class Arena(abc.ABC):
    """Real memory of one kind. ``base`` is the position of its first byte; ``region`` is set for REMOTE alone."""

    space: Space
    base: int
    nbytes: int
    region: int | None = None

    @abc.abstractmethod
    def fill(self, data: np.ndarray) -> None:
        """Set all bytes, without the backend."""

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """Return a copy of all bytes, without the backend."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release it."""

    def extent(self, rows: list[Row]) -> Extent:
        """Return these spans of it."""
        iov = np.array(rows, dtype=np.uint64)
        iov[:, 0] += np.uint64(self.base)
        region = None if self.region is None else np.full(len(rows), self.region, dtype=np.uint64)
        return Extent(self.space, iov, region)


class Rig(abc.ABC):
    """A backend, and the memory that it is tried on. It starts the backend with ``backend.start()`` in ``started``."""

    backend: Backend

    async def start(self) -> None:
        """Start the backend, and what it needs at the other end."""
        await self.backend.start()

    def pairs(self) -> frozenset[Pair]:
        """Return the pairs to try: all, unless the backend writes to some target only as a whole."""
        return self.backend.pairs()

    @abc.abstractmethod
    def arena(self, kind: SpaceKind, nbytes: int) -> Arena:
        """Make memory of a kind that the backend moves; the check closes it."""

    def broken(self, pair: Pair) -> tuple[Arena, Arena] | None:
        """Return arenas of a pair one of which has gone, so that a move must fail; None where that cannot be."""
        return None


Maker: TypeAlias = Callable[[], AbstractAsyncContextManager[Rig]]


def check_backend(maker: Maker) -> None:
    """Run all checks."""
    for check in CHECKS:
        check(maker)


# ------------------------------------------------------------------------------------------ the checks


def check_declarations(maker: Maker) -> None:
    """What it says of itself is consistent: pairs, refusals, estimates, slots."""

    async def main() -> None:
        async with _started(maker) as rig:
            backend = rig.backend
            assert backend.name
            assert backend.pairs()
            for pair in rig.pairs():
                with _arenas(rig, pair, 4096) as (source, target):
                    assert backend.refusal(source.space, target.space) == ""
                    assert backend.slots(source.space, target.space) >= 1
                    small = backend.estimate_s(source.space, target.space, 4096, 2)
                    large = backend.estimate_s(source.space, target.space, 1 << 30, 2)
                    pieces = backend.estimate_s(source.space, target.space, 1 << 30, 100_000)
                    assert 0 < small < large <= pieces
            strange = RemoteSpace("no-such-node", 1)
            assert backend.refusal(strange, strange)

    _run(main())


def check_exact(maker: Maker) -> None:
    """Bytes arrive in list order whatever the shapes, and no byte outside the list changes (shapes by hypothesis)."""
    with asyncio.Runner() as runner:
        stack = _started(maker)
        rig = runner.run(stack.__aenter__())
        try:
            for pair in sorted(rig.pairs(), key=str):
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    _check_shapes(runner, rig.backend, source, target)
        finally:
            runner.run(stack.__aexit__(None, None, None))


def check_many_rows(maker: Maker) -> None:
    """More rows than one system call takes, single bytes, unaligned spans, one against many."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    for left, right in _large_shapes():
                        await _move_and_compare(rig.backend, source, target, left, right)

    _run(main())


def check_large(maker: Maker) -> None:
    """One large span, and one large span in a few."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, LARGE_NBYTES) as (source, target):
                    whole = [(0, LARGE_NBYTES)]
                    thirds = [(7, 4 << 20), (5 << 20, 4 << 20), ((10 << 20) + 5, 4 << 20)]
                    await _move_and_compare(rig.backend, source, target, whole, whole)
                    await _move_and_compare(rig.backend, source, target, thirds, [(1, 12 << 20)])
                    await _move_and_compare(rig.backend, source, target, [(3, 12 << 20)], thirds)

    _run(main())


def check_move_now(maker: Maker) -> None:
    """A call made for a plan moves its bytes at once and each time, and counts them; where there is none, ``move``."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    for left, right in _small_shapes():
                        _check_now(rig.backend, source, target, left, right)

    _run(main())


def check_begin(maker: Maker) -> None:
    """A chunk that is begun moves its bytes, and its end is told once, on the event loop, and not from inside."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    for left, right in _large_shapes():
                        await _begin_and_compare(rig.backend, source, target, left, right)
                await _check_begun_fails(rig, pair)

    _run(main())


def check_begun_abort(maker: Maker) -> None:
    """No byte moves after the end of an aborted chunk was told, and the backend goes on working."""

    async def main(pair: Pair, turns: int) -> None:
        async with maker() as rig:
            await rig.start()
            try:
                with _arenas(rig, pair, LARGE_NBYTES) as (source, target):
                    await _check_aborted(rig.backend, source, target, turns)
            finally:
                await rig.backend.aclose()

    for pair, turns in itertools.product(_pairs_of(maker), (0, 1, 4, 40)):
        _run(main(pair, turns))


def check_durable(maker: Maker) -> None:
    """A backend that can flush opens legs to files as often as asked, and commits all of their chunks."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                if pair[1] is SpaceKind.FILE and rig.backend.can_flush():
                    with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                        await _check_durable(rig.backend, source, target)

    _run(main())


def check_concurrency(maker: Maker) -> None:
    """Many chunks at once, more than there are slots, each move its own bytes; the counters add up."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    await _check_concurrent(rig.backend, source, target)

    _run(main())


def check_cancellation(maker: Maker) -> None:
    """No byte moves after a cancelled move has come back, and the backend goes on working."""

    async def main(pair: Pair, turns: int) -> None:
        async with maker() as rig:
            await rig.start()
            try:
                with _arenas(rig, pair, LARGE_NBYTES) as (source, target):
                    await _check_cancelled(rig.backend, source, target, turns)
                    await _move_and_compare(rig.backend, source, target, [(0, 100)], [(5, 100)])
            finally:
                await rig.backend.aclose()

    for pair, turns in itertools.product(_pairs_of(maker), (0, 1, 4, 40)):
        _run(main(pair, turns))


def check_failures(maker: Maker) -> None:
    """What fails raises one of our errors and is counted, and the backend goes on working."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                arenas = rig.broken(pair)
                if arenas is None:
                    continue
                before = rig.backend.statistics()
                try:
                    error = await _error_of(rig.backend.move(_chunk(*arenas, [(0, 4096)], [(0, 4096)])))
                finally:
                    for arena in arenas:
                        arena.close()
                assert error is not None, f"a move between {pair} came back although one side has gone"
                after = rig.backend.statistics()
                assert (after.failures, after.chunks) == (before.failures + 1, before.chunks)
                with _arenas(rig, pair, 4096) as (source, target):
                    await _move_and_compare(rig.backend, source, target, [(0, 4096)], [(0, 4096)])

    _run(main())


def check_close(maker: Maker) -> None:
    """Closing waits for what runs, can be done twice, and ends everything; a closed backend refuses."""

    async def main() -> None:
        async with maker() as rig:
            await rig.start()
            backend = rig.backend
            for pair in list(rig.pairs())[:1]:
                with _arenas(rig, pair, LARGE_NBYTES) as (source, target):
                    moving = asyncio.ensure_future(backend.move(_chunk(source, target, *_WHOLE_LARGE)))
                    await asyncio.sleep(0)
                    begun = _begin(backend, _chunk(source, target, *_WHOLE_LARGE))
                    await backend.aclose()
                    before = target.read()
                    await asyncio.wait((moving,))
                    if begun is not None:
                        end = await begun.get()
                        assert end == LARGE_NBYTES or isinstance(end, XferdError)
                    assert moving.exception() is None or isinstance(moving.exception(), XferdError)
                    await backend.aclose()
                    error = await _error_of(backend.move(_chunk(source, target, [(0, 1)], [(0, 1)])))
                    # A peer is no longer connected when its transport is closed, which may be what is noticed first.
                    assert isinstance(error, Closed if SpaceKind.REMOTE not in pair else XferdError)
                    assert_same(target.read(), before)
                    try:
                        late = _begin(backend, _chunk(source, target, [(0, 1)], [(0, 1)]))
                        assert late is None or isinstance(await late.get(), XferdError)
                    except XferdError:
                        pass  # as good
                    assert_same(target.read(), before)
            assert backend.statistics().busy == 0

    _run(main())


def check_nothing_leaks(maker: Maker) -> None:
    """Threads, descriptors and tasks are those of before, also where moves failed or were cancelled."""

    async def main() -> None:
        async with _started(maker) as rig:
            for pair in rig.pairs():
                with _arenas(rig, pair, ARENA_NBYTES) as (source, target):
                    await _move_and_compare(rig.backend, source, target, [(0, 5000)], [(9, 5000)])
                    await _check_cancelled(rig.backend, source, target, 1)
        left = {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        assert not left, f"tasks left: {left}"

    _run(main())  # once before counting: libraries keep what they open first
    threads, fds = set(threading.enumerate()), _open_fds()
    _run(main())
    assert not {thread.name for thread in set(threading.enumerate()) - threads}
    assert _open_fds() == fds


CHECKS: tuple[Callable[[Maker], None], ...] = (
    check_declarations,
    check_exact,
    check_many_rows,
    check_large,
    check_move_now,
    check_begin,
    check_begun_abort,
    check_durable,
    check_concurrency,
    check_cancellation,
    check_failures,
    check_close,
    check_nothing_leaks,
)

# ------------------------------------------------------------------------------------------ parts of them

_WHOLE_LARGE = ([(0, LARGE_NBYTES)], [(0, LARGE_NBYTES)])


@lru_cache(maxsize=8)
def pattern(nbytes: int, seed: int) -> np.ndarray:
    """Return bytes each of which depends on its position, with no period that a block size could hit."""
    word = np.arange((nbytes + 7) // 8, dtype=np.uint64) + np.uint64(seed << 40)
    word *= np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
    word ^= word >> np.uint64(29)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    return (word ^ (word >> np.uint64(32))).view(np.uint8)[:nbytes]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare bytes; says where the first difference is, and looks for it only if there is one."""
    if not np.array_equal(found, expected):
        assert found.nbytes == expected.nbytes, f"{found.nbytes} bytes, expected {expected.nbytes}"
        wrong = np.flatnonzero(found != expected)
        raise AssertionError(f"{len(wrong)} bytes differ, the first at {wrong[0]}, the last at {wrong[-1]}")


def _run(main: object) -> None:
    with asyncio.Runner() as runner:
        runner.run(main)  # type: ignore[arg-type]  # a coroutine


@asynccontextmanager
async def _started(maker: Maker):
    async with maker() as rig:
        await rig.start()
        try:
            yield rig
        finally:
            await rig.backend.aclose()


class _arenas:  # noqa: N801  # used like a function
    def __init__(self, rig: Rig, pair: Pair, nbytes: int) -> None:
        self._pair = rig.arena(pair[0], nbytes), rig.arena(pair[1], nbytes)

    def __enter__(self) -> tuple[Arena, Arena]:
        return self._pair

    def __exit__(self, *_: object) -> None:
        for arena in self._pair:
            arena.close()


def _pairs_of(maker: Maker) -> list[Pair]:
    found: list[Pair] = []

    async def main() -> None:
        async with maker() as rig:
            found.extend(rig.pairs())
            await rig.backend.aclose()

    _run(main())
    return found


def _chunk(source: Arena, target: Arena, left: list[Row], right: list[Row], transfer: str = "t1") -> Chunk:
    nbytes = sum(size for _, size in left)
    return Chunk(source.extent(left), target.extent(right), nbytes, transfer, "cause", "agent")


def _expected(before: np.ndarray, data: np.ndarray, left: list[Row], right: list[Row]) -> np.ndarray:
    after = before.copy()
    stream = np.concatenate([data[offset : offset + size] for offset, size in left])
    done = 0
    for offset, size in right:
        after[offset : offset + size] = stream[done : done + size]
        done += size
    return after


async def _error_of(move: Coroutine[None, None, int]) -> XferdError | None:
    """Return the error that a move raises, which must be one of ours; None where it returns."""
    try:
        await move
    except XferdError as exc:
        return exc
    return None


async def _move_and_compare(backend: Backend, source: Arena, target: Arena, left: list[Row], right: list[Row]) -> None:
    chunk = _chunk(source, target, left, right)
    with _compared(backend, source, target, left, right):
        assert await backend.move(chunk) == chunk.nbytes


class _Ends:
    """What a begun chunk's end is told; more than one end fails whoever looks."""

    def __init__(self) -> None:
        self.handle: Begun | None = None
        self._ends: list[int | Exception] = []
        self._is_told = asyncio.Event()
        self._thread = threading.get_ident()

    def done(self, end: int | Exception) -> None:
        assert self.handle is not None, "told from inside begin"
        assert threading.get_ident() == self._thread, "told beside the event loop"
        self._ends.append(end)
        self._is_told.set()

    async def get(self) -> int | Exception:
        await self._is_told.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(self._ends) == 1, self._ends
        return self._ends[0]


def _begin(backend: Backend, chunk: Chunk) -> _Ends | None:
    """Begin a chunk; None where the backend leaves it to ``move``."""
    ends = _Ends()
    ends.handle = backend.begin(chunk, ends.done)
    return None if ends.handle is None else ends


async def _begin_and_compare(backend: Backend, source: Arena, target: Arena, left: list[Row], right: list[Row]) -> None:
    chunk = _chunk(source, target, left, right)
    for seed in (1, 3):  # the same tables again: what a backend keeps of them must still be right
        with _compared(backend, source, target, left, right, seed=seed):
            ends = _begin(backend, chunk)
            assert (await backend.move(chunk) if ends is None else await ends.get()) == chunk.nbytes


async def _check_durable(backend: Backend, source: Arena, target: Arena) -> None:
    assert backend.needs_leg(target.space, durable=True)
    half = source.nbytes // 2
    rows = [(0, half)], [(half, half)]
    whole = _chunk(source, target, [(0, 2 * half)], [(0, 2 * half)])
    scope = LegScope(whole.source, whole.target, whole.nbytes, "t1", "cause", "agent", durable=True)
    for seed in range(2):
        data = pattern(source.nbytes, seed)
        source.fill(data)
        leg = await backend.open_leg(scope)
        assert [await leg.move(_chunk(source, target, row, row)) for row in rows] == [half, half]
        await leg.commit()
        assert_same(target.read(), data)
        dropped = await backend.open_leg(scope)
        await dropped.move(_chunk(source, target, *rows))
        await dropped.abort()


async def _check_begun_fails(rig: Rig, pair: Pair) -> None:
    arenas = rig.broken(pair)
    if arenas is None:
        return
    before = rig.backend.statistics()
    try:
        ends = _begin(rig.backend, _chunk(*arenas, [(0, 4096)], [(0, 4096)]))
        assert ends is None or isinstance(await ends.get(), XferdError)
    finally:
        for arena in arenas:
            arena.close()
    after = rig.backend.statistics()
    assert (after.failures, after.busy) == (before.failures + (ends is not None), before.busy)


async def _check_aborted(backend: Backend, source: Arena, target: Arena, turns: int) -> None:
    whole = [(0, source.nbytes)]
    # So that connections are up, without which chunks are left to ``move``.
    await asyncio.gather(*(backend.move(_chunk(source, target, whole, whole, f"w{number}")) for number in range(4)))
    source.fill(pattern(source.nbytes, 5))
    target.fill(pattern(target.nbytes, 6))
    tried = [_begin(backend, _chunk(source, target, whole, whole, f"b{number}")) for number in range(4)]
    begun = [ends for ends in tried if ends is not None]  # more than there is room for are left to ``move``, too
    for _ in range(turns):
        await asyncio.sleep(0)
    for ends in begun:
        ends.handle.abort()
    outcomes = [await ends.get() for ends in begun]
    rested = target.read()
    assert all(end == source.nbytes or isinstance(end, Cancelled) for end in outcomes), outcomes
    assert backend.statistics().busy == 0
    for ends in begun:
        ends.handle.abort()  # too late, and fine
    last = source.nbytes - 1
    slots = backend.slots(source.space, target.space)
    await asyncio.gather(*(backend.move(_chunk(source, target, [(last, 1)], [(last, 1)])) for _ in range(slots)))
    assert_same(target.read()[:last], rested[:last])


def _check_now(backend: Backend, source: Arena, target: Arena, left: list[Row], right: list[Row]) -> None:
    chunk = _chunk(source, target, left, right)
    before = backend.statistics()
    call = backend.move_now(chunk.source, chunk.target)
    assert backend.statistics() == before, "making the call already moved or counted something"
    del chunk  # the call keeps what it needs
    for seed in (1, 3) if call is not None else ():
        with _compared(backend, source, target, left, right, seed=seed):
            assert call() == sum(size for _, size in left)


@contextmanager
def _compared(
    backend: Backend, source: Arena, target: Arena, left: list[Row], right: list[Row], *, seed: int = 1
) -> Iterator[None]:
    """Fill both sides; after the move inside, compare all bytes of both, and what was counted."""
    data, before = pattern(source.nbytes, seed), pattern(target.nbytes, seed + 1)
    source.fill(data)
    target.fill(before)
    counted = backend.statistics()
    yield
    assert_same(target.read(), _expected(before, data, left, right))
    assert_same(source.read(), data)
    after = backend.statistics()
    assert after.moved_nbytes - counted.moved_nbytes == sum(size for _, size in left)
    assert (after.chunks - counted.chunks, after.failures - counted.failures, after.busy) == (1, 0, 0)


@st.composite
def _rows(draw: st.DrawFn, total: int) -> list[Row]:
    """Spans of a total, anywhere in an arena, in any order, none overlapping another."""
    parts = []
    while total:
        parts.append(draw(st.integers(1, min(total, 9)) | st.integers(1, total)))
        total -= parts[-1]
    gaps = draw(st.lists(st.integers(0, 70), min_size=len(parts), max_size=len(parts)))
    offset, found = 0, []
    for gap, size in zip(gaps, parts, strict=True):
        found.append((offset + gap, size))
        offset += gap + size
    return draw(st.permutations(found))


def _check_shapes(runner: asyncio.Runner, backend: Backend, source: Arena, target: Arena) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(1, 20_000).flatmap(lambda total: st.tuples(_rows(total), _rows(total))))
    def example(shapes: tuple[list[Row], list[Row]]) -> None:
        runner.run(_move_and_compare(backend, source, target, *shapes))

    example()


def _large_shapes() -> list[tuple[list[Row], list[Row]]]:
    rng = np.random.default_rng(7)
    count = 3000
    places = (rng.permutation(ARENA_NBYTES // 256)[:count] * 256).tolist()
    scattered = [(place + 3, 211) for place in places]
    singles = [(place, 1) for place in places]
    longer = [(place, 211 * 4) for place in range(0, count // 4 * 1024, 1024)]
    return [
        (scattered, [(13, count * 211)]),
        ([(13, count * 211)], scattered),
        (scattered, list(reversed(scattered))),
        (scattered, longer),
        (singles, list(reversed(singles))),
        (singles, [(1, count)]),
    ]


def _small_shapes() -> list[tuple[list[Row], list[Row]]]:
    """What may be moved at once, and what is too much for it: a backend draws the line where it likes."""
    rows = [(number * 4099 + 1, 301) for number in range(32)]
    halves = [(number * 2048 + 5, 602) for number in range(16)]
    whole = [(3, 32 * 301)]
    odd = [(9, 1), (77, 32 * 301 - 2), (20_000, 1)]
    return [
        ([(0, 4096)], [(4096, 4096)]),
        ([(5, 1)], [(ARENA_NBYTES - 1, 1)]),
        (rows, list(reversed(rows))),
        *itertools.permutations((rows, halves, whole, odd), 2),
        ([(1, 64 << 10)], [(11, 64 << 10)]),
        ([(1, ARENA_NBYTES - 1)], [(0, ARENA_NBYTES - 1)]),
    ]


async def _check_concurrent(backend: Backend, source: Arena, target: Arena) -> None:
    data, before = pattern(source.nbytes, 3), pattern(target.nbytes, 4)
    source.fill(data)
    target.fill(before)
    counted = backend.statistics()
    count = 4 * backend.slots(source.space, target.space) + 3
    size = ARENA_NBYTES // count // 2
    whole = before
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            left = [(number * size * 2, size // 2), (number * size * 2 + size, size // 2)]
            right = [((count - 1 - number) * size * 2, size // 2 * 2)]
            whole = _expected(whole, data, left, right)
            group.create_task(backend.move(_chunk(source, target, left, right, f"t{number}")), name=f"move-{number}")
    assert_same(target.read(), whole)
    after = backend.statistics()
    assert after.chunks - counted.chunks == count
    assert after.moved_nbytes - counted.moved_nbytes == count * (size // 2 * 2)
    assert (after.failures, after.busy) == (counted.failures, 0)


async def _check_cancelled(backend: Backend, source: Arena, target: Arena, turns: int) -> None:
    """Cancel after some turns of the loop; the target must not change between the return and the close."""
    source.fill(pattern(source.nbytes, 5))
    target.fill(pattern(target.nbytes, 6))
    whole = [(0, source.nbytes)]
    # Several, so that some of them wait for a slot when they are cancelled.
    moves = [
        asyncio.create_task(backend.move(_chunk(source, target, whole, whole, f"c{number}")), name=f"move-{number}")
        for number in range(4)
    ]
    for _ in range(turns):
        await asyncio.sleep(0)
    for move in moves:
        move.cancel()
    await asyncio.wait(moves)
    rested = target.read()
    for move in moves:
        assert move.cancelled() or move.exception() is not None or move.result() == source.nbytes
    assert backend.statistics().busy == 0
    # A chunk moved afterwards comes behind whatever might still be under way in the same threads or lanes.
    slots = backend.slots(source.space, target.space)
    last = source.nbytes - 1
    await asyncio.gather(*(backend.move(_chunk(source, target, [(last, 1)], [(last, 1)])) for _ in range(slots)))
    assert_same(target.read()[:last], rested[:last])


def _open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
