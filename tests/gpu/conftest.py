"""Fixtures of the tests that need a GPU: a daemon that uses it, and each library that has memory of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cluster import Cluster
from gpu_memory import LIBRARIES, SETTINGS, libraries, missing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import DaemonProcess
    from gpu_memory import Memory


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    """Skip, with the reason, where there is none."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[Cluster]:
    """A maker of daemons, of which none may have logged a traceback at the end."""
    made = Cluster()
    yield made
    problems = made.close()
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def gpu_node(gpu_cluster: Cluster) -> DaemonProcess:
    """One daemon with a pool of host memory and one of GPU memory, shared by a module's tests."""
    if reason := missing():
        pytest.skip(reason)
    return gpu_cluster.make("gpu", tcp=False, settings=SETTINGS)


@pytest.fixture(params=libraries())
def memory(request: pytest.FixtureRequest) -> Memory:
    """Each library in turn."""
    if reason := missing("" if request.param == "simulated" else request.param):
        pytest.skip(reason)
    return LIBRARIES[request.param]()
