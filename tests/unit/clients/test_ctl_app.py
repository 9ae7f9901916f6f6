"""The command line is read as documented, and its exit status says whose fault it was."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from xferd.api.errors import Busy, PermissionDenied, Unavailable
from xferd.clients.ctl import main
from xferd.clients.ctl._app import hoist
from xferd.clients.ctl._link import is_unreachable

if TYPE_CHECKING:
    from pathlib import Path

VERBS = (
    *(
        "status",
        "doctor",
        "config",
        "log-level",
        "drain",
        "undrain",
        "version",
        "pools",
        "storage",
        "scrub",
        "fsck",
        "free",
        "sessions",
        "agents",
        "devices",
        "peers",
        "nodes",
        "regions",
    ),
    *(
        "backends",
        "routes",
        "transfers",
        "holds",
        "query",
        "objects",
        "delete-objects",
        "hand-over",
        "end-session",
        "cp",
        "explain",
        "estimate",
    ),
)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["pools", "--json"], ["--json", "pools"]),
        (["pools", "--socket", "s", "--json"], ["--socket", "s", "--json", "pools"]),
        (["transfers", "--active", "--grpc=x:1"], ["--grpc=x:1", "transfers", "--active"]),
        (["cp", "a", "--", "--json"], ["cp", "a", "--", "--json"]),
        (["--json", "drain", "--timeout", "5s"], ["--json", "drain", "--timeout", "5s"]),
        (["pools", "--token"], ["--token", "pools"]),
        ([], []),
    ],
)
def test_global_options_may_stand_anywhere(given: list[str], read: list[str]) -> None:
    assert hoist(given) == read


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "Usage: " in capsys.readouterr().out


def test_the_help_names_every_verb_and_cuts_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(VERBS)
    assert not [line for line in lines if line.endswith("...")]


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["pools", "--nonsense"],
        ["cp", "file:a"],
        ["cp", "/data/a", "file:b"],
        ["cp", "file:a", "file:b", "--nbytes", "12 parsecs"],
        ["drain", "--timeout", "soon"],
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "Error: " in streams.err


@pytest.mark.parametrize("verb", ["status", "peers"])
def test_no_daemon_exits_with_3_and_one_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "none.sock"), verb]) == 3
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("xferctl: no daemon answers at ")
    assert "; remedy: start xferd" in streams.err
    assert streams.err.count("\n") == 1


def test_a_port_where_nobody_listens_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connecting is refused
        assert main(["--grpc", f"127.0.0.1:{taken.getsockname()[1]}", "status"]) == 3
    assert "cannot be reached" in capsys.readouterr().err


def test_help_imports_nothing_that_talks() -> None:
    """The package is stood in for, because what its ``__init__`` imports for users is another matter."""
    code = """
import sys, types, xferd.clients.ctl._format as f
package = types.ModuleType("xferd.clients")
package.__path__ = [f.__file__.rpartition("/ctl/")[0]]
for name in [name for name in sys.modules if name.partition(".")[0] in ("xferd", "grpc", "numpy", "google")]:
    del sys.modules[name]
import xferd
sys.modules["xferd.clients"] = package
from xferd.clients.ctl import main
assert main(["--help"]) == 0
assert not {"grpc", "numpy", "xferd.api.wire", "xferd.clients.sync"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version_needs_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "none.sock"), "version"]) == 0
    assert "does not answer" in capsys.readouterr().out


class _Failure(grpc.RpcError):
    def __init__(self, *trailer: tuple[str, bytes]) -> None:
        super().__init__("failed")
        self._trailer = trailer

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._trailer


@pytest.mark.parametrize(
    ("error", "cause", "expected"),
    [
        (Unavailable("x"), ConnectionRefusedError(), True),
        (PermissionDenied("x"), PermissionError(), True),
        (Unavailable("x"), _Failure(), True),
        (Unavailable("draining"), _Failure(("xferd-error-bin", b"x")), False),
        (PermissionDenied("foreign region"), _Failure(("xferd-error-bin", b"x")), False),
        (Busy("x"), OSError(), False),
        (Unavailable("draining"), None, False),
    ],
)
def test_a_daemon_that_says_no_was_reached(error: Exception, cause: Exception | None, expected: bool) -> None:
    error.__cause__ = cause
    assert is_unreachable(error) is expected  # type: ignore[arg-type]
