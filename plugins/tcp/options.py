"""The configuration section ``[backends.tcp]``, the cluster secret, and addresses."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import Field

from xferd.api.errors import ConfigError, InvalidArgument
from xferd.plugins.options import Nbytes, Options, Seconds

MIN_SECRET_NBYTES = 16
SCHEME = "tcp://"

log = structlog.get_logger("xferd.tcp")


class TcpOptions(Options):
    """``[backends.tcp]``: how this node reaches others and is reached.

    Two bulk lanes, because one connection is one core's work on either side. Three chunks in line on each: one that
    moves, one whose request is sent, and one for the thread to go on with while the loop learns of the first one's end.
    Measure your network with ``tools/bench_lanes.py``. Of congestion control see ``sockets.py``.

    Not used: SO_BUSY_POLL needs the receive queue of a network card, which loopback has not; MSG_ZEROCOPY falls back
    to a copy on loopback; TCP_NOTSENT_LOWAT bounds what waits in a lane's own socket, where nothing small waits.
    """

    listen: str = Field("", description='"host:port" to accept peers at; empty: only call others')
    advertise: str = Field("", description='"host:port" that peers are told; empty: where we listen')
    secret_file: str = Field("", description="file with the cluster secret, at least 16 bytes, the same on all nodes")
    lanes: int = Field(2, ge=1, le=64, description="data lanes that we open to each peer: chunks that move at once")
    depth: int = Field(3, ge=1, le=16, description="chunks of one transfer that a data lane has, all but one in line")
    small_lanes: int = Field(2, ge=0, le=16, description="further data lanes to each peer, for small chunks only")
    small: Nbytes = Field(64 << 10, le=1 << 20, description="largest chunk that goes over the small lanes")
    max_lanes: int = Field(64, ge=1, le=4096, description="data lanes that we accept from all peers: threads")
    max_peer_lanes: int = Field(16, ge=1, le=4096, description="data lanes that we accept from one peer")
    turn: Nbytes = Field(1 << 20, ge=64 << 10, description="most that one system call of a bulk lane moves")
    nice: int = Field(10, ge=0, le=19, description="added to the nice value of threads that move large chunks")
    max_handshakes: int = Field(64, ge=1, description="connections at once that have not proved who they are")
    max_requests: int = Field(256, ge=1, description="control requests of one lane that we handle at once")
    max_frame: Nbytes = Field(1 << 30, ge=1, description="largest payload of one frame that we accept")
    max_descriptors: int = Field(1 << 19, ge=1, le=1 << 19, description="most rows of one data request")
    connect_timeout: Seconds = Field(5.0, gt=0, description="from the first packet to the end of the handshake")
    abort_grace: Seconds = Field(0.5, description="how long a cancelled chunk may go on before its lane is cut")
    quiesce_timeout: Seconds = Field(5.0, gt=0, description="how long a peer may take to confirm that a chunk rests")
    ping_interval: Seconds = Field(2.0, gt=0, description="a peer that is silent for so long is pinged")
    # Below the 10 s that a node's record in etcd lasts by default, so that whichever ends first, it is within those.
    peer_timeout: Seconds = Field(8.0, gt=0, description="a peer that is silent for so long is lost")
    sndbuf: Nbytes = Field(0, description="SO_SNDBUF of data lanes; 0: the kernel's tuning")
    rcvbuf: Nbytes = Field(0, description="SO_RCVBUF of data lanes; 0: the kernel's tuning")
    congestion: str = Field(
        "auto", description='TCP congestion control; "auto": Reno within a host, else the system\'s; "": the system\'s'
    )


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node is reached."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "host:port", "[v6]:port", with or without "tcp://".

        Raises:
            InvalidArgument: it is none of these.
        """
        host, colon, port = text.removeprefix(SCHEME).rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise InvalidArgument(f"{text!r} is no address", limit="tcp://host:port", remedy="put IPv6 in brackets")
        return cls(host, int(port))


def read_secret(path: str) -> bytes:
    """Return the cluster secret; white space at its end is not part of it.

    Raises:
        ConfigError: no file is named, it cannot be read, or it is too short to be a secret.
    """
    remedy = "head -c 32 /dev/urandom | base64 > FILE, mode 0600, the same file on every node"
    if not path:
        raise ConfigError("backends.tcp.secret_file is not set", remedy=remedy)
    try:
        secret = Path(path).read_bytes().rstrip()
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError as exc:
        raise ConfigError(f"cannot read the cluster secret {path}: {exc.strerror}", remedy=remedy) from exc
    if len(secret) < MIN_SECRET_NBYTES:
        raise ConfigError(
            f"the cluster secret in {path} has {len(secret)} bytes",
            limit=f"at least {MIN_SECRET_NBYTES} bytes",
            remedy=remedy,
        )
    if mode & 0o077:
        log.warning("cluster secret is readable by others", path=path, mode=oct(mode), remedy="chmod 0600")
    return secret
