"""GPU memory through real daemons with simulated GPUs: every byte in place, every failure told, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster import eventually
from device_nodes import (
    ClientProcess,
    Vram,
    device_of,
    make_gpu_node,
    mapped_names,
    pool_of,
    remote_rows,
    worker_pids,
)

from xferd.api import simulated
from xferd.api.errors import (
    DeviceLost,
    InvalidArgument,
    NotFound,
    OutOfBounds,
    PermissionDenied,
    PoolExhausted,
    Unsupported,
    XferdError,
)
from xferd.api.types import Access, MemoryKind, RegionId, RegisterDeviceRequest, TransferState
from xferd.clients import Client, _calls as calls
from xferd.clients._simulated_device import SimulatedBuffer, SimulatedStream, simulated as simulated_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess

    from xferd.clients import Region

pytestmark = pytest.mark.slow

MIB = 1 << 20
NBYTES = 3 * MIB
PLACES = ("own VRAM", "VMM", "other GPU", "VRAM pool", "DRAM pool", "memfd", "private", "file", "far VRAM", "far DRAM")


@pytest.fixture(scope="module")
def gpu_pair(module_cluster: Cluster) -> tuple[DaemonProcess, DaemonProcess]:
    """Two nodes with GPUs that know each other; the first one has two."""
    a = make_gpu_node(module_cluster, "gpu-a", gpus=2, tcp=True)
    b = make_gpu_node(module_cluster, "gpu-b", peers=(a,), tcp=True)
    with Client.connect(a.session_socket, agent="alice") as alice, Client.connect(b.session_socket, agent="bob") as bob:
        # What is made when it is first needed and kept: workers that serve peers, memory for the slow road.
        for near, far in ((alice, bob), (bob, alice)):
            near.allocate(4096, pool="vram").write(bytes(4096))
            mine, theirs = near.allocate(4096), far.allocate(4096, pool="vram", access=Access.READ_WRITE)
            near.write(mine, near.region(theirs.info))
    return a, b


@pytest.fixture
def clients(
    gpu_pair: tuple[DaemonProcess, DaemonProcess], no_leaks: Callable[..., None]
) -> Iterator[tuple[Client, Client]]:
    no_leaks(*gpu_pair)
    with (
        Client.connect(gpu_pair[0].session_socket, agent="alice") as alice,
        Client.connect(gpu_pair[1].session_socket, agent="bob") as bob,
    ):
        yield alice, bob


def scattered(seed: int, total: int = MIB) -> tuple[list[int], list[int]]:
    """Return (offsets, sizes) of disjoint spans of odd sizes in odd places that add up to ``total``, out of order."""
    rng = np.random.default_rng(seed)
    edges = np.unique(np.concatenate(([0, total], rng.integers(1, total, 400))))
    sizes = np.diff(edges)
    order = rng.permutation(len(sizes))
    starts = np.empty(len(sizes), dtype=np.int64)
    starts[order] = np.cumsum(sizes[order] + rng.integers(0, 3000, len(sizes))) - sizes[order]
    return starts.tolist(), sizes.tolist()


def gathered(array: np.ndarray, rows: tuple[list[int], list[int]]) -> np.ndarray:
    return np.concatenate([array[offset : offset + size] for offset, size in zip(*rows, strict=True)])


def random_bytes(seed: int, nbytes: int = NBYTES) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, nbytes, dtype=np.uint8)


def place(kind: str, alice: Client, bob: Client, files: PurePath, stack: ExitStack) -> tuple[Region, object]:
    """Return a region of a kind, as its owner has it, and what must be kept for it."""
    shared = Access.READ_WRITE
    match kind:
        case "own VRAM" | "VMM" | "other GPU":
            made = Vram(alice, NBYTES, device=int(kind == "other GPU"), is_vmm=kind == "VMM")
            return made.region, made
        case "far VRAM":
            made = Vram(bob, NBYTES)
            return made.region, made
        case "VRAM pool" | "DRAM pool":
            return alice.allocate(NBYTES, pool="vram" if kind == "VRAM pool" else "host", access=shared), None
        case "far DRAM":
            return bob.allocate(NBYTES, access=shared), None
        case "memfd":
            return alice.register_memfd(NBYTES, access=shared), None
        case "private":
            memory = np.zeros(NBYTES + 1, dtype=np.uint8)[1:]
            return alice.register(memory, access=shared), memory
        case _:
            path = files / "vram.bin"  # type: ignore[operator]
            path.write_bytes(bytes(NBYTES))  # type: ignore[attr-defined]
            return alice.register_file(str(path), writable=True, access=shared), None


@pytest.mark.parametrize("kind", PLACES)
def test_scattered_blocks_go_from_gpu_memory_to_any_place_and_back(clients, gpu_pair, kind: str) -> None:
    """Rows of odd sizes and places, gathered into others, pushed there and pulled back: the same bytes."""
    alice, bob = clients
    with ExitStack() as stack:
        region, _kept = place(kind, alice, bob, gpu_pair[0].files, stack)
        near, back = Vram(alice, NBYTES), Vram(alice, NBYTES)
        near.array[:] = random_bytes(1)
        here, there = scattered(1), scattered(2)
        alice.write(near.region.rows(*here), remote_rows(alice, region, *there))
        status = alice.read(back.region.rows(*here), remote_rows(alice, region, *there))
        assert (gathered(back.array, here) == gathered(near.array, here)).all()
        untouched = np.ones(NBYTES, dtype=bool)
        for offset, size in zip(*here, strict=True):
            untouched[offset : offset + size] = False
        assert not back.array[untouched].any(), "bytes outside of the rows were written"
        assert "cuda" in {hop.backend for hop in status.telemetry.route}


def test_gpu_memory_is_pulled_and_pushed_by_another_node(clients) -> None:
    """The node that serves VRAM moves it through its staging memory, in both directions, in more than one window."""
    alice, bob = clients
    theirs = Vram(alice, 20 * MIB)
    theirs.array[:] = random_bytes(3, 20 * MIB)
    mine = bob.allocate(20 * MIB)
    bob.read(mine, bob.region(theirs.region.info))
    assert (mine.array() == theirs.array).all()
    mine.array()[:] = random_bytes(4, 20 * MIB)
    bob.write(mine, bob.region(theirs.region.info))
    assert (mine.array() == theirs.array).all()


def test_a_region_can_be_streamed(clients) -> None:
    """Clients without any driver read and write GPU memory by the slow road."""
    alice, _ = clients
    region = alice.allocate(2 * MIB + 5, pool="vram")
    data = random_bytes(5, 2 * MIB + 5).tobytes()
    region.write(data)
    assert region.read() == data


def test_registering_again_costs_no_worker_and_ends_with_the_last(clients, gpu_pair) -> None:
    """The same allocation, registered in parts and again, is opened once, and goes with the last region of it."""
    alice, _ = clients
    buffer = SimulatedBuffer(NBYTES)
    parts = [alice.register_device(buffer[start : start + 4096]) for start in range(0, 16 * 4096, 4096)]
    buffer.array[: 16 * 4096] = random_bytes(6, 16 * 4096)
    target = alice.allocate(16 * 4096)
    for number, part in enumerate(parts):
        alice.write(part, target.rows([number * 4096], [4096]))
    assert (target.array()[: 16 * 4096] == buffer.array[: 16 * 4096]).all()
    alice.free(parts)
    assert device_of(gpu_pair[0])["workers"] <= 3


# ------------------------------------------------------------------------------------ bad input


def request(**changes: object) -> RegisterDeviceRequest:
    values: dict[str, object] = {"device_uuid": simulated.device_uuid(0), "allocation_nbytes": MIB, "handle": b"x" * 64}
    return RegisterDeviceRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"handle": b"\x00" * 64}, InvalidArgument),
        ({"handle": os.urandom(64)}, InvalidArgument),
        ({"handle": b"short"}, InvalidArgument),
        ({"handle": b""}, InvalidArgument),
        ({"device_uuid": b""}, InvalidArgument),
        ({"device_uuid": b"no such GPU 0123"}, NotFound),
        ({"device_uuid": simulated.device_uuid(77)}, NotFound),
        ({"offset": MIB}, OutOfBounds),
        ({"offset": MIB - 1, "nbytes": 2}, OutOfBounds),
        ({"offset": 1 << 63, "nbytes": 1 << 62}, OutOfBounds),
        ({"allocation_nbytes": 0}, InvalidArgument),
        ({"allocation_nbytes": 1 << 40}, InvalidArgument),
    ],
    ids=str,
)
def test_what_is_no_memory_of_a_gpu_is_refused(clients, changes: dict[str, object], error: type[XferdError]) -> None:
    """A rubbish handle, a foreign GPU, a region past the allocation: a typed error, and all goes on."""
    alice, _ = clients
    with pytest.raises(error) as told:
        alice._call(calls.register_device(request(**changes)))
    assert told.value.remedy
    good = Vram(alice, 4096)
    alice.write(good.region, alice.allocate(4096))


def test_a_handle_of_more_than_there_is_or_of_a_dead_process_is_refused(clients, gpu_pair) -> None:
    alice, _ = clients
    buffer = SimulatedBuffer(MIB)
    handle = buffer.export().handle
    with pytest.raises(InvalidArgument):
        alice._call(calls.register_device(request(handle=handle, allocation_nbytes=2 * MIB)))
    started = os.fork()
    if not started:
        os._exit(0)
    stat = simulated.process_start_ticks(started)
    dead = simulated.SimulatedHandle(started, 3, MIB, stat).to_bytes()
    os.waitpid(started, 0)
    with pytest.raises(InvalidArgument, match=r"ended|gone"):
        alice._call(calls.register_device(request(handle=dead)))


def test_a_transfer_past_a_region_is_out_of_bounds(clients) -> None:
    alice, _ = clients
    mine = Vram(alice, 8192)
    part = alice.register_device(mine.buffer[:4096])
    target = alice.allocate(8192)
    with pytest.raises(OutOfBounds):
        alice.write(alice.region(part.info).rows([4095], [2]), target.rows([0], [2]))


# ------------------------------------------------------------------------------------ pools, export


def test_a_pool_hands_out_zeros_and_takes_back(clients, gpu_pair) -> None:
    """What one client left in a pool of GPU memory is never seen by the next."""
    alice, _ = clients
    group = alice.allocate([MIB, 4096, 10 * MIB], pool="vram")
    marked = alice.allocate(MIB)
    marked.array()[:] = 0xEE
    alice.write(marked, group[0])
    used = pool_of(gpu_pair[0], "vram")
    assert (used["used_nbytes"], used["allocations"], used["kind"]) == (11 * MIB + 4096, 3, "VRAM")
    alice.free(group)
    again = alice.allocate(MIB, pool="vram")
    alice.read(marked, again)
    assert not marked.array().any()
    with pytest.raises(PoolExhausted):
        alice.allocate([40 * MIB, 40 * MIB], pool="vram")
    alice.free([again])
    now = pool_of(gpu_pair[0], "vram")
    assert (now["used_nbytes"], now["free_nbytes"], now["failed_allocations"]) == (0, 64 * MIB, 1)
    with pytest.raises(NotFound, match="host, vram"):
        alice.allocate(4096, pool="none")


def test_an_export_opens_the_region_and_only_for_those_with_access(clients, gpu_pair) -> None:
    alice, _ = clients
    data = random_bytes(7, 8192)
    alice.allocate(4096, pool="vram")
    region = alice.allocate(8192, pool="vram")
    region.write(data.tobytes())
    export = alice._call(calls.export_device(region.id))
    assert (export.driver, export.device_uuid) == ("simulated", simulated.device_uuid(0))
    fd, nbytes = simulated.open_handle(export.handle)
    assert nbytes == export.allocation_nbytes == 64 * MIB
    assert os.pread(fd, 8192, export.offset) == data.tobytes()
    os.close(fd)
    host, vmm = alice.allocate(4096), Vram(alice, 4096, is_vmm=True)
    with pytest.raises(InvalidArgument):
        alice._call(calls.export_device(host.id))
    with pytest.raises(Unsupported):
        alice._call(calls.export_device(vmm.region.id))
    with Client.connect(gpu_pair[0].session_socket, agent="carol") as carol:
        with pytest.raises(PermissionDenied):
            carol._call(calls.export_device(region.id))
        shared = alice.allocate(4096, pool="vram", access=Access.READ)
        assert carol._call(calls.export_device(shared.id)).offset == shared.info.pool_offset
        alice.hand_over([shared], "carol")
        (gift,) = carol.accept(*carol.notifications(timeout_s=5))
        assert carol.free([gift]) is None


# ------------------------------------------------------------------------------------ events


def test_a_transfer_waits_for_an_event_and_records_another(clients) -> None:
    """Nothing is read before the client's stream has come to its event; DONE means that the other one is recorded."""
    alice, _ = clients
    source, target = Vram(alice, MIB), alice.allocate(MIB)
    driver, stream = simulated_driver(), SimulatedStream()
    event = driver.make_event(simulated.device_uuid(0))
    driver.record(event, stream)
    waiting = alice._call(calls.open_device_event(0, driver.event_handle(event)))
    made = alice.make_event(0)
    transfer = alice.transfer("WRITE", source.region, target, wait_event=waiting.event, done_event=made.number)
    time.sleep(0.2)  # nothing announces that a transfer does not end
    assert transfer.poll().state not in (TransferState.DONE, TransferState.FAILED)
    source.array[:] = 9
    stream.finish()
    transfer.wait(timeout_s=10)
    assert (target.array() == 9).all()
    driver.drop_event(event)


def test_events_of_others_and_without_gpu_memory_are_refused(clients, gpu_pair) -> None:
    alice, _ = clients
    made, other_gpu = alice.make_event(0), alice.make_event(1)
    vram, host = Vram(alice, 4096), alice.allocate([4096, 4096])
    with pytest.raises(InvalidArgument, match="not of this session"):
        alice.write(vram.region, host[0], wait_event=made.number + 1000)
    with pytest.raises(InvalidArgument, match="no GPU"):
        alice.write(host[0], host[1], done_event=made.number)
    with pytest.raises(InvalidArgument, match="GPU 1"):
        alice.write(vram.region, host[0], wait_event=other_gpu.number)
    with pytest.raises(NotFound):
        alice._call(calls.open_device_event(9, b""))
    with pytest.raises(InvalidArgument):
        alice._call(calls.open_device_event(0, b"short"))
    with Client.connect(gpu_pair[0].session_socket, agent="carol") as carol:
        own = Vram(carol, 4096)
        with pytest.raises(InvalidArgument, match="not of this session"):
            carol.write(own.region, carol.allocate(4096), wait_event=made.number)


# ------------------------------------------------------------------------------------ ends


def session_agents(daemon: DaemonProcess) -> set[str]:
    return {info["agent"] for info in daemon.get("/v1/sessions")[1]["sessions"]}


@pytest.mark.parametrize("stuck", [False, True], ids=["idle", "transfer that never ends"])
def test_a_killed_client_is_gone_with_its_worker_in_two_seconds(
    cluster: Cluster, no_leaks: Callable[..., None], stuck: bool
) -> None:
    """Its GPU memory is let go of by every worker, also where a command waits for an event of the dead process."""
    daemon = make_gpu_node(cluster, "a")
    no_leaks(daemon)
    with Client.connect(daemon.session_socket, agent="other") as other:
        mine = Vram(other, MIB)
        other.write(mine.region, other.allocate(MIB))
        before = worker_pids(daemon)
        doomed = ClientProcess(daemon, "doomed", 16 * MIB, stuck=stuck)
        (worker,) = worker_pids(daemon) - before
        other.read(mine.region.rows([0], [4096]), remote_region(other, doomed.region).rows([0], [4096]))
        assert (mine.array[:4096] == 7).all()
        memory = f"simulated-gpu-0 ({doomed.process.pid})"
        doomed.kill()
        killed_at = time.monotonic()
        eventually(lambda: session_agents(daemon) == {"other"} or session_agents(daemon), what=memory)
        assert time.monotonic() - killed_at < 2.0
        assert worker not in worker_pids(daemon)
        for pid in worker_pids(daemon):  # the other client's worker had mapped it too
            gpu_memory = [name for name in mapped_names(pid) if "simulated-gpu-0" in name]
            assert len(gpu_memory) <= 1, gpu_memory
        other.write(mine.region, other.allocate(MIB))
        assert before <= worker_pids(daemon)


def remote_region(client: Client, region: RegionId) -> Region:
    (found,) = [r for r in client.regions() if r.id == region]
    return found


def test_transfers_of_others_in_the_memory_of_a_dead_client_fail_and_nothing_else(cluster: Cluster) -> None:
    daemon = make_gpu_node(cluster, "a", faults="delay=30")
    doomed = ClientProcess(daemon, "doomed", 4 * MIB)
    with Client.connect(daemon.session_socket, agent="other") as other:
        target, pair = other.allocate(4 * MIB), other.allocate([MIB, MIB])
        transfer = other.transfer("READ", target, remote_region(other, doomed.region))
        doomed.kill()
        killed_at = time.monotonic()
        other.write(*pair)
        with pytest.raises(XferdError) as told:
            transfer.wait(timeout_s=20)
        assert told.value.code in ("stale", "device_lost")
        assert time.monotonic() - killed_at < 2
        other.write(*pair)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_is_lost_fails_its_transfers_and_is_replaced(cluster: Cluster, way: signal.Signals) -> None:
    daemon = make_gpu_node(cluster, "a", "backends.cuda.command_timeout=1s", faults="delay=0.7")
    with (
        Client.connect(daemon.session_socket, agent="alice") as alice,
        Client.connect(daemon.session_socket, agent="other") as other,
    ):
        before = worker_pids(daemon)
        mine, target = Vram(alice, MIB), alice.allocate(MIB)
        mine.array[:] = 5
        (worker,) = worker_pids(daemon) - before
        transfer = alice.transfer("WRITE", mine.region, target)
        os.kill(worker, way)
        theirs, there = Vram(other, MIB), other.allocate(MIB)
        theirs.array[:] = 6
        other.write(theirs.region, there)  # another agent's worker goes on
        assert (there.array() == 6).all()
        with pytest.raises(DeviceLost):
            transfer.wait(timeout_s=10)
        alice.write(mine.region, target)  # the next use starts another worker, which maps again what lives
        assert (target.array() == 5).all()
        assert worker not in worker_pids(daemon)
        assert device_of(daemon)["worker_restarts"] == 1
        checks = daemon.get("/v1/doctor")[1]["checks"]
        assert [c["state"] for c in checks if c["name"] == "devices"] == ["WARN"]


def test_a_worker_that_hangs_is_killed_at_its_deadline(cluster: Cluster, tmp_path) -> None:
    once = tmp_path / "once"
    daemon = make_gpu_node(cluster, "a", "backends.cuda.command_timeout=1s", faults=f"hang=1,once={once}")
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        mine, target = Vram(alice, MIB), alice.allocate([MIB, MIB])
        mine.array[:] = 5
        started_at = time.monotonic()
        with pytest.raises(DeviceLost):
            alice.write(mine.region, target[0])
        assert time.monotonic() - started_at < 5
        alice.write(target[0], target[1])
        alice.write(mine.region, target[0])
        assert (target[0].array() == 5).all()


def test_a_pool_whose_worker_died_is_made_anew_and_old_regions_never_reach_it(
    cluster: Cluster, no_leaks: Callable[..., None]
) -> None:
    daemon = make_gpu_node(cluster, "a")
    no_leaks(daemon)
    (keeper,) = worker_pids(daemon)
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        old, marked = alice.allocate(MIB, pool="vram"), alice.allocate(MIB)
        marked.array()[:] = 0xEE
        alice.write(marked, old)
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: bool(pool_of(daemon, "vram")["reason"]), what="the loss is noticed")
        assert "vram" in daemon.get("/v1/node")[1]["reason"]
        new = alice.allocate([MIB, MIB], pool="vram")
        assert pool_of(daemon, "vram")["reason"] == ""
        with pytest.raises(DeviceLost):
            alice.write(marked, old)
        for region in new:
            alice.read(marked, region)
            assert not marked.array().any(), "a region of the old pool reached the new one"
            marked.array()[:] = 0
        alice.free([old])
        alice.free(new)
        assert pool_of(daemon, "vram")["used_nbytes"] == 0


# ------------------------------------------------------------------------------------ degraded


def test_without_a_driver_the_daemon_says_so_and_host_memory_works(cluster: Cluster) -> None:
    """A machine without libcuda: a plain message at the start, GPU verbs refused, the rest unharmed."""
    pools = 'pools=[{name="host", nbytes="16MiB"}, {name="vram", kind="VRAM", nbytes="16MiB"}]'
    daemon = cluster.make("a", tcp=False, settings=("backends.cuda.driver=cuda", pools))
    device = device_of(daemon)
    if not device["reason"]:
        pytest.skip("this machine has a GPU")
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        pair = alice.allocate([MIB, MIB])
        alice.write(*pair)
        with pytest.raises(XferdError) as told:
            alice.allocate(4096, pool="vram")
        assert told.value.code in ("unavailable", "unsupported")
        assert "vram" in told.value.message
        with pytest.raises(NotFound):
            alice._call(calls.register_device(request()))
    assert pool_of(daemon, "vram")["reason"]
    checks = {c["name"]: c for c in daemon.get("/v1/doctor")[1]["checks"] if c["state"] == "WARN"}
    assert {"devices", "pools"} <= set(checks)
    assert daemon.get("/readyz") == (200, {"status": "degraded", "reason": daemon.get("/v1/node")[1]["reason"]})
    assert "gpu_unusable" in daemon.log()
    assert "pool_degraded" in daemon.log()


def test_two_gpus_configured_where_one_exists(cluster: Cluster) -> None:
    pools = (
        'pools=[{name="host", nbytes="16MiB"}, {name="v0", kind="VRAM", nbytes="16MiB"}, '
        '{name="v1", kind="VRAM", device=1, nbytes="16MiB"}]'
    )
    daemon = make_gpu_node(cluster, "a", "backends.cuda.devices=[0, 1]", pools)
    good, bad = device_of(daemon, 0), device_of(daemon, 1)
    assert (good["reason"], good["total_nbytes"]) == ("", 256 * MIB)
    assert "no simulated GPU 1" in bad["reason"]
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        mine = Vram(alice, MIB)
        alice.write(mine.region, alice.allocate(MIB, pool="v0"))
        with pytest.raises(XferdError, match="v1") as told:
            alice.allocate(MIB, pool="v1")
        assert told.value.code in ("unavailable", "not_found")
        with pytest.raises(NotFound):
            Vram(alice, MIB, device=1)


def test_a_gpu_without_the_memory_for_its_pool_starts_degraded(cluster: Cluster) -> None:
    pools = 'pools=[{name="host", nbytes="16MiB"}, {name="vram", kind="VRAM", nbytes="512MiB"}]'
    daemon = make_gpu_node(cluster, "a", pools)
    assert "512" in pool_of(daemon, "vram")["reason"] or str(512 * MIB) in pool_of(daemon, "vram")["reason"]
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        with pytest.raises(PoolExhausted, match="vram"):
            alice.allocate(4096, pool="vram")
        alice.write(Vram(alice, MIB).region, alice.allocate(MIB))
    assert pool_of(daemon, "vram")["failed_allocations"] == 1


def test_the_daemon_has_no_driver_mapped_while_its_workers_work(clients, gpu_pair) -> None:
    alice, _ = clients
    alice.write(Vram(alice, MIB).region, alice.allocate(MIB))
    assert worker_pids(gpu_pair[0])
    names = {PurePath(name).name for name in mapped_names(gpu_pair[0].process.pid)}
    assert not [name for name in names if "cuda" in name.lower() or "nvrtc" in name.lower() or "nvidia" in name.lower()]


def test_the_gpu_shows_at_every_face(clients, gpu_pair) -> None:
    alice, _ = clients
    alice.write(Vram(alice, MIB).region, alice.allocate(MIB))
    metrics = gpu_pair[0].get("/metrics")[1].decode()
    assert 'xferd_device_usable{device="0"} 1.0' in metrics
    assert [line for line in metrics.splitlines() if line.startswith('xferd_device_moved_bytes_total{device="0"}')]
    moved = device_of(gpu_pair[0])
    assert moved["moved_nbytes"] >= MIB
    assert moved["workers"] >= 2
    (told, _second) = alice.devices()
    assert (told.index, told.driver, told.total_nbytes) == (0, "simulated", 256 * MIB)
    assert MemoryKind.VRAM in alice.node().kinds
    words = [sys.executable, "-c", "import sys; from xferd.clients.ctl import main; sys.exit(main())"]
    environment = {**os.environ, "XFERD_SOCKET": str(gpu_pair[0].session_socket)}
    done = subprocess.run([*words, "devices"], env=environment, capture_output=True, text=True, check=True)
    head, first, second = done.stdout.splitlines()
    assert [line[head.index("STATE") :] for line in (first, second)] == ["READY", "READY"]
    done = subprocess.run([*words, "devices", "--json"], env=environment, capture_output=True, text=True, check=True)
    assert [info["name"] for info in json.loads(done.stdout)["devices"]] == ["simulated GPU 0", "simulated GPU 1"]
