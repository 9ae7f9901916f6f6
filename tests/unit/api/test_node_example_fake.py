"""The Node.js example moves and checks its bytes, and notices when they are wrong or the daemon refuses."""

from __future__ import annotations

import json

import pytest
from fake_engine import FakeEngine
from grpc_harness import serving
from node_example import run_example

from xferd.api.errors import PoolExhausted

pytestmark = pytest.mark.slow


async def test_the_example_verifies_its_bytes_and_leaves_nothing() -> None:
    engine = FakeEngine()
    async with serving(engine) as face:
        code, out, err = await run_example(face.socket_path)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["bytes_equal"] is True
    assert result["moved_nbytes"] == [131072, 131072]
    assert engine.nothing_held()


async def test_the_example_fails_on_a_wrong_byte() -> None:
    class Corrupting(FakeEngine):
        async def write_region(self, caller, region, offset, data):  # type: ignore[no-untyped-def]
            flipped = bytes([data[0] ^ 1]) + data[1:]
            return await super().write_region(caller, region, offset, flipped)

    async with serving(Corrupting()) as face:
        code, out, _ = await run_example(face.socket_path)
    assert code == 1
    assert json.loads(out)["bytes_equal"] is False


async def test_the_example_says_what_the_daemon_refused() -> None:
    engine = FakeEngine()
    engine.fail_next("allocate", PoolExhausted("the pool is full", limit="0 bytes", remedy="free something"))
    async with serving(engine) as face:
        code, out, err = await run_example(face.socket_path)
    assert (code, out) == (1, "")
    assert "RESOURCE_EXHAUSTED" in err
    assert "remedy: free something" in err
    assert engine.nothing_held()
