"""A simulated handle opens what it names while its process lives, and nothing else ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from xferd.api import simulated
from xferd.api.errors import InvalidArgument
from xferd.api.simulated import EVENT_MAGIC, SimulatedHandle

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(U32, U32, U64, U64)
def test_a_handle_is_what_it_was(pid, fd, nbytes, start_ticks):
    handle = SimulatedHandle(pid, fd, nbytes, start_ticks)
    assert len(handle.to_bytes()) == 64
    assert SimulatedHandle.from_bytes(handle.to_bytes()) == handle


@given(st.binary(max_size=80))
def test_rubbish_is_refused(raw):
    with pytest.raises(InvalidArgument):
        simulated.open_handle(raw)


def test_a_handle_opens_the_same_memory_and_of_its_kind_only():
    fd = os.memfd_create("engine")
    os.write(fd, b"engine" + bytes(90))
    opened, nbytes = simulated.open_handle(simulated.export_fd(fd, 96))
    assert nbytes == 96
    os.pwrite(opened, b"daemon", 0)
    assert os.pread(fd, 6, 0) == b"daemon"
    os.close(opened)
    with pytest.raises(InvalidArgument, match="XSEV"):
        simulated.open_handle(simulated.export_fd(fd, 96), EVENT_MAGIC)
    with pytest.raises(InvalidArgument, match="97 bytes and the memory has 96"):
        simulated.open_handle(simulated.export_fd(fd, 97))
    raw = simulated.export_fd(fd, 96)
    os.close(fd)
    with pytest.raises(InvalidArgument, match=f"fd {fd} of process {os.getpid()}"):
        simulated.open_handle(raw)


def test_a_handle_dies_with_its_process_even_if_another_has_the_pid():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = simulated.process_start_ticks(process.pid)
        process.kill()
    with pytest.raises(InvalidArgument, match="has ended"):
        simulated.open_handle(SimulatedHandle(process.pid, 0, 0, ticks).to_bytes())
    own = os.getpid()
    later = SimulatedHandle(own, 0, 0, simulated.process_start_ticks(own) + 1)
    with pytest.raises(InvalidArgument, match=f"process {own}, which exported the handle, has ended"):
        simulated.open_handle(later.to_bytes())


def test_devices_are_told_apart_by_their_uuid():
    assert {simulated.device_index(simulated.device_uuid(index)) for index in range(64)} == set(range(64))
    assert len(simulated.device_uuid(0)) == 16
    assert simulated.device_index(bytes(16)) is None
    assert simulated.device_index(b"") is None
