"""Looking at a storage directory that no daemon uses: ``python -m xferd.daemon.storage.fsck``, for ``xferctl fsck``.

Finds what a start would find, by the same code, and says what to do. Without ``--repair`` and ``--adopt`` it changes
nothing. ``--verify`` reads every sealed block too.

Exit status: 0 where all is well, 1 where something is wrong and can be repaired or was, 2 for a wrong command line, 3
where it cannot be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import IntegrityError, XferdError
from xferd.daemon.storage import files, layout
from xferd.daemon.storage.catalogue import OPEN, SUMMED, Catalogue, Extent, runs_of_equal
from xferd.daemon.storage.checksums import DirectReader
from xferd.daemon.storage.journal import write_snapshot
from xferd.daemon.storage.layout import Superblock
from xferd.daemon.storage.loading import Loaded, load

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_OK, EXIT_WRONG, EXIT_UNSEEN = 0, 1, 3
_STEP_BLOCKS = 64
_MOST_NOTES = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong: with what, what is the matter, and what to do."""

    what: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a directory holds, what is wrong with it, and (``notes``) what a crash or an unfinished write left."""

    directory: str
    pool: str
    uuid: str
    node: str
    slabs: int
    slab_nbytes: int
    extents: int
    extents_nbytes: int
    sealed_nbytes: int
    summed_nbytes: int
    journal_records: int
    was_clean: bool
    torn_nbytes: int
    torn_reason: str
    verified_nbytes: int
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]


def check(path: Path, *, verify: bool = False, repair: bool = False, adopt: str = "") -> Report:
    """Look at a directory, and change what ``repair`` and ``adopt`` say.

    Args:
        path: of the directory.
        verify: read every sealed block and compare it with its checksum.
        repair: make a new snapshot of all that is before the damage; what is behind it is lost for good.
        adopt: name of the node that the directory is of from now on; "" leaves it.

    Raises:
        ConfigError: it is missing, or a daemon uses it.
        IntegrityError: it has no superblock that can be read.
    """
    files.must_exist(path)
    lock_fd = files.lock_directory(path)
    try:
        name = path / layout.SUPERBLOCK
        superblock = Superblock.from_bytes(files.read_whole(name), str(name))
        findings: list[Finding] = []
        loaded = _loaded(path, superblock, findings, repair=repair)
        if adopt and adopt != superblock.node:
            superblock = replace(superblock, node=adopt, node_id="")
            files.replace_whole(name, superblock.to_bytes())
        findings += _slab_findings(path, superblock)
        verified = _verify(path, loaded.catalogue, findings) if verify else 0
        return _report(path, superblock, loaded, verified, findings)
    finally:
        os.close(lock_fd)


def _loaded(path: Path, superblock: Superblock, findings: list[Finding], *, repair: bool) -> Loaded:
    try:
        loaded = load(path)
        loaded.catalogue.check(superblock.slabs)
    except IntegrityError as error:
        remedy = (
            "repaired: what was behind the damage is lost" if repair else "--repair keeps what is before the damage"
        )
        findings.append(Finding("journal", error.message, remedy))
        loaded = load(path, allow_damage=True)
        _drop_misplaced(loaded.catalogue, superblock, findings)
        if repair:
            number = loaded.number + 1
            snapshot = path / layout.snapshot_name(number)
            write_snapshot(snapshot, bytes.fromhex(superblock.uuid), loaded.catalogue.snapshot(), loaded.sequence)
    return loaded


def _drop_misplaced(catalogue: Catalogue, superblock: Superblock, findings: list[Finding]) -> None:
    """Take extents out of what is left until the rest could be started with."""
    for extent in sorted(catalogue.extents.values(), key=lambda e: e.id, reverse=True):
        try:
            catalogue.check(superblock.slabs)
        except IntegrityError as error:
            del catalogue.extents[extent.id]
            findings.append(Finding(str(extent), error.message, "it is left out"))
        else:
            return


def _slab_findings(path: Path, superblock: Superblock) -> list[Finding]:
    findings = []
    for number, nbytes in enumerate(superblock.slabs):
        name = path / layout.slab_name(number)
        try:
            os.close(files.open_slab(name, nbytes))
        except XferdError as error:
            findings.append(Finding(str(name), error.message, error.remedy))
    return findings


def _verify(path: Path, catalogue: Catalogue, findings: list[Finding]) -> int:
    """Compare all blocks that have a checksum; returns how many bytes."""
    verified = 0
    for extent in sorted(catalogue.extents.values(), key=lambda e: (e.slab, e.offset)):
        name = str(path / layout.slab_name(extent.slab))
        try:
            reader = DirectReader(name)
        except OSError:
            continue  # told by _slab_findings
        try:
            verified += _verify_extent(extent, reader, name, findings)
        except XferdError as error:
            findings.append(Finding(str(extent), error.message, error.remedy))
        finally:
            reader.close()
    return verified


def _verify_extent(extent: Extent, reader: DirectReader, name: str, findings: list[Finding]) -> int:
    verified = 0
    for start, stop in runs_of_equal(extent.state):
        if extent.state[start] != SUMMED:
            continue
        for first in range(start, stop, _STEP_BLOCKS):
            last = min(first + _STEP_BLOCKS, stop)
            wrong = (reader.sums(extent, first, last) != extent.sums[first:last]).nonzero()[0].tolist()
            verified += extent.span(first, last)[1]
            for block in wrong:
                offset, nbytes = extent.span(first + block, first + block + 1)
                problem = f"block {first + block} ({nbytes} bytes at {offset} of {name}) is not what was sealed"
                findings.append(Finding(str(extent), problem, "write it again from another copy; look at the disk"))
    return verified


def _report(path: Path, superblock: Superblock, loaded: Loaded, verified: int, findings: list[Finding]) -> Report:
    counts = loaded.catalogue.counts()
    notes = []
    if loaded.torn_nbytes:
        problem = f"{loaded.torn_nbytes} bytes behind the journal's last whole record, {loaded.torn_reason}"
        notes.append(Finding("journal", problem, "nothing: nobody was told of them, and the next start cuts them off"))
    unsealed = [e for e in loaded.catalogue.extents.values() if (e.state == OPEN).any()]
    notes += [
        Finding(
            str(extent),
            f"{extent.nbytes - extent.sealed_nbytes()} of {extent.nbytes} bytes are not proven: no transfer that wrote "
            "to them was DONE",
            "nothing, or write them again",
        )
        for extent in unsealed[:_MOST_NOTES]
    ]
    return Report(
        directory=str(path),
        pool=superblock.pool,
        uuid=superblock.uuid,
        node=superblock.node,
        slabs=len(superblock.slabs),
        slab_nbytes=sum(superblock.slabs),
        extents=counts.extents,
        extents_nbytes=counts.nbytes,
        sealed_nbytes=counts.sealed_nbytes,
        summed_nbytes=counts.summed_nbytes,
        journal_records=loaded.journal_records,
        was_clean=loaded.catalogue.is_closed,
        torn_nbytes=loaded.torn_nbytes,
        torn_reason=loaded.torn_reason,
        verified_nbytes=verified,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report as a JSON document; returns the exit status."""
    parser = argparse.ArgumentParser(prog="xferctl fsck", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--adopt", default="", metavar="NODE")
    wanted = parser.parse_args(argv)
    try:
        report = check(wanted.directory, verify=wanted.verify, repair=wanted.repair, adopt=wanted.adopt)
    except XferdError as error:
        document = {"code": error.code, "message": error.message, "limit": error.limit, "remedy": error.remedy}
        sys.stdout.write(json.dumps({"error": document}) + "\n")
        return EXIT_UNSEEN
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    return EXIT_WRONG if report.findings else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
