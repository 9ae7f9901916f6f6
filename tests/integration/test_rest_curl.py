"""docs/rest.md is true: its curl lines run in order against a daemon, and no verb is missing.

What each call answered is read from curl itself (``write-out`` in a curlrc), so that the page needs no marks for it.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from fake_engine import FakeEngine
from rest_harness import serving

from xferd.api.rest._table import ROUTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rest.md"

EXPECTED_FAILURES = Counter(
    {
        ("GET", "/v1/regions/{id}/bytes", 416): 1,
        ("GET", "/v1/regions/{id}/bytes", 401): 1,
        ("GET", "/v1/regions/{id}", 404): 1,
        ("GET", "/readyz", 503): 1,
        # without etcd
        ("PUT", "/v1/metadata/labels/{label}", 501): 1,
        ("GET", "/v1/metadata/labels/{label}", 501): 1,
        ("DELETE", "/v1/metadata/labels/{label}", 501): 1,
    }
)
"""What the page shows on purpose. Anything else from 400 on is a page that is wrong, or a daemon."""

pytestmark = [
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
    pytest.mark.slow,
]


@dataclass(frozen=True)
class Run:
    """What running the page gave."""

    status: int
    calls: Counter[tuple[str, str, int]]
    output: str
    errors: str


def script() -> str:
    """Return all ``sh`` blocks of the page, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    return "set -eu -o pipefail\n" + "\n".join(blocks)


def pattern_of(method: str, url: str) -> str:
    """Return the pattern of the route that a call went to; a literal path comes before one with parts."""
    path = urlsplit(url).path
    for route in sorted(ROUTES, key=lambda route: route.path.count("{")):
        if route.method == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route.path), path):
            return route.path
    raise AssertionError(f"the page calls {method} {path}, which is no route")


async def run_page(folder: Path, sockets: Mapping[str, str]) -> Run:
    """Run the page's script in an empty folder."""
    (folder / ".curlrc").write_text('write-out = "%{stderr}@@ %{method} %{url_effective} %{http_code}\\n"\n')
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        script(),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "CURL_HOME": str(folder), "HOME": str(folder), **sockets},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    calls = re.findall(r"^@@ (\w+) (\S+) (\d+)$", errors.decode(), flags=re.MULTILINE)
    assert process.returncode is not None
    return Run(
        process.returncode,
        Counter((method, pattern_of(method, url), int(status)) for method, url, status in calls),
        output.decode(errors="replace"),
        errors.decode(errors="replace"),
    )


def check(run: Run) -> None:
    """Hold a run against the table of routes: all ends well but what is meant to fail, and every verb occurs."""
    assert run.status == 0, run.errors + run.output
    failures = Counter({call: count for call, count in run.calls.items() if call[2] >= 400})
    assert failures == EXPECTED_FAILURES, run.output
    answered = {(method, path) for method, path, status in run.calls if status < 400 or status == 501}
    assert answered == {(route.method, route.path) for route in ROUTES}


@asynccontextmanager
async def running(folder: Path, name: str) -> AsyncIterator[str]:
    """Run a daemon with a file root of its own, from READY to its end; yields its admin socket."""
    folder.joinpath("root").mkdir(parents=True)
    disk = folder / "ssd"
    disk.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
        notify.bind(str(folder / "notify"))
        settings = [
            f"node.run_dir={folder / 'run'}",
            f"node.name={name}",
            f'files.roots=["{folder / "root"}"]',
            "backends.object.stores.kv.url=memory:///",
            "backends.cuda.driver=simulated",
            'pools=[{name="host", nbytes="64MiB"}, {name="vram", kind="VRAM", nbytes="1MiB"}]',
            f'storage_pools=[{{name="ssd", nbytes="16MiB", slab_nbytes="8MiB", directories=[{{path="{disk}"}}]}}]',
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; from xferd.daemon.cli import main; sys.exit(main())",
            "serve",
            *(part for setting in settings for part in ("--set", setting)),
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(30):
                while b"READY=1" not in await asyncio.get_running_loop().sock_recv(notify, 4096):
                    pass
            yield str(folder / "run" / "admin.sock")
        finally:
            process.terminate()
            assert await process.wait() == 0


async def test_the_page_against_two_daemons(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="xf") as name:  # short: a socket's path has at most 107 bytes
        here, there = Path(name, "a"), Path(name, "b")
        async with running(here, "node-a") as first, running(there, "node-b") as second:
            check(await run_page(tmp_path, {"XFERD_ADMIN_SOCKET": first, "XFERD_OTHER_SOCKET": second}))


async def test_the_page_against_the_fake_engine(tmp_path: Path) -> None:
    async with serving() as here, serving(FakeEngine("node-b")) as other:
        sockets = {"XFERD_ADMIN_SOCKET": here.socket_path, "XFERD_OTHER_SOCKET": other.socket_path}
        check(await run_page(tmp_path, sockets))
        assert here.engine.nothing_held()
