"""The section [backends.tcp], the cluster secret and addresses: what is wrong is named, with its remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from xferd.api.errors import ConfigError, InvalidArgument
from xferd.plugins.tcp.options import Address, TcpOptions, read_secret

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_and_units() -> None:
    options = TcpOptions.model_validate({"connect_timeout": "250ms", "max_frame": "64MiB", "sndbuf": "1MiB"})
    assert (options.connect_timeout, options.max_frame, options.sndbuf, options.lanes) == (0.25, 64 << 20, 1 << 20, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lanes": 0},
        {"lane": 2},
        {"ping_interval": "0s"},
        {"max_descriptors": 1 << 20},
        {"small": "2MiB"},
        {"turn": "4KiB"},
        {"max_peer_lanes": 0},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TcpOptions.model_validate(wrong)


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("tcp://10.0.0.1:7001", "10.0.0.1", 7001, "tcp://10.0.0.1:7001"),
        ("node-b:0", "node-b", 0, "tcp://node-b:0"),
        ("[::1]:7001", "::1", 7001, "tcp://[::1]:7001"),
    ],
)
def test_addresses(text: str, host: str, port: int, shown: str) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:x", "host:65536", "::1:70", "udp://a:1", "host:-1"])
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is no address"):
        Address.parse(text)


def test_white_space_after_the_secret_is_not_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"sixteen bytes ok" + b"\r\n")
    path.chmod(0o600)
    with capture_logs() as logs:
        assert read_secret(str(path)) == b"sixteen bytes ok"
    assert logs == []


def test_a_secret_that_others_can_read_is_told_about(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"sixteen bytes ok")
    path.chmod(0o644)
    with capture_logs() as logs:
        read_secret(str(path))
    assert [(entry["log_level"], entry["mode"]) for entry in logs] == [("warning", "0o644")]


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "0 bytes"), (b"  \n", "0 bytes"), (b"fifteen bytes !", "at least 16")]
)
def test_a_short_secret_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_secret(str(path))


def test_a_missing_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secret_file is not set"):
        read_secret("")
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(str(tmp_path / "nowhere"))
