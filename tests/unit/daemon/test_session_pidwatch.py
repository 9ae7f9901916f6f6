"""A process's exit is noticed without being its parent, and no pidfd is left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from xferd.api.errors import NotFound, Unsupported
from xferd.daemon.sessions.pidwatch import ProcessWatch, peer_credentials


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_exit_is_noticed(process):
    with ProcessWatch(process.pid) as watch:
        waiting = asyncio.ensure_future(watch.wait())
        done, _ = await asyncio.wait([waiting], timeout=0.02)
        assert not done
        process.kill()
        await asyncio.wait_for(waiting, 10)
        await watch.wait()  # at once, now that it is gone


async def test_cancelled_wait_leaves_the_watch_usable(process):
    before = open_fds()
    watch = ProcessWatch(process.pid)
    waiting = asyncio.ensure_future(watch.wait())
    await asyncio.wait([waiting], timeout=0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    process.kill()
    await asyncio.wait_for(watch.wait(), 10)
    watch.close()
    watch.close()
    assert watch.fileno() == -1
    assert open_fds() == before


def test_a_process_that_is_gone_is_not_found(process):
    process.kill()
    process.wait()
    with pytest.raises(NotFound, match=str(process.pid)):
        ProcessWatch(process.pid)


@pytest.mark.parametrize("pid", [0, -1])
def test_no_process_id_is_unsupported(pid):
    with pytest.raises(Unsupported):
        ProcessWatch(pid)


def test_the_peer_of_a_socket_pair_is_this_process():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, ProcessWatch.of_peer(ours) as watch:
        assert watch.pid == os.getpid()
        assert peer_credentials(ours).uid == os.geteuid()
