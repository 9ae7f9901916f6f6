"""A program that knows nothing of xferd but its proto file moves bytes through a real daemon and finds them right."""

from __future__ import annotations

import json
from typing import Protocol

import pytest
from node_example import run_example

pytestmark = pytest.mark.slow


class Daemon(Protocol):
    """What this test needs of the fixture ``daemon``."""

    grpc_socket: str


async def test_the_node_example_verifies_its_bytes(daemon: Daemon) -> None:
    code, out, err = await run_example(str(daemon.grpc_socket))
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["bytes_equal"] is True
    assert result["moved_nbytes"] == [131072, 131072]
    assert result["routes"] == [["local"], ["local"]]
