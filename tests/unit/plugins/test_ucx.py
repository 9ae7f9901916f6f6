"""The ``ucx`` backend's settings, its errors, and what it refuses to peers; it moves bytes in the conformance suite."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from xferd.api.errors import ConfigError, PeerLost, ProtocolViolation, Unsupported
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.api.types import NodeInfo
from xferd.plugins.base import MappedSpace, PeerIdentity, RemoteSpace
from xferd.plugins.ucx import UcxBackend, UcxOptions
from xferd.plugins.ucx.library import IN_PROGRESS, OK, load, status_of
from xferd.plugins.ucx.worker import Worker

PEER = PeerIdentity("b", "id-b", 1)
ME = NodeInfo("a", "id-a", 1, "test", (), ("tcp", "ucx"), (), (), 0.0)


@pytest.mark.parametrize(
    ("pointer", "status"), [(None, OK), (0, OK), (0x7F00_0000_1000, IN_PROGRESS), ((1 << 64) - 16, -16)]
)
def test_what_a_call_returns_is_a_request_or_a_status(pointer, status):
    assert status_of(pointer) == status


def test_settings_are_named_without_their_prefix():
    with pytest.raises(ValidationError, match="UCX_TLS"):
        UcxOptions(settings={"UCX_TLS": "tcp"})
    options = UcxOptions(transports="tcp", devices="lo", settings={"TLS": "self"}, keepalive="500ms")
    found = options.ucx_settings()
    assert (found["TLS"], found["NET_DEVICES"], found["KEEPALIVE_INTERVAL"]) == ("self", "lo", "500000us")
    assert UcxOptions().ucx_settings()["TLS"] == "^cuda"  # which would make a CUDA context in the daemon


def test_a_library_that_is_not_there_is_named_with_the_remedy():
    with pytest.raises(Unsupported, match="/nowhere/libucp") as caught:
        load("/nowhere/libucp.so.0")
    assert "xferd[ucx]" in caught.value.remedy


@pytest.fixture(scope="module")
def ucp():
    try:
        return load("")
    except Unsupported as exc:
        pytest.skip(str(exc))


def test_a_setting_that_ucx_does_not_know_is_an_error(ucp):
    with pytest.raises(ConfigError, match="NO_SUCH"):
        Worker(ucp, {"NO_SUCH": "1"})
    with pytest.raises(Unsupported, match="No such device"):
        Worker(ucp, {"TLS": "nonsense"})


def test_without_a_transport_it_says_what_is_missing():
    refusal = UcxBackend(UcxOptions()).refusal(MappedSpace(), RemoteSpace("b", 1))
    assert "[backends.tcp]" in refusal


@pytest.mark.usefixtures("ucp")
def test_peers_get_nothing_that_was_not_agreed_on():
    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    async def main():
        backend = UcxBackend(UcxOptions(transports="self,tcp"))
        await backend.start()
        try:
            backend.attach(ME, Forbidden(), Forbidden())
            with pytest.raises(ProtocolViolation, match="not under way"):
                await backend.serve(PEER, pb.PeerRequest(ucx_pull=pb.UcxPull(id=5, tag=6, nbytes=7)))
            with pytest.raises(PeerLost, match="no endpoint"):
                await backend.serve(PEER, pb.PeerRequest(ucx_move=pb.UcxMove(id=5)))
            done = await backend.serve(PEER, pb.PeerRequest(ucx_abort=pb.UcxAbort(id=5)))
            assert done.HasField("done")
        finally:
            await backend.aclose()

    asyncio.run(main())
