"""A device worker as a process, over its real queues and socket: what it moves, what it answers, how it ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from worker_rig import Host, WorkerRig, at

from xferd.api import simulated
from xferd.api.errors import InvalidArgument, NotFound, OutOfBounds, PoolExhausted, Unavailable, Unsupported
from xferd.api.mapping import map_shared
from xferd.plugins.cuda import control
from xferd.plugins.cuda.layout import Engine, Outcome, Side

NBYTES = 1 << 20
IN = (Side.HOST, Side.DEVICE)
OUT = (Side.DEVICE, Side.HOST)

EXPORTER = """
import os, sys
from xferd.api.mapping import map_shared
from xferd.api.simulated import export_fd
fd = os.memfd_create("engine")
os.ftruncate(fd, int(sys.argv[1]))
map_shared(fd, int(sys.argv[1]))[:] = 7
print(export_fd(fd, int(sys.argv[1])).hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shared():
    """A worker that tests use in turn, because each takes a fifth of a second to start."""
    with WorkerRig() as made:
        yield made


@pytest.fixture
def rig(shared):
    yield shared
    for number in range(10):
        assert shared.ask(control.Close(number)).check()
        assert shared.ask(control.DropHost(number)).check()
    assert shared.ask(control.Ask()).check().free_nbytes == shared.ready.total_nbytes


@pytest.fixture
def host():
    with Host(NBYTES) as made:
        yield made


@pytest.fixture
def exporter():
    """A process that has exported memory: (process, handle)."""
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(NBYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def opened(handle):
    """Memory behind a simulated handle, as another process sees it."""
    fd, nbytes = simulated.open_handle(bytes.fromhex(handle))
    try:
        return map_shared(fd, nbytes)
    finally:
        os.close(fd)


def allocate(rig, number, nbytes=NBYTES):
    return opened(rig.ask(control.Allocate(number, nbytes)).check().handle)


def ended(rig, timeout_s=10):
    return rig.process.wait(timeout_s)


# ---------------------------------------------------------------------------------------- moves


def test_bytes_go_in_across_and_out_again(rig, host):
    one, two = allocate(rig, 1), allocate(rig, 2)
    host.map_in(rig, 5)
    want = host.fill(1)
    rng = np.random.default_rng(2)
    blocks = rng.permutation(NBYTES // 512)[:500].astype(np.uint64) * np.uint64(512)
    sizes = rng.integers(1, 512, 500).astype(np.uint64)
    out = rng.permutation(blocks)
    told = rig.move(
        np.stack((blocks + np.uint64(host.address), sizes), axis=1),
        np.stack((out + np.uint64(at(1)), sizes), axis=1),
        sides=IN,
    )
    assert (told.outcome, told.nbytes, told.engine) == (Outcome.DONE, sizes.sum(), Engine.KERNEL)
    expected = np.zeros(NBYTES, dtype=np.uint8)
    for source, target, size in zip(blocks.tolist(), out.tolist(), sizes.tolist(), strict=True):
        expected[target : target + size] = want[source : source + size]
    np.testing.assert_array_equal(one, expected)

    told = rig.move([[at(1), NBYTES]], [[at(2), NBYTES]])
    assert (told.outcome, told.engine) == (Outcome.DONE, Engine.COPY)
    np.testing.assert_array_equal(two, expected)

    host.array[:] = 0
    assert rig.move([[at(2), NBYTES]], [[host.address, NBYTES]], sides=OUT).outcome is Outcome.DONE
    np.testing.assert_array_equal(host.array, expected)
    assert rig.ask(control.Ask()).pinned_nbytes == NBYTES


def test_rows_of_unequal_size_pair_up_by_bytes(rig):
    one, two = allocate(rig, 1), allocate(rig, 2)
    one[:] = np.arange(NBYTES) % 251
    told = rig.move([[at(1, 100), 10], [at(1), 90]], [[at(2, 1), 40], [at(2, 50), 60]])
    assert told.outcome is Outcome.DONE
    moved = np.concatenate((one[100:110], one[:90]))
    np.testing.assert_array_equal(np.concatenate((two[1:41], two[50:110])), moved)
    assert two[0] == two[41] == two[110] == 0


def test_memory_of_another_process_is_read_and_written(rig, exporter):
    _, handle = exporter
    theirs, ours = opened(handle), allocate(rig, 2)
    assert rig.ask(control.Open(1, NBYTES, handle)).check()
    assert rig.move([[at(1), NBYTES]], [[at(2), NBYTES]]).outcome is Outcome.DONE
    assert (ours == 7).all()
    ours[:] = 9
    assert rig.move([[at(2), 16]], [[at(1, NBYTES - 16), 16]]).outcome is Outcome.DONE
    assert (theirs[-16:] == 9).all()
    assert theirs[-17] == 7


def test_memory_can_come_as_a_file_descriptor(rig):
    fd = os.memfd_create("vmm")
    os.ftruncate(fd, NBYTES)
    there = map_shared(fd, NBYTES)
    assert rig.ask(control.Open(1, NBYTES), fd).check()
    refused = rig.ask(control.Open(3, NBYTES + 1), fd)
    os.close(fd)
    with pytest.raises(InvalidArgument, match="1048576"):
        refused.check()
    allocate(rig, 2)[:] = 3
    assert rig.move([[at(2), NBYTES]], [[at(1), NBYTES]]).outcome is Outcome.DONE
    assert (there == 3).all()


@pytest.mark.slow
def test_a_thousand_commands_each_move_their_bytes(rig):
    """They are taken in order, also around the end of the queue; each is told of once."""
    one, two = allocate(rig, 1), allocate(rig, 2)
    one[:] = np.random.default_rng(1).integers(0, 256, NBYTES)
    waiting, told = [], []
    for number in range(1000):
        if len(waiting) - len(told) >= 15:
            told.append(rig.take())
        waiting.append(rig.put([[at(1, number * 1000), 1000]], [[at(2, number * 1000), 1000]], slot=number % 16))
    while len(told) < len(waiting):
        told.append(rig.take())
    assert sorted(one.cookie for one in told) == waiting
    assert {one.outcome for one in told} == {Outcome.DONE}
    np.testing.assert_array_equal(one[:1000_000], two[:1000_000])
    assert not two[1000_000:].any()
    assert rig.queues.take_completion() is None


# ---------------------------------------------------------------------------------------- what is missing or wrong


def test_missing_memory_is_told_and_the_same_command_works_once_it_is_there(rig, host):
    allocate(rig, 1)
    source, target = [[host.address, NBYTES]], [[at(1), NBYTES]]
    assert rig.move(source, target, sides=IN).outcome is Outcome.MISSING
    host.map_in(rig, 5)
    assert rig.move(source, target, sides=IN).outcome is Outcome.DONE
    assert rig.move([[at(77), 1]], [[at(1), 1]]).outcome is Outcome.MISSING
    assert rig.move([[at(1), 1]], [[at(1, 8), 1]], wait=44).outcome is Outcome.MISSING
    assert rig.ask(control.DropHost(5)).check()
    assert rig.ask(control.DropHost(6)).check()
    assert rig.move(source, target, sides=IN).outcome is Outcome.MISSING


def test_a_region_past_the_end_is_refused_and_nothing_moves(rig):
    one = allocate(rig, 1)
    allocate(rig, 2)[:] = 5
    told = rig.move([[at(2), 8], [at(2, 8), 8]], [[at(1), 8], [at(1, NBYTES - 4), 8]])
    assert (told.outcome, told.nbytes) == (Outcome.REFUSED, 0)
    assert f"limit: {NBYTES} bytes" in told.text
    assert not one.any()
    assert rig.move([[at(2), 8]], [[at(1), 9]]).outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    "handle",
    ["", "ab", "zz" * 64, "00" * 64, simulated.SimulatedHandle(1 << 22, 3, 4, 5).to_bytes().hex()],
    ids=["none", "short", "not hex", "zeros", "no such process"],
)
def test_rubbish_handles_are_refused(rig, handle):
    for message in (control.Open(1, NBYTES, handle), control.OpenEvent(1, handle)):
        with pytest.raises(InvalidArgument):
            rig.ask(message).check()
    allocate(rig, 1)
    assert rig.move([[at(1), 8]], [[at(1, 8), 8]]).outcome is Outcome.DONE


@pytest.mark.slow
def test_a_handle_dies_with_its_process_but_open_memory_lives(rig, exporter):
    process, handle = exporter
    assert rig.ask(control.Open(1, NBYTES, handle)).check()
    with pytest.raises(InvalidArgument, match=str(NBYTES)):
        rig.ask(control.Open(2, NBYTES + 1, handle)).check()
    process.kill()
    process.wait()
    with pytest.raises(InvalidArgument, match=f"process {process.pid}"):
        rig.ask(control.Open(2, NBYTES, handle)).check()
    ours = allocate(rig, 3)
    assert rig.move([[at(1), NBYTES]], [[at(3), NBYTES]]).outcome is Outcome.DONE
    assert (ours == 7).all()


@pytest.mark.slow
def test_memory_is_bounded_and_comes_back():
    with WorkerRig(simulated_nbytes=4 * NBYTES) as small:
        assert small.ready.total_nbytes == small.ready.free_nbytes == 4 * NBYTES
        assert small.ask(control.Allocate(1, 3 * NBYTES)).check().free_nbytes == NBYTES
        with pytest.raises(PoolExhausted, match=str(NBYTES)):
            small.ask(control.Allocate(2, 2 * NBYTES)).check()
        assert small.ask(control.Close(1)).check().free_nbytes == 4 * NBYTES
        assert small.ask(control.Close(1)).check()
        assert small.ask(control.Allocate(2, 4 * NBYTES)).check()


def test_wipe_is_within_an_allocation(rig):
    one = allocate(rig, 1)
    one[:] = 1
    assert rig.ask(control.Wipe(1, 100, 50)).check()
    assert not one[100:150].any()
    assert one[:100].all()
    assert one[150:].all()
    with pytest.raises(OutOfBounds):
        rig.ask(control.Wipe(1, NBYTES, 1)).check()


def test_host_memory_without_an_fd_or_of_a_bad_size_is_refused(rig):
    with pytest.raises(InvalidArgument):
        rig.ask(control.MapHost(1, 4096, 4096)).check()
    with pytest.raises(InvalidArgument):
        rig.ask(control.MapHost(1, 4096, 1 << 60), rig.told).check()


def test_memory_sealed_against_writing_can_be_read(rig):
    import fcntl

    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    assert rig.ask(control.MapHost(1, 1 << 30, 4096), fd).check()
    os.close(fd)
    one = allocate(rig, 1)
    assert rig.move([[1 << 30, 4096]], [[at(1), 4096]], sides=IN).outcome is Outcome.DONE
    assert bytes(one[:4096]) == b"x" * 4096


def test_an_unknown_request_is_answered(rig):
    with pytest.raises(Unsupported, match="Ready"):
        rig.ask(rig.ready).check()


# ---------------------------------------------------------------------------------------- kept tables


def test_a_kept_table_moves_what_is_there_now(rig):
    one, two = allocate(rig, 1), allocate(rig, 2)
    one[:4] = 1, 2, 3, 4
    assert rig.move([[at(1), 4]], [[at(2), 4]], table_id=9).outcome is Outcome.DONE
    for value in (5, 6):
        one[:4] = value
        rig.put_again(9)
        told = rig.take()
        assert (told.outcome, told.nbytes) == (Outcome.DONE, 4)
        assert two[:4].tolist() == [value] * 4


def test_a_table_that_was_not_kept_is_asked_for(rig):
    allocate(rig, 1)
    rig.put_again(3)
    assert rig.take().outcome is Outcome.UNKNOWN_TABLE
    assert rig.move([[at(1), 4]], [[at(1, 8), 4]]).outcome is Outcome.DONE
    rig.put_again(0)
    assert rig.take().outcome is Outcome.UNKNOWN_TABLE


def test_a_kept_table_goes_with_the_memory_that_it_names(rig, host):
    one, two = allocate(rig, 1), allocate(rig, 2)
    host.map_in(rig, 5)
    across, inwards = ([[at(1), 4]], [[at(2), 4]]), ([[host.address, 4]], [[at(2), 4]])
    assert rig.move(*across, table_id=1).outcome is Outcome.DONE
    assert rig.move(*inwards, table_id=2, sides=IN).outcome is Outcome.DONE
    one[:4], host.array[:4] = 4, 5
    assert rig.ask(control.Close(1)).check()
    rig.put_again(1)
    assert rig.take().outcome is Outcome.UNKNOWN_TABLE
    assert rig.move(*across, table_id=1).outcome is Outcome.MISSING
    rig.put_again(2)
    assert rig.take().outcome is Outcome.DONE
    assert two[:4].tolist() == [5] * 4
    host.map_in(rig, 5)  # mapped anew: addresses have changed
    rig.put_again(2)
    assert rig.take().outcome is Outcome.UNKNOWN_TABLE


def test_a_number_that_is_given_anew_is_other_memory(rig):
    old, two = allocate(rig, 1), allocate(rig, 2)
    old[:] = 1
    assert rig.move([[at(1), 4]], [[at(2), 4]], table_id=1).outcome is Outcome.DONE
    allocate(rig, 1)[:] = 2
    rig.put_again(1)
    assert rig.take().outcome is Outcome.UNKNOWN_TABLE
    assert rig.move([[at(1), 4]], [[at(2), 4]], table_id=1).outcome is Outcome.DONE
    assert two[:4].tolist() == [2] * 4


# ---------------------------------------------------------------------------------------- events


class Event:
    """An event as an engine has it."""

    def __init__(self):
        self.fd = os.memfd_create("event")
        os.ftruncate(self.fd, simulated.EVENT_NBYTES)
        self.page = map_shared(self.fd, simulated.EVENT_NBYTES)
        self.handle = simulated.export_fd(self.fd, simulated.EVENT_NBYTES, simulated.EVENT_MAGIC).hex()

    def set(self, recorded, done):
        simulated.EVENT.pack_into(self.page.data, 0, recorded, done)


def test_a_move_waits_for_an_event_and_others_do_not(rig):
    one, two = allocate(rig, 1), allocate(rig, 2)
    event = Event()
    assert rig.ask(control.OpenEvent(4, event.handle)).check()
    event.set(3, 2)
    held = rig.put([[at(1), 4]], [[at(2), 4]], wait=4)
    free = rig.put([[at(1, 8), 4]], [[at(2, 8), 4]], slot=1)
    assert rig.take().cookie == free
    with pytest.raises(TimeoutError):
        rig.take(0.05)
    one[:4] = 8
    event.set(4, 3)  # recorded once more since: the move waits for what was recorded when it was begun
    assert rig.take().cookie == held
    assert two[:4].tolist() == [8] * 4
    event.set(9, 9)
    assert rig.move([[at(1), 4]], [[at(2), 4]], wait=4).outcome is Outcome.DONE
    os.close(event.fd)


def test_an_event_is_recorded_when_the_bytes_have_moved(rig):
    allocate(rig, 1)
    reply = rig.ask(control.MakeEvent(6)).check()
    fd, _ = simulated.open_handle(bytes.fromhex(reply.handle), simulated.EVENT_MAGIC)
    page = map_shared(fd, simulated.EVENT_NBYTES)
    os.close(fd)
    gate = Event()
    gate.set(1, 0)
    assert rig.ask(control.OpenEvent(7, gate.handle)).check()
    rig.put([[at(1), 4]], [[at(1, 8), 4]], wait=7, done=6)
    assert rig.ask(control.Ask())  # by now it has been begun, or will be before the next look
    deadline = time.monotonic() + 5
    while simulated.EVENT.unpack_from(page.data) != (1, 0):
        assert time.monotonic() < deadline
    gate.set(1, 1)
    assert rig.take().outcome is Outcome.DONE
    assert simulated.EVENT.unpack_from(page.data) == (1, 1)
    os.close(gate.fd)


# ---------------------------------------------------------------------------------------- faults and ends


def faults(text):
    return {"XFERD_SIMULATED_FAULTS": text}


@pytest.mark.slow
def test_a_failed_move_is_told_and_the_next_one_works():
    with WorkerRig(env=faults("fail=2")) as rig:
        one = allocate(rig, 1)
        one[:8] = range(8)
        outcomes = [rig.move([[at(1), 4]], [[at(1, 16 * n), 4]]) for n in range(1, 4)]
        assert [told.outcome for told in outcomes] == [Outcome.DONE, Outcome.FAILED, Outcome.DONE]
        assert "move 2 failed" in outcomes[1].text
        assert not one[32:36].any()


@pytest.mark.slow
def test_a_lost_device_fails_all_that_is_under_way_and_ends_the_worker():
    with WorkerRig(env=faults("lost=2")) as rig:
        allocate(rig, 1)
        event = Event()
        event.set(1, 0)
        assert rig.ask(control.OpenEvent(1, event.handle)).check()
        cookies = {rig.put([[at(1), 4]], [[at(1, 8), 4]], wait=1), rig.put([[at(1), 4]], [[at(1, 16), 4]], slot=1)}
        told = [rig.take(), rig.take()]
        assert {one.cookie for one in told} == cookies
        assert {one.outcome for one in told} == {Outcome.FAILED}
        assert "device was lost at move 2" in told[0].text
        assert ended(rig) == 3
        os.close(event.fd)


@pytest.mark.slow
def test_a_crash_ends_the_socket():
    with WorkerRig(env=faults("crash=1")) as rig:
        allocate(rig, 1)
        rig.put([[at(1), 4]], [[at(1, 8), 4]])
        assert ended(rig) == -signal.SIGKILL
        assert control.receive(rig.socket) is None


@pytest.mark.slow
def test_a_fault_can_strike_once_of_all_processes(tmp_path):
    env = faults(f"crash=1,once={tmp_path / 'struck'}")
    for status in (-signal.SIGKILL, None):
        with WorkerRig(env=env) as rig:
            allocate(rig, 1)
            rig.put([[at(1), 4]], [[at(1, 8), 4]])
            if status is None:
                assert rig.take().outcome is Outcome.DONE
            else:
                assert ended(rig) == status


@pytest.mark.slow
def test_a_hanging_worker_answers_nothing_and_can_be_killed():
    with WorkerRig(env=faults("hang=1")) as rig:
        allocate(rig, 1)
        rig.put([[at(1), 4]], [[at(1, 8), 4]])
        control.send(rig.socket, control.Ask())
        assert select.select([rig.socket, rig.told], [], [], 0.2)[0] == []
        rig.process.kill()
        assert ended(rig) == -signal.SIGKILL


@pytest.mark.slow
def test_a_stalled_move_leaves_the_worker_alone():
    with WorkerRig(env=faults("stall=1")) as rig:
        allocate(rig, 1)
        stalled = rig.put([[at(1), 4]], [[at(1, 8), 4]])
        assert rig.move([[at(1), 4]], [[at(1, 16), 4]], slot=1).cookie == stalled + 1
        assert rig.ask(control.Ask()).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"env": faults("unusable=1")}, Unavailable),
        ({"env": faults("nonsense=1")}, None),
        ({"device": 2, "devices": 2}, NotFound),
        pytest.param(
            {"driver": "cuda"},
            Unsupported,
            marks=pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU"),
        ),
    ],
    ids=["unusable", "bad faults", "no such device", "no driver"],
)
def test_a_worker_that_cannot_start_says_why(how, error):
    with WorkerRig(**how) as rig:
        assert isinstance(rig.ready, control.Reply)
        assert rig.ready.code == (error.code if error else "config")
        assert rig.ready.remedy
        assert ended(rig) == 1


@pytest.mark.slow
def test_a_worker_ends_with_its_socket_and_leaves_interrupts_to_its_parent():
    rig = WorkerRig()
    rig.process.send_signal(signal.SIGINT)
    assert rig.ask(control.Ask()).check()
    assert Path(f"/proc/{rig.process.pid}/comm").read_text() == "xferd-gpu0\n"
    rig.socket.close()
    assert ended(rig, 3) == 0
    rig.close()


@pytest.mark.slow
def test_a_worker_dies_with_its_parent(tmp_path):
    """Also while it hangs, when it would not see that the socket has ended."""
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from worker_rig import Host, WorkerRig, at\n"
        "from xferd.plugins.cuda import control\n"
        "rig = WorkerRig(env={'XFERD_SIMULATED_FAULTS': 'hang=1'})\n"
        "rig.ask(control.Allocate(1, 4096))\n"
        "rig.put([[at(1), 4]], [[at(1, 8), 4]])\n"
        "print(rig.process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        assert select.select([pidfd], [], [], 0.2)[0] == []
        parent.kill()
        assert select.select([pidfd], [], [], 5)[0] == [pidfd]
        os.close(pidfd)


@pytest.mark.slow
def test_an_idle_worker_sleeps_and_a_long_move_burns_no_core():
    with WorkerRig(env=faults("delay=0.5")) as rig:
        allocate(rig, 1)

        def busy_s():
            fields = Path(f"/proc/{rig.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = busy_s()
        assert rig.move([[at(1), 4]], [[at(1, 8), 4]]).outcome is Outcome.DONE
        assert busy_s() - before < 0.2
        before = busy_s()
        gate = threading.Event()
        gate.wait(0.5)  # nothing happens, which is what is measured
        assert busy_s() - before < 0.05
        assert rig.move([[at(1), 4]], [[at(1, 8), 4]]).outcome is Outcome.DONE


@pytest.mark.slow
def test_the_tool_that_checks_workers_of_a_gpu_runs_on_simulated_ones():
    tool = Path(__file__).parents[4] / "tools/gpu_worker_check.py"
    done = subprocess.run([sys.executable, tool, "--simulated"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.endswith("all parts ended well\n")
