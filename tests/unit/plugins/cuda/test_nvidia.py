"""The NVIDIA driver against a library that stands in for CUDA's, with the real kernel run by the CPU.

It cannot show that a GPU does what CUDA's documentation says, nor how fast: ``tools/gpu_worker_check.py`` does, on a
machine with one. It shows that every call is made as the header has it, and that each byte goes where it should.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from worker_rig import Host, WorkerRig, at

from xferd.api.errors import InvalidArgument, NotFound, PoolExhausted, Unavailable, Unsupported
from xferd.api.mapping import map_shared
from xferd.plugins.cuda import control, kernel
from xferd.plugins.cuda.driver import Pieces
from xferd.plugins.cuda.kernel import Tuning, shape
from xferd.plugins.cuda.layout import Engine, Outcome, Side
from xferd.plugins.cuda.nvidia import NvidiaDriver

NBYTES = 4 << 20
DRIVER_VERSION = 13000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with libcuda.so.1 in it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("fake_cuda")
    here, root = Path(__file__).parent, Path(__file__).parents[4]
    wanted = ["-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-D_GNU_SOURCE"]
    wanted += [f'-DKERNEL="{root / "plugins/cuda/pieces.cu"}"', "-o", str(folder / "libcuda.so.1")]
    # CUDA's own header where it is installed: the compiler then compares signatures.
    subprocess.run(
        [compiler, *wanted, "-I/usr/local/cuda/include", str(here / "fake_cuda.cpp")], check=True, capture_output=True
    )
    return folder


def keep_cubin(folder, tuning=None):
    """Put what the library takes for a kernel into the cache, so that NVRTC is not needed."""
    path = kernel.cache_path({"XDG_CACHE_HOME": str(folder)}, "sm_90", DRIVER_VERSION, tuning or Tuning())
    kernel.write_cached(path, b"fake cubin")
    return path


@pytest.fixture
def environment(library, tmp_path):
    """Of a worker that finds the library and a kernel."""
    keep_cubin(tmp_path)
    paths = f"{library}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return {"LD_LIBRARY_PATH": paths, "XDG_CACHE_HOME": str(tmp_path), "CACHE_DIRECTORY": ""}


def make_driver(library, tmp_path, monkeypatch, tuning=None):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    keep_cubin(tmp_path, tuning)
    driver = NvidiaDriver(tuning, str(library / "libcuda.so.1"))
    return driver, driver.start(0)


@pytest.fixture
def driver(library, tmp_path, monkeypatch):
    made, _ = make_driver(library, tmp_path, monkeypatch)
    yield made
    free = made.free_nbytes()
    made.stop()
    assert made.free_nbytes() >= free


def view(address, nbytes):
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def fly(driver, pieces, wait=0, done=0):
    plan = driver.compile(pieces)
    flight = driver.begin(plan, wait, done)
    while not flight.is_done():
        pass
    plan.drop()
    return plan, flight


# ---------------------------------------------------------------------------------------- the kernel


@st.composite
def scattered(draw):
    """Pieces of odd sizes at odd places, none over another: (source offset, target offset, nbytes) rows."""
    biggest = draw(st.sampled_from([3, 40, 700, 20_000, 70_000]))
    sizes = draw(st.lists(st.integers(1, biggest), min_size=3, max_size=40))
    rows, source, target = [], draw(st.integers(0, 40)), draw(st.integers(0, 40))
    for size in sizes:
        rows.append((source, target, size))
        source += size + draw(st.integers(0, 17))
        target += size + draw(st.integers(0, 17))
    return draw(st.permutations(rows))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=scattered(), copies=st.booleans(), processors=st.sampled_from([1, 2, 8, 132]))
def test_every_byte_goes_to_its_place_at_any_alignment(driver, rows, copies, processors):
    one, two = driver.allocate(NBYTES)[0], driver.allocate(NBYTES)[0]
    source, target = view(one, NBYTES), view(two, NBYTES)
    source[:] = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
    target[:] = 99
    expected = np.full(NBYTES, 99, dtype=np.uint8)
    for origin, goal, size in rows:
        expected[goal : goal + size] = source[origin : origin + size]
    table = np.array(rows, dtype=np.uint64) + np.array([one, two, 0], dtype=np.uint64)
    driver._processors = processors  # tiles are cut by it
    driver._tuning = Tuning(
        device_copies=100 if copies else 0, host_copies=100 if copies else 0, device_copy_nbytes=1 << 40
    )
    plan, _ = fly(driver, Pieces(table, int(table[:, 2].sum()), on_host=False))
    assert plan.engine is (Engine.COPY if copies else Engine.KERNEL)
    np.testing.assert_array_equal(target, expected)
    driver.close(one)
    driver.close(two)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 5000), st.integers(1, 1 << 22)), min_size=1, max_size=200),
    st.integers(1, 200),
    st.booleans(),
)
def test_the_shape_covers_every_byte_once(sizes, processors, on_host):
    table = np.array([(0, n % 16, size) for n, size in enumerate(sizes)], dtype=np.uint64)
    nbytes, tuning = sum(sizes), Tuning()
    made = shape(table, nbytes, processors, tuning, on_host=on_host)
    assert int(made.table[:, 2].sum()) == nbytes
    assert made.work == made.tiles * len(made.table) < 1 << 32
    assert tuning.min_tile_nbytes <= made.tile_nbytes <= tuning.max_tile_nbytes
    assert (made.tile_nbytes & (made.tile_nbytes - 1)) == 0
    assert made.tiles * made.tile_nbytes >= int(made.table[:, 2].max()) + 15
    assert made.work <= 4 * (nbytes // made.tile_nbytes + len(table)) + 2048, "most tiles are empty"
    assert 1 <= made.blocks * 8 - made.work < 8 or made.blocks * 8 == made.work or made.blocks == tuning.host_blocks
    assert not on_host or made.blocks <= tuning.host_blocks


def test_host_memory_takes_part(driver):
    host = map_shared(-1, NBYTES)
    host[:] = np.random.default_rng(2).integers(0, 256, NBYTES, dtype=np.uint8)
    address = int(host.ctypes.data)
    driver.lock_host(address, NBYTES, is_writable=True)
    there, _ = driver.allocate(NBYTES)
    starts = np.arange(0, NBYTES, 4096, dtype=np.uint64)
    sizes = np.full(len(starts), 4000, dtype=np.uint64)
    for source, target in ((address, there), (there, address)):
        table = np.stack((starts + np.uint64(source), starts + np.uint64(target), sizes), axis=1)
        plan, _ = fly(driver, Pieces(table, int(sizes.sum()), on_host=True))
        assert plan.engine is Engine.KERNEL
    mask = np.tile(np.arange(4096) < 4000, NBYTES // 4096)
    np.testing.assert_array_equal(view(there, NBYTES)[mask], host[mask])
    assert not view(there, NBYTES)[~mask].any()
    driver.unlock_host(address)
    driver.close(there)


def test_a_plan_flies_many_times_and_at_once(driver, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_LATE", "2")
    one, _ = driver.allocate(NBYTES)
    rows = np.array([(one + n * 64, one + NBYTES // 2 + n * 64, 64) for n in range(100)], dtype=np.uint64)
    plan = driver.compile(Pieces(rows, 6400, on_host=False))
    flights = [driver.begin(plan, 0, 0) for _ in range(3)]
    assert not any(flight.is_done() for flight in flights)
    for flight in flights:
        while not flight.is_done():
            pass
    view(one, NBYTES)[:6400] = 7
    again = driver.begin(plan, 0, 0)
    while not again.is_done():
        pass
    assert (view(one, NBYTES)[NBYTES // 2 : NBYTES // 2 + 6400] == 7).all()
    assert again.device_ns() > 0
    plan.drop()
    driver.close(one)


def test_device_time_is_the_events_where_it_is_asked_for(library, tmp_path, monkeypatch):
    driver, _ = make_driver(library, tmp_path, monkeypatch, Tuning(timed=True))
    one, _ = driver.allocate(NBYTES)
    _, flight = fly(driver, Pieces(np.array([[one, one + 64, 64]], dtype=np.uint64), 64, on_host=False))
    assert flight.device_ns() == 1000
    driver.stop()


# ---------------------------------------------------------------------------------------- memory and events


def test_facts_are_the_drivers(library, tmp_path, monkeypatch):
    driver, ready = make_driver(library, tmp_path, monkeypatch)
    assert (ready.devices, ready.name, ready.device_uuid) == (2, "Fake GPU 0", "10" * 16)
    assert ready.total_nbytes == 1 << 30
    before = driver.free_nbytes()
    address, handle = driver.allocate(5)
    assert len(handle) == 64
    assert before - driver.free_nbytes() == 2 << 20, "whole pages: an IPC handle opens all that shares one"
    driver.close(address)
    assert driver.free_nbytes() == before
    with pytest.raises(PoolExhausted, match="OUT_OF_MEMORY"):
        driver.allocate(2 << 30)
    driver.stop()


def test_a_handle_opened_twice_is_closed_twice(driver):
    _, handle = driver.allocate(NBYTES)
    opened = [driver.open(NBYTES, handle, -1) for _ in range(2)]
    for address in opened:
        driver.close(address)
    with pytest.raises(InvalidArgument, match=str(NBYTES)):
        driver.open(NBYTES + 1, handle, -1)
    for bad in (b"", b"x" * 64, b"x" * 63):
        with pytest.raises(InvalidArgument):
            driver.open(NBYTES, bad, -1)
        with pytest.raises(InvalidArgument):
            driver.open_event(bad)


def test_memory_comes_by_file_descriptor(driver):
    fd = os.memfd_create("vmm")
    os.ftruncate(fd, NBYTES)
    there = map_shared(fd, NBYTES)
    address = driver.open(NBYTES, b"", fd)
    with pytest.raises(InvalidArgument):
        driver.open(NBYTES * 2, b"", fd)
    os.close(fd)
    driver.wipe(address, 8)
    view(address, NBYTES)[8:16] = 5
    assert there[:20].tolist() == [0] * 8 + [5] * 8 + [0] * 4
    driver.close(address)
    read, write = os.pipe()
    with pytest.raises(InvalidArgument):
        driver.open(NBYTES, b"", read)
    os.close(read)
    os.close(write)


def test_events_are_waited_for_and_recorded(driver):
    number, handle = driver.make_event()
    other = driver.open_event(handle)
    assert other != number
    one, _ = driver.allocate(NBYTES)
    pieces = Pieces(np.array([[one, one + 64, 64]], dtype=np.uint64), 64, on_host=False)
    fly(driver, pieces, other, number)
    fly(driver, pieces, number, other)
    driver.close(one)


def test_host_memory_that_cannot_be_locked_is_no_lack_of_gpu_memory(driver, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_LOCKABLE", "4096")
    with pytest.raises(Unavailable, match="8192"):
        driver.lock_host(1 << 20, 8192, is_writable=True)


def test_a_table_that_cannot_be_locked_leaves_no_gpu_memory_behind(driver, monkeypatch):
    one, _ = driver.allocate(NBYTES)
    rows = np.array([(one + n * 64, one + NBYTES // 2 + n * 64, 64) for n in range(100)], dtype=np.uint64)
    before = driver.free_nbytes()
    monkeypatch.setenv("FAKE_CUDA_LOCKABLE", "4096")
    with pytest.raises(Unavailable, match=str(2 << 20)) as raised:
        driver.compile(Pieces(rows, 6400, on_host=False))
    assert "LimitMEMLOCK" in raised.value.remedy
    assert driver.free_nbytes() == before
    monkeypatch.delenv("FAKE_CUDA_LOCKABLE")
    fly(driver, Pieces(rows, 6400, on_host=False))


# ---------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("FAKE_CUDA_INIT", "100", NotFound, "no GPU"),
        ("FAKE_CUDA_INIT", "999", Unavailable, "999"),
        ("FAKE_CUDA_DEVICES", "0", NotFound, "GPU 0"),
        ("FAKE_CUDA_CONTEXT", "2", Unavailable, "OUT_OF_MEMORY"),
        ("FAKE_CUDA_CONTEXT", "46", Unavailable, "DEVICE_UNAVAILABLE"),
        ("FAKE_CUDA_HOST_POINTERS", "0", Unavailable, "host memory"),
    ],
)
def test_a_device_that_cannot_be_used_says_why(library, tmp_path, monkeypatch, name, value, error, match):
    monkeypatch.setenv(name, value)
    with pytest.raises(error, match=match) as raised:
        make_driver(library, tmp_path, monkeypatch)
    assert raised.value.remedy


def test_without_a_driver_the_remedy_names_one(tmp_path):
    with pytest.raises(Unsupported, match="no NVIDIA driver"):
        NvidiaDriver(library=str(tmp_path / "libcuda.so.1"))


def test_a_kernel_is_kept_whole_or_not_at_all(tmp_path):
    path = keep_cubin(tmp_path)
    assert kernel.read_cached(path) == b"fake cubin"
    raw = path.read_bytes()
    assert raw[:32] == hashlib.sha256(b"fake cubin").digest()
    for bad in (b"", raw[:-1], raw[:32], raw[:10], bytes(32) + raw[32:]):
        path.write_bytes(bad)
        assert kernel.read_cached(path) is None
    kernel.write_cached(path, b"other")
    assert kernel.read_cached(path) == b"other"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert kernel.read_cached(None) is None
    kernel.write_cached(None, b"x")
    kernel.write_cached(Path("/proc/nowhere/x.cubin"), b"x")


def test_the_name_of_a_kept_kernel_holds_what_it_depends_on(tmp_path):
    home = {"HOME": str(tmp_path)}
    first = kernel.cache_path(home, "sm_90", 13000, Tuning())
    assert first.parent == tmp_path / ".cache" / "xferd"
    others = {
        kernel.cache_path(home, "sm_80", 13000, Tuning()),
        kernel.cache_path(home, "sm_90", 13010, Tuning()),
        kernel.cache_path(home, "sm_90", 13000, Tuning(unroll=8)),
        kernel.cache_path(home, "sm_90", 13000, Tuning(streaming=True)),
    }
    assert len(others | {first}) == 5
    assert kernel.cache_path(home, "sm_90", 13000, Tuning(host_copies=9)) == first
    assert kernel.cache_path({"CACHE_DIRECTORY": "/a:/b", "XDG_CACHE_HOME": "/c"}, "sm_90", 1, Tuning()).parts[1] == "a"
    assert kernel.cache_path({}, "sm_90", 1, Tuning()) is None


# ---------------------------------------------------------------------------------------- as a worker


@pytest.mark.slow
def test_a_worker_moves_by_it(environment):
    with Host(NBYTES) as host, WorkerRig(driver="cuda", env=environment) as rig:
        assert isinstance(rig.ready, control.Ready), rig.ready
        for number in (1, 2):
            assert rig.ask(control.Allocate(number, NBYTES)).check()
        want = host.fill(3)
        host.map_in(rig, 1)
        starts = np.random.default_rng(4).permutation(NBYTES // 4096).astype(np.uint64) * np.uint64(4096)
        sizes = np.full(len(starts), 4096, dtype=np.uint64)
        here, there, third = (
            np.stack((starts + np.uint64(base), sizes), axis=1) for base in (host.address, at(1), at(2))
        )
        ins, across, outs = ((Side.HOST, Side.DEVICE), (Side.DEVICE, Side.DEVICE), (Side.DEVICE, Side.HOST))
        told = rig.move(here, there, sides=ins)
        assert (told.outcome, told.engine) == (Outcome.DONE, Engine.KERNEL)
        assert rig.move(there, third[::-1], sides=across, table_id=5).outcome is Outcome.DONE
        rig.put_again(5)
        assert rig.take().outcome is Outcome.DONE
        host.array[:] = 0
        assert rig.move(third[::-1], here, sides=outs).outcome is Outcome.DONE
        np.testing.assert_array_equal(host.array, want)
        assert rig.ask(control.Ask()).pinned_nbytes == NBYTES


@pytest.mark.slow
def test_a_sticky_error_ends_the_worker(environment):
    """The warm-up is the first start of the kernel, so the second command is its third."""
    with WorkerRig(driver="cuda", env={**environment, "FAKE_CUDA_ILLEGAL_AT": "3"}) as rig:
        assert rig.ask(control.Allocate(1, NBYTES)).check()
        source, target = [[at(1, n * 64), 32] for n in range(10)], [[at(1, 4096 + n * 64), 32] for n in range(10)]
        assert rig.move(source, target).outcome is Outcome.DONE
        told = rig.move(source, target)
        assert told.outcome is Outcome.FAILED
        assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in told.text
        assert rig.process.wait(5) == 3


@pytest.mark.slow
def test_an_error_that_is_not_sticky_leaves_the_worker(environment):
    with WorkerRig(driver="cuda", env=environment) as rig:
        for bad in ("00" * 64, "ab"):
            assert rig.ask(control.Open(3, NBYTES, bad)).code == "invalid_argument"
        assert rig.ask(control.Allocate(1, 2 << 30)).code == "pool_exhausted"
        assert rig.ask(control.Allocate(1, NBYTES)).check()
        assert rig.move([[at(1), 8]], [[at(1, 8), 8]]).outcome is Outcome.DONE


@pytest.mark.slow
def test_a_worker_compiles_anew_what_the_driver_does_not_take(environment, tmp_path):
    """Without NVRTC that fails, and the worker says so before it ends."""
    path = keep_cubin(tmp_path)
    kernel.write_cached(path, b"of another driver")
    with WorkerRig(driver="cuda", env=environment) as rig:
        assert isinstance(rig.ready, control.Reply)
        assert "kernel cannot be compiled" in rig.ready.message
        assert "xferd[cuda]" in rig.ready.remedy
