"""Storage pools of real daemons: regions on disk that are written, read, proven, kept over restarts, and freed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from xferd.api.errors import (
    IntegrityError,
    InvalidArgument,
    MoveFailed,
    NotFound,
    PermissionDenied,
    PoolExhausted,
    Stale,
    Unsupported,
)
from xferd.api.types import Access, MemoryKind, RegionSource
from xferd.clients import Client
from xferd.clients.admin import AdminConnection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster import DaemonProcess

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "ssd"
    path.mkdir()
    return path


def pool_setting(*paths: Path, nbytes: str = "16MiB", **more: object) -> str:
    """Return the setting of a pool named "ssd"."""
    directories = ", ".join(f'{{path="{path}"}}' for path in paths)
    rest = "".join(f", {key}={json.dumps(value)}" for key, value in more.items())
    return f'storage_pools=[{{name="ssd", directories=[{directories}], nbytes="{nbytes}"{rest}}}]'


def attach(daemon: DaemonProcess, agent: str = "engine") -> Client:
    return Client.connect(daemon.session_socket, agent)


def operator(daemon: DaemonProcess) -> AdminConnection:
    return AdminConnection(f"unix:{daemon.grpc_socket}")


def pattern(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def ctl(daemon: DaemonProcess, *args: str) -> subprocess.CompletedProcess[str]:
    command = "import sys; from xferd.clients.ctl import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", command, "--socket", str(daemon.session_socket), *args],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_persistent_regions_outlive_session_and_daemon_and_belong_to_the_agent(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    data = pattern(3 * MIB + 100)
    with attach(daemon) as client:
        stored = client.allocate(len(data), "ssd", label="kv", persistent=True)
        info = stored.info
        assert (info.kind, info.source, info.pool, info.persistent) == (
            MemoryKind.FILE,
            RegionSource.POOL,
            "ssd",
            True,
        )
        stored.write(data)
        source = client.allocate(MIB)
        source.array()[:] = 7
        client.write(source.rows(0, MIB), stored.rows(MIB, MIB))
        data[MIB : 2 * MIB] = 7
        assert bytes(stored.read(100, 64)) == data[100:164].tobytes()

    with attach(daemon, "other") as stranger:
        assert stranger.regions(agent="engine") == []
    with attach(daemon) as client:
        (again,) = client.regions(agent="engine", label="kv")
        assert again.id == info.id, "within one start of the daemon the id stays"
        assert bytes(again.read(0, 4096)) == data[:4096].tobytes()

    assert daemon.stop() == 0
    daemon.start()
    with attach(daemon) as client:
        (again,) = client.regions(agent="engine", label="kv")
        assert again.id != info.id
        with pytest.raises(Stale):
            client.region(info).read(0, 1)
        target = client.allocate(len(data))
        client.read(target.rows(0, len(data)), again.rows(0, len(data)))
        assert (target.array()[: len(data)] == data).all()
        with operator(daemon) as admin:
            (told,) = admin.storage()
        assert (told.persistent_extents, told.extents_nbytes) == (1, len(data))
        assert told.directories[0].was_clean
        again.free()
        assert client.regions(label="kv") == []


def test_a_transfer_that_is_done_has_proven_what_it_wrote(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    with attach(daemon) as client, operator(daemon) as admin:
        stored = client.allocate(MIB, "ssd", persistent=True)
        client.write(client.allocate(MIB), stored)
        assert admin.storage()[0].sealed_nbytes == MIB


def test_the_rest_ends_with_its_session_like_any_memory(make_daemon, disk, no_leaks):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk, nbytes="4MiB"),))
    with attach(daemon) as client:
        client.allocate(MIB, "ssd").write(pattern(MIB))
    no_leaks(daemon)
    for _ in range(3):
        with attach(daemon) as client:
            scratch = client.allocate([MIB, MIB, 4096], "ssd", label="scratch")
            scratch[0].write(pattern(MIB))
            assert bytes(scratch[1].read(0, 4096)) == bytes(4096)
            with pytest.raises(PoolExhausted):
                client.allocate(3 * MIB, "ssd")
        with attach(daemon, "next") as client:
            fresh = client.allocate(4 * MIB, "ssd")
            assert bytes(fresh.read()) == bytes(4 * MIB), "what another session had there is wiped"


def test_a_killed_daemon_has_all_that_was_acknowledged_at_its_next_start(make_daemon, disk):
    """Several times: SIGKILL while a client writes; what a call had returned for is there and proven."""
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk, nbytes="64MiB", block_nbytes="64KiB"),))
    acknowledged: dict[str, np.ndarray] = {}
    for generation in range(4):
        with attach(daemon) as client:
            for number in range(5):
                label = f"{generation}-{number}"
                data = pattern(MIB + number, generation * 10 + number)
                client.allocate(len(data), "ssd", label=label, persistent=True).write(data)
                acknowledged[label] = data
            unfinished = client.allocate(MIB, "ssd", label=f"{generation}-open", persistent=True)
            assert unfinished.info.persistent
            daemon.kill()
        daemon.start()
        with attach(daemon) as client, operator(daemon) as admin:
            (told,) = admin.storage()
            assert not told.directories[0].was_clean
            assert told.directories[0].unsealed_extents == generation + 1
            assert told.sealed_nbytes == sum(map(len, acknowledged.values()))
            for label, data in acknowledged.items():
                (stored,) = client.regions(label=label)
                assert bytes(stored.read()) == data.tobytes()
            assert admin.scrub_storage("ssd").damaged_blocks == 0


def test_damage_is_an_error_to_the_reader_and_found_by_the_scrubber(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk, verify=True, block_nbytes="4KiB"),))
    with attach(daemon) as client, operator(daemon) as admin:
        stored = client.allocate(64 * KIB, "ssd", label="kv", persistent=True)
        stored.write(pattern(64 * KIB))
        flip(disk / "slab-0000", stored.info.pool_offset + 9 * KIB)
        assert bytes(stored.read(0, 8 * KIB)) == pattern(64 * KIB)[: 8 * KIB].tobytes()
        with pytest.raises(IntegrityError, match=r"block 2 of extent 1 'kv' of agent engine"):
            stored.read(8 * KIB, 4 * KIB)
        assert admin.scrub_storage("ssd").damaged_blocks == 1
        metrics = daemon.get("/metrics")[1].decode()
        assert 'xferd_storage_damaged_blocks{pool="ssd"} 1.0' in metrics
        ran = ctl(daemon, "scrub", "ssd")
        assert ran.returncode == 1
        assert "1 blocks" in ran.stdout
        stored.write(pattern(4 * KIB, 2), 8 * KIB)
        assert ctl(daemon, "scrub", "ssd").returncode == 0
        with pytest.raises(NotFound, match="storage pools: ssd"):
            admin.scrub_storage("none")


def flip(path: Path, at: int) -> None:
    """Change a byte of a file on the disk."""
    fd = os.open(path, os.O_RDWR)
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ 1]), at)
    os.fsync(fd)
    os.close(fd)


def test_persistent_regions_move_to_another_agent_and_stay_its_own(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    with attach(daemon, "giver") as giver, attach(daemon, "taker") as taker:
        stored = giver.allocate(8 * KIB, "ssd", label="kv", persistent=True)
        stored.write(pattern(8 * KIB))
        giver.hand_over([stored], "taker")
        (given,) = taker.accept(taker.notifications(5.0)[0])
        assert bytes(given.read()) == pattern(8 * KIB).tobytes()
    daemon.kill()
    daemon.start()
    with attach(daemon, "giver") as giver:
        assert giver.regions(label="kv") == []
    with attach(daemon, "taker") as taker:
        (again,) = taker.regions(label="kv")
        assert bytes(again.read()) == pattern(8 * KIB).tobytes()


def test_an_operator_frees_what_an_agent_left_behind_and_nothing_that_is_in_use(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    with operator(daemon) as admin:
        with attach(daemon) as client:
            stored = client.allocate(8 * KIB, "ssd", label="kv", persistent=True, access=Access.READ)
            with pytest.raises(PermissionDenied, match="another session"):
                admin.free([stored.id])
        with attach(daemon, "reader") as reader:
            assert [region.id for region in reader.regions(label="kv")] == [stored.id]
            with pytest.raises(PermissionDenied):
                reader.free(reader.regions(label="kv"))
        used = daemon.get("/v1/pools")[1]["pools"][1]["used_nbytes"]
        assert ctl(daemon, "free", str(stored.id)).returncode == 0
        assert daemon.get("/v1/pools")[1]["pools"][1]["used_nbytes"] == used - 8 * KIB
        with pytest.raises(Stale):
            admin.free([stored.id])
        assert daemon.get(f"/v1/regions/{stored.id}", "DELETE")[0] == 410


def test_what_a_storage_pool_cannot_do_is_said(make_daemon, disk):
    host = 'pools=[{name="big", nbytes="16MiB"}]'
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk, slab_nbytes="1MiB"), host))
    with attach(daemon) as client:
        with pytest.raises(Unsupported, match=r"pool 'big'.*storage_pools"):
            client.allocate(4096, persistent=True)
        with pytest.raises(PoolExhausted, match="slab_nbytes"):
            client.allocate(2 * MIB, "ssd")
        with pytest.raises(InvalidArgument):
            client.allocate(0, "ssd")
        stored = client.allocate(4096, "ssd")
        with pytest.raises(Unsupported, match="cannot be mapped"):
            stored.array()


def test_rest_allocates_lists_and_describes(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    session = daemon.get("/v1/sessions", "POST", {"agent": "curl"})[1]
    body = {"kind": "allocate", "nbytes": [4096], "pool": "ssd", "persistent": True, "label": "kv"}
    status, made = daemon.get("/v1/regions", "POST", body, token=session["token"])
    assert status == 201
    assert made["regions"][0]["persistent"] is True
    assert daemon.get(f"/v1/sessions/{session['session']}", "DELETE")[0] == 204
    (kept,) = daemon.get("/v1/regions?label=kv")[1]["regions"]
    assert (kept["id"], kept["agent"]) == (made["regions"][0]["id"], "curl")
    (pool,) = daemon.get("/v1/storage")[1]["pools"]
    assert (pool["pool"], pool["persistent_extents"], pool["directories"][0]["path"]) == ("ssd", 1, str(disk))
    pools = daemon.get("/v1/pools")[1]["pools"]
    assert [(each["name"], each["kind"], each["mappable"]) for each in pools] == [
        ("host", "DRAM", True),
        ("ssd", "FILE", False),
    ]


def test_fsck_looks_at_a_stopped_daemons_directory_and_not_at_one_in_use(make_daemon, disk):
    daemon = make_daemon("a", tcp=False, settings=(pool_setting(disk),))
    with attach(daemon) as client:
        client.allocate(MIB, "ssd", persistent=True).write(pattern(MIB))
    ran = ctl(daemon, "fsck", str(disk))
    assert (ran.returncode, "in use, by process" in ran.stderr) == (1, True)
    assert "proven" in ctl(daemon, "storage").stdout
    daemon.kill()
    ran = ctl(daemon, "--json", "fsck", str(disk), "--verify")
    report = json.loads(ran.stdout)
    assert (ran.returncode, report["verified_nbytes"], report["was_clean"]) == (0, MIB, False)
    flip(disk / "slab-0000", 5)
    ran = ctl(daemon, "fsck", str(disk), "--verify")
    assert ran.returncode == 1
    assert "is not what was sealed" in ran.stdout
    assert ctl(daemon, "fsck", str(disk / "none")).returncode == 1
    daemon.start()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda disk: disk.rmdir(), "is missing"),
        (lambda disk: (disk / "photo.jpg").touch(), "holds photo.jpg"),
        (lambda disk: (disk / "journal.0").touch(), "has lost its superblock"),
    ],
)
def test_a_daemon_does_not_start_on_a_directory_that_is_not_its_own(
    cluster, disk, spoil: Callable[[Path], None], message
):
    spoil(disk)
    daemon = cluster.make("a", tcp=False, settings=(pool_setting(disk),), start=False)
    daemon.run_dir.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "xferd.daemon.cli", "serve", *daemon.args], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode not in (0, None)
    assert message in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


def test_another_nodes_pool_is_refused_until_it_is_handed_over(cluster, disk):
    daemon = cluster.make("a", tcp=False, settings=(pool_setting(disk),))
    daemon.stop()
    other = cluster.make("b", tcp=False, settings=(pool_setting(disk),), start=False)
    other.run_dir.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "xferd.daemon.cli", "serve", *other.args], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode != 0
    assert "of pool 'ssd' of node 'a'" in ran.stdout + ran.stderr
    assert ctl(daemon, "fsck", str(disk), "--adopt", "b").returncode == 0
    other.start()
    assert other.stop() == 0


def test_what_a_peer_writes_is_proven_before_it_is_told_done(cluster, disk):
    """DRAM on one node to a storage pool on another and back; a kill of the other node after DONE loses nothing."""
    a = cluster.make("a", settings=(pool_setting(disk, block_nbytes="64KiB"),))
    b = cluster.make("b", peers=(a,))
    data = pattern(3 * MIB + 11)
    with attach(b, "writer") as writer:
        with attach(a) as owner:
            stored = owner.allocate(len(data), "ssd", label="kv", persistent=True, access=Access.READ_WRITE)
        source = writer.allocate(len(data))
        source.array()[: len(data)] = data
        (remote,) = writer.regions(node="a", label="kv")
        assert remote.id == stored.id
        writer.write(source.rows(0, len(data)), remote.rows(0, len(data)))
        with operator(a) as admin:
            assert admin.storage()[0].sealed_nbytes == len(data)
        a.kill()
        a.start()
        with operator(a) as admin:
            assert admin.scrub_storage("ssd").sealed_nbytes == len(data)
    with attach(b, "reader") as reader:
        (remote,) = reader.regions(node="a", label="kv")
        target = reader.allocate(len(data))
        reader.read(target.rows(0, len(data)), remote.rows(0, len(data)))
        assert (target.array()[: len(data)] == data).all()


def test_a_reader_on_another_node_gets_proof_where_it_asks(cluster, disk):
    """The node that has the pool compares before it sends; without ``verify`` it sends what the disk has."""
    a = cluster.make("a", settings=(pool_setting(disk, block_nbytes="64KiB"),))
    b = cluster.make("b", peers=(a,))
    data = pattern(MIB)
    with attach(a) as owner, attach(b, "reader") as reader:
        stored = owner.allocate(2 * MIB, "ssd", label="kv", persistent=True, access=Access.READ)
        source = owner.allocate(MIB)
        source.array()[:] = data
        owner.write(source.rows(0, MIB), stored.rows(0, MIB))
        target = reader.allocate(MIB)
        (remote,) = reader.regions(node="a", label="kv")
        reader.read(target.rows(0, MIB), remote.rows(0, MIB), verify=True)
        assert (target.array() == data).all()
        with pytest.raises(IntegrityError, match="no checksum"):  # nobody ever wrote it
            reader.read(target.rows(0, MIB), remote.rows(MIB, MIB), verify=True)
        slab = (disk / "slab-0000").read_bytes()
        position = slab.index(data[300 * KIB : 300 * KIB + 64].tobytes())
        with (disk / "slab-0000").open("r+b") as file:
            file.seek(position)
            file.write(bytes([slab[position] ^ 1]))
        reader.read(target.rows(0, MIB), remote.rows(0, MIB))
        with pytest.raises(IntegrityError, match="block 4 "):
            reader.read(target.rows(0, MIB), remote.rows(0, MIB), verify=True)
        reader.read(target.rows(0, 256 * KIB), remote.rows(0, 256 * KIB), verify=True)  # the sound blocks


def test_a_disk_that_fails_in_the_midst_of_a_transfer_loses_nothing_that_was_done(make_daemon, disk):
    """Half of a chunk is written, or read, and then the disk says no: a typed error, counted, and nobody vouches for
    the blocks that were touched; all others are proven still, also after a crash.
    """
    fault = 'backends.faulty={inner="posix", faults=[{kind="error", after_nbytes="3MiB"}]}'
    settings = (pool_setting(disk, nbytes="32MiB", block_nbytes="64KiB"), fault, "transfers.chunk=1MiB")
    daemon = make_daemon("a", tcp=False, settings=settings)
    nbytes = 8 * MIB
    with attach(daemon) as client:
        kept, failed = client.allocate([nbytes, nbytes], "ssd", label="kv", persistent=True)
        source, target = client.allocate([nbytes, nbytes])
        source.array()[:] = pattern(nbytes)
        client.write(source, kept, backend="posix")
        with pytest.raises(MoveFailed, match="injected") as caught:
            client.write(source, failed, backend="faulty")
        assert caught.value.code == "move_failed"
        with pytest.raises(MoveFailed):  # over the first half of what was DONE
            client.write(source.rows(0, nbytes // 2), kept.rows(0, nbytes // 2), backend="faulty")
        with pytest.raises(MoveFailed):
            client.read(target, kept, backend="faulty", verify=True)
        half = nbytes // 2
        client.read(target.rows(half, half), kept.rows(half, half), backend="posix", verify=True)
        assert (target.array()[half:] == source.array()[half:]).all()
        for region in (failed, kept):
            with pytest.raises(IntegrityError, match="no checksum"):
                client.read(target.rows(0, half), region.rows(0, half), backend="posix", verify=True)
        [faulty] = [info for info in client.admin.backends() if info.name == "faulty"]
        assert faulty.failures >= 3
        assert client.admin.storage()[0].sealed_nbytes == half
    daemon.kill()
    daemon.start()
    with attach(daemon) as client:
        target = client.allocate(half)
        assert client.admin.storage()[0].sealed_nbytes == half
        found = 0
        for region in client.regions(agent="engine", label="kv"):
            try:
                client.read(target, region.rows(half, half), verify=True)
            except IntegrityError:
                continue
            found += bool((target.array() == pattern(nbytes)[half:]).all())
        assert found == 1
