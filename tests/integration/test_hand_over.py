"""Regions change their owner without a copy, and outlive the process that made them. Real processes, real ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster import eventually

from xferd.api.errors import (
    AgentUnknown,
    Busy,
    Closed,
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    Stale,
    Unsupported,
)
from xferd.api.types import Access, Notification, RegionId
from xferd.clients import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster import Cluster, DaemonProcess

NBYTES = 8 << 20
DELAYED = 'backends.faulty={inner="local", faults=[{kind="delay", delay="5s"}]}'

GIVER = """
import sys, numpy as np
from xferd.clients import Client
path, nbytes, to = sys.argv[1], int(sys.argv[2]), sys.argv[3]
client = Client.connect(path, agent="giver")
parts = client.allocate([nbytes, 4096], label="layer")
for seed, part in enumerate(parts):
    part.array()[:] = np.random.default_rng(seed).integers(0, 256, part.nbytes, dtype=np.uint8)
client.hand_over(parts, to, b"two layers")
print("given", flush=True)
sys.stdin.read()
"""

TAKER = """
import sys
from xferd.clients import Client
client = Client.connect(sys.argv[1], agent="taker")
print("attached", flush=True)
[notification] = client.notifications(30.0)
print(sum(int(region.array().sum()) for region in client.accept(notification)), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run Python code as a client process; killed at the end, if it has not been."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def pattern(seed: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def agents(daemon: DaemonProcess) -> list[str]:
    return [session["agent"] for session in daemon.get("/v1/sessions")[1]["sessions"]]


@pytest.fixture
def two(daemon: DaemonProcess, no_leaks: Callable[..., None]) -> Iterator[tuple[Client, Client]]:
    no_leaks(daemon)
    with (
        Client.connect(daemon.session_socket, agent="alice") as alice,
        Client.connect(daemon.session_socket, agent="bob") as bob,
    ):
        yield alice, bob


@pytest.mark.slow
def test_what_a_killed_process_gave_stays_with_its_new_owner(
    daemon: DaemonProcess, no_leaks: Callable[..., None]
) -> None:
    no_leaks(daemon)
    with (
        Client.connect(daemon.session_socket, agent="taker") as taker,
        process(GIVER, daemon.session_socket, NBYTES, "taker") as giver,
    ):
        assert said(giver) == "given"
        giver.send_signal(signal.SIGKILL)
        giver.wait()
        eventually(lambda: "giver" not in agents(daemon), what="the end of the killed giver's session")
        [notification] = taker.notifications(10.0)
        assert (notification.source, notification.payload) == ("giver@solo", b"two layers")
        regions = taker.accept(notification)
        assert tuple(region.id for region in regions) == notification.regions
        for seed, region in enumerate(regions):
            assert region.info.agent == "taker"
            assert region.info.label == "layer"
            np.testing.assert_array_equal(region.array(), pattern(seed, region.nbytes))
            region.array()[:8] = 7  # its own now, to write as well
        taker.free(regions)


@pytest.mark.slow
def test_what_was_given_is_freed_when_the_new_owner_is_killed(
    daemon: DaemonProcess, no_leaks: Callable[..., None]
) -> None:
    no_leaks(daemon)
    with Client.connect(daemon.session_socket, agent="alice") as alice:
        used = alice.pools()[0].used_nbytes
        with process(TAKER, daemon.session_socket) as taker:
            assert said(taker) == "attached"
            region = alice.allocate(NBYTES, access=Access.READ)
            region.array()[:] = 1
            alice.hand_over([region], "taker")
            assert int(said(taker)) == NBYTES
            assert alice.pools()[0].used_nbytes == used + NBYTES
            [again] = alice.regions(ids=[region.id])  # its access lets the giver look
            taker.send_signal(signal.SIGKILL)
            taker.wait()
            eventually(lambda: alice.pools()[0].used_nbytes == used, what="the killed taker's memory")
            with pytest.raises(Stale):
                alice.regions(ids=[again.id])


def test_the_giver_may_do_nothing_any_more_with_what_it_gave(two: tuple[Client, Client]) -> None:
    alice, bob = two
    region, mine = alice.allocate([NBYTES, NBYTES])
    region.array()[:] = 5
    prepared = alice.prepare(region)
    held = alice.transfer("WRITE", prepared, mine, hold=True)
    done = alice.transfer("WRITE", region, mine)
    done.wait(10.0)
    alice.hand_over([region], "bob")
    with pytest.raises(Closed, match="was handed over"):
        region.array()
    with pytest.raises(Closed, match="was handed over"):
        region.read(0, 1)
    for again in (
        lambda: held.post() and held.wait(10.0),  # refused at once, or by the ring's answer
        lambda: done.post() and done.wait(10.0),
        lambda: alice.read(mine, prepared),
        lambda: alice.write(mine, region),
    ):
        with pytest.raises(PermissionDenied, match="of agent bob does not grant"):
            again()
    with pytest.raises(PermissionDenied, match="of agent bob"):
        alice.free([region])
    [taken] = bob.accept(bob.notifications(5.0)[0])
    # Handed back with a right for the other: alice owns it, and its prepared list and transfer are good again.
    bob.hand_over([taken], "alice", access=Access.READ)
    [back] = alice.accept(alice.notifications(5.0)[0])
    assert back.id == region.id
    alice.read(mine, prepared)
    held.post(wait_s=10.0)
    [seen] = bob.regions(ids=[back.id])
    assert seen.array()[0] == 5
    assert not seen.array().flags.writeable


@pytest.mark.parametrize("kind", ["memfd", "path", "fd", "private"])
def test_which_kinds_can_be_given(two: tuple[Client, Client], daemon: DaemonProcess, kind: str) -> None:
    alice, bob = two
    data = pattern(3, 1 << 16)
    file = daemon.files / f"given-{kind}"
    file.write_bytes(data.tobytes())
    match kind:
        case "memfd":
            region = alice.register_memfd(len(data))
            region.array()[:] = data
        case "path":
            region = alice.register_file(str(file))
        case "fd":
            with file.open("rb") as opened:
                region = alice.register_fd(opened.fileno())
        case _:
            region = alice.register(data)
    if kind == "private":
        with pytest.raises(Unsupported, match="PRIVATE memory of agent alice") as caught:
            alice.hand_over([region], "bob")
        assert "pool" in caught.value.remedy
        assert region.read(0, 4) == data[:4].tobytes()
        return
    alice.hand_over([region], "bob")
    alice.close()
    [taken] = bob.accept(bob.notifications(5.0)[0])
    with bob.allocate(len(data)) as target:
        bob.read(target, taken)
        np.testing.assert_array_equal(target.array(), data)
    assert taken.read() == data.tobytes()


def test_what_is_refused_changes_nothing(two: tuple[Client, Client]) -> None:
    alice, bob = two
    region = alice.allocate(NBYTES)
    for give, error in (
        (lambda: alice.hand_over([region], "nobody"), AgentUnknown),
        (lambda: alice.hand_over([region], "alice"), InvalidArgument),
        (lambda: alice.hand_over([region], "bob@elsewhere"), Unsupported),
        (lambda: alice.hand_over([], "bob"), InvalidArgument),
        (lambda: bob.hand_over([region], "alice"), PermissionDenied),
    ):
        with pytest.raises(error) as caught:
            give()
        assert caught.value.remedy
        assert alice.regions(ids=[region.id])[0].info.agent == "alice"
    region.write(b"still mine")
    bob.notify("bob", b"no regions")
    [plain] = bob.notifications(5.0)
    with pytest.raises(InvalidArgument, match="hands nothing over"):
        bob.accept(plain)
    # What a client claims in a notification of its own gives nobody anything.
    with pytest.raises(PermissionDenied):
        bob.accept(Notification("bob", b"", "alice@solo", "", (region.id,)))


@pytest.mark.slow
def test_a_full_inbox_refuses_and_nothing_changes(two: tuple[Client, Client]) -> None:
    alice, bob = two
    region = alice.allocate(4096)
    sent = 0
    with contextlib.suppress(Overloaded):
        while sent < 10_000:
            alice.notify("bob", bytes(alice.grant.limits.max_notification_nbytes))
            sent += 1
    assert 0 < sent < 10_000
    with pytest.raises(Overloaded, match="inbox of agent 'bob'"):
        alice.hand_over([region], "bob", bytes(alice.grant.limits.max_notification_nbytes))
    region.write(b"still mine")
    assert alice.regions(ids=[region.id])[0].info.agent == "alice"
    while sent:
        sent -= len(bob.notifications(5.0))
    alice.hand_over([region], "bob")
    assert len(bob.accept(bob.notifications(5.0)[0])) == 1


@pytest.mark.slow
def test_a_region_that_moves_is_not_given(cluster: Cluster) -> None:
    daemon = cluster.make("slow", tcp=False, settings=(DELAYED,))
    with (
        Client.connect(daemon.session_socket, agent="alice") as alice,
        Client.connect(daemon.session_socket, agent="bob") as bob,
    ):
        source, target = alice.allocate([NBYTES, NBYTES])
        with alice.transfer("WRITE", source, target, backend="faulty") as transfer:
            with pytest.raises(Busy, match=f"transfer {transfer.id}"):
                alice.hand_over([target], "bob")
            transfer.cancel()
        alice.hand_over([target], "bob")
        assert bob.notifications(5.0)[0].regions == (target.id,)


@pytest.mark.slow
def test_giving_and_freeing_at_once_is_one_or_the_other(two: tuple[Client, Client]) -> None:
    alice, bob = two
    for _ in range(40):
        region = alice.allocate(4096)
        done: dict[str, bool] = {}
        gate = threading.Barrier(2)

        def attempt(name: str, call: Callable[[], None], done: dict[str, bool] = done, gate=gate) -> None:
            gate.wait()
            try:
                call()
                done[name] = True
            except (PermissionDenied, Stale):
                done[name] = False

        free = threading.Thread(target=attempt, args=("free", lambda region=region: alice.free([region])))
        free.start()
        attempt("give", lambda region=region: alice.hand_over([alice.region(region.info)], "bob"))
        free.join()
        assert done["free"] != done["give"], done
        if done["give"]:
            bob.free(bob.accept(bob.notifications(5.0)[0]))
    assert bob.notifications(0.0) == []


@pytest.mark.slow
def test_the_async_client_and_an_operator(daemon: DaemonProcess, no_leaks: Callable[..., None]) -> None:
    no_leaks(daemon)

    async def story() -> None:
        alice = await AsyncClient.connect(daemon.session_socket, agent="alice")
        bob = await AsyncClient.connect(daemon.session_socket, agent="bob")
        async with alice, bob:
            regions = await alice.allocate([4096, 8192])
            regions[1].array()[:] = 9
            await alice.hand_over(regions, "bob", b"async")
            [notification] = await bob.notifications(5.0)
            taken = await bob.accept(notification)
            assert [region.nbytes for region in taken] == [4096, 8192]
            assert int(taken[1].array().sum()) == 9 * 8192
            # An operator gives what is not its own, here back to alice, by the command line.
            ids = [str(region.id) for region in taken]
            done = await asyncio.to_thread(
                subprocess.run,
                [
                    *(sys.executable, "-c", "from xferd.clients.ctl._app import main; raise SystemExit(main())"),
                    *("--socket", str(daemon.session_socket)),
                    *("hand-over", *ids, "--to", "alice", "--access", "read"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            [told] = await alice.notifications(5.0)
            assert (told.source, told.regions) == ("admin@solo", tuple(map(RegionId, map(int, ids))))
            back = await alice.accept(told)
            assert {region.info.access for region in back} == {Access.READ}

    asyncio.run(story())
