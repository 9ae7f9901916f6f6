"""The manager's protocol over a real datagram socket, by path and by abstract name; bad variables are told."""

import os
import secrets
import socket
import tempfile
import time
from pathlib import Path

import pytest

from xferd.api.errors import ConfigError
from xferd.daemon.sdnotify import Notifier, inherited_fds, listen_fds, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request):
    with tempfile.TemporaryDirectory(prefix="xf") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        if request.param == "path":
            address = str(Path(folder) / "notify")
            sock.bind(address)
        else:
            address = f"@xferd-test-{secrets.token_hex(8)}"
            sock.bind(f"\0{address[1:]}")
        yield address, sock


def receive(sock):
    return sock.recv(4096).decode().split("\n")


def test_states(manager):
    address, sock = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
    assert notifier.is_listening
    assert notifier.ready("up\nand running")
    assert receive(sock) == ["READY=1", "STATUS=up and running"]
    assert notifier.stopping("going", extend_s=1.5)
    assert receive(sock) == ["STOPPING=1", "STATUS=going", "EXTEND_TIMEOUT_USEC=1500000"]
    assert notifier.watchdog()
    assert receive(sock) == ["WATCHDOG=1"]
    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    state, stamp, _ = receive(sock)
    assert state == "RELOADING=1"
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_fds_are_stored(manager):
    address, sock = manager
    memory = os.memfd_create("pool")
    try:
        os.write(memory, b"pool bytes")
        assert Notifier(address).store_fds("pool-host", [memory, memory])
    finally:
        os.close(memory)
    raw, fds, _, _ = socket.recv_fds(sock, 4096, 8)
    assert raw.decode().split("\n") == ["FDSTORE=1", "FDNAME=pool-host"]
    assert len(fds) == 2
    assert os.pread(fds[0], 100, 0) == b"pool bytes"
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "x" * 256])
def test_names_that_cannot_be_stored(name):
    with pytest.raises(ValueError, match="cannot name"):
        Notifier("@x").store_fds(name, [])


def test_nobody_listens(tmp_path):
    assert not Notifier().ready()
    assert not Notifier.from_environ({}).is_listening
    assert not Notifier(str(tmp_path / "gone")).ready()
    assert not Notifier("vsock:2:1").is_listening


def test_watchdog_interval():
    assert watchdog_interval_s({}, 7) is None
    assert watchdog_interval_s({"WATCHDOG_USEC": "30000000"}, 7) == 30.0
    assert watchdog_interval_s({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "7"}, 7) == 0.5
    assert watchdog_interval_s({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "8"}, 7) is None
    for text in ("x", "-1", "0", "1" * 30):
        with pytest.raises(ConfigError):
            watchdog_interval_s({"WATCHDOG_USEC": text}, 7)


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_PID": "7", "LISTEN_FDS": "x"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "900000"},
    ],
)
def test_contradictory_variables(environ):
    with pytest.raises(ConfigError):
        inherited_fds(environ, 7)


def test_fds_for_another_process_are_not_ours():
    environ = {"LISTEN_PID": "8", "LISTEN_FDS": "1"}
    assert inherited_fds(environ, 7) == {}
    assert listen_fds(environ, 7) == {}
    assert listen_fds({}, 7) == {}
