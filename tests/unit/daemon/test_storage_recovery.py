"""What a start makes of a directory whose journal was cut, damaged or grown, and what fsck says of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from storage_rig import KIB, NODE, damage, facts, opened, options, pattern, span

from xferd.api.errors import ConfigError, IntegrityError, PoolExhausted
from xferd.daemon.storage import fsck, records
from xferd.daemon.storage.directory import StorageDirectory
from xferd.daemon.storage.loading import load

SLAB_NBYTES = 64 * KIB


def start(path: Path, nbytes: int = SLAB_NBYTES) -> StorageDirectory:
    """Open a directory as a start does."""
    return StorageDirectory(path, pool="ssd", node=NODE, node_id="", nbytes=nbytes, slab_nbytes=SLAB_NBYTES)


async def history(path: Path) -> list[tuple[int, dict[int, tuple[object, ...]]]]:
    """Do all that a journal can tell of, and return after each step its size and what was acknowledged by then."""
    told = []
    async with opened(path, nbytes=SLAB_NBYTES, slab_nbytes=SLAB_NBYTES) as rig:
        volume = rig.pool.volumes[0]

        def acknowledged() -> None:
            told.append((volume.directory.journal_nbytes, facts(volume.extents)))

        acknowledged()
        first, second = await rig.allocate(8 * KIB, 5000, agent="alice", label="kv")
        acknowledged()
        await rig.write(first, pattern(1, 8 * KIB))
        acknowledged()
        await rig.write(second, pattern(2, 5000))
        acknowledged()
        await rig.sealer.seal(await rig.sealer.begin([]))
        ticket = await rig.sealer.begin([span(first, 4 * KIB, 10)])
        acknowledged()
        await rig.sealer.seal(ticket)
        acknowledged()
        await rig.free(second)
        acknowledged()
        (third,) = await rig.allocate(100, agent="bob")
        acknowledged()
        await volume.own([third.extent], "carol", third.extent.access)
        acknowledged()
    return told


@pytest.mark.slow
async def test_a_journal_cut_at_every_byte_gives_all_that_was_acknowledged_before_the_cut(tmp_path):
    """At each of all bytes: the start succeeds, and has exactly the state of the last step that lies before the cut."""
    pool, work = tmp_path / "pool", Path("/dev/shm") / f"xferd-cut-{os.getpid()}"
    pool.mkdir()
    told = await history(pool)
    whole = (pool / "journal.0").read_bytes()
    slab = (pool / "slab-0000").read_bytes()
    shutil.copytree(pool, work)
    try:
        for cut in range(len(whole) + 1):
            (work / "journal.0").write_bytes(whole[:cut])
            (work / "slab-0000").write_bytes(slab)
            found = start(work)
            try:
                found.check_invariants()
                expected = [state for nbytes, state in told if nbytes <= cut]
                assert facts(found.catalogue.extents) == (expected[-1] if expected else {}), f"cut at byte {cut}"
                assert found.recovery.torn_nbytes < records.HEADER.size + 400
                assert (found.recovery.torn_nbytes == 0) == (cut in _borders(whole)), f"cut at byte {cut}"
            finally:
                found.close(is_clean=False)
    finally:
        shutil.rmtree(work)


def _borders(whole: bytes) -> set[int]:
    return {0, *(entry.offset + entry.nbytes for entry in records.scan(whole).entries)}


async def test_every_byte_that_is_damaged_is_noticed_or_harmless(tmp_path):
    """One byte flipped anywhere in the journal: refused with a word on fsck, or torn off the end."""
    told = await history(tmp_path)
    whole = bytearray((tmp_path / "journal.0").read_bytes())
    states = [state for _, state in told] + [{}]
    last = records.scan(bytes(whole)).entries[-1]
    refused = 0
    for at in range(len(whole)):
        raw = whole.copy()
        raw[at] ^= 0x10
        (tmp_path / "journal.0").write_bytes(raw)
        try:
            found = load(tmp_path)
        except IntegrityError as error:
            refused += "xferctl fsck" in str(error)
        else:
            assert facts(found.catalogue.extents) in states
            assert at >= last.offset or _is_padding(bytes(whole), at), f"byte {at} passed unnoticed"
    assert refused > 0.9 * last.offset


def _is_padding(whole: bytes, at: int) -> bool:
    entry = next(e for e in records.scan(whole).entries if e.offset <= at < e.offset + e.nbytes)
    payload_nbytes = int.from_bytes(whole[entry.offset + 8 : entry.offset + 12], "little")
    return at >= entry.offset + records.HEADER.size + payload_nbytes


async def test_what_is_told_after_a_cut_is_told_on_top_of_it(tmp_path):
    """A torn end is cut off before anything is appended, or the next start would stumble over it."""
    await history(tmp_path)
    raw = (tmp_path / "journal.0").read_bytes()
    (tmp_path / "journal.0").write_bytes(raw[: len(raw) - 50])
    async with opened(tmp_path, nbytes=SLAB_NBYTES) as rig:
        assert rig.pool.statistics().directories[0].torn_nbytes
        (made,) = await rig.allocate(4 * KIB, label="after")
        await rig.write(made, pattern(5, 4 * KIB))
    async with opened(tmp_path, nbytes=SLAB_NBYTES) as rig:
        (again,) = [each for each in rig.backings() if each.extent.label == "after"]
        await rig.verify(again)
        assert not rig.pool.statistics().directories[0].torn_nbytes


# -------------------------------------------------------------------------------------------- compaction


async def test_compaction_keeps_all_and_what_comes_after_goes_on_from_it(tmp_path):
    await history(tmp_path)
    before = facts(load(tmp_path).catalogue.extents)
    found = start(tmp_path)
    found.compact()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.1", "lock", "slab-0000", "snapshot.1", "superblock"]
    assert facts(load(tmp_path).catalogue.extents) == before
    found.append([records.Free((1,))])
    found.close(is_clean=True)
    again = start(tmp_path)
    assert facts(again.catalogue.extents) == {id_: fact for id_, fact in before.items() if id_ != 1}
    assert again.recovery.was_clean
    again.close(is_clean=True)


async def test_a_crash_at_any_step_of_a_compaction_loses_nothing(tmp_path):
    """With the new snapshot half written, written beside the old one, and with the old files left over."""
    await history(tmp_path)
    before = facts(load(tmp_path).catalogue.extents)
    old = {name: (tmp_path / name).read_bytes() for name in ("snapshot.0", "journal.0")}
    (tmp_path / "snapshot.1.new").write_bytes(b"half of one")
    start(tmp_path).close(is_clean=False)
    assert not (tmp_path / "snapshot.1.new").exists()
    found = start(tmp_path)
    found.compact()
    found.close(is_clean=False)
    for name, raw in old.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "journal.1").unlink()
    again = start(tmp_path)
    assert facts(again.catalogue.extents) == before
    assert not (tmp_path / "snapshot.0").exists()
    again.close(is_clean=True)


async def test_a_pool_compacts_by_itself_while_it_is_written_to(tmp_path):
    """A journal never grows much past what it takes to tell the present state."""
    data = pattern(1, 512 * KIB)
    async with opened(tmp_path) as rig:
        directory = rig.pool.volumes[0].directory
        directory.compact_nbytes = 64 * KIB
        (made,) = await rig.allocate(len(data))
        most = 0
        while not (tmp_path / "snapshot.3").exists():
            await rig.sealer.seal(await rig.sealer.begin([span(made, 0, len(data))]))
            most = max(most, directory.journal_nbytes)
        assert most < 66 * KIB
    async with opened(tmp_path) as rig:
        await rig.verify(rig.backings()[0])


# -------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no mount: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_pool_larger_than_its_disk_is_refused_and_leaves_nothing(small_disk):
    with pytest.raises(ConfigError, match=r"slab .* of 2097152 bytes cannot be made: No space"):
        async with opened(small_disk, nbytes=2 << 20, slab_nbytes=2 << 20):
            pass
    assert not (small_disk / "slab-0000").exists()
    async with opened(small_disk, nbytes=SLAB_NBYTES):
        pass


def _fill(path: Path) -> None:
    """Take all the room that a disk has."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4 * KIB)):
            pass
    os.close(fd)


async def test_a_journal_without_room_refuses_and_goes_on_once_there_is_some(small_disk):
    """Nothing is acknowledged that is not there, nothing is held by what failed, and no restart is needed."""
    async with opened(small_disk, nbytes=512 * KIB, slab_nbytes=512 * KIB) as rig:
        (kept,) = await rig.allocate(4 * KIB)
        await rig.write(kept, pattern(1, 4 * KIB))
        filler = small_disk / "snapshot.999.new"  # anything that takes room
        _fill(filler)
        made = []
        while True:
            try:
                made += await rig.allocate(100, label="x" * 20_000)
            except PoolExhausted as error:
                assert "journal" in str(error)  # noqa: PT017 - how many go before is the file system's business
                break
        used = rig.pool.info().used_nbytes
        assert used == 4 * KIB * (1 + len(made))
        with pytest.raises(PoolExhausted):
            await rig.allocate(100, label="x" * 20_000)
        assert rig.pool.info().used_nbytes == used
        filler.unlink()
        made += await rig.allocate(100, label="x" * 5000)
        await rig.write(made[-1], pattern(2, 100))
        await rig.verify(made[-1])
    async with opened(small_disk, nbytes=512 * KIB, slab_nbytes=512 * KIB) as rig:
        assert len(rig.backings()) == 1 + len(made)
        await rig.verify(rig.backings()[0])


async def test_a_file_system_without_o_direct_serves_all_the_same(small_disk):
    async with opened(small_disk, nbytes=256 * KIB, slab_nbytes=256 * KIB) as rig:
        (made,) = await rig.allocate(64 * KIB)
        await rig.write(made, pattern(1, 64 * KIB))
        assert await rig.pool.scrubber.scrub_once() == 0
        damage(made, 5)
        assert await rig.pool.scrubber.scrub_once() == 1
        await rig.free(made)


async def test_a_disk_mounted_read_only_is_refused(small_disk):
    async with opened(small_disk, nbytes=SLAB_NBYTES):
        pass
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="mount its file system for writing"):
        async with opened(small_disk, nbytes=SLAB_NBYTES):
            pass


# -------------------------------------------------------------------------------------------- fsck


async def test_fsck_says_all_is_well_and_changes_nothing(tmp_path):
    await history(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"}
    report = fsck.check(tmp_path, verify=True)
    assert report.findings == ()
    assert (report.pool, report.node, report.extents, report.was_clean) == ("ssd", NODE, 2, True)
    assert report.verified_nbytes == 8 * KIB
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"} == before


async def test_fsck_names_the_damaged_block_and_the_torn_end(tmp_path):
    async with opened(tmp_path) as rig:
        (made,) = await rig.allocate(64 * KIB, label="kv")
        await rig.write(made, pattern(1, 64 * KIB))
        damage(made, 9 * KIB)
    with (tmp_path / "journal.0").open("ab") as file:
        file.write(b"half a record")
    report = fsck.check(tmp_path, verify=True)
    (finding,) = report.findings
    assert "block 2 (4096 bytes at 8192" in finding.problem
    assert report.torn_nbytes == 13
    assert "next start cuts them off" in report.notes[0].remedy


async def test_fsck_repairs_a_journal_and_the_pool_starts_with_what_was_before_the_damage(tmp_path):
    await history(tmp_path)
    raw = bytearray((tmp_path / "journal.0").read_bytes())
    third = records.scan(bytes(raw)).entries[3]
    raw[third.offset + 20] ^= 1
    (tmp_path / "journal.0").write_bytes(raw)
    with pytest.raises(IntegrityError, match="is damaged at byte"):
        start(tmp_path)
    assert fsck.check(tmp_path).findings[0].what == "journal"
    with pytest.raises(IntegrityError):
        start(tmp_path)
    fsck.check(tmp_path, repair=True)
    found = start(tmp_path)
    assert sorted(found.catalogue.extents) == [1, 2]
    found.close(is_clean=True)
    assert fsck.check(tmp_path).findings == ()


@pytest.mark.parametrize("keep", [0, 100])
async def test_fsck_repairs_a_snapshot_that_was_cut(tmp_path, keep):
    await history(tmp_path)
    found = start(tmp_path)
    found.compact()
    found.append([records.Free((3,))])
    found.close(is_clean=True)
    raw = (tmp_path / "snapshot.1").read_bytes()
    (tmp_path / "snapshot.1").write_bytes(raw[: len(raw) - 60] if keep else b"")
    with pytest.raises(IntegrityError, match="snapshot"):
        start(tmp_path)
    fsck.check(tmp_path, repair=True)
    again = start(tmp_path)
    assert sorted(again.catalogue.extents) == ([1] if keep else [])
    again.close(is_clean=True)


async def test_fsck_hands_a_directory_over_to_another_node(tmp_path):
    await history(tmp_path)
    with pytest.raises(ConfigError, match="--adopt"):
        StorageDirectory(tmp_path, pool="ssd", node="new", node_id="", nbytes=SLAB_NBYTES, slab_nbytes=SLAB_NBYTES)
    fsck.check(tmp_path, adopt="new")
    found = StorageDirectory(tmp_path, pool="ssd", node="new", node_id="", nbytes=SLAB_NBYTES, slab_nbytes=SLAB_NBYTES)
    assert len(found.catalogue.extents) == 2
    found.close(is_clean=True)


async def test_fsck_refuses_a_directory_in_use_and_prints_json(tmp_path, capsys):
    async with opened(tmp_path):
        capsys.readouterr()
        assert fsck.main([str(tmp_path)]) == fsck.EXIT_UNSEEN
        assert "in use" in json.loads(capsys.readouterr().out)["error"]["message"]
    capsys.readouterr()
    assert fsck.main([str(tmp_path)]) == fsck.EXIT_OK
    assert json.loads(capsys.readouterr().out)["pool"] == options(tmp_path).name
    assert fsck.main([str(tmp_path / "none")]) == fsck.EXIT_UNSEEN
