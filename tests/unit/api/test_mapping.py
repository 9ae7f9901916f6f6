"""Shared mappings lie where huge pages can back them, live as long as a view, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest

from xferd.api.mapping import HUGE_PAGE_NBYTES, map_shared


@pytest.fixture
def memory_file():
    fd = os.memfd_create("xferd-mapping-test")
    os.ftruncate(fd, 3 * HUGE_PAGE_NBYTES)
    yield fd
    os.close(fd)


def maps(address):
    """The lines of the process's map that cover an address."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in re.split("[- ]", line)[:2])
        if start <= address < stop:
            found.append(line)
    return found


@pytest.mark.parametrize("nbytes", [HUGE_PAGE_NBYTES, 2 * HUGE_PAGE_NBYTES + 4096, 3 * HUGE_PAGE_NBYTES])
def test_large_mappings_begin_at_a_huge_page(memory_file, nbytes):
    array = map_shared(memory_file, nbytes)
    assert array.ctypes.data % HUGE_PAGE_NBYTES == 0
    assert array.nbytes == nbytes


def test_two_mappings_of_a_file_share_their_bytes(memory_file):
    first, second = map_shared(memory_file, 4096), map_shared(memory_file, HUGE_PAGE_NBYTES)
    first[7] = 42
    assert second[7] == 42
    assert os.pread(memory_file, 1, 7) == b"\x2a"


def test_it_lives_as_long_as_a_view_and_no_longer(memory_file):
    array = map_shared(memory_file, HUGE_PAGE_NBYTES)
    address, view = array.ctypes.data, array[10:20]
    del array
    view[:] = 3
    assert "xferd-mapping-test" in maps(address)[0]
    del view
    assert not maps(address)


def test_only_what_is_writable_is_written(memory_file):
    array = map_shared(memory_file, 4096, writable=False)
    assert array[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert " r--s " in maps(array.ctypes.data)[0]


def test_anonymous_memory_is_zero_and_shared():
    array = map_shared(-1, 4096)
    assert not array.any()
    array[0] = 9
    assert " rw-s " in maps(array.ctypes.data)[0]


def test_what_the_system_refuses_is_its_error_and_leaves_nothing(tmp_path):
    read_only = tmp_path / "file"
    read_only.write_bytes(bytes(8192))
    fd = os.open(read_only, os.O_RDONLY)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    with pytest.raises(PermissionError) as caught:
        map_shared(fd, 8192)
    assert caught.value.errno == errno.EACCES
    del caught
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before + 1
    assert np.array_equal(map_shared(fd, 8192, writable=False), np.zeros(8192, np.uint8))
    os.close(fd)
