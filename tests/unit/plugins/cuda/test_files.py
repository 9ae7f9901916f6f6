"""Files to memory of a GPU and back: what the libraries are asked for, and what is told of their ends."""

from __future__ import annotations

import select
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from worker_rig import Host

from xferd.api.errors import MoveFailed
from xferd.plugins.cuda.files import LIBRARY_THREADS, FileLibrary, FileMovers, FilePlan, Kvikio, SystemCalls, look

NBYTES = 1 << 16


@pytest.fixture
def memory():
    with Host(NBYTES) as made:
        yield made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8).tobytes())
    return path


def rows_of(*rows):
    return np.array(rows, dtype=np.uint64)


# ---------------------------------------------------------------------------------------- system calls


def test_rows_of_a_file_are_read_and_written_to_their_places(memory, file):
    base, had = memory.address, file.read_bytes()
    assert SystemCalls().move(str(file), rows_of((4096, base, 100), (0, base + 200, 50)), is_write=False) == 150
    assert bytes(memory.array[:100]) == had[4096:4196]
    assert bytes(memory.array[200:250]) == had[:50]
    want = memory.fill(2)
    assert SystemCalls().move(str(file), rows_of((7, base + 3, 10), (100, base, 3)), is_write=True) == 13
    now = file.read_bytes()
    assert now == had[:7] + bytes(want[3:13]) + had[17:100] + bytes(want[:3]) + had[103:]


def test_a_file_that_ends_too_early_moves_nothing_that_is_told(memory, file):
    assert SystemCalls().move(str(file), rows_of((NBYTES - 4, memory.address, 8)), is_write=False) == 0


@pytest.mark.parametrize("is_write", [False, True])
def test_a_file_that_is_not_there_fails_and_is_not_made(memory, tmp_path, is_write):
    path = tmp_path / "none"
    with pytest.raises(MoveFailed, match=str(path)):
        SystemCalls().move(str(path), rows_of((0, memory.address, 8)), is_write=is_write)
    assert not path.exists()


def test_simulated_devices_have_system_calls():
    library, refusal = look("simulated")
    assert isinstance(library, SystemCalls)
    assert not refusal


# ---------------------------------------------------------------------------------------- kvikio


class StubKvikio:
    """Takes calls until ``refuses_at``; what it took ends when it is waited for, with an error for ``fails``."""

    def __init__(self, *, refuses_at=99, fails=(), is_compatible=False):
        self.refuses_at, self.fails = refuses_at, fails
        self.calls, self.ended, self.opened, self.settings = [], [], [], []
        self.defaults = SimpleNamespace(
            is_compat_mode_preferred=lambda: is_compatible, set=lambda *pair: self.settings.append(pair)
        )

    def CuFile(self, path, flags):  # noqa: N802 - its name
        self.opened.append((path, flags))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.opened.append("closed")

    def pread(self, span, nbytes, offset):
        return self._take("read", span, nbytes, offset)

    def pwrite(self, span, nbytes, offset):
        return self._take("write", span, nbytes, offset)

    def _take(self, way, span, nbytes, offset):
        number = len(self.calls)
        if number == self.refuses_at:
            raise ValueError("no such memory")
        face = span.__cuda_array_interface__
        assert face["shape"] == (nbytes,)
        assert face["typestr"] == "|u1"
        self.calls.append((way, offset, face["data"][0], nbytes))

        def get():
            assert "closed" not in self.opened
            self.ended.append(number)
            if number in self.fails:
                raise RuntimeError(f"call {number} failed")
            return nbytes

        return SimpleNamespace(get=get)


ROWS = ((0, 1000, 10), (50, 2000, 20), (90, 3000, 30))


@pytest.mark.parametrize(("is_write", "flags", "way"), [(False, "r", "read"), (True, "r+", "write")])
def test_kvikio_is_given_all_rows_and_waited_for(is_write, flags, way):
    kvikio = StubKvikio()
    assert Kvikio(kvikio).move("/a", rows_of(*ROWS), is_write=is_write) == 60
    assert kvikio.calls == [(way, *row) for row in ROWS]
    assert kvikio.ended == [0, 1, 2]
    assert kvikio.opened == [("/a", flags), "closed"]
    assert kvikio.settings == [("num_threads", LIBRARY_THREADS)]


def test_no_call_is_under_way_after_one_has_failed():
    kvikio = StubKvikio(fails=(0, 2))
    with pytest.raises(MoveFailed, match="call 0 failed"):
        Kvikio(kvikio).move("/a", rows_of(*ROWS), is_write=False)
    assert kvikio.ended == [0, 1, 2]


def test_no_call_is_under_way_after_one_was_refused():
    kvikio = StubKvikio(refuses_at=2)
    with pytest.raises(MoveFailed, match="no such memory"):
        Kvikio(kvikio).move("/a", rows_of(*ROWS), is_write=False)
    assert kvikio.ended == [0, 1]


def test_the_manner_says_which_way_bytes_go():
    assert "past host memory" in Kvikio(StubKvikio()).manner
    assert "through host memory" in Kvikio(StubKvikio(is_compatible=True)).manner


# ---------------------------------------------------------------------------------------- threads


class Held(FileLibrary):
    """Comes back when it is let."""

    manner = "a test's"

    def __init__(self):
        self.gate = threading.Semaphore(0)

    def move(self, path, rows, *, is_write):
        self.gate.acquire()
        if path == "bad":
            raise MoveFailed("as the test says", remedy="none")
        return 7


def wait_for(flight):
    for _ in range(1000):
        try:
            if flight.is_done():
                return
        except MoveFailed:
            return
        select.select([], [], [], 0.005)
    raise TimeoutError


def test_a_flight_ends_when_the_library_has_come_back():
    library = Held()
    movers = FileMovers(library)
    plans = [FilePlan(path, rows_of((0, 0, 7)), is_write=False) for path in ("good", "bad", "good")]
    flights = [movers.begin(plan) for plan in plans]
    assert not any(flight.is_done() for flight in flights)
    assert plans[0].nbytes == 0
    for _ in flights:
        library.gate.release()
    for flight in flights:
        wait_for(flight)
    with pytest.raises(MoveFailed, match="as the test says"):
        flights[1].is_done()
    assert flights[0].is_done()
    assert [plan.nbytes for plan in plans] == [7, 0, 7]
    assert all(flight.device_ns() > 0 for flight in flights)
