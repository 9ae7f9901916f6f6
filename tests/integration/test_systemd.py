"""The daemon as systemd sees it: real processes and signals, a real NOTIFY_SOCKET, and units that systemd accepts."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
TOY = Path(__file__).with_name("lifecycle_app.py")
TIMEOUT_S = 30.0

pytestmark = pytest.mark.slow


class Toy:
    """The process, its lines, and the service manager that it notifies."""

    def __init__(self, process, manager):
        self.process = process
        self.manager = manager
        self.said = []

    def expect(self, what):
        """Read lines until the process says something; returns its values."""
        for line in self.process.stdout:
            values = json.loads(line)
            self.said.append(values["say"])
            if values["say"] == what:
                return values
        raise AssertionError(f"ended before it said {what!r}: {self.said}, {self.process.stderr.read()}")

    def notified(self, name):
        """Receive messages until one has an assignment of ``name``; returns its assignments."""
        while True:
            message = dict(line.split("=", 1) for line in self.manager.recv(65536).decode().split("\n"))
            if name in message:
                return message

    def kill(self, number):
        self.process.send_signal(number)

    def end(self):
        """Wait for the end; returns the exit status and the log's events by name."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        self.said.extend(json.loads(line)["say"] for line in out.splitlines())
        log = [json.loads(line) for line in err.splitlines()]
        return self.process.returncode, {line["event"]: line for line in log}


@pytest.fixture(params=["path"])
def start(request, tmp_path):
    """Return a function that starts the toy in a mode; kills what is left of it."""
    config = tmp_path / "xferd.toml"
    config.write_text('[log]\nformat = "json"\n[shutdown]\ndrain_timeout = "20s"\n')
    toys = []
    with (
        tempfile.TemporaryDirectory(prefix="xf") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.settimeout(TIMEOUT_S)
        if request.param == "abstract":
            address = f"@xferd-{secrets.token_hex(8)}"
            manager.bind(f"\0{address[1:]}")
        else:
            address = str(Path(folder) / "notify")
            manager.bind(address)

        def start(mode="", *, command=(), **environ):
            process = subprocess.Popen(
                [*command, sys.executable, "-W", "error", str(TOY), str(config)],
                env={**os.environ, "NOTIFY_SOCKET": address, "TOY": mode, **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            toys.append(Toy(process, manager))
            return toys[-1]

        start.config = config
        yield start
        for toy in toys:
            toy.process.kill()
            toy.process.communicate()


STOPPED = ["begin_drain", "announce", "drain", "withdraw", "closed", "closed", "left"]


@pytest.mark.parametrize("start", ["path", "abstract"], indirect=True)
def test_from_ready_to_stopped(start):
    toy = start()
    assert toy.notified("STATUS")["STATUS"] == "starting"
    assert toy.notified("READY")["STATUS"].startswith("ready: node ")
    toy.kill(signal.SIGTERM)
    stopping = toy.notified("STOPPING")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 20_000_000
    code, events = toy.end()
    assert code == 0
    assert toy.said == ["up", *STOPPED]
    assert events["stop_requested"]["cause"] == "SIGTERM"
    assert "daemon_failed" not in events


def test_drain_gets_what_is_left_of_its_time(start):
    toy = start()
    toy.expect("up")
    toy.kill(signal.SIGINT)
    assert 0 < toy.expect("drain")["timeout_s"] <= 20.0
    assert toy.end()[0] == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_at_once(start, second):
    toy = start("drain-waits")
    toy.expect("up")
    toy.kill(signal.SIGTERM)
    toy.expect("drain")
    toy.kill(second)
    code, _ = toy.end()
    assert code == -second
    assert "closed" not in toy.said


def test_a_signal_while_starting(start):
    toy = start("start-waits")
    toy.expect("starting")
    toy.kill(signal.SIGTERM)
    code, events = toy.end()
    assert code == 0
    assert "stopped_while_starting" in events
    assert "ready" not in events


@pytest.mark.parametrize(
    ("mode", "status", "event", "words"),
    [
        ("start-fails", 1, "daemon_failed", "the socket is taken; remedy: stop the other one"),
        ("config-fails", 2, "daemon_failed", "the secret is too short"),
        ("start-breaks", 1, "daemon_failed", ""),
        ("announce-fails", 0, "stop_step_failed", ""),
        ("withdraw-fails", 0, "stop_step_failed", ""),
        ("close-fails", 0, "component_close_failed", ""),
        ("work-left", 0, "drain_deadline_passed", ""),
        ("stray", 0, "task_outlived_its_owner", ""),
        ("stubborn", 1, "task_would_not_stop", ""),
        ("part-breaks", 1, "stop_requested", ""),
    ],
)
def test_failures(start, mode, status, event, words):
    toy = start(mode)
    if mode.startswith(("start", "config")):
        code, events = toy.end()
    else:
        toy.notified("READY")
        if mode != "part-breaks":
            toy.kill(signal.SIGTERM)
        code, events = toy.end()
        assert toy.said[-len(STOPPED) :] == STOPPED, "every step of the stop is made"
    assert code == status
    line = events[event]
    assert words in line.get("error", "")
    if mode == "start-breaks":
        assert "ZeroDivisionError" in line["exception"]
    if mode == "work-left":
        assert line["transfers"] == 3
    if mode in ("stray", "stubborn"):
        assert line["task"] == {"stray": "forgotten", "stubborn": "mule"}[mode]
    if mode == "part-breaks":
        assert line["cause"] == "a mover thread died"


def test_reload(start):
    toy = start()
    toy.notified("READY")
    start.config.write_text(
        '[log]\nformat = "json"\nlevel = "debug"\n[transfers]\nchunk = "1MiB"\n[files]\nroots = ["/data"]\n'
    )
    before = time.monotonic_ns() // 1000
    toy.kill(signal.SIGHUP)
    stamp = int(toy.notified("RELOADING")["MONOTONIC_USEC"])
    assert before <= stamp <= time.monotonic_ns() // 1000
    assert toy.notified("READY")["READY"] == "1"
    seen = toy.expect("reload")
    assert (seen["level"], seen["roots"]) == ("debug", ["/data"])
    assert seen["chunk"] == 8 << 20, "what waits for a restart is not passed on"
    start.config.write_text("[log]\nlevel = 3\n")
    toy.kill(signal.SIGHUP)
    toy.notified("RELOADING")
    toy.notified("READY")
    toy.kill(signal.SIGTERM)
    code, events = toy.end()
    assert code == 0
    assert events["reloaded"]["changed"] == ["log.level", "shutdown.drain_timeout"]
    assert events["reloaded"]["needs_restart"] == ["files.roots", "transfers.chunk"]
    assert str(start.config) in events["reload_failed"]["error"]
    assert "component_closed" in events, "the level took effect and outlived the broken reload"


def test_watchdog(start):
    toy = start(WATCHDOG_USEC="100000")
    for _ in range(3):
        assert toy.notified("WATCHDOG")["WATCHDOG"] == "1"
    toy.kill(signal.SIGTERM)
    assert toy.end()[0] == 0


def test_a_stuck_loop_feeds_no_watchdog(start):
    toy = start("loop-stuck", WATCHDOG_USEC="20000")
    toy.expect("stuck")
    toy.manager.settimeout(0.2)  # ten intervals
    pings = []
    with contextlib.suppress(TimeoutError):
        while len(pings) < 100:
            pings.append(toy.notified("WATCHDOG"))
    assert len(pings) <= 2, "the one at the start, and at most one before it stuck"


def test_socket_activation(start, tmp_path):
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not installed")
    with tempfile.TemporaryDirectory(prefix="xf") as folder:
        path = str(Path(folder) / "session.sock")
        # It starts the program when somebody connects, as the socket unit does.
        command = [activate, "--seqpacket", f"--listen={path}", "--fdname=session", "-E", "TOY", "-E", "NOTIFY_SOCKET"]
        toy = start(command=command)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            _connect(client, path, toy.process)
            seen = toy.expect("socket")
    assert seen == {"say": "socket", "name": "session", "address": path}


def _connect(client, path, process):
    """Connect once the activator listens; it says so on stderr."""
    for line in process.stderr:
        if "Listening on" in line:
            client.connect(path)
            return
    raise AssertionError("systemd-socket-activate did not listen")


@pytest.fixture
def verify():
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")

    def verify(folder):
        return subprocess.run(
            [analyze, "verify", "--man=no", *map(str, sorted(folder.iterdir()))],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    return verify


def test_units_are_accepted(verify, tmp_path):
    for name in ("xferd.service", "xferd.socket"):
        text = (UNITS / name).read_text().replace("/usr/bin/xferd", shutil.which("true"))
        (tmp_path / name).write_text(text)
    result = verify(tmp_path)
    assert result.returncode == 0, result.stderr
    ours = [line for line in result.stderr.splitlines() if "xferd" in line]
    assert ours == []


def test_the_check_would_notice(verify, tmp_path):
    text = (UNITS / "xferd.service").read_text().replace("/usr/bin/xferd", shutil.which("true"))
    (tmp_path / "xferd.service").write_text(text.replace("Type=notify", "Typo=notify"))
    assert "Typo" in verify(tmp_path).stderr


def test_unit_and_configuration_agree():
    from xferd.api.units import parse_seconds
    from xferd.daemon.config import load_config

    unit = dict(
        line.split("=", 1)
        for line in (UNITS / "xferd.service").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    config = load_config(UNITS / "xferd.toml", {"RUNTIME_DIRECTORY": f"/run/{unit['RuntimeDirectory']}"})
    assert parse_seconds(unit["TimeoutStopSec"]) > config.shutdown.drain_timeout
    assert unit["RestartPreventExitStatus"] == "2"
    assert unit["CacheDirectory"] == "xferd"  # HOME is not writable, and workers look for their kernel there
    sockets = (UNITS / "xferd.socket").read_text()
    assert f"ListenSequentialPacket={config.session_socket}" in sockets
    assert "FileDescriptorName=session" in sockets


@pytest.mark.parametrize("tool", ["systemd-sysusers", "systemd-tmpfiles"])
def test_sysusers_and_tmpfiles_parse(tool, tmp_path):
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    file = UNITS / f"{tool.removeprefix('systemd-')}.conf"
    option = ["--dry-run"] if tool == "systemd-sysusers" else ["--create", "--prefix=/nowhere"]
    result = subprocess.run(
        [program, *option, str(file)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "xferd" in result.stdout + result.stderr + file.read_text()
