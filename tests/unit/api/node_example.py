"""Runs the Node.js example against a socket; shared by the test over the fake engine and the one over a daemon."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "clients/examples/node"


async def run_example(socket_path: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error; installs the example's packages once."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on this machine")
    if not (FOLDER / "node_modules/@grpc/grpc-js").exists():
        code, out, err = await _run("npm", "install", "--no-audit", "--no-fund")
        assert code == 0, out + err
    return await _run("node", "transfer.mjs", XFERD_GRPC_SOCKET=socket_path)


async def _run(*command: str, **env: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=FOLDER,
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(100):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()
