"""xferctl against real daemons: every verb, for people and for programs, and every way to end."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cluster import eventually

from xferd.api.errors import XferdError
from xferd.clients import Access, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster import DaemonProcess

pytestmark = pytest.mark.slow

MIB = 1 << 20
SLOW_FILES = (
    "backends.posix=false",
    'backends.faulty.inner="posix"',
    'backends.faulty.faults=[{kind="delay", delay="50ms"}]',
    "transfers.chunk=65536",
)
"""A daemon whose files move at 64 KiB every 50 ms a slot: slow enough to be met in the middle."""


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-c", "import sys; from xferd.clients.ctl import main; sys.exit(main())", *map(str, words)]


def environment(daemon: DaemonProcess, **extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XFERD_")}
    return kept | {"XFERD_SOCKET": str(daemon.session_socket)} | extra


def ctl(daemon: DaemonProcess, *words: str | Path, **extra: str) -> Ended:
    done = subprocess.run(
        command(*words), env=environment(daemon, **extra), capture_output=True, text=True, timeout=60, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def owner(pair: tuple[DaemonProcess, DaemonProcess]) -> Iterator[Client]:
    """A client on the second node that shares what it allocates."""
    with Client.connect(pair[1].session_socket, "owner") as client:
        yield client


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("pools", "/v1/pools"),
        ("devices", "/v1/devices"),
        ("sessions", "/v1/sessions"),
        ("backends", "/v1/backends"),
        ("transfers", "/v1/transfers"),
        ("holds", "/v1/holds"),
        ("config", "/v1/config"),
        ("log-level", "/v1/log-level"),
    ],
)
def test_json_is_what_the_rest_face_answers(
    pair: tuple[DaemonProcess, DaemonProcess], owner: Client, verb: str, path: str
) -> None:
    owner.allocate(4096)
    done = ctl(pair[1], verb, "--json")
    assert (done.status, done.err) == (0, "")
    assert done.document == pair[1].get(path)[1]


def test_the_status_is_the_nodes(pair: tuple[DaemonProcess, DaemonProcess]) -> None:
    mine, theirs = ctl(pair[0], "--json", "status").document, pair[0].get("/v1/node")[1]
    assert mine.keys() == theirs.keys()
    assert mine["node"] == theirs["node"]
    assert ctl(pair[0], "status").out.startswith("node       a\nstate      READY\n")


@pytest.mark.parametrize("verb", ["pools", "sessions", "backends", "regions", "holds", "config", "peers", "agents"])
def test_people_get_a_table(pair: tuple[DaemonProcess, DaemonProcess], owner: Client, verb: str) -> None:
    owner.allocate(4096, access=Access.READ)
    done = ctl(pair[1], verb)
    assert (done.status, done.err) == (0, "")
    assert len(done.out.splitlines()) >= 2
    assert "\x1b" not in done.out, "colours in a pipe"


def test_peers_and_agents_are_those_of_the_cluster(pair: tuple[DaemonProcess, DaemonProcess], owner: Client) -> None:
    [peer] = ctl(pair[1], "peers", "--json").document["peers"]
    assert (peer["node"]["name"], peer["state"]) == ("a", "READY")
    assert {"address": "owner@b", "node": "b"} in ctl(pair[1], "agents", "--json").document["agents"]


def test_regions_of_another_node_are_asked_there(pair: tuple[DaemonProcess, DaemonProcess], owner: Client) -> None:
    region = owner.allocate(4096, access=Access.READ, label="kv")
    owner.allocate(4096)
    listing = ctl(pair[0], "regions", "--node", "b", "--json").document
    assert (listing["node"], [item["id"] for item in listing["regions"]]) == ("b", [str(region.id)])
    assert ctl(pair[0], "regions").out == "no regions are shared\n"


def test_bytes_go_from_file_to_region_to_file(
    pair: tuple[DaemonProcess, DaemonProcess], owner: Client, no_leaks: Callable[..., None]
) -> None:
    a, b = pair
    data = os.urandom(3 * MIB + 17)
    (a.files / "in.bin").write_bytes(data)
    region = owner.allocate(4 * MIB, access=Access.READ_WRITE)
    no_leaks(a)
    there = f"region:{region.id}@b+4096"
    done = ctl(a, "cp", f"file:{a.files}/in.bin", there)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(
        rf"file:\S+ > {re.escape(there)}: 3.00 MiB in \S+ \S+, \S+ [kMG]B/s, by posix \+ tcp\n", done.out
    )
    assert region.array()[4096 : 4096 + len(data)].tobytes() == data
    back = ctl(a, "cp", there, "file:out.bin", "--nbytes", str(len(data)), "--json")
    assert (back.status, back.document["state"]) == (0, "DONE")
    assert back.document["telemetry"]["moved_nbytes"] == len(data)
    assert (a.files / "out.bin").read_bytes() == data
    here = ctl(b, "cp", f"region:{region.id}+4096", "file:here.bin", "--nbytes", "1MiB")
    assert here.status == 0
    assert (b.files / "here.bin").read_bytes() == data[:MIB]


def test_explain_and_estimate_move_nothing(pair: tuple[DaemonProcess, DaemonProcess], owner: Client) -> None:
    (pair[0].files / "x.bin").write_bytes(b"x" * 4096)
    region = owner.allocate(4096, access=Access.READ_WRITE)
    ends = ("file:x.bin", f"region:{region.id}@b")
    explained = ctl(pair[0], "explain", *ends, "--json").document
    assert [hop["backend"] for hop in explained["route"]] == ["posix", "tcp"]
    assert ctl(pair[0], "explain", *ends).out.startswith("route       posix: FILE@a > staging@a")
    estimated = ctl(pair[0], "estimate", *ends, "--json").document
    assert estimated["duration_s"] > 0
    assert ctl(pair[0], "estimate", *ends).out.startswith("time   ")
    assert not region.array().any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cp", "file:missing.bin", "file:y.bin"), "missing.bin"),
        (("cp", "file:/etc/passwd", "file:y.bin"), "files.roots"),
        (("cp", "file:small.bin", "file:large.bin"), "its end would stay"),
        (("cp", "file:small.bin", "file:y.bin", "--nbytes", "1GiB"), "limit: 10 bytes there"),
        (("cp", "file:small.bin", "region:12345"), "12345"),
        (("cp", "region:1@b", "region:2@b"), "b"),
        (("cp", "file:small.bin", "file:y.bin", "--backend", "tcp"), "tcp"),
        (("regions", "--node", "nowhere"), "nowhere"),
        (("end-session", "s99-none"), "s99-none"),
        (("log-level", "loud"), "limit: debug, info, warning, error"),
    ],
)
def test_what_the_daemon_refuses_is_one_line_and_status_1(
    pair: tuple[DaemonProcess, DaemonProcess], words: tuple[str, ...], message: str
) -> None:
    (pair[0].files / "small.bin").write_bytes(b"x" * 10)
    (pair[0].files / "large.bin").write_bytes(b"y" * 11)
    done = ctl(pair[0], *words)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("xferctl: ")
    assert message in done.err
    assert "; remedy: " in done.err
    assert done.err.count("\n") == 1
    assert (pair[0].files / "large.bin").read_bytes() == b"y" * 11


def test_an_operator_ends_a_session(daemon: DaemonProcess) -> None:
    with Client.connect(daemon.session_socket, "victim") as client:
        client.allocate(4096)
        [session] = ctl(daemon, "sessions", "--json").document["sessions"]
        assert session["agent"] == "victim"
        assert ctl(daemon, "end-session", session["session"]).out == f"session {session['session']} has ended\n"
        assert ctl(daemon, "sessions").out == "no sessions\n"
        with pytest.raises(XferdError):
            client.allocate(4096)


def test_a_drained_node_refuses_until_undrained(daemon: DaemonProcess) -> None:
    try:
        assert ctl(daemon, "drain", "--timeout", "5s", "--json").document == {"drained": True, "transfers_left": 0}
        assert "DRAINING" in ctl(daemon, "status").out
        refused = ctl(daemon, "peers")
        assert (refused.status, refused.out) == (1, "")
        assert "draining" in refused.err
    finally:
        taken_back = ctl(daemon, "undrain")
    assert taken_back.out == "takes new work\n"
    assert ctl(daemon, "peers").status == 0


def test_the_log_level_is_set_and_shown(daemon: DaemonProcess) -> None:
    assert ctl(daemon, "log-level", "debug").out == "debug (was info)\n"
    assert ctl(daemon, "log-level").out == "debug\n"
    assert ctl(daemon, "log-level", "info", "--json").document == {"level": "info", "previous": "debug"}


def test_the_admin_token_is_asked_for(make_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef-secret\n")
    daemon = make_daemon("t", tcp=False, settings=(f"rest.token_file={token}",))
    refused = ctl(daemon, "status")
    assert (refused.status, refused.out) == (1, "")
    assert "admin token" in refused.err
    assert ctl(daemon, "status", XFERD_TOKEN="0123456789abcdef-secret").status == 0
    assert ctl(daemon, "status", "--token", "wrong").status == 1


def test_grpc_alone_is_enough(daemon: DaemonProcess) -> None:
    for verb in ("status", "peers"):
        done = ctl(daemon, verb, "--grpc", f"unix:{daemon.grpc_socket}", XFERD_SOCKET="/nowhere/session.sock")
        assert (done.status, done.err) == (0, "")


def read_terminal(fd: int, process: subprocess.Popen[bytes], timeout_s: float = 30.0) -> str:
    """Return what a process writes to its terminal until it exits."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        readable, _, _ = select.select([fd], [], [], 0.1)
        if readable:
            try:
                shown += os.read(fd, 65536)
            except OSError:  # EIO: the other end is closed
                break
        elif process.poll() is not None:
            break
    return shown.decode()


def test_a_terminal_shows_progress_and_colours(make_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = make_daemon("p", tcp=False, settings=SLOW_FILES)
    (daemon.files / "in.bin").write_bytes(bytes(MIB))
    mine, theirs = pty.openpty()
    environ = environment(daemon, TERM="xterm-256color", COLUMNS="120")
    for key in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        environ.pop(key, None)
    with subprocess.Popen(
        command("cp", "file:in.bin", "file:out.bin"), env=environ, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        text = read_terminal(mine, process)
        assert process.wait(30) == 0
    os.close(mine)
    assert re.search(r"\d+(\.\d+)?/1\.0 MiB", text), "bytes of the whole"
    assert re.search(r"[kM]B/s", text), "the rate"
    assert re.search(r"0:00:\d\d", text), "the time that is left"
    assert "\x1b[" in text
    assert (daemon.files / "out.bin").read_bytes() == bytes(MIB)


def test_ctrl_c_cancels_the_copy_and_nothing_is_held(make_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = make_daemon("c", tcp=False, settings=SLOW_FILES)
    (daemon.files / "in.bin").write_bytes(bytes(16 * MIB))
    before = daemon.footprint()
    with subprocess.Popen(
        command("cp", "file:in.bin", "file:out.bin"),
        env=environment(daemon),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        eventually(lambda: moved(daemon) > 0, what="bytes that moved")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert re.fullmatch(rf"file:in.bin > file:out.bin: cancelled after \d+ of {16 * MIB} bytes\n", out)
    assert ctl(daemon, "transfers", "--active").out == "no transfers\n"
    after = daemon.footprint()
    assert {key: after[key] for key in ("regions", "sessions", "holds", "active")} == {
        key: before[key] for key in ("regions", "sessions", "holds", "active")
    }


def test_ctrl_c_ends_a_drain_that_waits_and_the_node_goes_on_draining(
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = make_daemon("w", tcp=False, settings=SLOW_FILES)
    (daemon.files / "in.bin").write_bytes(bytes(16 * MIB))
    with Client.connect(daemon.session_socket) as client:
        source, target = client.register_file("in.bin"), client.allocate(16 * MIB)
        with client.transfer("READ", target, source, timeout_s=60.0):
            with subprocess.Popen(
                command("drain"), env=environment(daemon), stderr=subprocess.PIPE, text=True
            ) as process:
                eventually(lambda: daemon.get("/v1/node")[1]["draining"], what="the drain")
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (130, "")
            left = ctl(daemon, "drain", "--timeout", "0s", "--json")
            assert (left.status, left.document) == (1, {"drained": False, "transfers_left": 1})


def test_a_daemon_that_dies_during_a_copy_exits_with_3(make_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = make_daemon("d", tcp=False, settings=SLOW_FILES)
    (daemon.files / "in.bin").write_bytes(bytes(16 * MIB))
    with subprocess.Popen(
        command("cp", "file:in.bin", "file:out.bin"),
        env=environment(daemon),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        eventually(lambda: moved(daemon) > 0, what="bytes that moved")
        daemon.kill()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (3, "")
    assert err.startswith("xferctl: ")
    assert err.count("\n") == 1


def moved(daemon: DaemonProcess) -> int:
    return sum(item["telemetry"]["moved_nbytes"] for item in daemon.get("/v1/transfers")[1]["transfers"])
