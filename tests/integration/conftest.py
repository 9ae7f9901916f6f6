"""Fixtures: real daemons, and the check that a test leaves nothing behind in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cluster import Cluster, DaemonProcess, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A maker of daemons; at the end all of them stop in order, and none may have logged a traceback."""
    made = Cluster()
    yield made
    problems = made.close()
    assert not problems, "\n".join(problems)


@pytest.fixture
def make_daemon(cluster: Cluster) -> Callable[..., DaemonProcess]:
    return cluster.make


@pytest.fixture(scope="module")
def module_cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    problems = made.close()
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def pair(module_cluster: Cluster) -> tuple[DaemonProcess, DaemonProcess]:
    """Two daemons that know each other, shared by a module's tests."""
    a = module_cluster.make("a")
    return a, module_cluster.make("b", peers=(a,))


@pytest.fixture(scope="module")
def daemon(module_cluster: Cluster) -> DaemonProcess:
    """One daemon, shared by a module's tests."""
    return module_cluster.make("solo", tcp=False)


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Take daemons to watch: at the end each holds what it held at the start, in fds, threads, bytes and holds."""
    before: list[tuple[DaemonProcess, dict[str, int]]] = []

    def watch(*daemons: DaemonProcess) -> None:
        before.extend((daemon, daemon.footprint()) for daemon in daemons)

    yield watch
    for watched, footprint in before:
        if watched.process.poll() is not None:
            continue

        def same(watched: DaemonProcess = watched, footprint: dict[str, int] = footprint) -> object:
            now = watched.footprint()
            grown = {key: (footprint[key], now[key]) for key in now if now[key] > footprint[key]}
            return grown or True

        eventually(same, what=f"daemon {watched.name} as it was before {request.node.name}")
