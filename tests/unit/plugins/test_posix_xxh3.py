"""Sums that are made in C while bytes are copied: those of the package, whatever the sizes, rows and places.

Run as a program with the path of a library, this file checks that one: so is what is compiled for other processors.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings, strategies as st

from xferd.plugins.base import BlockSums
from xferd.plugins.posix import mapping, native, xxh3
from xferd.plugins.posix.mapping import MIN_NBYTES, PAST_CACHE_NBYTES, Mappings
from xferd.plugins.posix.xxh3 import Summer
from xferd.plugins.vectored import iov_of

SOURCE = Path(native.__file__).with_name("_native.c")
LARGEST = 5000
RNG = np.random.default_rng(1)
NOISE = RNG.integers(0, 256, 2 * PAST_CACHE_NBYTES, dtype=np.uint8)

SUMMER = xxh3.load()
if native.load() is None:
    pytestmark = pytest.mark.skip("no compiler was there when xferd was installed")


def wanted(data):
    return xxhash.xxh3_64_intdigest(data.tobytes())


def sums_of_rows(summer, data, borders, blocks):
    """Return the sums of blocks of data that lies in rows between borders, each somewhere else in memory."""
    rows = [data[a:b].copy() for a, b in itertools.pairwise([0, *sorted(borders), len(data)]) if a < b]
    sums = BlockSums.of(*np.array(blocks, np.int64).T.copy())
    summer.sum_memory(sums, np.concatenate([iov_of(row.data) for row in rows]))
    return sums.values.tolist()


def check_every_length(summer):
    for nbytes in range(1, LARGEST):
        data = NOISE[:nbytes]
        for borders in ([], [nbytes // 3]):
            assert sums_of_rows(summer, data, borders, [(0, nbytes)]) == [wanted(data)], (nbytes, borders)


def check_copies(compiled, directory):
    """Copy a file with its sums: blocks and rows of many sizes, to lines of the cache and beside them."""
    assert compiled.guard() == 0
    path = directory / "file"
    path.write_bytes(NOISE.tobytes())
    mappings, checked = Mappings(compiled), 0
    with path.open("rb") as file:
        for nbytes, block, row, skew in itertools.product(
            (MIN_NBYTES, PAST_CACHE_NBYTES + 4321), (200, 1024, 1025, 4096, 65_537), (1000, 4096, 1 << 20), (0, 1, 48)
        ):
            memory = np.zeros(nbytes + 128, np.uint8)
            memory = memory[-memory.ctypes.data % 64 + skew :][:nbytes]
            at = np.arange(0, nbytes, row)
            rows = np.stack((at + memory.ctypes.data, np.minimum(row, nbytes - at)), axis=1).astype(np.uint64)
            begin = np.arange(0, nbytes, block)
            sums = BlockSums.of(begin, np.minimum(begin + block, nbytes))
            assert mappings.read(file.fileno(), np.array([[0, nbytes]], np.uint64), rows, sums)
            assert np.array_equal(memory, NOISE[:nbytes])
            assert sums.values.tolist() == [wanted(memory[a:b]) for a, b in zip(sums.begin, sums.stop, strict=True)]
            checked += 1
    mappings.close()
    assert checked == 90


def test_what_was_compiled_is_used():
    """Sums that are not those of the package leave C unused, in silence; all else here would be left out."""
    assert SUMMER is not None


def test_every_length():
    check_every_length(SUMMER)


near_a_border = st.builds(
    lambda units, step, off: max(units * step + off, 1),
    st.integers(0, 5),
    st.sampled_from([64, 1024]),
    st.integers(-1, 1),
)


@given(
    sizes=st.lists(near_a_border | st.integers(1, LARGEST), min_size=1, max_size=5),
    borders=st.lists(st.integers(0, 5 * LARGEST), max_size=6),
    gap=st.sampled_from([0, 1, 63, 1024]),
)
@settings(max_examples=200, deadline=None)
def test_blocks_of_a_stream_wherever_its_rows_are_cut(sizes, borders, gap):
    blocks, at = [], 0
    for size in sizes:
        blocks.append((at, at + size))
        at += size + gap
    data = NOISE[:at]
    found = sums_of_rows(SUMMER, data, [border for border in borders if border < at], blocks)
    assert found == [wanted(data[a:b]) for a, b in blocks]


@pytest.mark.skipif(not mapping.is_possible(), reason="the kernel does not tell what is in the page cache (Linux 6.5)")
def test_copies_have_the_sums_of_what_arrives(tmp_path):
    check_copies(SUMMER.compiled, tmp_path)


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler")
def test_what_is_compiled_for_any_processor_makes_the_same_sums(tmp_path):
    library = tmp_path / "library.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-DXFERD_ANY_PROCESSOR", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", library, SOURCE], check=True)
    # In a process of its own: SIGBUS has one taker.
    ran = subprocess.run([sys.executable, __file__, library, tmp_path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "right\n"), ran.stderr


def main(library, directory):
    compiled = native.load_from(library)
    check_every_length(Summer(compiled, SUMMER.whole))
    if mapping.is_possible():
        check_copies(compiled, Path(directory))
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
