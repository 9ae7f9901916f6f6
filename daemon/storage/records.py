"""The journal's records: their bytes, and what is to be made of a file whose end was lost. Pure, no I/O.

Every record is a header of 40 bytes and a payload padded to 8, little-endian throughout; ``docs/storage.md`` has the
layout byte by byte. A record carries, beside its own sequence number, the highest number that was known to be on the
disk when it was written. That tells a torn end from damage: records of the last batch may be missing in any pattern
after a power cut, and nobody was told that they are there; but where a later record says that the missing one was on
the disk, something has damaged the file since.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import xxhash

from xferd.api.types import Access

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAGIC = 0x314A4658  # "XFJ1"
_MAGIC_BYTES = MAGIC.to_bytes(4, "little")
HEADER = struct.Struct("<IHHIIQQQ")  # magic, type, flags, payload_nbytes, 0, sequence, durable, checksum
_CHECKED = HEADER.size - 8
MAX_PAYLOAD_NBYTES = 64 << 20
MAX_SEAL_BLOCKS = 8192
"""Blocks of one SEAL record: 64 KiB of checksums; longer spans take several records."""

_ALLOCATE = struct.Struct("<IIIIdBBHI")  # count, block_nbytes, agent, label, created_at, access, flags, 0, 0
_EXTENT = struct.Struct("<QIIQQ")  # id, slab, 0, offset, nbytes
_COUNT = struct.Struct("<II")
_RANGE = struct.Struct("<QII")  # id, first, count
_OWN = struct.Struct("<IIII")  # count, agent, access, 0
_SEAL = struct.Struct("<QIIII")  # id, first, count, flags, 0
_TIME = struct.Struct("<d")
_SUMS = 1


class RecordType(enum.IntEnum):
    """What a record says; the values are the journal's."""

    ALLOCATE = 1
    FREE = 2
    DIRTY = 3
    SEAL = 4
    CLOSE = 5
    SNAPSHOT = 6
    END = 7
    OWN = 8
    START = 9


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an extent lies: ``nbytes`` as asked for, the room it takes is rounded up to 4096."""

    id: int
    slab: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Allocate:
    """Extents of one call, in one record, so that a group is there whole or not at all."""

    extents: tuple[Placed, ...]
    agent: str
    label: str
    access: Access
    block_nbytes: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Free:
    """Extents that are gone."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Own:
    """Extents that another agent has from now on, with what others may do."""

    ids: tuple[int, ...]
    agent: str
    access: Access


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks ``first`` to ``first + count - 1`` of an extent."""

    id: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Dirty:
    """Sealed blocks that are about to be written: their proof is void from here on."""

    ranges: tuple[BlockRange, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """Blocks whose bytes are on the disk; ``sums`` are their xxh3, None where the pool keeps none."""

    id: int
    first: int
    count: int
    sums: NDArray[np.uint64] | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Seal) or (self.sums is None) != (other.sums is None):
            return NotImplemented if not isinstance(other, Seal) else False
        same = (self.id, self.first, self.count) == (other.id, other.first, other.count)
        return same and (self.sums is None or bool(np.array_equal(self.sums, other.sums)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return hash((self.id, self.first, self.count))


@dataclass(frozen=True, slots=True)
class Close:
    """The daemon ended in order: nothing that was freed is left unwiped."""


@dataclass(frozen=True, slots=True)
class Start:
    """A daemon began to use the directory (UNIX time); until its CLOSE, memory that was freed may be unwiped."""

    at: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """First of a snapshot: whose it is."""

    pool_uuid: bytes


@dataclass(frozen=True, slots=True)
class End:
    """Last of a snapshot: how many records stand before it."""

    count: int


Record: TypeAlias = Allocate | Free | Own | Dirty | Seal | Close | Snapshot | End | Start


def encode(record: Record, sequence: int, durable: int) -> bytes:
    """Return a record's bytes, header and padding included."""
    kind, payload = _payload_of(record)
    if len(payload) > MAX_PAYLOAD_NBYTES:
        raise ValueError(f"a {kind.name} record of {len(payload)} bytes passes {MAX_PAYLOAD_NBYTES}")
    head = HEADER.pack(MAGIC, kind, 0, len(payload), 0, sequence, durable, 0)[:_CHECKED]
    checksum = _checksum(head, payload)
    return head + checksum.to_bytes(8, "little") + payload + bytes(-len(payload) % 8)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with where it stood and its numbers."""

    offset: int
    nbytes: int
    sequence: int
    durable: int
    record: Record


class TailState(enum.Enum):
    """How a journal ends."""

    WHOLE = "whole"
    TORN = "torn"  # the end of a batch that was never acknowledged
    DAMAGED = "damaged"  # something was there and is no more


@dataclass(frozen=True, slots=True)
class Scan:
    """What a journal's bytes hold: its good entries, and what comes after them."""

    entries: tuple[Entry, ...]
    good_nbytes: int
    tail: TailState
    reason: str

    @property
    def last_sequence(self) -> int:
        """Number of the last good record, 0 where there is none."""
        return self.entries[-1].sequence if self.entries else 0


def scan(data: bytes | memoryview, first_sequence: int = 0) -> Scan:
    """Read records up to the first bad one; they count up by one from ``first_sequence``, 0 for what the first has."""
    view = memoryview(data)
    entries: list[Entry] = []
    at, expected = 0, first_sequence
    while at < len(view):
        found = _entry_at(view, at)
        if isinstance(found, str):
            return _tail(view, at, expected, entries, found)
        expected = expected or found.sequence
        if found.sequence != expected:
            return _tail(view, at, expected, entries, f"record {found.sequence} where {expected} is due")
        entries.append(found)
        at, expected = at + found.nbytes, expected + 1
    return Scan(tuple(entries), at, TailState.WHOLE, "")


def _tail(view: memoryview, at: int, expected: int, entries: list[Entry], why: str) -> Scan:
    """Say whether what begins at ``at`` is a torn end: no record after it knew the missing one to be on the disk."""
    reason = f"at byte {at} of {len(view)}: {why}"
    for later in _entries_after(view, at):
        if later.sequence >= expected and later.durable >= expected:
            told = f"record {later.sequence} at byte {later.offset} says that record {expected} was on the disk"
            return Scan(tuple(entries), at, TailState.DAMAGED, f"{reason}; {told}")
    return Scan(tuple(entries), at, TailState.TORN, reason)


def _entries_after(view: memoryview, at: int) -> Iterator[Entry]:
    data = view[at:].tobytes()
    found = data.find(_MAGIC_BYTES, 1)
    while found >= 0:
        entry = _entry_at(view, at + found)
        if not isinstance(entry, str):
            yield entry
        found = data.find(_MAGIC_BYTES, found + 1)


def _entry_at(view: memoryview, at: int) -> Entry | str:
    """Return the record at a position, or why there is none."""
    left = len(view) - at
    if left < HEADER.size:
        return f"{left} bytes are no header"
    magic, kind, _flags, payload_nbytes, _, sequence, durable, checksum = HEADER.unpack_from(view, at)
    nbytes = HEADER.size + payload_nbytes + -payload_nbytes % 8
    if magic != MAGIC:
        return f"magic {magic:#x}"
    if payload_nbytes > MAX_PAYLOAD_NBYTES or nbytes > left:
        return f"a record of {nbytes} bytes, and {left} are left"
    payload = bytes(view[at + HEADER.size : at + HEADER.size + payload_nbytes])
    if _checksum(bytes(view[at : at + _CHECKED]), payload) != checksum:
        return "a checksum that does not match"
    try:
        record = _record_of(RecordType(kind), payload)
    except (ValueError, struct.error) as exc:
        return f"a record of type {kind} that cannot be read: {exc}"
    return Entry(at, nbytes, sequence, durable, record)


def _checksum(head: bytes, payload: bytes) -> int:
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return int(state.intdigest())


# ----------------------------------------------------------------------------------------- payloads


def _payload_of(record: Record) -> tuple[RecordType, bytes]:
    match record:
        case Allocate():
            agent, label = record.agent.encode(), record.label.encode()
            head = _ALLOCATE.pack(
                len(record.extents),
                record.block_nbytes,
                len(agent),
                len(label),
                record.created_at,
                record.access.value,
                0,
                0,
                0,
            )
            places = b"".join(_EXTENT.pack(e.id, e.slab, 0, e.offset, e.nbytes) for e in record.extents)
            return RecordType.ALLOCATE, head + places + agent + label
        case Free(ids):
            return RecordType.FREE, _COUNT.pack(len(ids), 0) + _ids_to_bytes(ids)
        case Own(ids, agent_name, access):
            name = agent_name.encode()
            return RecordType.OWN, _OWN.pack(len(ids), len(name), access.value, 0) + _ids_to_bytes(ids) + name
        case Dirty(ranges):
            packed = b"".join(_RANGE.pack(r.id, r.first, r.count) for r in ranges)
            return RecordType.DIRTY, _COUNT.pack(len(ranges), 0) + packed
        case Seal(id_, first, count, sums):
            head = _SEAL.pack(id_, first, count, 0 if sums is None else _SUMS, 0)
            return RecordType.SEAL, head + (b"" if sums is None else sums.astype("<u8").tobytes())
        case Close():
            return RecordType.CLOSE, b""
        case Snapshot(uuid):
            return RecordType.SNAPSHOT, uuid
        case End(total):
            return RecordType.END, total.to_bytes(8, "little")
        case Start(at):
            return RecordType.START, _TIME.pack(at)


def _record_of(kind: RecordType, payload: bytes) -> Record:
    """Return a payload's record; raises ValueError or struct.error where it is not one."""
    match kind:
        case RecordType.ALLOCATE:
            return _allocate_of(payload)
        case RecordType.FREE:
            (count, _), at = _COUNT.unpack_from(payload), _COUNT.size
            return Free(_ids_of(payload, at, count, len(payload)))
        case RecordType.OWN:
            count, name, access, _ = _OWN.unpack_from(payload)
            end = _OWN.size + 8 * count
            _check_nbytes(payload, end + name)
            return Own(_ids_of(payload, _OWN.size, count, end), payload[end:].decode(), Access(access))
        case RecordType.DIRTY:
            (count, _), at = _COUNT.unpack_from(payload), _COUNT.size
            _check_nbytes(payload, at + _RANGE.size * count)
            return Dirty(tuple(BlockRange(*fields) for fields in _RANGE.iter_unpack(payload[at:])))
        case RecordType.SEAL:
            id_, first, count, flags, _ = _SEAL.unpack_from(payload)
            _check_nbytes(payload, _SEAL.size + (8 * count if flags & _SUMS else 0))
            sums = np.frombuffer(payload, "<u8", count, _SEAL.size).astype(np.uint64) if flags & _SUMS else None
            return Seal(id_, first, count, sums)
        case RecordType.CLOSE:
            return Close()
        case RecordType.SNAPSHOT:
            _check_nbytes(payload, 16)
            return Snapshot(payload)
        case RecordType.END:
            _check_nbytes(payload, 8)
            return End(int.from_bytes(payload, "little"))
        case RecordType.START:
            return Start(*_TIME.unpack(payload))


def _allocate_of(payload: bytes) -> Allocate:
    count, block_nbytes, agent, label, created_at, access, *_ = _ALLOCATE.unpack_from(payload)
    names = _ALLOCATE.size + _EXTENT.size * count
    _check_nbytes(payload, names + agent + label)
    places = _EXTENT.iter_unpack(payload[_ALLOCATE.size : names])
    return Allocate(
        tuple(Placed(id_, slab, offset, nbytes) for id_, slab, _, offset, nbytes in places),
        payload[names : names + agent].decode(),
        payload[names + agent :].decode(),
        Access(access),
        block_nbytes,
        created_at,
    )


def _ids_to_bytes(ids: tuple[int, ...]) -> bytes:
    return np.array(ids, dtype="<u8").tobytes()


def _ids_of(payload: bytes, at: int, count: int, end: int) -> tuple[int, ...]:
    if at + 8 * count != end:
        raise ValueError(f"{count} ids in {end - at} bytes")
    return tuple(np.frombuffer(payload, "<u8", count, at).tolist())


def _check_nbytes(payload: bytes, wanted: int) -> None:
    if len(payload) != wanted:
        raise ValueError(f"{len(payload)} bytes where {wanted} are due")
