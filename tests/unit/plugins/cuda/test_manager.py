"""What the daemon's side promises of workers: they are told what they miss, replaced when lost, and end with it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from device_rig import DeviceArena, SharedArena
from hypothesis import given, strategies as st

from xferd.api.errors import (
    Cancelled,
    DeviceLost,
    InvalidArgument,
    MoveFailed,
    NotFound,
    Stale,
    Unavailable,
    WouldBlock,
)
from xferd.api.simulated import device_uuid, export_fd
from xferd.plugins.base import ALLOCATION_SHIFT, Chunk, DeviceSpace, Extent, MappedSpace
from xferd.plugins.cuda.backend import NOW_BUDGET_S, CudaBackend
from xferd.plugins.cuda.faults import FAULTS
from xferd.plugins.cuda.manager import SELF, DeviceManager
from xferd.plugins.cuda.options import CudaOptions
from xferd.plugins.devices import DeviceExport

NBYTES = 1 << 20
MIB = 1 << 20


@asynccontextmanager
async def backend_of(spin=0.0, now_budget_s=NOW_BUDGET_S, **options):
    backend = CudaBackend(CudaOptions(driver="simulated", spin=spin, **options), now_budget_s=now_budget_s)
    await backend.start()
    try:
        yield backend
        backend.manager.check_invariants()
    finally:
        await backend.aclose()


def chunk_of(source, target, nbytes=NBYTES, agent="agent", **fields):
    return Chunk(source.extent([(0, nbytes)]), target.extent([(0, nbytes)]), nbytes, "t", "cause", agent, **fields)


def filled(backend, kinds=(DeviceArena, DeviceArena), nbytes=NBYTES):
    source, target = (kind(backend, nbytes) for kind in kinds)
    source.fill(np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8))
    return source, target


def fail(monkeypatch, text):
    monkeypatch.setenv(FAULTS, text)


async def test_a_lost_worker_is_replaced_and_told_everything_anew():
    async with backend_of() as backend:
        source, target = filled(backend, (SharedArena, DeviceArena))
        assert await backend.move(chunk_of(source, target)) == NBYTES
        first = backend.manager.live(0, "agent")
        os.kill(first.pid, signal.SIGKILL)
        target.fill(np.zeros(NBYTES, np.uint8))
        moved = 0
        while not moved:  # the end of a process is noticed by and by
            try:
                moved = await backend.move(chunk_of(source, target))
            except DeviceLost:
                assert first.is_lost
        assert (target.read() == source.read()).all()
        assert backend.facts()[0].worker_restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang=1", "stall=1"])
async def test_a_worker_that_hangs_is_killed_at_the_deadline_and_others_go_on(monkeypatch, tmp_path, fault):
    fail(monkeypatch, f"{fault},once={tmp_path / 'once'}")
    async with backend_of(command_timeout=0.5) as backend:
        source, target = filled(backend)
        stuck = asyncio.create_task(backend.move(chunk_of(source, target)))
        with pytest.raises(DeviceLost, match="not done within its time"):
            await stuck
        assert await backend.move(chunk_of(source, target)) == NBYTES
        assert (target.read() == source.read()).all()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["crash=2", "lost=2"])
async def test_a_worker_that_crashes_fails_what_was_under_way(monkeypatch, tmp_path, fault):
    fail(monkeypatch, f"{fault},once={tmp_path / 'once'}")
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.move(chunk_of(source, target))
        with pytest.raises((DeviceLost, MoveFailed)):
            await backend.move(chunk_of(source, target))
        while True:
            try:
                assert await backend.move(chunk_of(source, target)) == NBYTES
                break
            except DeviceLost:
                pass
        assert backend.statistics().busy == 0


async def test_begun_chunks_end_once_each_also_those_that_miss_memory():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.manager.worker(0, "agent")
        ends: list[int | Exception] = []
        all_ended = asyncio.Event()

        def done(end):
            ends.append(end)
            if len(ends) == 40:
                all_ended.set()

        chunk = chunk_of(source, target)
        for _ in range(40):
            assert backend.begin(chunk, done) is not None
        assert not ends
        await asyncio.wait_for(all_ended.wait(), 20)
        assert ends == [NBYTES] * 40
        assert backend.statistics().chunks == 40


async def test_an_aborted_chunk_that_misses_memory_is_told_cancelled():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.manager.worker(0, "agent")
        end = asyncio.get_running_loop().create_future()
        begun = backend.begin(chunk_of(source, target), end.set_result)
        begun.abort()
        assert isinstance(await asyncio.wait_for(end, 20), Cancelled)
        assert backend.statistics().busy == 0


async def test_a_worker_that_cannot_be_started_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    before = open_fds()
    async with backend_of() as backend:
        assert "cannot be started" in backend.facts()[0].reason
        with pytest.raises(Unavailable, match="cannot be used"):
            await backend.allocate(0, NBYTES)
    assert open_fds() == before


async def test_what_was_cancelled_is_neither_a_chunk_nor_a_failure():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.move(chunk_of(source, target))
        moving = asyncio.create_task(backend.move(chunk_of(source, target)))
        await asyncio.sleep(0)
        moving.cancel()
        await asyncio.wait((moving,))
        found = backend.statistics()
        assert moving.cancelled()
        assert (found.chunks, found.failures, found.busy) == (2, 0, 0)  # what a GPU was given it finishes


async def test_without_a_worker_nothing_is_begun():
    async with backend_of() as backend:
        source, target = filled(backend)
        assert backend.begin(chunk_of(source, target), lambda _: None) is None


async def test_the_same_handle_is_opened_once_and_closed_with_its_last_use():
    async with backend_of() as backend:
        fd = os.memfd_create("vram")
        os.ftruncate(fd, NBYTES)
        export = DeviceExport(device_uuid(0), NBYTES, export_fd(fd, NBYTES))
        found = await asyncio.gather(*(backend.open("agent", export) for _ in range(5)))
        assert len(set(found)) == 1
        number = found[0][1]
        for _ in range(4):
            await backend.close(number)
        worker = backend.manager.live(0, "agent")
        assert number in worker.opened
        await backend.close(number)
        assert number not in worker.opened
        await backend.close(number)  # late is fine
        device, other = await backend.open("agent", export)
        assert (device, other) == (0, number)  # numbers are used again, once every worker has closed them
        os.close(fd)


async def test_a_chunk_in_memory_that_was_closed_is_stale():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.move(chunk_of(source, target))
        await backend.close(source.base >> ALLOCATION_SHIFT)
        with pytest.raises(Stale):
            await backend.move(chunk_of(source, target))


async def test_an_unknown_gpu_is_named_with_those_that_are_known():
    async with backend_of(simulated_devices=2) as backend:
        with pytest.raises(NotFound, match="no GPU with UUID") as caught:
            await backend.open("agent", DeviceExport(device_uuid(7), NBYTES, bytes(64)))
        assert device_uuid(1).hex() in str(caught.value.limit)
        assert [facts.index for facts in backend.facts()] == [0, 1]


async def test_memory_moves_between_two_gpus():
    async with backend_of(simulated_devices=2) as backend:
        source, target = filled(backend)
        number = backend.manager.enter(1, "agent", DeviceExport(device_uuid(1), NBYTES, export_fd(target._fd, NBYTES)))
        row = np.array([[number.number << ALLOCATION_SHIFT, NBYTES]], dtype=np.uint64)
        there = Extent(DeviceSpace(1), row)
        chunk = Chunk(source.extent([(0, NBYTES)]), there, NBYTES, "t", "cause", "agent")
        assert await backend.move(chunk) == NBYTES
        assert (target.read() == source.read()).all()


async def test_rubbish_is_no_handle():
    async with backend_of() as backend:
        with pytest.raises(InvalidArgument):
            await backend.open("agent", DeviceExport(device_uuid(0), NBYTES, b"\x01" * 64))
        assert not backend.manager.live(0, "agent").opened


async def test_the_daemons_own_memory_is_lost_with_its_worker_and_other_memory_is_not():
    async with backend_of() as backend:
        number, export = await backend.allocate(0, NBYTES)
        assert len(export.handle) == 64
        assert not backend.is_lost(number)
        home = backend.manager.live(0, SELF)
        await home.kill("a test")
        assert backend.is_lost(number)
        await backend.wipe(number, 0, NBYTES)  # of no use, and no harm
        await backend.close(number)
        again, _ = await backend.allocate(0, NBYTES)
        assert not backend.is_lost(again)


async def test_an_event_that_a_lost_worker_made_is_stale_and_a_clients_is_opened_anew():
    async with backend_of() as backend:
        source, target = filled(backend)
        made, handle = await backend.make_event("agent", 0)
        assert len(handle) == 64
        opened = await backend.open_event("agent", 0, handle)
        await backend.move(chunk_of(source, target, done_event=made))
        await backend.move(chunk_of(source, target, wait_event=opened))
        with pytest.raises(NotFound, match="no event"):
            await backend.move(chunk_of(source, target, agent="another", wait_event=opened))
        await backend.manager.live(0, "agent").kill("a test")
        with pytest.raises(Stale, match="went with the worker"):
            await backend.move(chunk_of(source, target, done_event=made))


async def test_the_end_of_an_owner_kills_its_worker_only():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.move(chunk_of(source, target))
        await backend.move(chunk_of(source, target, agent="other"))
        mine, theirs = backend.manager.live(0, "agent"), backend.manager.live(0, "other")
        await backend.end_owner("agent")
        assert mine.is_lost
        assert not theirs.is_lost
        await backend.move(chunk_of(source, target, agent="other"))
        await backend.end_owner("nobody")


async def test_agents_of_other_nodes_share_a_worker():
    async with backend_of() as backend:
        source, target = filled(backend)
        for agent in ("a@one", "b@two", ""):
            await backend.move(chunk_of(source, target, agent=agent))
        assert backend.facts()[0].workers == 2  # that one, and the one of the daemon's own memory


async def test_a_pair_of_lists_is_kept_by_the_worker_from_its_second_time_on():
    async with backend_of() as backend:
        source, target = filled(backend)
        chunk = chunk_of(source, target)
        worker = await backend.manager.worker(0, "agent")
        for times in range(4):
            target.fill(np.full(NBYTES, times, np.uint8))
            await backend.move(chunk)
            assert (target.read() == source.read()).all()
        assert len(worker._tables) == 1
        # What the worker has forgotten is sent again; what it keeps is dropped with the memory that it names.
        await backend.close(source.base >> ALLOCATION_SHIFT)
        again = DeviceArena(backend, NBYTES)
        again.fill(np.random.default_rng(2).integers(0, 256, NBYTES, dtype=np.uint8))
        assert again.base == source.base
        await backend.move(chunk)
        assert (target.read() == again.read()).all()


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 12)), min_size=1, max_size=8),
)
def test_rows_are_found_in_host_memory_or_not_at_all(spans, rows):
    """Against a search by hand, with page-sized units."""
    manager = DeviceManager(CudaOptions(driver="simulated"))
    fd = os.memfd_create("host")
    known, at = [], 1
    for gap, pages in spans:
        at += gap
        known.append((at, at + pages, manager.add_host(at * 4096, pages * 4096, fd)))
        at += pages
    os.close(fd)
    table = np.array([(start * 4096, pages * 4096) for start, pages in rows], dtype=np.uint64)
    found = manager.segments_of(table)
    wanted: set[int] | None = set()
    for start, pages in rows:
        hits = [number for first, last, number in known if first <= start and start + pages <= last]
        wanted = None if wanted is None or not hits else wanted | {hits[0]}
    assert (None if found is None else {segment.number for segment in found}) == wanted
    asyncio.run(manager.aclose())


async def test_bytes_that_no_worker_can_map_pass_through_a_bounce_buffer():
    nbytes = 9 * MIB + 5
    async with backend_of() as backend:
        target = DeviceArena(backend, nbytes)
        data = np.random.default_rng(3).integers(0, 256, nbytes, dtype=np.uint8)
        row = np.array([[data.ctypes.data, nbytes]], dtype=np.uint64)
        here = Extent(MappedSpace(), row)
        up = Chunk(here, target.extent([(0, nbytes)]), nbytes, "t", "cause", "agent")
        assert await backend.move(up) == nbytes
        assert (target.read() == data).all()
        back = np.zeros_like(data)
        there = Extent(MappedSpace(), np.array([[back.ctypes.data, nbytes]], dtype=np.uint64))
        assert await backend.move(Chunk(target.extent([(0, nbytes)]), there, nbytes, "t", "cause", "agent")) == nbytes
        assert (back == data).all()


def open_fds():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


async def test_a_small_move_is_waited_for_on_the_loop_where_there_are_cores_to_spin():
    nbytes = 64 << 10
    async with backend_of(spin=0.01, now_budget_s=10.0) as backend:  # a busy machine may take its time
        source, target = filled(backend, nbytes=nbytes)
        chunk = chunk_of(source, target, nbytes)
        call = backend.move_now(chunk.source, chunk.target, "agent")
        assert call is not None
        with pytest.raises(WouldBlock):
            call()  # nobody has a worker yet, and nobody starts one on the loop
        await backend.move(chunk)
        target.fill(np.zeros(nbytes, np.uint8))
        before = backend.statistics()
        assert call() == nbytes
        after = backend.statistics()
        assert (after.chunks - before.chunks, after.moved_nbytes - before.moved_nbytes) == (1, nbytes)
        assert (target.read() == source.read()).all()
        await backend.manager.live(0, "agent").kill("a test")
        with pytest.raises(WouldBlock):
            call()


async def test_what_is_large_or_would_need_a_core_is_not_waited_for():
    async with backend_of(spin=0.01) as backend:
        source, target = filled(backend, (SharedArena, DeviceArena), nbytes=2 * MIB)
        chunk = chunk_of(source, target, 2 * MIB)
        assert backend.move_now(chunk.source, chunk.target, "agent") is None
    async with backend_of() as backend:
        source, target = filled(backend, nbytes=4096)
        chunk = chunk_of(source, target, 4096)
        assert backend.move_now(chunk.source, chunk.target, "agent") is None


@pytest.mark.slow
async def test_a_move_that_takes_too_long_for_the_loop_ends_before_the_long_way_says_so(monkeypatch):
    fail(monkeypatch, "delay=0.05")
    nbytes = 64 << 10
    async with backend_of(spin=0.01) as backend:
        source, target = filled(backend, nbytes=nbytes)
        chunk = chunk_of(source, target, nbytes)
        await backend.move(chunk)
        call = backend.move_now(chunk.source, chunk.target, "agent")
        for seed in range(3):
            source.fill(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))
            with pytest.raises(WouldBlock):
                call()
            worker = backend.manager.live(0, "agent")
            began = asyncio.get_running_loop().time()
            moving = asyncio.create_task(backend.move(chunk))
            await asyncio.sleep(0)
            assert len(worker._backlog) == 1  # not sent before the late one has ended
            assert await moving == nbytes
            assert asyncio.get_running_loop().time() - began > 0.09  # both moves, one after the other
            assert (target.read() == source.read()).all()
            assert not backend.manager.live(0, "agent")._late
        assert backend.statistics().busy == 0


async def test_what_a_worker_told_before_it_died_is_heard():
    async with backend_of() as backend:
        source, target = filled(backend)
        await backend.move(chunk_of(source, target))
        worker = backend.manager.live(0, "agent")
        asyncio.get_running_loop().remove_reader(worker._told)  # so that its end is noticed before its answer
        moving = asyncio.create_task(backend.move(chunk_of(source, target)))
        await asyncio.to_thread(select.select, [worker._told], [], [], 10.0)
        assert worker._queues.has_completion()
        await worker.kill("a test")
        assert await moving == NBYTES


async def test_an_event_of_another_gpu_is_refused():
    async with backend_of(simulated_devices=2) as backend:
        source, target = filled(backend)
        event, _ = await backend.make_event("agent", 1)
        with pytest.raises(InvalidArgument, match="is of GPU 1"):
            await backend.move(chunk_of(source, target, wait_event=event))


@pytest.mark.slow
async def test_closing_waits_for_every_move(monkeypatch):
    fail(monkeypatch, "delay=0.1")
    backend = CudaBackend(CudaOptions(driver="simulated", spin=0.0))
    await backend.start()
    source, target = filled(backend)
    await backend.move(chunk_of(source, target))
    moves = [asyncio.create_task(backend.move(chunk_of(source, target))) for _ in range(3)]
    await asyncio.wait(moves, return_when=asyncio.FIRST_COMPLETED)
    await backend.aclose()
    assert await asyncio.gather(*moves) == [NBYTES] * 3


async def test_memory_of_a_lost_pool_is_refused_though_others_have_it_mapped():
    async with backend_of(spin=0.01, now_budget_s=10.0) as backend:
        number, _ = await backend.allocate(0, NBYTES)
        source, target = filled(backend)
        rows = np.array([[number << ALLOCATION_SHIFT, 4096]], dtype=np.uint64)
        into = Chunk(source.extent([(0, 4096)]), Extent(DeviceSpace(0), rows), 4096, "t", "cause", "agent")
        assert await backend.move(into) == 4096
        now = backend.move_now(into.source, into.target, "agent")
        assert now() == 4096
        await backend.manager.live(0, SELF).kill("a test")
        with pytest.raises(WouldBlock):
            now()
        with pytest.raises(DeviceLost, match="went with the worker"):
            await backend.move(into)
        assert await backend.move(chunk_of(source, target)) == NBYTES  # other memory is as it was
