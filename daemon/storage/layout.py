"""What a storage directory looks like: names of its files, its superblock, how a size is cut into slabs. Pure.

The superblock says whose the directory is. It is the last file that a first start writes, so that a directory with
one is complete, and it is only ever replaced as a whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

import xxhash

from xferd.api.errors import ConfigError, IntegrityError
from xferd.daemon.storage.catalogue import ALIGN_NBYTES

FORMAT = "xferd-storage"
VERSION = 1
SUPERBLOCK = "superblock"
LOCK = "lock"
TEMPORARY = ".new"
"""Ending of a file that is being written; what has it is removed at a start."""

_NUMBERED = re.compile(r"(snapshot|journal)\.(\d{1,15})")
_OURS = re.compile(rf"superblock|lock|(snapshot|journal)\.\d{{1,15}}|slab-\d{{4,}}|[^/]*\{TEMPORARY}|lost\+found")


def slab_name(number: int) -> str:
    """Return the name of a slab file."""
    return f"slab-{number:04d}"


def snapshot_name(number: int) -> str:
    """Return the name of a snapshot; the journal of the same number goes on from it."""
    return f"snapshot.{number}"


def journal_name(number: int) -> str:
    """Return the name of a journal."""
    return f"journal.{number}"


def numbers_of(names: list[str], what: str) -> list[int]:
    """Return the numbers of the snapshots, or of the journals, among file names, in order."""
    found = (_NUMBERED.fullmatch(name) for name in names)
    return sorted(int(match[2]) for match in found if match and match[1] == what)


def is_ours(name: str) -> bool:
    """Whether a file of this name may stand in a storage directory."""
    return _OURS.fullmatch(name) is not None


def cut_into_slabs(nbytes: int, slab_nbytes: int, present: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return the sizes of all slabs of a directory of ``nbytes``, those that are present first and unchanged.

    Raises:
        ConfigError: the present ones are larger already.
    """
    unit = ALIGN_NBYTES
    left = nbytes // unit * unit - sum(present)
    size = max(slab_nbytes // unit, 1) * unit
    if left < 0:
        raise ConfigError(
            f"a storage directory has {sum(present)} bytes in slabs, and is configured with {nbytes}",
            limit="a directory does not shrink",
            remedy="configure its old size, or make the pool anew in an empty directory",
        )
    more = [size] * (left // size) + ([left % size] if left % size else [])
    return (*present, *more)


@dataclass(frozen=True, slots=True)
class Superblock:
    """Whose a storage directory is, and what it is made of. ``slabs`` are sizes in bytes."""

    pool: str
    uuid: str
    node: str
    node_id: str
    slabs: tuple[int, ...]
    created_at: float
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """Return a line of JSON, and a line with its checksum."""
        line = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode() + b"\n"
        return line + _sum_line(line)

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Superblock:
        """Read a superblock.

        Raises:
            IntegrityError: it is not one, or is damaged.
            ConfigError: of another version.
        """
        line, newline, tail = data.partition(b"\n")
        try:
            if tail != _sum_line(line + newline):
                raise ValueError("its checksum does not match")
            fields = json.loads(line)
            if fields.pop("format") != FORMAT:
                raise ValueError("it is of something else")
            version = int(fields["version"])
            if version != VERSION:
                raise ConfigError(
                    f"{path} has layout version {version}", limit=f"version {VERSION}", remedy="use the daemon it is of"
                )
            return cls(**fields | {"slabs": tuple(int(size) for size in fields["slabs"])})
        except (ValueError, TypeError, KeyError) as exc:
            raise IntegrityError(
                f"{path} is no superblock: {exc}", remedy="restore it from a copy; without it the pool cannot be used"
            ) from exc


def _sum_line(line: bytes) -> bytes:
    return b"xxh3 %016x\n" % xxhash.xxh3_64_intdigest(line)
