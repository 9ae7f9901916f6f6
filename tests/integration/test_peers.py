"""Nodes notice each other's death, return and drain; what ran with the dead fails at once, and nothing else does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
from cluster import eventually, unix_connection

from xferd.api.errors import Stale, Unavailable
from xferd.api.types import Access, TransferState
from xferd.clients import Client

if TYPE_CHECKING:
    import http.client
    from collections.abc import Iterator

    from cluster import Cluster, DaemonProcess

SHARED = Access.READ_WRITE
NOTICE_S = 2.0
"""Within this a peer's death must be told."""

pytestmark = pytest.mark.slow


class Events:
    """Follows a daemon's peers from a thread, over the REST face's event stream."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.seen: list[tuple[float, str, str, int]] = []
        self._grown = threading.Condition()
        self._connection = unix_connection(daemon.admin_socket)
        self._connection.request("GET", "/v1/peers/events")
        self._answer: http.client.HTTPResponse = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read, name="events")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._thread.join(10)
        self._answer.close()
        self._connection.close()

    def _read(self) -> None:
        for line in self._answer:
            if line.startswith(b"data: "):
                peer: dict[str, Any] = json.loads(line[6:])
                row = (time.monotonic(), peer["node"]["name"], peer["state"], int(peer["node"]["epoch"]))
                with self._grown:
                    self.seen.append(row)
                    self._grown.notify_all()

    def wait(self, name: str, *states: str, after: float = 0.0, timeout_s: float = 15.0) -> tuple[float, str, int]:
        """Return when and with which epoch the peer was first told to be in one of the states."""

        def found() -> list[tuple[float, str, int]]:
            return [
                (at, state, epoch)
                for at, peer, state, epoch in self.seen
                if (peer, state in states) == (name, True) and at > after
            ]

        with self._grown:
            assert self._grown.wait_for(found, timeout_s), f"{name} never was {states}: {self.seen}"
            return found()[0]


@pytest.fixture
def trio(cluster: Cluster) -> tuple[DaemonProcess, DaemonProcess, DaemonProcess]:
    """``a`` knows ``b`` and ``c``."""
    b, c = cluster.make("b"), cluster.make("c")
    return cluster.make("a", peers=(b, c)), b, c


@pytest.fixture
def client(trio: tuple[DaemonProcess, ...]) -> Iterator[Client]:
    with Client.connect(trio[0].session_socket, agent="alice") as made:
        yield made


def test_a_killed_peer_is_noticed_and_one_that_is_back_is_usable(trio, client) -> None:
    a, b, _ = trio
    with Events(a) as events:
        _, _, epoch = events.wait("b", "READY")
        events.wait("c", "READY")
        killed_at = time.monotonic()
        b.kill()
        told_at, *_ = events.wait("b", "SUSPECT", "GONE", after=killed_at)
        assert told_at - killed_at < NOTICE_S
        b.start()
        _, _, new_epoch = events.wait("b", "READY", after=told_at)
        assert new_epoch > epoch
        with Client.connect(b.session_socket, agent="bob") as bob:
            theirs = bob.allocate(4096, access=SHARED)
            theirs.array()[:] = 7
            mine = client.allocate(4096)
            assert client.read(mine, client.region(theirs.info)).state is TransferState.DONE
            assert mine.array().min() == 7
        assert not [row for row in events.seen if row[1] == "c" and row[2] != "READY" and row[0] > killed_at]
        assert a.get("/readyz") == (200, {"status": "ok", "reason": ""})
        lost = [line for line in a.get("/metrics")[1].decode().splitlines() if line.startswith("xferd_peer_lost_total")]
        assert lost == ["xferd_peer_lost_total 1.0"]
        stopped_at = time.monotonic()
        assert b.stop() == 0
        assert events.wait("b", "GONE", after=stopped_at)[0] - stopped_at < 5.0 + NOTICE_S


def test_a_draining_peer_is_not_chosen_until_it_is_back(trio, client) -> None:
    a, b, c = trio
    with Events(a) as events, Client.connect(b.session_socket) as bob, Client.connect(c.session_socket) as carol:
        events.wait("b", "READY")
        theirs, others = bob.allocate(4096, access=SHARED), carol.allocate(4096, access=SHARED)
        mine = client.allocate(4096)
        client.read(mine, client.region(theirs.info))
        before = time.monotonic()
        assert b.get("/v1/drain", "POST", {"timeout_s": 5})[1] == {"drained": True, "transfers_left": 0}
        events.wait("b", "DRAINING", after=before)
        (peer,) = [peer for peer in a.get("/v1/peers")[1]["peers"] if peer["node"]["name"] == "b"]
        assert (peer["state"], peer["node"]["draining"]) == ("DRAINING", True)
        with pytest.raises(Unavailable, match="'b' takes no new work"):
            client.read(mine, client.region(theirs.info))
        assert client.read(mine, client.region(others.info)).state is TransferState.DONE
        drained_at = time.monotonic()
        assert b.get("/v1/drain", "DELETE")[0] == 204
        events.wait("b", "READY", after=drained_at)
        assert client.read(mine, client.region(theirs.info)).state is TransferState.DONE


def test_all_transfers_with_a_lost_peer_fail_at_once_and_no_others(trio, client) -> None:
    """The peers stand still, so that all of their transfers are under way or waiting when one of them dies."""
    _, b, c = trio
    nbytes = 1 << 20
    with Client.connect(b.session_socket) as bob, Client.connect(c.session_socket) as carol:
        theirs, others = bob.allocate(nbytes, access=SHARED), carol.allocate(nbytes, access=SHARED)
        others.array()[:] = 9
        lost_targets = client.allocate([nbytes] * 24)
        kept_targets = client.allocate([nbytes] * 8)
        client.read(lost_targets[0], client.region(theirs.info))
        client.read(kept_targets[0], client.region(others.info))
        kept_targets[0].array()[:] = 0
        for daemon in (b, c):
            daemon.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)  # until then its other threads go on
        try:
            lost = [client.transfer("READ", target, client.region(theirs.info)) for target in lost_targets]
            kept = [client.transfer("READ", target, client.region(others.info)) for target in kept_targets]
            killed_at = time.monotonic()
            b.kill()
            ended = client.wait_many(lost, timeout_s=5.0)
            assert time.monotonic() - killed_at < 3.0, "noticed by its socket, not by the silence of peer_timeout"
            assert [status.error.code for status in ended if status.error] == ["peer_lost"] * len(lost)
            assert not [status for status in client.poll_many(kept) if status.state is TransferState.FAILED]
        finally:
            c.process.send_signal(signal.SIGCONT)
        assert {status.state for status in client.wait_many(kept, timeout_s=20.0)} == {TransferState.DONE}
        for target in kept_targets:
            assert target.array().min() == 9


def test_what_was_prepared_against_an_old_epoch_is_stale_and_can_be_prepared_again(trio, client) -> None:
    a, b, _ = trio
    mine = client.allocate(4096)
    with Client.connect(b.session_socket) as bob:
        old = client.region(bob.allocate(4096, access=SHARED).info)
        prepared = client.prepare(old)
        assert client.read(mine, prepared).state is TransferState.DONE
        b.kill()
    b.start()

    def is_ready() -> bool:
        return [p["state"] for p in a.get("/v1/peers")[1]["peers"] if p["node"]["name"] == "b"] == ["READY"]

    eventually(is_ready, what="b is back")
    with pytest.raises(Stale, match="prepare again"):
        client.read(mine, prepared)
    with pytest.raises(Stale, match="epoch"):
        client.read(mine, old)
    with Client.connect(b.session_socket) as bob:
        theirs = bob.allocate(4096, access=SHARED)
        theirs.array()[:] = 5
        with client.prepare(client.region(theirs.info)) as again:
            assert client.read(mine, again).state is TransferState.DONE
        np.testing.assert_array_equal(mine.array(), theirs.array())
