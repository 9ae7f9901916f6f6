"""Peers are measured in processes of their own: their bytes are verified, their failures are errors of ours.

Most tests have a library of the tests' own in place of Mooncake's, with the same names, which moves bytes between the
two processes by the kernel and fails when told to. The real wheels (extra ``peers``) are tried where they are.
"""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from cluster import eventually

from xferd.api.errors import DeadlineExceeded, InternalError
from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._mooncake import Mooncake
from xferd.clients.bench._nixl import Nixl, NixlDefault
from xferd.clients.bench._pace import Pace
from xferd.clients.bench._rows import make_rows
from xferd.clients.bench._schedule import measure

BRIEF = Pace(rounds=2, visit_s=0.0, min_requests=3)
NBYTES = 1 << 20
LIBRARY = """
import ctypes, os, signal, sys, time

class Piece(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.process_vm_readv.restype = LIBC.process_vm_writev.restype = ctypes.c_ssize_t
FAIL = os.environ.get("FAKE_FAILS", "")
LIBC.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)

class TransferEngine:
    def initialize(self, host, handshake, protocol, device):
        print("fake engine", protocol, flush=True)
        return 0 if FAIL != "initialize" else -7
    def register_memory(self, address, nbytes):
        return 0
    def get_rpc_port(self):
        return os.getpid()
    def batch_transfer_sync_write(self, peer, near, far, nbytes):
        return self.move(LIBC.process_vm_writev, peer, near, far, nbytes)
    def batch_transfer_sync_read(self, peer, near, far, nbytes):
        return self.move(LIBC.process_vm_readv, peer, near, far, nbytes)
    def move(self, call, peer, near, far, nbytes):
        if FAIL == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if FAIL == "hang":
            time.sleep(3600)
        if FAIL == "status":
            return -1
        if FAIL == "forget":
            return 0
        ours = (Piece * len(near))(*zip(near, nbytes))
        theirs = (Piece * len(far))(*zip(far, nbytes))
        pid = int(peer.rpartition(":")[2])
        moved = call(pid, ours, len(near), theirs, len(far), 0)
        return 0 if moved == sum(nbytes) else -2
"""


@pytest.fixture
def fake(tmp_path):
    """A maker of systems whose library is the one above."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").write_text("")
    (tmp_path / "mooncake/engine.py").write_text(LIBRARY)

    class Fake(Mooncake):
        fails = ""
        places = (Place.LOCAL, Place.TCP)

        @classmethod
        def installed(cls):
            return "fake", "1"

        def environ(self, place):
            return {"PYTHONPATH": str(tmp_path), "FAKE_FAILS": self.fails}

    def make(fails: str = "", timeout_s: float = 60.0) -> Fake:
        system = Fake(NBYTES)
        system.fails = fails
        system.answer_timeout_s = timeout_s
        return system

    before = {child.pid for child in psutil.Process().children(recursive=True)}  # of tests that share a process
    yield make
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def case(op: str = "WRITE", prepared: str = "transfer", place: Place = Place.TCP) -> Case:
    return Case(place, op, 4096, 64, prepared=prepared)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_bytes_go_the_right_way_however_prepared(fake, op):
    with fake() as system:
        probes = [system.probe(case(op, prepared)) for prepared in ("transfer", "lists", "no")]
        rows = make_rows(measure(probes, BRIEF, lambda _probe: None))
    assert [row.verified for row in rows] == [True] * 3
    assert all(row.requests == BRIEF.rounds * BRIEF.min_requests for row in rows)
    assert all(row.cpu_s_per_gb for row in rows)


@pytest.mark.slow
def test_each_place_has_processes_of_its_own(fake):
    before = len(psutil.Process().children())
    with fake() as system:
        for place in (Place.LOCAL, Place.TCP):
            system.probe(case(place=place))
            system.probe(case("READ", place=place))
        assert len(psutil.Process().children()) == before + 4


@pytest.mark.slow
def test_parts_of_a_request_add_up(fake):
    with fake() as system:
        probe = system.probe(case(prepared="no"))
        probe.begin(1)
        samples = probe.spend(BRIEF, 0).samples
    assert len(samples) == BRIEF.min_requests
    for sample in samples:
        assert sample.seconds == pytest.approx(sample.prepare_s + sample.post_s + sample.transfer_s)
        assert sample.prepare_s > 0


@pytest.mark.slow
def test_bytes_that_a_peer_forgets_are_noticed(fake):
    with fake("forget") as system:
        [row] = make_rows(measure([system.probe(case())], BRIEF, lambda _probe: None))
    assert row.verified is False
    assert "missing bytes" in row.faults[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "message"),
    [("crash", "mooncake initiator ended with signal 11"), ("status", "a transfer ended with status -1")],
)
def test_a_peer_that_fails_is_an_error_that_says_what_it_printed(fake, fails, message):
    with fake(fails) as system:
        probe = system.probe(case())
        probe.begin(1)
        with pytest.raises(InternalError, match=message) as caught:
            probe.request()
        assert "fake engine tcp" in str(caught.value)


@pytest.mark.slow
def test_a_peer_that_does_not_start_is_an_error(fake):
    with fake("initialize") as system, pytest.raises(InternalError, match="initialize ended with status -7"):
        system.probe(case())


@pytest.mark.slow
def test_a_peer_that_does_not_answer_is_ended(fake):
    with fake("hang", timeout_s=1.5) as system:
        probe = system.probe(case())
        probe.begin(1)
        with pytest.raises(DeadlineExceeded, match="mooncake initiator did not answer"):
            probe.request()


@pytest.mark.slow
def test_idle_processes_are_stopped_so_that_others_have_the_cores(fake):
    before = {child.pid for child in psutil.Process().children()}
    with fake() as system:
        probe = system.probe(case())
        for visit in (1, 2):
            probe.begin(visit)
            probe.request()
            assert probe.verify() == ""
            children = [child for child in psutil.Process().children() if child.pid not in before]
            assert len(children) == 2
            # A signal takes its moment, on a busy machine a long one.
            eventually(lambda them=children: all(each.status() == psutil.STATUS_STOPPED for each in them))


@pytest.mark.slow
def test_nothing_is_left_of_a_benchmark_that_was_killed(fake, tmp_path):
    """Stopped processes cannot see that their connection closes: the kernel kills them."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys\n"
        "from xferd.clients.bench._mooncake import Mooncake\n"
        "from xferd.clients.bench._cases import Case, Place\n"
        "Mooncake.installed = classmethod(lambda cls: ('fake', '1'))\n"
        f"Mooncake.environ = lambda self, place: {{'PYTHONPATH': {str(tmp_path)!r}}}\n"
        f"with Mooncake({NBYTES}) as system:\n"
        "    system.probe(Case(Place.TCP, 'WRITE', 4096, 64)).begin(1)\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    bench = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert bench.stdout.readline() == "ready\n"
    children = psutil.Process(bench.pid).children()
    assert len(children) == 2
    bench.kill()
    bench.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("place", [Place.LOCAL, Place.TCP])
@pytest.mark.parametrize("peer", [Nixl, NixlDefault, Mooncake])
def test_real_wheels_move_the_right_bytes(peer, place):
    if peer.installed() is None:
        pytest.skip(f"{peer.name}'s wheel is not installed: make setup-peers")
    if place not in peer.places:
        pytest.skip(f"{peer.name} is not measured for {place.value}")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with peer(NBYTES) as system:
        cases = [case(op, prepared, place) for op in ("READ", "WRITE") for prepared in ("transfer", "lists", "no")]
        rows = make_rows(measure([system.probe(one) for one in cases], BRIEF, lambda _probe: None))
    assert [(row.case, row.verified) for row in rows] == [(one, True) for one in cases]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
