"""The documentation is true: its examples run against real daemons, and its tables name what there is.

What runs: every ``python`` block of the Python pages, and every ``sh`` block of the shell pages, page by page from top
to bottom, blocks of one page together. A block after ``<!-- not run: reason -->`` is left out. Blocks of other kinds
(``console``, ``text``, ``toml``) show something and do not run; ``toml`` is loaded as configuration.

Where they run: nodes ``a`` and ``b`` know each other, $XFERD_SOCKET is a's, ``/run/xferd`` stands for a's run
directory, the working directory is a's first root, and a client on ``b`` shares a region with the label ``kv``.
docs/rest.md has a test of its own, and so has the hex dump of docs/protocol.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xferd.api.types import Access, PeerState
from xferd.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import DaemonProcess

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PAGES = ("README.md", "docs/python-client.md")
SHELL_PAGES = ("docs/xferctl.md", "docs/operations.md")
PAGES = sorted(str(page.relative_to(ROOT)) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))

_BLOCK = re.compile(
    r"(?P<skip>^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its text begins on the page, and why it is not run, if so."""

    language: str
    text: str
    line: int
    reason: str


def blocks(page: str, language: str) -> list[Block]:
    """Return the blocks of a page in a language, in order."""
    return blocks_of((ROOT / page).read_text(), language)


def blocks_of(text: str, language: str) -> list[Block]:
    """Return the blocks of a text in a language, in order."""
    return [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")), match["reason"] or "")
        for match in _BLOCK.finditer(text)
        if match["language"] == language
    ]


@pytest.fixture
def place(pair: tuple[DaemonProcess, DaemonProcess]) -> Iterator[dict[str, str]]:
    """The environment that the examples run in."""
    a, b = pair
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XFERD_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Client.connect(b.session_socket, "kv-owner") as owner:
        owner.allocate(8 << 20, access=Access.READ_WRITE, label="kv")
        yield kept | {
            "PATH": path,
            "XFERD_SOCKET": str(a.session_socket),
            "RUN_DIR": str(a.run_dir),
            "FILES": str(a.files),
        }


def run(argv: list[str], place: dict[str, str]) -> None:
    """Run to the end; fails with all that was said."""
    done = subprocess.run(argv, env=place, cwd=place["FILES"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_examples_run(page: str, place: dict[str, str]) -> None:
    parts = [block for block in blocks(page, "python") if not block.reason]
    assert parts, "the page has no example"
    # Blank lines in front keep line numbers, so that a traceback points at the page.
    source = ""
    for block in parts:
        source += "\n" * (block.line - source.count("\n")) + block.text
    code = f"exec(compile({source!r}, {page!r}, 'exec'), {{'__name__': '__main__'}})"
    run([sys.executable, "-W", "error", "-c", code], place)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("page", SHELL_PAGES)
def test_shell_examples_run(page: str, place: dict[str, str]) -> None:
    parts = [block for block in blocks(page, "sh") if not block.reason]
    assert len(parts) >= 5
    script = "set -euxo pipefail\n" + "\n".join(block.text for block in parts)
    run(["bash", "-c", script.replace("/run/xferd", place["RUN_DIR"])], place)


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_blocks_that_do_not_run_are_valid_shell(page: str) -> None:
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}:{block.line}: {done.stderr}"


def test_toml_examples_are_configuration(tmp_path: Path) -> None:
    from xferd.daemon.config import ConfigSource

    file = tmp_path / "xferd.toml"
    found = blocks("docs/operations.md", "toml")
    assert found
    for block in found:
        file.write_text(block.text)
        config = ConfigSource(file, {}, ()).load()
        named = tomllib.loads(block.text)
        assert all(hasattr(config, section) for section in named), f"docs/operations.md:{block.line}"


def test_every_metric_is_explained(pair: tuple[DaemonProcess, DaemonProcess]) -> None:
    text = pair[0].get("/metrics")[1].decode()
    exported = set(re.findall(r"^# TYPE (\S+) ", text, flags=re.MULTILINE))
    page = (ROOT / "docs/operations.md").read_text()
    explained = re.findall(r"^\| `(xferd_\w+)` \| (.+) \|$", page, flags=re.MULTILINE)
    assert {name for name, _ in explained} == exported
    assert len(explained) == len(exported), "a metric is explained twice"


def test_every_state_of_a_peer_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    explained = re.findall(r"^\| `([A-Z]+)` \| ", page, flags=re.MULTILINE)
    assert sorted(explained) == sorted(state.value for state in PeerState)


def test_every_verb_of_xferctl_is_explained() -> None:
    from xferd.clients.ctl._app import app

    page = (ROOT / "docs/xferctl.md").read_text()
    verbs = {command.name for command in app.registered_commands}
    explained = set(re.findall(r"^\| `([a-z-]+)[^`]*` \| ", page, flags=re.MULTILINE))
    assert verbs - explained == {"cp", "explain", "estimate"}, "those three have a section"
    assert all(re.search(rf"`{verb}\b", page) for verb in verbs)
    assert all(f"xferctl {verb}" in page for verb in verbs), "a verb without an example"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)\s]*)?\)", text)
    dead = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not dead


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```sh\nls\n```\n", [("ls\n", "")]),
        ("<!-- not run: needs root -->\n```sh\nls\n```\n", [("ls\n", "needs root")]),
        ("<!-- a remark -->\n```sh\nls\n```\n", [("ls\n", "")]),
        ("```toml\na = 1\n```\n\n```sh\na\nb\n```\n", [("a\nb\n", "")]),
    ],
)
def test_the_rule_for_blocks(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(block.text, block.reason) for block in blocks_of(text, "sh")] == expected


def test_a_failing_example_fails_the_test(place: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="exit status 1"):
        run(["bash", "-c", "set -e; false; true"], place)
