"""How a node's record looks as bytes in a store: JSON that people can read with the store's own tools.

Not here: regions (asked from their node, or carried in a blob, ``blob.py``), and under which key a record lies
(``keys.py``). What comes out of a store was written by others, perhaps by a newer xferd: unknown fields and unknown
memory kinds are passed over, and rubbish gives no record and one log line.
"""

from __future__ import annotations

import json

import structlog

from xferd.api.types import MemoryKind, NodeInfo

RECORD_VERSION = 1
"""Changes only when a reader of the old form would misunderstand the new one; new fields do not change it."""

MAX_RECORD_NBYTES = 256 << 10
"""A record lists one node's addresses and agents; anything larger is rubbish."""

MAX_AGENT_NBYTES = 4 << 10
"""An agent's record says whose it is and little else."""

_KINDS = {kind.value: kind for kind in MemoryKind}
_log = structlog.get_logger(__name__)


def node_to_bytes(node: NodeInfo) -> bytes:
    """Return the record as JSON; equal records give equal bytes."""
    record = {
        "record_version": RECORD_VERSION,
        "name": node.name,
        "id": node.id,
        "epoch": node.epoch,
        "version": node.version,
        "addresses": node.addresses,
        "backends": node.backends,
        "kinds": [kind.value for kind in node.kinds],
        "agents": node.agents,
        "started_at": node.started_at,
        **({"draining": True} if node.draining else {}),
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def node_from_bytes(raw: bytes, *, where: str) -> NodeInfo | None:
    """Return the record, or None where the bytes are none; ``where`` names their place in the log line."""
    try:
        return _node(raw)
    except (ValueError, OverflowError, RecursionError) as exc:
        _log.warning("record_skipped", where=where, nbytes=len(raw), problem=str(exc) or type(exc).__name__)
        return None


def agent_to_bytes(node: str, agent: str) -> bytes:
    """Return the record of one agent of a node, where agents have records of their own."""
    record = {"record_version": RECORD_VERSION, "name": agent, "node": node}
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def agent_from_bytes(raw: bytes, *, where: str) -> tuple[str, str] | None:
    """Return (node, agent), or None where the bytes are no agent's record; ``where`` is for the log line."""
    try:
        record = _object(raw, MAX_AGENT_NBYTES)
        node, agent = _text(record, "node"), _text(record, "name")
        if not node or not agent:
            raise ValueError("node or name is missing")
    except (ValueError, OverflowError, RecursionError) as exc:
        _log.warning("record_skipped", where=where, nbytes=len(raw), problem=str(exc) or type(exc).__name__)
        return None
    return node, agent


def _object(raw: bytes, limit: int) -> dict[str, object]:
    if len(raw) > limit:
        raise ValueError(f"larger than {limit} bytes")
    record = json.loads(raw)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    version = _number(record, "record_version")
    if version != RECORD_VERSION:
        raise ValueError(f"record version {version}, this xferd reads {RECORD_VERSION}")
    return record


def _node(raw: bytes) -> NodeInfo:
    record = _object(raw, MAX_RECORD_NBYTES)
    name, node_id, epoch = _text(record, "name"), _text(record, "id"), _number(record, "epoch")
    if not name or not node_id or epoch < 1:
        raise ValueError("name, id or epoch is missing")
    started_at = record.get("started_at", 0.0)
    if isinstance(started_at, bool) or not isinstance(started_at, int | float):
        raise ValueError("started_at is no number")
    draining = record.get("draining", False)
    if not isinstance(draining, bool):
        raise ValueError("draining is neither true nor false")
    return NodeInfo(
        name=name,
        id=node_id,
        epoch=epoch,
        version=_text(record, "version"),
        addresses=_texts(record, "addresses"),
        backends=_texts(record, "backends"),
        kinds=tuple(_KINDS[kind] for kind in _texts(record, "kinds") if kind in _KINDS),
        agents=_texts(record, "agents"),
        started_at=float(started_at),
        draining=draining,
    )


def _text(record: dict[str, object], field: str) -> str:
    value = record.get(field, "")
    if not isinstance(value, str):
        raise ValueError(f"{field} is no text")
    value.encode()  # a lone surrogate would pass here and fail in the next message that carries it
    return value


def _number(record: dict[str, object], field: str) -> int:
    value = record.get(field, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError(f"{field} is no unsigned 64-bit number")
    return value


def _texts(record: dict[str, object], field: str) -> tuple[str, ...]:
    values = record.get(field, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{field} is no list of texts")
    "".join(values).encode()
    return tuple(values)
