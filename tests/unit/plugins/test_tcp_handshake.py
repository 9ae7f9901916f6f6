"""Both sides of the handshake believe only who knows the secret, and only what was really said."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from xferd.api.errors import ProtocolViolation, Stale, Unauthenticated
from xferd.api.proto import peer_v1_pb2 as pb
from xferd.plugins.base import PeerIdentity
from xferd.plugins.tcp.handshake import (
    CLIENT_LABEL,
    SERVER_LABEL,
    ClientHandshake,
    Expectation,
    ServerHandshake,
    prove,
    transcript,
)

SECRET = b"the secret of the cluster"
A, B = PeerIdentity("a", "id-a", 3), PeerIdentity("b", "id-b", 9)
ANYONE = Expectation()


def client(secret: bytes = SECRET, expected: Expectation = ANYONE) -> ClientHandshake:
    return ClientHandshake(secret, A, pb.LANE_KIND_CONTROL, expected)


def test_both_learn_who_the_other_is() -> None:
    caller, server = client(), ServerHandshake(SECRET, B)
    proof, identity = caller.answer(server.challenge(caller.hello()))
    assert identity == B
    assert server.accept(proof) == A
    assert server.lane == pb.LANE_KIND_CONTROL


def test_a_caller_tells_a_server_without_the_secret_nothing() -> None:
    caller = client()
    with pytest.raises(Unauthenticated, match="'b' does not know our cluster secret"):
        caller.answer(ServerHandshake(b"another secret, as long", B).challenge(caller.hello()))


def test_a_server_refuses_a_caller_without_the_secret() -> None:
    caller, server = client(), ServerHandshake(SECRET, B)
    challenge = server.challenge(caller.hello())
    forged = prove(b"another secret, as long", CLIENT_LABEL, caller.hello(), challenge)
    for proof in (forged, b"", challenge.proof):  # the last: the server's own proof sent back to it
        with pytest.raises(Unauthenticated, match="'a' does not know"):
            server.accept(pb.Proof(proof=proof))


def test_a_proof_is_good_for_one_handshake_only() -> None:
    caller, server = client(), ServerHandshake(SECRET, B)
    proof, _ = caller.answer(server.challenge(caller.hello()))
    later = ServerHandshake(SECRET, B)
    later.challenge(caller.hello())
    with pytest.raises(Unauthenticated):
        later.accept(proof)


@pytest.mark.parametrize(
    ("field", "value"),
    [("node", "c"), ("node_id", "id-c"), ("epoch", 10), ("nonce", b"n" * 32)],
)
def test_a_challenge_changed_on_the_way_is_refused(field: str, value: object) -> None:
    caller = client()
    challenge = ServerHandshake(SECRET, B).challenge(caller.hello())
    setattr(challenge, field, value)
    with pytest.raises(Unauthenticated):
        caller.answer(challenge)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", "c"),
        ("node_id", "x"),
        ("epoch", 4),
        ("nonce", b"n" * 32),
        ("lane", pb.LANE_KIND_DATA),
        ("max_version", 2),
        ("min_version", 0),
        ("expected_node", "b"),
        ("expected_epoch", 9),
    ],
)
def test_a_hello_changed_on_the_way_is_refused(field: str, value: object) -> None:
    caller = client()
    changed = pb.Hello()
    changed.CopyFrom(caller.hello())
    setattr(changed, field, value)
    with pytest.raises(Unauthenticated):
        caller.answer(ServerHandshake(SECRET, B).challenge(changed))


@pytest.mark.parametrize("expected", [Expectation("c"), Expectation("b", 8), Expectation("", 8)])
def test_somebody_else_is_stale_on_both_sides(expected: Expectation) -> None:
    caller, server = client(expected=expected), ServerHandshake(SECRET, B)
    challenge = server.challenge(caller.hello())
    with pytest.raises(Stale, match="was expected"):
        caller.answer(challenge)
    with pytest.raises(Stale, match="was expected"):
        server.accept(pb.Proof(proof=prove(SECRET, CLIENT_LABEL, caller.hello(), challenge)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"min_version": 2, "max_version": 9}, "versions 2 to 9"),
        ({"min_version": 0, "max_version": 0}, "versions 0 to 0"),
        ({"lane": 0}, "lane kind 0"),
        ({"lane": 7}, "lane kind 7"),
        ({"node": ""}, "name or id has 0 bytes"),
        ({"node": "ü" * 128}, "name or id has 256 bytes"),
        ({"node_id": ""}, "name or id has 0 bytes"),
        ({"epoch": 0}, "epoch 0"),
        ({"nonce": b"short"}, "nonce has 5 bytes"),
    ],
)
def test_a_malformed_hello_is_a_violation(changes: dict[str, object], match: str) -> None:
    hello = client().hello()
    for field, value in changes.items():
        setattr(hello, field, value)
    with pytest.raises(ProtocolViolation, match=match):
        ServerHandshake(SECRET, B).challenge(hello)


def test_a_version_that_was_not_offered_is_a_violation() -> None:
    caller = client()
    challenge = ServerHandshake(SECRET, B).challenge(caller.hello())
    challenge.version = 2
    with pytest.raises(ProtocolViolation, match="chose version 2"):
        caller.answer(challenge)


texts = st.text(max_size=8)
hellos = st.builds(
    pb.Hello,
    node=texts,
    node_id=texts,
    epoch=st.integers(0, 2**64 - 1),
    nonce=st.binary(max_size=8),
    expected_node=texts,
)
challenges = st.builds(pb.Challenge, node=texts, node_id=texts, nonce=st.binary(max_size=8))
sides = st.sampled_from([CLIENT_LABEL, SERVER_LABEL])


@given(sides, hellos, challenges, sides, hellos, challenges)
def test_different_conversations_have_different_transcripts(
    one: bytes, hello_1: pb.Hello, answer_1: pb.Challenge, two: bytes, hello_2: pb.Hello, answer_2: pb.Challenge
) -> None:
    same = (one, hello_1, answer_1) == (two, hello_2, answer_2)
    assert (transcript(one, hello_1, answer_1) == transcript(two, hello_2, answer_2)) == same
