"""``xferctl doctor`` shows what the daemon found, and where none answers what can be seen from outside."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xferd.api.types import Check, CheckState
from xferd.clients.ctl import main
from xferd.clients.ctl._doctor import look_around

if TYPE_CHECKING:
    from collections.abc import Iterator

OK, WARN, FAIL = CheckState.OK, CheckState.WARN, CheckState.FAIL


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xf") as folder:
        yield Path(folder)


def states(run_dir: Path) -> dict[str, CheckState]:
    found = list(look_around(run_dir))
    assert all(bool(check.remedy) == (check.state is not OK) for check in found)
    return {check.name: check.state for check in found}


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([Check("etcd", OK, "answers", "")], 0),
        ([Check("etcd", OK, "answers", ""), Check("fds", WARN, "few", "raise it")], 0),
        ([Check("etcd", FAIL, "does not answer", "start it"), Check("fds", WARN, "few", "raise it")], 1),
    ],
)
def test_the_status_says_whether_something_fails(threaded, capsys, checks, status):
    threaded.engine.checks = checks
    assert main(["--socket", str(threaded.path), "doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks) + sum(bool(check.remedy) for check in checks)
    assert lines[0].split() == ["ok" if status == 0 else "FAIL", "etcd", *checks[0].finding.split()]
    assert main(["--socket", str(threaded.path), "doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["checks"] == [
        {"name": check.name, "state": check.state.value, "finding": check.finding, "remedy": check.remedy}
        for check in checks
    ]


def test_nodes_lists_the_store(threaded, capsys):
    assert main(["--socket", str(threaded.path), "nodes", "--json"]) == 0
    assert [node["name"] for node in json.loads(capsys.readouterr().out)["nodes"]] == ["node-a"]
    assert main(["--socket", str(threaded.path), "nodes"]) == 0
    assert capsys.readouterr().out.startswith("NODE ")


def test_without_a_daemon_the_status_is_3(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(run_dir / "none/session.sock"), "doctor", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in found] == ["daemon", "run-dir"]
    assert "systemctl start xferd" in found[1]["remedy"]
    assert main(["--grpc", "127.0.0.1:1", "doctor"]) == 3
    assert "grpc.listen" in capsys.readouterr().out


def test_an_empty_run_directory_has_no_daemon(run_dir: Path) -> None:
    assert states(run_dir) == {"run-dir": OK, "session.sock": FAIL, "grpc.sock": FAIL, "process": FAIL}
    assert states(run_dir / "none") == {"run-dir": FAIL}


def test_sockets_of_a_dead_daemon_are_told_from_live_ones(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / "grpc.sock"))
    (run_dir / "session.sock").write_text("")
    found = {check.name: check.finding for check in look_around(run_dir)}
    assert "nobody listens" in found["grpc.sock"]
    assert "is no socket" in found["session.sock"]
    (run_dir / "session.sock").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as live:
        live.bind(str(run_dir / "session.sock"))
        live.listen()
        assert states(run_dir)["session.sock"] is OK


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the kernel does not list locks")
def test_a_daemon_that_hangs_is_named_by_its_process(run_dir: Path) -> None:
    (run_dir / "xferd.lock").write_text("1\n")
    assert states(run_dir)["process"] is FAIL
    with (run_dir / "xferd.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [process] = [check for check in look_around(run_dir) if check.name == "process"]
        assert process.state is WARN
        assert f"process {os.getpid()} holds" in process.finding


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_socket_of_others_says_which_group_may(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(run_dir / "grpc.sock"))
        live.listen()
        (run_dir / "grpc.sock").chmod(0)
        [check] = [check for check in look_around(run_dir) if check.name == "grpc.sock"]
    assert "may not open it" in check.finding
    assert "usermod -aG" in check.remedy
