"""A TCP listener with a client CA speaks only to those whose certificate that CA signed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
from fake_engine import FakeEngine
from grpc_harness import Client, serving

from xferd.api.errors import ConfigError
from xferd.api.grpc.server import GrpcFace, TlsFiles
from xferd.api.proto import xferd_v1_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates"),
]


@dataclass(frozen=True)
class Certificates:
    """PEM files: a CA, and one certificate it signed for both sides."""

    ca: Path
    cert: Path
    key: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    commands = [
        ["req", "-x509", *curve, "-subj", "/CN=ca", "-keyout", folder / "ca.key", "-out", made.ca],
        [
            *("req", "-x509", *curve, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-CA", made.ca, "-CAkey", folder / "ca.key"),
            *("-keyout", made.key, "-out", made.cert),
        ],
    ]
    for command in commands:
        done = subprocess.run(["openssl", *map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this openssl cannot sign in one step: {done.stderr.splitlines()[-1:]}")
    return made


async def test_only_a_signed_client_gets_in(certificates: Certificates) -> None:
    ca = certificates.ca.read_bytes()
    key, cert = certificates.key.read_bytes(), certificates.cert.read_bytes()
    tls = TlsFiles(str(certificates.cert), str(certificates.key), str(certificates.ca))
    async with serving(FakeEngine(), listen="127.0.0.1:0", tls=tls) as face:
        target = f"localhost:{face.port}"
        known = grpc.ssl_channel_credentials(ca, key, cert)
        async with grpc.aio.secure_channel(target, known) as channel:
            stream = Client(channel).sessions.Open(pb.OpenSessionRequest())
            assert (await stream.read()).opened.token
            stream.cancel()
        stranger = grpc.ssl_channel_credentials(ca)
        async with grpc.aio.secure_channel(target, stranger) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as info:
                await Client(channel).admin.Status(pb.StatusRequest())
            assert info.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_missing_file_is_named(certificates: Certificates) -> None:
    tls = TlsFiles(str(certificates.cert), "/no/such/key.pem")
    with pytest.raises(ConfigError, match=r"/no/such/key\.pem"):
        async with serving(FakeEngine(), listen="127.0.0.1:0", tls=tls):
            pass


async def test_tls_without_a_client_ca_does_not_open_the_node_to_others(certificates: Certificates) -> None:
    tls = TlsFiles(str(certificates.cert), str(certificates.key))
    with pytest.raises(ConfigError, match="without authentication"):
        GrpcFace(FakeEngine(), socket_path="/tmp/x.sock", listen="0.0.0.0:0", tls=tls)
