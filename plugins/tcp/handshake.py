"""The handshake, both sides, without I/O: Hello, Challenge, Proof, Welcome.

Each side proves that it knows the cluster secret by an HMAC over everything that was said, so that nothing of it
can have been changed on the way, and over a label of its role, so that no proof can be sent back to who made it.
The server proves first: a caller tells a stranger nothing. There is no encryption; ``docs/protocol.md`` says what
that leaves open. Moving the frames, deadlines and limits are the business of ``transport.py``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

from xferd.api.errors import ProtocolViolation, Stale, Unauthenticated
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.base import PeerIdentity
from xferd.plugins.tcp.frames import VERSION

NONCE_NBYTES = 32
MAX_NAME_NBYTES = 255
SERVER_LABEL = b"xferd peer server"
CLIENT_LABEL = b"xferd peer client"


def transcript(label: bytes, hello: pb.Hello, challenge: pb.Challenge) -> bytes:
    """Return what a proof is made over: each field as its length in a little-endian u64, then its bytes.

    Integers are 8 bytes, little-endian. The challenge's own proof is left out.
    """
    fields = (
        label,
        _u64(hello.min_version),
        _u64(hello.max_version),
        _u64(hello.lane),
        hello.node.encode(),
        hello.node_id.encode(),
        _u64(hello.epoch),
        hello.nonce,
        hello.expected_node.encode(),
        _u64(hello.expected_epoch),
        _u64(challenge.version),
        challenge.node.encode(),
        challenge.node_id.encode(),
        _u64(challenge.epoch),
        challenge.nonce,
    )
    return b"".join(_u64(len(field)) + field for field in fields)


def prove(secret: bytes, label: bytes, hello: pb.Hello, challenge: pb.Challenge) -> bytes:
    """Return the 32 bytes that only a holder of the secret can make."""
    return hmac.new(secret, transcript(label, hello, challenge), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class Expectation:
    """Who the caller wants to reach; "" and 0 take any."""

    node: str = ""
    epoch: int = 0

    def check(self, identity: PeerIdentity) -> None:
        """Raise ``Stale`` if somebody else is there."""
        if self.node and self.node != identity.node:
            raise Stale(
                f"node {identity.node!r} answers where {self.node!r} was expected",
                remedy="ask for the node's record again: its address has changed",
            )
        if self.epoch and self.epoch != identity.epoch:
            raise Stale(
                f"node {identity.node!r} has epoch {identity.epoch}, and {self.epoch} was expected",
                remedy="the node has restarted: ask for its regions again",
            )


class ClientHandshake:
    """The calling side: ``hello``, then ``answer``."""

    def __init__(
        self,
        secret: bytes,
        me: PeerIdentity,
        lane: pb.LaneKind.ValueType,
        expected: Expectation,
        *,
        nonce: bytes | None = None,
    ) -> None:
        self._secret = secret
        self._expected = expected
        self._hello = pb.Hello(
            min_version=VERSION,
            max_version=VERSION,
            lane=lane,
            node=me.node,
            node_id=me.node_id,
            epoch=me.epoch,
            nonce=os.urandom(NONCE_NBYTES) if nonce is None else nonce,
            expected_node=expected.node,
            expected_epoch=expected.epoch,
        )

    def hello(self) -> pb.Hello:
        """Return the first message."""
        return self._hello

    def answer(self, challenge: pb.Challenge) -> tuple[pb.Proof, PeerIdentity]:
        """Return our proof and who the server is.

        Raises:
            Unauthenticated: it does not know our secret.
            Stale: it is not the one that was wanted.
            ProtocolViolation: a malformed challenge, or a version that was not offered.
        """
        if challenge.version != VERSION:
            raise ProtocolViolation(f"the server chose version {challenge.version}", limit=f"version {VERSION}")
        identity = _identity(challenge)
        expected = prove(self._secret, SERVER_LABEL, self._hello, challenge)
        if not hmac.compare_digest(expected, challenge.proof):
            raise Unauthenticated(
                f"the node that calls itself {identity.node!r} does not know our cluster secret",
                remedy="give both nodes the same backends.tcp.secret_file",
            )
        self._expected.check(identity)
        return pb.Proof(proof=prove(self._secret, CLIENT_LABEL, self._hello, challenge)), identity


class ServerHandshake:
    """The answering side: ``challenge``, then ``accept``."""

    def __init__(self, secret: bytes, me: PeerIdentity, *, nonce: bytes | None = None) -> None:
        self._secret = secret
        self._me = me
        self._nonce = os.urandom(NONCE_NBYTES) if nonce is None else nonce
        self._hello = pb.Hello()
        self._challenge = pb.Challenge()

    @property
    def lane(self) -> pb.LaneKind.ValueType:
        """The kind of lane that the caller wants."""
        return self._hello.lane

    def challenge(self, hello: pb.Hello) -> pb.Challenge:
        """Return the answer to a hello, with our proof in it.

        Raises:
            ProtocolViolation: no version in common, or a malformed hello.
        """
        if not hello.min_version <= VERSION <= hello.max_version:
            raise ProtocolViolation(
                f"the caller speaks versions {hello.min_version} to {hello.max_version}",
                limit=f"version {VERSION}",
                remedy="run releases with a version in common",
            )
        if hello.lane not in (pb.LANE_KIND_CONTROL, pb.LANE_KIND_DATA):
            raise ProtocolViolation(f"the caller asks for lane kind {hello.lane}", limit="CONTROL or DATA")
        _identity(hello)
        challenge = pb.Challenge(
            version=VERSION, node=self._me.node, node_id=self._me.node_id, epoch=self._me.epoch, nonce=self._nonce
        )
        challenge.proof = prove(self._secret, SERVER_LABEL, hello, challenge)
        self._hello, self._challenge = hello, challenge
        return challenge

    def accept(self, proof: pb.Proof) -> PeerIdentity:
        """Return who the caller is.

        Raises:
            Unauthenticated: it does not know our secret.
            Stale: it wants another node, or another epoch of this one.
        """
        identity = _identity(self._hello)
        expected = prove(self._secret, CLIENT_LABEL, self._hello, self._challenge)
        if not hmac.compare_digest(expected, proof.proof):
            raise Unauthenticated(
                f"the caller that calls itself {identity.node!r} does not know our cluster secret",
                remedy="give both nodes the same backends.tcp.secret_file",
            )
        Expectation(self._hello.expected_node, self._hello.expected_epoch).check(self._me)
        return identity


def _identity(message: pb.Hello | pb.Challenge) -> PeerIdentity:
    for field in (message.node, message.node_id):
        if not 1 <= len(field.encode()) <= MAX_NAME_NBYTES:
            raise ProtocolViolation(
                f"a node name or id has {len(field.encode())} bytes", limit=f"1 to {MAX_NAME_NBYTES} bytes"
            )
    if not message.epoch:
        raise ProtocolViolation("a node has epoch 0", limit="1 and up")
    if len(message.nonce) != NONCE_NBYTES:
        raise ProtocolViolation(f"a nonce has {len(message.nonce)} bytes", limit=f"{NONCE_NBYTES} bytes")
    return PeerIdentity(message.node, message.node_id, message.epoch)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
