"""The doctor finds each thing that can be wrong, says what to do about it, and is content with a healthy node."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from xferd.api.types import (
    CheckState,
    DeviceInfo,
    MemoryKind,
    NodeInfo,
    PeerInfo,
    PeerState,
    PoolInfo,
    StorageDirectoryInfo,
    StorageInfo,
)
from xferd.daemon.doctor import Facts, PathFact, PortFact, diagnose
from xferd.daemon.doctor_facts import look_at
from xferd.daemon.doctor_storage import StoreFact, look_at_stores
from xferd.metadata.base import LeaseView

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
POOL = PoolInfo("host", MemoryKind.DRAM, 256 * MIB, 0, 256 * MIB, 256 * MIB, 0.0, 0, 0, 0, True)
DIRECTORY = StorageDirectoryInfo("/mnt/d", "u", 1.0, MIB, 0, 1, 0, 0, 0, "", True, 0, 0, 0)
STORAGE = StorageInfo("ssd", "xxh3", False, 4096, 1, 1, MIB, MIB, 0, MIB, 0, 0, 0, 0, 0, 0.0, (DIRECTORY,))


GPU = DeviceInfo(0, b"u" * 16, "A100", "cuda", "", 80 << 30, 70 << 30, 1, 0, 0, 0, 0.0, 0.0)


def peer(name: str, state: PeerState = PeerState.READY, version: str = "0.1.0", epoch: int = 1) -> PeerInfo:
    node = NodeInfo(name, f"id-{name}", epoch, version, (), (), (), (), 0.0)
    return PeerInfo(node, state, "connection refused" if state is PeerState.GONE else "", 0.0, 0, 0, 0)


def path(name: str, kind: str, mode: int, **more: Any) -> PathFact:
    return PathFact(name, f"/x/{name}", kind, mode=mode, **more)


HEALTHY = Facts(
    uid=990,
    version="0.1.0",
    refusal="",
    config_error="",
    config_changed=(),
    store="etcd",
    store_problem="",
    lease=LeaseView(10.0, 8.4, 8.0),
    lease_error="",
    clock_step_s=0.01,
    memlock_nbytes=None,
    max_fds=1048576,
    open_fds=40,
    max_sessions=256,
    ptrace_scope=1,
    huge_pool_nbytes=0,
    huge_page_nbytes=2 * MIB,
    huge_pages_total=0,
    huge_pages_free=0,
    pools=(POOL,),
    storage=(STORAGE,),
    stores=(StoreFact("kv"),),
    devices=(),
    staging_slots=8,
    staging_free=8,
    staging_waiting=0,
    paths=(
        path("node.run_dir", "directory", stat.S_IFDIR | 0o755),
        path("sessions.socket", "socket", stat.S_IFSOCK | 0o660),
        path("files.roots", "directory", stat.S_IFDIR | 0o777),
        path("rest.token_file", "file", stat.S_IFREG | 0o600, secret=True),
    ),
    ports=(PortFact("backends.tcp", "tcp://127.0.0.1:7000"),),
    peers=(peer("b"), peer("c", PeerState.DRAINING)),
)

HUGE = {"huge_pool_nbytes": 256 * MIB}


def wrong(**changes: Any) -> list[tuple[str, CheckState, str]]:
    """Return what is not OK once these facts have changed."""
    checks = diagnose(replace(HEALTHY, **changes))
    assert all(bool(check.remedy) == (check.state is not CheckState.OK) for check in checks)
    return [
        (check.name, check.state, check.finding + " > " + check.remedy)
        for check in checks
        if check.state is not CheckState.OK
    ]


def test_a_healthy_node_has_nothing_wrong() -> None:
    assert wrong() == []
    assert [check.finding for check in diagnose(HEALTHY) if check.name == "lease"] == [
        "8.4 s of 10 s left by our clock, 8 s by etcd's"
    ]


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"refusal": "draining"}, "node", "WARN", "undrain"),
        ({"config_error": "limits.max_sesions: unknown key"}, "config", "FAIL", "max_sesions"),
        ({"config_changed": ("limits.max_group",)}, "config", "WARN", "limits.max_group"),
        ({"store_problem": "etcd does not answer since 10:00"}, "etcd", "FAIL", "endpoint status"),
        ({"store": "embedded", "store_problem": "closed"}, "store", "FAIL", "closed"),
        ({"lease": LeaseView(10.0, 9.0, 6.0)}, "lease", "WARN", "etcd's clock is ahead"),
        ({"lease": LeaseView(10.0, 5.0, 9.0)}, "lease", "WARN", "etcd's clock is behind"),
        ({"lease": LeaseView(10.0, 9.0, 2.0)}, "lease", "FAIL", "ends it before we renew it"),
        ({"lease": LeaseView(3.0, 1.0, -1.0)}, "lease", "FAIL", "ends it before we renew it"),
        ({"lease": None, "lease_error": "no etcd member answered"}, "lease", "WARN", "no etcd member"),
        ({"clock_step_s": -3600.0}, "clock", "WARN", "-3600.0 s"),
        ({"memlock_nbytes": 64 * MIB, **HUGE, "huge_pages_total": 200}, "memlock", "WARN", "LimitMEMLOCK"),
        ({"max_fds": 256}, "fds", "WARN", "256 sessions need 960"),
        ({"max_fds": 1024, "open_fds": 1000}, "fds", "FAIL", "1000 of 1024"),
        ({"ptrace_scope": 2}, "ptrace", "WARN", "ptrace_scope=1"),
        ({"ptrace_scope": 3, "uid": 0}, "ptrace", "WARN", "a reboot"),
        ({**HUGE, "huge_pages_total": 100}, "huge-pages", "FAIL", "vm.nr_hugepages=128"),
        ({"pools": (replace(POOL, free_nbytes=0),)}, "pools", "WARN", "xferctl holds"),
        ({"pools": (replace(POOL, reason="no room"),)}, "pools", "WARN", "cannot be allocated from: no room"),
        ({"devices": (replace(GPU, reason="no libcuda"),)}, "devices", "WARN", "GPU 0 cannot be used: no libcuda"),
        ({"devices": (replace(GPU, worker_restarts=2),)}, "devices", "WARN", "2 workers ended"),
        ({"pools": (replace(POOL, failed_allocations=3),)}, "pools", "WARN", "3 groups found no room"),
        ({"storage": (replace(STORAGE, damaged_blocks=3),)}, "storage", "FAIL", "3 blocks are not what was sealed"),
        (
            {"storage": (replace(STORAGE, directories=(replace(DIRECTORY, failure="fdatasync: EIO"),)),)},
            "storage",
            "FAIL",
            "/mnt/d takes no changes any more: fdatasync: EIO",
        ),
        ({"stores": (StoreFact("kv", "there is no such bucket", "create it"),)}, "stores", "FAIL", "no such bucket"),
        ({"stores": (StoreFact("kv", "not allowed", may_list=False),)}, "stores", "WARN", "s3:ListBucket"),
        ({"staging_free": 0, "staging_waiting": 2}, "staging", "WARN", "2 transfers wait"),
        ({"paths": (PathFact("files.roots", "/x", "directory", "No such file"),)}, "files.roots", "FAIL", "No such"),
        ({"paths": (PathFact("grpc.socket", "/x", "socket", "No such file"),)}, "grpc.socket", "FAIL", "restart"),
        ({"paths": (path("files.roots", "directory", stat.S_IFREG),)}, "files.roots", "FAIL", "is no directory"),
        (
            {"paths": (path("files.roots", "directory", stat.S_IFDIR | 0o555, is_accessible=False),)},
            "files.roots",
            "WARN",
            "uid 990 may not make files in it",
        ),
        (
            {"paths": (path("rest.token_file", "file", stat.S_IFREG, is_accessible=False),)},
            "rest.token_file",
            "FAIL",
            "uid 990 may not read it",
        ),
        (
            {"paths": (path("rest.token_file", "file", stat.S_IFREG | 0o644, secret=True),)},
            "rest.token_file",
            "WARN",
            "chmod 0600",
        ),
        ({"paths": (path("node.run_dir", "directory", stat.S_IFDIR | 0o777),)}, "node.run_dir", "FAIL", "anybody"),
        ({"ports": (PortFact("rest.listen", "h:1", "refused"),)}, "rest.listen", "FAIL", "firewall"),
        ({"ports": (PortFact("backends.tcp", "h:1", "no answer", True),)}, "backends.tcp", "WARN", "advertise"),
        ({"peers": (peer("b", PeerState.GONE),)}, "peers", "WARN", "b GONE (connection refused)"),
        ({"peers": (peer("b", version="0.2.0"),)}, "versions", "WARN", "b 0.2.0"),
    ],
)
def test_each_fault_is_found_alone_with_a_remedy(changes: dict[str, Any], name: str, state: str, words: str) -> None:
    [(found, found_state, text)] = wrong(**changes)
    assert (found, found_state.value) == (name, state)
    assert words in text


@pytest.mark.parametrize(
    "changes",
    [
        {"ptrace_scope": None},
        {"ptrace_scope": 2, "uid": 0},
        {"memlock_nbytes": 64 * MIB},
        {**HUGE, "huge_pages_total": 128},
        {"max_fds": None},
        {"store": "embedded", "lease": None},
        {"lease": LeaseView(10.0, 8.0, 7.0)},
        {"lease": LeaseView(10.0, 8.0, 8.0)},
        {"peers": ()},
        {"peers": (peer("b", version="", epoch=0),)},
        {"ports": ()},
        {"paths": ()},
    ],
)
def test_what_is_no_fault_is_not_reported(changes: dict[str, Any]) -> None:
    assert wrong(**changes) == []


def test_of_many_peers_some_are_named() -> None:
    [(_, _, text)] = wrong(peers=tuple(peer(f"n{number}", PeerState.GONE) for number in range(40)))
    assert "40 of 40 cannot be used: n0 GONE" in text
    assert ", and 35 more" in text


def test_a_look_at_a_path_never_fails(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x")
    file.chmod(0o640)
    found = look_at("rest.token_file", str(file), "file", secret=True)
    assert (found.error, stat.S_IMODE(found.mode), found.uid, found.is_accessible) == ("", 0o640, os.geteuid(), True)
    assert look_at("files.roots", str(tmp_path / "none"), "directory").error == "No such file or directory"
    assert look_at("files.roots", str(file / "below"), "directory").error == "Not a directory"


async def test_stores_are_asked_and_one_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    """A directory that is there answers; a port where nobody ever answers is a fact after the time that was given."""
    pytest.importorskip("obstore")
    from xferd.plugins.object import ObjectBackend, ObjectOptions  # the extra may be missing

    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        stores = {
            "disk": {"url": f"file://{tmp_path}"},
            "hangs": {"url": "s3://b", "endpoint": endpoint, "allow_http": True, "anonymous": True, "region": "x"},
        }
        backend = ObjectBackend(ObjectOptions.model_validate({"stores": stores}))
        await backend.start()
        try:
            disk, hangs = await look_at_stores(backend, 0.3)
        finally:
            await backend.aclose()
    assert disk == StoreFact("disk")
    assert hangs.error == "no answer within 0.3 s"
    assert await look_at_stores(None, 0.3) == ()
