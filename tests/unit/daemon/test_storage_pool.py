"""A storage pool: given out, sealed, taken back, and there again after a restart."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from storage_rig import KIB, damage, facts, opened, pattern, read, span

from xferd.api.errors import ConfigError, IntegrityError, PoolExhausted
from xferd.api.types import TransferOp
from xferd.daemon.memory.resolving import Resolved
from xferd.daemon.memory.staging import StagingPool
from xferd.daemon.peers.grants import PeerGrant
from xferd.daemon.storage import files
from xferd.daemon.storage.catalogue import OPEN, SEALED, SUMMED
from xferd.daemon.storage.lanes import LaneSealer
from xferd.plugins.base import Extent, FileSpace, MappedSpace
from xferd.plugins.vectored import iov_of


async def test_what_was_sealed_is_there_after_a_restart_with_its_proof(tmp_path):
    data = pattern(1, 10 * KIB + 7)
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(len(data), agent="alice", label="kv")
        await rig.write(made, data)
        before = facts(made.volume.extents)
    async with opened(tmp_path) as rig:
        (again,) = rig.backings()
        assert facts(again.volume.extents) == before
        assert (again.extent.agent, again.extent.label) == ("alice", "kv")
        assert read(again) == data
        await rig.verify(again)
        assert again.volume.directory.recovery.was_clean
        assert rig.pool.statistics().sealed_nbytes == len(data)


async def test_what_is_not_persistent_is_gone_after_a_restart_and_its_bytes_with_it(tmp_path):
    secret = b"secret!!" * KIB
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(len(secret), persistent=False)
        await rig.write(made, secret)
        await rig.verify(made)
        position, path = made.position, made.path
        made.volume.directory._close_files()  # as a crash does: nothing is told to the journal
    assert secret in (tmp_path / "slab-0000").read_bytes()
    async with opened(tmp_path) as rig:
        assert rig.backings() == []
        assert not rig.pool.volumes[0].directory.recovery.was_clean
        slab = rig.pool.volumes[0].directory.slabs[0]
        assert slab.path == path
        assert os.pread(slab.fd, len(secret), position) == bytes(len(secret))


async def test_a_fresh_extent_reads_as_zeros_though_another_had_its_place(tmp_path):
    async with opened(tmp_path, nbytes=64 * KIB, slab_nbytes=64 * KIB) as rig:
        (first,) = await rig.allocate(64 * KIB)
        await rig.write(first, pattern(1, 64 * KIB))
        await rig.free(first)
        (second,) = await rig.allocate(64 * KIB)
        assert read(second) == bytes(64 * KIB)


async def test_a_group_is_placed_whole_or_not_at_all_and_no_byte_leaks(tmp_path):
    async with opened(tmp_path, nbytes=256 * KIB, slab_nbytes=64 * KIB) as rig:
        used = rig.pool.info().used_nbytes
        with pytest.raises(PoolExhausted, match="slab_nbytes"):
            await rig.allocate(*[60 * KIB] * 4, 60 * KIB)
        with pytest.raises(PoolExhausted, match="in slabs of at most 65536"):
            await rig.allocate(65 * KIB)
        assert rig.pool.info().used_nbytes == used
        made = await rig.allocate(*[60 * KIB] * 4)
        assert sorted(each.extent.slab for each in made) == [0, 1, 2, 3]
        offsets = [each.pool_offset for each in made]
        assert sorted(offsets) == [0, 64 * KIB, 128 * KIB, 192 * KIB]
        assert rig.pool.info().failed_allocations == 2


async def test_directories_are_filled_by_weight_and_one_that_is_full_is_passed_over(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    async with opened(a, b, nbytes=256 * KIB, weights=[3, 1]) as rig:
        assert [volume.directory.nbytes for volume in rig.pool.volumes] == [192 * KIB, 64 * KIB]
        made = [backing for _ in range(64) for backing in await rig.allocate(4 * KIB)]
        assert [volume.directory.used_nbytes for volume in rig.pool.volumes] == [192 * KIB, 64 * KIB]
        with pytest.raises(PoolExhausted):
            await rig.allocate(1)
        assert len({each.pool_offset for each in made}) == 64


async def test_a_pool_grows_and_does_not_shrink(tmp_path):
    async with opened(tmp_path, nbytes=64 * KIB, slab_nbytes=64 * KIB) as rig:
        (made,) = await rig.allocate(64 * KIB)
        await rig.write(made, pattern(3, 64 * KIB))
    async with opened(tmp_path, nbytes=192 * KIB, slab_nbytes=64 * KIB) as rig:
        assert [slab.nbytes for slab in rig.pool.volumes[0].directory.slabs] == [64 * KIB] * 3
        await rig.verify(rig.backings()[0])
    with pytest.raises(ConfigError, match="does not shrink"):
        async with opened(tmp_path, nbytes=128 * KIB):
            pass


# ------------------------------------------------------------------------------------------------ proof


async def test_a_block_that_changed_on_the_disk_is_named_and_counted(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(40 * KIB, agent="alice", label="kv")
        await rig.write(made, pattern(1, 40 * KIB))
        damage(made, 9 * KIB)
        with pytest.raises(
            IntegrityError, match=r"block 2 of extent 1 'kv' of agent alice \(4096 bytes at 8192 of /.*slab-0000"
        ):
            await rig.verify(made)
        await rig.verify(made, 0, 8 * KIB)
        now = rig.pool.statistics()
        assert (now.mismatches, now.damaged_blocks) == (1, 1)
        await rig.write(made, pattern(2, 4 * KIB), 8 * KIB)
        await rig.verify(made)
        assert rig.pool.statistics().damaged_blocks == 0


async def test_blocks_that_nobody_proved_fail_a_reader_who_asked_and_no_other(tmp_path):
    async with opened(tmp_path, verifies=True) as rig:
        (made,) = await rig.allocate(16 * KIB)
        await rig.write(made, pattern(1, 4 * KIB), 4 * KIB)
        await rig.write(made, pattern(2, 4 * KIB), 8 * KIB, fails=True)
        await rig.verify(made, is_asked=False)
        with pytest.raises(IntegrityError, match=r"block 0 .* no checksum"):
            await rig.verify(made)
        with pytest.raises(IntegrityError, match=r"block 2 .* no checksum"):
            await rig.verify(made, 4 * KIB, 8 * KIB)
        await rig.verify(made, 4 * KIB, 4 * KIB)


async def test_a_pool_verifies_every_read_only_where_it_is_told_to(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(4 * KIB)
        await rig.write(made, pattern(1, 4 * KIB))
        damage(made, 0)
        await rig.verify(made, is_asked=False)
        rig.pool.verifies = True
        with pytest.raises(IntegrityError):
            await rig.verify(made, is_asked=False)


async def test_writing_to_sealed_blocks_voids_them_on_the_disk_first(tmp_path):
    """A crash in the middle of a second write leaves the blocks it touched open, and the others sealed."""
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(16 * KIB)
        await rig.write(made, pattern(1, 16 * KIB))
        await rig.sealer.begin([span(made, 5 * KIB, 5 * KIB)])
        os.pwrite(made.space.fd, pattern(2, 3 * KIB), made.position + 5 * KIB)
        made.volume.directory._close_files()
        made.extent.writers[:] = 0
    async with opened(tmp_path) as rig:
        (again,) = rig.backings()
        assert again.extent.state.tolist() == [SUMMED, OPEN, OPEN, SUMMED]
        assert rig.pool.volumes[0].directory.recovery.unsealed_extents == 1
        await rig.verify(again, 0, 4 * KIB)
        await rig.verify(again, 12 * KIB, 4 * KIB)


async def test_of_two_writers_of_a_block_the_last_one_seals_it(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(8 * KIB)
        first = await rig.sealer.begin([span(made, 0, 6 * KIB)])
        second = await rig.sealer.begin([span(made, 6 * KIB, 2 * KIB)])
        await rig.sealer.seal(first)
        assert made.extent.state.tolist() == [SUMMED, OPEN]
        os.pwrite(made.space.fd, pattern(2, 2 * KIB), made.position + 6 * KIB)
        await rig.sealer.seal(second)
        assert made.extent.state.tolist() == [SUMMED, SUMMED]
        await rig.verify(made)


async def test_a_block_opened_while_another_seals_it_stays_open(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(8 * KIB)
        ticket = await rig.sealer.begin([span(made, 0, 8 * KIB)])
        sealing = asyncio.ensure_future(rig.sealer.seal(ticket))
        await asyncio.sleep(0)  # it has begun to read, in a thread
        late = await rig.sealer.begin([span(made, 4 * KIB, 1)])
        await sealing
        assert made.extent.state.tolist() == [SUMMED, OPEN]
        await rig.sealer.seal(late)
        assert made.extent.state.tolist() == [SUMMED, SUMMED]


async def test_a_cancelled_seal_leaves_blocks_open_and_no_writer(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(8 * KIB)
        ticket = await rig.sealer.begin([span(made, 0, 8 * KIB)])
        sealing = asyncio.ensure_future(rig.sealer.seal(ticket))
        await asyncio.sleep(0)
        sealing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sealing
        assert not made.extent.writers.any()
        await rig.write(made, pattern(1, 8 * KIB))
        await rig.verify(made)


async def test_a_cancelled_allocation_leaves_nothing_held_here_or_after_a_restart(tmp_path):
    async with opened(tmp_path) as rig:
        for steps in range(6):
            making = asyncio.ensure_future(rig.allocate(8 * KIB, 8 * KIB))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not making.done():
                making.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await making
            else:
                await rig.free(*making.result())
            assert rig.pool.info().used_nbytes == 0
            rig.pool.check_invariants()
    async with opened(tmp_path) as rig:
        assert rig.backings() == []


async def test_without_checksums_durable_blocks_are_sealed_and_nothing_is_compared(tmp_path):
    async with opened(tmp_path, has_checksums=False, verifies=True) as rig:
        kept, scratch = await rig.allocate(4 * KIB), await rig.allocate(4 * KIB, persistent=False)
        await rig.write(kept[0], pattern(1, 4 * KIB))
        await rig.write(scratch[0], pattern(2, 4 * KIB))
        assert kept[0].extent.state.tolist() == [SEALED]
        assert scratch[0].extent.state.tolist() == [OPEN]
        await rig.verify(kept[0], is_asked=False)
        await rig.free(*scratch)
    async with opened(tmp_path) as rig:
        assert rig.backings()[0].extent.state.tolist() == [SEALED]


async def test_memory_of_other_kinds_does_not_concern_the_sealer(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(4 * KIB)
        other = [Extent(MappedSpace(), iov_of(bytearray(8))), Extent(FileSpace(10_000, "/x"), iov_of(bytearray(8)))]
        assert not rig.sealer.concerns(other)
        assert rig.sealer.concerns([*other, span(made, 0, 1)])
        await rig.sealer.seal(await rig.sealer.begin(other))
        await rig.sealer.verify(other, is_asked=True)


async def test_records_of_many_callers_share_a_flush(tmp_path):
    async with opened(tmp_path) as rig:
        before = rig.pool.statistics().directories[0].journal_batches
        async with asyncio.TaskGroup() as group:
            for _ in range(64):
                group.create_task(rig.allocate(4 * KIB))
        assert rig.pool.statistics().directories[0].journal_batches - before < 16
        assert len(rig.backings()) == 64


# ------------------------------------------------------------------------------------------------ the scrubber


async def test_the_scrubber_finds_what_no_reader_has_asked_for(tmp_path):
    async with opened(tmp_path) as rig:
        good, bad = await rig.allocate(64 * KIB, 64 * KIB)
        for each in (good, bad):
            await rig.write(each, pattern(each.extent.id, 64 * KIB))
        assert await rig.pool.scrubber.scrub_once() == 0
        damage(bad, 60 * KIB)
        assert await rig.pool.scrubber.scrub_once() == 1
        now = rig.pool.statistics()
        assert (now.damaged_blocks, now.mismatches, now.scrub_passes) == (1, 1, 2)
        assert now.scrubbed_total_nbytes == 2 * 128 * KIB


async def test_the_scrubber_passes_over_what_is_written_or_freed_meanwhile(tmp_path):
    async with opened(tmp_path) as rig:
        written, freed = await rig.allocate(64 * KIB, 64 * KIB)
        for each in (written, freed):
            await rig.write(each, pattern(each.extent.id, 64 * KIB))
        await rig.sealer.begin([span(written, 0, 64 * KIB)])
        os.pwrite(written.space.fd, pattern(9, 64 * KIB), written.position)
        scrubbing = asyncio.ensure_future(rig.pool.scrubber.scrub_once())
        await asyncio.sleep(0)
        await rig.free(freed)
        assert await scrubbing == 0
        assert rig.pool.statistics().mismatches == 0
        written.extent.writers[:] = 0


async def test_the_scrubber_keeps_to_its_rate(tmp_path):
    async with opened(tmp_path, scrub_bytes_per_s=1 << 20, nbytes=2 << 20, slab_nbytes=2 << 20) as rig:
        (made,) = await rig.allocate(256 * KIB)
        await rig.write(made, pattern(1, 256 * KIB))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await rig.pool.scrubber.scrub_once()
        assert loop.time() - began >= 0.25


# ------------------------------------------------------------------------------------------------ whose it is


async def test_a_directory_that_is_missing_in_use_or_anothers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="create it"):
        async with opened(tmp_path / "none"):
            pass
    ours, strange = tmp_path / "ours", tmp_path / "strange"
    ours.mkdir()
    strange.mkdir()
    (strange / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match=r"holds holiday\.jpg"):
        async with opened(strange):
            pass
    async with opened(ours):
        with pytest.raises(ConfigError, match=f"in use, by process {os.getpid()}"):
            async with opened(ours):
                pass
    with pytest.raises(ConfigError, match=r"of pool 'ssd' of node 'node-a'.*--adopt"):
        async with opened(ours, node="node-b"):
            pass
    with pytest.raises(ConfigError, match="this is pool 'other'"):
        async with opened(ours, name="other"):
            pass
    async with opened(ours):
        pass


async def test_files_that_are_lost_are_an_error_and_never_a_fresh_pool(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(4 * KIB)
        await rig.write(made, pattern(1, 4 * KIB))
    for name in ("superblock", "slab-0000", "snapshot.0"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(IntegrityError):
            async with opened(tmp_path):
                pass
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
        with pytest.raises(IntegrityError):
            async with opened(tmp_path):
                pass
        (tmp_path / name).write_bytes(raw)
    async with opened(tmp_path) as rig:
        await rig.verify(rig.backings()[0])


async def test_a_first_start_that_was_cut_off_is_begun_again(tmp_path):
    (tmp_path / "slab-0000").write_bytes(b"half")
    (tmp_path / "snapshot.0.new").write_bytes(b"half")
    async with opened(tmp_path) as rig:
        await rig.allocate(4 * KIB)


@pytest.mark.parametrize("use_holes", [True, False])
@pytest.mark.parametrize("root", ["/dev/shm", ""])
def test_wiping_leaves_zeros_and_nothing_else(tmp_path, root, use_holes):
    """On file systems that can zero a range, on tmpfs that can only punch holes, and on what can do neither."""
    path = Path(tempfile.mkdtemp(dir=root or tmp_path)) / "slab"
    path.write_bytes(b"x" * (3 << 20))
    fd = os.open(path, os.O_RDWR)
    files.wipe(fd, 4096, (2 << 20) + 4096, use_holes=use_holes)
    os.close(fd)
    raw = path.read_bytes()
    shutil.rmtree(path.parent)
    assert raw == b"x" * 4096 + bytes((2 << 20) + 4096) + b"x" * ((1 << 20) - 8192)


# ------------------------------------------------------------------------------------------------ peers


async def test_a_peers_write_is_proven_when_its_last_window_is_taken_and_not_before(tmp_path):
    """The lane hears that all windows are filled only after the seal; one that breaks off proves nothing."""
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(16 * KIB)
        await rig.write(made, pattern(1, 16 * KIB))
        staging = StagingPool(16 * KIB, 8 * KIB)
        sealer = LaneSealer(rig.sealer)

        def grant() -> PeerGrant:
            column = np.array([made.position + 4 * KIB]), np.array([8 * KIB])
            rows = Resolved(*(each.astype(np.uint64) for each in column), None, (made.space,), ())
            return PeerGrant(
                rows,
                TransferOp.WRITE,
                8 * KIB,
                staging=staging,
                staging_timeout_s=5.0,
                holder="peer",
                on_close=lambda: None,
                sealer=sealer,
            )

        broken = grant()
        windows = broken.windows()
        await asyncio.to_thread(next, windows)
        assert made.extent.state.tolist() == [SUMMED, OPEN, OPEN, SUMMED]
        windows.close()
        broken.close()
        await asyncio.sleep(0)
        assert made.extent.state.tolist() == [SUMMED, OPEN, OPEN, SUMMED]
        assert not made.extent.writers.any()

        whole = grant()
        windows = whole.windows()
        await asyncio.to_thread(next, windows)
        assert await asyncio.to_thread(next, windows, None) is None
        assert made.extent.state.tolist() == [SUMMED] * 4
        whole.close()
        await rig.verify(made)
        await staging.aclose()
