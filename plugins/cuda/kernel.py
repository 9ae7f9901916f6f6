"""The one kernel (``pieces.cu``): how it is compiled and kept on disk, and in what shape it is started.

NVRTC takes a quarter of a second, so what it makes is kept in a cache folder under a name that holds everything it
depends on. A file there that is cut short or damaged is made anew.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xferd.api.errors import Unavailable, Unsupported
from xferd.plugins.vectored import no_longer_than

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

NAME = "xferd_copy_pieces"
WARP = 32
THREADS = 256
"""Of a block."""

WARPS = THREADS // WARP

_CHECK_NBYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen by measurement (``tools/gpu_worker_check.py``).

    Attributes:
        unroll: loads that a lane has under way.
        streaming: loads and stores that ask not to stay in the caches.
        warps_per_processor: tiles are made so small that each multiprocessor has so many at least, within the limits.
        min_tile_nbytes, max_tile_nbytes: of a tile, powers of two.
        host_blocks: blocks at most where host memory takes part: the bus is slower than a few of them.
        device_copies: pieces up to which copy engines move them between GPU memories, whatever their size.
        host_copies: the same where host memory takes part.
        device_copy_nbytes: mean size from which on copy engines move pieces between GPU memories.
        host_copy_nbytes: the same where host memory takes part.
        timed: device time is taken by events, and not by the clock of the host.
    """

    unroll: int = 4
    streaming: bool = False
    warps_per_processor: int = 64
    min_tile_nbytes: int = 2 << 10
    max_tile_nbytes: int = 32 << 10
    host_blocks: int = 256
    device_copies: int = 1
    host_copies: int = 2
    device_copy_nbytes: int = 64 << 20
    host_copy_nbytes: int = 4 << 20
    timed: bool = False

    def is_for_copy_engines(self, count: int, nbytes: int, *, on_host: bool) -> bool:
        """Whether few large pieces are better off with the copy engines."""
        few = self.host_copies if on_host else self.device_copies
        return count <= few or nbytes >= count * (self.host_copy_nbytes if on_host else self.device_copy_nbytes)


class Shape(NamedTuple):
    """How the kernel is started for a table."""

    table: NDArray[np.uint64]
    blocks: int
    work: int
    tiles: int
    tile_nbytes: int


def shape(table: NDArray[np.uint64], nbytes: int, processors: int, tuning: Tuning, *, on_host: bool) -> Shape:
    """Return how to start the kernel; a table with pieces far longer than most comes back with those cut."""
    wanted = nbytes // (processors * tuning.warps_per_processor)
    tile = min(max(1 << max(wanted - 1, 0).bit_length(), tuning.min_tile_nbytes), tuning.max_tile_nbytes)
    longest = int(table[:, 2].max())
    tiles = _tiles(longest, tile)
    if tiles * len(table) > 2 * (nbytes // tile + len(table)) + 1024:
        table = no_longer_than(table, 8 * tile)  # else most tiles of most pieces would be empty
        tiles = _tiles(min(longest, 8 * tile), tile)
    work = tiles * len(table)
    blocks = -(-work // WARPS)
    return Shape(table, min(blocks, tuning.host_blocks) if on_host else blocks, work, tiles, tile)


def _tiles(nbytes: int, tile_nbytes: int) -> int:
    return -(-(nbytes + 15) // tile_nbytes)  # the first may be shorter by what the target is out of line


# ---------------------------------------------------------------------------------------- compiling


def cubin(arch: str, driver_version: int, tuning: Tuning, *, anew: bool = False) -> bytes:
    """Return the kernel for an architecture ("sm_90"), from the cache if it is there, unless ``anew``.

    Raises:
        Unsupported: cuda-core or NVRTC is not installed.
        Unavailable: NVRTC refuses the source or the architecture.
    """
    path = cache_path(os.environ, arch, driver_version, tuning)
    found = None if anew else read_cached(path)
    if found is None:
        found = _compile(arch, tuning)
        write_cached(path, found)
    return found


def source() -> str:
    """Return the kernel's source."""
    return Path(__file__).with_name("pieces.cu").read_text()


def cache_path(environment: Mapping[str, str], arch: str, driver_version: int, tuning: Tuning) -> Path | None:
    """Return the file for a kernel; None where there is no folder to keep it in."""
    # systemd's CacheDirectory= may name several; the first is as good as any.
    folder = environment.get("CACHE_DIRECTORY", "").split(":")[0] or environment.get("XDG_CACHE_HOME", "")
    if not folder:
        home = environment.get("HOME", "")
        folder = f"{home}/.cache" if home else ""
    if not Path(folder).is_absolute():
        return None
    key = "\0".join((source(), arch, str(driver_version), *_defines(tuning)))
    return Path(folder) / "xferd" / f"pieces-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def read_cached(path: Path | None) -> bytes | None:
    """Return a kernel that was kept; None where it is not there, or not whole."""
    if path is None:
        return None
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    check, code = raw[:_CHECK_NBYTES], raw[_CHECK_NBYTES:]
    return code if code and hashlib.sha256(code).digest() == check else None


def write_cached(path: Path | None, code: bytes) -> None:
    """Keep a kernel. Several may do so at once; where it cannot be kept, it is compiled again the next time."""
    if path is None:
        return
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            part.write_bytes(hashlib.sha256(code).digest() + code)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        return


def _defines(tuning: Tuning) -> tuple[str, ...]:
    return (f"UNROLL={tuning.unroll}", *(("STREAMING",) if tuning.streaming else ()))


def _compile(arch: str, tuning: Tuning) -> bytes:
    remedy = "pip install 'xferd[cuda]'"
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as exc:
        raise Unsupported(f"the kernel cannot be compiled: {exc}", remedy=remedy) from exc
    try:
        options = ProgramOptions(arch=arch, define_macro=list(_defines(tuning)))
        code = Program(source(), "c++", options).compile("cubin").code
    except Exception as exc:  # of many unrelated kinds, which all mean the same here
        raise Unavailable(f"the kernel cannot be compiled for {arch}: {exc}", remedy=remedy) from exc
    return code if isinstance(code, bytes) else bytes(code)
