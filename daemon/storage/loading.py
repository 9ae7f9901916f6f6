"""Reading what a storage directory's snapshot and journal say, without changing a byte.

A start, a compaction and fsck all come through here, so that fsck says what a start would find.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import IntegrityError
from xferd.daemon.storage import files, journal, layout, records
from xferd.daemon.storage.catalogue import Catalogue

if TYPE_CHECKING:
    from pathlib import Path

    from xferd.daemon.storage.records import Scan

_HELP = "see what `xferctl fsck` says of the directory; its --repair keeps what is before the damage"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files say.

    Attributes:
        catalogue: the extents.
        number: of the snapshot and of its journal.
        sequence: of the last good record.
        journal_nbytes: where the journal's good records end.
        snapshot_nbytes: size of the snapshot.
        torn_nbytes: bytes behind, of batches that were never acknowledged.
        torn_reason: what is wrong with them, or "".
        journal_records: how many good ones.
    """

    catalogue: Catalogue
    number: int
    sequence: int
    journal_nbytes: int
    snapshot_nbytes: int
    torn_nbytes: int
    torn_reason: str
    journal_records: int


def load(path: Path, *, allow_damage: bool = False) -> Loaded:
    """Read a directory's newest snapshot and its journal.

    Args:
        path: of the directory.
        allow_damage: take what is before the damage and goes together, as fsck does.

    Raises:
        IntegrityError: no snapshot, a damaged one, a journal that is damaged before its end, or records that do not
            go together; never for a journal that is merely cut off.
        MoveFailed: a file cannot be read.
    """
    number = journal.highest(os.listdir(path))  # noqa: PTH208 - names, not paths
    if number < 0:
        raise IntegrityError(f"storage directory {path} has no snapshot", remedy="restore it from a copy")
    name = path / layout.snapshot_name(number)
    catalogue = Catalogue()
    data = files.read_whole(name)
    snapshot = records.scan(data)
    if not allow_damage:
        _check_snapshot(snapshot, str(name))
    _apply(catalogue, snapshot, str(name), is_tolerant=allow_damage)
    name = path / layout.journal_name(number)
    log = files.read_whole(name)
    # After a damaged snapshot nobody knows the number that the journal should begin with.
    found = records.scan(log, 0 if allow_damage else snapshot.last_sequence + 1)
    if found.tail is records.TailState.DAMAGED and not allow_damage:
        raise IntegrityError(f"journal {name} is damaged {found.reason}", remedy=_HELP)
    _apply(catalogue, found, str(name), is_tolerant=allow_damage)
    return Loaded(
        catalogue,
        number,
        found.last_sequence or snapshot.last_sequence,
        found.good_nbytes,
        len(data),
        len(log) - found.good_nbytes,
        found.reason,
        len(found.entries),
    )


def _check_snapshot(snapshot: Scan, name: str) -> None:
    """A snapshot is put in place as a whole, so that anything less than the whole of it is damage."""
    entries = snapshot.entries
    last = entries[-1].record if entries else None
    if snapshot.tail is not records.TailState.WHOLE:
        raise IntegrityError(f"snapshot {name} is damaged {snapshot.reason}", remedy=_HELP)
    if not isinstance(last, records.End) or last.count != len(entries) - 1:
        raise IntegrityError(f"snapshot {name} is cut off after {len(entries)} records", remedy=_HELP)


def _apply(catalogue: Catalogue, found: Scan, name: str, *, is_tolerant: bool) -> None:
    for entry in found.entries:
        try:
            catalogue.apply(entry.record)
        except IntegrityError as error:
            if is_tolerant:
                continue
            raise IntegrityError(
                f"{name}, record {entry.sequence} at byte {entry.offset}: {error.message}", remedy=_HELP
            ) from error
